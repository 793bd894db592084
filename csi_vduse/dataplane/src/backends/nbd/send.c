/*
 * Commands into the socket: all that wait, headers and payload, in one sendmsg that the queue's io_uring does together with
 * everything else of its turn. Payload goes from the driver's buffers; nothing is copied here.
 *
 * One send is under way at a time. The kernel has our pieces until it ends, also while it waits for room.
 */
#include <errno.h>

#include "nbd.h"
#include "secure.h"

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
static bool add(struct nbd_queue *nq, struct nbd_slot *slot)
{
    uint32_t header_bytes = nq->link.export.extended ? NBD_EXTENDED_REQUEST_BYTES : NBD_REQUEST_BYTES;
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
    slot->sent_ns = nq->queue->now_ns;
    return true;
}

/* Take what waits and may go, as far as it fits. */
static void gather(struct nbd_queue *nq)
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
        } else if (need == NBD_COMMAND && (!add(nq, slot) || nbd_one_by_one(nq))) {
            return;
        }
    }
}

static void submit(struct nbd_queue *nq)
{
    void *tag = nbd_tag(nq, NBD_SEND);
    struct io_uring_sqe *sqe = vd_queue_sqe(nq->queue, tag);

    nq->send_message = (struct msghdr){ .msg_iov = nq->send_iov + nq->send_first,
                                        .msg_iovlen = nq->send_count - nq->send_first };
    io_uring_prep_sendmsg(sqe, nq->link.fd, &nq->send_message, MSG_NOSIGNAL); /* kTLS takes no MSG_WAITALL */
    io_uring_sqe_set_data(sqe, tag);
    nq->sending = true;
    count_up(&nq->queue->stats->remote.sends, 1);
}

void nbd_send(struct nbd_queue *nq)
{
    if (nq->sending || !nq->waiting.first || (nbd_one_by_one(nq) && nq->sent.first))
        return;
    gather(nq);
    if (!nq->send_count)
        return;
    if (nq->link.ssl)
        nbd_secure_send(nq);
    else
        submit(nq);
}

void nbd_send_done(struct nbd_queue *nq, int result)
{
    size_t bytes = (size_t)result;

    nq->sending = false;
    if (result == -EAGAIN || result == -EINTR)
        bytes = 0;
    else if (result <= 0) {
        nbd_broke(nq, result);
        return;
    }
    uint32_t before = nq->send_first;

    while (nq->send_first < nq->send_count && bytes >= nq->send_iov[nq->send_first].iov_len)
        bytes -= nq->send_iov[nq->send_first++].iov_len;
    nbd_count_records(nq, (size_t)(result > 0 ? result : 0), nq->send_first - before);
    if (nq->send_first == nq->send_count || nq->broken)
        return;
    nq->send_iov[nq->send_first].iov_base = (uint8_t *)nq->send_iov[nq->send_first].iov_base + bytes;
    nq->send_iov[nq->send_first].iov_len -= bytes;
    submit(nq);
}
