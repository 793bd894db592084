/*
 * A queue, and what its two sides share: its thread (queue.c) and the control thread's calls
 * (queue_control.c). Below both is what it is made of (queue_state.c).
 */
#ifndef VD_QUEUE_H
#define VD_QUEUE_H

#include <liburing.h>
#include <pthread.h>

#include "engine.h"
#include "pace.h"
#include "vring.h"

enum vd_command { VD_RUN, VD_PAUSE, VD_STOP };
enum vd_state { VD_STARTING, VD_RUNNING, VD_PAUSED, VD_STOPPED, VD_FAILED };

/* User data of submissions that are no request's, which is a pointer, and larger. */
enum vd_tag {
    VD_TAG_KICK = 1,
    VD_TAG_WAKE,
    VD_TAG_CANCEL,
    VD_TAG_EVENT,
    VD_TAGS = VD_TAG_EVENT + VD_EVENTS_MAX
};

struct vd_queue {
    struct vd_engine *engine;
    void *backend; /* the backend's own */
    struct vd_queue_config config;
    uint32_t index;
    struct vd_queue_stats *stats;
    struct vd_vring ring;
    /* where the rings are to be looked for from now on, until the thread has done so */
    struct vd_memory *moved_to;
    struct vd_pace pace;
    struct io_uring uring;
    /* as many as the ring has entries, one for every chain; and one that is never taken */
    struct vd_request *requests;
    /* those not in flight; the last one used comes first: its memory is warm */
    struct vd_request *free;
    struct iovec *iovecs;
    struct vd_extent *extents;
    /* our own: what the stats say may be another queue's, once this one is abandoned */
    enum vd_queue_fault fault;
    uint32_t in_flight;
    uint64_t data_bytes; /* of reads and writes in flight */
    uint32_t ended;      /* pushed since the last publish */
    uint64_t now_ns;     /* taken once per turn of the loop */
    /* in flight, and waits for the throttle; nothing is fetched until it has started */
    struct vd_request *held;
    uint64_t held_until_ns;
    uint32_t held_generation;
    uint64_t memory_faults;
    /* when the first request since the last good one failed; 0: that was good */
    uint64_t failing_since_ns;
    int wake_fd; /* eventfd by which others wake the queue; nobody else has it */
    bool kick_armed, wake_armed, without_uring;
    pthread_t thread;
    /* command, state and abandoned; and the loop's turns unless command is VD_RUN */
    pthread_mutex_t lock;
    pthread_cond_t changed;
    enum vd_command command;
    enum vd_state state;
    bool abandoned, cancelled;
};

/* queue.c: the thread; argument is the queue. Sets VD_RUNNING, or VD_FAILED and ends. */
void *vd_queue_run(void *argument);

/* queue_state.c: a queue that has not begun, or NULL. */
struct vd_queue *vd_queue_new(struct vd_engine *engine, uint32_t index,
                              const struct vd_queue_config *config);
/* Nothing of it is in flight, and no thread uses it but the caller. */
void vd_queue_free(struct vd_queue *queue);
/* Call with the queue's lock held. */
void vd_queue_set_state(struct vd_queue *queue, enum vd_state state);
/* The same; wait so long until it is in the state: 0 or -ETIMEDOUT. */
int vd_queue_await_state(struct vd_queue *queue, enum vd_state state, uint32_t timeout_ms);
/* Nothing of it is in flight, and nothing will be until it is resumed. */
bool vd_queue_paused(struct vd_queue *queue);

#endif
