/*
 * What backends ask of their queue, and how a request ends: told to the driver, or submitted again
 * later because its backend may come back (waiting.c).
 *
 * Kept true: a request that waits is in flight, in the log too: a successor begins it again. One of
 * an abandoned or faulted queue does not wait.
 */
#include "backend.h"

#include <errno.h>
#include <unistd.h>

#include "queue.h"
#include "report.h"
#include "stats.h"
#include "uring.h"
#include "waiting.h"

enum { AGAIN_MS = 250 };

/* read by the kernel only */
static struct __kernel_timespec again = { .tv_nsec = AGAIN_MS * 1000000 };

void vd_request_finish(struct vd_queue *q, struct vd_request *r, int error)
{
    r->next_free = q->free;
    q->free = r;
    q->in_flight--;
    q->data_bytes -= r->data_bytes;
    if (load_relaxed(&q->abandoned))
        return;
    store_relaxed(&q->stats->in_flight, q->in_flight);
    if (q->fault)
        return; /* the driver has to reset the device; its rings may not even be mapped */
    vd_count_finished(q, r, error);
    if (error && error != ENOTSUP)
        vd_report_failure(&q->engine->report, r, error, false);
    if (!error)
        q->failing_since_ns = 0;
    /* VIRTIO_BLK_S_OK, _UNSUPP, _IOERR */
    store_relaxed(r->status, !error ? 0 : error == ENOTSUP ? 2 : 1);

    bool filled = !error && (r->operation == VD_READ || r->operation == VD_GET_ID);

    q->ended++;
    vd_vring_push(&q->ring, r->id, filled ? (uint32_t)r->length + 1 : 1);
}

bool vd_request_wait(struct vd_queue *q, struct vd_request *r, int error)
{
    bool first = !r->failing_since_ns;
    struct io_uring_sqe *sqe;

    if (load_relaxed(&q->abandoned) || q->fault || !vd_waiting_may_help(error))
        return false;
    if (first)
        vd_report_failure(&q->engine->report, r, error, true);
    if (!vd_waiting_goes_on(&q->failing_since_ns, &r->failing_since_ns, now_ns(),
                            vd_queue_away_ns(q)))
        return false;
    r->waits = true;
    store_relaxed(&q->stats->waiting, q->stats->waiting + 1);
    sqe = vd_queue_sqe(q);
    io_uring_prep_timeout(sqe, &again, 0, 0);
    vd_sqe_of_request(sqe, r);
    return true;
}

uint32_t vd_request_index(const struct vd_queue *q, const struct vd_request *r)
{
    return (uint32_t)(r - q->requests);
}

struct io_uring_sqe *vd_queue_sqe(struct vd_queue *q)
{
    return vd_uring_sqe(&q->uring);
}

void vd_sqe_of_request(struct io_uring_sqe *sqe, struct vd_request *r)
{
    sqe->user_data = (uintptr_t)r;
}

void vd_sqe_of_event(struct io_uring_sqe *sqe, unsigned event)
{
    sqe->user_data = VD_TAG_EVENT + event;
}

void vd_queue_cancel_event(struct vd_queue *q, unsigned event)
{
    struct io_uring_sqe *sqe = vd_queue_sqe(q);

    io_uring_prep_cancel64(sqe, VD_TAG_EVENT + event, 0);
    sqe->user_data = VD_TAG_CANCEL;
}

unsigned vd_queue_await_event(struct vd_queue *q, int *result)
{
    for (;;) {
        struct io_uring_cqe *cqe;
        uint64_t tag;

        vd_uring_wait(&q->uring);
        if (io_uring_peek_cqe(&q->uring, &cqe))
            continue;
        tag = cqe->user_data;
        *result = cqe->res;
        io_uring_cqe_seen(&q->uring, cqe);
        if (tag >= VD_TAG_EVENT && tag < VD_TAGS)
            return (unsigned)(tag - VD_TAG_EVENT);
    }
}

void *vd_queue_volume(const struct vd_queue *q)
{
    return q->engine->backend;
}

uint64_t vd_queue_iova(const struct vd_queue *q, const void *address)
{
    const struct vd_memory *memory = q->ring.memory;
    const uint8_t *at = address;

    for (uint32_t i = 0; i < memory->count; i++) {
        const struct vd_mapping *m = &memory->mappings[i];

        if (at >= m->address && (uint64_t)(at - m->address) <= m->last - m->iova)
            return m->iova + (uint64_t)(at - m->address);
    }
    return 0; /* an address that the server has not: it was a request's, and the memory has moved */
}

void *vd_queue_backend(const struct vd_queue *q)
{
    return q->backend;
}

void vd_queue_set_backend(struct vd_queue *q, void *backend)
{
    q->backend = backend;
}

const struct vd_queue_config *vd_queue_config_of(const struct vd_queue *q)
{
    return &q->config;
}

uint32_t vd_queue_index(const struct vd_queue *q)
{
    return q->index;
}

bool vd_queue_replays(const struct vd_queue *q)
{
    return q->ring.replay_left;
}

bool vd_queue_is_abandoned(const struct vd_queue *q)
{
    return load_relaxed(&q->abandoned);
}

bool vd_queue_memory_lost(const struct vd_queue *q)
{
    return q->fault == VD_FAULT_MEMORY ||
           load_relaxed(&q->engine->guard.faults) != q->memory_faults;
}

uint64_t vd_queue_now_ns(const struct vd_queue *q)
{
    return q->now_ns;
}

void vd_queue_take_time(struct vd_queue *q)
{
    q->now_ns = now_ns();
}

uint64_t vd_queue_away_ns(const struct vd_queue *q)
{
    return (uint64_t)q->engine->config.away_ms * 1000000;
}

struct vd_remote_stats *vd_queue_remote(struct vd_queue *q)
{
    return &q->stats->remote;
}

void vd_queue_fault(struct vd_queue *q, enum vd_queue_fault fault)
{
    if (q->fault)
        return;
    q->fault = fault;
    if (load_relaxed(&q->abandoned))
        return; /* nobody asks any more */
    store_relaxed(&q->stats->fault, fault);
    vd_report_wake(&q->engine->report);
}

void vd_queue_report(struct vd_queue *q)
{
    vd_report_wake(&q->engine->report);
}

void *vd_engine_backend(const struct vd_engine *engine)
{
    return engine->backend;
}

void vd_engine_wake(struct vd_engine *engine, uint32_t index)
{
    if (engine->queues[index])
        vd_queue_wake(engine->queues[index]);
}

void vd_queue_wake(struct vd_queue *q)
{
    uint64_t one = 1;

    (void)!write(q->wake_fd, &one, sizeof(one));
}
