/*
 * The header of one reply: simple, structured or extended, and what of a chunk's payload says where
 * the rest belongs.
 *
 * The server chose every number in it. What comes out names a command that was sent as a whole and
 * is not yet answered, and a range inside of that command's buffers.
 */
#include <errno.h>

#include "exchange.h"

enum { ERROR_TEXT_MAX = 64 * 1024 };

/* The protocol's errors are Linux' numbers, and only these. */
static int to_errno(uint32_t error)
{
    switch (error) {
    case 0:
    case EPERM:
    case EIO:
    case ENOMEM:
    case EINVAL:
    case ENOSPC:
    case EOVERFLOW:
    case EOPNOTSUPP:
    case ESHUTDOWN:
        return (int)error;
    default:
        return EINVAL;
    }
}

/* Whether the kernel still reads the command, or may: its request must not end before. */
static bool being_sent(const struct nbd_queue *nq, const struct nbd_slot *slot)
{
    return slot->cookie >> NBD_COOKIE_SHIFT > nq->sent_before && nq->send_first < slot->send_end;
}

static struct nbd_slot *find_slot(struct nbd_queue *nq, uint64_t cookie)
{
    uint64_t index = cookie & ((1 << NBD_COOKIE_SHIFT) - 1);
    struct nbd_slot *slot = &nq->slots[index];

    return index < vd_queue_config_of(nq->queue)->size && slot->sent && slot->cookie == cookie &&
                   !being_sent(nq, slot)
               ? slot
               : NULL;
}

/* A part of what the command reads: from offset, as the protocol counts, so many bytes. */
static int place(struct nbd_reply *reply, uint64_t offset, uint64_t bytes)
{
    const struct nbd_slot *slot = reply->slot;

    if (slot->type != NBD_READ || !bytes || offset < slot->offset ||
        offset - slot->offset > slot->length || bytes > slot->length - (offset - slot->offset) ||
        bytes > slot->length - slot->received)
        return -EPROTO;
    reply->at = (uint32_t)(offset - slot->offset);
    return 0;
}

/*
 * What depends on the chunk's type; the header's first part ends at base and length bytes belong to
 * the chunk.
 */
static int parse_chunk(const uint8_t *header, uint32_t have, uint32_t base, uint16_t type,
                       uint64_t length, struct nbd_reply *reply)
{
    uint32_t more = type == NBD_CHUNK_DATA   ? 8
                    : type == NBD_CHUNK_HOLE ? 12
                    : type & NBD_CHUNK_ERROR ? 6
                                             : 0;

    if (length < more || (type == NBD_CHUNK_HOLE && length != more))
        return -EPROTO;
    reply->header_bytes = base + more;
    if (have < reply->header_bytes)
        return 1;
    switch (type) {
    case NBD_CHUNK_NONE:
        return length || !reply->done ? -EPROTO : 0;
    case NBD_CHUNK_DATA:
        length -= more;
        reply->payload = (uint32_t)length;
        return place(reply, get64(header + base), length);
    case NBD_CHUNK_HOLE:
        reply->hole = get32(header + base + 8);
        return place(reply, get64(header + base), reply->hole);
    default:
        if (!(type & NBD_CHUNK_ERROR) || length > ERROR_TEXT_MAX)
            return -EPROTO;
        reply->error = to_errno(get32(header + base));
        reply->skip = (uint32_t)length - more;
        return reply->error ? 0 : -EPROTO;
    }
}

static int parse_simple(struct nbd_queue *nq, const uint8_t *header, struct nbd_reply *reply)
{
    const struct nbd_export *e = &nq->link.export;

    reply->header_bytes = NBD_SIMPLE_BYTES;
    reply->slot = find_slot(nq, get64(header + 8));
    reply->error = to_errno(get32(header + 4));
    reply->done = true;
    if (!reply->slot || e->extended ||
        (e->structured && reply->slot->type == NBD_READ && !reply->error))
        return -EPROTO;
    if (reply->slot->type == NBD_READ && !reply->error)
        reply->payload = (uint32_t)reply->slot->length;
    return 0;
}

int nbd_reply_parse(struct nbd_queue *nq, const uint8_t *header, uint32_t have,
                    struct nbd_reply *reply)
{
    bool extended;
    uint32_t base;

    *reply = (struct nbd_reply){ .header_bytes = NBD_SIMPLE_BYTES };
    if (have < NBD_SIMPLE_BYTES)
        return 1;
    switch (get32(header)) {
    case NBD_SIMPLE_REPLY_MAGIC:
        return parse_simple(nq, header, reply);
    case NBD_STRUCTURED_REPLY_MAGIC:
        base = NBD_STRUCTURED_BYTES;
        extended = false;
        break;
    case NBD_EXTENDED_REPLY_MAGIC:
        base = NBD_EXTENDED_BYTES;
        extended = true;
        break;
    default:
        return -EPROTO;
    }
    if (!nq->link.export.structured || nq->link.export.extended != extended)
        return -EPROTO;
    reply->header_bytes = base;
    if (have < base)
        return 1;
    reply->slot = find_slot(nq, get64(header + 8));
    reply->done = get16(header + 4) & NBD_CHUNK_DONE;
    if (!reply->slot)
        return -EPROTO;
    return parse_chunk(header, have, base, get16(header + 6),
                       extended ? get64(header + 24) : get32(header + 16), reply);
}
