/*
 * Replies out of the socket, many in one system call, straight into the driver's buffers.
 *
 * A reply's payload follows its header, and whose payload it is only the header tells. So where a
 * receive is prepared it is predicted: servers mostly answer in the order that they were asked in.
 * The pieces of a receive are first what is certain (the rest of a payload whose header is here),
 * then for each command in that order a place for its header and its own buffers. A prediction that
 * was right costs nothing; what came after a wrong one is taken out to spill and put where it
 * belongs. A server that is often wrong is not predicted any more until it would have been right
 * for a while: then small replies are received into spill, many together, and of large ones the
 * header alone, which makes the rest certain.
 *
 * That a driver's buffer may hold another block of the same disk until its request ends does no
 * harm: the driver may not look at it before, and could read that block anyway.
 */
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>

#include "exchange.h"

enum { TRUST_MAX = 64, TRUST_ENOUGH = 16, LARGE_BYTES = 16384 };

void nbd_receive_reset(struct nbd_queue *nq)
{
    nq->header_have = 0;
    nq->in_payload = false;
    nq->payload_left = nq->skip_left = 0;
    nq->predicted = nq->certain_bytes = 0;
    nq->trust = TRUST_MAX;
    nq->read_header = nq->link.export.extended     ? NBD_EXTENDED_BYTES + 8
                      : nq->link.export.structured ? NBD_STRUCTURED_BYTES + 8
                                                   : NBD_SIMPLE_BYTES;
    nq->other_header = nq->link.export.extended ? NBD_EXTENDED_BYTES : NBD_SIMPLE_BYTES;
}

/*
 * Pieces of a command's buffers, from at on, bytes long, into to; at most room. Returns how many,
 * and how long they are.
 */
static uint32_t pieces(struct iovec *to, uint32_t room, const struct nbd_slot *slot, uint64_t at,
                       uint64_t *bytes)
{
    uint64_t left = *bytes;
    uint32_t n = 0;

    for (uint32_t i = 0; i < slot->iov_count && left && n < room; i++) {
        size_t length = slot->iov[i].iov_len;

        if (at >= length) {
            at -= length;
            continue;
        }
        length -= at;
        if (length > left)
            length = left;
        to[n++] = (struct iovec){ (uint8_t *)slot->iov[i].iov_base + at, length };
        left -= length;
        at = 0;
    }
    *bytes -= left;
    return n;
}

/* Bytes of a command's buffers, from at on, are from, or zeros where from is NULL. */
static void put(const struct nbd_slot *slot, uint64_t at, const uint8_t *from, uint64_t bytes)
{
    while (bytes) {
        struct iovec to[8];
        uint64_t piece = bytes;
        uint32_t n = pieces(to, 8, slot, at, &piece);

        if (!n)
            return;
        for (uint32_t i = 0; i < n; i++) {
            if (from) {
                memcpy(to[i].iov_base, from, to[i].iov_len);
                from += to[i].iov_len;
            } else {
                memset(to[i].iov_base, 0, to[i].iov_len);
            }
        }
        at += piece;
        bytes -= piece;
    }
}

/* A reply, or a chunk of one, is whole. */
static int finish_reply(struct nbd_queue *nq)
{
    struct nbd_slot *slot = nq->reply.slot;

    nq->in_payload = false;
    if (!nq->reply.done)
        return 0;
    /* It goes away with this connection, and the request does not fail of it. */
    if (slot->error == ESHUTDOWN)
        return -ESHUTDOWN;
    if (!slot->error && slot->type == NBD_READ && slot->received != slot->length)
        return -EPROTO;
    nbd_remove(&nq->sent, slot);
    slot->sent = false;
    nbd_command_done(nq, slot);
    return 0;
}

/* A header is whole and good. */
static int begin_reply(struct nbd_queue *nq)
{
    struct nbd_reply *reply = &nq->reply;
    struct nbd_slot *slot = reply->slot;

    nq->header_have = 0;
    if (reply->error && !slot->error)
        slot->error = reply->error;
    if (reply->hole)
        put(slot, reply->at, NULL, reply->hole);
    slot->received += reply->payload + reply->hole;
    count_up(&nq->stats->received_bytes, reply->payload);
    if (slot->type == NBD_READ && reply->payload)
        nq->read_header = reply->header_bytes;
    else if (slot->type != NBD_READ && !reply->error)
        nq->other_header = reply->header_bytes;
    nq->payload_left = reply->payload;
    nq->skip_left = reply->skip;
    nq->in_payload = true;
    return nq->payload_left || nq->skip_left ? 0 : finish_reply(nq);
}

