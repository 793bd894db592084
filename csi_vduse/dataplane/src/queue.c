/*
 * One queue, one thread. The thread owns the ring, the requests and an io_uring; nobody else touches them.
 *
 * A turn of its loop: fetch every available chain and hand it to the backend; submit and collect completions with
 * one system call at most; show the driver what has finished, and interrupt it when pace.c says so. When a turn finds
 * nothing it polls for a moment, if pace.c says so, then asks for a kick and sleeps in the io_uring, where completions,
 * kicks and commands all arrive: it polls the kick eventfd, and one of our own that the control thread writes to.
 * It never sleeps on completions whose interrupt it owes the driver, nor does it go silent with them after a fault. While the throttle holds a request (throttle.c)
 * nothing is fetched, no kick asked for, and no sleep longer than that.
 *
 * Commands come from the control thread: RUN, PAUSE (fetch nothing, finish what is in flight), STOP (the same,
 * then end). A backend may hang, and a reset has to be answered all the same: a queue that does not drain in time
 * is abandoned. From then on its thread touches the driver's memory no more; it outlives the engine's interest in it,
 * cancels what it can, waits for its last completion, and frees itself. Until then no queue of the engine fetches: a
 * write that was given up must not land on what its driver, or the next one, wrote later. While the command is not RUN the part of each
 * turn that answers the driver holds the queue's lock, so that abandoning falls between turns. The part that enters
 * the kernel holds no lock: that is where a backend hangs.
 *
 * Death of the process at any point leaves each chain either unpublished (it is still the driver's to lose: the
 * used index has not moved) or published. What tells the two apart for a successor is the in-flight log
 * (inflight.h), which the ring keeps: from vd_vring_next until the publish that follows vd_vring_push.
 */
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "queue.h"
#include "stats.h"

enum {
    POLLS_PER_CLOCK = 16,
    SHOW_NS = 50000, /* completions are shown at the end of a batch, or after this */
    NAP_NS = 1000000,
    LOOK_NS = 20000000, /* how often a queue looks whether what was abandoned has ended */
};

/* User data of the polls and of a cancellation; requests are pointers, so larger. */
static void *const KICK = (void *)1;
static void *const CANCEL = (void *)2;
static void *const WAKE = (void *)3;

void vd_queue_fault(struct vd_queue *q, enum vd_queue_fault fault)
{
    if (q->fault)
        return;
    q->fault = fault;
    if (load_relaxed(&q->abandoned))
        return; /* nobody asks any more */
    store_relaxed(&q->stats->fault, fault);
    vd_engine_wake_control(q->engine);
}

/* The kernel took nothing, for want of memory perhaps: ask again in a moment, not at once and for ever. */
static void nap(int result)
{
    const struct timespec moment = { .tv_nsec = NAP_NS };

    if (result < 0 && result != -EINTR && result != -ETIME)
        nanosleep(&moment, NULL);
}

struct io_uring_sqe *vd_queue_sqe(struct vd_queue *q, void *data)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(&q->uring);

    while (!sqe) {
        nap(io_uring_submit(&q->uring));
        sqe = io_uring_get_sqe(&q->uring);
    }
    io_uring_sqe_set_data(sqe, data);
    return sqe;
}

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
        vd_engine_report(q->engine, r, error, false);
    if (!error)
        q->failing_since_ns = 0;
    store_relaxed(r->status, !error ? 0 : error == ENOTSUP ? 2 : 1); /* VIRTIO_BLK_S_OK, _UNSUPP, _IOERR */

    bool filled = !error && (r->operation == VD_READ || r->operation == VD_GET_ID);

    q->ended++;
    vd_vring_push(&q->ring, r->id, filled ? (uint32_t)r->length + 1 : 1);
}

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
static void publish(struct vd_queue *q, enum command command)
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
    if (q->pace.owed && (command != RUN || vd_pace_interrupt_due(&q->pace, q->now_ns)))
        interrupt(q);
}

