/*
 * A server may still carry out what it received on a connection that is gone. So nothing is sent again at once, and nothing
 * at all where what it received was abandoned: all times here are at least so long, however slow the machine is.
 */
#include <string.h>
#include <unistd.h>

#include "queue.h"
#include "fake_nbd.h"
#include "nbd_rig.h"

enum { LOG_BYTES = 64 * 1024, SETTLE_NS = 100000000, STOP_MS = 50 };

static uint8_t the_log[LOG_BYTES] __attribute__((aligned(64)));

static void start(struct rig *rig, bool resume)
{
    struct vd_queue_config config = dqueue_config(&rig->q[0], ALL_BLK_FEATURES);

    config.inflight = the_log;
    config.inflight_bytes = LOG_BYTES;
    config.resume = resume;
    CHECK_EQUAL(vd_queue_start(rig->engine, 0, &config), 0);
}

/* As another worker does it. */
static void start_anew(struct rig *rig)
{
    vd_engine_free(rig->engine);
    CHECK_EQUAL(vd_engine_new(&rig->config, &rig->engine), 0);
    CHECK_EQUAL(vd_engine_set_regions(rig->engine, rig->driver.regions, rig->driver.region_count), 0);
    start(rig, true);
}

BOTH(nbd_what_a_dead_worker_sent_is_not_sent_again_at_once)
{
    struct rig rig;
    struct fake_nbd s;
    uint64_t begin, fastest = UINT64_MAX;

    fake_nbd_open(&s, 4 * MIB);
    nbd_rig_open(&rig, &s, (struct plan){ .size = 64 });
    rig_stop(&rig, 0);
    start(&rig, false);
    struct blk b = blk_new(&rig, 4096);

    store_relaxed(&s.hold, true);
    blk_send(&rig.q[0], &b, VIRTIO_BLK_T_OUT, 8, 4096);
    WAIT_FOR(load_relaxed(&s.writes));
    CHECK_EQUAL(vd_queue_stop(rig.engine, 0, STOP_MS), -ETIMEDOUT); /* it is in the log, and that is all that is left of it */
    WAIT_FOR(!load_acquire(&rig.engine->abandoned));
    store_relaxed(&s.hold, false);
    begin = now_ns();
    start_anew(&rig);
    CHECK_EQUAL(blk_finish(&rig.q[0], &b), VIRTIO_BLK_S_OK);
    CHECK(now_ns() - begin >= SETTLE_NS);
    for (int i = 0; i < 5; i++) { /* with nothing in the log there is nothing to wait for */
        rig_stop(&rig, 0);
        begin = now_ns();
        start_anew(&rig);
        CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_IN, 8, 4096), VIRTIO_BLK_S_OK);
        fastest = now_ns() - begin < fastest ? now_ns() - begin : fastest;
    }
    CHECK(fastest < SETTLE_NS);
    rig_close(&rig);
    CHECK_EQUAL(s.violations, 0);
    fake_nbd_close(&s);
}

BOTH(nbd_what_was_abandoned_is_over_before_a_queue_that_starts_sends_anything)
{
    struct rig rig;
    struct fake_nbd s;

    fake_nbd_open(&s, 4 * MIB);
    nbd_rig_open(&rig, &s, (struct plan){ .size = 64 });
    struct blk b = blk_new(&rig, 4096);

    for (int i = 0; i < 5; i++) {
        store_relaxed(&s.hold, true);
        store_relaxed(&s.writes, 0);
        blk_send(&rig.q[0], &b, VIRTIO_BLK_T_OUT, 8, 4096);
        WAIT_FOR(load_relaxed(&s.writes));
        uint64_t begin = now_ns();

        CHECK_EQUAL(vd_queue_stop(rig.engine, 0, STOP_MS), -ETIMEDOUT);
        CHECK_EQUAL(vd_engine_set_regions(rig.engine, NULL, 0), 0);
        CHECK_EQUAL(vd_engine_set_regions(rig.engine, rig.driver.regions, rig.driver.region_count), 0);
        store_relaxed(&s.hold, false);
        dqueue_reset(&rig.q[0], 0);
        CHECK_EQUAL(rig_start(&rig, 0), 0); /* the thread of the one before may still be at it */
        CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_OUT, 8, 4096), VIRTIO_BLK_S_OK);
        CHECK(now_ns() - begin >= STOP_MS * 1000000ull + SETTLE_NS);
        WAIT_FOR(!load_acquire(&rig.engine->abandoned));
    }
    rig_close(&rig);
    CHECK_EQUAL(s.violations, 0);
    fake_nbd_close(&s);
}

CASE(nbd_a_queue_does_not_get_the_connection_that_was_made_for_one_that_waits_longer)
{
    struct rig rig;
    struct fake_nbd s;
    struct blk b[2];

    fake_nbd_open(&s, 4 * MIB);
    nbd_rig_open(&rig, &s, (struct plan){ .size = 64, .queues = 2 });
    store_relaxed(&s.hold, true);
    for (uint32_t i = 0; i < 2; i++) {
        b[i] = blk_new(&rig, 4096);
        blk_send(&rig.q[i], &b[i], VIRTIO_BLK_T_OUT, 8 + 8 * i, 4096);
    }
    WAIT_FOR(load_relaxed(&s.writes) == 2);
    store_relaxed(&s.shy, true);
    fake_nbd_cut(&s, 0);
    WAIT_FOR(rig_stats(&rig, 0).remote.losses + rig_stats(&rig, 1).remote.losses == 1);
    uint32_t later = rig_stats(&rig, 0).remote.losses ? 1 : 0;

    WAIT_FOR(load_relaxed(&s.connections) == 3); /* for the first one; and while it is made the other one loses its own */
    uint64_t begin = now_ns();

    fake_nbd_cut(&s, 1);
    WAIT_FOR(rig_stats(&rig, later).remote.losses == 1);
    usleep(20000);
    store_relaxed(&s.hold, false);
    store_relaxed(&s.shy, false);
    CHECK_EQUAL(blk_finish(&rig.q[later], &b[later]), VIRTIO_BLK_S_OK);
    CHECK(now_ns() - begin >= SETTLE_NS);
    CHECK_EQUAL(blk_finish(&rig.q[!later], &b[!later]), VIRTIO_BLK_S_OK);
    rig_close(&rig);
    CHECK_EQUAL(s.violations, 0);
    fake_nbd_close(&s);
}
