/*
 * What was handed to a connection that is then given up does not arrive later: the kernel drops it and resets the connection,
 * where it would else send it for minutes, long after a successor wrote the same place. The server here has stopped reading,
 * so that what it was sent is in our kernel; it reads on when all is over.
 */
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "queue.h"
#include "fake_lookup.h"
#include "fake_nbd.h"
#include "nbd_rig.h"

enum { LOG_BYTES = 64 * 1024, BYTES = 128 * 1024, STOP_MS = 50, OLD = 1, NEW = 2 };

/* The first connection's server reads no more, and the kernels have a write of ours that it would do when it reads on. */
static void send_to_the_deaf(struct rig *rig, struct fake_nbd *s, struct blk *b)
{
    store_relaxed(&s->deaf, 1);
    pattern(b->data, BYTES, OLD);
    blk_send(&rig->q[0], b, VIRTIO_BLK_T_OUT, 8, BYTES);
    WAIT_FOR(fake_nbd_unread(s, 0));
    usleep(50000); /* until nothing moves any more */
}

/* What the driver wrote there last is there, also after the server has read all that there ever was. */
static void check_what_is_there(struct fake_nbd *s)
{
    store_relaxed(&s->deaf, 0);
    WAIT_FOR(fake_nbd_alive(s) == 1);
    fake_nbd_settle(s);
    CHECK(is_pattern(s->image + 4096, BYTES, NEW));
}

static void overwrite(struct rig *rig, struct blk *b)
{
    pattern(b->data, BYTES, NEW);
    CHECK_EQUAL(blk_do(&rig->q[0], b, VIRTIO_BLK_T_OUT, 8, BYTES), VIRTIO_BLK_S_OK);
}

BOTH(nbd_what_was_abandoned_in_a_socket_does_not_land_later)
{
    struct rig rig;
    struct fake_nbd s;

    fake_nbd_open_tcp(&s, 4 * MIB);
    nbd_rig_open(&rig, &s, (struct plan){ .size = 64 });
    struct blk b = blk_new(&rig, BYTES);

    send_to_the_deaf(&rig, &s, &b);
    CHECK_EQUAL(vd_queue_stop(rig.engine, 0, STOP_MS), -ETIMEDOUT);
    CHECK_EQUAL(vd_engine_set_regions(rig.engine, NULL, 0), 0);
    CHECK_EQUAL(vd_engine_set_regions(rig.engine, rig.driver.regions, rig.driver.region_count), 0);
    dqueue_reset(&rig.q[0], 0);
    CHECK_EQUAL(rig_start(&rig, 0), 0);
    overwrite(&rig, &b);
    check_what_is_there(&s);
    rig_close(&rig);
    fake_nbd_close(&s);
}

CASE(nbd_what_a_given_up_connection_had_in_its_socket_does_not_land_later)
{
    struct rig rig;
    struct fake_nbd s;

    fake_nbd_open_tcp(&s, 4 * MIB);
    nbd_rig_open(&rig, &s, (struct plan){ .size = 64 });
    struct blk b = blk_new(&rig, BYTES);

    send_to_the_deaf(&rig, &s, &b);
    fake_nbd_babble(&s, 0);
    CHECK_EQUAL(blk_finish(&rig.q[0], &b), VIRTIO_BLK_S_OK);
    CHECK_EQUAL(rig_stats(&rig, 0).remote.losses, 1);
    overwrite(&rig, &b);
    check_what_is_there(&s);
    rig_close(&rig);
    fake_nbd_close(&s);
}

/* What this process and its workers share. */
struct shared {
    uint8_t log[LOG_BYTES] __attribute__((aligned(64)));
    struct sockaddr_in address;
    struct vd_queue_config queue;
    uint32_t begin; /* the workers whose numbers are smaller shall serve */
};

/* A worker's process; it ends by being killed. */
static _Noreturn void serve(struct shared *shared, const struct driver *d, uint32_t number)
{
    struct vd_nbd_config nbd = { .host = "fake.example", .service = "10809", .export_name = "disk" };
    struct vd_config config = { .max_queues = 1, .block_size_bytes = 512, .capacity_bytes = 4 * MIB, .event_fd = -1,
                                .serial = "", .backend = "nbd", .nbd = &nbd };
    struct vd_engine *engine;

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    while (load_acquire(&shared->begin) <= number)
        usleep(1000);
    fake_lookup(&shared->address, 1, 0);
    shared->queue.resume = number > 0;
    if (vd_engine_new(&config, &engine) || vd_engine_set_regions(engine, d->regions, d->region_count) ||
        vd_queue_start(engine, 0, &shared->queue))
        _exit(1);
    for (;;)
        pause();
}

static void kill_it(pid_t worker)
{
    int status;

    CHECK(!kill(worker, SIGKILL));
    CHECK_EQUAL(waitpid(worker, &status, 0), worker);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
}

BOTH(nbd_what_a_killed_worker_left_in_its_socket_does_not_land_later)
{
    struct shared *shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    struct rig rig = { .plan = { .packed = harness_packed() } };
    struct fake_nbd s;
    pid_t workers[2];

    CHECK(shared != MAP_FAILED);
    driver_open(&rig.driver, 4 * MIB, 1, 0x10000, 0);
    dqueue_open(&rig.q[0], &rig.driver, 64, rig.plan.packed, false, false);
    shared->queue = dqueue_config(&rig.q[0], ALL_BLK_FEATURES);
    shared->queue.inflight = shared->log;
    shared->queue.inflight_bytes = LOG_BYTES;
    CHECK_EQUAL(vd_inflight_init(shared->log, LOG_BYTES, 64, rig.plan.packed), 0);
    for (uint32_t i = 0; i < 2; i++) { /* now, for the thread sanitizer wants no threads before a fork */
        workers[i] = fork();
        CHECK(workers[i] >= 0);
        if (!workers[i])
            serve(shared, &rig.driver, i);
    }
    fake_nbd_open_tcp(&s, 4 * MIB);
    struct blk b = blk_new(&rig, BYTES);

    shared->address = s.address;
    store_release(&shared->begin, 1);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_IN, 8, BYTES), VIRTIO_BLK_S_OK);
    send_to_the_deaf(&rig, &s, &b);
    kill_it(workers[0]);
    store_release(&shared->begin, 2);
    CHECK_EQUAL(blk_finish(&rig.q[0], &b), VIRTIO_BLK_S_OK);
    overwrite(&rig, &b);
    check_what_is_there(&s);
    kill_it(workers[1]);
    dqueue_close(&rig.q[0]);
    driver_close(&rig.driver);
    fake_nbd_close(&s);
    munmap(shared, sizeof(*shared));
}
