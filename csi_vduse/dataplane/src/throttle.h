/* Limits on requests and bytes per second, of all queues of an engine together; see throttle.c. */
#ifndef VD_THROTTLE_H
#define VD_THROTTLE_H

#include "common.h"
#include "engine_api.h"

enum vd_resource { VD_REQUESTS, VD_BYTES, VD_RESOURCES };

struct vd_throttle {
    /* Written by the control thread, read by queues. */
    uint32_t enabled;
    /* grows with every change, so that a queue notices one while it waits */
    uint32_t generation;
    uint64_t burst_ns;
    /* nanoseconds of one unit, with PRICE_SHIFT fraction bits; 0: no limit */
    uint64_t price[VD_RESOURCES];
    /*
     * When all that was granted is paid for. Written by all queues: not on the line that those
     * without limits read.
     */
    _Alignas(VD_CACHE_LINE_BYTES) uint64_t free_ns[VD_RESOURCES];
};

/* Take limits up; every waiting queue has to be woken afterwards, and asks again. */
void vd_throttle_set(struct vd_throttle *throttle, const struct vd_limits *limits);

/* Whether there are any. */
static inline bool vd_throttle_limits(const struct vd_throttle *throttle)
{
    return load_relaxed(&throttle->enabled);
}

/* Which limits are in force: they changed if this has. Look before asking for a start. */
static inline uint32_t vd_throttle_generation(const struct vd_throttle *throttle)
{
    return load_acquire(&throttle->generation); /* pairs with the release in vd_throttle_set */
}

/*
 * Pay for a request of so many bytes; returns the moment when it may start: now_ns if that is at
 * once.
 */
uint64_t vd_throttle_start(struct vd_throttle *throttle, enum vd_operation operation,
                           uint64_t bytes, uint64_t now_ns);

#endif