/* Fetch what is available, and start it as far as the throttle lets it; returns how much there was. */
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
        struct vd_request *r = q->free; /* the last one is not taken: with all ids in flight any chain is a fault */
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
        if (!vd_blk_begin(q, r, &chain))
            continue;
        if (vd_queue_memory_lost(q))
            vd_queue_fault(q, VD_FAULT_MEMORY); /* a write that lost its header must not go to sector 0 */
        if (q->fault || load_relaxed(&q->abandoned)) {
            vd_request_finish(q, r, ECANCELED);
            break;
        }
        vd_count_started(q, r);
        if (load_relaxed(&q->engine->throttle.enabled) && !vd_throttle_admit(q, r))
            break;
        q->engine->ops->submit(q, r);
        if (q->now_ns - shown_ns > SHOW_NS && load_acquire(&q->command) == RUN) {
            publish(q, RUN); /* what took long must not wait for the rest of the batch */
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

/* Collect completions without waiting; returns how many. */
static unsigned collect(struct vd_queue *q)
{
    struct io_uring_cqe *cqes[64];
    unsigned total = 0, n;

    while ((n = io_uring_peek_batch_cqe(&q->uring, cqes, 64))) {
        for (unsigned i = 0; i < n; i++) {
            void *data = io_uring_cqe_get_data(cqes[i]);

            if (data == KICK) {
                q->kick_armed = cqes[i]->flags & IORING_CQE_F_MORE;
                if (!load_relaxed(&q->abandoned)) /* or it is another queue's, at the same eventfd */
                    count_up(&q->stats->kicks, 1);
            } else if (data == WAKE) {
                q->wake_armed = cqes[i]->flags & IORING_CQE_F_MORE;
            } else if (data == CANCEL) {
                continue;
            } else if (vd_event_is_backends(data)) {
                q->engine->ops->event(q, data, cqes[i]->res);
            } else if (vd_request_waited(q, data)) {
                start(q, data);
            } else if (load_relaxed(&q->abandoned)) {
                vd_request_finish(q, data, ECANCELED); /* not another step of it */
            } else {
                q->engine->ops->complete(q, data, cqes[i]->res);
            }
        }
        io_uring_cq_advance(&q->uring, n);
        total += n;
    }
    return total;
}

/* Start the request that the throttle held if its time has come, or now; returns 1 if it did. */
static unsigned start_held(struct vd_queue *q, bool now)
{
    struct vd_request *r = vd_throttle_release(q, now);

    if (!r)
        return 0;
    start(q, r);
    return 1;
}

/* The kernel has completions for us that it shows when we enter it next. */
static bool completions_wait(const struct vd_queue *q)
{
    return load_relaxed(q->uring.sq.kflags) & IORING_SQ_TASKRUN;
}

static bool has_completions(const struct vd_queue *q)
{
    return !q->without_uring && io_uring_cq_ready(&q->uring);
}

/* Whether chains may be taken from the ring: what a predecessor left is in flight already, whatever the command is. */
static bool may_fetch(const struct vd_queue *q, enum command command)
{
    return (command == RUN || q->ring.replay_left) && !q->fault && !q->held && !load_relaxed(&q->abandoned) &&
           !load_acquire(&q->engine->abandoned);
}

/* First part of a turn: fetch, and let the kernel have it. Returns how much there was. */
static unsigned advance(struct vd_queue *q, enum command command)
{
    unsigned work = 0;

    q->now_ns = now_ns();
    if (q->held)
        work = start_held(q, command != RUN || q->fault);
    if (may_fetch(q, command))
        work += (unsigned)fetch(q);
    if (q->engine->ops->turn)
        q->engine->ops->turn(q);
    if (!q->without_uring && (io_uring_sq_ready(&q->uring) || completions_wait(q)))
        io_uring_submit_and_get_events(&q->uring);
    return work;
}

/* Second part: take what has completed, and tell the driver. Returns how much there was. */
static unsigned settle(struct vd_queue *q, enum command command)
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

/* Nobody waits for what is in flight any more: what has not begun need not. */
static void cancel(struct vd_queue *q)
{
    struct io_uring_sqe *sqe = vd_queue_sqe(q, CANCEL);

    io_uring_prep_cancel64(sqe, 0, IORING_ASYNC_CANCEL_ANY | IORING_ASYNC_CANCEL_ALL);
    io_uring_sqe_set_data(sqe, CANCEL);
    q->cancelled = true;
}

static bool has_work(const struct vd_queue *q)
{
    return (may_fetch(q, RUN) && vd_vring_available(&q->ring)) || (!q->without_uring && completions_wait(q)) ||
           has_completions(q);
}

/* Look for work without sleeping for as long as that is likely to pay; true if there is some, or an interrupt was due. */
static bool poll_for_work(struct vd_queue *q, enum command command)
{
    uint64_t until;

    if (command != RUN || q->fault)
        return false;
    q->now_ns = now_ns();
    until = vd_pace_poll_until(&q->pace, q->now_ns);
    while (q->now_ns < until) {
        for (int i = 0; i < POLLS_PER_CLOCK; i++) {
            if (has_work(q)) {
                vd_pace_woke(&q->pace, false, q->now_ns);
                return true;
            }
            if (load_acquire(&q->command) != (int)command)
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

/* Have every signal of an eventfd end the next sleep. Nobody reads it: each signal counts, whatever its value. */
static void arm(struct vd_queue *q, int fd, void *data, bool *armed)
{
    struct io_uring_sqe *sqe = vd_queue_sqe(q, data);

    io_uring_prep_poll_multishot(sqe, fd, POLLIN);
    io_uring_sqe_set_data(sqe, data);
    *armed = true;
}

/* Sleep until a completion, a kick, a command, or the moment. */
static void sleep_until(struct vd_queue *q, uint64_t until_ns)
{
    uint64_t now = now_ns(), left = until_ns > now ? until_ns - now : 1;
    struct __kernel_timespec timeout = { (int64_t)(left / 1000000000), (long long)(left % 1000000000) };
    struct io_uring_cqe *cqe;

    /* The time that the kernel waits at most is an argument of the wait: there is no timer that could be left over. */
    nap(io_uring_submit_and_wait_timeout(&q->uring, &cqe, 1, &timeout, NULL));
}

/* Sleep until a kick or a command: for a backend that needs no io_uring, where there is none. */
static void sleep_by_poll(struct vd_queue *q)
{
    struct pollfd fds[] = { { .fd = q->wake_fd, .events = POLLIN }, { .fd = q->config.kick_fd, .events = POLLIN } };
    uint64_t value;

    if (poll(fds, 2, q->held ? LOOK_NS / 1000000 : -1) <= 0)
        return;
    for (int i = 0; i < 2; i++)
        if (fds[i].revents & POLLIN)
            (void)!read(fds[i].fd, &value, sizeof(value));
}

/* Sleep until a completion, a kick or a command, unless there turns out to be something to do already. */
static void rest(struct vd_queue *q, enum command command, bool abandoned)
{
    bool fetching = command == RUN && may_fetch(q, command);

    if (!q->without_uring) {
        if (abandoned && !q->cancelled)
            cancel(q);
        if (!q->wake_armed)
            arm(q, q->wake_fd, WAKE, &q->wake_armed);
        if (!q->kick_armed && !abandoned) /* an abandoned queue's kick_fd may be somebody else's by now */
            arm(q, q->config.kick_fd, KICK, &q->kick_armed);
    }
    if (fetching && vd_vring_enable_kick(&q->ring))
        return;
    if (load_acquire(&q->command) != (int)command)
        return;
    if (q->without_uring)
        sleep_by_poll(q);
    else if (q->held)
        sleep_until(q, q->held_until_ns);
    else if (!abandoned && load_acquire(&q->engine->abandoned))
        sleep_until(q, now_ns() + LOOK_NS); /* whoever ends last does not know who waits for it */
    else
        nap(io_uring_submit_and_wait(&q->uring, 1));
    vd_pace_woke(&q->pace, true, now_ns());
    if (fetching && !load_relaxed(&q->abandoned))
        vd_vring_disable_kick(&q->ring);
}

/*
 * What to do now. Who is told to run looks first for the rings where the control thread says they are since: the old
 * address map may be gone.
 */
static enum command read_command(struct vd_queue *q)
{
    enum command command = (enum command)load_acquire(&q->command);
    struct vd_memory *memory;

    if (command != RUN || !load_relaxed(&q->moved_to))
        return command;
    memory = __atomic_exchange_n(&q->moved_to, NULL, __ATOMIC_ACQUIRE);
    if (!vd_vring_move(&q->ring, memory, &q->config))
        vd_queue_fault(q, VD_FAULT_RING_ADDRESS);
    return command;
}

/* What this engine asks of a ring, whatever comes to be written into one: no more is done. 0 or -errno. */
static int restrict_uring(struct io_uring *ring)
{
    static const uint8_t used[] = {
        IORING_OP_READV, IORING_OP_WRITEV, IORING_OP_WRITE, IORING_OP_FSYNC, IORING_OP_FALLOCATE, IORING_OP_URING_CMD,
        IORING_OP_SENDMSG, IORING_OP_RECVMSG, IORING_OP_POLL_ADD, IORING_OP_TIMEOUT, IORING_OP_ASYNC_CANCEL,
    };
    struct io_uring_restriction restrictions[sizeof(used)] = { 0 };

    for (size_t i = 0; i < sizeof(used); i++)
        restrictions[i] = (struct io_uring_restriction){ .opcode = IORING_RESTRICTION_SQE_OP, .sqe_op = used[i] };
    /* Not by liburing's own functions, which the library lacks up to 2.3. */
    if (syscall(SYS_io_uring_register, ring->ring_fd, IORING_REGISTER_RESTRICTIONS, restrictions, sizeof(used)) ||
        syscall(SYS_io_uring_register, ring->ring_fd, IORING_REGISTER_ENABLE_RINGS, NULL, 0))
        return -errno;
    return 0;
}

static int open_uring(struct vd_queue *q)
{
    /* Completions are collected by this thread when it asks, not by interrupting it (Linux 6.1). */
    struct io_uring_params params = { .flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN |
                                               IORING_SETUP_TASKRUN_FLAG | IORING_SETUP_CLAMP |
                                               IORING_SETUP_R_DISABLED };
    unsigned entries = q->config.size < 64 ? 64 : q->config.size;
    int error = io_uring_queue_init_params(entries, &q->uring, &params);

    if (error == -EINVAL) {
        params = (struct io_uring_params){ .flags = IORING_SETUP_CLAMP | IORING_SETUP_R_DISABLED };
        error = io_uring_queue_init_params(entries, &q->uring, &params);
    }
    if (!error && (error = restrict_uring(&q->uring)))
        io_uring_queue_exit(&q->uring);
    q->without_uring = error && q->engine->ops->without_uring;
    return q->without_uring ? 0 : error;
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

    prctl(PR_SET_NAME, "vduse-queue");
    vd_memory_guard_me(&q->engine->guard);
    pthread_mutex_lock(&q->lock);
    opened = !open_uring(q) && open_backend(q);
    vd_queue_set_state(q, opened ? RUNNING : FAILED);
    pthread_mutex_unlock(&q->lock);
    if (!opened)
        return NULL;
    for (;;) {
        enum command command = read_command(q);
        unsigned work = advance(q, command);

        command = read_command(q); /* that may have taken long */
        if (command == RUN) {
            work += settle(q, command);
        } else {
            pthread_mutex_lock(&q->lock);
            work += settle(q, command);
            abandoned = q->abandoned;
            bool drained = !q->in_flight && (!q->ring.replay_left || q->fault || abandoned);

            if (drained && q->command == (int)command)
                vd_queue_set_state(q, command == STOP ? STOPPED : PAUSED);
            pthread_mutex_unlock(&q->lock);
            if (drained && command == STOP)
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
