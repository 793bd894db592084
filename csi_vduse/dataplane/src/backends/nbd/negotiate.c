/*
 * The NBD handshake, fixed newstyle, as the client: TLS if it is asked for, replies in chunks if
 * the server has them (with extended headers if it has those), then the export by name. Runs on the
 * connector's thread.
 *
 * The server may be anybody and say anything: what it says is bounded (bytes of a reply, replies to
 * an option, time by the stream's deadline), and each number is checked before it is used.
 */
#include <errno.h>
#include <stdio.h>

#include "connection.h"

enum { REPLY_MAX = 64 * 1024, REPLIES_MAX = 256, DEFAULT_MAX_PAYLOAD = 32 << 20 };

struct option_reply {
    uint32_t type, length;
};

static int fail(char *reason, int error, const char *text)
{
    snprintf(reason, NBD_REASON_BYTES, "%s", text);
    return error;
}

static int broken(char *reason, const char *text)
{
    return fail(reason, -EPROTO, text);
}

/* Why the stream failed, in words. */
static int lost(char *reason, int error)
{
    return fail(reason, error,
                error == -ETIMEDOUT    ? "the server did not answer in time"
                : error == -ECANCELED  ? "given up"
                : error == -ECONNRESET ? "the server closed the connection during the handshake"
                                       : strerror(-error));
}

static int send_option(struct nbd_stream *s, uint32_t option, const void *data, uint32_t length,
                       char *reason)
{
    uint8_t header[16];
    int error;

    put64(header, NBD_OPTION_MAGIC);
    put32(header + 8, option);
    put32(header + 12, length);
    error = nbd_stream_write(s, header, sizeof(header));
    if (!error)
        error = nbd_stream_write(s, data, length);
    return error ? lost(reason, error) : 0;
}

/* The next reply to an option; its payload is still to be read. */
static int read_option_reply(struct nbd_stream *s, uint32_t option, struct option_reply *reply,
                             char *reason)
{
    uint8_t header[20];
    int error = nbd_stream_read(s, header, sizeof(header));

    if (error)
        return lost(reason, error);
    if (get64(header) != NBD_OPTION_REPLY_MAGIC || get32(header + 8) != option)
        return broken(reason, "the server's answer to an option is none");
    reply->type = get32(header + 12);
    reply->length = get32(header + 16);
    if (reply->length > REPLY_MAX)
        return broken(reason, "the server's answer to an option is absurdly long");
    return 0;
}

static int skip(struct nbd_stream *s, uint32_t length, char *reason)
{
    uint8_t drop[512];

    while (length) {
        uint32_t n = length < sizeof(drop) ? length : sizeof(drop);
        int error = nbd_stream_read(s, drop, n);

        if (error)
            return lost(reason, error);
        length -= n;
    }
    return 0;
}

/* An option without data, to which the answer is yes or no: 1, 0 or -errno. */
static int ask(struct nbd_stream *s, uint32_t option, char *reason)
{
    struct option_reply reply;
    int error = send_option(s, option, NULL, 0, reason);

    if (!error)
        error = read_option_reply(s, option, &reply, reason);
    if (!error)
        error = skip(s, reply.length, reason);
    if (error)
        return error;
    if (reply.type == NBD_REP_ACK)
        return 1;
    return reply.type & NBD_REPLY_ERROR
               ? 0
               : broken(reason, "the server's answer to an option is none");
}

static int check_export(struct nbd_export *e, char *reason)
{
    e->said_bytes = e->size_bytes;
    /* What is left at the end cannot be reached. */
    if (e->min_block)
        e->size_bytes -= e->size_bytes % e->min_block;
    if (!e->size_bytes || e->size_bytes > INT64_MAX)
        return broken(reason, "the server says that the export has no or an absurd size");
    if (!(e->flags & NBD_FLAG_HAS_FLAGS))
        return broken(reason, "the server says nothing of what the export can do");
    if (!e->min_block || e->min_block & (e->min_block - 1) || e->min_block > NBD_BLOCK_MAX)
        return broken(reason, "the server's minimum block size is not a power of two up to 64 KiB");
    if (e->max_payload < 4096 || e->max_payload < e->min_block)
        return broken(reason, "the server's maximum payload is smaller than a block");
    return 0;
}

/* One NBD_REP_INFO, its type included. */
static int read_info(struct nbd_stream *s, uint32_t length, struct nbd_export *e, char *reason)
{
    uint8_t data[14];
    uint32_t known = length < sizeof(data) ? length : sizeof(data);
    int error = nbd_stream_read(s, data, known);

    if (error)
        return lost(reason, error);
    if (length < 2)
        return broken(reason, "the server's information is too short");
    switch (get16(data)) {
    case NBD_INFO_EXPORT:
        if (length != 12)
            return broken(reason, "the server's information on the export has a wrong length");
        e->size_bytes = get64(data + 2);
        e->flags = get16(data + 10);
        break;
    case NBD_INFO_BLOCK_SIZE:
        if (length != 14)
            return broken(reason, "the server's information on block sizes has a wrong length");
        e->min_block = get32(data + 2);
        e->max_payload = get32(data + 10);
        break;
    default:
        break;
    }
    return skip(s, length - known, reason);
}

