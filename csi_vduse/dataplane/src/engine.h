/* What the engine's files share: engine, queue, request, and the table of functions that is a backend. */
#ifndef VD_ENGINE_H
#define VD_ENGINE_H

#include <liburing.h>
#include <pthread.h>
#include <sys/uio.h>

#include "common.h"
#include "engine_api.h"
#include "memory.h"
#include "pace.h"
#include "throttle.h"
#include "vring.h"

enum { VD_QUEUES_MAX = 64, VD_EXTENTS_MAX = 32 };

struct vd_queue;

/* A range that DISCARD or WRITE_ZEROES names. */
struct vd_extent {
    uint64_t offset;
    uint64_t length;
    bool unmap;
};

/* One request, from fetch to completion; all of a queue's are allocated when it starts. */
struct vd_request {
    struct vd_request *next_free;
    uint16_t id;             /* of its chain */
    enum vd_operation operation;
    uint8_t *status;         /* in the driver's memory */
    struct iovec *storage;   /* the chain's pieces; data points into it */
    struct iovec *data;
    uint32_t data_count;
    uint64_t offset;         /* bytes */
    uint64_t length;
    uint64_t fetched_ns;
    uint64_t data_bytes;     /* what it counts for in the queue's data_bytes */
    struct vd_extent *extents;
    uint32_t extent_count;
    /* The backend's own: how far it has come, by what means, and who waits with it. */
    struct vd_request *next;
    uint64_t done;
    uint32_t step;
    int method;
    bool waits;                /* see waiting.c */
    uint64_t failing_since_ns; /* 0: it has not failed yet */
};

/*
 * A backend serves requests on the queue's own thread and io_uring. submit starts a request; it either finishes
 * it at once (vd_request_finish) or prepares submissions (vd_queue_sqe), whose completions come to complete.
 */
struct vd_backend_ops {
    const char *name;
    bool without_uring; /* it prepares no submissions: a queue can serve it where io_uring is not allowed */
    int (*open)(const struct vd_config *config, void **state);
    void (*close)(void *state);
    void (*info)(void *state, struct vd_backend_info *info);
    void (*submit)(struct vd_queue *queue, struct vd_request *request);
    void (*complete)(struct vd_queue *queue, struct vd_request *request, int result);
    /*
     * The rest may be NULL. resize: the volume is to have so many bytes; look whether the backend has them. The others
     * run on the queue's thread: when it begins and ends (queue->backend is the backend's), once per turn after all
     * requests were handed over and before the kernel is entered, and for completions whose user data is odd.
     */
    int (*resize)(void *state, uint64_t capacity_bytes);
    int (*queue_open)(struct vd_queue *queue);
    void (*queue_close)(struct vd_queue *queue);
    void (*turn)(struct vd_queue *queue);
    void (*event)(struct vd_queue *queue, void *data, int result);
};

extern const struct vd_backend_ops vd_backend_file, vd_backend_nbd, vd_backend_null, vd_backend_error;

struct vd_engine {
    struct vd_config config;
    char serial[VD_SERIAL_BYTES];
    const struct vd_backend_ops *ops;
    void *backend;
    uint64_t capacity_bytes;
    struct vd_guard guard;
    uint32_t abandoned; /* queues whose threads still wait for their last completions */
    struct vd_memory *memory;
    struct vd_queue *queues[VD_QUEUES_MAX];
    uint32_t state[VD_QUEUES_MAX]; /* of queues that have stopped */
    struct vd_queue_stats stats[VD_QUEUES_MAX];
    pthread_mutex_t failure_lock;
    struct vd_failure failure;
    struct vd_throttle throttle;
};

struct vd_queue {
    struct vd_engine *engine;
    void *backend;               /* the backend's own */
    struct vd_queue_config config;
    struct vd_queue_stats *stats;
    struct vd_vring ring;
    struct vd_memory *moved_to;  /* where the rings are to be looked for from now on, until the thread has done so */
    struct vd_pace pace;
    struct io_uring uring;
    struct vd_request *requests; /* as many as the ring has entries, one for every chain; and one that is never taken */
    struct vd_request *free;     /* those not in flight; the last one used comes first: its memory is warm */
    struct iovec *iovecs;
    struct vd_extent *extents;
    enum vd_queue_fault fault;   /* our own: what the stats say may be another queue's, once this one is abandoned */
    uint32_t in_flight;
    uint64_t data_bytes;         /* of reads and writes in flight */
    uint32_t ended;              /* pushed since the last publish */
    uint64_t now_ns;             /* taken once per turn of the loop */
    struct vd_request *held;     /* in flight, and waits for the throttle; nothing is fetched until it has started */
    uint64_t held_until_ns;
    uint32_t held_generation;
    uint64_t memory_faults;
    uint64_t failing_since_ns;   /* when the first request since the last good one failed; 0: that was good */
    int wake_fd;                 /* eventfd by which the control thread wakes the queue; nobody else has it */
    bool kick_armed, wake_armed, without_uring;
    pthread_t thread;
    pthread_mutex_t lock;        /* command, state and abandoned; and the loop's turns unless command is RUN */
    pthread_cond_t changed;
    int command;
    int state;
    bool abandoned, cancelled;
};

/* Parse and check a chain, which has a place for the status; true if the backend has to serve it, false if it is finished or the queue faulted. */
bool vd_blk_begin(struct vd_queue *queue, struct vd_request *request, const struct vd_chain *chain);

/* Finish a request: error is 0 or a positive errno; ENOTSUP becomes UNSUPP. */
void vd_request_finish(struct vd_queue *queue, struct vd_request *request, int error);

/* Have a request that failed so be tried again in a while; false if it is not to be, and the error to be told. */
bool vd_request_wait(struct vd_queue *queue, struct vd_request *request, int error);

/* Whether a completion is the end of such a wait. */
bool vd_request_waited(struct vd_queue *queue, struct vd_request *request);

/* A free submission; never NULL, since the queue submits when its ring is full. */
struct io_uring_sqe *vd_queue_sqe(struct vd_queue *queue, void *data);

/* Whether a completion's user data is the backend's own, not a request. */
static inline bool vd_event_is_backends(const void *data)
{
    return (uintptr_t)data & 1 && (uintptr_t)data > 4096;
}

/* Pages of the driver's memory went away: what has been read since may be zeros of ours. */
static inline bool vd_queue_memory_lost(const struct vd_queue *queue)
{
    return load_relaxed(&queue->engine->guard.faults) != queue->memory_faults;
}

static inline uint32_t vd_queue_index(const struct vd_queue *queue)
{
    return (uint32_t)(queue->stats - queue->engine->stats);
}

/* End its sleep. */
void vd_queue_wake(struct vd_queue *queue);

/* Nothing of it is in flight, and nothing will be until it is resumed. */
bool vd_queue_paused(struct vd_queue *queue);

void vd_queue_fault(struct vd_queue *queue, enum vd_queue_fault fault);
/* A request failed, or waits to be tried again. */
void vd_engine_report(struct vd_engine *engine, const struct vd_request *request, int error, bool waits);
void vd_engine_wake_control(struct vd_engine *engine);

#endif
