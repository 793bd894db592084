/*
 * A turn of a queue's loop: fetch every available chain and hand it to the backend; submit and
 * collect completions with one system call at most; show the driver what has finished, and
 * interrupt it when pace.c says so. While the throttle holds a request (throttle.c) nothing is
 * fetched. A queue that faults never goes silent with an interrupt that it owes.
 *
 * Death of the process at any point leaves each chain either unpublished (it is still the driver's
 * to lose: the used index has not moved) or published. What tells the two apart for a successor is
 * the in-flight log (inflight.h), which the ring keeps: from vd_vring_next until the publish that
 * follows vd_vring_push.
 */
#include <errno.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "stats.h"
#include "turn.h"
#include "uring.h"

enum { SHOW_NS = 50000 }; /* completions are shown at the end of a batch, or after this */

/* The driver broke the protocol. */
static void break_down(struct vd_queue *q, enum vd_queue_fault fault)
{
    if (vd_queue_memory_lost(q))
        fault = VD_FAULT_MEMORY; /* or did not: it is not to blame for zeros of ours */
    else if (!load_relaxed(&q->abandoned))
        count_up(&q->stats->malformed, 1);
    vd_queue_fault(q, fault);
}

/* A faulted queue's ring says nothing that counts any more: an interrupt too many does no harm. */
void vd_turn_interrupt(struct vd_queue *q)
{
    vd_pace_interrupted(&q->pace);
    if (!q->fault && !vd_vring_wants_interrupt(&q->ring))
        return;
    count_up(&q->stats->interrupts, 1);
    if (q->config.notify_ioctl) {
        uint32_t index = vd_queue_index(q);

        (void)!ioctl(q->config.notify_fd, q->config.notify_ioctl, &index);
    } else {
        uint64_t one = 1;

        (void)!write(q->config.notify_fd, &one, sizeof(one));
    }
}

/* Show the driver what has ended since the last turn, and interrupt it, now or a little later. */
static void publish(struct vd_queue *q, enum vd_command command)
{
    if (vd_queue_memory_lost(q))
        vd_queue_fault(q, VD_FAULT_MEMORY);
    if (q->fault) {
        if (q->pace.owed)
            vd_turn_interrupt(q); /* what was shown before is the driver's to hear of */
        return;
    }
    if (q->ended) {
        vd_vring_publish(&q->ring);
        vd_count_answered(q);
        vd_pace_shown(&q->pace, q->ended, q->in_flight || vd_vring_available(&q->ring), q->now_ns);
        q->ended = 0;
    }
    if (q->pace.owed && (command != VD_RUN || vd_pace_interrupt_due(&q->pace, q->now_ns)))
        vd_turn_interrupt(q);
}

/* Whether the backend has to serve a request; else it has been answered. */
static bool begin(struct vd_queue *q, struct vd_request *r, const struct vd_chain *chain)
{
    int error;
    enum vd_verdict verdict = vd_blk_begin(&q->engine->disk, q->config.features, r, chain, &error);

    if (verdict == VD_SERVE)
        return true;
    if (verdict == VD_MALFORMED)
        count_up(&q->stats->malformed, 1);
    vd_request_finish(q, r, error);
    return false;
}

/* Ask the throttle when the held request may start. */
static void ask_throttle(struct vd_queue *q, const struct vd_request *r)
{
    struct vd_throttle *throttle = &q->engine->throttle;

    q->held_generation = vd_throttle_generation(throttle);
    q->held_until_ns = vd_throttle_start(throttle, r->operation, r->length, q->now_ns);
}

/*
 * Whether a request may start now; if not it is held, and nothing is fetched until it has started.
 */
static bool admit(struct vd_queue *q, struct vd_request *r)
{
    ask_throttle(q, r);
    if (q->held_until_ns <= q->now_ns)
        return true;
    q->held = r;
    count_up(&q->stats->throttled, 1);
    return false;
}

/*
 * Fetch what is available, and start it as far as the throttle lets it; returns how much there was.
 */
static int fetch(struct vd_queue *q)
{
    int available = vd_vring_available(&q->ring);
    uint32_t before = q->in_flight, taken = 0;
    uint64_t shown_ns = q->now_ns;

    if (available < 0) {
        break_down(q, VD_FAULT_AVAIL_INDEX);
        return 0;
    }
    for (int i = 0; i < available && !q->fault && !load_relaxed(&q->abandoned); i++) {
        /* the last one is not taken: with all ids in flight any chain is a fault */
        struct vd_request *r = q->free;
        struct vd_chain chain = { .iov = r->storage };
        enum vd_queue_fault fault = vd_vring_next(&q->ring, &chain);

        if (fault) {
            break_down(q, fault);
            break;
        }
        if (!chain.writable)
            break;
        q->free = r->next_free;
        r->id = chain.id;
        r->fetched_ns = q->now_ns;
        r->failing_since_ns = 0;
        r->data_bytes = 0;
        taken++;
        vd_count_taken(q);
        if (!begin(q, r, &chain))
            continue;
        /* A write that lost its header must not go to sector 0. */
        if (vd_queue_memory_lost(q))
            vd_queue_fault(q, VD_FAULT_MEMORY);
        if (q->fault || load_relaxed(&q->abandoned)) {
            vd_request_finish(q, r, ECANCELED);
            break;
        }
        vd_count_started(q, r);
        if (vd_throttle_limits(&q->engine->throttle) && !admit(q, r))
            break;
        q->engine->ops->submit(q, r);
        if (q->now_ns - shown_ns > SHOW_NS && load_acquire(&q->command) == VD_RUN) {
            publish(q, VD_RUN); /* what took long must not wait for the rest of the batch */
            shown_ns = q->now_ns;
        }
    }
    if (taken)
        vd_count_batch(q, taken, before + taken);
    return available;
}

