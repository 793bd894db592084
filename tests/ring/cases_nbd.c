/* The NBD backend against a server that is right, in all the protocol's dialects, and data checked by content. */
#include <string.h>

#include "queue.h"
#include "fake_nbd.h"
#include "nbd_rig.h"

static void dialect(bool structured, bool extended, bool fragments, bool holes)
{
    struct rig rig;
    struct fake_nbd s;

    fake_nbd_open(&s, 4 * MIB);
    s.structured = structured;
    s.extended = extended;
    s.fragments = fragments;
    s.holes = holes;
    nbd_rig_open(&rig, &s, (struct plan){ .event_idx = true, .size = 128 });
    nbd_exercise(&rig, &s, 120, 7);
    rig_close(&rig);
    CHECK_EQUAL(s.violations, 0);
    fake_nbd_close(&s);
}

BOTH(nbd_reads_and_writes_are_right_with_simple_replies) { dialect(false, false, false, false); }
BOTH(nbd_reads_and_writes_are_right_with_structured_replies) { dialect(true, false, false, false); }
BOTH(nbd_reads_and_writes_are_right_with_fragments_in_the_wrong_order) { dialect(true, false, true, false); }
BOTH(nbd_reads_and_writes_are_right_with_holes) { dialect(true, false, true, true); }
BOTH(nbd_reads_and_writes_are_right_with_extended_headers) { dialect(true, true, true, true); }

BOTH(nbd_answers_in_the_opposite_order_end_where_they_belong)
{
    struct rig rig;
    struct fake_nbd s;

    fake_nbd_open(&s, 4 * MIB);
    s.reverse = true;
    nbd_rig_open(&rig, &s, (struct plan){ .event_idx = true, .size = 256 });
    nbd_exercise(&rig, &s, 100, 8);
    CHECK(rig_stats(&rig, 0).remote.copied_bytes > 0);
    rig_close(&rig);
    CHECK_EQUAL(s.violations, 0);
    fake_nbd_close(&s);
}

CASE(nbd_answers_in_order_are_never_copied)
{
    struct rig rig;
    struct fake_nbd s;

    fake_nbd_open(&s, 4 * MIB);
    nbd_rig_open(&rig, &s, (struct plan){ .size = 64 });
    struct blk b = blk_new(&rig, 65536);

    for (int i = 0; i < 50; i++) {
        fake_nbd_settle(&s);
        pattern(s.image + 4096, 65536, (uint64_t)i);
        fake_nbd_settle(&s);
        CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_IN, 8, 65536), VIRTIO_BLK_S_OK);
        CHECK(is_pattern(b.data, 65536, (uint64_t)i));
    }
    CHECK_EQUAL(rig_stats(&rig, 0).remote.copied_bytes, 0);
    CHECK_EQUAL(rig_stats(&rig, 0).remote.received_bytes, 50 * 65536);
    rig_close(&rig);
    fake_nbd_close(&s);
}

CASE(nbd_requests_larger_than_the_servers_maximum_are_split)
{
    struct rig rig;
    struct fake_nbd s;

    fake_nbd_open(&s, 4 * MIB);
    s.max_payload = 8192;
    nbd_rig_open(&rig, &s, (struct plan){ .size = 64 });
    struct blk b = blk_new(&rig, 100 * 1024);

    pattern(b.data, 100 * 1024, 3);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_OUT, 8, 100 * 1024), VIRTIO_BLK_S_OK);
    CHECK_EQUAL(load_relaxed(&s.writes), 13);
    fake_nbd_settle(&s);
    CHECK(is_pattern(s.image + 4096, 100 * 1024, 3));
    memset(b.data, 0, 100 * 1024);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_IN, 8, 100 * 1024), VIRTIO_BLK_S_OK);
    CHECK(is_pattern(b.data, 100 * 1024, 3));
    rig_close(&rig);
    CHECK_EQUAL(s.violations, 0);
    fake_nbd_close(&s);
}

/* One extent of a discard or of zeroing. */
static uint8_t clear(struct rig *rig, uint32_t type, uint64_t sector, uint32_t sectors, bool unmap)
{
    struct blk b = blk_new(rig, 4096);
    struct virtio_blk_discard_write_zeroes segment = { .sector = sector, .num_sectors = sectors, .flags = unmap };

    memcpy(b.data, &segment, sizeof(segment));
    return blk_do(&rig->q[0], &b, type, 0, sizeof(segment));
}

