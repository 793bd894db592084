/*
 * The engine: one device's backend, address map and queues. Everything here is called by the
 * control thread.
 */
#include "engine.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>

#include "queue.h"

static const struct vd_backend_ops *const backends[] = { &vd_backend_file, &vd_backend_nbd,
                                                         &vd_backend_null, &vd_backend_vhost,
                                                         &vd_backend_error };

int vd_engine_new(const struct vd_config *config, struct vd_engine **result)
{
    const struct vd_backend_ops *ops = NULL;
    struct vd_engine *engine;
    int error;

    for (size_t i = 0; i < sizeof(backends) / sizeof(backends[0]); i++)
        if (!strcmp(config->backend, backends[i]->name))
            ops = backends[i];
    if (!ops || !config->max_queues || config->max_queues > VD_QUEUES_MAX)
        return -EINVAL;
    engine = aligned_alloc(_Alignof(struct vd_engine), sizeof(*engine));
    if (!engine)
        return -ENOMEM;
    memset(engine, 0, sizeof(*engine));
    engine->config = *config;
    engine->ops = ops;
    engine->disk.capacity_bytes = config->capacity_bytes;
    engine->disk.read_only = config->read_only;
    memcpy(engine->disk.serial, config->serial, strnlen(config->serial, VD_SERIAL_BYTES));
    vd_report_open(&engine->report, config->event_fd);
    /*
     * Memory that the kernel needs for our threads, which take this from the one that begins them,
     * must not be had by writing to a device like ours. Refused without CAP_SYS_RESOURCE.
     */
    (void)prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0);
    error = ops->open(config, &engine->backend);
    if (!error)
        error = vd_engine_set_regions(engine, NULL, 0);
    if (error) {
        vd_engine_free(engine);
        return error;
    }
    *result = engine;
    return 0;
}

void vd_engine_free(struct vd_engine *engine)
{
    /* Threads that still wait for a backend use all of this; the end of the process frees it. */
    if (load_acquire(&engine->abandoned))
        return;
    vd_memory_guard_me(NULL);
    if (engine->backend)
        engine->ops->close(engine->backend);
    vd_memory_free(engine->memory);
    vd_report_close(&engine->report);
    free(engine);
}

void vd_engine_backend_info(struct vd_engine *engine, struct vd_backend_info *info)
{
    memset(info, 0, sizeof(*info));
    engine->ops->info(engine->backend, info);
}

int vd_engine_set_regions(struct vd_engine *engine, const struct vd_region *regions, uint32_t count)
{
    bool paused = true, abandoned = load_acquire(&engine->abandoned);
    struct vd_memory *memory, *old = engine->memory;
    int error = vd_memory_new(regions, count, &memory);

    if (error)
        return error;
    for (uint32_t i = 0; i < engine->config.max_queues; i++)
        paused &= !engine->queues[i] || vd_queue_paused(engine->queues[i]);
    memory->older = old; /* the guard looks there too */
    error = vd_memory_guard(&engine->guard, memory);
    if (error) {
        memory->older = NULL;
        vd_memory_free(memory);
        return error;
    }
    engine->memory = memory;
    if (paused && !abandoned) {
        memory->older = NULL;
        vd_memory_free(old);
    } else if (paused) {
        /*
         * Whoever was reset without waiting must not be written to; what was abandoned may be in
         * any map since.
         */
        for (; old; old = old->older)
            vd_memory_isolate(old);
    } /* else requests in flight hold addresses in it, and are to end as if nothing had happened */
    return 0;
}

int vd_engine_set_capacity(struct vd_engine *engine, uint64_t capacity_bytes)
{
    struct vd_backend_info info;
    int error = engine->ops->resize ? engine->ops->resize(engine->backend, capacity_bytes) : 0;

    if (error)
        return error;
    vd_engine_backend_info(engine, &info);
    if (capacity_bytes % VD_SECTOR_BYTES ||
        (info.capacity_bytes && info.capacity_bytes < capacity_bytes))
        return -EINVAL;
    store_relaxed(&engine->disk.capacity_bytes, capacity_bytes);
    return 0;
}

void vd_engine_set_limits(struct vd_engine *engine, const struct vd_limits *limits)
{
    vd_throttle_set(&engine->throttle, limits);
    for (uint32_t i = 0; i < engine->config.max_queues; i++)
        if (engine->queues[i])
            vd_queue_wake(engine->queues[i]);
}

void vd_engine_failure(struct vd_engine *engine, struct vd_failure *failure)
{
    pthread_mutex_lock(&engine->report.lock);
    *failure = engine->report.newest;
    pthread_mutex_unlock(&engine->report.lock);
}

uint32_t vd_engine_abandoned(struct vd_engine *engine)
{
    return load_acquire(&engine->abandoned);
}

void vd_queue_stats_read(struct vd_engine *engine, uint32_t index, struct vd_queue_stats *stats)
{
    _Static_assert(sizeof(*stats) % sizeof(uint64_t) == 0,
                   "copied by words, so that no counter is torn");
    memset(stats, 0, sizeof(*stats));
    if (index >= VD_QUEUES_MAX)
        return;
    const uint64_t *from = (const uint64_t *)&engine->stats[index].of;
    uint64_t *to = (uint64_t *)stats;

    for (size_t i = 0; i < sizeof(*stats) / sizeof(uint64_t); i++)
        to[i] = load_relaxed(&from[i]);
}
