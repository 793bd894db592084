/*
 * A virtio-blk request as NBD commands, one after the other: mostly one. More where the server
 * takes smaller payloads, for several extents, and to make data stable for a driver that knows no
 * FLUSH. What the server does not offer is left out (a discard is advice, and without FLUSH there
 * is nothing to flush), or done by other means (zeroes are written).
 *
 * A command is made when it is sent, from how far its request has come: so after a reconnection it
 * fits the server of now.
 */
#include <errno.h>
#include <linux/virtio_blk.h>

#include "exchange.h"

enum { ZEROES_BYTES = 256 * 1024 };
#define EXTENT_MAX (1ull << 30)

static uint8_t zeroes[ZEROES_BYTES];
static struct iovec zeroes_iov = { zeroes, ZEROES_BYTES };

static bool offers(const struct nbd_queue *nq, enum nbd_flag flag)
{
    return nq->link.export.flags & flag;
}

/*
 * A driver that cannot send FLUSH counts on what it writes to be stable when it completes (VIRTIO
 * 1.3, 5.2.6.2). One that can does not know of a server that forgets, when it is killed, what was
 * not flushed: decl/engine.h, write_through.
 */
static bool must_sync(const struct nbd_queue *nq)
{
    return nq->nbd->target.write_through ||
           !(vd_queue_config_of(nq->queue)->features >> VIRTIO_BLK_F_FLUSH & 1);
}

static enum nbd_next set_command(struct nbd_slot *slot, uint16_t type, uint64_t offset,
                                 uint64_t length)
{
    slot->type = type;
    slot->flags = 0;
    slot->offset = offset;
    slot->length = length;
    return NBD_COMMAND;
}

/* Whether a range does not begin with a whole block of the server's. */
static bool is_part(const struct nbd_queue *nq, uint64_t offset, uint64_t left)
{
    uint32_t block = nq->link.export.min_block;

    return block > VD_SECTOR_BYTES && (offset % block || left < block);
}

/*
 * Of a range that begins with a whole block: how much fits, in whole blocks, into a command of at
 * most so many bytes.
 */
static uint64_t whole(const struct nbd_queue *nq, uint64_t left, uint64_t most)
{
    uint64_t bytes = at_most(left, most);

    return bytes - bytes % nq->link.export.min_block;
}

/* What changes whole blocks, before its command is made. */
static bool may_change(struct nbd_queue *nq, struct nbd_slot *slot)
{
    return nq->link.export.min_block <= VD_SECTOR_BYTES || nbd_hold(nq, slot, NBD_SHARED);
}

static enum nbd_next next_transfer(struct nbd_queue *nq, struct nbd_slot *slot)
{
    struct vd_request *r = slot->request;
    uint64_t offset = r->offset + r->done, left = r->length - r->done;

    if (!left)
        return NBD_ENDED;
    if (is_part(nq, offset, left))
        return nbd_part(nq, slot, offset);
    if (r->operation == VD_WRITE && !may_change(nq, slot))
        return NBD_BLOCKED;
    slot->iov = r->data;
    slot->iov_count = r->data_count;
    return set_command(slot, r->operation == VD_READ ? NBD_READ : NBD_WRITE, offset,
                       whole(nq, left, nq->link.export.max_payload));
}

/* The whole blocks in the extent; the rest is left as it is. */
static enum nbd_next discard(struct nbd_queue *nq, struct nbd_slot *slot, const struct vd_extent *e)
{
    uint64_t block = nq->link.export.min_block, offset = e->offset + slot->request->done;
    uint64_t skip = (block - offset % block) % block, left = e->length - slot->request->done;

    if (!offers(nq, NBD_FLAG_TRIM) || left < skip || left - skip < block)
        return NBD_ENDED;
    if (!may_change(nq, slot))
        return NBD_BLOCKED;
    slot->request->done += skip;
    return set_command(slot, NBD_TRIM, offset + skip, whole(nq, left - skip, EXTENT_MAX));
}

static enum nbd_next zero(struct nbd_queue *nq, struct nbd_slot *slot, const struct vd_extent *e)
{
    uint64_t offset = e->offset + slot->request->done, left = e->length - slot->request->done;