CASE(nbd_what_the_server_offers_is_used)
{
    struct rig rig;
    struct fake_nbd s;

    fake_nbd_open(&s, 4 * MIB);
    nbd_rig_open(&rig, &s, (struct plan){ .size = 64 });
    struct blk b = blk_new(&rig, 4096);

    memset(s.image, 0x77, 4 * MIB);
    fake_nbd_settle(&s);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_FLUSH, 0, 0), VIRTIO_BLK_S_OK);
    CHECK_EQUAL(clear(&rig, VIRTIO_BLK_T_DISCARD, 0, 16, false), VIRTIO_BLK_S_OK);
    CHECK_EQUAL(clear(&rig, VIRTIO_BLK_T_WRITE_ZEROES, 64, 16, false), VIRTIO_BLK_S_OK);
    CHECK_EQUAL(clear(&rig, VIRTIO_BLK_T_WRITE_ZEROES, 128, 16, true), VIRTIO_BLK_S_OK);
    fake_nbd_settle(&s);
    CHECK_EQUAL(s.flushes, 1);
    CHECK_EQUAL(s.trims, 1);
    CHECK_EQUAL(s.zeroes, 2);
    CHECK_EQUAL(s.no_holes, 1);
    CHECK_EQUAL(s.writes, 0);
    CHECK(is_byte(s.image + 64 * 512, 8192, 0) && is_byte(s.image + 80 * 512, 512, 0x77));
    CHECK_EQUAL(s.fuas, 0);
    rig_close(&rig);
    fake_nbd_close(&s);
}

CASE(nbd_what_the_server_does_not_offer_is_done_otherwise_or_left_out)
{
    struct rig rig;
    struct fake_nbd s;

    fake_nbd_open(&s, 4 * MIB);
    s.flags = NBD_FLAG_HAS_FLAGS;
    nbd_rig_open(&rig, &s, (struct plan){ .size = 64 });
    struct blk b = blk_new(&rig, 4096);

    memset(s.image, 0x77, 4 * MIB);
    fake_nbd_settle(&s);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_FLUSH, 0, 0), VIRTIO_BLK_S_OK);
    CHECK_EQUAL(clear(&rig, VIRTIO_BLK_T_DISCARD, 0, 16, false), VIRTIO_BLK_S_OK);
    CHECK_EQUAL(clear(&rig, VIRTIO_BLK_T_WRITE_ZEROES, 64, 2048, true), VIRTIO_BLK_S_OK);
    fake_nbd_settle(&s);
    CHECK_EQUAL(s.flushes + s.trims + s.zeroes, 0);
    CHECK_EQUAL(s.writes, 4);
    CHECK(is_byte(s.image + 64 * 512, MIB, 0) && is_byte(s.image, 64 * 512, 0x77) &&
          is_byte(s.image + 64 * 512 + MIB, 512, 0x77));
    rig_close(&rig);
    CHECK_EQUAL(s.violations, 0);
    fake_nbd_close(&s);
}

CASE(nbd_writes_of_a_driver_without_flush_are_stable_when_they_complete)
{
    struct rig rig;
    struct fake_nbd s;

    fake_nbd_open(&s, 4 * MIB);
    nbd_rig_open(&rig, &s, (struct plan){ .size = 64, .no_flush = true });
    struct blk b = blk_new(&rig, 4096);

    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_OUT, 0, 4096), VIRTIO_BLK_S_OK);
    fake_nbd_settle(&s);
    CHECK_EQUAL(s.fuas, 1);
    CHECK_EQUAL(s.flushes, 0);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_IN, 0, 4096), VIRTIO_BLK_S_OK);
    rig_close(&rig);
    fake_nbd_kill(&s);
    s.flags &= (uint16_t)~NBD_FLAG_FUA;
    fake_nbd_restart(&s);
    nbd_rig_open(&rig, &s, (struct plan){ .size = 64, .no_flush = true });
    b = blk_new(&rig, 4096);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_OUT, 0, 4096), VIRTIO_BLK_S_OK);
    fake_nbd_settle(&s);
    CHECK_EQUAL(s.fuas, 1);
    CHECK_EQUAL(s.flushes, 1);
    rig_close(&rig);
    fake_nbd_close(&s);
}

CASE(nbd_each_queue_has_a_connection_of_its_own)
{
    struct rig rig;
    struct fake_nbd s;

    fake_nbd_open(&s, 4 * MIB);
    nbd_rig_open(&rig, &s, (struct plan){ .size = 64, .queues = 3 });
    for (uint32_t i = 0; i < 3; i++)
        blk_prove(&rig, i);
    CHECK_EQUAL(load_relaxed(&s.connections), 3); /* the one that open made is among them */
    rig_close(&rig);
    fake_nbd_close(&s);
}

