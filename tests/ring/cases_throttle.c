/*
 * Limits: how much passes, what passes free, and that nothing has to wait for them which must not. Too much never
 * passes. Too little may for once, since a sanitizer on a busy machine is slow; a limit that is too tight is always.
 */
#include <string.h>

#include "harness.h"

enum { SECOND = 1000000000, TRIES = 10 };

static void limit(struct rig *rig, uint64_t requests_per_s, uint64_t bytes_per_s, uint32_t burst_ms)
{
    struct vd_limits limits = { requests_per_s, bytes_per_s, burst_ms };

    vd_engine_set_limits(rig->engine, &limits);
}

/* Keep depth requests under way on each queue until the time is over; counts what was done on each. */
static void run_for(struct rig *rig, uint64_t ns, const int *depths, const uint32_t *lengths, uint64_t *done)
{
    uint64_t until = now_ns() + ns;
    int under_way[QUEUES_MAX] = { 0 };
    bool busy = true;

    for (uint32_t i = 0; i < rig->plan.queues; i++) {
        done[i] = 0;
        for (; under_way[i] < depths[i]; under_way[i]++) {
            struct blk *b = malloc(sizeof(*b));

            CHECK(b);
            *b = blk_new(rig, lengths[i]);
            blk_send(&rig->q[i], b, VIRTIO_BLK_T_IN, 0, lengths[i]);
        }
    }
    while (busy) {
        bool over = now_ns() > until;

        busy = !over;
        for (uint32_t i = 0; i < rig->plan.queues; i++) {
            struct blk *b = dqueue_get(&rig->q[i], NULL);

            if (b) {
                CHECK_EQUAL(*b->status, VIRTIO_BLK_S_OK);
                done[i]++;
                if (!over) {
                    blk_send(&rig->q[i], b, VIRTIO_BLK_T_IN, 0, lengths[i]);
                } else {
                    free(b);
                    under_way[i]--;
                }
            }
            busy |= under_way[i] > 0;
        }
        if (busy)
            harness_breathe();
    }
}

/* The same; no more than so many a second and a burst pass on all queues together. Returns how many that is. */
static double run_limited(struct rig *rig, double per_s, double burst, uint64_t ns, const int *depths,
                          const uint32_t *lengths, uint64_t *done)
{
    uint64_t began = now_ns(), all = 0;

    run_for(rig, ns, depths, lengths, done);
    double allowed = per_s * (double)(now_ns() - began) / SECOND + burst + 1;

    for (uint32_t i = 0; i < rig->plan.queues; i++)
        all += done[i];
    CHECK((double)all <= allowed * 1.01);
    return allowed;
}

/* On one queue, about as many as may pass do. */
static void check_rate(struct rig *rig, double per_s, double burst, int depth, uint32_t length)
{
    double allowed;
    uint64_t done;
    int tries = 0;

    do {
        CHECK(tries++ < TRIES);
        allowed = run_limited(rig, per_s, burst, SECOND / 2, &depth, &length, &done);
    } while ((double)done < allowed * 0.6);
}

BOTH(requests_per_second_are_kept)
{
    struct rig rig;
    int tries = 0;

    rig_open(&rig, (struct plan){ .backend = "null" });
    limit(&rig, 2000, 0, 100);
    do {
        CHECK(tries++ < TRIES);
        check_rate(&rig, 2000, 200, 16, 512);
    } while (rig_stats(&rig, 0).throttled <= 100 || rig_stats(&rig, 0).throttled_ns <= SECOND / 4);
    rig_close(&rig);
}

CASE(bytes_per_second_are_kept)
{
    struct rig rig;

    rig_open(&rig, (struct plan){ .backend = "null" });
    limit(&rig, 0, 64 * MIB, 100);
    check_rate(&rig, 1024, 102.4, 8, 65536);
    rig_close(&rig);
}

