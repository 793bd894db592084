/*
 * A connection before it is used and after: how it is made, and how it ends.
 *
 *   connect.c     all of it: from whom to connect to, to a connection that can serve the volume
 *   dial.c        a socket to the server, and the files of its keys
 *   broker.c      the same, asked of a process that may: the worker may not
 *   negotiate.c   a fresh socket becomes a connection: the protocol's handshake
 *   tls.c         with TLS
 *   stream.c      bytes through a fresh socket, plain or TLS, with a deadline
 *   goodbye.c     how a connection ends: dropped, or with a goodbye
 *
 * On an error reason says what went wrong, in words.
 */
#ifndef VD_NBD_CONNECTION_H
#define VD_NBD_CONNECTION_H

#include <openssl/ssl.h>
#include <sys/socket.h>

#include "target.h"
#include "wire.h"

enum {
    NBD_REASON_BYTES = 160,
    NBD_RECORD_BYTES = 16384,  /* of a TLS record at most (RFC 8446, 5.1) */
    NBD_RECORD_PIECES = 16,    /* of memory, that the kernel puts into one at most */
    NBD_BLOCK_MAX = 64 * 1024, /* smallest unit of a server, the largest that we take */
    /* files: CA certificate, our certificate, its key; or PSKs in the first */
    NBD_KEYS = 3,
};

/* Which goodbye the server would understand now. */
enum nbd_phase { NBD_MUTE, NBD_HAGGLING, NBD_SERVED };

/*
 * A socket with a deadline; ssl is NULL when the bytes in it are plain, or the kernel's TLS makes
 * them so.
 */
struct nbd_stream {
    int fd;
    SSL *ssl;
    int cancel_fd; /* readable: give up */
    uint64_t deadline_ns;
    enum nbd_phase phase;
    bool any_tls;       /* not only what OpenSSL can give to the kernel */
    int keys[NBD_KEYS]; /* open, or -1 */
    bool kernel_has_tls;
};

/* What the server says of the export. */
struct nbd_export {
    uint64_t size_bytes; /* of whole blocks */
    uint64_t said_bytes; /* of all of it */
    uint16_t flags;      /* enum nbd_flag */
    uint32_t min_block;  /* bytes; every offset and length is a multiple */
    uint32_t max_payload;
    bool structured, extended;
};

/* A negotiated connection. */
struct nbd_link {
    int fd;
    SSL *ssl;
    bool tls;        /* by us or by the kernel */
    bool kernel_tls; /* by the kernel, in one direction at least */
    enum nbd_phase phase;
    uint64_t records; /* of TLS that were sent; at most */
    struct nbd_export export;
};

/* Bytes, in so many pieces, were sent in one call; counts them if they were encrypted. */
static inline void nbd_link_count_records(struct nbd_link *link, size_t bytes, size_t pieces)
{
    if (link->tls)
        link->records += 1 + bytes / NBD_RECORD_BYTES + pieces / NBD_RECORD_PIECES;
}

/* What an export has to be; numbers that are 0 do not matter. */
struct nbd_needs {
    uint64_t size_bytes;
    uint32_t min_block; /* as it was: what partial.c has begun counts in those */
    uint32_t connections;
    bool write;
};

/* How to connect: to whom, until when, and what is learned on the way. */
struct nbd_attempt {
    const struct nbd_target *target;
    int cancel_fd; /* readable: give up */
    bool *any_tls; /* as in nbd_stream, since it was found to be needed */
};

/* connect.c: 0 with a connection, or -errno. */
int nbd_connect(const struct nbd_attempt *attempt, uint64_t timeout_ms, struct nbd_link *link,
                char reason[NBD_REASON_BYTES]);
/* Whether an export can serve what the driver was told: 0 or -errno. */
int nbd_check_fit(const struct nbd_needs *needs, const struct nbd_export *e,
                  char reason[NBD_REASON_BYTES]);

/* dial.c: the stream's descriptor, deadline and, for TLS, keys and what the kernel can. */
int nbd_dial_here(struct nbd_stream *s, const struct nbd_target *target, uint64_t timeout_ns,
                  char reason[NBD_REASON_BYTES]);
void nbd_close_keys(struct nbd_stream *s);

/* broker.c: the same, done elsewhere. */
int nbd_broker_dial(struct nbd_stream *s, const struct nbd_target *target, uint64_t timeout_ns,
                    char reason[NBD_REASON_BYTES]);

/* stream.c */
int nbd_stream_read(struct nbd_stream *s, void *to, size_t bytes);
int nbd_stream_write(struct nbd_stream *s, const void *from, size_t bytes);
int nbd_stream_connect(struct nbd_stream *s, const struct sockaddr *address, socklen_t length);
int nbd_stream_handshake(struct nbd_stream *s);

/* negotiate.c */
int nbd_negotiate(struct nbd_stream *s, const struct nbd_target *target, struct nbd_export *export,
                  char reason[NBD_REASON_BYTES]);

/* tls.c */
int nbd_tls_start(struct nbd_stream *s, const struct nbd_target *target,
                  char reason[NBD_REASON_BYTES]);
/* What the kernel does in both directions we need not do. */
bool nbd_tls_is_kernel(SSL *ssl);
/* Whether it does anything. */
bool nbd_tls_uses_kernel(SSL *ssl);
/*
 * The kernel's TLS has something that is no data and that it cannot go on after: why the connection
 * ends.
 */
const char *nbd_tls_interruption(int fd, bool *closed);

/* goodbye.c */
/* From now on what the socket holds is dropped when it is closed, by whomever. */
void nbd_drop_at_close(int fd);
/*
 * End it at once, with all that waits for it or is to be sent on it; on any thread. It is still to
 * be closed.
 */
void nbd_cut(const struct nbd_link *link);
void nbd_link_close(struct nbd_link *link);
/*
 * Nothing is under way: tell the server that nothing will come any more. It is still to be closed.
 */
void nbd_say_goodbye(const struct nbd_link *link);
/* The same, give the server so long to end it too, and close it; fine if there is none. */
void nbd_leave(struct nbd_link *link, uint64_t wait_ms);

static inline uint64_t at_most(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

#endif
