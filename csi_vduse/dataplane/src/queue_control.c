/*
 * The control thread's calls on queues: start, stop, pause, resume. Each puts a command where the
 * queue's thread finds it (queue.c), wakes it, and waits a bounded time for the state that answers
 * the command.
 *
 * Kept true: a queue is freed by exactly one side. The control thread joins and frees what stopped
 * in time; what it abandoned belongs to its own thread.
 */
#include <errno.h>

#include "queue.h"
#include "stats.h"

static int give_command(struct vd_queue *q, enum vd_command next, enum vd_state state,
                        uint32_t timeout_ms)
{
    int error;

    pthread_mutex_lock(&q->lock);
    store_release(&q->command, next);
    vd_queue_wake(q);
    error = vd_queue_await_state(q, state, timeout_ms);
    pthread_mutex_unlock(&q->lock);
    return error;
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
    q = vd_queue_new(engine, index, config);
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
    while (q->state == VD_STARTING)
        pthread_cond_wait(&q->changed, &q->lock);
    bool failed = q->state == VD_FAILED;
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
    error = give_command(q, VD_STOP, VD_STOPPED, timeout_ms);
    pthread_mutex_lock(&q->lock);
    bool abandoned = error && q->state != VD_STOPPED;
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

    return q ? give_command(q, VD_PAUSE, VD_PAUSED, timeout_ms) : 0;
}

int vd_queue_resume(struct vd_engine *engine, uint32_t index)
{
    struct vd_queue *q = index < VD_QUEUES_MAX ? engine->queues[index] : NULL;

    if (!q)
        return 0;
    pthread_mutex_lock(&q->lock);
    /*
     * The thread moves, not we: one that did not pause in time may be reading its ring at this
     * moment.
     */
    store_release(&q->moved_to, engine->memory);
    store_release(&q->command, VD_RUN);
    vd_queue_set_state(q, VD_RUNNING);
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
