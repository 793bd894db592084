/* What the control loop does to an engine: opening, resizing, pausing, moving memory, stopping and starting. */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "harness.h"

BOTH(a_volume_grows_while_it_is_used)
{
    struct rig rig;
    struct vd_backend_info info;

    rig_open(&rig, (struct plan){ .capacity = MIB });
    struct blk b = blk_new(&rig, 4096);
    pattern(b.data, 4096, 2);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_OUT, 2048, 4096), VIRTIO_BLK_S_IOERR);
    CHECK_EQUAL(vd_engine_set_capacity(rig.engine, 2 * MIB), -EINVAL); /* the image is not larger yet */
    CHECK(!ftruncate(rig.image_fd, 2 * MIB));
    vd_engine_backend_info(rig.engine, &info);
    CHECK_EQUAL(info.capacity_bytes, 2 * MIB);
    CHECK_EQUAL(vd_engine_set_capacity(rig.engine, 2 * MIB - 1), -EINVAL);
    CHECK_EQUAL(vd_engine_set_capacity(rig.engine, 2 * MIB), 0);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_OUT, 2048, 4096), VIRTIO_BLK_S_OK);
    memset(b.data, 0, 4096);
    image_read(&rig, b.data, 4096, MIB);
    CHECK(is_pattern(b.data, 4096, 2));
    rig_close(&rig);
}

CASE(an_image_smaller_than_the_volume_is_refused)
{
    char path[128];
    int fd = image_new(NULL, MIB - 512, path);
    struct vd_config config = { .max_queues = 1, .capacity_bytes = MIB, .event_fd = -1, .serial = "", .backend = "file",
                                .path = path };
    struct vd_engine *engine;

    CHECK_EQUAL(vd_engine_new(&config, &engine), -ENOSPC);
    CHECK(!ftruncate(fd, MIB));
    CHECK_EQUAL(vd_engine_new(&config, &engine), 0);
    vd_engine_free(engine);
    close(fd);
}

CASE(what_cannot_be_opened_is_refused_with_its_reason)
{
    struct vd_config config = { .max_queues = 1, .capacity_bytes = 0, .event_fd = -1, .serial = "", .backend = "file",
                                .path = "/nonexistent/image" };
    struct vd_engine *engine;

    CHECK_EQUAL(vd_engine_new(&config, &engine), -ENOENT);
    config.path = "/tmp";
    config.read_only = 1;
    CHECK_EQUAL(vd_engine_new(&config, &engine), -EISDIR);
    config.path = "/dev/null";
    CHECK_EQUAL(vd_engine_new(&config, &engine), -EISDIR);
    config.backend = "tape";
    CHECK_EQUAL(vd_engine_new(&config, &engine), -EINVAL);
    config.backend = "null";
    config.max_queues = 0;
    CHECK_EQUAL(vd_engine_new(&config, &engine), -EINVAL);
    config.max_queues = 65;
    CHECK_EQUAL(vd_engine_new(&config, &engine), -EINVAL);
}

CASE(a_second_engine_on_an_image_is_refused_until_the_first_is_gone)
{
    struct rig rig;
    struct vd_engine *second;
    struct vd_config config;

    rig_open(&rig, (struct plan){ 0 });
    config = rig.config;
    blk_prove(&rig, 0);
    CHECK_EQUAL(vd_engine_new(&config, &second), -EAGAIN);
    config.read_only = 1;
    CHECK_EQUAL(vd_engine_new(&config, &second), -EAGAIN);
    rig_stop(&rig, 0);
    vd_engine_free(rig.engine);
    config.read_only = 0;
    CHECK_EQUAL(vd_engine_new(&config, &second), 0);
    rig.engine = second;
    rig_close(&rig);
}

CASE(readers_share_an_image_and_keep_writers_out)
{
    struct rig rig;
    struct vd_engine *second, *writer;
    struct vd_config config;

    rig_open(&rig, (struct plan){ .read_only = true });
    config = rig.config;
    CHECK_EQUAL(vd_engine_new(&config, &second), 0);
    config.read_only = 0;
    CHECK_EQUAL(vd_engine_new(&config, &writer), -EAGAIN);
    vd_engine_free(second);
    rig_close(&rig);
}

