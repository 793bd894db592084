/* What no driver would do: each thing costs the driver its queue or the request, and never us anything. */
#include <errno.h>
#include <poll.h>
#include <string.h>

#include "harness.h"

/* The queue is unusable for this reason, was counted, control was told, and a reset makes all well. */
static void expect_fault(struct rig *rig, enum vd_queue_fault fault)
{
    struct pollfd told = { .fd = rig->event_fd, .events = POLLIN };
    struct dqueue *q = &rig->q[0];

    CHECK(poll(&told, 1, 20000) == 1);
    CHECK_EQUAL(rig_stats(rig, 0).fault, fault);
    CHECK(rig_stats(rig, 0).malformed >= 1);
    CHECK(rig_stats(rig, 0).running);
    rig_stop(rig, 0);
    CHECK_EQUAL(rig_stats(rig, 0).in_flight, 0);
    dqueue_reset(q, 0);
    CHECK_EQUAL(rig_start(rig, 0), 0);
    CHECK_EQUAL(rig_stats(rig, 0).fault, VD_FAULT_NONE);
    blk_prove(rig, 0);
}

static void make_available(struct dqueue *q, uint16_t head)
{
    dqueue_put(q, head);
    dqueue_kick_always(q);
}

/* A good chain in descriptors 0, 1, 2: a read of one sector. */
static struct blk good_chain(struct rig *rig)
{
    struct dqueue *q = &rig->q[0];
    struct blk b = blk_new(rig, 4096);

    *b.header = (struct virtio_blk_outhdr){ .type = VIRTIO_BLK_T_IN };
    *b.status = 0xff;
    q->desc[0] = (struct vring_desc){ driver_iova(q->d, b.header), 16, VRING_DESC_F_NEXT, 1 };
    q->desc[1] = (struct vring_desc){ driver_iova(q->d, b.data), 512, VRING_DESC_F_NEXT | VRING_DESC_F_WRITE, 2 };
    q->desc[2] = (struct vring_desc){ driver_iova(q->d, b.status), 1, VRING_DESC_F_WRITE, 0 };
    return b;
}

/* Spoil a good chain, and expect the fault. */
#define SPOILED(...) SPOILED_WITH(CASE, __VA_ARGS__)
#define SPOILED_BOTH(...) SPOILED_WITH(BOTH, __VA_ARGS__)
#define SPOILED_WITH(KIND, name, plan_, fault, ...)     \
    KIND(name)                                          \
    {                                                   \
        struct rig rig;                                 \
        rig_open(&rig, (struct plan)plan_);             \
        struct dqueue *q = &rig.q[0];                   \
        struct blk b = good_chain(&rig);                \
        (void)b;                                        \
        __VA_ARGS__;                                    \
        make_available(q, 0);                           \
        expect_fault(&rig, fault);                      \
        rig_close(&rig);                                \
    }
#define USUAL { 0 }
#define INDIRECT { .indirect = true }
#define HIGH { .iova = 0x100000 }

/* clang-format off */
SPOILED(a_chain_that_loops_is_a_fault, USUAL, VD_FAULT_CHAIN,
        q->desc[1].next = 1)
SPOILED(a_chain_that_loops_to_its_head_is_a_fault, USUAL, VD_FAULT_CHAIN,
        { q->desc[2].flags |= VRING_DESC_F_NEXT; q->desc[2].next = 0; })
SPOILED(a_loop_of_empty_descriptors_is_a_fault, USUAL, VD_FAULT_CHAIN,
        { q->desc[0].len = 0; q->desc[0].next = 0; })
SPOILED(a_next_descriptor_out_of_range_is_a_fault, USUAL, VD_FAULT_CHAIN,
        q->desc[1].next = q->size)
SPOILED(a_next_descriptor_far_out_of_range_is_a_fault, USUAL, VD_FAULT_CHAIN,
        q->desc[0].next = 0xffff)
SPOILED_BOTH(readable_memory_after_writable_is_a_fault, USUAL, VD_FAULT_CHAIN,
        q->desc[2].flags = 0)
SPOILED_BOTH(a_chain_without_writable_memory_is_a_fault, USUAL, VD_FAULT_CHAIN,
        q->desc[0].flags = 0)
