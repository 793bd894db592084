/*
 * One queue, one thread. The thread owns the ring, the requests and an io_uring; nobody else
 * touches them.
 *
 * A turn of its loop: fetch every available chain and hand it to the backend; submit and collect
 * completions with one system call at most; show the driver what has finished, and interrupt it
 * when pace.c says so. When a turn finds nothing it polls for a moment, if pace.c says so, then
 * asks for a kick and sleeps in the io_uring, where completions, kicks and commands all arrive: it
 * polls the kick eventfd, and one of our own that the control thread writes to. It never sleeps on
 * completions whose interrupt it owes the driver, nor does it go silent with them after a fault.
 * While the throttle holds a request (throttle.c) nothing is fetched, no kick asked for, and no
 * sleep longer than that.
 *
 * Commands come from the control thread: VD_RUN, VD_PAUSE (fetch nothing, finish what is in
 * flight), VD_STOP (the same, then end). A backend may hang, and a reset has to be answered all the
 * same: a queue that does not drain in time is abandoned. From then on its thread touches the
 * driver's memory no more; it outlives the engine's interest in it, cancels what it can, waits for
 * its last completion, and frees itself. Until then no queue of the engine fetches: a write that
 * was given up must not land on what its driver, or the next one, wrote later. While the command is
 * not VD_RUN the part of each turn that answers the driver holds the queue's lock, so that
 * abandoning falls between turns. The part that enters the kernel holds no lock: that is where a
 * backend hangs.
 *
 * Death of the process at any point leaves each chain either unpublished (it is still the driver's
 * to lose: the used index has not moved) or published. What tells the two apart for a successor is
 * the in-flight log (inflight.h), which the ring keeps: from vd_vring_next until the publish that
 * follows vd_vring_push.
 */
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "queue.h"
#include "stats.h"
#include "uring.h"

enum {
    POLLS_PER_CLOCK = 16,
    SHOW_NS = 50000, /* completions are shown at the end of a batch, or after this */
    /*
     * How often a queue looks whether what was abandoned has ended: who ends last does not know who
     * waits for it.
     */
    LOOK_NS = 20000000,
};

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
static void interrupt(struct vd_queue *q)
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
            interrupt(q); /* what was shown before is the driver's to hear of */
        return;
    }
    if (q->ended) {
        vd_vring_publish(&q->ring);
        vd_count_answered(q);
        vd_pace_shown(&q->pace, q->ended, q->in_flight || vd_vring_available(&q->ring), q->now_ns);
        q->ended = 0;
    }
    if (q->pace.owed && (command != VD_RUN || vd_pace_interrupt_due(&q->pace, q->now_ns)))
        interrupt(q);
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

static bool has_completions(const struct vd_queue *q)
{
    return !q->without_uring && io_uring_cq_ready(&q->uring);
}

/*
 * Whether chains may be taken from the ring: what a predecessor left is in flight already, whatever
 * the command is.
 */
static bool may_fetch(const struct vd_queue *q, enum vd_command command)
{
    return (command == VD_RUN || q->ring.replay_left) && !q->fault && !q->held &&
           !load_relaxed(&q->abandoned) && !load_acquire(&q->engine->abandoned);
}

/* First part of a turn: fetch, and let the kernel have it. Returns how much there was. */
static unsigned begin_turn(struct vd_queue *q, enum vd_command command)
{
    unsigned work = 0;

    q->now_ns = now_ns();
    if (q->held)
        work = start_held(q, command != VD_RUN || q->fault);
    if (may_fetch(q, command))
        work += (unsigned)fetch(q);
    if (q->engine->ops->turn)
        q->engine->ops->turn(q);
    if (!q->without_uring &&
        (io_uring_sq_ready(&q->uring) || vd_uring_holds_completions(&q->uring)))
        io_uring_submit_and_get_events(&q->uring);
    return work;
}

/* Second part: take what has completed, and tell the driver. Returns how much there was. */
static unsigned end_turn(struct vd_queue *q, enum vd_command command)
{
    unsigned work = 0;

    if (has_completions(q)) {
        q->now_ns = now_ns();
        work = collect(q);
    }
    if (load_relaxed(&q->abandoned))
        return work;
    publish(q, command);
    return work;
}

static bool has_work(const struct vd_queue *q)
{
    return (may_fetch(q, VD_RUN) && vd_vring_available(&q->ring)) ||
           (!q->without_uring && vd_uring_holds_completions(&q->uring)) || has_completions(q);
}

static enum vd_wait waits_for(const struct vd_queue *q)
{
    if (!q->in_flight)
        return VD_WAIT_REQUEST;
    return q->in_flight <= VD_FEW_IN_FLIGHT ? VD_WAIT_ANSWER : VD_WAIT_MANY;
}

/*
 * Look for work without sleeping for as long as that is likely to pay; true if there is some, or an
 * interrupt was due.
 */
static bool poll_for_work(struct vd_queue *q, enum vd_command command)
{
    uint64_t until;

    if (command != VD_RUN || q->fault)
        return false;
    q->now_ns = now_ns();
    until = vd_pace_poll_until(&q->pace, waits_for(q), q->now_ns);
    while (q->now_ns < until) {
        for (int i = 0; i < POLLS_PER_CLOCK; i++) {
            if (has_work(q)) {
                vd_pace_woke(&q->pace, false, q->now_ns);
                return true;
            }
            if (load_acquire(&q->command) != command)
                return true;
            cpu_relax();
        }
        q->now_ns = now_ns();
    }
    if (!q->pace.owed)
        return false;
    interrupt(q);
    return true;
}

