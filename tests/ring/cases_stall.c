/*
 * Backends and memory that hang: control is answered in time all the same, and what was given up never touches
 * the driver's memory again.
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include "queue.h"
#include "fuse_image.h"
#include "harness.h"
#include "held_page.h"

static void open_on(struct rig *rig, struct fuse_image *image, struct plan plan)
{
    plan.image = image->path;
    rig_open(rig, plan);
    blk_prove(rig, 0);
}

/* A rig whose image is the one that can stall. */
static void stall_open(struct rig *rig, struct fuse_image *image, struct plan plan)
{
    fuse_image_open(image, 4 * MIB);
    open_on(rig, image, plan);
}

static void let_go(struct rig *rig, struct fuse_image *image)
{
    fuse_image_stall(image, false);
    WAIT_FOR(!load_acquire(&rig->engine->abandoned));
}

BOTH(a_backend_that_hangs_does_not_hold_up_a_stop_and_its_late_data_goes_nowhere)
{
    struct rig rig;
    struct fuse_image image;

    stall_open(&rig, &image, (struct plan){ .event_idx = true });
    struct dqueue *q = &rig.q[0];
    struct blk aligned = blk_new(&rig, 65536), odd = blk_new(&rig, 8192);

    odd.data += 7;
    memset(image.content, 0x31, 4 * MIB);
    fuse_image_stall(&image, true);
    blk_send(q, &odd, VIRTIO_BLK_T_IN, 3000, 4096);
    WAIT_FOR(fuse_image_stalled(&image));
    uint64_t begin = now_ns();
    CHECK_EQUAL(vd_queue_stop(rig.engine, 0, 100), -ETIMEDOUT);
    CHECK(now_ns() - begin >= 100000000 && now_ns() - begin < 10000000000);
    CHECK_EQUAL(rig_stats(&rig, 0).in_flight, 0);
    CHECK_EQUAL(rig_stats(&rig, 0).running, 0);
    /* A reset takes the map away, and the driver comes back with its memory in other use. */
    CHECK_EQUAL(vd_engine_set_regions(rig.engine, NULL, 0), 0);
    CHECK_EQUAL(vd_engine_set_regions(rig.engine, rig.driver.regions, 1), 0);
    dqueue_reset(q, 0);
    memset(odd.data, 0x66, 4096);
    *odd.status = 0x66;
    CHECK_EQUAL(rig_start(&rig, 0), 0);
    fuse_image_stall(&image, false);
    WAIT_FOR(!load_acquire(&rig.engine->abandoned));
    CHECK(is_byte(odd.data, 4096, 0x66));
    CHECK_EQUAL(*odd.status, 0x66);
    CHECK_EQUAL(dqueue_shown(q), dqueue_state(q));
    CHECK_EQUAL(blk_do(q, &aligned, VIRTIO_BLK_T_IN, 3000, 65536), VIRTIO_BLK_S_OK);
    CHECK(is_byte(aligned.data, 65536, 0x31));
    rig_close(&rig);
}

BOTH(writes_that_wait_behind_a_hang_are_never_done_with_later_data)
{
    struct rig rig;
    struct fuse_image image;
    static struct blk blks[32];

    stall_open(&rig, &image, (struct plan){ .size = 256 });
    struct dqueue *q = &rig.q[0];
    fuse_image_stall(&image, true);
    for (uint32_t i = 0; i < 32; i++) {
        blks[i] = blk_new(&rig, 4096);
        memset(blks[i].data, 0x44, 4096);
        blk_send(q, &blks[i], VIRTIO_BLK_T_OUT, 100 + i * 8, 4096);
    }
    WAIT_FOR(fuse_image_stalled(&image));
    CHECK_EQUAL(vd_queue_stop(rig.engine, 0, 50), -ETIMEDOUT); /* FUSE writes hang in the submission itself */
    CHECK_EQUAL(vd_engine_set_regions(rig.engine, NULL, 0), 0);
    CHECK_EQUAL(vd_engine_set_regions(rig.engine, rig.driver.regions, 1), 0);
    for (uint32_t i = 0; i < 32; i++)
        memset(blks[i].data, 0x55, 4096);
    let_go(&rig, &image);
    for (uint32_t i = 0; i < 32 * 4096; i++) /* done or not, never with what came later */
        CHECK(image.content[51200 + i] == 0x44 || image.content[51200 + i] == 0);
    dqueue_reset(q, 0);
    CHECK_EQUAL(rig_start(&rig, 0), 0);
    blk_prove(&rig, 0);
    rig_close(&rig);
}

