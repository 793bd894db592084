/*
 * Commands into the socket: all that wait, headers and payload, in one sendmsg that the queue's
 * io_uring does together with everything else of its turn. Payload goes from the driver's buffers;
 * nothing is copied here.
 *
 * One send is under way at a time. The kernel has our pieces until it ends, also while it waits for
 * room.
 */
#include "exchange.h"

static void encode(struct nbd_queue *nq, struct nbd_slot *slot)
{
    bool extended = nq->link.export.extended;
    uint16_t flags = slot->flags;

    if (extended && slot->type == NBD_WRITE)
        flags |= NBD_CMD_PAYLOAD_LENGTH;
    slot->cookie = ++nq->cookies << NBD_COOKIE_SHIFT | (uint64_t)(slot - nq->slots);
    put32(slot->header, extended ? NBD_EXTENDED_REQUEST_MAGIC : NBD_REQUEST_MAGIC);
    put16(slot->header + 4, flags);
    put16(slot->header + 6, slot->type);
    put64(slot->header + 8, slot->cookie);
    put64(slot->header + 16, slot->offset);
    if (extended)
        put64(slot->header + 24, slot->length);
    else
        put32(slot->header + 24, (uint32_t)slot->length);
}

/* Append the payload's pieces; they have room for the command's length at least. */
static uint32_t add_payload(struct iovec *to, const struct nbd_slot *slot)
{
    uint64_t left = slot->length;
    uint32_t n = 0;

    for (uint32_t i = 0; left; i++) {
        size_t bytes = slot->iov[i].iov_len < left ? slot->iov[i].iov_len : left;

        if (!bytes)
            continue;
        to[n++] = (struct iovec){ slot->iov[i].iov_base, bytes };
        left -= bytes;
    }
    return n;
}

/* The slot's command into send_iov; false if it does not fit any more. */
static bool add_command(struct nbd_queue *nq, struct nbd_slot *slot)
{
    uint32_t header_bytes = nq->link.export.extended ? NBD_EXTENDED_REQUEST_BYTES
                                                     : NBD_REQUEST_BYTES;
    bool payload = slot->type == NBD_WRITE;

    if (nq->send_count + 1 + (payload ? slot->iov_count : 0) > NBD_IOV_MAX)
        return false;
    encode(nq, slot);
    nq->send_iov[nq->send_count++] = (struct iovec){ slot->header, header_bytes };
    if (payload)
        nq->send_count += add_payload(nq->send_iov + nq->send_count, slot);
    slot->send_end = nq->send_count;
    nbd_remove(&nq->waiting, slot);
    nbd_append(&nq->sent, slot);
    slot->sent = true;
    slot->received = 0;
    slot->error = 0;
    slot->sent_ns = vd_queue_now_ns(nq->queue);
    return true;
}

/* Take what waits and may go, as far as it fits. */
static void gather_commands(struct nbd_queue *nq)
{
    struct nbd_slot *next;

    nq->send_first = nq->send_count = 0;
    nq->sent_before = nq->cookies;
    for (struct nbd_slot *slot = nq->waiting.first; slot; slot = next) {
        enum nbd_next need = nbd_next_command(nq, slot);

        next = slot->next;
        if (need == NBD_ENDED) {
            nbd_remove(&nq->waiting, slot);
            nbd_finish(nq, slot, 0);
        } else if (need == NBD_COMMAND && (!add_command(nq, slot) || nbd_one_by_one(nq))) {
            return;
        }
    }
}

struct nbd_loss nbd_send(struct nbd_queue *nq)
{
    if (nq->sending || !nq->waiting.first || (nbd_one_by_one(nq) && nq->sent.first))
        return (struct nbd_loss){ NBD_GOES_ON, 0 };
    gather_commands(nq);
    return nq->send_count ? nq->transport->send(nq) : (struct nbd_loss){ NBD_GOES_ON, 0 };
}
