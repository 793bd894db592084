/* One device: its backend, its address map, and what its queues share. */
#ifndef VD_ENGINE_H
#define VD_ENGINE_H

#include "backend.h"
#include "engine_api.h"
#include "memory.h"
#include "report.h"
#include "throttle.h"
#include "virtio_blk.h"

/* Each is written by one thread, all the time: on cache lines that no other one writes. */
struct vd_own_stats {
    _Alignas(VD_CACHE_LINE_BYTES) struct vd_queue_stats of;
};

struct vd_engine {
    struct vd_config config;
    struct vd_disk disk;
    const struct vd_backend_ops *ops;
    void *backend;
    struct vd_guard guard;
    uint32_t abandoned; /* queues whose threads still wait for their last completions */
    struct vd_memory *memory;
    struct vd_queue *queues[VD_QUEUES_MAX];
    uint32_t state[VD_QUEUES_MAX]; /* of queues that have stopped */
    struct vd_own_stats stats[VD_QUEUES_MAX];
    struct vd_report report;
    struct vd_throttle throttle;
};

#endif
