/*
 * A steady writer of 4 KiB blocks at queue depth 8 that tells every pause: longer than 1 ms between two completions.
 *
 *     pauses DEVICE BYTES
 *
 * Writes to the first BYTES of the device until SIGTERM, then prints `written BLOCKS`. A pause is a line `FROM TO` in
 * nanoseconds of CLOCK_MONOTONIC, printed when it is over; without one there is such a line every 100 ms all the
 * same, so that a reader knows how far it has come. Any error ends it with a message and code 1. It sleeps between
 * completions, so that it takes no more of the processors than the device gives it work for.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <liburing.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { DEPTH = 8, BLOCK = 4096, PAUSE_NS = 1000000, MARK_NS = 100000000 };

static volatile sig_atomic_t stop;

static void on_signal(int number)
{
    (void)number;
    stop = 1;
}

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

static int fail(const char *what, int error)
{
    printf("error: %s: %s\n", what, strerror(error));
    return 1;
}

int main(int argc, char **argv)
{
    struct sigaction action = { .sa_handler = on_signal };
    struct io_uring ring;
    uint8_t *buffers = NULL;
    int fd = argc == 3 ? open(argv[1], O_RDWR | O_DIRECT | O_CLOEXEC) : -1, in_flight = 0, error;
    uint64_t blocks = argc == 3 ? strtoull(argv[2], NULL, 10) / BLOCK : 0, written = 0, last = now_ns(), told = last;

    setvbuf(stdout, NULL, _IOLBF, 0);
    sigaction(SIGTERM, &action, NULL);
    if (fd < 0 || !blocks)
        return fail("usage: pauses DEVICE BYTES", fd < 0 ? errno : EINVAL);
    if ((error = posix_memalign((void **)&buffers, BLOCK, DEPTH * BLOCK)) || (error = -io_uring_queue_init(DEPTH, &ring, 0)))
        return fail("starting", error);
    memset(buffers, 0x5a, DEPTH * BLOCK);
    for (uint64_t next = 0; !stop || in_flight;) {
        struct io_uring_cqe *cqe;

        for (; !stop && in_flight < DEPTH; in_flight++, next++) {
            struct io_uring_sqe *sqe = io_uring_get_sqe(&ring);

            io_uring_prep_write(sqe, fd, buffers + next % DEPTH * BLOCK, BLOCK, next % blocks * BLOCK);
        }
        error = -io_uring_submit_and_wait(&ring, 1);
        if (error > 0 && error != EINTR)
            return fail("submitting", error);
        uint64_t now = now_ns();

        while (!io_uring_peek_cqe(&ring, &cqe)) {
            if (cqe->res != BLOCK)
                return fail("writing", cqe->res < 0 ? -cqe->res : EIO);
            io_uring_cqe_seen(&ring, cqe);
            in_flight--;
            written++;
            if (now - last >= PAUSE_NS || now - told >= MARK_NS) {
                printf("%" PRIu64 " %" PRIu64 "\n", last, now);
                told = now;
            }
            last = now;
        }
    }
    printf("written %" PRIu64 "\n", written);
    return 0;
}
