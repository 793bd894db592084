/* What only packed queues have: wrap counters, chains around the ring's end, ids, and a state of two halves. */
#include <errno.h>
#include <string.h>

#include "harness.h"

static const struct plan PACKED = { .packed = true };

/* The queue gives up for this reason, and works again after a reset. */
static void expect(struct rig *rig, enum vd_queue_fault fault)
{
    WAIT_FOR(rig_stats(rig, 0).fault);
    CHECK_EQUAL(rig_stats(rig, 0).fault, fault);
    rig_stop(rig, 0);
    dqueue_reset(&rig->q[0], 0);
    CHECK_EQUAL(rig_start(rig, 0), 0);
    blk_prove(rig, 0);
    rig_close(rig);
}

/* Make an entry available, of any sort, that is not the driver's usual. */
static void put(struct dqueue *q, uint16_t at, uint64_t iova, uint32_t length, uint16_t id, uint16_t flags, bool wrap)
{
    flags |= wrap ? 1 << VRING_PACKED_DESC_F_AVAIL : 1 << VRING_PACKED_DESC_F_USED;
    q->ring[at] = (struct vring_packed_desc){ .addr = iova, .len = length, .id = id };
    store_release(&q->ring[at].flags, flags);
}

CASE(packed_rings_of_any_size_have_chains_around_their_end)
{
    static const uint16_t sizes[] = { 3, 4, 5, 7, 16, 100, 1000 };

    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        struct rig rig;

        rig_open(&rig, (struct plan){ .packed = true, .size = sizes[i], .event_idx = i % 2, .memory = 16 * MIB });
        struct blk b[4];

        for (int j = 0; j < 4; j++)
            b[j] = blk_new(&rig, 512);
        for (uint32_t round = 0; round < 50; round++) {
            int count = sizes[i] / 3 < 4 ? sizes[i] / 3 : 4;

            for (int j = 0; j < count; j++) {
                pattern(b[j].data, 512, round * 4 + (uint32_t)j);
                blk_send(&rig.q[0], &b[j], VIRTIO_BLK_T_OUT, round * 4 + (uint32_t)j, 512);
            }
            for (int j = 0; j < count; j++)
                CHECK_EQUAL(blk_finish(&rig.q[0], &b[j]), VIRTIO_BLK_S_OK);
            for (int j = 0; j < count; j++) {
                uint8_t image[512];

                image_read(&rig, image, 512, (round * 4 + (uint32_t)j) * 512);
                CHECK(is_pattern(image, 512, round * 4 + (uint32_t)j));
            }
        }
        rig_close(&rig);
    }
}

CASE(a_packed_descriptor_of_another_lap_is_not_available)
{
    struct rig rig;

    rig_open(&rig, PACKED);
    struct dqueue *q = &rig.q[0];

    put(q, 0, 1ull << 60, 16, 0xffff, 0, false); /* would be a fault if it were taken for one */
    for (int i = 0; i < 20; i++) {
        dqueue_kick_always(q);
        harness_breathe();
    }
    rig_stop(&rig, 0);
    CHECK_EQUAL(rig_stats(&rig, 0).fault, VD_FAULT_NONE);
    CHECK_EQUAL(rig_state(&rig, 0), 0x80008000);
    rig_close(&rig);
}

CASE(a_packed_chain_that_runs_into_another_lap_is_a_fault)
{
    struct rig rig;

    rig_open(&rig, PACKED);
    struct dqueue *q = &rig.q[0];

    put(q, 1, 0, 16, 0, VRING_DESC_F_WRITE, false);
    put(q, 0, 0, 16, 0, VRING_DESC_F_NEXT, true);
    dqueue_kick_always(q);
    expect(&rig, VD_FAULT_CHAIN);
}

CASE(a_packed_chain_longer_than_the_ring_is_a_fault)
{
    struct rig rig;

    rig_open(&rig, (struct plan){ .packed = true, .size = 16 });
    struct dqueue *q = &rig.q[0];

    for (uint16_t i = 16; i-- > 0;)
        put(q, i, 0, 0, i, VRING_DESC_F_NEXT, true);
    dqueue_kick_always(q);
    expect(&rig, VD_FAULT_CHAIN); /* the entry after the last is the first, of the wrong lap */
}