CASE(the_tighter_of_two_limits_rules)
{
    struct rig rig;

    rig_open(&rig, (struct plan){ .backend = "null" });
    limit(&rig, 1000000, 1000 * 4096, 50);
    check_rate(&rig, 1000, 50, 8, 4096);
    limit(&rig, 1000, 1 << 30, 50);
    check_rate(&rig, 1000, 50, 8, 4096);
    rig_close(&rig);
}

CASE(a_device_that_was_idle_has_its_burst_and_no_more)
{
    struct rig rig;
    uint64_t done;

    rig_open(&rig, (struct plan){ .backend = "null" });
    limit(&rig, 100, 0, 2000);
    run_limited(&rig, 100, 200, SECOND / 2, (int[]){ 16 }, (uint32_t[]){ 512 }, &done);
    CHECK(done >= 200); /* saved up */
    rig_close(&rig);
}

CASE(a_request_larger_than_the_burst_passes_and_is_paid_for)
{
    struct rig rig;

    rig_open(&rig, (struct plan){ 0 });
    struct blk a = blk_new(&rig, MIB), b = blk_new(&rig, MIB);

    limit(&rig, 0, 4 * MIB, 1);
    pattern(a.data, MIB, 1);
    uint64_t began = now_ns();

    CHECK_EQUAL(blk_do(&rig.q[0], &a, VIRTIO_BLK_T_OUT, 0, MIB), VIRTIO_BLK_S_OK);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_IN, 0, MIB), VIRTIO_BLK_S_OK);
    CHECK(now_ns() - began >= SECOND / 4 - SECOND / 100);
    CHECK_EQUAL(rig_stats(&rig, 0).throttled, 1);
    CHECK(rig_stats(&rig, 0).throttled_ns > 0 && rig_stats(&rig, 0).throttled_ns <= now_ns() - began);
    CHECK(is_pattern(b.data, MIB, 1));
    rig_close(&rig);
}

/* A byte a second, and a debt of 4096 s: what is done now is free, or does not end. */
static void open_spent(struct rig *rig, struct plan plan, struct blk *b)
{
    rig_open(rig, plan);
    *b = blk_new(rig, 4096);
    limit(rig, 0, 1, 0);
    CHECK_EQUAL(blk_do(&rig->q[0], b, VIRTIO_BLK_T_IN, 0, 4096), VIRTIO_BLK_S_OK);
}

CASE(what_moves_no_data_needs_no_bytes)
{
    struct rig rig;
    struct blk b;

    open_spent(&rig, (struct plan){ 0 }, &b);
    struct virtio_blk_discard_write_zeroes *range = (void *)b.data;

    *range = (struct virtio_blk_discard_write_zeroes){ .num_sectors = 64 };
    for (int i = 0; i < 100; i++) {
        CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_WRITE_ZEROES, 0, sizeof(*range)), VIRTIO_BLK_S_OK);
        CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_FLUSH, 0, 0), VIRTIO_BLK_S_OK);
    }
    CHECK_EQUAL(rig_stats(&rig, 0).throttled, 0);
    rig_close(&rig);
}

CASE(flush_get_id_and_errors_are_not_counted)
{
    struct rig rig;
    struct blk b;

    open_spent(&rig, (struct plan){ .backend = "null" }, &b);
    limit(&rig, 1, 0, 0);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_IN, 0, 4096), VIRTIO_BLK_S_OK);
    uint64_t began = now_ns();

    for (int i = 0; i < 100; i++) {
        CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_FLUSH, 0, 0), VIRTIO_BLK_S_OK);
        CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_GET_ID, 0, 20), VIRTIO_BLK_S_OK);
        CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_IN, 1 << 20, 4096), VIRTIO_BLK_S_IOERR);
        CHECK_EQUAL(blk_do(&rig.q[0], &b, 77, 0, 0), VIRTIO_BLK_S_UNSUPP);
    }
    CHECK(now_ns() - began < 20ull * SECOND); /* 400 s if any of them counted */
    rig_close(&rig);
}