/* Start a request that was held back, unless nobody waits for it any more. */
static void start(struct vd_queue *q, struct vd_request *r)
{
    if (q->fault || load_relaxed(&q->abandoned))
        vd_request_finish(q, r, ECANCELED);
    else
        q->engine->ops->submit(q, r);
}

/* Whether a request comes back from a wait (vd_request_wait), which is over. */
static bool has_waited(struct vd_queue *q, struct vd_request *r)
{
    if (!r->waits)
        return false;
    r->waits = false;
    if (!load_relaxed(&q->abandoned)) /* whose counters may be another queue's by now */
        store_relaxed(&q->stats->waiting, q->stats->waiting - 1);
    return true;
}

static void take_request(struct vd_queue *q, struct vd_request *r, int result)
{
    if (has_waited(q, r))
        start(q, r);
    else if (load_relaxed(&q->abandoned))
        vd_request_finish(q, r, ECANCELED); /* not another step of it */
    else
        q->engine->ops->complete(q, r, result);
}

static void take_completion(struct vd_queue *q, const struct io_uring_cqe *cqe)
{
    uint64_t tag = cqe->user_data;

    if (tag >= VD_TAGS) {
        take_request(q, (struct vd_request *)(uintptr_t)tag, cqe->res);
    } else if (tag >= VD_TAG_EVENT) {
        q->engine->ops->event(q, (unsigned)(tag - VD_TAG_EVENT), cqe->res);
    } else if (tag == VD_TAG_KICK) {
        q->kick_armed = cqe->flags & IORING_CQE_F_MORE;
        if (!load_relaxed(&q->abandoned)) /* or it is another queue's, at the same eventfd */
            count_up(&q->stats->kicks, 1);
    } else if (tag == VD_TAG_WAKE) {
        q->wake_armed = cqe->flags & IORING_CQE_F_MORE;
    }
}

/* Collect completions without waiting; returns how many. */
static unsigned collect(struct vd_queue *q)
{
    struct io_uring_cqe *cqes[64];
    unsigned total = 0, n;

    while ((n = io_uring_peek_batch_cqe(&q->uring, cqes, 64))) {
        for (unsigned i = 0; i < n; i++)
            take_completion(q, cqes[i]);
        io_uring_cq_advance(&q->uring, n);
        total += n;
    }
    return total;
}

/* Start the request that the throttle held if its time has come, or now; returns 1 if it did. */
static unsigned start_held(struct vd_queue *q, bool now)
{
    struct vd_request *r = q->held;

    if (vd_throttle_generation(&q->engine->throttle) != q->held_generation)
        ask_throttle(q, r);
    if (!now && q->held_until_ns > q->now_ns)
        return 0;
    count_up(&q->stats->throttled_ns, q->now_ns - r->fetched_ns);
    /* its latency is what comes after: that others wait in the ring is not counted either */
    r->fetched_ns = q->now_ns;
    q->held = NULL;
    start(q, r);
    return 1;
}

bool vd_turn_has_completions(const struct vd_queue *q)
{
    return !q->without_uring && io_uring_cq_ready(&q->uring);
}

/* What a predecessor left is in flight already, whatever the command is. */
bool vd_turn_may_fetch(const struct vd_queue *q, enum vd_command command)
{
    return (command == VD_RUN || q->ring.replay_left) && !q->fault && !q->held &&
           !load_relaxed(&q->abandoned) && !load_acquire(&q->engine->abandoned);
}

/*
 * Who is told to run looks first for the rings where the control thread says they are since: the
 * old address map may be gone.
 */
enum vd_command vd_turn_command(struct vd_queue *q)
{
    enum vd_command command = load_acquire(&q->command);
    struct vd_memory *memory;

    if (command != VD_RUN || !load_relaxed(&q->moved_to))
        return command;
    memory = __atomic_exchange_n(&q->moved_to, NULL, __ATOMIC_ACQUIRE);
    if (!vd_vring_move(&q->ring, memory, &q->config))
        vd_queue_fault(q, VD_FAULT_RING_ADDRESS);
    return command;
}

unsigned vd_turn_begin(struct vd_queue *q, enum vd_command command)
{
    unsigned work = 0;

    q->now_ns = now_ns();
    if (q->held)
        work = start_held(q, command != VD_RUN || q->fault);
    if (vd_turn_may_fetch(q, command))
        work += (unsigned)fetch(q);
    if (q->engine->ops->turn)
        q->engine->ops->turn(q);
    if (!q->without_uring &&
        (io_uring_sq_ready(&q->uring) || vd_uring_holds_completions(&q->uring)))
        io_uring_submit_and_get_events(&q->uring);
    return work;
}

unsigned vd_turn_end(struct vd_queue *q, enum vd_command command)
{
    unsigned work = 0;

    if (vd_turn_has_completions(q)) {
        q->now_ns = now_ns();
        work = collect(q);
    }
    if (load_relaxed(&q->abandoned))
        return work;
    publish(q, command);
    return work;
}
