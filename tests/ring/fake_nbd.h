/*
 * An NBD server in a thread, on a unix socket or TCP: it keeps to the protocol until it is told to break it, and counts what a client
 * must not do.
 */
#ifndef RING_FAKE_NBD_H
#define RING_FAKE_NBD_H

#include <netinet/in.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "harness.h"

enum misdeed {
    BE_GOOD,
    CLOSE,        /* instead of an answer */
    HALF,         /* of an answer, then close */
    BAD_MAGIC,
    BAD_COOKIE,   /* of no command */
    TWICE,        /* the same answer */
    ABSURD,       /* a chunk's length */
    OUTSIDE,      /* a chunk that is not in the command's range */
    TOO_MUCH,     /* more chunks than the command has room for */
    MISSING,      /* done, but not all was sent */
    UNKNOWN_TYPE, /* of chunk */
    FAIL_EIO,
    FAIL_SHUTDOWN,
    FAIL_EIO_WITH_TEXT, /* in a chunk, after half of the data */
    EARLY,        /* a write is answered before its data are read, and then never done */
    MISDEEDS
};

enum { FAKE_CONNECTIONS = 256 };

struct fake_nbd {
    char path[108];       /* empty: TCP, at address */
    struct sockaddr_in address;
    int receive_bytes;    /* TCP: of its kernel's buffer for a connection */
    uint8_t *image;
    uint64_t size;
    /* What it says and can; changed between connections. */
    bool structured, extended, fragments, holes;
    uint16_t flags;
    uint32_t min_block, max_payload;
    int misdeed;          /* with the answer that skip has come down to, once; behind lock */
    uint32_t skip;
    /* What it does; changed at any time. */
    bool hold;            /* answer nothing */
    bool reverse;         /* answer what came together in the opposite order */
    bool refuse;          /* unknown export */
    bool shy;             /* says nothing to who connects */
    uint32_t disk_error;  /* what is asked of the disk fails so; only below bad_end, unless that is 0 */
    uint64_t bad_end;
    uint64_t poison;      /* who asks for what begins there has his connection ended; 0: nobody */
    int tls_version;      /* TLS1_2_VERSION or TLS1_3_VERSION; 0: it has no TLS */
    uint32_t new_keys;    /* TLS 1.3: whenever it grows the keys are changed (KeyUpdate) */
    uint32_t deaf;        /* connections with smaller numbers are not read from, and what comes in stays in the kernels */
    uint32_t limit;       /* refuse more connections than that at once; 0: any number */
    uint32_t forgets_ms;  /* one that has ended counts for so long */
    /* What it saw. */
    uint32_t connections, reads, writes, flushes, trims, zeroes, fuas, no_holes, violations;
    uint32_t goodbyes, aborts; /* connections ended by NBD_CMD_DISC, and by NBD_OPT_ABORT */
    int listener;
    pthread_t thread;
    pthread_mutex_t lock;
    int sockets[FAKE_CONNECTIONS]; /* of connections that live */
    uint32_t alive, pumps;
    bool stopping;
};

/* A server of size bytes with all flags; serves at once. */
void fake_nbd_open(struct fake_nbd *s, uint64_t size);
/* The same over TCP, with a small buffer of its kernel's: what it does not read stays in the client's. */
void fake_nbd_open_tcp(struct fake_nbd *s, uint64_t size);
/* As kill -9 does it: the listener and all connections go. */
void fake_nbd_kill(struct fake_nbd *s);
void fake_nbd_restart(struct fake_nbd *s);
/* The connection goes that was the number-th, from 0 on. */
void fake_nbd_cut(struct fake_nbd *s, uint32_t number);
/* Once, after so many good answers. */
void fake_nbd_misbehave(struct fake_nbd *s, int misdeed, uint32_t skip);
/* Say nonsense on a connection, by its number. */
void fake_nbd_babble(struct fake_nbd *s, uint32_t number);
/* Connections that it has. */
uint32_t fake_nbd_alive(struct fake_nbd *s);
/* How much the kernel has of what a connection sent, and is not read yet. */
uint32_t fake_nbd_unread(struct fake_nbd *s, uint32_t number);
/*
 * Between the test's use of the image and the server's: what the engine does in between is beyond the sight of the thread
 * sanitizer.
 */
void fake_nbd_settle(struct fake_nbd *s);
void fake_nbd_close(struct fake_nbd *s);
/* The engine's configuration for it. */
struct vd_nbd_config fake_nbd_config(const struct fake_nbd *s);

#endif