BOTH(a_throttled_queue_stops_at_once)
{
    struct rig rig;
    struct blk b, waiting[8];

    open_spent(&rig, (struct plan){ .backend = "null" }, &b);
    struct dqueue *q = &rig.q[0];

    for (int i = 0; i < 8; i++) {
        waiting[i] = blk_new(&rig, 512);
        blk_send(q, &waiting[i], VIRTIO_BLK_T_IN, 0, 512);
    }
    WAIT_FOR(rig_stats(&rig, 0).throttled == 1);
    CHECK_EQUAL(rig_stats(&rig, 0).in_flight, 1);
    uint64_t began = now_ns();

    rig_stop(&rig, 0);
    CHECK(now_ns() - began < 5ull * SECOND);
    CHECK_EQUAL(rig_stats(&rig, 0).in_flight, 0);
    CHECK(dqueue_get(q, NULL) == &waiting[0]); /* it had been taken, so it was served; the others never were */
    CHECK(!dqueue_get(q, NULL));
    rig_close(&rig);
}

BOTH(a_throttled_queue_pauses_at_once_and_goes_on_as_it_was)
{
    struct rig rig;
    struct blk b, waiting[4];

    open_spent(&rig, (struct plan){ 0 }, &b);
    struct dqueue *q = &rig.q[0];

    for (int round = 0; round < 20; round++) {
        for (int i = 0; i < 4; i++) {
            waiting[i] = blk_new(&rig, 512);
            blk_send(q, &waiting[i], VIRTIO_BLK_T_OUT, 0, 512);
        }
        WAIT_FOR(rig_stats(&rig, 0).in_flight == 1);
        CHECK_EQUAL(vd_queue_pause(rig.engine, 0, 20000), 0);
        CHECK_EQUAL(rig_stats(&rig, 0).in_flight, 0);
        CHECK_EQUAL(vd_queue_resume(rig.engine, 0), 0);
        WAIT_FOR(rig_stats(&rig, 0).in_flight == 1); /* the next of them waits now */
        limit(&rig, 0, 0, 0);
        for (int i = 0; i < 4; i++)
            CHECK_EQUAL(blk_finish(q, &waiting[i]), VIRTIO_BLK_S_OK);
        limit(&rig, 0, 1, 0);
        CHECK_EQUAL(blk_do(q, &b, VIRTIO_BLK_T_IN, 0, 4096), VIRTIO_BLK_S_OK);
    }
    rig_close(&rig);
}

BOTH(a_fault_ends_the_wait)
{
    struct rig rig;
    struct blk b, waiting;

    open_spent(&rig, (struct plan){ .backend = "null" }, &b);
    waiting = blk_new(&rig, 512);
    blk_send(&rig.q[0], &waiting, VIRTIO_BLK_T_IN, 0, 512);
    WAIT_FOR(rig_stats(&rig, 0).in_flight == 1);
    CHECK_EQUAL(vd_queue_pause(rig.engine, 0, 20000), 0);
    CHECK_EQUAL(blk_finish(&rig.q[0], &waiting), VIRTIO_BLK_S_OK);
    blk_send(&rig.q[0], &waiting, VIRTIO_BLK_T_IN, 0, 512);
    CHECK_EQUAL(vd_queue_resume(rig.engine, 0), 0);
    WAIT_FOR(rig_stats(&rig, 0).in_flight == 1);
    /* What it waited for is mapped no more, and its ring neither. */
    CHECK_EQUAL(vd_queue_pause(rig.engine, 0, 20000), 0);
    CHECK_EQUAL(vd_engine_set_regions(rig.engine, NULL, 0), 0);
    CHECK_EQUAL(vd_queue_resume(rig.engine, 0), 0);
    WAIT_FOR(rig_stats(&rig, 0).fault == VD_FAULT_RING_ADDRESS);
    WAIT_FOR(rig_stats(&rig, 0).in_flight == 0);
    rig_close(&rig);
}