SPOILED_BOTH(a_chain_with_only_empty_writable_memory_is_a_fault, USUAL, VD_FAULT_CHAIN,
        { q->desc[1].len = 0; q->desc[2].len = 0; })
SPOILED_BOTH(an_address_that_is_not_mapped_is_a_fault, USUAL, VD_FAULT_CHAIN,
        q->desc[1].addr = 1ull << 40)
SPOILED_BOTH(an_address_just_below_memory_is_a_fault, HIGH, VD_FAULT_CHAIN,
        q->desc[1].addr = 0xfffff)
SPOILED_BOTH(an_address_just_above_memory_is_a_fault, HIGH, VD_FAULT_CHAIN,
        q->desc[1].addr = 0x100000 + 8 * MIB)
SPOILED_BOTH(a_buffer_that_ends_one_byte_outside_is_a_fault, HIGH, VD_FAULT_CHAIN,
        q->desc[1].addr = 0x100000 + 8 * MIB - 511)
SPOILED_BOTH(a_length_that_overflows_the_address_is_a_fault, USUAL, VD_FAULT_CHAIN,
        { q->desc[1].addr = UINT64_MAX - 10; q->desc[1].len = 512; })
SPOILED_BOTH(a_huge_length_is_a_fault, USUAL, VD_FAULT_CHAIN,
        q->desc[1].len = UINT32_MAX)
SPOILED_BOTH(a_status_that_is_not_mapped_is_a_fault, USUAL, VD_FAULT_CHAIN,
        q->desc[2].addr = 1ull << 50)
SPOILED_BOTH(an_indirect_descriptor_without_the_feature_is_a_fault, USUAL, VD_FAULT_CHAIN,
        { q->desc[0].flags = VRING_DESC_F_INDIRECT; q->desc[0].len = 48; })
SPOILED_BOTH(an_indirect_table_in_an_indirect_table_is_a_fault, INDIRECT, VD_FAULT_CHAIN,
        { q->tables[0] = (struct vring_desc){ driver_iova(q->d, q->tables + 8), 48, VRING_DESC_F_INDIRECT, 0 };
          q->desc[0] = (struct vring_desc){ driver_iova(q->d, q->tables), 16, VRING_DESC_F_INDIRECT, 0 }; })
SPOILED(an_indirect_table_that_is_the_ring_itself_is_a_fault, INDIRECT, VD_FAULT_CHAIN,
        q->desc[0] = ((struct vring_desc){ driver_iova(q->d, q->desc), 48, VRING_DESC_F_INDIRECT, 0 }))
SPOILED_BOTH(an_indirect_length_that_is_no_multiple_of_16_is_a_fault, INDIRECT, VD_FAULT_CHAIN,
        q->desc[0] = ((struct vring_desc){ driver_iova(q->d, q->tables), 47, VRING_DESC_F_INDIRECT, 0 }))
SPOILED_BOTH(an_indirect_table_of_no_length_is_a_fault, INDIRECT, VD_FAULT_CHAIN,
        q->desc[0] = ((struct vring_desc){ driver_iova(q->d, q->tables), 0, VRING_DESC_F_INDIRECT, 0 }))
SPOILED_BOTH(an_indirect_descriptor_with_a_next_is_a_fault, INDIRECT, VD_FAULT_CHAIN,
        { memcpy(q->tables, q->desc, 48);
          q->desc[0] = (struct vring_desc){ driver_iova(q->d, q->tables), 48, VRING_DESC_F_INDIRECT | VRING_DESC_F_NEXT, 1 }; })
SPOILED_BOTH(an_indirect_table_outside_memory_is_a_fault, INDIRECT, VD_FAULT_CHAIN,
        q->desc[0] = ((struct vring_desc){ 8 * MIB - 16, 48, VRING_DESC_F_INDIRECT, 0 }))
SPOILED_BOTH(an_indirect_table_of_the_largest_length_is_a_fault, INDIRECT, VD_FAULT_CHAIN,
        q->desc[0] = ((struct vring_desc){ driver_iova(q->d, q->tables), 0xfffffff0, VRING_DESC_F_INDIRECT, 0 }))
SPOILED(a_next_beyond_the_indirect_table_is_a_fault, INDIRECT, VD_FAULT_CHAIN,
        { memcpy(q->tables, q->desc, 48); q->tables[1].next = 3;
          q->desc[0] = (struct vring_desc){ driver_iova(q->d, q->tables), 48, VRING_DESC_F_INDIRECT, 0 }; })
