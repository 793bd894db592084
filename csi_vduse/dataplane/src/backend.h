/*
 * What a backend sees: requests, the functions that it has to have, and what it may ask of the
 * queue that it serves.
 *
 * A backend serves requests on the queue's own thread and io_uring. Everything here is called on
 * that thread, unless it says otherwise. src/backends/null.c is the smallest; a backend that is no
 * friend of io_uring finishes requests in `submit`, or in `turn`.
 */
#ifndef VD_BACKEND_H
#define VD_BACKEND_H

#include <liburing.h>
#include <sys/uio.h>

#include "common.h"
#include "engine_api.h"

enum { VD_QUEUES_MAX = 64, VD_EXTENTS_MAX = 32, VD_EVENTS_MAX = 8 };

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
    uint16_t id; /* of its chain */
    enum vd_operation operation;
    uint8_t *status;       /* in the driver's memory */
    struct iovec *storage; /* the chain's pieces; data points into it */
    struct iovec *data;
    uint32_t data_count;
    uint64_t offset; /* bytes */
    uint64_t length;
    uint64_t fetched_ns;
    uint64_t data_bytes; /* what it counts for in the queue's data_bytes */
    struct vd_extent *extents;
    uint32_t extent_count;
    uint64_t failing_since_ns; /* 0: it has not failed yet */
    bool waits;                /* to be tried again */
    /* The backend's own: how far it has come, by what means, and who waits with it. */
    struct vd_request *next;
    uint64_t done;
    uint32_t step;
    uint32_t method;
};

struct vd_backend_ops {
    const char *name;
    /* it prepares no submissions: a queue can serve it where io_uring is not allowed */
    bool without_uring;
    /* Control thread. open: 0 or -errno, with config->reason where that says too little. */
    int (*open)(const struct vd_config *config, void **state);
    void (*close)(void *state);
    void (*info)(void *state, struct vd_backend_info *info);
    /*
     * submit starts a request; it either finishes it at once (vd_request_finish) or prepares
     * submissions (vd_queue_sqe), whose completions come to complete with the kernel's result.
     */
    void (*submit)(struct vd_queue *queue, struct vd_request *request);
    void (*complete)(struct vd_queue *queue, struct vd_request *request, int result);
    /*
     * The rest may be NULL. resize, control thread: the volume is to have so many bytes; look
     * whether the backend has them. The others run when the queue begins and ends; once per turn
     * after all requests were handed over and before the kernel is entered; and for completions
     * that are events of the backend's own, below VD_EVENTS_MAX.
     */
    int (*resize)(void *state, uint64_t capacity_bytes);
    int (*queue_open)(struct vd_queue *queue);
    void (*queue_close)(struct vd_queue *queue);
    void (*turn)(struct vd_queue *queue);
    void (*event)(struct vd_queue *queue, unsigned event, int result);
};

extern const struct vd_backend_ops vd_backend_file, vd_backend_nbd, vd_backend_null,
    vd_backend_error, vd_backend_vhost;

/* Finish a request: error is 0 or a positive errno; ENOTSUP becomes UNSUPP. */
void vd_request_finish(struct vd_queue *queue, struct vd_request *request, int error);

/*
 * Have a request that failed so be submitted again in a while; false if it is not to be, and the
 * error to be told.
 */
bool vd_request_wait(struct vd_queue *queue, struct vd_request *request, int error);

/* Its number, below the queue's size; no other one in flight has it. */
uint32_t vd_request_index(const struct vd_queue *queue, const struct vd_request *request);

/*
 * A free submission; never NULL, since the queue submits when its ring is full. Say whose it is
 * when it has been prepared: a request's, or an event.
 */
struct io_uring_sqe *vd_queue_sqe(struct vd_queue *queue);
void vd_sqe_of_request(struct io_uring_sqe *sqe, struct vd_request *request);
void vd_sqe_of_event(struct io_uring_sqe *sqe, unsigned event);

/* Have an event that is under way end. */
void vd_queue_cancel_event(struct vd_queue *queue, unsigned event);

/* For queue_close: wait for the next event; requests are none under way any more. */
unsigned vd_queue_await_event(struct vd_queue *queue, int *result);

/* What open made, and what queue_open made of it for this queue. */
void *vd_queue_volume(const struct vd_queue *queue);
void *vd_queue_backend(const struct vd_queue *queue);
void vd_queue_set_backend(struct vd_queue *queue, void *backend);

/* The driver's address of memory of a request's. */
uint64_t vd_queue_iova(const struct vd_queue *queue, const void *address);

const struct vd_queue_config *vd_queue_config_of(const struct vd_queue *queue);
uint32_t vd_queue_index(const struct vd_queue *queue);

/* Chains are left that a predecessor took, and perhaps served. */
bool vd_queue_replays(const struct vd_queue *queue);

/* Nobody waits for its requests any more: finish them without another step. Any thread. */
bool vd_queue_is_abandoned(const struct vd_queue *queue);

/* Pages of the driver's memory went away: what has been read since may be zeros of ours. */
bool vd_queue_memory_lost(const struct vd_queue *queue);

/* CLOCK_MONOTONIC, taken once per turn; and taken anew, by who has spent long in one. */
uint64_t vd_queue_now_ns(const struct vd_queue *queue);
void vd_queue_take_time(struct vd_queue *queue);

/* For how long a backend that is away is taken for one that may come back. */
uint64_t vd_queue_away_ns(const struct vd_queue *queue);

/* Its counters that are a remote backend's. */
struct vd_remote_stats *vd_queue_remote(struct vd_queue *queue);

/* A command that was handed to the kernel at a moment has been answered. */
void vd_count_remote(struct vd_remote_stats *stats, uint64_t sent_ns, uint64_t now_ns);

/* Serve nothing more until the driver has reset the device. */
void vd_queue_fault(struct vd_queue *queue, enum vd_queue_fault fault);

/* End its sleep; any thread. */
void vd_queue_wake(struct vd_queue *queue);

/* Have the control thread look at the backend. */
void vd_queue_report(struct vd_queue *queue);

/* Control thread: what open made; and end the sleep of a queue, if it is there. */
void *vd_engine_backend(const struct vd_engine *engine);
void vd_engine_wake(struct vd_engine *engine, uint32_t index);

#endif
