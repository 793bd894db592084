/*
 * The in-flight log, step by step: a device without threads or a backend takes chains, returns them in any order, and
 * dies between any two stores; the next one takes over. Also, logs that no successor may take.
 */
#include <errno.h>
#include <setjmp.h>
#include <string.h>

#include "harness.h"
#include "vring.h"

enum { DEPTH = 12, LOG_BYTES = 65536 };

/* A dying device does not come back from this step of the log's. */
static uint64_t steps_left;
static jmp_buf death;

static void step(void)
{
    if (steps_left && !--steps_left)
        longjmp(death, 1);
}

/* A chain says who it is in its first bytes, and the device answers with that number of bytes written. */
struct request {
    uint8_t *tag;
    uint8_t *answer;
    uint32_t number;
};

struct world {
    struct driver d;
    struct dqueue q;
    struct vd_memory *memory;
    void *log;
    uint64_t faults;
    uint64_t seed;
    uint32_t sent, got;
    struct request requests[DEPTH];
    bool busy[DEPTH];
    uint8_t *buffers;
};

/* What dies: nothing of it is known to its successor. */
struct device {
    struct vd_vring ring;
    struct iovec iov[64];
    struct { uint16_t id; uint32_t number; } held[DEPTH];
    uint32_t held_count;
};

static void world_open_as(struct world *w, uint64_t seed, uint16_t size, bool packed)
{
    memset(w, 0, sizeof(*w));
    w->seed = seed;
    driver_open(&w->d, MIB, 1, 0x10000, 0);
    dqueue_open(&w->q, &w->d, size, packed, seed % 2, seed % 3 == 0);
    w->buffers = driver_alloc(&w->d, DEPTH * 64, 64);
    for (int i = 0; i < DEPTH; i++)
        w->requests[i] = (struct request){ w->buffers + 64 * i, w->buffers + 64 * i + 32, 0 };
    w->log = aligned_alloc(64, LOG_BYTES);
    CHECK(w->log);
    memset(w->log, 0xa5, LOG_BYTES);
    CHECK_EQUAL(vd_inflight_init(w->log, LOG_BYTES, size, packed), 0);
    CHECK_EQUAL(vd_memory_new(w->d.regions, 1, &w->memory), 0);
}

static void world_open(struct world *w, uint64_t seed, uint16_t size)
{
    world_open_as(w, seed, size, harness_packed());
}

static void world_close(struct world *w)
{
    vd_memory_free(w->memory);
    dqueue_close(&w->q);
    driver_close(&w->d);
    free(w->log);
}

static struct vd_queue_config config_of(struct world *w)
{
    struct vd_queue_config config = dqueue_config(&w->q, 0);

    config.inflight = w->log;
    config.inflight_bytes = LOG_BYTES;
    config.resume = 1;
    return config;
}

static enum vd_queue_fault device_open(struct world *w, struct device *device)
{
    struct vd_queue_config config = config_of(w);
    struct vd_log *log;

    memset(device, 0, sizeof(*device));
    if (vd_log_open(&config, &log))
        return VD_FAULT_LOG;
    device->ring.log = log; /* to be freed, wherever death comes */
    return vd_vring_init(&device->ring, w->memory, &config, log);
}

/* Send, as a driver with anything from one to a handful of descriptors. */
static void driver_turn(struct world *w)
{
    struct request *r;
    uint32_t written;

    while ((r = dqueue_get(&w->q, &written))) {
        CHECK_EQUAL(written, r->number); /* it is this chain that was done, and not one before it in this place */
        w->busy[r - w->requests] = false;
        w->got++;
    }
    for (int i = 0; i < DEPTH; i++) {
        struct piece pieces[4];
        uint32_t readable = 1 + (uint32_t)random_below(&w->seed, 3), count = 0;

        r = &w->requests[i];
        if (w->busy[i] || random_below(&w->seed, 3))
            continue;
        r->number = w->sent + 1;
        memcpy(r->tag, &r->number, 4);
        pieces[count++] = (struct piece){ driver_iova(&w->d, r->tag), 4, false };
        while (count < readable)
            pieces[count++] = (struct piece){ driver_iova(&w->d, r->tag) + 4, 4, false };
        pieces[count++] = (struct piece){ driver_iova(&w->d, r->answer), 16, true };
        if (!dqueue_add(&w->q, pieces, count, r))
            break;
        w->busy[i] = true;
        w->sent++;
        if (random_below(&w->seed, 2))
            dqueue_show(&w->q);
    }
    dqueue_show(&w->q);
}

