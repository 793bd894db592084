/*
 * The kernel's FUSE protocol (linux/fuse.h), spoken directly, in a process of its own: if a test dies while its
 * requests hang here, the alarm ends this process and with it the connection, and the kernel lets the test go.
 */
#include "fuse_image.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include "harness.h"

enum { WAITING_MAX = 64, REQUEST_BYTES = 256 * 1024, LIFE_S = 60 };

struct waiting {
    struct fuse_in_header header;
    uint64_t offset;
    uint32_t size;
    uint8_t *data;
};

static char mount_point[] = "/tmp/ring-fuse-XXXXXX";
static pid_t server;

static void reply(int fd, uint64_t unique, int error, const void *data, size_t size)
{
    struct fuse_out_header header = { (uint32_t)(sizeof(header) + size), -error, unique };
    struct iovec iov[] = { { &header, sizeof(header) }, { (void *)(uintptr_t)data, size } };

    (void)!writev(fd, iov, size ? 2 : 1);
}

static struct fuse_attr attributes(uint64_t node, uint64_t size)
{
    return node == FUSE_ROOT_ID ? (struct fuse_attr){ .ino = node, .mode = S_IFDIR | 0755, .nlink = 2 }
                                : (struct fuse_attr){ .ino = node, .size = size, .blocks = size / 512,
                                                      .mode = S_IFREG | 0600, .nlink = 1, .blksize = 4096 };
}

static void transfer(struct fuse_image *image, int fd, struct waiting *w)
{
    if (load_acquire(image->error)) {
        reply(fd, w->header.unique, load_acquire(image->error), NULL, 0);
    } else if (w->header.opcode == FUSE_READ) {
        reply(fd, w->header.unique, 0, image->content + w->offset, w->size);
    } else if (w->header.opcode == FUSE_FSYNC) {
        reply(fd, w->header.unique, 0, NULL, 0);
    } else {
        struct fuse_write_out out = { .size = w->size };

        memcpy(image->content + w->offset, w->data, w->size);
        reply(fd, w->header.unique, 0, &out, sizeof(out));
    }
    free(w->data);
}