CASE(impossible_regions_are_refused_and_the_old_ones_stay)
{
    struct rig rig;

    rig_open(&rig, (struct plan){ 0 });
    int fd = rig.driver.fd;
    struct vd_region overlap[] = { { 0x10000, 0x2000, 0, fd, 1 }, { 0x11000, 0x2000, 0, fd, 1 } };
    struct vd_region wraps[] = { { UINT64_MAX - 0xfff, 0x2000, 0, fd, 1 } };
    struct vd_region empty[] = { { 0x10000, 0, 0, fd, 1 } };
    struct vd_region no_file[] = { { 0x10000, 0x1000, 0, -1, 1 } };
    struct vd_region good_and_bad[] = { { 0x10000, 0x1000, 0, fd, 1 }, { 0x20000, 0x1000, 0, -1, 1 } };

    CHECK_EQUAL(vd_queue_pause(rig.engine, 0, 20000), 0);
    CHECK_EQUAL(vd_engine_set_regions(rig.engine, overlap, 2), -EINVAL);
    CHECK_EQUAL(vd_engine_set_regions(rig.engine, wraps, 1), -EINVAL);
    CHECK_EQUAL(vd_engine_set_regions(rig.engine, empty, 1), -EINVAL);
    CHECK_EQUAL(vd_engine_set_regions(rig.engine, no_file, 1), -EBADF);
    CHECK_EQUAL(vd_engine_set_regions(rig.engine, good_and_bad, 2), -EBADF);
    CHECK_EQUAL(vd_queue_resume(rig.engine, 0), 0);
    blk_prove(&rig, 0);
    rig_close(&rig);
}

/* A load of writes with a number in each sector: the driver side keeps `depth` of them going. */
struct load {
    struct rig *rig;
    struct blk blks[32];
    uint64_t next, done;
};

static void load_open(struct load *l, struct rig *rig)
{
    *l = (struct load){ .rig = rig };
    for (int i = 0; i < 32; i++) {
        l->blks[i] = blk_new(rig, 512);
        l->blks[i].done = true;
    }
}

static void load_collect(struct load *l)
{
    struct blk *b;

    while ((b = dqueue_get(&l->rig->q[0], NULL))) {
        CHECK_EQUAL(*b->status, VIRTIO_BLK_S_OK);
        b->done = true;
        l->done++;
    }
}

/* Send writes of their own number until none fits or `until` were sent. */
static void load_send(struct load *l, uint64_t until)
{
    for (int i = 0; i < 32 && l->next < until; i++) {
        struct blk *b = &l->blks[i];

        if (!b->done)
            continue;
        for (int j = 0; j < 64; j++)
            memcpy(b->data + 8 * j, &l->next, 8);
        blk_send(&l->rig->q[0], b, VIRTIO_BLK_T_OUT, l->next, 512);
        l->next++;
    }
}

static void load_check_image(struct load *l, uint64_t count)
{
    uint64_t words[64];

    for (uint64_t i = 0; i < count; i++) {
        image_read(l->rig, words, 512, i * 512);
        for (int j = 0; j < 64; j++)
            CHECK_EQUAL(words[j], i);
    }
}

BOTH(pausing_under_load_loses_nothing_and_runs_nothing)
{
    struct rig rig;
    struct load load;
    enum { TOTAL = 8000 };

    rig_open(&rig, (struct plan){ .event_idx = true, .size = 128 });
    load_open(&load, &rig);
    for (int round = 0; load.done < TOTAL; round++) {
        uint64_t goal = load.done + 200;

        while (load.done < goal && load.done < TOTAL) {
            load_send(&load, TOTAL);
            load_collect(&load);
        }
        load_send(&load, TOTAL); /* some are certainly on their way */
        CHECK_EQUAL(vd_queue_pause(rig.engine, 0, 20000), 0);
        CHECK_EQUAL(rig_stats(&rig, 0).in_flight, 0);
        load_collect(&load);
        load_send(&load, TOTAL);
        uint32_t used = dqueue_shown(&rig.q[0]);

        CHECK_EQUAL(rig_state(&rig, 0), used); /* as many ended as were fetched */
        dqueue_kick_always(&rig.q[0]);
        for (int i = 0; i < 200; i++) {
            harness_breathe();
            CHECK_EQUAL(dqueue_shown(&rig.q[0]), used);
            CHECK_EQUAL(rig_state(&rig, 0), used);
        }
        CHECK_EQUAL(vd_queue_pause(rig.engine, 0, 20000), 0); /* twice is fine */
        CHECK_EQUAL(vd_queue_resume(rig.engine, 0), 0);
    }
    load_check_image(&load, TOTAL);
    CHECK_EQUAL(rig_stats(&rig, 0).operations[VD_WRITE].count, TOTAL);
    rig_close(&rig);
}