CASE(all_of_a_packed_ring_may_be_available_at_once)
{
    struct rig rig;

    rig_open(&rig, (struct plan){ .packed = true, .size = 16, .no_start = true });
    struct dqueue *q = &rig.q[0];
    struct vd_queue_config config = dqueue_config(q, ALL_BLK_FEATURES);

    config.state = 0x80018001;
    for (uint16_t i = 0; i < 16; i++)
        put(q, i, 0, 1, i, VRING_DESC_F_WRITE, i > 0);
    CHECK_EQUAL(vd_queue_start(rig.engine, 0, &config), 0);
    WAIT_FOR(dqueue_interrupts(q));
    rig_stop(&rig, 0);
    CHECK_EQUAL(rig_stats(&rig, 0).fault, VD_FAULT_NONE);
    CHECK_EQUAL(rig_state(&rig, 0), 0x00010001);
    rig_close(&rig);
}

CASE(an_id_beyond_the_packed_ring_is_a_fault)
{
    static const uint16_t ids[] = { 64, 0x8000, 0xffff };

    for (size_t i = 0; i < sizeof(ids) / sizeof(ids[0]); i++) {
        struct rig rig;

        rig_open(&rig, PACKED);
        put(&rig.q[0], 0, 0, 16, ids[i], VRING_DESC_F_WRITE, true);
        dqueue_kick_always(&rig.q[0]);
        expect(&rig, VD_FAULT_HEAD);
    }
}

CASE(an_indirect_descriptor_within_a_packed_chain_is_a_fault)
{
    struct rig rig;

    rig_open(&rig, (struct plan){ .packed = true, .indirect = true });
    struct dqueue *q = &rig.q[0];

    put(q, 1, driver_iova(q->d, q->tables), 32, 0, VRING_DESC_F_INDIRECT, true);
    put(q, 0, 0, 16, 0, VRING_DESC_F_NEXT, true);
    dqueue_kick_always(q);
    expect(&rig, VD_FAULT_CHAIN);
}

CASE(a_packed_queue_starts_only_where_one_can_be)
{
    static const uint32_t states[] = { 0x80008040, 0x80400040, 0x80018000, 0x80000000, 0x00008000, 0xffffffff };
    struct rig rig;

    rig_open(&rig, (struct plan){ .packed = true, .no_start = true, .iova = 0x10000 });
    struct vd_queue_config good = dqueue_config(&rig.q[0], ALL_BLK_FEATURES), bad;
    const uint64_t end = 0x10000 + 8 * MIB;

    for (size_t i = 0; i < sizeof(states) / sizeof(states[0]); i++) {
        bad = good;
        bad.state = states[i];
        CHECK_EQUAL(vd_queue_start(rig.engine, 0, &bad), -EFAULT);
        CHECK_EQUAL(rig_stats(&rig, 0).fault, VD_FAULT_AVAIL_INDEX);
    }
    bad = good;
    bad.resume = 1; /* nothing in memory tells where a packed ring is used up to */
    CHECK_EQUAL(vd_queue_start(rig.engine, 0, &bad), -EFAULT);
#define REFUSED(change)                                              \
    do {                                                             \
        bad = good;                                                  \
        change;                                                      \
        CHECK_EQUAL(vd_queue_start(rig.engine, 0, &bad), -EFAULT);   \
        CHECK_EQUAL(rig_stats(&rig, 0).fault, VD_FAULT_RING_ADDRESS); \
    } while (0)
    REFUSED(bad.desc_iova = 0);
    REFUSED(bad.driver_iova = 0);
    REFUSED(bad.device_iova = 0);
    REFUSED(bad.desc_iova = end - 16 * 64 + 16);
    REFUSED(bad.driver_iova = end);
    REFUSED(bad.device_iova = end);
    REFUSED(bad.desc_iova += 8);
    REFUSED(bad.driver_iova += 2);
    REFUSED(bad.device_iova += 2);
    CHECK_EQUAL(vd_queue_start(rig.engine, 0, &good), 0);
    blk_prove(&rig, 0);
    rig_close(&rig);
}