SPOILED(a_loop_in_an_indirect_table_is_a_fault, INDIRECT, VD_FAULT_CHAIN,
        { memcpy(q->tables, q->desc, 48); q->tables[1].next = 1;
          q->desc[0] = (struct vring_desc){ driver_iova(q->d, q->tables), 48, VRING_DESC_F_INDIRECT, 0 }; })
SPOILED_BOTH(an_indirect_table_at_an_odd_address_is_a_fault, INDIRECT, VD_FAULT_CHAIN,
        { memcpy((uint8_t *)q->tables + 1, q->desc, 48);
          q->desc[0] = (struct vring_desc){ driver_iova(q->d, q->tables) + 1, 48, VRING_DESC_F_INDIRECT, 0 }; })
SPOILED(a_jump_of_the_avail_index_is_a_fault, USUAL, VD_FAULT_AVAIL_INDEX,
        q->next_avail = (uint16_t)(q->size + 5))
SPOILED(an_avail_index_that_goes_back_is_a_fault, USUAL, VD_FAULT_AVAIL_INDEX,
        q->next_avail = (uint16_t)-2)
/* clang-format on */

BOTH(a_chain_longer_than_the_queue_is_a_fault)
{
    struct rig rig;

    rig_open(&rig, (struct plan){ .indirect = true, .size = 16 });
    struct dqueue *q = &rig.q[0];
    struct blk b = blk_new(&rig, 4096);

    *b.header = (struct virtio_blk_outhdr){ .type = VIRTIO_BLK_T_IN };
    for (uint16_t i = 0; i < 17; i++)
        q->tables[i] = (struct vring_desc){ driver_iova(q->d, i ? b.data : (void *)b.header), 16,
                                            (uint16_t)((i < 16) | (i ? VRING_DESC_F_WRITE : 0)), (uint16_t)(i + 1) };
    q->desc[0] = (struct vring_desc){ driver_iova(q->d, q->tables), 17 * 16, VRING_DESC_F_INDIRECT, 0 };
    make_available(q, 0);
    expect_fault(&rig, VD_FAULT_CHAIN);
    rig_close(&rig);
}

BOTH(a_head_out_of_range_is_a_fault)
{
    static const uint16_t heads[] = { 64, 65, 0x8000, 0xffff };

    for (size_t i = 0; i < sizeof(heads) / sizeof(heads[0]); i++) {
        struct rig rig;

        rig_open(&rig, (struct plan){ 0 });
        good_chain(&rig);
        make_available(&rig.q[0], heads[i]);
        expect_fault(&rig, VD_FAULT_HEAD);
        rig_close(&rig);
    }
}

BOTH(a_head_that_is_in_flight_already_is_a_fault)
{
    struct rig rig;

    rig_open(&rig, (struct plan){ 0 });
    struct dqueue *q = &rig.q[0];

    good_chain(&rig); /* fetched in one batch, so the first is certainly in flight when the second is seen */
    dqueue_put(q, 0);
    make_available(q, 0);
    expect_fault(&rig, VD_FAULT_HEAD);
    rig_close(&rig);
}

BOTH(a_read_into_memory_that_is_mapped_read_only_is_a_fault)
{
    struct rig rig;
    struct vd_region regions[2];

    rig_open(&rig, (struct plan){ 0 });
    struct dqueue *q = &rig.q[0];
    struct blk b = good_chain(&rig);

    memset(b.data, 0x42, 512);
    CHECK_EQUAL(vd_queue_pause(rig.engine, 0, 20000), 0);
    memcpy(regions, rig.driver.regions, sizeof(regions[0]));
    regions[1] = (struct vd_region){ 1ull << 32, rig.driver.size, 0, rig.driver.fd, 0 };
    CHECK_EQUAL(vd_engine_set_regions(rig.engine, regions, 2), 0);
    CHECK_EQUAL(vd_queue_resume(rig.engine, 0), 0);
    q->desc[1].addr += 1ull << 32;
    make_available(q, 0);
    expect_fault(&rig, VD_FAULT_CHAIN);
    CHECK(is_byte(b.data, 512, 0x42));
    rig_close(&rig);
}

