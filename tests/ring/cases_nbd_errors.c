/*
 * What is wrong with one request, or with the server's disk, and not with the connection: a driver's memory that is gone, a disk
 * that is full or fails, a request that its server does not survive. Each has an end, and the others do not suffer.
 */
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "queue.h"
#include "fake_nbd.h"
#include "nbd_rig.h"

enum { AWAY_MS = 1500 };

static void open_rig(struct rig *rig, struct fake_nbd *s, bool no_flush)
{
    fake_nbd_open(s, 4 * MIB);
    nbd_rig_open(rig, s, (struct plan){ .size = 64, .away_ms = AWAY_MS, .no_flush = no_flush });
    blk_prove(rig, 0);
}

/* The data of a request of so many bytes are in memory that is gone; from it on the kernel cannot read, and to it not write. */
static void lose_memory(uint32_t type, uint32_t bytes, uint32_t kept)
{
    struct rig rig;
    struct fake_nbd s;

    fake_nbd_open(&s, 4 * MIB);
    nbd_rig_open(&rig, &s, (struct plan){ .size = 64 });
    blk_prove(&rig, 0);
    struct blk b = blk_new(&rig, 512);
    uint64_t border = rig.driver.size - 4 * MIB;

    b.data = rig.driver.base + border - kept;
    CHECK(!ftruncate(rig.driver.fd, (off_t)border));
    blk_send(&rig.q[0], &b, type, 0, bytes);
    WAIT_FOR(rig_stats(&rig, 0).fault == VD_FAULT_MEMORY);
    WAIT_FOR(!rig_stats(&rig, 0).in_flight);
    CHECK(rig_stats(&rig, 0).remote.losses <= 1);
    CHECK_EQUAL(*b.status, 0xff); /* it is not answered, as nothing is before the reset */
    rig_stop(&rig, 0);
    CHECK(!ftruncate(rig.driver.fd, (off_t)rig.driver.size));
    dqueue_reset(&rig.q[0], 0);
    CHECK_EQUAL(rig_start(&rig, 0), 0);
    blk_prove(&rig, 0);
    rig_close(&rig);
    CHECK_EQUAL(s.violations, 0);
    fake_nbd_close(&s);
}

BOTH(nbd_a_write_from_memory_that_is_gone_is_a_fault_of_the_queue) { lose_memory(VIRTIO_BLK_T_OUT, 4096, 0); }
BOTH(nbd_a_read_into_memory_that_is_gone_is_a_fault_of_the_queue) { lose_memory(VIRTIO_BLK_T_IN, 4096, 0); }
CASE(nbd_a_write_from_memory_of_which_a_part_is_gone_is_a_fault_of_the_queue) { lose_memory(VIRTIO_BLK_T_OUT, 65536, 8192); }

/* The server's disk fails whatever is asked of it, until it does not: nothing is told to the driver, and all is done. */
static void waits_for_the_disk(uint32_t type, int error, bool no_flush)
{
    struct rig rig;
    struct fake_nbd s;
    struct vd_failure failure;

    open_rig(&rig, &s, no_flush);
    struct blk b = blk_new(&rig, 65536);

    if (type == VIRTIO_BLK_T_IN) {
        fake_nbd_settle(&s);
        pattern(s.image, 65536, 7);
        fake_nbd_settle(&s);
    } else {
        pattern(b.data, 65536, 7);
    }
    store_relaxed(&s.disk_error, (uint32_t)error);
    blk_send(&rig.q[0], &b, type, 0, 65536);
    WAIT_FOR(rig_stats(&rig, 0).waiting == 1);
    vd_engine_failure(rig.engine, &failure);
    CHECK_EQUAL(failure.waits, 1);
    CHECK_EQUAL(failure.error, error);
    store_relaxed(&s.disk_error, 0);
    CHECK_EQUAL(blk_finish(&rig.q[0], &b), VIRTIO_BLK_S_OK);
    CHECK(is_pattern(b.data, 65536, 7));
    fake_nbd_settle(&s);
    CHECK(is_pattern(s.image, 65536, 7));
    fake_nbd_settle(&s);
    CHECK_EQUAL(rig_stats(&rig, 0).waiting, 0);
    CHECK_EQUAL(rig_stats(&rig, 0).remote.losses, 0);
    blk_prove(&rig, 0);
    rig_close(&rig);
    CHECK_EQUAL(s.violations, 0);
    fake_nbd_close(&s);
}

BOTH(nbd_writes_to_a_server_that_is_full_wait_for_room) { waits_for_the_disk(VIRTIO_BLK_T_OUT, ENOSPC, false); }
CASE(nbd_reads_of_a_server_whose_disk_fails_wait_for_it) { waits_for_the_disk(VIRTIO_BLK_T_IN, EIO, false); }
CASE(nbd_stable_writes_to_a_server_whose_disk_fails_wait_for_it) { waits_for_the_disk(VIRTIO_BLK_T_OUT, EIO, true); }

CASE(nbd_what_a_server_says_of_the_request_itself_is_told_at_once)
{
    struct rig rig;
    struct fake_nbd s;

    open_rig(&rig, &s, false);
    struct blk b = blk_new(&rig, 4096);

    store_relaxed(&s.disk_error, EPERM);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_OUT, 0, 4096), VIRTIO_BLK_S_IOERR);
    CHECK_EQUAL(rig_stats(&rig, 0).waiting, 0);
    rig_close(&rig);
    fake_nbd_close(&s);
}