/* So many bytes of the payload are where they belong. */
static int take_payload(struct nbd_queue *nq, uint32_t bytes)
{
    nq->payload_left -= bytes;
    nq->reply.at += bytes;
    return nq->payload_left || nq->skip_left ? 0 : finish_reply(nq);
}

static void judge(struct nbd_queue *nq, bool right)
{
    if (!right)
        nq->trust /= 2;
    else if (nq->trust < TRUST_MAX)
        nq->trust++;
}

/* Take what the payload still needs out of from; how much that was, or -errno. */
static int feed_payload(struct nbd_queue *nq, const uint8_t *from, uint32_t bytes)
{
    uint32_t n = nq->payload_left ? nq->payload_left : nq->skip_left;
    int error;

    if (n > bytes)
        n = bytes;
    if (nq->payload_left) {
        put(nq->reply.slot, nq->reply.at, from, n);
        count_up(&nq->stats->copied_bytes, n);
        error = take_payload(nq, n);
    } else {
        nq->skip_left -= n;
        error = nq->skip_left ? 0 : finish_reply(nq);
    }
    return error ? error : (int)n;
}

int nbd_feed(struct nbd_queue *nq, const uint8_t *from, uint32_t bytes)
{
    while (bytes) {
        if (nq->in_payload) {
            int taken = feed_payload(nq, from, bytes);

            if (taken < 0)
                return taken;
            from += taken;
            bytes -= (uint32_t)taken;
            continue;
        }
        int more = nbd_reply_parse(nq, nq->header, nq->header_have, &nq->reply);

        if (more < 0)
            return more;
        uint32_t n = nq->reply.header_bytes - nq->header_have;

        if (n > bytes)
            n = bytes;
        memcpy(nq->header + nq->header_have, from, n);
        nq->header_have += n;
        from += n;
        bytes -= n;
        more = nbd_reply_parse(nq, nq->header, nq->header_have, &nq->reply);
        if (more < 0)
            return more;
        if (more)
            continue;
        judge(nq, nq->reply.slot == nq->sent.first);
        more = begin_reply(nq);
        if (more)
            return more;
    }
    return 0;
}

/* Places for the replies that are to come next. */
static void predict(struct nbd_queue *nq)
{
    uint32_t bytes = 0;

    for (struct nbd_slot *slot = nq->sent.first; slot && nq->predicted < NBD_PREDICTED_MAX;
         slot = slot->next) {
        uint32_t k = nq->predicted, room = NBD_IOV_MAX - nq->receive_count;
        uint64_t payload = slot->type == NBD_READ ? slot->length : 0;
        uint32_t header = slot->type == NBD_READ ? nq->read_header : nq->other_header;
        uint32_t have = k ? 0 : nq->header_have;

        if (slot == nq->reply.slot && nq->in_payload)
            continue;
        if (slot->received)
            break; /* a wrong guess must not overwrite the chunks that are here */
        if (bytes + header > NBD_SPILL_BYTES || room < 2 || have >= header)
            break;
        if (payload > NBD_SPILL_BYTES - bytes - header)
            payload = NBD_SPILL_BYTES - bytes - header;
        if (have)
            memcpy(nq->stage[k], nq->header, have);
        nq->receive_iov[nq->receive_count] = (struct iovec){ nq->stage[k] + have, header - have };
        nq->prediction[k].slot = slot;
        nq->prediction[k].iov = nq->receive_count;
        nq->prediction[k].header_bytes = header;
        nq->receive_count++;
        nq->receive_count += pieces(nq->receive_iov + nq->receive_count, room - 1, slot, 0,
                                    &payload);
        nq->prediction[k].payload_bytes = (uint32_t)payload;
        bytes += header + (uint32_t)payload;
        nq->predicted++;
        if (slot->type == NBD_READ && payload < slot->length)
            break;
    }
}