BOTH(a_write_that_was_given_up_does_not_land_on_what_its_successor_wrote)
{
    struct rig rig;
    struct fuse_image image;

    fuse_image_open_kind(&image, 4 * MIB, FUSE_IMAGE_PARALLEL);
    open_on(&rig, &image, (struct plan){ .queues = 2 });
    struct blk first = blk_new(&rig, 4096), second = blk_new(&rig, 4096), other = blk_new(&rig, 4096);

    memset(first.data, 0x44, 4096);
    fuse_image_stall_one(&image);
    blk_send(&rig.q[0], &first, VIRTIO_BLK_T_OUT, 800, 4096);
    WAIT_FOR(fuse_image_stalled(&image));
    CHECK_EQUAL(vd_queue_stop(rig.engine, 0, 50), -ETIMEDOUT);
    CHECK_EQUAL(vd_queue_stop(rig.engine, 1, 50), 0);
    CHECK_EQUAL(vd_engine_set_regions(rig.engine, NULL, 0), 0);
    CHECK_EQUAL(vd_engine_set_regions(rig.engine, rig.driver.regions, 1), 0);
    for (uint32_t i = 0; i < 2; i++) {
        dqueue_reset(&rig.q[i], 0);
        CHECK_EQUAL(rig_start(&rig, i), 0);
    }
    memset(second.data, 0x55, 4096);
    memset(other.data, 0x66, 4096);
    blk_send(&rig.q[0], &second, VIRTIO_BLK_T_OUT, 800, 4096);
    blk_send(&rig.q[1], &other, VIRTIO_BLK_T_OUT, 808, 4096);
    CHECK(!dqueue_wait(&rig.q[0], 100)); /* both wait for the one that may still land, wherever they write */
    CHECK(!dqueue_wait(&rig.q[1], 0));
    CHECK_EQUAL(vd_engine_abandoned(rig.engine), 1);
    let_go(&rig, &image);
    CHECK_EQUAL(blk_finish(&rig.q[0], &second), VIRTIO_BLK_S_OK);
    CHECK_EQUAL(blk_finish(&rig.q[1], &other), VIRTIO_BLK_S_OK);
    CHECK(is_byte(image.content + 800 * 512, 4096, 0x55));
    CHECK(is_byte(image.content + 808 * 512, 4096, 0x66));
    CHECK_EQUAL(vd_engine_abandoned(rig.engine), 0);
    rig_close(&rig);
}

BOTH(many_hanging_requests_are_given_up_at_once)
{
    struct rig rig;
    struct fuse_image image;
    static struct blk blks[32];

    stall_open(&rig, &image, (struct plan){ .size = 256, .event_idx = true });
    struct dqueue *q = &rig.q[0];
    fuse_image_stall(&image, true);
    for (uint32_t i = 0; i < 32; i++) {
        blks[i] = blk_new(&rig, 0);
        blk_send(q, &blks[i], VIRTIO_BLK_T_FLUSH, 0, 0); /* these hang in the io_uring's workers */
    }
    WAIT_FOR(fuse_image_stalled(&image));
    WAIT_FOR(rig_stats(&rig, 0).in_flight == 32);
    uint32_t used = dqueue_shown(q);
    CHECK_EQUAL(vd_queue_pause(rig.engine, 0, 20), -ETIMEDOUT);
    CHECK_EQUAL(vd_queue_stop(rig.engine, 0, 20), -ETIMEDOUT);
    CHECK_EQUAL(rig_start(&rig, 0), 0); /* even in the same memory: a new life of the queue beside the old one */
    rig_stop(&rig, 0);
    let_go(&rig, &image);
    CHECK_EQUAL(dqueue_shown(q), used);
    for (uint32_t i = 0; i < 32; i++)
        CHECK_EQUAL(*blks[i].status, 0xff);
    dqueue_reset(q, 0);
    CHECK_EQUAL(rig_start(&rig, 0), 0);
    blk_prove(&rig, 0);
    rig_close(&rig);
}