CASE(nbd_several_queues_are_refused_where_the_server_allows_one_connection)
{
    struct rig rig;
    struct fake_nbd s;

    fake_nbd_open(&s, 4 * MIB);
    s.flags &= (uint16_t)~NBD_FLAG_MULTI_CONN;
    nbd_rig_plan(&rig, &s, (struct plan){ .size = 64, .queues = 2 });
    CHECK_EQUAL(vd_engine_new(&rig.config, &rig.engine), -EMLINK);
    CHECK(strstr(rig.config.reason, "MULTI_CONN"));
    fake_nbd_close(&s);
}

CASE(nbd_an_export_that_is_too_small_or_read_only_or_unknown_is_refused)
{
    struct rig rig;
    struct fake_nbd s;

    fake_nbd_open(&s, 4 * MIB);
    nbd_rig_plan(&rig, &s, (struct plan){ .size = 64, .capacity = 8 * MIB });
    CHECK_EQUAL(vd_engine_new(&rig.config, &rig.engine), -ENOSPC);
    s.flags |= NBD_FLAG_READ_ONLY;
    rig.config.capacity_bytes = 4 * MIB;
    CHECK_EQUAL(vd_engine_new(&rig.config, &rig.engine), -EROFS);
    rig.config.read_only = 1;
    CHECK_EQUAL(vd_engine_new(&rig.config, &rig.engine), 0);
    vd_engine_free(rig.engine);
    store_relaxed(&s.refuse, true);
    CHECK_EQUAL(vd_engine_new(&rig.config, &rig.engine), -ENOENT);
    fake_nbd_close(&s);
}

CASE(nbd_a_volume_grows_when_the_server_says_so)
{
    struct rig rig;
    struct fake_nbd s;

    fake_nbd_open(&s, 4 * MIB);
    nbd_rig_open(&rig, &s, (struct plan){ .size = 64, .capacity = 2 * MIB });
    struct blk b = blk_new(&rig, 4096);

    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_IN, 3 * MIB / 512, 4096), VIRTIO_BLK_S_IOERR);
    CHECK_EQUAL(vd_engine_set_capacity(rig.engine, 5 * MIB), -EINVAL);
    CHECK_EQUAL(vd_engine_set_capacity(rig.engine, 4 * MIB), 0);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_IN, 3 * MIB / 512, 4096), VIRTIO_BLK_S_OK);
    rig_close(&rig);
    fake_nbd_close(&s);
}

BOTH(nbd_what_lies_beyond_the_old_size_is_not_asked_for_on_an_old_connection)
{
    struct rig rig;
    struct fake_nbd s;

    fake_nbd_open(&s, 8 * MIB);
    s.size = 4 * MIB;
    nbd_rig_open(&rig, &s, (struct plan){ .size = 64, .queues = 3 });
    struct blk before = blk_new(&rig, 8192), beyond = blk_new(&rig, 8192);

    blk_prove(&rig, 0);
    blk_prove(&rig, 1);
    WAIT_FOR(rig_stats(&rig, 2).remote.connected); /* it is idle, and has a connection all the same */
    store_relaxed(&s.hold, true);
    store_relaxed(&s.reads, 0);
    blk_send(&rig.q[0], &before, VIRTIO_BLK_T_IN, 16, 8192);
    WAIT_FOR(load_relaxed(&s.reads));
    store_relaxed(&s.size, 8 * MIB);
    CHECK_EQUAL(vd_engine_set_capacity(rig.engine, 8 * MIB), 0);
    pattern(beyond.data, 8192, 5);
    blk_send(&rig.q[0], &beyond, VIRTIO_BLK_T_OUT, 6 * MIB / 512, 8192);
    store_relaxed(&s.hold, false);
    CHECK_EQUAL(blk_finish(&rig.q[0], &before), VIRTIO_BLK_S_OK);
    CHECK_EQUAL(blk_finish(&rig.q[0], &beyond), VIRTIO_BLK_S_OK);
    for (uint32_t i = 0; i < 3; i++) {
        memset(beyond.data, 0, 8192);
        CHECK_EQUAL(blk_do(&rig.q[i], &beyond, VIRTIO_BLK_T_IN, 6 * MIB / 512, 8192), VIRTIO_BLK_S_OK);
        CHECK(is_pattern(beyond.data, 8192, 5));
        CHECK_EQUAL(rig_stats(&rig, i).remote.losses, 0);
        CHECK_EQUAL(rig_stats(&rig, i).remote.resent, 0);
    }
    CHECK_EQUAL(load_relaxed(&s.connections), 7); /* one of each queue, twice, and one to ask for the size */
    rig_close(&rig);
    CHECK_EQUAL(s.violations, 0);
    fake_nbd_close(&s);
}