CASE(limits_change_while_requests_wait_for_them)
{
    struct rig rig;
    uint64_t began = now_ns();

    rig_open(&rig, (struct plan){ .backend = "null", .queues = 2 });
    struct blk a = blk_new(&rig, 4096), b = blk_new(&rig, 4096);

    limit(&rig, 0, 1, 0);
    CHECK_EQUAL(blk_do(&rig.q[0], &a, VIRTIO_BLK_T_IN, 0, 4096), VIRTIO_BLK_S_OK);
    blk_send(&rig.q[0], &a, VIRTIO_BLK_T_IN, 0, 4096);
    blk_send(&rig.q[1], &b, VIRTIO_BLK_T_IN, 0, 4096);
    WAIT_FOR(rig_stats(&rig, 0).in_flight && rig_stats(&rig, 1).in_flight);
    limit(&rig, 100, 0, 10);
    CHECK_EQUAL(blk_finish(&rig.q[0], &a), VIRTIO_BLK_S_OK);
    CHECK_EQUAL(blk_finish(&rig.q[1], &b), VIRTIO_BLK_S_OK);
    CHECK(now_ns() - began < 20ull * SECOND);
    limit(&rig, 0, 0, 0);
    uint64_t throttled = rig_stats(&rig, 0).throttled;

    run_for(&rig, SECOND / 10, (int[]){ 4, 4 }, (uint32_t[]){ 512, 512 }, (uint64_t[QUEUES_MAX]){ 0 });
    CHECK_EQUAL(rig_stats(&rig, 0).throttled, throttled);
    rig_close(&rig);
}

BOTH(no_queue_starves_beside_greedier_ones)
{
    struct rig rig;
    uint64_t done[QUEUES_MAX], least;
    int tries = 0;

    rig_open(&rig, (struct plan){ .backend = "null", .queues = 3, .memory = 32 * MIB });
    limit(&rig, 600, 0, 50);
    do {
        CHECK(tries++ < TRIES);
        run_limited(&rig, 600, 30, SECOND, (int[]){ 20, 1, 4 }, (uint32_t[]){ 65536, 512, 4096 }, done);
        least = done[0];
        for (int i = 1; i < 3; i++)
            least = done[i] < least ? done[i] : least;
    } while (least <= 100); /* half of a fair share */
    rig_close(&rig);
}

BOTH(limits_change_all_the_time_under_load)
{
    struct rig rig;
    uint64_t random = 7, until = now_ns() + 2ull * SECOND;
    struct blk blks[32];
    uint64_t done = 0;

    rig_open(&rig, (struct plan){ .directory = "/dev/shm", .queues = 2, .event_idx = true });
    for (int i = 0; i < 32; i++) {
        blks[i] = blk_new(&rig, 4096);
        blk_send(&rig.q[i % 2], &blks[i], VIRTIO_BLK_T_OUT, 8, 4096);
    }
    while (now_ns() < until) {
        if (random_below(&random, 50) == 0)
            limit(&rig, random_below(&random, 3) * 1000, random_below(&random, 3) << 22,
                  (uint32_t)random_below(&random, 20));
        for (int i = 0; i < 2; i++) {
            struct blk *b = dqueue_get(&rig.q[i], NULL);

            if (!b)
                continue;
            CHECK_EQUAL(*b->status, VIRTIO_BLK_S_OK);
            done++;
            blk_send(&rig.q[i], b, VIRTIO_BLK_T_OUT, 8, 4096);
        }
        harness_breathe();
    }
    CHECK(done > 100);
    for (uint32_t i = 0; i < 2; i++)
        CHECK_EQUAL(vd_queue_pause(rig.engine, i, 20000), 0);
    rig_close(&rig);
}