BOTH(a_pause_that_times_out_completes_later_and_shows_the_results)
{
    struct rig rig;
    struct fuse_image image;

    stall_open(&rig, &image, (struct plan){ 0 });
    struct dqueue *q = &rig.q[0];
    struct blk b = blk_new(&rig, 4096), c = blk_new(&rig, 4096);

    memset(image.content, 0x32, 4 * MIB);
    fuse_image_stall(&image, true);
    blk_send(q, &b, VIRTIO_BLK_T_IN, 2000, 4096);
    WAIT_FOR(fuse_image_stalled(&image));
    CHECK_EQUAL(vd_queue_pause(rig.engine, 0, 50), -ETIMEDOUT);
    CHECK_EQUAL(rig_stats(&rig, 0).in_flight, 1);
    blk_send(q, &c, VIRTIO_BLK_T_IN, 2400, 4096);
    /* The same memory again: what is in flight goes on in the old map. */
    CHECK_EQUAL(vd_engine_set_regions(rig.engine, rig.driver.regions, 1), 0);
    fuse_image_stall(&image, false);
    CHECK_EQUAL(vd_queue_pause(rig.engine, 0, 20000), 0);
    CHECK_EQUAL(blk_finish(q, &b), VIRTIO_BLK_S_OK);
    CHECK(is_byte(b.data, 4096, 0x32));
    CHECK_EQUAL(rig_state(&rig, 0), dqueue_shown(q));
    CHECK_EQUAL(vd_queue_resume(rig.engine, 0), 0);
    CHECK_EQUAL(blk_finish(q, &c), VIRTIO_BLK_S_OK);
    rig_close(&rig);
}

BOTH(late_data_goes_nowhere_though_the_map_was_replaced_while_the_request_hung)
{
    struct rig rig;
    struct fuse_image image;

    stall_open(&rig, &image, (struct plan){ 0 });
    struct blk odd = blk_new(&rig, 8192);

    odd.data += 7;
    memset(image.content, 0x33, 4 * MIB);
    fuse_image_stall(&image, true);
    blk_send(&rig.q[0], &odd, VIRTIO_BLK_T_IN, 3000, 4096);
    WAIT_FOR(fuse_image_stalled(&image));
    for (int i = 0; i < 2; i++) { /* it goes on in the map that it began in */
        CHECK_EQUAL(vd_queue_pause(rig.engine, 0, 20), -ETIMEDOUT);
        CHECK_EQUAL(vd_engine_set_regions(rig.engine, rig.driver.regions, 1), 0);
    }
    CHECK_EQUAL(vd_queue_stop(rig.engine, 0, 20), -ETIMEDOUT);
    CHECK_EQUAL(vd_engine_set_regions(rig.engine, NULL, 0), 0);
    memset(odd.data, 0x66, 4096);
    let_go(&rig, &image);
    CHECK(is_byte(odd.data, 4096, 0x66));
    rig_close(&rig);
}

BOTH(memory_that_goes_away_under_a_slow_pause_does_not_kill_the_process)
{
    struct rig rig;
    struct fuse_image image;

    stall_open(&rig, &image, (struct plan){ 0 });
    struct dqueue *q = &rig.q[0];
    struct blk b = blk_new(&rig, 4096);

    fuse_image_stall(&image, true);
    blk_send(q, &b, VIRTIO_BLK_T_IN, 2000, 4096);
    WAIT_FOR(fuse_image_stalled(&image));
    CHECK_EQUAL(vd_queue_pause(rig.engine, 0, 50), -ETIMEDOUT);
    CHECK_EQUAL(vd_engine_set_regions(rig.engine, NULL, 0), 0);
    CHECK(!ftruncate(rig.driver.fd, 0));
    fuse_image_stall(&image, false);
    CHECK_EQUAL(vd_queue_pause(rig.engine, 0, 20000), 0); /* its status went into a page that is not there */
    rig_stop(&rig, 0);
    rig_close(&rig);
}

