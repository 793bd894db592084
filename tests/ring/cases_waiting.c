/* Backends that are full or away, and come back: requests wait for that, and only what has no end is told as an error. */
#include <errno.h>
#include <string.h>
#include <sys/mount.h>
#include <unistd.h>

#include "queue.h"
#include "fuse_image.h"
#include "harness.h"

enum { AWAY_MS = 1500 };

static char full_directory[] = "/tmp/ring-full-XXXXXX";

static void unmount_full(void)
{
    umount2(full_directory, MNT_DETACH);
    rmdir(full_directory);
}

static void small_file_system(void)
{
    harness_private_mounts();
    CHECK(mkdtemp(full_directory));
    if (mount("ring", full_directory, "tmpfs", 0, "size=1m")) {
        rmdir(full_directory);
        harness_skip("cannot mount a small tmpfs");
    }
    harness_at_end(unmount_full);
}

/* A rig whose image is on a file system that fails on demand. */
static void fuse_rig(struct rig *rig, struct fuse_image *image, struct plan plan)
{
    fuse_image_open(image, 4 * MIB);
    plan.image = image->path;
    plan.away_ms = AWAY_MS;
    rig_open(rig, plan);
    blk_prove(rig, 0);
}

BOTH(writes_to_a_full_file_system_wait_for_room_and_reads_go_on)
{
    struct rig rig;
    struct vd_failure failure;
    uint32_t i = 0;

    small_file_system();
    rig_open(&rig, (struct plan){ .directory = full_directory, .away_ms = 60000 });
    struct blk b = blk_new(&rig, 65536), r = blk_new(&rig, 65536);
    for (;; i++) {
        CHECK_EQUAL(blk_do(&rig.q[0], &r, VIRTIO_BLK_T_FLUSH, 0, 0), VIRTIO_BLK_S_OK); /* whose request is used again */
        pattern(b.data, 65536, i);
        blk_send(&rig.q[0], &b, VIRTIO_BLK_T_OUT, i * 128, 65536);
        WAIT_FOR(rig_stats(&rig, 0).operations[VD_WRITE].count > i || rig_stats(&rig, 0).waiting);
        if (rig_stats(&rig, 0).operations[VD_WRITE].count == i)
            break;
        CHECK_EQUAL(blk_finish(&rig.q[0], &b), VIRTIO_BLK_S_OK);
    }
    CHECK(i >= 8 && i < 32);
    vd_engine_failure(rig.engine, &failure);
    CHECK_EQUAL(failure.count, 0);
    CHECK_EQUAL(failure.waits, 1);
    CHECK_EQUAL(failure.error, ENOSPC);
    CHECK_EQUAL(failure.operation, VD_WRITE);
    CHECK_EQUAL(blk_do(&rig.q[0], &r, VIRTIO_BLK_T_IN, 128, 65536), VIRTIO_BLK_S_OK);
    CHECK(is_pattern(r.data, 65536, 1));
    CHECK(!mount("ring", full_directory, "tmpfs", MS_REMOUNT, "size=8m"));
    CHECK_EQUAL(blk_finish(&rig.q[0], &b), VIRTIO_BLK_S_OK);
    CHECK_EQUAL(blk_do(&rig.q[0], &r, VIRTIO_BLK_T_IN, i * 128, 65536), VIRTIO_BLK_S_OK);
    CHECK(is_pattern(r.data, 65536, i));
    CHECK_EQUAL(rig_stats(&rig, 0).waiting, 0);
    CHECK_EQUAL(rig_stats(&rig, 0).operations[VD_WRITE].errors, 0);
    rig_close(&rig);
}

BOTH(what_a_backend_fails_is_done_when_it_is_back)
{
    struct rig rig;
    struct fuse_image image;

    fuse_rig(&rig, &image, (struct plan){ 0 });
    struct blk w = blk_new(&rig, 8192), r = blk_new(&rig, 8192);
    pattern(w.data, 8192, 5);
    fuse_image_fail(&image, EIO);
    blk_send(&rig.q[0], &w, VIRTIO_BLK_T_OUT, 512, 8192);
    blk_send(&rig.q[0], &r, VIRTIO_BLK_T_IN, 0, 8192);
    WAIT_FOR(rig_stats(&rig, 0).waiting == 2);
    CHECK(rig_stats(&rig, 0).unanswered_since_ns);
    fuse_image_fail(&image, 0);
    CHECK_EQUAL(blk_finish(&rig.q[0], &w), VIRTIO_BLK_S_OK);
    CHECK_EQUAL(blk_finish(&rig.q[0], &r), VIRTIO_BLK_S_OK);
    CHECK_EQUAL(rig_stats(&rig, 0).unanswered_since_ns, 0);
    CHECK(is_pattern(image.content + 512 * 512, 8192, 5));
    blk_prove(&rig, 0);
    rig_close(&rig);
}

CASE(a_backend_that_stays_away_is_told_of_and_one_that_is_back_is_waited_for_again)
{
    struct rig rig;
    struct fuse_image image;

    fuse_rig(&rig, &image, (struct plan){ 0 });
    struct blk b = blk_new(&rig, 4096);
    uint64_t begin = now_ns();

    fuse_image_fail(&image, EIO);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_IN, 0, 4096), VIRTIO_BLK_S_IOERR);
    CHECK(now_ns() - begin >= AWAY_MS * 1000000ull);
    CHECK(rig_stats(&rig, 0).stalled_ns >= AWAY_MS * 1000000ull);
    begin = now_ns();
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_IN, 0, 4096), VIRTIO_BLK_S_IOERR);
    CHECK(now_ns() - begin < AWAY_MS * 1000000ull); /* nobody waits once more */
    fuse_image_fail(&image, 0);
    blk_prove(&rig, 0);
    fuse_image_fail(&image, EIO);
    blk_send(&rig.q[0], &b, VIRTIO_BLK_T_IN, 0, 4096);
    WAIT_FOR(rig_stats(&rig, 0).waiting);
    fuse_image_fail(&image, 0);
    CHECK_EQUAL(blk_finish(&rig.q[0], &b), VIRTIO_BLK_S_OK);
    rig_close(&rig);
}

BOTH(a_reset_does_not_wait_for_requests_that_wait)
{
    struct rig rig;
    struct fuse_image image;

    fuse_rig(&rig, &image, (struct plan){ 0 });
    struct blk b = blk_new(&rig, 4096);

    fuse_image_fail(&image, ENOSPC);
    blk_send(&rig.q[0], &b, VIRTIO_BLK_T_OUT, 0, 4096);
    WAIT_FOR(rig_stats(&rig, 0).waiting);
    CHECK_EQUAL(vd_queue_stop(rig.engine, 0, 100), -ETIMEDOUT);
    WAIT_FOR(!load_acquire(&rig.engine->abandoned));
    CHECK_EQUAL(rig_stats(&rig, 0).waiting, 0);
    fuse_image_fail(&image, 0);
    dqueue_reset(&rig.q[0], 0);
    CHECK_EQUAL(rig_start(&rig, 0), 0);
    blk_prove(&rig, 0);
    rig_close(&rig);
}