static void device_take(struct device *device, uint32_t most)
{
    int available = vd_vring_available(&device->ring);

    CHECK(available >= 0);
    for (int i = 0; i < available && most; i++, most--) {
        struct vd_chain chain = { .iov = device->iov };

        CHECK_EQUAL(vd_vring_next(&device->ring, &chain), VD_FAULT_NONE);
        if (!chain.writable)
            return;
        CHECK(device->held_count < DEPTH);
        CHECK(chain.iov[0].iov_len >= 4 && chain.writable_bytes == 16);
        memcpy(&device->held[device->held_count].number, chain.iov[0].iov_base, 4);
        device->held[device->held_count++].id = chain.id;
    }
}

static void device_finish(struct world *w, struct device *device, uint32_t count)
{
    while (count-- && device->held_count) {
        uint64_t at = random_below(&w->seed, device->held_count);
        uint16_t id = device->held[at].id;
        uint32_t number = device->held[at].number;

        device->held[at] = device->held[--device->held_count];
        vd_vring_push(&device->ring, id, number);
    }
    if (random_below(&w->seed, 4))
        vd_vring_publish(&device->ring);
}

/* What was left comes back first, in the order in which it was sent. */
static void check_replay(struct device *device)
{
    uint16_t left = device->ring.replay_left;

    device_take(device, left);
    CHECK_EQUAL(device->held_count, left);
    for (uint32_t i = 1; i < device->held_count; i++)
        CHECK(device->held[i - 1].number < device->held[i].number);
}

/* One life of a device, until it dies or has made so many turns. */
static void live(struct world *w, uint64_t steps, uint32_t turns)
{
    static struct device device; /* not on the stack: longjmp keeps it as it is */

    device.ring.log = NULL;
    if (!setjmp(death)) {
        steps_left = steps;
        harness_step = step;
        CHECK_EQUAL(device_open(w, &device), VD_FAULT_NONE);
        check_replay(&device);
        for (uint32_t i = 0; i < turns; i++) {
            driver_turn(w);
            device_take(&device, (uint32_t)random_below(&w->seed, DEPTH));
            device_finish(w, &device, (uint32_t)random_below(&w->seed, DEPTH));
        }
    }
    steps_left = 0;
    vd_log_close(device.ring.log);
}

/* Let a device that does not die finish everything; nothing is lost. */
static void settle(struct world *w)
{
    struct device *device = calloc(1, sizeof(*device));

    CHECK(device);
    CHECK_EQUAL(device_open(w, device), VD_FAULT_NONE);
    check_replay(device);
    dqueue_show(&w->q);
    while (w->got < w->sent) {
        struct request *r;
        uint32_t written, before = w->got;

        device_take(device, DEPTH);
        device_finish(w, device, DEPTH);
        vd_vring_publish(&device->ring);
        while ((r = dqueue_get(&w->q, &written))) {
            CHECK_EQUAL(written, r->number);
            w->busy[r - w->requests] = false;
            w->got++;
        }
        CHECK(w->got > before); /* or what the driver waits for is lost */
    }
    CHECK_EQUAL(vd_vring_available(&device->ring), 0);
    vd_log_close(device->ring.log);
    free(device);
}

BOTH(death_at_any_step_loses_nothing_and_repeats_nothing)
{
    static const uint16_t sizes[] = { 4, 8, 16, 64 };

    for (uint64_t seed = 1; seed <= 36; seed++)
        for (uint64_t step = 1; step <= 60; step++) {
            struct world w;

            world_open(&w, seed, sizes[seed % 4]);
            live(&w, step, 20);
            settle(&w);
            world_close(&w);
        }
}

BOTH(many_deaths_in_a_row_lose_nothing_and_repeat_nothing)
{
    static const uint16_t sizes[] = { 4, 8, 16, 64 };

    for (uint64_t seed = 1; seed <= 40; seed++) {
        struct world w;

        world_open(&w, seed, sizes[seed % 4]);
        for (int deaths = 0; deaths < 300; deaths++)
            live(&w, 1 + random_below(&w.seed, deaths % 3 ? 200 : 5), 50);
        CHECK(w.got > 300);
        settle(&w);
        world_close(&w);
    }
}

