/* Limits on requests and bytes per second, of all queues of an engine together; see throttle.c. */
#ifndef VD_THROTTLE_H
#define VD_THROTTLE_H

#include "common.h"
#include "engine_api.h"

struct vd_queue;
struct vd_request;

enum vd_resource { VD_REQUESTS, VD_BYTES, VD_RESOURCES };

struct vd_throttle {
    /* Written by the control thread, read by queues. */
    uint32_t enabled;
    uint32_t generation;           /* grows with every change, so that a queue notices one while it waits */
    uint64_t burst_ns;
    uint64_t price[VD_RESOURCES];  /* nanoseconds of one unit, with PRICE_SHIFT fraction bits; 0: no limit */
    uint8_t apart[64];             /* so that the branch of those without limits reads a line that nobody writes */
    /* Written by all queues. */
    uint64_t free_ns[VD_RESOURCES]; /* when all that was granted is paid for */
};

/* Take limits up; every waiting queue has to be woken afterwards. */
void vd_throttle_set(struct vd_throttle *throttle, const struct vd_limits *limits);

/*
 * Whether a request may start now. If not, it is the queue's held one, and the queue fetches nothing until
 * vd_throttle_release has returned it.
 */
bool vd_throttle_admit(struct vd_queue *queue, struct vd_request *request);

/* The held request if its time has come, or now if now is true; else NULL. */
struct vd_request *vd_throttle_release(struct vd_queue *queue, bool now);

#endif