BOTH(an_engine_freed_while_requests_hang_leaves_them_alone)
{
    struct rig rig;
    struct fuse_image image;

    stall_open(&rig, &image, (struct plan){ .queues = 2 });
    struct blk b = blk_new(&rig, 4096);
    struct vd_engine *engine = rig.engine;

    fuse_image_stall(&image, true);
    blk_send(&rig.q[1], &b, VIRTIO_BLK_T_IN, 2000, 4096);
    WAIT_FOR(fuse_image_stalled(&image));
    CHECK_EQUAL(vd_queue_stop(engine, 0, 20000), 0);
    CHECK_EQUAL(vd_queue_stop(engine, 1, 20), -ETIMEDOUT);
    vd_engine_free(engine); /* does nothing now: somebody still uses it */
    let_go(&rig, &image);
    vd_engine_free(engine);
    for (int i = 0; i < 2; i++)
        dqueue_close(&rig.q[i]);
    driver_close(&rig.driver);
}

BOTH(a_queue_that_hangs_while_it_fetches_is_given_up_and_starts_nothing_afterwards)
{
    struct rig rig;
    struct held_page held;
    static uint8_t page[4096], image[4096];

    rig_open(&rig, (struct plan){ 0 });
    struct dqueue *q = &rig.q[0];
    struct blk b = blk_new(&rig, 512), waker = blk_new(&rig, 512);
    uint8_t *hole = driver_alloc(&rig.driver, 4096, 4096);
    struct virtio_blk_outhdr header = { .type = VIRTIO_BLK_T_OUT, .sector = 3 };
    struct piece pieces[] = { { driver_iova(q->d, hole), 16, false },
                              { driver_iova(q->d, b.data), 512, false },
                              { driver_iova(q->d, b.status), 1, true } };

    blk_prove(&rig, 0);
    hold_page(&rig, &held, hole);
    memset(b.data, 0x13, 512);
    *b.status = 0x13;
    CHECK(dqueue_add(q, pieces, 3, &b));
    blk_send(q, &waker, VIRTIO_BLK_T_OUT, 5, 512); /* in the same batch, right behind */
    wait_until_held(&held);
    uint32_t used = dqueue_shown(q);
    uint64_t begin = now_ns();
    CHECK_EQUAL(vd_queue_stop(rig.engine, 0, 100), -ETIMEDOUT);
    CHECK(now_ns() - begin < 10000000000);
    memcpy(page, &header, sizeof(header));
    give_page(&held, page); /* now it is a good write; but nobody wants it any more */
    WAIT_FOR(!load_acquire(&rig.engine->abandoned));
    CHECK_EQUAL(dqueue_shown(q), used);
    CHECK_EQUAL(*b.status, 0x13);
    CHECK_EQUAL(*waker.status, 0xff);
    image_read(&rig, image, 4096, 0);
    CHECK(is_byte(image, 4096, 0));
    close(held.fd);
    dqueue_reset(q, 0);
    CHECK_EQUAL(rig_start(&rig, 0), 0);
    blk_prove(&rig, 0);
    rig_close(&rig);
}

CASE(a_ring_whose_memory_is_taken_while_a_fetch_hangs_is_a_fault_and_not_our_end)
{
    struct rig rig;
    struct held_page held;
    struct vring_packed_desc page[256] = { 0 };

    rig_open(&rig, (struct plan){ .size = 512, .packed = true, .no_start = true, .regions = 2 });
    struct dqueue *q = &rig.q[0];
    struct vring_packed_desc piece = { rig.driver.regions[1].iova, 512, 0, VRING_DESC_F_NEXT | 1 << VRING_PACKED_DESC_F_AVAIL };

    /* A chain that goes on in the ring's second page, which is not there yet. */
    dqueue_reset(q, 255);
    q->ring[255] = piece;
    CHECK(!fallocate(rig.driver.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                     (uint8_t *)&q->ring[256] - rig.driver.base, 4096));
    hold_page(&rig, &held, (uint8_t *)&q->ring[256]);
    CHECK_EQUAL(rig_start(&rig, 0), 0);
    wait_until_held(&held);
    CHECK_EQUAL(vd_queue_pause(rig.engine, 0, 50), -ETIMEDOUT);
    CHECK_EQUAL(vd_engine_set_regions(rig.engine, &rig.driver.regions[1], 1), 0);
    CHECK_EQUAL(vd_queue_resume(rig.engine, 0), 0);
    page[0] = page[1] = piece;
    give_page(&held, page);
    WAIT_FOR(rig_stats(&rig, 0).fault != VD_FAULT_NONE);
    CHECK_EQUAL(vd_queue_stop(rig.engine, 0, 20000), 0);
    close(held.fd);
    rig_close(&rig);
}

