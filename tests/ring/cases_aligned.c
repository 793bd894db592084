/*
 * Requests that do not lie as the image's file wants them: no write is half direct and half cached in one block, and
 * what a file system or a disk cannot do is done another way.
 */
#include <errno.h>
#include <string.h>

#include "fuse_image.h"
#include "harness.h"

enum { FEW = 12 };

static void open_image(struct rig *rig, struct fuse_image *image, enum fuse_image_kind kind, struct plan plan)
{
    fuse_image_open_kind(image, 4 * MIB, kind);
    plan.image = image->path;
    rig_open(rig, plan);
}

BOTH(a_write_whose_buffer_lies_oddly_does_not_go_through_the_page_cache)
{
    struct rig rig;
    struct fuse_image image;

    open_image(&rig, &image, FUSE_IMAGE_PLAIN, (struct plan){ 0 });
    struct blk b = blk_new(&rig, 256 * 1024);

    b.data += 8;
    for (uint32_t length = 512; length <= 200 * 1024; length += 512 * 57) { /* in one piece, and in several */
        pattern(b.data, length, length);
        CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_OUT, 3, length), VIRTIO_BLK_S_OK);
        CHECK(is_pattern(image.content + 3 * 512, length, length));
        memset(b.data, 0, length);
        CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_IN, 3, length), VIRTIO_BLK_S_OK);
        CHECK(is_pattern(b.data, length, length));
    }
    CHECK_EQUAL(load_acquire(image.cached), 0);
    rig_close(&rig);
}

BOTH(many_writes_whose_buffers_lie_oddly_take_turns)
{
    struct rig rig;
    struct fuse_image image;
    static struct blk blks[FEW];

    open_image(&rig, &image, FUSE_IMAGE_PARALLEL, (struct plan){ 0 });
    for (uint32_t i = 0; i < FEW; i++) {
        blks[i] = blk_new(&rig, 128 * 1024);
        blks[i].data += 4;
        pattern(blks[i].data, 90 * 1024, i);
        blk_send(&rig.q[0], &blks[i], VIRTIO_BLK_T_OUT, i * 180, 90 * 1024);
    }
    for (uint32_t i = 0; i < FEW; i++)
        CHECK_EQUAL(blk_finish(&rig.q[0], &blks[i]), VIRTIO_BLK_S_OK);
    for (uint32_t i = 0; i < FEW; i++)
        CHECK(is_pattern(image.content + i * 180 * 512, 90 * 1024, i));
    rig_close(&rig);
}

BOTH(writes_that_wait_for_their_turn_are_given_up_with_the_one_that_hangs)
{
    struct rig rig;
    struct fuse_image image;
    static struct blk blks[FEW];

    open_image(&rig, &image, FUSE_IMAGE_PARALLEL, (struct plan){ 0 });
    fuse_image_stall(&image, true);
    for (uint32_t i = 0; i < FEW; i++) {
        blks[i] = blk_new(&rig, 8192);
        blks[i].data += 4;
        memset(blks[i].data, 0x44, 4096);
        blk_send(&rig.q[0], &blks[i], VIRTIO_BLK_T_OUT, 800 + i * 8, 4096);
    }
    WAIT_FOR(fuse_image_stalled(&image));
    CHECK_EQUAL(vd_queue_stop(rig.engine, 0, 20), -ETIMEDOUT);
    fuse_image_stall(&image, false);
    WAIT_FOR(!vd_engine_abandoned(rig.engine));
    for (uint32_t i = 0; i < FEW; i++)
        CHECK_EQUAL(*blks[i].status, 0xff);
    CHECK_EQUAL(image.content[808 * 512], 0); /* those that waited never began */
    dqueue_reset(&rig.q[0], 0);
    CHECK_EQUAL(rig_start(&rig, 0), 0);
    blk_prove(&rig, 0);
    rig_close(&rig);
}