/* Without predictions: a large reply's header, or as much as there is. */
static void prepare_spill(struct nbd_queue *nq)
{
    const struct nbd_slot *next = nq->sent.first;
    uint32_t bytes = NBD_SPILL_BYTES;

    if (next && next == nq->reply.slot && nq->in_payload)
        next = next->next;
    if (next && next->type == NBD_READ && next->length >= LARGE_BYTES &&
        nq->header_have < nq->read_header)
        bytes = nq->read_header - nq->header_have;
    nq->receive_iov[nq->receive_count++] = (struct iovec){ nq->spill, bytes };
}

void nbd_receive_prepare(struct nbd_queue *nq)
{
    nq->receive_count = nq->predicted = nq->certain_bytes = 0;
    if (nq->in_payload && nq->payload_left) {
        uint64_t bytes = nq->payload_left;

        nq->receive_count = pieces(nq->receive_iov, NBD_IOV_MAX / 2, nq->reply.slot, nq->reply.at,
                                   &bytes);
        nq->certain_bytes = (uint32_t)bytes;
        if (nq->certain_bytes < nq->payload_left)
            return;
    }
    if (nq->trust >= TRUST_ENOUGH && !nq->skip_left)
        predict(nq);
    if (!nq->predicted)
        prepare_spill(nq);
}

void nbd_receive(struct nbd_queue *nq)
{
    if (!nq->receiving && (nq->sent.first || nq->in_payload))
        nq->transport->receive(nq);
}

/*
 * What was received from a prediction's header on, in the order of the stream, goes to spill and is
 * taken as it comes.
 */
static int take_as_it_comes(struct nbd_queue *nq, uint32_t k, uint32_t bytes)
{
    uint32_t have = k ? 0 : nq->header_have, at = 0;

    nq->header_have = 0;
    memcpy(nq->spill, nq->stage[k], have);
    for (uint32_t i = nq->prediction[k].iov; at < bytes; i++) {
        size_t n = nq->receive_iov[i].iov_len < bytes - at ? nq->receive_iov[i].iov_len
                                                           : bytes - at;

        memcpy(nq->spill + have + at, nq->receive_iov[i].iov_base, n);
        at += (uint32_t)n;
    }
    count_up(&nq->stats->copied_bytes, bytes);
    return nbd_feed(nq, nq->spill, have + bytes);
}

/* Go through the predictions with the bytes that were received for them. */
static int compare(struct nbd_queue *nq, uint32_t bytes)
{
    for (uint32_t k = 0; k < nq->predicted && bytes; k++) {
        uint32_t have = k ? 0 : nq->header_have, header = nq->prediction[k].header_bytes;
        struct nbd_slot *slot = nq->prediction[k].slot;
        int error;

        if (bytes < header - have) /* of this one, or all of another kind */
            return take_as_it_comes(nq, k, bytes);
        error = nbd_reply_parse(nq, nq->stage[k], header, &nq->reply);
        if (error < 0)
            return error;
        bool right = !error && nq->reply.slot == slot && nq->reply.header_bytes == header &&
                     !nq->reply.skip &&
                     (slot->type != NBD_READ ||
                      (!nq->reply.at && nq->reply.payload == slot->length));

        if (!right) {
            judge(nq, !error && nq->reply.slot == slot);
            return take_as_it_comes(nq, k, bytes);
        }
        judge(nq, true);
        bytes -= header - have;
        error = begin_reply(nq);
        if (!error && nq->payload_left) {
            uint32_t n = nq->payload_left < bytes ? nq->payload_left : bytes;

            if (n > nq->prediction[k].payload_bytes)
                return -EPROTO;
            bytes -= n;
            error = take_payload(nq, n);
        }
        if (error)
            return error;
    }
    return 0;
}

/*
 * Some servers send a TLS record each for a reply's header and its data, and their TCP (Nagle)
 * keeps the second back until we acknowledge the first, which ours puts off by 40 ms.
 */
void nbd_acknowledge(struct nbd_queue *nq)
{
    const int on = 1;

    if (nq->link.tls && nq->sent.first)
        (void)setsockopt(nq->link.fd, IPPROTO_TCP, TCP_QUICKACK, &on, sizeof(on));
}

int nbd_receive_take(struct nbd_queue *nq, uint32_t bytes)
{
    uint32_t certain = bytes < nq->certain_bytes ? bytes : nq->certain_bytes;
    int error = certain ? take_payload(nq, certain) : 0;

    bytes -= certain;
    if (error || !bytes)
        return error;
    return nq->predicted ? compare(nq, bytes) : nbd_feed(nq, nq->spill, bytes);
}