BOTH(a_stop_right_after_a_start_waits_for_what_was_left)
{
    for (int round = 0; round < 20; round++) {
        struct vd_config plain = { .max_queues = 1, .capacity_bytes = MIB, .event_fd = -1, .serial = "", .backend = "null" };
        struct device *device = calloc(1, sizeof(*device));
        struct vd_engine *engine;
        struct world w;

        CHECK(device);
        world_open(&w, (uint64_t)round, 16);
        CHECK_EQUAL(device_open(&w, device), VD_FAULT_NONE);
        driver_turn(&w);
        device_take(device, DEPTH);
        vd_log_close(device->ring.log);

        struct vd_queue_config config = config_of(&w);

        CHECK_EQUAL(vd_engine_new(&plain, &engine), 0);
        CHECK_EQUAL(vd_engine_set_regions(engine, w.d.regions, 1), 0);
        if (round % 2) /* limits are no reason to wait longer */
            vd_engine_set_limits(engine, &(struct vd_limits){ .requests_per_s = 1 });
        CHECK_EQUAL(vd_queue_start(engine, 0, &config), 0);
        CHECK_EQUAL(vd_queue_stop(engine, 0, 20000), 0);
        for (uint32_t i = 0; i < device->held_count; i++)
            CHECK(dqueue_get(&w.q, NULL));
        vd_engine_free(engine);
        world_close(&w);
        free(device);
    }
}

/* A successor refuses the log, and the ring has not been touched. */
static void refused(struct world *w)
{
    struct device *device = calloc(1, sizeof(*device));

    CHECK(device);
    CHECK_EQUAL(device_open(w, device), VD_FAULT_LOG);
    vd_log_close(device->ring.log);
    free(device);
}

BOTH(a_log_of_another_queue_is_refused)
{
    struct world w;
    struct vd_log_split *split;
    struct vd_log_packed *packed;

    world_open(&w, 1, 8);
    live(&w, 40, 20); /* something is in it */
    split = w.log;
    packed = w.log;
#define REFUSED(change)                              \
    do {                                             \
        uint8_t kept_[LOG_BYTES];                    \
        memcpy(kept_, w.log, LOG_BYTES);             \
        change;                                      \
        refused(&w);                                 \
        memcpy(w.log, kept_, LOG_BYTES);             \
    } while (0)
    REFUSED(memset(w.log, 0, LOG_BYTES));
    REFUSED(memset(w.log, 0xff, LOG_BYTES));
    REFUSED(split->version = 0);
    REFUSED(split->version = 2);
    REFUSED(split->desc_num = 16);
    REFUSED(split->features ^= 1);
    REFUSED(CHECK_EQUAL(vd_inflight_init(w.log, LOG_BYTES, 8, !harness_packed()), 0));
    if (harness_packed()) {
        REFUSED(packed->used_idx = 8);
        REFUSED(packed->old_used_idx = 8);
        REFUSED(packed->used_wrap_counter = 2);
        REFUSED(packed->old_used_wrap_counter = 0xff);
        REFUSED(packed->old_free_head = 9);
    } else {
        REFUSED(split->used_idx = (uint16_t)(split->used_idx - 9));
        REFUSED(split->used_idx = (uint16_t)(split->used_idx + 1));
        REFUSED(split->used_idx--; split->last_batch_head = 8);
    }
    settle(&w);
    world_close(&w);
}

