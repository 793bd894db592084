/*
 * What FLUSH has answered is stable: an error of writing back is heard by every queue, however many flush at once, and
 * no later FLUSH takes it back.
 */
#include <errno.h>
#include <string.h>

#include "fuse_image.h"
#include "harness.h"

static void open_image(struct rig *rig, struct fuse_image *image, enum fuse_image_kind kind, struct plan plan)
{
    fuse_image_open_kind(image, 4 * MIB, kind);
    plan.image = image->path;
    plan.away_ms = 60000;
    rig_open(rig, plan);
}

static uint8_t flush(struct rig *rig, uint32_t queue)
{
    struct blk b = blk_new(rig, 0);

    return blk_do(&rig->q[queue], &b, VIRTIO_BLK_T_FLUSH, 0, 0);
}

BOTH(a_flush_that_failed_is_not_tried_again_and_none_after_it_succeeds)
{
    struct rig rig;
    struct fuse_image image;

    open_image(&rig, &image, FUSE_IMAGE_PLAIN, (struct plan){ .queues = 2 });
    blk_prove(&rig, 0);
    CHECK_EQUAL(flush(&rig, 0), VIRTIO_BLK_S_OK);
    fuse_image_fail(&image, EIO);
    CHECK_EQUAL(flush(&rig, 0), VIRTIO_BLK_S_IOERR);
    fuse_image_fail(&image, 0);
    CHECK_EQUAL(flush(&rig, 0), VIRTIO_BLK_S_IOERR);
    CHECK_EQUAL(flush(&rig, 1), VIRTIO_BLK_S_IOERR);
    blk_prove(&rig, 0); /* the rest of it goes on: the driver decides */
    rig_stop(&rig, 0);
    rig_stop(&rig, 1);
    vd_engine_free(rig.engine); /* opened anew, it is like new */
    CHECK_EQUAL(vd_engine_new(&rig.config, &rig.engine), 0);
    CHECK_EQUAL(vd_engine_set_regions(rig.engine, rig.driver.regions, rig.driver.region_count), 0);
    for (uint32_t i = 0; i < 2; i++) {
        dqueue_reset(&rig.q[i], 0);
        CHECK_EQUAL(rig_start(&rig, i), 0);
    }
    CHECK_EQUAL(flush(&rig, 1), VIRTIO_BLK_S_OK);
    rig_close(&rig);
}

BOTH(every_flush_under_way_hears_of_what_could_not_be_written_back)
{
    struct rig rig;
    struct fuse_image image;

    open_image(&rig, &image, FUSE_IMAGE_WRITEBACK, (struct plan){ .queues = 2 });
    struct blk w = blk_new(&rig, 4096), flushes[] = { blk_new(&rig, 0), blk_new(&rig, 0), blk_new(&rig, 0) };

    memset(w.data, 0x71, 4096);
    CHECK_EQUAL(blk_do(&rig.q[0], &w, VIRTIO_BLK_T_OUT, 800, 4096), VIRTIO_BLK_S_OK);
    CHECK_EQUAL(image.content[800 * 512], 0); /* it is in the page cache */
    fuse_image_stall(&image, true);
    blk_send(&rig.q[0], &flushes[0], VIRTIO_BLK_T_FLUSH, 0, 0);
    WAIT_FOR(fuse_image_stalled(&image)); /* the write back */
    blk_send(&rig.q[1], &flushes[1], VIRTIO_BLK_T_FLUSH, 0, 0);
    blk_send(&rig.q[1], &flushes[2], VIRTIO_BLK_T_FLUSH, 0, 0);
    WAIT_FOR(rig_stats(&rig, 1).in_flight == 2);
    CHECK(!dqueue_wait(&rig.q[1], 50));
    fuse_image_fail(&image, EIO);
    fuse_image_stall(&image, false);
    WAIT_FOR(!fuse_image_stalled(&image));
    fuse_image_fail(&image, 0);
    CHECK_EQUAL(blk_finish(&rig.q[0], &flushes[0]), VIRTIO_BLK_S_IOERR);
    CHECK_EQUAL(blk_finish(&rig.q[1], &flushes[1]), VIRTIO_BLK_S_IOERR);
    CHECK_EQUAL(blk_finish(&rig.q[1], &flushes[2]), VIRTIO_BLK_S_IOERR);
    rig_close(&rig);
}

BOTH(a_driver_that_cannot_flush_is_told_when_its_write_is_not_stable)
{
    struct rig rig;
    struct fuse_image image;

    open_image(&rig, &image, FUSE_IMAGE_WRITEBACK, (struct plan){ .no_flush = true });
    struct blk w = blk_new(&rig, 4096);

    memset(w.data, 0x72, 4096);
    CHECK_EQUAL(blk_do(&rig.q[0], &w, VIRTIO_BLK_T_OUT, 800, 4096), VIRTIO_BLK_S_OK);
    CHECK_EQUAL(image.content[800 * 512], 0x72);
    fuse_image_fail(&image, EIO);
    CHECK_EQUAL(blk_do(&rig.q[0], &w, VIRTIO_BLK_T_OUT, 800, 4096), VIRTIO_BLK_S_IOERR);
    rig_close(&rig);
}

BOTH(flushes_that_come_while_one_is_under_way_are_answered_by_one_that_begins_after_it)
{
    struct rig rig;
    struct fuse_image image;
    struct blk flushes[4];

    open_image(&rig, &image, FUSE_IMAGE_PLAIN, (struct plan){ 0 });
    fuse_image_stall(&image, true);
    for (uint32_t i = 0; i < 4; i++) {
        flushes[i] = blk_new(&rig, 0);
        blk_send(&rig.q[0], &flushes[i], VIRTIO_BLK_T_FLUSH, 0, 0);
        WAIT_FOR(fuse_image_stalled(&image));
    }
    WAIT_FOR(rig_stats(&rig, 0).in_flight == 4);
    CHECK_EQUAL(load_acquire(image.syncs), 1);
    fuse_image_stall(&image, false);
    for (uint32_t i = 0; i < 4; i++)
        CHECK_EQUAL(blk_finish(&rig.q[0], &flushes[i]), VIRTIO_BLK_S_OK);
    CHECK_EQUAL(load_acquire(image.syncs), 2);
    rig_close(&rig);
}

BOTH(flushes_that_wait_for_a_flush_that_hangs_are_given_up_with_it)
{
    struct rig rig;
    struct fuse_image image;

    open_image(&rig, &image, FUSE_IMAGE_PLAIN, (struct plan){ 0 });
    struct blk first = blk_new(&rig, 0), second = blk_new(&rig, 0);

    fuse_image_stall(&image, true);
    blk_send(&rig.q[0], &first, VIRTIO_BLK_T_FLUSH, 0, 0);
    WAIT_FOR(fuse_image_stalled(&image));
    blk_send(&rig.q[0], &second, VIRTIO_BLK_T_FLUSH, 0, 0);
    WAIT_FOR(rig_stats(&rig, 0).in_flight == 2);
    CHECK_EQUAL(vd_queue_stop(rig.engine, 0, 20), -ETIMEDOUT);
    fuse_image_stall(&image, false);
    WAIT_FOR(!vd_engine_abandoned(rig.engine));
    CHECK_EQUAL(*first.status, 0xff);
    CHECK_EQUAL(*second.status, 0xff);
    dqueue_reset(&rig.q[0], 0);
    CHECK_EQUAL(rig_start(&rig, 0), 0);
    CHECK_EQUAL(flush(&rig, 0), VIRTIO_BLK_S_OK); /* that nobody waited is no error */
    rig_close(&rig);
}
