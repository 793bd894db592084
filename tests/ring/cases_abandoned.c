/*
 * A queue that was given up while its thread hung, and wakes when another one is in its place: it does nothing to what
 * the two have in common, which is the counters and the in-flight log.
 */
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "queue.h"
#include "harness.h"
#include "held_page.h"
#include "inflight.h"

enum { LOG_BYTES = 64 * 1024 };

static uint8_t the_log[LOG_BYTES] __attribute__((aligned(64)));

static void start(struct rig *rig)
{
    struct vd_queue_config config = dqueue_config(&rig->q[0], ALL_BLK_FEATURES);

    config.inflight = the_log;
    config.inflight_bytes = LOG_BYTES;
    CHECK_EQUAL(vd_queue_start(rig->engine, 0, &config), 0);
}

/* One that hangs as it reads the table of an indirect descriptor, is given up, and has a successor. */
static void open_with_a_successor(struct rig *rig, struct held_page *held)
{
    rig_open(rig, (struct plan){ .indirect = true, .no_start = true });
    struct dqueue *q = &rig->q[0];
    void *table = driver_alloc(&rig->driver, 4096, 4096);

    start(rig);
    hold_page(rig, held, table);
    q->desc[0] = (struct vring_desc){ driver_iova(q->d, table), 32, VRING_DESC_F_INDIRECT, 0 };
    dqueue_put(q, 0);
    dqueue_kick_always(q);
    wait_until_held(held);
    CHECK_EQUAL(vd_queue_stop(rig->engine, 0, 100), -ETIMEDOUT);
    dqueue_reset(q, 0);
    start(rig);
}

static void wake(struct rig *rig, struct held_page *held, const void *table)
{
    give_page(held, table);
    WAIT_FOR(!load_acquire(&rig->engine->abandoned));
    close(held->fd);
}

BOTH(a_fault_of_an_abandoned_queue_is_not_its_successors)
{
    static uint8_t nonsense[4096];
    struct held_page held;
    struct rig rig;

    open_with_a_successor(&rig, &held);
    wake(&rig, &held, nonsense);
    CHECK_EQUAL(rig_stats(&rig, 0).fault, VD_FAULT_NONE);
    CHECK_EQUAL(rig_stats(&rig, 0).malformed, 0);
    blk_prove(&rig, 0);
    rig_close(&rig);
}

static uint32_t in_log(const struct rig *rig)
{
    const struct vd_log_split *split = (const void *)the_log;
    const struct vd_log_packed *packed = (const void *)the_log;
    uint32_t count = 0;

    for (uint32_t i = 0; i < rig->plan.size; i++)
        count += rig->plan.packed ? packed->states[i].inflight : split->states[i].inflight;
    return count;
}

BOTH(an_abandoned_queue_takes_nothing_into_its_successors_log)
{
    static uint8_t page[4096];
    struct held_page held;
    struct rig rig;

    open_with_a_successor(&rig, &held);
    struct blk b = blk_new(&rig, 0);
    uint64_t header = driver_iova(&rig.driver, b.header), status = driver_iova(&rig.driver, b.status);
    struct vring_desc split[] = { { header, 16, VRING_DESC_F_NEXT, 1 }, { status, 1, VRING_DESC_F_WRITE, 0 } };
    struct vring_packed_desc packed[] = { { header, 16, 0, 0 }, { status, 1, 0, VRING_DESC_F_WRITE } };

    *b.header = (struct virtio_blk_outhdr){ .type = VIRTIO_BLK_T_FLUSH };
    *b.status = 0xff;
    memcpy(page, rig.plan.packed ? (void *)packed : (void *)split, 32);
    wake(&rig, &held, page);
    blk_prove(&rig, 0);
    rig_stop(&rig, 0);
    CHECK_EQUAL(in_log(&rig), 0);
    CHECK_EQUAL(*b.status, 0xff);
    start(&rig);
    blk_prove(&rig, 0);
    rig_close(&rig);
}