BOTH(neighbours_in_one_block_do_not_lose_what_the_other_wrote)
{
    struct rig rig;
    uint8_t block[1024];

    rig_open(&rig, (struct plan){ .queues = 2 });
    struct blk well = blk_new(&rig, 4096), oddly = blk_new(&rig, 4096);

    oddly.data += 4;
    for (uint32_t i = 0; i < 300; i++) {
        memset(well.data, 2 * i, 512);
        memset(oddly.data, 2 * i + 1, 512);
        blk_send(&rig.q[0], &well, VIRTIO_BLK_T_OUT, 0, 512);
        blk_send(&rig.q[1], &oddly, VIRTIO_BLK_T_OUT, 1, 512);
        CHECK_EQUAL(blk_finish(&rig.q[0], &well), VIRTIO_BLK_S_OK);
        CHECK_EQUAL(blk_finish(&rig.q[1], &oddly), VIRTIO_BLK_S_OK);
        CHECK_EQUAL(blk_do(&rig.q[0], &well, VIRTIO_BLK_T_FLUSH, 0, 0), VIRTIO_BLK_S_OK);
        image_read(&rig, block, sizeof(block), 0);
        CHECK(is_byte(block, 512, (uint8_t)(2 * i)) && is_byte(block + 512, 512, (uint8_t)(2 * i + 1)));
    }
    rig_close(&rig);
}

BOTH(a_file_of_larger_blocks_than_the_volumes_is_never_written_directly)
{
    struct rig rig;
    struct fuse_image image;
    struct vd_backend_info info;

    open_image(&rig, &image, FUSE_IMAGE_WRITEBACK, (struct plan){ 0 });
    vd_engine_backend_info(rig.engine, &info);
    CHECK(!info.direct);
    struct blk b = blk_new(&rig, 4096);

    memset(b.data, 0x31, 512);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_OUT, 9, 512), VIRTIO_BLK_S_OK);
    memset(b.data, 0x32, 4096);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_OUT, 16, 4096), VIRTIO_BLK_S_OK);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_FLUSH, 0, 0), VIRTIO_BLK_S_OK);
    CHECK(is_byte(image.content + 9 * 512, 512, 0x31) && is_byte(image.content + 16 * 512, 4096, 0x32));
    rig_close(&rig);
}

BOTH(a_part_of_a_block_is_refused_where_blocks_are_written_directly)
{
    struct rig rig;
    struct fuse_image image;
    struct vd_backend_info info;

    open_image(&rig, &image, FUSE_IMAGE_WRITEBACK, (struct plan){ .block_bytes = 4096 });
    vd_engine_backend_info(rig.engine, &info);
    CHECK(info.direct);
    struct blk b = blk_new(&rig, 4096);

    memset(b.data, 0x33, 4096);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_OUT, 16, 4096), VIRTIO_BLK_S_OK);
    CHECK_EQUAL(image.content[16 * 512], 0x33);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_OUT, 9, 512), VIRTIO_BLK_S_IOERR);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_IN, 17, 512), VIRTIO_BLK_S_OK);
    CHECK(is_byte(b.data, 512, 0x33));
    rig_close(&rig);
}

static uint8_t extent(struct rig *rig, struct blk *b, uint32_t type, uint64_t sector, uint32_t sectors)
{
    *(struct virtio_blk_discard_write_zeroes *)b->data = (struct virtio_blk_discard_write_zeroes){ sector, sectors, 0 };
    return blk_do(&rig->q[0], b, type, 0, 16);
}

BOTH(what_a_file_system_cannot_zero_is_written_and_what_it_cannot_discard_stays)
{
    static const int32_t answers[] = { EINVAL, EOPNOTSUPP, ENOSYS };

    struct rig rig;
    struct fuse_image image;

    open_image(&rig, &image, FUSE_IMAGE_PLAIN, (struct plan){ 0 });
    struct blk b = blk_new(&rig, 4096);

    for (int i = 0; i < 3; i++) {
        store_release(image.zeroing, answers[i]);
        memset(image.content, 0x34, 4 * MIB);
        CHECK_EQUAL(extent(&rig, &b, VIRTIO_BLK_T_DISCARD, 16, 8), VIRTIO_BLK_S_OK);
        CHECK_EQUAL(extent(&rig, &b, VIRTIO_BLK_T_WRITE_ZEROES, 8, 1999), VIRTIO_BLK_S_OK);
        CHECK(is_byte(image.content + 8 * 512, 1999 * 512, 0));
        CHECK_EQUAL(image.content[7 * 512], 0x34);
        CHECK_EQUAL(image.content[2007 * 512], 0x34);
    }
    rig_close(&rig);
}
