/* Memory of the driver's that goes away while we use it: nobody's fault, and no reason to die. */
#include <string.h>
#include <unistd.h>

#include "harness.h"

/* What is left of memory after the pages went away: nothing. */
static void take_memory(struct rig *rig)
{
    CHECK(!ftruncate(rig->driver.fd, 0));
}

static void give_memory_back(struct rig *rig)
{
    CHECK(!ftruncate(rig->driver.fd, (off_t)rig->driver.size));
    dqueue_reset(&rig->q[0], 0);
}

BOTH(memory_taken_away_is_a_fault_and_the_process_lives)
{
    struct rig rig;
    uint64_t one = 1;

    rig_open(&rig, (struct plan){ 0 });
    blk_prove(&rig, 0);
    take_memory(&rig);
    CHECK(write(rig.q[0].kick_fd, &one, 8) == 8);
    WAIT_FOR(rig_stats(&rig, 0).fault == VD_FAULT_MEMORY);
    CHECK_EQUAL(rig_stats(&rig, 0).malformed, 0); /* nobody's fault */
    rig_stop(&rig, 0);
    give_memory_back(&rig);
    CHECK_EQUAL(rig_start(&rig, 0), 0);
    blk_prove(&rig, 0); /* in the driver's memory, not in the zeros that stood in for it */
    rig_close(&rig);
}

BOTH(memory_taken_away_under_load_is_a_fault_and_the_image_keeps_what_it_has)
{
    struct rig rig;
    static uint8_t image[4096];

    rig_open(&rig, (struct plan){ .size = 128 });
    struct dqueue *q = &rig.q[0];
    static struct blk blks[32];

    for (int i = 0; i < 32; i++)
        blks[i] = blk_new(&rig, 4096);
    memset(blks[0].data, 0xee, 4096);
    CHECK_EQUAL(blk_do(q, &blks[0], VIRTIO_BLK_T_OUT, 0, 4096), VIRTIO_BLK_S_OK);
    for (int round = 0; round < 50; round++) {
        uint64_t one = 1;

        for (int i = 0; i < 32; i++) {
            memset(blks[i].data, 0xdd, 4096);
            blk_send(q, &blks[i], VIRTIO_BLK_T_OUT, 1000 + (uint32_t)i * 8, 4096);
        }
        take_memory(&rig);
        CHECK(write(q->kick_fd, &one, 8) == 8);
        WAIT_FOR(rig_stats(&rig, 0).fault == VD_FAULT_MEMORY);
        rig_stop(&rig, 0);
        give_memory_back(&rig);
        CHECK_EQUAL(rig_start(&rig, 0), 0);
        image_read(&rig, image, 4096, 0);
        CHECK(is_byte(image, 4096, 0xee)); /* a header of zeros did not become a write to sector 0 */
    }
    blk_prove(&rig, 0);
    rig_close(&rig);
}

BOTH(a_header_torn_by_lost_memory_writes_nothing)
{
    struct rig rig;
    static uint8_t image[4096];

    /* The type is in a page that stays, the sector in one that goes: the request must not go to sector 0. */
    rig_open(&rig, (struct plan){ 0 });
    struct dqueue *q = &rig.q[0];
    uint8_t *border = rig.driver.base + 4 * MIB;
    uint8_t *data = driver_alloc(&rig.driver, 512, 512), *status = driver_alloc(&rig.driver, 1, 1);
    struct virtio_blk_outhdr header = { .type = VIRTIO_BLK_T_OUT, .sector = 100 };
    struct piece pieces[] = { { driver_iova(q->d, border - 8), 16, false },
                              { driver_iova(q->d, data), 512, false },
                              { driver_iova(q->d, status), 1, true } };

    CHECK_EQUAL(vd_queue_pause(rig.engine, 0, 20000), 0);
    memset(data, 0x99, 512);
    memcpy(border - 8, &header, 16);
    CHECK(dqueue_add(q, pieces, 3, data));
    dqueue_kick(q);
    CHECK(!ftruncate(rig.driver.fd, 4 * MIB));
    CHECK_EQUAL(vd_queue_resume(rig.engine, 0), 0);
    WAIT_FOR(rig_stats(&rig, 0).fault == VD_FAULT_MEMORY);
    rig_stop(&rig, 0);
    image_read(&rig, image, 4096, 0);
    CHECK(is_byte(image, 4096, 0));
    rig_close(&rig);
}

BOTH(data_in_lost_memory_fails_the_request_and_the_process_lives)
{
    struct rig rig;

    rig_open(&rig, (struct plan){ 0 });
    struct dqueue *q = &rig.q[0];
    struct blk b = blk_new(&rig, 512);

    b.data = rig.driver.base + 6 * MIB;
    CHECK(!ftruncate(rig.driver.fd, 6 * MIB));
    CHECK_EQUAL(blk_do(q, &b, VIRTIO_BLK_T_OUT, 0, 4096), VIRTIO_BLK_S_IOERR);
    CHECK_EQUAL(blk_do(q, &b, VIRTIO_BLK_T_IN, 0, 4096), VIRTIO_BLK_S_IOERR);
    CHECK_EQUAL(blk_do(q, &b, VIRTIO_BLK_T_IN, 1, 512), VIRTIO_BLK_S_IOERR);
    CHECK_EQUAL(rig_stats(&rig, 0).fault, VD_FAULT_NONE);
    blk_prove(&rig, 0);
    rig_close(&rig);
}

BOTH(another_engine_that_comes_and_goes_takes_nobodys_guard_away)
{
    struct vd_engine *other;
    struct vd_config config;
    uint64_t one = 1;
    struct rig rig;

    rig_open(&rig, (struct plan){ 0 });
    config = rig.config;
    config.backend = "null";
    CHECK_EQUAL(vd_engine_new(&config, &other), 0);
    for (int i = 0; i < 2; i++) {
        blk_prove(&rig, 0);
        take_memory(&rig);
        CHECK(write(rig.q[0].kick_fd, &one, 8) == 8);
        WAIT_FOR(rig_stats(&rig, 0).fault == VD_FAULT_MEMORY);
        rig_stop(&rig, 0);
        give_memory_back(&rig);
        CHECK_EQUAL(rig_start(&rig, 0), 0);
        if (!i)
            vd_engine_free(other);
    }
    rig_close(&rig);
}
