/*
 * Servers may want every offset and length to be a multiple of some block (NBD_INFO_BLOCK_SIZE)
 * that is larger than the 512 bytes in which drivers count. Whole blocks go as they are. A part of
 * one is read as a whole into the queue's block, and taken from there, or changed there and written
 * back.
 *
 * Between reading and writing nobody else may write the block, on any queue: what they wrote would
 * be undone. So whatever changes blocks needs a hold: many at once may change whole blocks, or one
 * alone changes a part of one. Who waits to be alone comes before whoever comes after him. Holds
 * survive a lost connection, as their requests do.
 *
 * All of that is for servers with large blocks; with others nothing here is called.
 */
#include "exchange.h"

void nbd_register(struct nbd_queue *nq)
{
    struct nbd *n = nq->nbd;

    pthread_mutex_lock(&n->lock);
    nq->next_queue = n->queues;
    n->queues = nq;
    pthread_mutex_unlock(&n->lock);
}

void nbd_unregister(struct nbd_queue *nq)
{
    struct nbd *n = nq->nbd;

    pthread_mutex_lock(&n->lock);
    for (struct nbd_queue **at = &n->queues; *at; at = &(*at)->next_queue)
        if (*at == nq) {
            *at = nq->next_queue;
            break;
        }
    pthread_mutex_unlock(&n->lock);
}

bool nbd_hold(struct nbd_queue *nq, struct nbd_slot *slot, enum nbd_hold hold)
{
    struct nbd *n = nq->nbd;
    bool got;

    if (slot->hold == hold)
        return true;
    pthread_mutex_lock(&n->lock);
    if (hold == NBD_ALONE && slot->hold == NBD_NO_HOLD) {
        slot->hold = NBD_WAITS;
        n->changers++;
    }
    got = !n->changing && (hold == NBD_ALONE ? !n->writers : !n->changers);
    if (got && hold == NBD_ALONE) {
        n->changers--;
        n->changing = true;
    } else if (got) {
        n->writers++;
    }
    if (got)
        slot->hold = hold;
    nq->blocked |= !got;
    pthread_mutex_unlock(&n->lock);
    return got;
}

void nbd_release(struct nbd_queue *nq, struct nbd_slot *slot)
{
    struct nbd *n = nq->nbd;

    if (nq->block_owner == slot)
        nq->block_owner = NULL;
    slot->in_block = slot->block_read = false;
    if (slot->hold == NBD_NO_HOLD)
        return;
    pthread_mutex_lock(&n->lock);
    if (slot->hold == NBD_SHARED)
        n->writers--;
    else if (slot->hold == NBD_ALONE)
        n->changing = false;
    else
        n->changers--;
    slot->hold = NBD_NO_HOLD;
    for (struct nbd_queue *each = n->queues; each; each = each->next_queue)
        if (each->blocked) {
            each->blocked = false;
            vd_queue_wake(each->queue);
        }
    pthread_mutex_unlock(&n->lock);
}

enum nbd_next nbd_part(struct nbd_queue *nq, struct nbd_slot *slot, uint64_t offset)
{
    uint32_t size = nq->link.export.min_block;

    if (nq->block_owner && nq->block_owner != slot)
        return NBD_BLOCKED; /* by one of our own, whose end is followed by another turn */
    nq->block_owner = slot;
    if (slot->request->operation != VD_READ && !nbd_hold(nq, slot, NBD_ALONE))
        return NBD_BLOCKED;
    slot->in_block = true;
    slot->block_iov = (struct iovec){ nq->block, size };
    slot->iov = &slot->block_iov;
    slot->iov_count = 1;
    slot->type = slot->block_read ? NBD_WRITE : NBD_READ;
    slot->flags = 0;
    slot->offset = offset / size * size;
    slot->length = size;
    return NBD_COMMAND;
}

/*
 * Copy between the request's next bytes and a place in the block; zeros where the request has no
 * bytes.
 */
static void copy_part(struct vd_request *r, uint8_t *place, uint64_t bytes)
{
    if (r->operation == VD_WRITE_ZEROES) {
        memset(place, 0, bytes);
        return;
    }
    for (uint32_t i = 0; bytes && i < r->data_count; i++) {
        uint64_t n = r->data[i].iov_len < bytes ? r->data[i].iov_len : bytes;

        if (r->operation == VD_READ)
            memcpy(r->data[i].iov_base, place, n);
        else
            memcpy(place, r->data[i].iov_base, n);
        place += n;
        bytes -= n;
    }
}

uint64_t nbd_part_done(struct nbd_queue *nq, struct nbd_slot *slot)
{
    struct vd_request *r = slot->request;
    bool zeroes = r->operation == VD_WRITE_ZEROES;
    uint64_t begin = zeroes ? r->extents[r->step].offset : r->offset,
             length = zeroes ? r->extents[r->step].length : r->length;
    uint64_t at = begin + r->done - slot->offset, room = slot->length - at, left = length - r->done;
    uint64_t bytes = left < room ? left : room;

    if (!slot->block_read)
        copy_part(r, nq->block + at, bytes);
    if (r->operation == VD_READ || slot->block_read) {
        nbd_release(nq, slot);
        return bytes;
    }
    slot->block_read = true;
    return 0;
}
