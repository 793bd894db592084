/*
 * A FUSE file system of one file, `image`, that passes everything to a backing file and can misbehave on demand:
 * answer with an error, answer late, or not answer at all until told to. It is how a backend gets lost and comes back.
 *
 *     faultfs MOUNT_POINT BACKING CONTROL
 *
 * CONTROL is a file of four 32-bit words that is read before every request: error (an errno, 0: none), delay in ms,
 * hold (1: answer nothing), and, written by us, how many requests wait. One thread. Kept true: a request that waits
 * touches the backing file only when its wait is over, so that what a dead worker has in flight here is really late.
 * It ends when the file system is unmounted.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { REQUEST_BYTES = 1 << 20, NODE_IMAGE = 2, POLL_MS = 5 };

struct control { int32_t error, delay_ms, hold, waiting; };

struct request {
    struct request *next;
    struct fuse_in_header header;
    uint64_t due_ns, offset, length;
    uint32_t mode;
    uint8_t data[];
};

static int fuse_fd, backing_fd;
static volatile struct control *control;
static struct request *waiting, **waiting_end = &waiting;
static uint8_t buffer[REQUEST_BYTES + 4096], answer[REQUEST_BYTES];

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

static void reply(uint64_t unique, int error, const void *data, size_t size)
{
    struct fuse_out_header header = { (uint32_t)(sizeof(header) + (error ? 0 : size)), -error, unique };
    struct iovec parts[] = { { &header, sizeof(header) }, { (void *)(uintptr_t)data, size } };

    (void)!writev(fuse_fd, parts, size && !error ? 2 : 1); /* an interrupted request has no taker */
}

static struct fuse_attr attributes(uint64_t node)
{
    struct stat stat = { 0 };

    fstat(backing_fd, &stat);
    if (node != NODE_IMAGE)
        return (struct fuse_attr){ .ino = node, .mode = S_IFDIR | 0755, .nlink = 2 };
    return (struct fuse_attr){ .ino = node, .size = (uint64_t)stat.st_size, .blocks = (uint64_t)stat.st_blocks,
                               .mode = S_IFREG | 0600, .nlink = 1, .blksize = 4096 };
}

/* Do what a request asks for. */
static void perform(const struct request *r)
{
    ssize_t moved = 0;

    switch (r->header.opcode) {
    case FUSE_READ:
        moved = pread(backing_fd, answer, r->length, (off_t)r->offset);
        break;
    case FUSE_WRITE:
        moved = pwrite(backing_fd, r->data, r->length, (off_t)r->offset);
        break;
    case FUSE_FSYNC:
        moved = fdatasync(backing_fd);
        break;
    default:
        moved = fallocate(backing_fd, (int)r->mode, (off_t)r->offset, (off_t)r->length);
    }
    struct fuse_write_out written = { .size = moved > 0 ? (uint32_t)moved : 0 };

    if (r->header.opcode == FUSE_READ)
        reply(r->header.unique, moved < 0 ? errno : 0, answer, moved > 0 ? (size_t)moved : 0);
    else
        reply(r->header.unique, moved < 0 ? errno : 0, &written, r->header.opcode == FUSE_WRITE ? sizeof(written) : 0);
}

static void perform_what_is_due(void)
{
    while (waiting && !control->hold && (waiting->due_ns <= now_ns() || !control->delay_ms)) {
        struct request *r = waiting;

        waiting = r->next;
        if (!waiting)
            waiting_end = &waiting;
        perform(r);
        free(r);
        control->waiting--;
    }
}

