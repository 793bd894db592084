/*
 * A virtio-blk request as NBD commands, one after the other: mostly one. More where the server takes smaller payloads, for
 * several extents, and to make data stable for a driver that knows no FLUSH. What the server does not offer is left
 * out (a discard is advice, and without FLUSH there is nothing to flush), or done by other means (zeroes are written).
 *
 * A command is made when it is sent, from how far its request has come: so after a reconnection it fits the server of now.
 */
#include <errno.h>
#include <linux/virtio_blk.h>

#include "nbd.h"
#include "../../stats.h"

enum { ZEROES_BYTES = 256 * 1024 };
#define EXTENT_MAX (1ull << 30)

static uint8_t zeroes[ZEROES_BYTES];
static struct iovec zeroes_iov = { zeroes, ZEROES_BYTES };

static bool offers(const struct nbd_queue *nq, enum nbd_flag flag)
{
    return nq->link.export.flags & flag;
}

/* A driver that cannot send FLUSH counts on what it writes to be stable when it completes (VIRTIO 1.3, 5.2.6.2). */
static bool must_sync(const struct nbd_queue *nq)
{
    return !(nq->queue->config.features >> VIRTIO_BLK_F_FLUSH & 1);
}

static uint64_t at_most(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

static bool command(struct nbd_slot *slot, uint16_t type, uint64_t offset, uint64_t length)
{
    slot->type = type;
    slot->flags = 0;
    slot->offset = offset;
    slot->length = length;
    return true;
}

static bool move(struct nbd_queue *nq, struct nbd_slot *slot)
{
    struct vd_request *r = slot->request;
    uint64_t left = r->length - r->done;

    if (!left)
        return false;
    slot->iov = r->data;
    slot->iov_count = r->data_count;
    return command(slot, r->operation == VD_READ ? NBD_READ : NBD_WRITE, r->offset + r->done,
                   at_most(left, nq->link.export.max_payload));
}

static bool discard(struct nbd_queue *nq, struct nbd_slot *slot, const struct vd_extent *e)
{
    uint64_t done = slot->request->done;

    return offers(nq, NBD_FLAG_TRIM) && done < e->length &&
           command(slot, NBD_TRIM, e->offset + done, at_most(e->length - done, EXTENT_MAX));
}

static bool zero(struct nbd_queue *nq, struct nbd_slot *slot, const struct vd_extent *e)
{
    uint64_t offset = e->offset + slot->request->done, left = e->length - slot->request->done;

    if (!left)
        return false;
    if (offers(nq, NBD_FLAG_WRITE_ZEROES)) {
        command(slot, NBD_WRITE_ZEROES, offset, at_most(left, EXTENT_MAX));
        slot->flags = e->unmap ? 0 : NBD_CMD_NO_HOLE;
        return true;
    }
    slot->iov = &zeroes_iov;
    slot->iov_count = 1;
    return command(slot, NBD_WRITE, offset, at_most(left, at_most(nq->link.export.max_payload, ZEROES_BYTES)));
}

/* The next command that moves or clears something; false if there is none left. */
static bool next_data(struct nbd_queue *nq, struct nbd_slot *slot)
{
    struct vd_request *r = slot->request;

    if (r->operation == VD_READ || r->operation == VD_WRITE)
        return move(nq, slot);
    for (; r->step < r->extent_count; r->step++, r->done = 0)
        if (r->operation == VD_DISCARD ? discard(nq, slot, &r->extents[r->step]) : zero(nq, slot, &r->extents[r->step]))
            return true;
    return false;
}

bool nbd_next_command(struct nbd_queue *nq, struct nbd_slot *slot)
{
    struct vd_request *r = slot->request;
    bool sync = r->operation == VD_FLUSH || (r->operation != VD_READ && must_sync(nq));

    if (next_data(nq, slot)) {
        if (sync && offers(nq, NBD_FLAG_FUA))
            slot->flags |= NBD_CMD_FUA;
        else
            slot->unstable |= sync;
        return true;
    }
    return (r->operation == VD_FLUSH || slot->unstable) && !slot->flushed && offers(nq, NBD_FLAG_FLUSH) &&
           command(slot, NBD_FLUSH, 0, 0);
}

void nbd_submit(struct vd_queue *q, struct vd_request *r)
{
    struct nbd_queue *nq = q->backend;
    struct nbd_slot *slot = &nq->slots[r - q->requests];

    slot->request = r;
    slot->iov = NULL;
    slot->iov_count = 0;
    slot->unstable = slot->flushed = false;
    nbd_append(&nq->waiting, slot);
}

/* Take what has been moved off the front of the request's pieces. */
static void drop_front(struct vd_request *r, uint64_t bytes)
{
    while (r->data_count && bytes >= r->data->iov_len) {
        bytes -= r->data->iov_len;
        r->data++;
        r->data_count--;
    }
    if (bytes) {
        r->data->iov_base = (uint8_t *)r->data->iov_base + bytes;
        r->data->iov_len -= bytes;
    }
}

void nbd_command_done(struct nbd_queue *nq, struct nbd_slot *slot)
{
    struct vd_request *r = slot->request;

    vd_count_remote(nq->queue, slot->sent_ns);
    if (slot->error) {
        vd_request_finish(nq->queue, r, slot->error == EOPNOTSUPP ? EIO : slot->error);
        return;
    }
    slot->flushed = slot->type == NBD_FLUSH;
    r->done += slot->length;
    if ((r->operation == VD_READ || r->operation == VD_WRITE) && r->done < r->length)
        drop_front(r, slot->length);
    if (nbd_next_command(nq, slot))
        nbd_append(&nq->waiting, slot);
    else
        vd_request_finish(nq->queue, r, 0);
}