CASE(rings_outside_memory_or_misaligned_do_not_start)
{
    struct rig rig;

    rig_open(&rig, (struct plan){ .no_start = true, .iova = 0x10000 });
    struct vd_queue_config good = dqueue_config(&rig.q[0], ALL_BLK_FEATURES), bad;
    const uint64_t end = 0x10000 + 8 * MIB;

#define REFUSED(change, error)                                          \
    do {                                                                \
        bad = good;                                                     \
        change;                                                         \
        CHECK_EQUAL(vd_queue_start(rig.engine, 0, &bad), error);        \
        CHECK(!rig_stats(&rig, 0).running);                             \
    } while (0)
    REFUSED(bad.desc_iova = 0, -EFAULT);
    CHECK_EQUAL(rig_stats(&rig, 0).fault, VD_FAULT_RING_ADDRESS);
    REFUSED(bad.driver_iova = 0, -EFAULT);
    REFUSED(bad.device_iova = 0, -EFAULT);
    REFUSED(bad.desc_iova = end - 16 * 64 + 16, -EFAULT);
    REFUSED(bad.driver_iova = end - 6 - 2 * 64 + 2, -EFAULT);
    REFUSED(bad.device_iova = end - 6 - 8 * 64 + 2, -EFAULT);
    REFUSED(bad.desc_iova = UINT64_MAX - 15, -EFAULT);
    REFUSED(bad.desc_iova += 8, -EFAULT);
    REFUSED(bad.driver_iova += 1, -EFAULT);
    REFUSED(bad.device_iova += 2, -EFAULT);
    REFUSED(bad.size = 0, -EINVAL);
    REFUSED(bad.size = 48, -EFAULT);
    REFUSED(bad.size = 2048, -EINVAL);
    REFUSED(bad.size = 65536, -EINVAL);
    CHECK_EQUAL(vd_queue_start(rig.engine, 0, &good), 0);
    blk_prove(&rig, 0);
    rig_close(&rig);
}

BOTH(regions_shifted_against_their_addresses_do_not_misalign_rings)
{
    struct rig rig;

    rig_open(&rig, (struct plan){ .no_start = true });
    struct vd_queue_config config = dqueue_config(&rig.q[0], ALL_BLK_FEATURES);
    for (uint64_t shift = 1; shift < 8; shift++) {
        struct vd_region region = { 0, rig.driver.size - 8, shift, rig.driver.fd, 1 };

        CHECK_EQUAL(vd_engine_set_regions(rig.engine, &region, 1), 0);
        CHECK_EQUAL(vd_queue_start(rig.engine, 0, &config), -EFAULT);
    }
    rig_close(&rig);
}

BOTH(memory_at_the_top_of_the_address_space_works)
{
    struct rig rig;

    rig_open(&rig, (struct plan){ .iova = UINT64_MAX - 8 * MIB + 1 });
    struct blk b = blk_new(&rig, 0);

    b.data = rig.driver.base + 8 * MIB - 512;
    pattern(b.data, 512, 1);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_OUT, 0, 512), VIRTIO_BLK_S_OK);
    memset(b.data, 0, 512);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_IN, 0, 512), VIRTIO_BLK_S_OK);
    CHECK(is_pattern(b.data, 512, 1));
    rig_close(&rig);
}

BOTH(a_buffer_may_not_go_on_from_the_top_of_the_address_space_at_its_bottom)
{
    struct rig rig;

    rig_open(&rig, (struct plan){ .no_start = true });
    struct vd_region regions[] = { rig.driver.regions[0], { UINT64_MAX - 4095, 4096, 0, rig.driver.fd, 1 } };
    CHECK_EQUAL(vd_engine_set_regions(rig.engine, regions, 2), 0);
    CHECK_EQUAL(rig_start(&rig, 0), 0);
    struct dqueue *q = &rig.q[0];
    good_chain(&rig);
    q->desc[1].addr = UINT64_MAX - 255;
    make_available(q, 0);
    expect_fault(&rig, VD_FAULT_CHAIN);
    rig_close(&rig);
}