/* A transfer, a sync or a fallocate arrived. */
static void take(const struct fuse_in_header *in, const void *body)
{
    const struct fuse_write_in *write = body;
    const struct fuse_fallocate_in *range = body;
    size_t data = in->opcode == FUSE_WRITE ? write->size : 0;

    /* A full disk can be read; and a sync that fails is another story: what it says is lost (tests/ring/cases_durable.c). */
    if (control->error && in->opcode != FUSE_FSYNC && (control->error != ENOSPC || in->opcode == FUSE_WRITE)) {
        reply(in->unique, control->error, NULL, 0);
        return;
    }
    struct request *r = calloc(1, sizeof(*r) + data);

    if (!r) {
        reply(in->unique, ENOMEM, NULL, 0);
        return;
    }
    r->header = *in;
    if (in->opcode == FUSE_FALLOCATE) {
        r->offset = range->offset;
        r->length = range->length;
        r->mode = range->mode;
    } else if (in->opcode != FUSE_FSYNC) {
        r->offset = write->offset;
        r->length = write->size;
        memcpy(r->data, write + 1, data);
    }
    if (!control->hold && !control->delay_ms && !waiting) {
        perform(r);
        free(r);
        return;
    }
    r->due_ns = now_ns() + (uint64_t)control->delay_ms * 1000000;
    *waiting_end = r;
    waiting_end = &r->next;
    control->waiting++;
}

static void serve(const struct fuse_in_header *in)
{
    const void *body = in + 1;

    switch (in->opcode) {
    case FUSE_INIT: {
        struct fuse_init_out out = { .major = FUSE_KERNEL_VERSION, .minor = 31, .flags = FUSE_ASYNC_READ | FUSE_BIG_WRITES,
                                     .max_background = 64, .congestion_threshold = 64, .max_write = 128 * 1024,
                                     .time_gran = 1 };
        reply(in->unique, 0, &out, sizeof(out));
        return;
    }
    case FUSE_LOOKUP: {
        struct fuse_entry_out out = { .nodeid = NODE_IMAGE, .attr = attributes(NODE_IMAGE) };

        reply(in->unique, strcmp(body, "image") ? ENOENT : 0, &out, sizeof(out));
        return;
    }
    case FUSE_GETATTR: {
        struct fuse_attr_out out = { .attr = attributes(in->nodeid) };

        reply(in->unique, 0, &out, sizeof(out));
        return;
    }
    case FUSE_OPEN: {
        struct fuse_open_out out = { .fh = 1, .open_flags = FOPEN_DIRECT_IO };

        reply(in->unique, 0, &out, sizeof(out));
        return;
    }
    case FUSE_READ:
    case FUSE_WRITE:
    case FUSE_FSYNC:
    case FUSE_FALLOCATE:
        take(in, body);
        return;
    case FUSE_FLUSH:
    case FUSE_RELEASE:
        reply(in->unique, 0, NULL, 0);
        return;
    case FUSE_FORGET:
    case FUSE_BATCH_FORGET:
    case FUSE_INTERRUPT:
        return;
    default:
        reply(in->unique, ENOSYS, NULL, 0);
    }
}

static int mount_at(const char *path)
{
    char options[128];

    fuse_fd = open("/dev/fuse", O_RDWR | O_CLOEXEC);
    snprintf(options, sizeof(options), "fd=%d,rootmode=40000,user_id=0,group_id=0", fuse_fd);
    return fuse_fd < 0 ? -1 : mount("faultfs", path, "fuse", MS_NOSUID | MS_NODEV, options);
}

int main(int argc, char **argv)
{
    int control_fd = argc == 4 ? open(argv[3], O_RDWR | O_CREAT | O_CLOEXEC, 0600) : -1;

    backing_fd = argc == 4 ? open(argv[2], O_RDWR | O_CLOEXEC) : -1;
    if (control_fd < 0 || backing_fd < 0 || ftruncate(control_fd, sizeof(*control)) || mount_at(argv[1])) {
        perror("faultfs");
        return 1;
    }
    control = mmap(NULL, sizeof(*control), PROT_READ | PROT_WRITE, MAP_SHARED, control_fd, 0);
    if (control == MAP_FAILED)
        return 1;
    for (;;) {
        struct pollfd wait = { .fd = fuse_fd, .events = POLLIN };

        poll(&wait, 1, waiting ? POLL_MS : -1);
        perform_what_is_due();
        if (wait.revents & ~POLLIN)
            return 0;
        if (!(wait.revents & POLLIN))
            continue;
        if (read(fuse_fd, buffer, sizeof(buffer)) >= (ssize_t)sizeof(struct fuse_in_header))
            serve((const void *)buffer);
        else if (errno == ENODEV)
            return 0;
    }
}