    if (!left)
        return NBD_ENDED;
    if (is_part(nq, offset, left))
        return nbd_part(nq, slot, offset);
    if (!may_change(nq, slot))
        return NBD_BLOCKED;
    if (offers(nq, NBD_FLAG_WRITE_ZEROES)) {
        set_command(slot, NBD_WRITE_ZEROES, offset, whole(nq, left, EXTENT_MAX));
        slot->flags = e->unmap ? 0 : NBD_CMD_NO_HOLE;
        return NBD_COMMAND;
    }
    slot->iov = &zeroes_iov;
    slot->iov_count = 1;
    return set_command(slot, NBD_WRITE, offset,
                       whole(nq, left, at_most(nq->link.export.max_payload, ZEROES_BYTES)));
}

/* The next command that moves or clears something. */
static enum nbd_next next_data(struct nbd_queue *nq, struct nbd_slot *slot)
{
    struct vd_request *r = slot->request;

    if (r->operation == VD_READ || r->operation == VD_WRITE)
        return next_transfer(nq, slot);
    for (; r->step < r->extent_count; r->step++, r->done = 0) {
        const struct vd_extent *e = &r->extents[r->step];
        enum nbd_next next = r->operation == VD_DISCARD ? discard(nq, slot, e) : zero(nq, slot, e);

        if (next != NBD_ENDED)
            return next;
    }
    return NBD_ENDED;
}

enum nbd_next nbd_next_command(struct nbd_queue *nq, struct nbd_slot *slot)
{
    struct vd_request *r = slot->request;
    bool sync = r->operation == VD_FLUSH || (r->operation != VD_READ && must_sync(nq));
    enum nbd_next next = next_data(nq, slot);

    if (next == NBD_BLOCKED)
        return next;
    if (next == NBD_COMMAND) {
        if (sync && slot->type != NBD_READ && offers(nq, NBD_FLAG_FUA))
            slot->flags |= NBD_CMD_FUA;
        else
            slot->unstable |= sync && slot->type != NBD_READ;
        return next;
    }
    if ((r->operation != VD_FLUSH && !slot->unstable) || slot->flushed ||
        !offers(nq, NBD_FLAG_FLUSH))
        return NBD_ENDED;
    return set_command(slot, NBD_FLUSH, 0, 0);
}

void nbd_submit(struct vd_queue *q, struct vd_request *r)
{
    struct nbd_queue *nq = vd_queue_backend(q);
    struct nbd_slot *slot = &nq->slots[vd_request_index(q, r)];

    slot->request = r;
    slot->iov = NULL;
    slot->iov_count = 0;
    if (!r->failing_since_ns) /* else it goes on where it failed */
        slot->unstable = slot->flushed = false;
    if (r->operation == VD_FLUSH && load_relaxed(&nq->nbd->flush_failed))
        nbd_finish(nq, slot, EIO);
    else
        nbd_append(&nq->waiting, slot);
}

void nbd_finish(struct nbd_queue *nq, struct nbd_slot *slot, int error)
{
    nbd_release(nq, slot);
    nbd_unsuspect(nq, slot);
    vd_request_finish(nq->queue, slot->request, error);
}

/*
 * Have it tried again if the reason may pass, else tell the driver. A FLUSH is not tried again, and
 * none is believed any more: whoever failed to make something stable may have forgotten it, and
 * succeed the next time for having nothing to do.
 */
static void failed(struct nbd_queue *nq, struct nbd_slot *slot)
{
    bool flush = slot->type == NBD_FLUSH, never = flush || slot->error == EOPNOTSUPP;

    if (flush)
        store_relaxed(&nq->nbd->flush_failed, true);
    nbd_release(nq, slot); /* others may write while it waits; a part of a block is begun again */
    if (never || !vd_request_wait(nq->queue, slot->request, slot->error))
        nbd_finish(nq, slot, slot->error == EOPNOTSUPP ? EIO : slot->error);
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
    uint64_t bytes;

    vd_count_remote(nq->stats, slot->sent_ns, vd_queue_now_ns(nq->queue));
    nbd_unsuspect(nq, slot);
    if (slot->error) {
        failed(nq, slot);
        return;
    }
    slot->flushed = slot->type == NBD_FLUSH;
    bytes = slot->in_block ? nbd_part_done(nq, slot) : slot->length;
    r->done += bytes;
    if ((r->operation == VD_READ || r->operation == VD_WRITE) && r->done < r->length)
        drop_front(r, bytes);
    if (!slot->block_read)
        nbd_release(nq, slot);
    if (nbd_next_command(nq, slot) == NBD_ENDED)
        nbd_finish(nq, slot, 0);
    else
        nbd_append(&nq->waiting, slot);
}
