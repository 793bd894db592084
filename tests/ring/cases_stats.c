/* What a queue counts about itself. */
#include "harness.h"

#include <string.h>

static uint64_t sum(const uint64_t *counts, size_t n)
{
    uint64_t total = 0;

    for (size_t i = 0; i < n; i++)
        total += counts[i];
    return total;
}

/* Five reads with one kick; a queue that is asleep takes them together. */
CASE(a_batch_is_counted_by_its_size_and_by_the_depth_that_it_makes)
{
    struct rig rig;
    struct blk blks[5];

    rig_open(&rig, (struct plan){ .no_start = true });
    struct dqueue *q = &rig.q[0];
    struct vd_queue_config config = dqueue_config(q, ALL_BLK_FEATURES);

    for (int i = 0; i < 5; i++) {
        struct piece pieces[3];

        blks[i] = blk_new(&rig, 4096);
        pieces[0] = (struct piece){ driver_iova(q->d, blks[i].header), 16, false };
        pieces[1] = (struct piece){ driver_iova(q->d, blks[i].data), 4096, true };
        pieces[2] = (struct piece){ driver_iova(q->d, blks[i].status), 1, true };
        *blks[i].header = (struct virtio_blk_outhdr){ .type = VIRTIO_BLK_T_IN };
        CHECK(dqueue_add(q, pieces, 3, &blks[i]));
    }
    dqueue_kick(q);
    CHECK_EQUAL(vd_queue_start(rig.engine, 0, &config), 0);
    for (int i = 0; i < 5; i++)
        CHECK_EQUAL(blk_finish(q, &blks[i]), VIRTIO_BLK_S_OK);
    struct vd_queue_stats stats = rig_stats(&rig, 0);

    CHECK_EQUAL(stats.batches, 1);
    CHECK_EQUAL(stats.batch_sizes[3], 1); /* above 4, at most 8 */
    CHECK_EQUAL(stats.depths[3], 1);
    CHECK_EQUAL(stats.data_max_bytes, 5 * 4096);
    rig_close(&rig);
}

CASE(every_request_is_in_one_bucket_of_its_operation)
{
    struct rig rig;

    rig_open(&rig, (struct plan){ 0 });
    struct blk b = blk_new(&rig, 4096);

    for (int i = 0; i < 100; i++) {
        CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_OUT, 8, 4096), VIRTIO_BLK_S_OK);
        CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_FLUSH, 0, 0), VIRTIO_BLK_S_OK);
    }
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_OUT, 1 << 20, 4096), VIRTIO_BLK_S_IOERR);
    struct vd_queue_stats stats = rig_stats(&rig, 0);
    const struct vd_operation_stats *write = &stats.operations[VD_WRITE], *flush = &stats.operations[VD_FLUSH];

    CHECK_EQUAL(write->count, 101);
    CHECK_EQUAL(sum(write->latency, VD_LATENCY_BUCKETS), 101);
    CHECK_EQUAL(sum(flush->latency, VD_LATENCY_BUCKETS), 100);
    CHECK(write->latency_max_ns * write->count >= write->latency_ns);
    CHECK(write->latency_max_ns <= write->latency_ns);
    CHECK(write->latency[vd_latency_bucket_of(write->latency_max_ns)]);
    CHECK_EQUAL(stats.data_max_bytes, 4096); /* the refused one never counted */
    CHECK_EQUAL(sum(stats.batch_sizes, VD_COUNT_BUCKETS), stats.batches);
    CHECK_EQUAL(sum(stats.depths, VD_COUNT_BUCKETS), stats.batches);
    rig_close(&rig);
}
