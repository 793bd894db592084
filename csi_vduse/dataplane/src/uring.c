/*
 * A queue's io_uring. What is kept true: the kernel does no more through it than this engine asks
 * for, whatever comes to be written into it; and where the kernel takes nothing, for want of memory
 * perhaps, nobody asks again at once and for ever.
 */
#include "uring.h"

#include <errno.h>
#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "engine_api.h"

enum { NAP_NS = 1000000 };

int vd_uring_works(void)
{
    struct io_uring ring;
    int error = io_uring_queue_init(1, &ring, 0);

    if (!error)
        io_uring_queue_exit(&ring);
    return error;
}

/*
 * What this engine asks of a ring, whatever comes to be written into one: no more is done. 0 or
 * -errno.
 */
static int restrict_uring(struct io_uring *ring)
{
    static const uint8_t used[] = {
        IORING_OP_READV,     IORING_OP_WRITEV,    IORING_OP_WRITE,        IORING_OP_FSYNC,
        IORING_OP_FALLOCATE, IORING_OP_URING_CMD, IORING_OP_SENDMSG,      IORING_OP_RECVMSG,
        IORING_OP_POLL_ADD,  IORING_OP_TIMEOUT,   IORING_OP_ASYNC_CANCEL,
    };
    struct io_uring_restriction restrictions[sizeof(used)] = { 0 };

    for (size_t i = 0; i < sizeof(used); i++)
        restrictions[i] = (struct io_uring_restriction){ .opcode = IORING_RESTRICTION_SQE_OP,
                                                         .sqe_op = used[i] };
    /* Not by liburing's own functions, which the library lacks up to 2.3. */
    if (syscall(SYS_io_uring_register, ring->ring_fd, IORING_REGISTER_RESTRICTIONS, restrictions,
                sizeof(used)) ||
        syscall(SYS_io_uring_register, ring->ring_fd, IORING_REGISTER_ENABLE_RINGS, NULL, 0))
        return -errno;
    return 0;
}

int vd_uring_open(struct io_uring *ring, unsigned entries)
{
    /* Completions are collected by this thread when it asks, not by interrupting it (Linux 6.1). */
    struct io_uring_params params = { .flags = IORING_SETUP_SINGLE_ISSUER |
                                               IORING_SETUP_DEFER_TASKRUN |
                                               IORING_SETUP_TASKRUN_FLAG | IORING_SETUP_CLAMP |
                                               IORING_SETUP_R_DISABLED };
    int error = io_uring_queue_init_params(entries, ring, &params);

    if (error == -EINVAL) {
        params = (struct io_uring_params){ .flags = IORING_SETUP_CLAMP | IORING_SETUP_R_DISABLED };
        error = io_uring_queue_init_params(entries, ring, &params);
    }
    if (!error && (error = restrict_uring(ring)))
        io_uring_queue_exit(ring);
    return error;
}

static void nap(int result)
{
    const struct timespec moment = { .tv_nsec = NAP_NS };

    if (result < 0 && result != -EINTR && result != -ETIME)
        nanosleep(&moment, NULL);
}

struct io_uring_sqe *vd_uring_sqe(struct io_uring *ring)
{
    struct io_uring_sqe *sqe;

    while (!(sqe = io_uring_get_sqe(ring)))
        nap(io_uring_submit(ring));
    return sqe;
}

void vd_uring_watch(struct io_uring *ring, int fd, uint64_t tag)
{
    struct io_uring_sqe *sqe = vd_uring_sqe(ring);

    io_uring_prep_poll_multishot(sqe, fd, POLLIN);
    sqe->user_data = tag;
}

void vd_uring_cancel_all(struct io_uring *ring, uint64_t tag)
{
    struct io_uring_sqe *sqe = vd_uring_sqe(ring);

    io_uring_prep_cancel64(sqe, 0, IORING_ASYNC_CANCEL_ANY | IORING_ASYNC_CANCEL_ALL);
    sqe->user_data = tag;
}

void vd_uring_wait(struct io_uring *ring)
{
    nap(io_uring_submit_and_wait(ring, 1));
}

bool vd_uring_wait_until(struct io_uring *ring, uint64_t until_ns)
{
    uint64_t now = now_ns(), left = until_ns > now ? until_ns - now : 1;
    struct __kernel_timespec timeout = { (int64_t)(left / 1000000000),
                                         (long long)(left % 1000000000) };
    struct io_uring_cqe *cqe;

    /*
     * How long the kernel waits at most is an argument of the wait: there is no timer that could be
     * left over.
     */
    int result = io_uring_submit_and_wait_timeout(ring, &cqe, 1, &timeout, NULL);

    nap(result);
    return result == -ETIME;
}
