/* A queue's io_uring: how it is opened, and its sleeps; see uring.c. */
#ifndef VD_URING_H
#define VD_URING_H

#include <liburing.h>

#include "common.h"

/* One that does what this engine asks of it and nothing else; 0 or -errno. */
int vd_uring_open(struct io_uring *ring, unsigned entries);

/* A free submission; never NULL. */
struct io_uring_sqe *vd_uring_sqe(struct io_uring *ring);

/*
 * Have every signal of an eventfd complete with this user data. Nobody reads it: each signal
 * counts, whatever its value.
 */
void vd_uring_watch(struct io_uring *ring, int fd, uint64_t tag);

/* Cancel all that can be. */
void vd_uring_cancel_all(struct io_uring *ring, uint64_t tag);

/* Submit, and sleep until there is a completion; or until the moment (CLOCK_MONOTONIC). */
void vd_uring_wait(struct io_uring *ring);
/* True: it came, and nothing else. */
bool vd_uring_wait_until(struct io_uring *ring, uint64_t until_ns);

/* The kernel has completions for us that it shows when we enter it next. */
static inline bool vd_uring_holds_completions(const struct io_uring *ring)
{
    return load_relaxed(ring->sq.kflags) & IORING_SQ_TASKRUN;
}

#endif
