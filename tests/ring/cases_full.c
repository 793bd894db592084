/* Images that end under us: the request fails, and nothing else does. What passes is in cases_waiting.c. */
#include <errno.h>
#include <signal.h>
#include <sys/resource.h>

#include "harness.h"

CASE(an_image_cut_short_under_us_fails_the_request_and_is_reported)
{
    struct rig rig;
    struct vd_failure failure;
    uint64_t events;

    rig_open(&rig, (struct plan){ 0 });
    struct blk b = blk_new(&rig, 65536);
    vd_engine_failure(rig.engine, &failure);
    CHECK_EQUAL(failure.count, 0);
    CHECK(!ftruncate(rig.image_fd, MIB));
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_IN, 2048 + 64, 65536), VIRTIO_BLK_S_IOERR);
    vd_engine_failure(rig.engine, &failure);
    CHECK_EQUAL(failure.count, 1);
    CHECK_EQUAL(failure.offset_bytes, MIB + 64 * 512);
    CHECK_EQUAL(failure.operation, VD_READ);
    CHECK_EQUAL(failure.error, EIO);
    CHECK(read(rig.event_fd, &events, 8) == 8);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_IN, 2048 - 16, 65536), VIRTIO_BLK_S_IOERR); /* half of it is there */
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_IN, 2048 - 128, 65536), VIRTIO_BLK_S_OK);
    CHECK_EQUAL(rig_stats(&rig, 0).operations[VD_READ].errors, 2);
    CHECK_EQUAL(rig_stats(&rig, 0).malformed, 0);
    rig_close(&rig);
}

CASE(a_write_past_the_limit_of_file_sizes_fails_and_the_process_lives)
{
    struct rig rig;
    struct vd_failure failure;
    struct rlimit limit = { MIB, MIB };

    rig_open(&rig, (struct plan){ 0 });
    struct blk b = blk_new(&rig, 65536);
    signal(SIGXFSZ, SIG_IGN);
    CHECK(!setrlimit(RLIMIT_FSIZE, &limit));
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_OUT, 0, 65536), VIRTIO_BLK_S_OK);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_OUT, 4096, 65536), VIRTIO_BLK_S_IOERR);
    vd_engine_failure(rig.engine, &failure);
    CHECK_EQUAL(failure.error, EFBIG);
    rig_close(&rig);
}
