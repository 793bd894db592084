/* Kicks, interrupts, and indices that wrap: who wakes whom, and how often. */
#include <poll.h>
#include <string.h>
#include <unistd.h>

#include "harness.h"
#include "held_page.h"

static void ping_pong(struct plan plan, int rounds)
{
    struct rig rig;

    plan.backend = "null";
    rig_open(&rig, plan);
    struct blk b = blk_new(&rig, 512);
    for (int i = 0; i < rounds; i++)
        CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_OUT, 0, 512), VIRTIO_BLK_S_OK);
    CHECK_EQUAL(rig_stats(&rig, 0).operations[VD_WRITE].count, rounds);
    rig_close(&rig);
}

BOTH(no_wake_up_is_lost_in_100000_rounds_with_event_indices)
{
    ping_pong((struct plan){ .event_idx = true, .size = 16 }, 100000); /* wraps the indices too */
}

BOTH(no_wake_up_is_lost_in_many_rounds_with_flags)
{
    ping_pong((struct plan){ 0 }, 30000);
}

BOTH(no_wake_up_is_lost_with_a_file_behind_it)
{
    struct rig rig;

    rig_open(&rig, (struct plan){ .event_idx = true, .directory = "/dev/shm" });
    struct blk b = blk_new(&rig, 4096);
    for (int i = 0; i < 20000; i++)
        CHECK_EQUAL(blk_do(&rig.q[0], &b, i % 2 ? VIRTIO_BLK_T_OUT : VIRTIO_BLK_T_IN, 8, 4096), VIRTIO_BLK_S_OK);
    rig_close(&rig);
}

static void full_rings(bool event_idx)
{
    struct rig rig;
    enum { BATCH = 64 };
    struct blk blks[BATCH];
    uint64_t interrupts = 0, total = 0;

    rig_open(&rig, (struct plan){ .backend = "null", .event_idx = event_idx, .size = 256 });
    struct dqueue *q = &rig.q[0];
    for (int i = 0; i < BATCH; i++)
        blks[i] = blk_new(&rig, 512);
    q->kicks = 0;
    for (int round = 0; round < 2000; round++) {
        /* Everything is added before the one kick; the interrupt is wanted after the last entry only. */
        for (int i = 0; i < BATCH; i++) {
            struct piece pieces[] = { { driver_iova(q->d, blks[i].header), 16, false },
                                      { driver_iova(q->d, blks[i].status), 1, true } };

            *blks[i].header = (struct virtio_blk_outhdr){ .type = VIRTIO_BLK_T_FLUSH };
            CHECK(dqueue_add(q, pieces, 2, &blks[i]));
        }
        if (event_idx)
            dqueue_want_interrupt(q, BATCH, 2);
        else
            dqueue_want_none(q);
        dqueue_kick(q);
        if (event_idx) {
            struct pollfd wait = { .fd = q->interrupt_fd, .events = POLLIN };

            CHECK(poll(&wait, 1, 20000) == 1); /* it comes, and only when all are done */
            CHECK_EQUAL(dqueue_shown(q), dqueue_state(q));
        }
        for (int i = 0; i < BATCH; i++)
            WAIT_FOR(dqueue_get(q, NULL));
        interrupts += dqueue_interrupts(q);
        total += BATCH;
    }
    CHECK_EQUAL(rig_stats(&rig, 0).interrupts, interrupts);
    CHECK_EQUAL(interrupts, event_idx ? 2000 : 0);
    CHECK(q->kicks <= 2000);
    CHECK_EQUAL(rig_stats(&rig, 0).operations[VD_FLUSH].count, total);
    rig_close(&rig);
}

BOTH(event_indices_give_one_kick_and_one_interrupt_per_batch)
{
    full_rings(true);
}

BOTH(a_driver_that_polls_is_never_interrupted)
{
    full_rings(false);
}

/* Busy is an engine that waits for the memory of a header: what comes meanwhile, it finds without being told. */
BOTH(a_busy_engine_is_not_kicked)
{
    enum { MORE = 100 };
    static uint8_t page[4096]; /* its header: a read of sector 0 */
    struct held_page held;
    struct rig rig;
    struct blk first, blks[MORE];

    rig_open(&rig, (struct plan){ .event_idx = true, .size = 512 });
    struct dqueue *q = &rig.q[0];
    first = blk_new(&rig, 512);
    for (int i = 0; i < MORE; i++)
        blks[i] = blk_new(&rig, 512);
    uint8_t *hole = driver_alloc(q->d, 4096, 4096);
    struct piece pieces[] = { { driver_iova(q->d, hole), 16, false },
                              { driver_iova(q->d, first.data), 512, true },
                              { driver_iova(q->d, first.status), 1, true } };

    blk_prove(&rig, 0);
    hold_page(&rig, &held, hole);
    CHECK(dqueue_add(q, pieces, 3, &first));
    dqueue_kick(q);
    wait_until_held(&held);
    uint64_t kicks = q->kicks;
    for (int i = 0; i < MORE; i++)
        blk_send(q, &blks[i], VIRTIO_BLK_T_IN, 0, 512);
    CHECK_EQUAL(q->kicks, kicks);
    give_page(&held, page);
    for (int i = 0; i < 1 + MORE; i++)
        WAIT_FOR(dqueue_get(q, NULL));
    close(held.fd);
    rig_close(&rig);
}

