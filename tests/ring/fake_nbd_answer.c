/* What the server of fake_nbd.h answers: what is right, or what it was told to do wrong. */
#include "fake_nbd_parts.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>

bool fake_nbd_give(int fd, const void *from, size_t n)
{
    return !n || send(fd, from, n, MSG_NOSIGNAL) == (ssize_t)n;
}

/* A chunk's header; returns its length. */
static size_t chunk(uint8_t *to, bool extended, uint16_t flags, uint16_t type, const struct command *c, uint64_t length)
{
    put32(to, extended ? NBD_EXTENDED_REPLY_MAGIC : NBD_STRUCTURED_REPLY_MAGIC);
    put16(to + 4, flags);
    put16(to + 6, type);
    put64(to + 8, c->cookie);
    if (!extended) {
        put32(to + 16, (uint32_t)length);
        return NBD_STRUCTURED_BYTES;
    }
    put64(to + 16, c->offset);
    put64(to + 24, length);
    return NBD_EXTENDED_BYTES;
}

static size_t simple(uint8_t *to, uint64_t cookie, uint32_t error)
{
    put32(to, NBD_SIMPLE_REPLY_MAGIC);
    put32(to + 4, error);
    put64(to + 8, cookie);
    return NBD_SIMPLE_BYTES;
}

static size_t data_chunk(struct fake_nbd *s, uint8_t *to, bool extended, uint16_t flags, const struct command *c, uint64_t at,
                         uint64_t bytes)
{
    size_t n = chunk(to, extended, flags, NBD_CHUNK_DATA, c, bytes + 8);

    put64(to + n, at);
    memcpy(to + n + 8, s->image + at, bytes);
    return n + 8 + bytes;
}

static size_t hole_chunk(uint8_t *to, bool extended, uint16_t flags, const struct command *c, uint64_t at, uint64_t bytes)
{
    size_t n = chunk(to, extended, flags, NBD_CHUNK_HOLE, c, 12);

    put64(to + n, at);
    put32(to + n + 8, (uint32_t)bytes);
    return n + 12;
}

/* A read's answer in pieces of 1024 bytes, last first; those of zeros as holes. */
static size_t in_fragments(struct fake_nbd *s, uint8_t *to, bool extended, const struct command *c)
{
    size_t n = 0;

    for (uint64_t left = c->length; left;) {
        uint64_t bytes = left % 1024 ? left % 1024 : 1024, at = c->offset + left - bytes;
        bool zero = s->holes && is_byte(s->image + at, bytes, 0);

        left -= bytes;
        n += zero ? hole_chunk(to + n, extended, 0, c, at, bytes) : data_chunk(s, to + n, extended, 0, c, at, bytes);
    }
    return n + chunk(to + n, extended, NBD_CHUNK_DONE, NBD_CHUNK_NONE, c, 0);
}

static size_t answer_error(uint8_t *to, bool structured, bool extended, const struct command *c, uint32_t error, const char *text)
{
    if (!structured)
        return simple(to, c->cookie, error);
    size_t n = chunk(to, extended, NBD_CHUNK_DONE, NBD_CHUNK_ERROR | 1, c, 6 + strlen(text));

    put32(to + n, error);
    put16(to + n + 4, (uint16_t)strlen(text));
    memcpy(to + n + 6, text, strlen(text));
    return n + 6 + strlen(text);
}

size_t fake_nbd_answer(struct fake_nbd *s, uint8_t *to, bool structured, bool extended, const struct command *c)
{
    size_t n;

    if (c->error)
        return answer_error(to, structured, extended, c, c->error, "");
    if (c->type != NBD_READ)
        return extended ? chunk(to, true, NBD_CHUNK_DONE, NBD_CHUNK_NONE, c, 0) : simple(to, c->cookie, 0);
    if (structured)
        return s->fragments ? in_fragments(s, to, extended, c)
                            : data_chunk(s, to, extended, NBD_CHUNK_DONE, c, c->offset, c->length);
    n = simple(to, c->cookie, 0);
    memcpy(to + n, s->image + c->offset, c->length);
    return n + c->length;
}

int fake_nbd_take_misdeed(struct fake_nbd *s, bool early)
{
    int misdeed = BE_GOOD;

    pthread_mutex_lock(&s->lock);
    if (s->misdeed && (s->misdeed == EARLY) == early && !s->skip--) {
        misdeed = s->misdeed;
        s->skip = 0;
        s->misdeed = BE_GOOD;
    }
    pthread_mutex_unlock(&s->lock);
    return misdeed;
}

bool fake_nbd_reply(struct fake_nbd *s, int fd, bool structured, bool extended, const struct command *c, uint8_t *buffer)
{
    size_t n, base = extended ? 32 : 20;

    pthread_mutex_lock(&s->lock);
    n = fake_nbd_answer(s, buffer, structured, extended, c);
    pthread_mutex_unlock(&s->lock);
    switch (fake_nbd_take_misdeed(s, false)) {
    case CLOSE:
        return false;
    case HALF:
        fake_nbd_give(fd, buffer, n / 2);
        return false;
    case BAD_MAGIC:
        buffer[0] ^= 0xff;
        break;
    case BAD_COOKIE:
        buffer[15] ^= 0x3f;
        break;
    case TWICE:
        if (!fake_nbd_give(fd, buffer, n))
            return false;
        break;
    case ABSURD:
        put32(buffer + (extended ? 28 : 16), 0x7fffffff);
        break;
    case OUTSIDE:
        put64(buffer + base, c->offset - 4096);
        break;
    case TOO_MUCH:
        n = data_chunk(s, buffer, extended, 0, c, c->offset, c->length);
        n += data_chunk(s, buffer + n, extended, 0, c, c->offset, c->length);
        break;
    case MISSING:
        n = chunk(buffer, extended, NBD_CHUNK_DONE, NBD_CHUNK_NONE, c, 0);
        break;
    case UNKNOWN_TYPE:
        n = chunk(buffer, extended, NBD_CHUNK_DONE, 77, c, 0);
        break;
    case FAIL_EIO:
        n = answer_error(buffer, structured, extended, c, EIO, "");
        break;
    case FAIL_SHUTDOWN:
        n = answer_error(buffer, structured, extended, c, ESHUTDOWN, "");
        break;
    case FAIL_EIO_WITH_TEXT:
        n = data_chunk(s, buffer, extended, 0, c, c->offset, c->length / 2);
        n += answer_error(buffer + n, structured, extended, c, EIO, "the disk is on fire");
        break;
    default:
        break;
    }
    return fake_nbd_give(fd, buffer, n);
}
