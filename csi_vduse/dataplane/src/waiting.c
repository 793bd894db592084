/*
 * Requests that their backend fails for a reason that may pass: it is full, or it is away. They are not answered but
 * tried again, every quarter of a second, on the queue's own thread: the time comes as a completion of its io_uring.
 *
 * A driver that is told of an error never tries again; but a backend that is full, or cannot do its work (EIO and the
 * like), may also be so for good. It is waited for until it has done nothing right for config.away_ms, and so is a single
 * request that keeps failing among others that do not; then the driver is told.
 *
 * Kept true: a request that waits is in flight, in the log too: a successor begins it again. One of an abandoned or
 * faulted queue does not wait.
 */
#include <errno.h>

#include "queue.h"

enum { AGAIN_MS = 250 };

static struct __kernel_timespec again = { .tv_nsec = AGAIN_MS * 1000000 }; /* read by the kernel only */

static bool may_pass(int error)
{
    switch (error) {
    case EAGAIN: case ENOSPC: case EDQUOT: case EIO: case ENODEV: case ENXIO: case ESTALE: case ENOTCONN: case ETIMEDOUT: case EREMOTEIO:
        return true;
    default:
        return false;
    }
}

bool vd_request_wait(struct vd_queue *q, struct vd_request *r, int error)
{
    uint64_t now = now_ns(), since;
    struct io_uring_sqe *sqe;

    if (load_relaxed(&q->abandoned) || q->fault || !may_pass(error))
        return false;
    if (!q->failing_since_ns)
        q->failing_since_ns = now;
    if (!r->failing_since_ns) {
        r->failing_since_ns = now;
        vd_engine_report(q->engine, r, error, true);
    }
    since = q->failing_since_ns < r->failing_since_ns ? q->failing_since_ns : r->failing_since_ns;
    if (now - since >= (uint64_t)q->engine->config.away_ms * 1000000)
        return false;
    r->waits = true;
    store_relaxed(&q->stats->waiting, q->stats->waiting + 1);
    sqe = vd_queue_sqe(q, r);
    io_uring_prep_timeout(sqe, &again, 0, 0);
    io_uring_sqe_set_data(sqe, r);
    return true;
}

bool vd_request_waited(struct vd_queue *q, struct vd_request *r)
{
    if (!r->waits)
        return false;
    r->waits = false;
    if (!load_relaxed(&q->abandoned)) /* whose counters may be another queue's by now */
        store_relaxed(&q->stats->waiting, q->stats->waiting - 1);
    return true;
}