/*
 * A driver may look at the ring for a long time without wanting interrupts, and then want one: after exactly 65536
 * entries the used index is the one of the last interrupt again, which must not look like "nothing new".
 */
CASE(an_interrupt_wanted_after_a_whole_turn_of_the_index_comes)
{
    struct rig rig;

    rig_open(&rig, (struct plan){ .backend = "null", .event_idx = true });
    struct dqueue *q = &rig.q[0];
    struct blk b = blk_new(&rig, 512);
    struct pollfd wait = { .fd = q->interrupt_fd, .events = POLLIN };

    CHECK_EQUAL(blk_do(q, &b, VIRTIO_BLK_T_FLUSH, 0, 0), VIRTIO_BLK_S_OK);
    store_relaxed(&q->avail->ring[q->size], (uint16_t)(q->last_used - 100)); /* long past: no interrupts */
    dqueue_interrupts(q);
    uint64_t before = rig_stats(&rig, 0).interrupts;

    for (int i = 0; i < 65535; i++) {
        store_relaxed(&q->avail->ring[q->size], (uint16_t)(q->last_used - 100));
        blk_send(q, &b, VIRTIO_BLK_T_FLUSH, 0, 0);
        WAIT_FOR(dqueue_get(q, NULL));
    }
    CHECK_EQUAL(rig_stats(&rig, 0).interrupts, before);
    CHECK(!dqueue_enable_interrupt(q));
    blk_send(q, &b, VIRTIO_BLK_T_FLUSH, 0, 0);
    CHECK(poll(&wait, 1, 20000) == 1);
    CHECK(dqueue_get(q, NULL));
    rig_close(&rig);
}

BOTH(rings_start_at_any_index_and_wrap)
{
    static const uint16_t starts[] = { 1, 63, 64, 32767, 32768, 65500, 65535 };

    for (int event_idx = 0; event_idx < 2; event_idx++) {
        struct rig rig;

        rig_open(&rig, (struct plan){ .event_idx = event_idx, .no_start = true });
        struct blk b = blk_new(&rig, 512);
        for (size_t i = 0; i < sizeof(starts) / sizeof(starts[0]); i++) {
            dqueue_reset(&rig.q[0], starts[i]);
            CHECK_EQUAL(rig_start(&rig, 0), 0);
            for (uint32_t j = 0; j < 200; j++) {
                pattern(b.data, 512, j);
                CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_OUT, j, 512), VIRTIO_BLK_S_OK);
                CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_IN, j, 512), VIRTIO_BLK_S_OK);
                CHECK(is_pattern(b.data, 512, j));
            }
            rig_stop(&rig, 0);
            CHECK_EQUAL(rig_state(&rig, 0), dqueue_state(&rig.q[0]));
        }
        rig_close(&rig);
    }
}

BOTH(requests_added_before_the_queue_started_are_served_without_a_kick)
{
    struct rig rig;

    rig_open(&rig, (struct plan){ .no_start = true });
    struct blk b = blk_new(&rig, 512);
    struct dqueue *q = &rig.q[0];
    struct vd_queue_config config = dqueue_config(q, ALL_BLK_FEATURES);
    struct piece pieces[] = { { driver_iova(q->d, b.header), 16, false }, { driver_iova(q->d, b.status), 1, true } };

    *b.header = (struct virtio_blk_outhdr){ .type = VIRTIO_BLK_T_FLUSH };
    CHECK(dqueue_add(q, pieces, 2, &b));
    dqueue_show(q);
    CHECK_EQUAL(vd_queue_start(rig.engine, 0, &config), 0);
    CHECK_EQUAL(blk_finish(q, &b), VIRTIO_BLK_S_OK);
    rig_close(&rig);
}

BOTH(what_was_shown_before_a_fault_is_interrupted_for)
{
    enum { BATCH = 16 };
    struct blk blks[BATCH];

    for (int try = 0; try < 40; try++) {
        struct rig rig;

        rig_open(&rig, (struct plan){ .backend = "null", .event_idx = true });
        struct dqueue *q = &rig.q[0];
        for (int i = 0; i < BATCH; i++)
            blks[i] = blk_new(&rig, 512);
        for (int round = 0; round < 300; round++) { /* so that it learns to wait for company */
            for (int i = 0; i < BATCH; i++)
                blk_send(q, &blks[i], VIRTIO_BLK_T_OUT, 0, 512);
            for (int i = 0; i < BATCH; i++)
                blk_finish(q, &blks[i]);
        }
        uint64_t interrupts = 0;
        uint32_t shown = dqueue_shown(q);

        (void)dqueue_interrupts(q);
        dqueue_want_interrupt(q, 1, 3);

        blk_send(q, &blks[0], VIRTIO_BLK_T_OUT, 0, 512);
        while (dqueue_shown(q) == shown)
            ;
        dqueue_put(q, q->size + 3); /* which is no head of this queue */
        dqueue_kick_always(q);
        WAIT_FOR(rig_stats(&rig, 0).fault);
        WAIT_FOR(interrupts += dqueue_interrupts(q));
        rig_close(&rig);
    }
}
