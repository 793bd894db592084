/* A queue as a thing: what it is made of, and the state in which its two sides see each other. */
#include <errno.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "queue.h"

struct vd_queue *vd_queue_new(struct vd_engine *engine, uint32_t index,
                              const struct vd_queue_config *config)
{
    struct vd_queue *q = calloc(1, sizeof(*q));
    pthread_condattr_t monotonic;
    size_t size = config->size;

    if (!q)
        return NULL;
    q->engine = engine;
    q->config = *config;
    q->index = index;
    q->stats = &engine->stats[index].of;
    q->command = config->paused ? VD_PAUSE : VD_RUN;
    q->memory_faults = load_relaxed(&engine->guard.faults);
    q->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    pthread_mutex_init(&q->lock, NULL);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&q->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    /* with one for the driver who makes one too many available */
    q->requests = calloc(size + 1, sizeof(*q->requests));
    /* pages that no request needs are never touched */
    q->iovecs = calloc(size * size, sizeof(*q->iovecs));
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

void vd_queue_set_state(struct vd_queue *q, enum vd_state state)
{
    q->state = state;
    pthread_cond_broadcast(&q->changed);
}

int vd_queue_await_state(struct vd_queue *q, enum vd_state state, uint32_t timeout_ms)
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
    while (q->state != state && !error)
        error = pthread_cond_timedwait(&q->changed, &q->lock, &until);
    return q->state == state ? 0 : -ETIMEDOUT;
}

bool vd_queue_paused(struct vd_queue *q)
{
    pthread_mutex_lock(&q->lock);
    bool paused = q->state == VD_PAUSED;

    pthread_mutex_unlock(&q->lock);
    return paused;
}
