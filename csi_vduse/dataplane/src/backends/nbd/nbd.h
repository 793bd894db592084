/*
 * The NBD backend's state, and its parts:
 *
 *   nbd.c         the backend as the engine sees it: open, close, info
 *   connector.c   one thread of the backend: makes connections, again and again, and hands them to
 *                 queues
 *   connection.h  how a connection is made, and how it ends
 *   exchange.h    what a queue does with its own
 *
 * Queue threads own their link, and the connector ends it if they are abandoned; the connector owns
 * what it has not handed over yet. What both touch is behind nbd.lock, which nobody holds while
 * waiting for anything but the lock's own condition.
 */
#ifndef VD_NBD_H
#define VD_NBD_H

#include <pthread.h>

#include "../../backend.h"
#include "connection.h"

struct nbd_queue;

/* The backend's state. */
struct nbd {
    struct nbd_target target;
    struct vd_config config; /* its numbers; the strings are not ours */
    int cancel_fd;
    pthread_t thread;
    bool threaded, any_tls; /* of who connects: as in nbd_stream, since it was found to be needed */
    pthread_mutex_t lock;   /* all below */
    pthread_cond_t changed;
    bool closing, finished;
    /* resize waits for what the next connection says, or for why there is none: look_error */
    bool looking;
    int look_error;
    struct nbd_queue *queues; /* all that run */
    /* commands under way that change whole blocks; counted only where blocks are large */
    uint32_t writers;
    uint32_t changers;         /* slots that wait to change a part of a block */
    bool changing;             /* one does */
    struct nbd_queue *wanting; /* queues that wait for a connection */
    /* what open made, and what queues left that have stopped; for those that start */
    struct nbd_link spare[VD_QUEUES_MAX];
    uint32_t spares;
    bool flush_failed; /* once: queues look without the lock */
    /* what the server said when it was last spoken to; size 0: never */
    struct nbd_export export;
    /* no queue is given a connection before: one that was abandoned has just lost its own */
    uint64_t settle_until_ns;
    /* an export that is smaller is refused; queues look without the lock */
    uint64_t needed_bytes;
    struct vd_backend_status status;
};

/* connector.c: the thread; argument is the state. */
void *nbd_connector_run(void *argument);
/* One attempt. */
int nbd_connect_now(struct nbd *n, uint64_t timeout_ms, struct nbd_link *link,
                    char reason[NBD_REASON_BYTES]);
/* The queue needs a connection; it is woken when there is one to take. */
void nbd_want(struct nbd_queue *nq);
/* False: there is none yet, or the queue was abandoned and gets none. */
bool nbd_take(struct nbd_queue *nq);
/* Close the connection that it has. */
void nbd_let_go(struct nbd_queue *nq);
/* Leave it, with nothing under way, to the next queue that starts. */
void nbd_leave_behind(struct nbd_queue *nq);
/*
 * Say goodbye on spare connections that are of an export of less than so many bytes; with the lock
 * held.
 */
void nbd_clear_spares(struct nbd *n, uint64_t size_bytes);
void nbd_want_no_more(struct nbd_queue *nq);

/* What now_ns counts, for pthread_cond_timedwait. */
static inline struct timespec moment(uint64_t ns)
{
    return (struct timespec){ (time_t)(ns / 1000000000), (long)(ns % 1000000000) };
}

#endif