enum { BLOCK = 4096, SECTORS_OF_BLOCK = BLOCK / 512 };

/* Two queues write every other sector of the same blocks, one of them sometimes a whole neighbour: nobody undoes anybody's. */
BOTH(nbd_parts_of_large_blocks_are_changed_without_undoing_what_others_write)
{
    struct rig rig;
    struct fake_nbd s;
    static struct blk blks[2][SECTORS_OF_BLOCK * 4];

    fake_nbd_open(&s, 4 * MIB);
    s.min_block = BLOCK;
    nbd_rig_open(&rig, &s, (struct plan){ .size = 128, .queues = 2 });
    for (int round = 0; round < 8; round++) {
        for (uint32_t i = 0; i < SECTORS_OF_BLOCK * 4; i++) {
            struct blk *b = &blks[i % 2][i / 2];

            if (!round)
                *b = blk_new(&rig, 512);
            pattern(b->data, 512, (uint64_t)round * 1000 + i);
            blk_send(&rig.q[i % 2], b, VIRTIO_BLK_T_OUT, 16 + i, 512);
        }
        for (uint32_t i = 0; i < SECTORS_OF_BLOCK * 4; i++)
            CHECK_EQUAL(blk_finish(&rig.q[i % 2], &blks[i % 2][i / 2]), VIRTIO_BLK_S_OK);
        fake_nbd_settle(&s);
        for (uint32_t i = 0; i < SECTORS_OF_BLOCK * 4; i++)
            CHECK(is_pattern(s.image + (16 + i) * 512, 512, (uint64_t)round * 1000 + i));
        fake_nbd_settle(&s);
    }
    rig_close(&rig);
    CHECK_EQUAL(s.violations, 0);
    fake_nbd_close(&s);
}

CASE(nbd_the_end_of_an_export_that_is_no_whole_block_is_not_offered)
{
    struct rig rig;
    struct fake_nbd s;

    fake_nbd_open(&s, 4 * MIB);
    s.min_block = BLOCK;
    s.size = 4 * MIB - 512;
    nbd_rig_plan(&rig, &s, (struct plan){ .size = 64 });
    CHECK_EQUAL(vd_engine_new(&rig.config, &rig.engine), -ENOSPC);
    nbd_rig_open(&rig, &s, (struct plan){ .size = 64, .capacity = 4 * MIB - BLOCK });
    blk_prove(&rig, 0);
    rig_close(&rig);
    fake_nbd_close(&s);
}

CASE(nbd_requests_across_large_blocks_are_right_at_both_ends)
{
    struct rig rig;
    struct fake_nbd s;

    fake_nbd_open(&s, 4 * MIB);
    s.min_block = BLOCK;
    nbd_rig_open(&rig, &s, (struct plan){ .size = 64 });
    struct blk b = blk_new(&rig, 5 * BLOCK);

    memset(s.image, 0x77, 4 * MIB);
    fake_nbd_settle(&s);
    for (uint32_t begin = 1; begin < SECTORS_OF_BLOCK; begin += 3)
        for (uint32_t sectors = 1; sectors < 4 * SECTORS_OF_BLOCK; sectors += 5) {
            pattern(b.data, sectors * 512, begin * 100 + sectors);
            CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_OUT, begin, sectors * 512), VIRTIO_BLK_S_OK);
            memset(b.data, 0, sectors * 512);
            CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_IN, begin, sectors * 512), VIRTIO_BLK_S_OK);
            CHECK(is_pattern(b.data, sectors * 512, begin * 100 + sectors));
            CHECK_EQUAL(clear(&rig, VIRTIO_BLK_T_WRITE_ZEROES, begin, sectors, true), VIRTIO_BLK_S_OK);
            CHECK_EQUAL(clear(&rig, VIRTIO_BLK_T_DISCARD, begin, sectors, false), VIRTIO_BLK_S_OK);
            fake_nbd_settle(&s);
            CHECK(is_byte(s.image, begin * 512, 0x77) && is_byte(s.image + begin * 512, sectors * 512, 0) &&
                  is_byte(s.image + (begin + sectors) * 512, BLOCK, 0x77));
            memset(s.image, 0x77, 8 * BLOCK);
            fake_nbd_settle(&s);
        }
    rig_close(&rig);
    CHECK_EQUAL(s.violations, 0);
    fake_nbd_close(&s);
}
