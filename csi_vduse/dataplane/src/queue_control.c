/*
 * The control thread's calls on queues: start, stop, pause, resume. Each puts a command where the queue's thread
 * finds it (queue.c), wakes it, and waits a bounded time for the state that answers the command.
 *
 * Kept true: a queue is freed by exactly one side. The control thread joins and frees what stopped in time; what it
 * abandoned belongs to its own thread.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "queue.h"
#include "stats.h"

void vd_queue_set_state(struct vd_queue *q, enum state state)
{
    q->state = (int)state;
    pthread_cond_broadcast(&q->changed);
}

void vd_queue_wake(struct vd_queue *q)
{
    uint64_t one = 1;

    (void)!write(q->wake_fd, &one, sizeof(one));
}

void vd_queue_free(struct vd_queue *q)
{
    vd_log_close(q->ring.log);
    if (q->wake_fd >= 0)
        close(q->wake_fd);
    free(q->requests);
    free(q->iovecs);
    free(q->extents);
    pthread_mutex_destroy(&q->lock);
    pthread_cond_destroy(&q->changed);
    free(q);
}

/* Wait under the lock until the queue is in the state; 0 or -ETIMEDOUT. */
static int wait_for(struct vd_queue *q, enum state state, uint32_t timeout_ms)
{
    struct timespec until;
    int error = 0;

    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += timeout_ms / 1000;
    until.tv_nsec += (long)(timeout_ms % 1000) * 1000000;
    if (until.tv_nsec >= 1000000000) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000;
    }
    while (q->state != (int)state && !error)
        error = pthread_cond_timedwait(&q->changed, &q->lock, &until);
    return q->state == (int)state ? 0 : -ETIMEDOUT;
}

static int command(struct vd_queue *q, enum command next, enum state state, uint32_t timeout_ms)
{
    int error;

    pthread_mutex_lock(&q->lock);
    store_release(&q->command, (int)next);
    vd_queue_wake(q);
    error = wait_for(q, state, timeout_ms);
    pthread_mutex_unlock(&q->lock);
    return error;
}

bool vd_queue_paused(struct vd_queue *q)
{
    pthread_mutex_lock(&q->lock);
    bool paused = q->state == PAUSED;

    pthread_mutex_unlock(&q->lock);
    return paused;
}

static struct vd_queue *new_queue(struct vd_engine *engine, uint32_t index, const struct vd_queue_config *config)
{
    struct vd_queue *q = calloc(1, sizeof(*q));
    pthread_condattr_t monotonic;
    size_t size = config->size;

    if (!q)
        return NULL;
    q->engine = engine;
    q->config = *config;
    q->stats = &engine->stats[index];
    q->command = config->paused ? PAUSE : RUN;
    q->memory_faults = load_relaxed(&engine->guard.faults);
    q->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    pthread_mutex_init(&q->lock, NULL);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&q->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    q->requests = calloc(size + 1, sizeof(*q->requests)); /* with one for the driver who makes one too many available */
    q->iovecs = calloc(size * size, sizeof(*q->iovecs)); /* pages that no request needs are never touched */
    q->extents = calloc(size * VD_EXTENTS_MAX, sizeof(*q->extents));
    if (q->wake_fd < 0 || !q->requests || !q->iovecs || !q->extents) {
        vd_queue_free(q);
        return NULL;
    }
    q->free = &q->requests[size];
    for (size_t i = size; i-- > 0;) {
        q->requests[i].next_free = q->free;
        q->free = &q->requests[i];
        q->requests[i].storage = q->iovecs + i * size;
        q->requests[i].extents = q->extents + i * VD_EXTENTS_MAX;
    }
    return q;
}