BOTH(a_header_that_is_too_short_fails_the_request_alone)
{
    struct rig rig;

    rig_open(&rig, (struct plan){ 0 });
    struct dqueue *q = &rig.q[0];

    for (uint32_t length = 0; length < 16; length++) {
        struct blk b = blk_new(&rig, 512);
        struct piece pieces[] = { { driver_iova(q->d, b.header), length, false }, { driver_iova(q->d, b.data), 513, true } };

        b.data[512] = 0xff;
        CHECK(dqueue_add(q, pieces, 2, &b));
        dqueue_kick(q);
        b.status = b.data + 512;
        CHECK_EQUAL(blk_finish(q, &b), VIRTIO_BLK_S_IOERR);
    }
    CHECK_EQUAL(rig_stats(&rig, 0).malformed, 16);
    CHECK_EQUAL(rig_stats(&rig, 0).fault, VD_FAULT_NONE);
    blk_prove(&rig, 0);
    rig_close(&rig);
}

BOTH(empty_descriptors_in_a_good_chain_do_no_harm)
{
    struct rig rig;

    rig_open(&rig, (struct plan){ 0 });
    struct dqueue *q = &rig.q[0];
    struct blk b = blk_new(&rig, 512);
    /* Addresses of empty descriptors mean nothing. */
    struct piece pieces[] = { { 1ull << 60, 0, false },
                              { driver_iova(q->d, b.header), 16, false },
                              { UINT64_MAX, 0, false },
                              { driver_iova(q->d, b.data), 512, true },
                              { 0, 0, true },
                              { driver_iova(q->d, b.status), 1, true },
                              { 7, 0, true } };

    *b.header = (struct virtio_blk_outhdr){ .type = VIRTIO_BLK_T_IN, .sector = 3 };
    *b.status = 0xff;
    CHECK(dqueue_add(q, pieces, 7, &b));
    dqueue_kick(q);
    CHECK_EQUAL(blk_finish(q, &b), VIRTIO_BLK_S_OK);
    rig_close(&rig);
}

BOTH(one_buffer_used_by_many_descriptors_makes_no_huge_allocation)
{
    struct rig rig;

    /* 60 pieces of 7 MiB each: far beyond the capacity, and refused for that. */
    rig_open(&rig, (struct plan){ 0 });
    struct dqueue *q = &rig.q[0];
    struct blk b = blk_new(&rig, 512);
    struct piece pieces[62] = { { driver_iova(q->d, b.header), 16, false } };

    for (int i = 1; i < 61; i++)
        pieces[i] = (struct piece){ 0, 7 * MIB, false };
    pieces[61] = (struct piece){ driver_iova(q->d, b.status), 1, true };
    *b.header = (struct virtio_blk_outhdr){ .type = VIRTIO_BLK_T_OUT };
    CHECK(dqueue_add(q, pieces, 62, &b));
    dqueue_kick(q);
    CHECK_EQUAL(blk_finish(q, &b), VIRTIO_BLK_S_IOERR);
    blk_prove(&rig, 0);
    rig_close(&rig);
}

BOTH(a_fault_of_one_queue_leaves_the_others_alone)
{
    struct rig rig;

    rig_open(&rig, (struct plan){ .queues = 2 });
    good_chain(&rig);
    make_available(&rig.q[0], 99);
    WAIT_FOR(rig_stats(&rig, 0).fault == VD_FAULT_HEAD);
    blk_prove(&rig, 1);
    expect_fault(&rig, VD_FAULT_HEAD);
    blk_prove(&rig, 1);
    rig_close(&rig);
}

BOTH(requests_in_flight_at_a_fault_end_without_being_shown)
{
    struct rig rig;

    rig_open(&rig, (struct plan){ .size = 128 });
    struct dqueue *q = &rig.q[0];
    static struct blk blks[32];

    for (int round = 0; round < 30; round++) {
        for (int i = 0; i < 32; i++) {
            if (!round)
                blks[i] = blk_new(&rig, 16384);
            blk_send(q, &blks[i], VIRTIO_BLK_T_OUT, (uint32_t)i * 32, 16384);
        }
        make_available(q, 0xfff0);
        WAIT_FOR(rig_stats(&rig, 0).fault == VD_FAULT_HEAD);
        WAIT_FOR(rig_stats(&rig, 0).in_flight == 0);
        rig_stop(&rig, 0);
        dqueue_reset(q, (uint16_t)round);
        CHECK_EQUAL(rig_start(&rig, 0), 0);
    }
    blk_prove(&rig, 0);
    rig_close(&rig);
}