static int refused(uint32_t type, const char *export, char *reason)
{
    switch (type & ~NBD_REPLY_ERROR) {
    case NBD_ERR_UNKNOWN:
        snprintf(reason, NBD_REASON_BYTES, "the server has no export named \"%.80s\"", export);
        return -ENOENT;
    case NBD_ERR_POLICY:
        return fail(reason, -EACCES, "the server's policy does not let us use the export");
    case NBD_ERR_TLS_REQD:
        return fail(reason, -EACCES, "the server wants TLS");
    case NBD_ERR_SHUTDOWN:
        return fail(reason, -ESHUTDOWN, "the server is shutting down");
    case NBD_ERR_BLOCK_SIZE_REQD:
        return fail(reason, -EPROTO, "the server does not believe that we keep to its block size");
    default:
        snprintf(reason, NBD_REASON_BYTES, "the server refused the export with error %u",
                 type & ~NBD_REPLY_ERROR);
        return -EPROTO;
    }
}

/* NBD_OPT_EXPORT_NAME, for servers without NBD_OPT_GO: an unknown name closes the connection. */
static int take_by_name(struct nbd_stream *s, const char *name, bool zeroes, struct nbd_export *e,
                        char *reason)
{
    uint8_t answer[10];
    int error = send_option(s, NBD_OPT_EXPORT_NAME, name, (uint32_t)strlen(name), reason);

    if (error)
        return error;
    error = nbd_stream_read(s, answer, sizeof(answer));
    if (error == -ECONNRESET)
        return refused(NBD_ERR_UNKNOWN, name, reason);
    if (error)
        return lost(reason, error);
    e->size_bytes = get64(answer);
    e->flags = get16(answer + 8);
    return zeroes ? skip(s, 124, reason) : 0;
}

/* NBD_OPT_GO: 1 if the server does not know it. */
static int go(struct nbd_stream *s, const char *name, struct nbd_export *e, char *reason)
{
    uint8_t data[4 + 4096 + 4];
    uint32_t length = (uint32_t)strlen(name);
    int error;

    if (length > 4096)
        return fail(reason, -ENAMETOOLONG, "the export's name is longer than 4096 bytes");
    put32(data, length);
    memcpy(data + 4, name, length);
    put16(data + 4 + length, 1);
    put16(data + 6 + length, NBD_INFO_BLOCK_SIZE);
    error = send_option(s, NBD_OPT_GO, data, 8 + length, reason);
    for (int i = 0; !error && i < REPLIES_MAX; i++) {
        struct option_reply reply;

        error = read_option_reply(s, NBD_OPT_GO, &reply, reason);
        if (error)
            return error;
        if (reply.type == NBD_REP_INFO) {
            error = read_info(s, reply.length, e, reason);
            continue;
        }
        error = skip(s, reply.length, reason);
        if (error || reply.type == NBD_REP_ACK)
            return error;
        if (reply.type == (NBD_REPLY_ERROR | NBD_ERR_UNSUP))
            return 1;
        if (reply.type & NBD_REPLY_ERROR)
            return refused(reply.type, name, reason);
        error = broken(reason, "the server's answer to an option is none");
    }
    return error ? error : broken(reason, "the server's answer to an option does not end");
}

static int greet(struct nbd_stream *s, bool *zeroes, char *reason)
{
    uint8_t greeting[18], flags[4];
    int error = nbd_stream_read(s, greeting, sizeof(greeting));

    if (error == -ECONNRESET)
        return fail(reason, error,
                    "the server closed the connection before it said anything: "
                    "perhaps it takes no more clients");
    if (error == -ETIMEDOUT)
        return fail(reason, error,
                    "the server did not answer in time; it says nothing: "
                    "perhaps it takes one client at a time");
    if (error)
        return lost(reason, error);
    if (get64(greeting) != NBD_MAGIC)
        return broken(reason, "whoever listens there is no NBD server");
    if (get64(greeting + 8) != NBD_OPTION_MAGIC || !(get16(greeting + 16) & NBD_FIXED_NEWSTYLE))
        return broken(reason, "the server does not speak the fixed newstyle handshake");
    *zeroes = !(get16(greeting + 16) & NBD_NO_ZEROES);
    put32(flags, NBD_FIXED_NEWSTYLE | (*zeroes ? 0 : NBD_NO_ZEROES));
    error = nbd_stream_write(s, flags, sizeof(flags));
    s->phase = error ? NBD_MUTE : NBD_HAGGLING;
    return error ? lost(reason, error) : 0;
}

int nbd_negotiate(struct nbd_stream *s, const struct nbd_target *target, struct nbd_export *e,
                  char reason[NBD_REASON_BYTES])
{
    bool zeroes = true;
    int answer = greet(s, &zeroes, reason);

    *e = (struct nbd_export){ .min_block = 1, .max_payload = DEFAULT_MAX_PAYLOAD };
    if (answer)
        return answer;
    if (target->tls) {
        answer = ask(s, NBD_OPT_STARTTLS, reason);
        if (!answer)
            return fail(reason, -EACCES, "the server does not offer TLS");
        s->phase = NBD_MUTE;
        if (answer > 0)
            answer = nbd_tls_start(s, target, reason);
        if (answer)
            return answer;
        s->phase = NBD_HAGGLING;
    }
    answer = ask(s, NBD_OPT_EXTENDED_HEADERS, reason);
    e->extended = e->structured = answer == 1;
    if (!answer) {
        answer = ask(s, NBD_OPT_STRUCTURED_REPLY, reason);
        e->structured = answer == 1;
    }
    if (answer < 0)
        return answer;
    answer = go(s, target->export, e, reason);
    if (answer == 1) {
        s->phase = NBD_MUTE;
        answer = take_by_name(s, target->export, zeroes, e, reason);
    }
    if (answer)
        return answer;
    s->phase = NBD_SERVED;
    return check_export(e, reason);
}