int vd_queue_start(struct vd_engine *engine, uint32_t index, const struct vd_queue_config *config)
{
    enum vd_queue_fault fault;
    struct vd_queue *q;
    struct vd_log *log;
    int error;

    if (index >= engine->config.max_queues || !config->size || config->size > VD_QUEUE_SIZE_MAX)
        return -EINVAL;
    if (engine->queues[index])
        return -EBUSY;
    vd_memory_guard_me(&engine->guard); /* its rings are looked at here */
    if (vd_memory_restore(engine->memory))
        return -EFAULT;
    q = new_queue(engine, index, config);
    if (!q)
        return -ENOMEM;
    store_relaxed(&q->stats->fault, VD_FAULT_NONE);
    vd_count_none(q);
    error = vd_log_open(config, &log);
    fault = error ? VD_FAULT_LOG : vd_vring_init(&q->ring, engine->memory, config, log);
    if (fault) {
        vd_queue_fault(q, fault);
        vd_queue_free(q);
        return error ? error : fault == VD_FAULT_LOG ? -EINVAL : -EFAULT;
    }
    if (pthread_create(&q->thread, NULL, vd_queue_run, q)) {
        vd_queue_free(q);
        return -EAGAIN;
    }
    pthread_mutex_lock(&q->lock);
    while (q->state == STARTING)
        pthread_cond_wait(&q->changed, &q->lock);
    bool failed = q->state == FAILED;
    pthread_mutex_unlock(&q->lock);
    if (failed) {
        pthread_join(q->thread, NULL);
        vd_queue_fault(q, VD_FAULT_BACKEND);
        vd_queue_free(q);
        return -ENOSYS;
    }
    engine->queues[index] = q;
    store_relaxed(&q->stats->running, 1);
    return 0;
}

int vd_queue_stop(struct vd_engine *engine, uint32_t index, uint32_t timeout_ms)
{
    struct vd_queue *q = index < VD_QUEUES_MAX ? engine->queues[index] : NULL;
    int error;

    if (!q)
        return 0;
    error = command(q, STOP, STOPPED, timeout_ms);
    pthread_mutex_lock(&q->lock);
    bool abandoned = error && q->state != STOPPED;
    engine->state[index] = vd_vring_state(&q->ring);
    store_relaxed(&q->stats->running, 0);
    engine->queues[index] = NULL;
    if (abandoned) {
        __atomic_fetch_add(&engine->abandoned, 1, __ATOMIC_RELAXED);
        store_relaxed(&q->abandoned, true);
        store_relaxed(&q->ring.abandoned, true);
        vd_count_none(q);
        pthread_detach(q->thread);
        vd_queue_wake(q);
    }
    pthread_mutex_unlock(&q->lock); /* an abandoned queue may free itself from here on */
    if (abandoned)
        return -ETIMEDOUT;
    pthread_join(q->thread, NULL);
    vd_queue_free(q);
    return 0;
}

int vd_queue_pause(struct vd_engine *engine, uint32_t index, uint32_t timeout_ms)
{
    struct vd_queue *q = index < VD_QUEUES_MAX ? engine->queues[index] : NULL;

    return q ? command(q, PAUSE, PAUSED, timeout_ms) : 0;
}

int vd_queue_resume(struct vd_engine *engine, uint32_t index)
{
    struct vd_queue *q = index < VD_QUEUES_MAX ? engine->queues[index] : NULL;

    if (!q)
        return 0;
    pthread_mutex_lock(&q->lock);
    /* The thread moves, not we: one that did not pause in time may be reading its ring at this moment. */
    store_release(&q->moved_to, engine->memory);
    store_release(&q->command, RUN);
    vd_queue_set_state(q, RUNNING);
    pthread_mutex_unlock(&q->lock);
    vd_queue_wake(q);
    return 0;
}

int vd_queue_state(struct vd_engine *engine, uint32_t index, uint32_t *state)
{
    struct vd_queue *q = index < VD_QUEUES_MAX ? engine->queues[index] : NULL;

    if (index >= VD_QUEUES_MAX)
        return -EINVAL;
    *state = q ? vd_vring_state(&q->ring) : engine->state[index];
    return 0;
}
