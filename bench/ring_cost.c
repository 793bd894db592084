/*
 * Drives the engine with the null backend in one process, for callgrind: what the engine's thread executes is the
 * ring path and nothing else. Two ways to bring requests:
 *   full    the ring is filled before the engine looks: the cost in a batch as large as it gets
 *   alone   one request at a time, each kicked and waited for: the cost with nothing to share it
 * The driver is the one of the ring tests, on this process's main thread; callgrind tells the threads apart. Prints,
 * for the reader of a run without callgrind, nanoseconds from making the engine to its first request served.
 */
#include <liburing.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>

#include "common.h"
#include "harness.h"

enum { RING = 1024, DATA_BYTES = 4096, WAIT_MS = 60000 };

_Noreturn void harness_die(void)
{
    exit(1);
}

/*
 * Valgrind runs one thread at a time and does not know that io_uring_enter may block: the engine's thread would sleep
 * with valgrind's lock held. So it sleeps in poll here, which valgrind knows (linked with --wrap).
 */
__attribute__((used)) int __wrap_io_uring_submit_and_wait(struct io_uring *ring, unsigned count);
__attribute__((used)) int __wrap_io_uring_submit_and_wait(struct io_uring *ring, unsigned count)
{
    struct pollfd ready = { .fd = ring->ring_fd, .events = POLLIN };
    int submitted = io_uring_submit_and_get_events(ring);

    while (count && !io_uring_cq_ready(ring)) {
        poll(&ready, 1, 1); /* its wake-up can be lost on a ring with deferred work: look again */
        io_uring_get_events(ring);
    }
    return submitted;
}

struct request {
    struct piece pieces[3];
    uint8_t *status;
};

static void make(struct driver *d, struct request *r)
{
    struct virtio_blk_outhdr *header = driver_alloc(d, sizeof(*header), 16);
    uint8_t *data = driver_alloc(d, DATA_BYTES, DATA_BYTES);

    r->status = driver_alloc(d, 1, 1);
    *header = (struct virtio_blk_outhdr){ .type = VIRTIO_BLK_T_IN };
    r->pieces[0] = (struct piece){ driver_iova(d, header), sizeof(*header), false };
    r->pieces[1] = (struct piece){ driver_iova(d, data), DATA_BYTES, true };
    r->pieces[2] = (struct piece){ driver_iova(d, r->status), 1, true };
}

/* Take what is done, waiting if nothing is; returns how many. */
static uint32_t take(struct dqueue *q)
{
    struct request *r;
    uint32_t taken = 0;

    while (!taken) {
        while ((r = dqueue_get(q, NULL))) {
            CHECK_EQUAL(*r->status, VIRTIO_BLK_S_OK);
            taken++;
        }
        if (!taken)
            CHECK(dqueue_wait(q, WAIT_MS));
    }
    return taken;
}

int main(int argc, char **argv)
{
    bool full = argc == 4 && !strcmp(argv[2], "full"), packed = argc == 4 && !strcmp(argv[1], "packed");
    uint32_t count = argc == 4 ? (uint32_t)atoi(argv[3]) : 0, added = 0, done = 0, depth = full ? RING : 1;
    static struct request requests[RING];
    struct driver driver;
    struct dqueue q;
    struct vd_engine *engine;
    struct vd_config config = { .max_queues = 1, .block_size_bytes = 512, .capacity_bytes = MIB, .event_fd = -1,
                                .serial = "ring-cost", .backend = "null", .path = "" };

    if (!count || (!full && strcmp(argv[2], "alone")) || (!packed && strcmp(argv[1], "split"))) {
        fprintf(stderr, "usage: ring_cost split|packed full|alone COUNT\n");
        return 2;
    }
    driver_open(&driver, 32 * MIB, 1, 0, 0);
    dqueue_open(&q, &driver, RING, packed, true, true);
    struct vd_queue_config queue = dqueue_config(&q, 0); /* before requests are added: the engine begins there */

    for (uint32_t i = 0; i < depth; i++)
        make(&driver, &requests[i]);
    /* Full: everything is there before the engine looks, so that its batches are as large as they can be. */
    for (uint32_t i = 0; full && i < depth && added < count; i++, added++)
        CHECK(dqueue_add(&q, requests[i].pieces, 3, &requests[i]));
    if (added)
        dqueue_kick_always(&q);

    uint64_t started = now_ns(), first = 0;
    CHECK_EQUAL(vd_engine_new(&config, &engine), 0);
    CHECK_EQUAL(vd_engine_set_regions(engine, driver.regions, driver.region_count), 0);
    CHECK_EQUAL(vd_queue_start(engine, 0, &queue), 0);
    while (done < count) {
        if (!full) {
            CHECK(dqueue_add(&q, requests[0].pieces, 3, &requests[0]));
            dqueue_kick(&q);
            done += take(&q);
        } else {
            /* Wait for all of a ring, then show all of the next at once. */
            for (uint32_t batch = added - done; batch;)
                batch -= take(&q);
            done = added;
            for (uint32_t i = 0; i < depth && added < count; i++, added++)
                CHECK(dqueue_add(&q, requests[i].pieces, 3, &requests[i]));
            if (added > done)
                dqueue_kick(&q);
        }
        first = first ? first : now_ns();
    }
    struct vd_queue_stats stats;
    vd_queue_stats_read(engine, 0, &stats);
    CHECK_EQUAL(vd_queue_stop(engine, 0, WAIT_MS), 0);
    vd_engine_free(engine);
    dqueue_close(&q);
    driver_close(&driver);
    printf("%llu ns to first, %llu batches, %llu interrupts\n", (unsigned long long)(first - started),
           (unsigned long long)stats.batches, (unsigned long long)stats.interrupts);
    return 0;
}