BOTH(stopping_under_load_and_starting_again_loses_nothing_and_repeats_nothing)
{
    struct rig rig;
    struct load load;
    enum { TOTAL = 4000 };

    rig_open(&rig, (struct plan){ .event_idx = true, .indirect = true, .size = 128 });
    load_open(&load, &rig);
    while (load.done < TOTAL) {
        uint64_t goal = load.done + 150;

        while (load.done < goal && load.done < TOTAL) {
            load_send(&load, TOTAL);
            load_collect(&load);
        }
        load_send(&load, TOTAL);
        rig_stop(&rig, 0);

        struct vd_queue_config config = dqueue_config(&rig.q[0], ALL_BLK_FEATURES);
        uint32_t next = rig_state(&rig, 0);

        CHECK(!rig_stats(&rig, 0).running);
        CHECK_EQUAL(next, dqueue_shown(&rig.q[0])); /* in order or not, as many ended as were fetched */
        config.state = next;
        CHECK_EQUAL(vd_queue_start(rig.engine, 0, &config), 0);
        CHECK(rig_stats(&rig, 0).running);
    }
    load_check_image(&load, TOTAL);
    CHECK_EQUAL(rig_stats(&rig, 0).operations[VD_WRITE].count, TOTAL); /* dqueue_get found each completed once */
    rig_close(&rig);
}

