/* Where io_uring is switched off (kernel.io_uring_disabled, a container's filter): nothing starts, and what waits can end. */
#include <errno.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "queue.h"
#include "harness.h"

CASE(where_io_uring_is_refused_no_queue_starts_and_it_can_be_known_before)
{
    struct rig rig;

    CHECK_EQUAL(vd_uring_works(), 0);
    rig_open(&rig, (struct plan){ .no_start = true });
    harness_refuse(SYS_io_uring_setup, EPERM);
    CHECK_EQUAL(vd_uring_works(), -EPERM);
    CHECK_EQUAL(rig_start(&rig, 0), -ENOSYS);
    CHECK_EQUAL(rig_stats(&rig, 0).fault, VD_FAULT_BACKEND);
    rig_close(&rig);
}

BOTH(what_waits_is_failed_without_io_uring)
{
    struct rig rig;

    rig_open(&rig, (struct plan){ .backend = "error", .capacity = MIB, .no_start = true });
    harness_refuse(SYS_io_uring_setup, EPERM);
    CHECK_EQUAL(rig_start(&rig, 0), 0);
    struct blk b = blk_new(&rig, 4096);

    for (int i = 0; i < 3; i++)
        CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_OUT, 0, 4096), VIRTIO_BLK_S_IOERR);
    CHECK_EQUAL(vd_queue_pause(rig.engine, 0, 1000), 0);
    blk_send(&rig.q[0], &b, VIRTIO_BLK_T_IN, 0, 4096);
    CHECK(!dqueue_wait(&rig.q[0], 20));
    CHECK_EQUAL(vd_queue_resume(rig.engine, 0), 0);
    CHECK_EQUAL(blk_finish(&rig.q[0], &b), VIRTIO_BLK_S_IOERR);
    rig_close(&rig);
}

CASE(a_kernel_that_takes_nothing_is_not_asked_without_a_pause)
{
    struct rig rig;
    struct timespec before, after;

    rig_open(&rig, (struct plan){ .no_start = true });
    harness_refuse(SYS_io_uring_enter, EAGAIN);
    CHECK_EQUAL(rig_start(&rig, 0), 0);
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &before);
    nanosleep(&(struct timespec){ .tv_nsec = 300000000 }, NULL);
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &after);
    CHECK((after.tv_sec - before.tv_sec) * 1000 + (after.tv_nsec - before.tv_nsec) / 1000000 < 60);
    rig_close(&rig);
}

CASE(a_ring_does_what_the_engine_asks_of_it_and_nothing_else)
{
    struct io_uring_restriction opening = { .opcode = IORING_RESTRICTION_SQE_OP, .sqe_op = IORING_OP_OPENAT };
    struct rig rig;

    rig_open(&rig, (struct plan){ 0 });
    /* What a ring may do can be said once, before it serves: it was. Nor can it have files or buffers registered. */
    int fd = rig.engine->queues[0]->uring.ring_fd;

    CHECK(syscall(SYS_io_uring_register, fd, IORING_REGISTER_RESTRICTIONS, &opening, 1) < 0);
    CHECK(syscall(SYS_io_uring_register, fd, IORING_REGISTER_FILES, &fd, 1) < 0 && (errno == EACCES || errno == EEXIST));
    blk_prove(&rig, 0);
    rig_close(&rig);
}