CASE(nbd_a_disk_that_stays_broken_is_told_of)
{
    struct rig rig;
    struct fake_nbd s;

    open_rig(&rig, &s, false);
    struct blk b = blk_new(&rig, 4096);
    uint64_t begin = now_ns();

    store_relaxed(&s.disk_error, EIO);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_OUT, 0, 4096), VIRTIO_BLK_S_IOERR);
    CHECK(now_ns() - begin >= AWAY_MS * 1000000ull);
    store_relaxed(&s.disk_error, 0);
    blk_prove(&rig, 0);
    rig_close(&rig);
    fake_nbd_close(&s);
}

CASE(nbd_a_part_of_a_block_that_waits_for_the_disk_keeps_nobody_else_from_writing)
{
    struct rig rig;
    struct fake_nbd s;

    fake_nbd_open(&s, 4 * MIB);
    s.min_block = 4096;
    nbd_rig_open(&rig, &s, (struct plan){ .size = 64, .away_ms = 60000 });
    struct blk part = blk_new(&rig, 512), whole = blk_new(&rig, 4096);

    memset(s.image, 0x77, 4096);
    fake_nbd_settle(&s);
    pattern(part.data, 512, 3);
    store_relaxed(&s.disk_error, ENOSPC);
    blk_send(&rig.q[0], &part, VIRTIO_BLK_T_OUT, 1, 512);
    WAIT_FOR(rig_stats(&rig, 0).waiting == 1);
    store_relaxed(&s.bad_end, 4096); /* from here on only there */
    CHECK_EQUAL(blk_do(&rig.q[0], &whole, VIRTIO_BLK_T_OUT, 8, 4096), VIRTIO_BLK_S_OK);
    CHECK_EQUAL(rig_stats(&rig, 0).waiting, 1);
    store_relaxed(&s.disk_error, 0);
    CHECK_EQUAL(blk_finish(&rig.q[0], &part), VIRTIO_BLK_S_OK);
    fake_nbd_settle(&s);
    CHECK(is_byte(s.image, 512, 0x77) && is_pattern(s.image + 512, 512, 3) && is_byte(s.image + 1024, 3072, 0x77));
    rig_close(&rig);
    CHECK_EQUAL(s.violations, 0);
    fake_nbd_close(&s);
}

CASE(nbd_a_flush_that_failed_is_told_at_once_and_no_later_one_is_believed)
{
    struct rig rig;
    struct fake_nbd s;

    open_rig(&rig, &s, false);
    struct blk b = blk_new(&rig, 4096);
    uint64_t begin = now_ns();

    store_relaxed(&s.disk_error, EIO);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_FLUSH, 0, 0), VIRTIO_BLK_S_IOERR);
    CHECK(now_ns() - begin < AWAY_MS * 1000000ull);
    store_relaxed(&s.disk_error, 0);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_FLUSH, 0, 0), VIRTIO_BLK_S_IOERR); /* what was lost is lost */
    blk_prove(&rig, 0);
    rig_close(&rig);
    fake_nbd_close(&s);
}

BOTH(nbd_a_request_that_its_server_does_not_survive_fails_and_the_others_are_done)
{
    struct rig rig;
    struct fake_nbd s;
    struct blk bad, good[8];

    open_rig(&rig, &s, false);
    bad = blk_new(&rig, 4096);
    store_relaxed(&s.poison, MIB + 4096);
    store_relaxed(&s.hold, true); /* so that all of them are sent when the first one is carried out */
    for (uint32_t i = 0; i < 8; i++) {
        good[i] = blk_new(&rig, 4096);
        pattern(good[i].data, 4096, i);
        if (i == 4)
            blk_send(&rig.q[0], &bad, VIRTIO_BLK_T_IN, (MIB + 4096) / 512, 4096);
        blk_send(&rig.q[0], &good[i], VIRTIO_BLK_T_OUT, 8 * i, 4096);
    }
    uint64_t begin = now_ns();

    store_relaxed(&s.hold, false);
    for (uint32_t i = 0; i < 8; i++)
        CHECK_EQUAL(blk_finish(&rig.q[0], &good[i]), VIRTIO_BLK_S_OK);
    CHECK_EQUAL(blk_finish(&rig.q[0], &bad), VIRTIO_BLK_S_IOERR);
    CHECK(now_ns() - begin >= AWAY_MS * 1000000ull);
    CHECK(rig_stats(&rig, 0).remote.losses < 20);
    fake_nbd_settle(&s);
    for (uint32_t i = 0; i < 8; i++)
        CHECK(is_pattern(s.image + i * 4096, 4096, i));
    fake_nbd_settle(&s);
    blk_prove(&rig, 0);
    rig_close(&rig);
    CHECK_EQUAL(s.violations, 0);
    fake_nbd_close(&s);
}

BOTH(nbd_a_server_that_dies_of_something_else_again_and_again_fails_nothing)
{
    struct rig rig;
    struct fake_nbd s;

    open_rig(&rig, &s, false);
    struct blk b = blk_new(&rig, 4096);

    for (int i = 0; i < 4; i++) { /* of those that come alone, each one is done the second time */
        fake_nbd_misbehave(&s, CLOSE, 0);
        CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_IN, 0, 4096), VIRTIO_BLK_S_OK);
    }
    CHECK_EQUAL(rig_stats(&rig, 0).remote.losses, 4);
    rig_close(&rig);
    fake_nbd_close(&s);
}