BOTH(memory_moves_while_paused_and_everything_goes_on)
{
    struct rig rig;

    rig_open(&rig, (struct plan){ .queues = 2, .event_idx = true });
    struct driver *d = &rig.driver;
    struct blk b = blk_new(&rig, 4096);

    for (int round = 0; round < 40; round++) {
        /* The same contents in another file; the old one is emptied so that any use of it shows. */
        int fd = memfd_create("moved", MFD_CLOEXEC);

        blk_prove(&rig, 0);
        blk_prove(&rig, 1);
        if (round % 4 == 3) { /* something waits while paused */
            pattern(b.data, 4096, 99);
        }
        CHECK_EQUAL(vd_queue_pause(rig.engine, 0, 20000), 0);
        CHECK_EQUAL(vd_queue_pause(rig.engine, 1, 20000), 0);
        CHECK(fd >= 0 && !ftruncate(fd, (off_t)d->size));
        CHECK(pwrite(fd, d->base, d->used, 0) == (ssize_t)d->used);
        CHECK(mmap(d->base, d->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == d->base);
        CHECK(!ftruncate(d->fd, 0));
        close(d->fd);
        d->fd = fd;
        d->regions[0].fd = fd;
        if (round % 4 == 3)
            blk_send(&rig.q[0], &b, VIRTIO_BLK_T_OUT, 1000, 4096);
        CHECK_EQUAL(vd_engine_set_regions(rig.engine, d->regions, d->region_count), 0);
        CHECK_EQUAL(vd_queue_resume(rig.engine, 0), 0);
        CHECK_EQUAL(vd_queue_resume(rig.engine, 1), 0);
        if (round % 4 == 3) {
            uint8_t image[4096];

            CHECK_EQUAL(blk_finish(&rig.q[0], &b), VIRTIO_BLK_S_OK);
            image_read(&rig, image, 4096, 512000);
            CHECK(is_pattern(image, 4096, 99));
        }
    }
    CHECK_EQUAL(rig_stats(&rig, 0).fault, VD_FAULT_NONE);
    rig_close(&rig);
}

BOTH(rings_gone_from_memory_while_paused_are_a_fault_until_a_reset)
{
    struct rig rig;

    rig_open(&rig, (struct plan){ 0 });
    blk_prove(&rig, 0);
    CHECK_EQUAL(vd_queue_pause(rig.engine, 0, 20000), 0);
    CHECK_EQUAL(vd_engine_set_regions(rig.engine, NULL, 0), 0);
    CHECK_EQUAL(vd_queue_resume(rig.engine, 0), 0);
    WAIT_FOR(rig_stats(&rig, 0).fault == VD_FAULT_RING_ADDRESS);
    rig_stop(&rig, 0);
    CHECK_EQUAL(vd_engine_set_regions(rig.engine, rig.driver.regions, 1), 0);
    dqueue_reset(&rig.q[0], 0);
    CHECK_EQUAL(rig_start(&rig, 0), 0);
    CHECK_EQUAL(rig_stats(&rig, 0).fault, VD_FAULT_NONE);
    blk_prove(&rig, 0);
    rig_close(&rig);
}

BOTH(control_calls_on_queues_that_do_not_run_are_harmless)
{
    struct rig rig;

    rig_open(&rig, (struct plan){ .no_start = true });
    for (uint32_t i = 0; i < 70; i += 3) {
        CHECK_EQUAL(vd_queue_stop(rig.engine, i, 100), 0);
        CHECK_EQUAL(vd_queue_pause(rig.engine, i, 100), 0);
        CHECK_EQUAL(vd_queue_resume(rig.engine, i), 0);
        CHECK_EQUAL(rig_stats(&rig, i).running, 0);
    }
    uint32_t state;

    CHECK_EQUAL(vd_queue_state(rig.engine, 64, &state), -EINVAL);
    struct vd_queue_config config = dqueue_config(&rig.q[0], 0);
    CHECK_EQUAL(vd_queue_start(rig.engine, QUEUES_MAX, &config), -EINVAL);
    CHECK_EQUAL(rig_start(&rig, 0), 0);
    CHECK_EQUAL(rig_start(&rig, 0), -EBUSY);
    blk_prove(&rig, 0);
    rig_close(&rig);
}

BOTH(queues_start_and_stop_many_times)
{
    struct rig rig;

    rig_open(&rig, (struct plan){ .queues = 4, .event_idx = true });
    struct blk b = blk_new(&rig, 4096);
    for (int round = 0; round < 100; round++)
        for (uint32_t i = 0; i < 4; i++) {
            if (round % 3)
                CHECK_EQUAL(blk_do(&rig.q[i], &b, VIRTIO_BLK_T_IN, 0, 4096), VIRTIO_BLK_S_OK);
            rig_stop(&rig, i);
            dqueue_reset(&rig.q[i], (uint16_t)(round * 1021));
            CHECK_EQUAL(rig_start(&rig, i), 0);
        }
    rig_close(&rig);
}

BOTH(a_queue_that_starts_paused_takes_nothing_until_it_is_resumed)
{
    struct rig rig;

    rig_open(&rig, (struct plan){ .no_start = true });
    struct blk b = blk_new(&rig, 4096);
    struct vd_queue_config config = dqueue_config(&rig.q[0], ALL_BLK_FEATURES);

    config.paused = true;
    blk_send(&rig.q[0], &b, VIRTIO_BLK_T_OUT, 0, 4096);
    CHECK_EQUAL(vd_queue_start(rig.engine, 0, &config), 0);
    CHECK(!dqueue_wait(&rig.q[0], 50));
    CHECK_EQUAL(rig_stats(&rig, 0).batches, 0);
    CHECK_EQUAL(vd_queue_pause(rig.engine, 0, 1000), 0);
    CHECK_EQUAL(vd_queue_resume(rig.engine, 0), 0);
    CHECK_EQUAL(blk_finish(&rig.q[0], &b), VIRTIO_BLK_S_OK);
    rig_close(&rig);
}
