/*
 * One queue, one thread. The thread owns the ring, the requests and an io_uring; nobody else
 * touches them.
 *
 * Its loop takes turns (turn.c). When a turn finds nothing it polls for a moment, if pace.c says
 * so, then asks for a kick and sleeps in the io_uring, where completions, kicks and commands all
 * arrive: it polls the kick eventfd, and one of our own that the control thread writes to. It never
 * sleeps on completions whose interrupt it owes the driver. While the throttle holds a request no
 * kick is asked for, and no sleep is longer than that.
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
 */
#include <poll.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "turn.h"
#include "uring.h"

enum {
    POLLS_PER_CLOCK = 16,
    /*
     * How often a queue looks whether what was abandoned has ended: who ends last does not know who
     * waits for it.
     */
    LOOK_NS = 20000000,
};

static bool has_work(const struct vd_queue *q)
{
    return (vd_turn_may_fetch(q, VD_RUN) && vd_vring_available(&q->ring)) ||
           (!q->without_uring && vd_uring_holds_completions(&q->uring)) ||
           vd_turn_has_completions(q);
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
    vd_turn_interrupt(q);
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
    bool fetching = command == VD_RUN && vd_turn_may_fetch(q, command);

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
        enum vd_command command = vd_turn_command(q);
        unsigned work = vd_turn_begin(q, command);

        command = vd_turn_command(q); /* that may have taken long */
        if (command == VD_RUN) {
            work += vd_turn_end(q, command);
        } else {
            pthread_mutex_lock(&q->lock);
            work += vd_turn_end(q, command);
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