CASE(more_packed_entries_than_the_ring_has_are_a_fault)
{
    struct rig rig;
    struct fuse_image image;

    stall_open(&rig, &image, (struct plan){ .packed = true, .size = 4 });
    struct dqueue *q = &rig.q[0];
    struct blk b[2] = { blk_new(&rig, 0), blk_new(&rig, 0) };
    uint16_t at = q->avail_at & 0x7fff;
    uint16_t next_lap = 1 << (q->avail_at >> 15 ? VRING_PACKED_DESC_F_USED : VRING_PACKED_DESC_F_AVAIL);

    fuse_image_stall(&image, true);
    for (int i = 0; i < 2; i++)
        blk_send(q, &b[i], VIRTIO_BLK_T_FLUSH, 0, 0);
    WAIT_FOR(rig_stats(&rig, 0).in_flight == 2);
    /* All four entries are with the device; the first is made available once more, as if the ring went on there. */
    CHECK_EQUAL(at, q->avail_at & 0x7fff);
    store_release(&q->ring[at].flags, next_lap | VRING_DESC_F_WRITE);
    dqueue_kick_always(q);
    WAIT_FOR(rig_stats(&rig, 0).fault == VD_FAULT_AVAIL_INDEX);
    let_go(&rig, &image);
    rig_stop(&rig, 0);
    dqueue_reset(q, 0);
    CHECK_EQUAL(rig_start(&rig, 0), 0);
    blk_prove(&rig, 0);
    rig_close(&rig);
}

BOTH(a_queue_that_hangs_while_the_kernel_copies_is_given_up)
{
    struct rig rig;
    struct held_page held;
    static uint8_t page[4096];

    /* tmpfs: the copy happens when the request is submitted, on the queue's own thread */
    rig_open(&rig, (struct plan){ .directory = "/dev/shm" });
    struct dqueue *q = &rig.q[0];
    struct blk b = blk_new(&rig, 512);

    b.data = driver_alloc(&rig.driver, 4096, 4096);
    hold_page(&rig, &held, b.data);
    CHECK(pwrite(rig.image_fd, "x", 1, 0) == 1);
    blk_send(q, &b, VIRTIO_BLK_T_OUT, 0, 4096);
    wait_until_held(&held);
    CHECK_EQUAL(vd_queue_stop(rig.engine, 0, 100), -ETIMEDOUT);
    give_page(&held, page);
    WAIT_FOR(!load_acquire(&rig.engine->abandoned));
    CHECK_EQUAL(*b.status, 0xff);
    CHECK(!dqueue_get(q, NULL));
    close(held.fd);
    dqueue_reset(q, 0);
    CHECK_EQUAL(rig_start(&rig, 0), 0);
    blk_prove(&rig, 0);
    rig_close(&rig);
}

BOTH(late_data_goes_nowhere_without_a_descriptor_to_spare)
{
    struct rig rig;
    struct fuse_image image;
    struct rlimit before, none;

    stall_open(&rig, &image, (struct plan){ 0 });
    struct blk odd = blk_new(&rig, 8192);

    odd.data += 7;
    memset(image.content, 0x34, 4 * MIB);
    fuse_image_stall(&image, true);
    blk_send(&rig.q[0], &odd, VIRTIO_BLK_T_IN, 3000, 4096);
    WAIT_FOR(fuse_image_stalled(&image));
    CHECK_EQUAL(vd_queue_stop(rig.engine, 0, 20), -ETIMEDOUT);
    CHECK(!getrlimit(RLIMIT_NOFILE, &before));
    none = (struct rlimit){ 0, before.rlim_max };
    CHECK(!setrlimit(RLIMIT_NOFILE, &none));
    CHECK_EQUAL(vd_engine_set_regions(rig.engine, NULL, 0), 0);
    volatile const uint8_t *isolated = rig.engine->memory->older->mappings[0].base;
    uint8_t byte = *isolated; /* as a thread of ours does that was given up; it is answered, not killed */

    CHECK_EQUAL(byte, 0);
    CHECK(!setrlimit(RLIMIT_NOFILE, &before));
    let_go(&rig, &image);
    CHECK_EQUAL(odd.data[0], 0);
    rig_close(&rig);
}
