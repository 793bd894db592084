/*
 * What a queue counts. Its thread alone writes, without locks; readers may be a little late but see
 * no torn number (vd_queue_stats_read). Nothing here is more than a few additions to memory that no
 * other queue's thread writes.
 */
#include "stats.h"

#include "histogram.h"

enum { STALL_NS = 1000000000 };

_Static_assert(
    sizeof(((struct vd_operation_stats *)0)->latency) == VD_LATENCY_BUCKETS * sizeof(uint64_t) &&
        sizeof(((struct vd_queue_stats *)0)->depths) == VD_COUNT_BUCKETS * sizeof(uint64_t) &&
        sizeof(((struct vd_queue_stats *)0)->batch_sizes) == VD_COUNT_BUCKETS * sizeof(uint64_t) &&
        sizeof(((struct vd_queue_stats *)0)->operations) ==
            VD_OPERATIONS * sizeof(struct vd_operation_stats),
    "lengths that cffi must read as numbers");
_Static_assert(VD_QUEUE_SIZE_MAX == 1 << (VD_COUNT_BUCKETS - 1),
               "the last bucket ends with the largest queue");

void vd_count_batch(struct vd_queue *q, uint32_t taken, uint32_t depth)
{
    count_up(&q->stats->batches, 1);
    count_up(&q->stats->batch_sizes[vd_count_bucket(taken)], 1);
    count_up(&q->stats->depths[vd_count_bucket(depth)], 1);
}

void vd_count_taken(struct vd_queue *q)
{
    if (!q->in_flight)
        store_relaxed(&q->stats->unanswered_since_ns, q->now_ns);
    store_relaxed(&q->stats->in_flight, ++q->in_flight);
}

void vd_count_none(struct vd_queue *q)
{
    store_relaxed(&q->stats->in_flight, 0);
    store_relaxed(&q->stats->waiting, 0);
    store_relaxed(&q->stats->unanswered_since_ns, 0);
}

void vd_count_answered(struct vd_queue *q)
{
    uint64_t ns = q->now_ns - load_relaxed(&q->stats->unanswered_since_ns);

    if (ns > STALL_NS)
        count_up(&q->stats->stalled_ns, ns);
    store_relaxed(&q->stats->unanswered_since_ns, q->in_flight ? q->now_ns : 0);
}

void vd_count_started(struct vd_queue *q, struct vd_request *r)
{
    if (r->operation != VD_READ && r->operation != VD_WRITE)
        return;
    r->data_bytes = r->length;
    q->data_bytes += r->length;
    if (q->data_bytes > q->stats->data_max_bytes)
        store_relaxed(&q->stats->data_max_bytes, q->data_bytes);
}

void vd_count_finished(struct vd_queue *q, const struct vd_request *r, int error)
{
    struct vd_operation_stats *s = &q->stats->operations[r->operation];
    uint64_t ns = q->now_ns - r->fetched_ns;

    count_up(&s->count, 1);
    count_up(&s->latency_ns, ns);
    count_up(&s->latency[vd_latency_bucket(ns)], 1);
    if (ns > s->latency_max_ns)
        store_relaxed(&s->latency_max_ns, ns);
    if (error)
        count_up(&s->errors, 1);
    else
        count_up(&s->bytes, r->length);
}

void vd_count_remote(struct vd_remote_stats *s, uint64_t sent_ns, uint64_t now_ns)
{
    uint64_t ns = now_ns - sent_ns;

    count_up(&s->commands, 1);
    count_up(&s->latency_ns, ns);
    count_up(&s->latency[vd_latency_bucket(ns)], 1);
    if (ns > s->latency_max_ns)
        store_relaxed(&s->latency_max_ns, ns);
}

uint32_t vd_latency_bucket_of(uint64_t ns)
{
    return vd_latency_bucket(ns);
}