CASE(a_packed_log_whose_lists_do_not_add_up_is_refused)
{
    struct world w;
    struct vd_log_packed *packed;
    struct device device;

    world_open_as(&w, 1, 8, true);
    packed = w.log;
    /* One chain of one entry, the first. */
    packed->states[0] = (struct vd_log_packed_state){ .inflight = 1, .num = 1, .next = 1 };
    packed->free_head = packed->old_free_head = 1;
    REFUSED(packed->states[0].num = 0);
    REFUSED(packed->states[0].num = 2);
    REFUSED(packed->states[0].num = 9);
    REFUSED(packed->states[0].last = 1);
    REFUSED(packed->states[0].id = 8);
    REFUSED(packed->states[0].inflight = 0);
    REFUSED(packed->states[3].next = 3);
    REFUSED(packed->states[3].next = 1);
    REFUSED(packed->states[3].next = 9);
    REFUSED(packed->states[3].next = 0xffff);
    REFUSED(packed->states[3].next = 5);
    REFUSED(packed->old_free_head = 2);
    /* Two of them with one id. */
    packed->states[1] = (struct vd_log_packed_state){ .inflight = 1, .num = 1, .last = 1, .next = 2 };
    packed->free_head = packed->old_free_head = 2;
    refused(&w);
    packed->states[1].id = 1;
    CHECK_EQUAL(device_open(&w, &device), VD_FAULT_NONE);
    CHECK_EQUAL(device.ring.replay_left, 2);
    vd_log_close(device.ring.log);
    world_close(&w);
}

BOTH(a_log_that_is_full_of_nonsense_harms_nobody)
{
    uint64_t seed = 12345;

    for (int i = 0; i < 1500; i++) {
        struct world w;
        struct device *device = calloc(1, sizeof(*device));

        CHECK(device);
        world_open(&w, seed, 16);
        live(&w, 1 + random_below(&seed, 100), 20);
        for (int j = 0; j < 4; j++)
            ((uint8_t *)w.log)[12 + random_below(&seed, 600)] = (uint8_t)random_below(&seed, 20);
        enum vd_queue_fault fault = device_open(&w, device);

        while (!fault && vd_vring_available(&device->ring) > 0) { /* whatever it is taken for, within bounds */
            struct vd_chain chain = { .iov = device->iov };

            fault = vd_vring_next(&device->ring, &chain);
            if (fault || !chain.writable)
                break;
            vd_vring_push(&device->ring, chain.id, 1);
            vd_vring_publish(&device->ring);
        }
        vd_log_close(device->ring.log);
        free(device);
        world_close(&w);
    }
}

BOTH(a_log_has_to_be_as_large_as_the_queue_asks_for)
{
    struct rig rig;
    uint64_t bytes = vd_inflight_bytes(64, harness_packed());
    uint8_t *log = aligned_alloc(64, bytes + 64);

    CHECK(log && bytes % 64 == 0);
    CHECK_EQUAL(vd_inflight_init(log, bytes - 1, 64, harness_packed()), -EINVAL);
    CHECK_EQUAL(vd_inflight_init(log + 8, bytes, 64, harness_packed()), -EINVAL);
    CHECK_EQUAL(vd_inflight_init(log, bytes, 0, harness_packed()), -EINVAL);
    CHECK_EQUAL(vd_inflight_init(log, bytes, 1025, harness_packed()), -EINVAL);
    CHECK_EQUAL(vd_inflight_init(log, bytes, 64, harness_packed()), 0);
    rig_open(&rig, (struct plan){ .no_start = true });
    struct vd_queue_config config = dqueue_config(&rig.q[0], ALL_BLK_FEATURES);

    config.resume = 1;
    config.inflight = log;
    config.inflight_bytes = bytes - 1;
    CHECK_EQUAL(vd_queue_start(rig.engine, 0, &config), -EINVAL);
    CHECK_EQUAL(rig_stats(&rig, 0).fault, VD_FAULT_LOG);
    config.inflight = log + 8;
    config.inflight_bytes = bytes;
    CHECK_EQUAL(vd_queue_start(rig.engine, 0, &config), -EINVAL);
    config.inflight = log;
    CHECK_EQUAL(vd_queue_start(rig.engine, 0, &config), 0);
    blk_prove(&rig, 0);
    rig_stop(&rig, 0);
    config.resume = 0; /* as after a reset: the log is begun anew */
    memset(log, 0xff, bytes);
    dqueue_reset(&rig.q[0], 7);
    config.state = dqueue_state(&rig.q[0]);
    CHECK_EQUAL(vd_queue_start(rig.engine, 0, &config), 0);
    blk_prove(&rig, 0);
    rig_stop(&rig, 0);
    config.resume = 1;
    CHECK_EQUAL(vd_queue_start(rig.engine, 0, &config), 0);
    blk_prove(&rig, 0);
    rig_close(&rig);
    free(log);
}