static void serve(struct fuse_image *image, int fd, uint64_t size, enum fuse_image_kind kind)
{
    static uint8_t buffer[REQUEST_BYTES + 4096];
    static struct waiting queue[WAITING_MAX];
    int waiting = 0;

    for (;;) {
        struct pollfd wait = { .fd = fd, .events = POLLIN };

        poll(&wait, 1, waiting ? 5 : 1000);
        if (!load_acquire(image->stall)) {
            for (int i = 0; i < waiting; i++)
                transfer(image, fd, &queue[i]);
            waiting = 0;
            store_release(image->stalled, 0);
        }
        if (!(wait.revents & POLLIN)) {
            if (wait.revents)
                return;
            continue;
        }
        ssize_t length = read(fd, buffer, sizeof(buffer));
        struct fuse_in_header *in = (void *)buffer;
        void *body = in + 1;

        if (length < (ssize_t)sizeof(*in)) {
            if (errno == ENODEV)
                return;
            continue;
        }
        switch (in->opcode) {
        case FUSE_INIT: {
            struct fuse_init_out out = { .major = FUSE_KERNEL_VERSION, .minor = 31, .max_readahead = 0,
                                         .flags = FUSE_ASYNC_READ | FUSE_BIG_WRITES | (kind == FUSE_IMAGE_WRITEBACK ? FUSE_WRITEBACK_CACHE : 0), .max_background = 64,
                                         .congestion_threshold = 64, .max_write = 128 * 1024, .time_gran = 1 };
            reply(fd, in->unique, 0, &out, sizeof(out));
            break;
        }
        case FUSE_LOOKUP: {
            struct fuse_entry_out out = { .nodeid = 2, .attr_valid = 3600, .entry_valid = 3600, .attr = attributes(2, size) };

            reply(fd, in->unique, strcmp(body, "image") ? ENOENT : 0, &out, strcmp(body, "image") ? 0 : sizeof(out));
            break;
        }
        case FUSE_SETATTR: /* times */
        case FUSE_GETATTR: {
            struct fuse_attr_out out = { .attr_valid = 3600, .attr = attributes(in->nodeid, size) };

            reply(fd, in->unique, 0, &out, sizeof(out));
            break;
        }
        case FUSE_OPEN: {
            struct fuse_open_out out = { .fh = 1, .open_flags = kind == FUSE_IMAGE_PARALLEL ? FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES : 0 };

            reply(fd, in->unique, 0, &out, sizeof(out));
            break;
        }
        case FUSE_READ:
        case FUSE_WRITE:
        case FUSE_FSYNC: {
            struct fuse_read_in *r = body;
            struct fuse_write_in *w = body;
            struct waiting new = { .header = *in };

            if (kind == FUSE_IMAGE_WRITEBACK && in->opcode == FUSE_READ && r->flags & O_DIRECT && r->size % 4096) {
                reply(fd, in->unique, EINVAL, NULL, 0);
                break;
            }
            if (in->opcode != FUSE_FSYNC) {
                new.offset = r->offset;
                new.size = r->size;
            }

            if (in->opcode == FUSE_FSYNC)
                store_release(image->syncs, *image->syncs + 1);
            if (in->opcode == FUSE_WRITE) {
                store_release(image->cached, *image->cached + !(w->flags & O_DIRECT));
                new.data = malloc(w->size);
                memcpy(new.data, w + 1, w->size);
            }
            if (new.offset + new.size > size)
                new.size = new.offset < size ? (uint32_t)(size - new.offset) : 0;
            if (waiting < load_acquire(image->stall)) {
                queue[waiting++] = new;
                store_release(image->stalled, waiting);
            } else {
                transfer(image, fd, &new);
            }
            break;
        }
        case FUSE_FALLOCATE:
            reply(fd, in->unique, load_acquire(image->zeroing) ? load_acquire(image->zeroing) : ENOSYS, NULL, 0);
            break;
        case FUSE_FLUSH:
        case FUSE_RELEASE:
            reply(fd, in->unique, 0, NULL, 0);
            break;
        case FUSE_FORGET:
        case FUSE_BATCH_FORGET:
        case FUSE_INTERRUPT:
            break;
        default:
            reply(fd, in->unique, ENOSYS, NULL, 0);
        }
    }
}

static void unmount(void)
{
    umount2(mount_point, MNT_DETACH);
    kill(server, SIGKILL);
    rmdir(mount_point);
}

void fuse_image_open_kind(struct fuse_image *image, uint64_t size, enum fuse_image_kind kind)
{
    char options[128];
    int fd = open("/dev/fuse", O_RDWR | O_CLOEXEC);
    uint8_t *shared = mmap(NULL, size + 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

    CHECK(shared != MAP_FAILED);
    harness_private_mounts();
    image->stall = (int32_t *)shared;
    image->stalled = image->stall + 1;
    image->error = image->stall + 2;
    image->cached = image->stall + 3;
    image->zeroing = image->stall + 4;
    image->syncs = image->stall + 5;
    image->content = shared + 4096;
    CHECK(mkdtemp(mount_point));
    snprintf(options, sizeof(options), "fd=%d,rootmode=40000,user_id=0,group_id=0", fd);
    if (fd < 0 || mount("ring", mount_point, "fuse", MS_NOSUID | MS_NODEV, options)) {
        rmdir(mount_point);
        harness_skip("cannot mount a FUSE file system");
    }
    server = fork();
    CHECK(server >= 0);
    if (!server) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        alarm(LIFE_S);
        serve(image, fd, size, kind);
        _exit(0);
    }
    close(fd);
    harness_at_end(unmount);
    snprintf(image->path, sizeof(image->path), "%s/image", mount_point);
}

void fuse_image_open(struct fuse_image *image, uint64_t size)
{
    fuse_image_open_kind(image, size, FUSE_IMAGE_PLAIN);
}

void fuse_image_stall(struct fuse_image *image, bool stall)
{
    store_release(image->stall, stall ? WAITING_MAX : 0);
}

void fuse_image_stall_one(struct fuse_image *image)
{
    store_release(image->stall, 1);
}

void fuse_image_fail(struct fuse_image *image, int error)
{
    store_release(image->error, error);
}

int32_t fuse_image_stalled(const struct fuse_image *image)
{
    return load_acquire(image->stalled);
}