/* Sleep until a kick or a command: for a backend that needs no io_uring, where there is none. */
static void sleep_by_poll(struct vd_queue *q)
{
    struct pollfd fds[] = { { .fd = q->wake_fd, .events = POLLIN },
                            { .fd = q->config.kick_fd, .events = POLLIN } };
    uint64_t value;

    if (poll(fds, 2, q->held ? LOOK_NS / 1000000 : -1) <= 0)
        return;
    for (int i = 0; i < 2; i++)
        if (fds[i].revents & POLLIN)
            (void)!read(fds[i].fd, &value, sizeof(value));
}

/* Sleep until something comes; now and then look on the way what a wake costs. */
static void sleep_measured(struct vd_queue *q)
{
    uint32_t sample_ns = vd_pace_sample_ns(&q->pace);
    uint64_t until_ns = now_ns() + sample_ns;

    if (sample_ns) {
        if (!vd_uring_wait_until(&q->uring, until_ns))
            return;
        vd_pace_sampled(&q->pace, now_ns() - until_ns);
    }
    vd_uring_wait(&q->uring);
}

/*
 * Sleep until a completion, a kick or a command, unless there turns out to be something to do
 * already.
 */
static void rest(struct vd_queue *q, enum vd_command command, bool abandoned)
{
    bool fetching = command == VD_RUN && may_fetch(q, command);

    if (!q->without_uring) {
        if (abandoned && !q->cancelled) {
            /* nobody waits for what is in flight: what has not begun need not */
            vd_uring_cancel_all(&q->uring, VD_TAG_CANCEL);
            q->cancelled = true;
        }
        if (!q->wake_armed) {
            vd_uring_watch(&q->uring, q->wake_fd, VD_TAG_WAKE);
            q->wake_armed = true;
        }
        if (!q->kick_armed && !abandoned) {
            /* an abandoned queue's kick_fd may be somebody else's by now */
            vd_uring_watch(&q->uring, q->config.kick_fd, VD_TAG_KICK);
            q->kick_armed = true;
        }
    }
    if (fetching && vd_vring_enable_kick(&q->ring))
        return;
    if (load_acquire(&q->command) != command)
        return;
    if (q->without_uring)
        sleep_by_poll(q);
    else if (q->held)
        vd_uring_wait_until(&q->uring, q->held_until_ns);
    else if (!abandoned && load_acquire(&q->engine->abandoned))
        vd_uring_wait_until(&q->uring, now_ns() + LOOK_NS); /* see LOOK_NS */
    else
        sleep_measured(q);
    vd_pace_woke(&q->pace, true, now_ns());
    if (fetching && !load_relaxed(&q->abandoned))
        vd_vring_disable_kick(&q->ring);
}

/*
 * What to do now. Who is told to run looks first for the rings where the control thread says they
 * are since: the old address map may be gone.
 */
static enum vd_command read_command(struct vd_queue *q)
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

/* The io_uring, where the backend does not do without. */
static bool open_uring(struct vd_queue *q)
{
    int error = vd_uring_open(&q->uring, q->config.size < 64 ? 64 : q->config.size);

    q->without_uring = error && q->engine->ops->without_uring;
    return !error || q->without_uring;
}

static bool open_backend(struct vd_queue *q)
{
    if (!q->engine->ops->queue_open || !q->engine->ops->queue_open(q))
        return true;
    io_uring_queue_exit(&q->uring);
    return false;
}

void *vd_queue_run(void *argument)
{
    struct vd_queue *q = argument;
    bool abandoned = false, opened;
    char name[16];

    snprintf(name, sizeof(name), "vduse-queue-%u", vd_queue_index(q));
    prctl(PR_SET_NAME, name);
    vd_memory_guard_me(&q->engine->guard);
    pthread_mutex_lock(&q->lock);
    opened = open_uring(q) && open_backend(q);
    vd_queue_set_state(q, opened ? VD_RUNNING : VD_FAILED);
    pthread_mutex_unlock(&q->lock);
    if (!opened)
        return NULL;
    for (;;) {
        enum vd_command command = read_command(q);
        unsigned work = begin_turn(q, command);

        command = read_command(q); /* that may have taken long */
        if (command == VD_RUN) {
            work += end_turn(q, command);
        } else {
            pthread_mutex_lock(&q->lock);
            work += end_turn(q, command);
            abandoned = q->abandoned;
            bool drained = !q->in_flight && (!q->ring.replay_left || q->fault || abandoned);

            if (drained && q->command == command)
                vd_queue_set_state(q, command == VD_STOP ? VD_STOPPED : VD_PAUSED);
            pthread_mutex_unlock(&q->lock);
            if (drained && command == VD_STOP)
                break;
        }
        if (!work && !poll_for_work(q, command))
            rest(q, command, abandoned);
    }
    if (q->engine->ops->queue_close)
        q->engine->ops->queue_close(q);
    if (!q->without_uring)
        io_uring_queue_exit(&q->uring);
    if (abandoned) {
        __atomic_fetch_sub(&q->engine->abandoned, 1, __ATOMIC_RELEASE);
        vd_queue_free(q);
    }
    return NULL;
}
