/*
 * The file backend: an image file or block device, through io_uring, straight from and to the driver's buffers.
 *
 * The file is opened twice: with O_DIRECT where the file system has it, and without. A request goes direct if its
 * position and buffers are aligned as the file wants, else through the page cache; the kernel keeps the two
 * coherent, and FLUSH covers both. An OFD lock, exclusive for writers, keeps a second worker away. It falls when
 * the last reference to the open file falls, which a request in flight is: so a successor that holds the lock knows
 * that nothing of its predecessor is still on its way to the disk.
 *
 * Errors of a file system that is full or away are waited for (waiting.c), but for one case: a sync that fails drops
 * what the page cache held (the next one would be in order, and the data lost), so that it is tried again only if
 * nothing can have been there: nothing was written through the page cache, by us or a predecessor, since the last good one.
 *
 * DISCARD and WRITE_ZEROES are fallocate; what the file system cannot do is remembered and replaced: an
 * unsupported discard does nothing, as it may; zeroes are written out.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <linux/virtio_blk.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "../engine.h"

enum { ZEROES_BYTES = 256 * 1024, FILE_DEFAULT_ALIGN = 512 };

struct file {
    int direct_fd;           /* -1: the file system has no O_DIRECT */
    int buffered_fd;
    uint32_t memory_align, offset_align;
    bool block_device;
    bool in_memory;          /* copying is all there is to a transfer */
    bool no_punch, no_zero_range; /* learned; each queue thread may set them, to the same value */
    uint64_t cache_changes;       /* writes through the page cache begun, and ended; any queue's */
    uint64_t cache_clean;         /* what that was when the last sync began that went well */
    bool synced;                  /* there was one */
    void *zeroes;
};

enum method { NOTHING, PUNCH, ZERO_RANGE, WRITE, SYNC };

/* Both open files can have requests in flight, so each holds a lock; on bytes of their own, or they would clash. */
static int lock(int fd, off_t byte, bool read_only)
{
    struct flock range = { .l_type = read_only ? F_RDLCK : F_WRLCK, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1 };

    return fd < 0 || !fcntl(fd, F_OFD_SETLK, &range) ? 0 : -errno;
}

/* Learn what direct requests have to look like: from statx where the file system tells, else by trying. */
static void probe_direct(struct file *f, const char *path, int flags)
{
    struct statx stat = { 0 };
    void *buffer = NULL;

    f->direct_fd = open(path, flags | O_DIRECT);
    if (f->direct_fd < 0)
        return;
    f->memory_align = f->offset_align = FILE_DEFAULT_ALIGN;
#ifdef STATX_DIOALIGN
    if (!statx(f->direct_fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &stat) && stat.stx_mask & STATX_DIOALIGN &&
        stat.stx_dio_offset_align) {
        f->memory_align = stat.stx_dio_mem_align;
        f->offset_align = stat.stx_dio_offset_align;
        return;
    }
#else
    (void)stat;
#endif
    if (posix_memalign(&buffer, 4096, 4096))
        buffer = NULL;
    if (!buffer || pread(f->direct_fd, buffer, FILE_DEFAULT_ALIGN, 0) < 0)
        f->offset_align = f->memory_align = 4096;
    if (!buffer || pread(f->direct_fd, buffer, 4096, 0) < 0) {
        close(f->direct_fd);
        f->direct_fd = -1;
    }
    free(buffer);
}

static void file_close(void *state)
{
    struct file *f = state;

    if (f->direct_fd >= 0)
        close(f->direct_fd);
    if (f->buffered_fd >= 0)
        close(f->buffered_fd);
    free(f->zeroes);
    free(f);
}

static bool is_in_memory(int fd)
{
    struct statfs system;

    return !fstatfs(fd, &system) && (system.f_type == TMPFS_MAGIC || system.f_type == RAMFS_MAGIC);
}

static uint64_t file_size(const struct file *f)
{
    struct stat stat;
    uint64_t size = 0;

    if (f->block_device)
        return ioctl(f->buffered_fd, BLKGETSIZE64, &size) ? 0 : size;
    return fstat(f->buffered_fd, &stat) ? 0 : (uint64_t)stat.st_size;
}

static int file_open(const struct vd_config *config, void **state)
{
    int flags = (config->read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC;
    struct file *f = calloc(1, sizeof(*f));
    struct stat stat = { 0 };
    int error = 0;

    if (!f)
        return -ENOMEM;
    f->direct_fd = -1;
    f->buffered_fd = open(config->path, flags);
    if (f->buffered_fd < 0 || fstat(f->buffered_fd, &stat))
        error = -errno;
    else if (!S_ISREG(stat.st_mode) && !S_ISBLK(stat.st_mode))
        error = -EISDIR;
    if (!error) {
        f->block_device = S_ISBLK(stat.st_mode);
        f->in_memory = !f->block_device && is_in_memory(f->buffered_fd);
        probe_direct(f, config->path, flags);
        error = lock(f->buffered_fd, 0, config->read_only);
    }
    if (!error)
        error = lock(f->direct_fd, 1, config->read_only);
    if (!error && file_size(f) < config->capacity_bytes)
        error = -ENOSPC;
    if (!error && posix_memalign(&f->zeroes, 4096, ZEROES_BYTES))
        error = -ENOMEM;
    if (error) {
        file_close(f);
        return error;
    }
    memset(f->zeroes, 0, ZEROES_BYTES);
    *state = f;
    return 0;
}

static void file_info(void *state, struct vd_backend_info *info)
{
    const struct file *f = state;

    info->direct = f->direct_fd >= 0;
    info->discard = 1;
    info->capacity_bytes = file_size(f);
}

static void file_complete(struct vd_queue *q, struct vd_request *r, int result);

/* A driver that cannot send FLUSH counts on what it writes to be stable when it completes (VIRTIO 1.3, 5.2.6.2). */
static bool can_flush(const struct vd_queue *q)
{
    return q->config.features >> VIRTIO_BLK_F_FLUSH & 1;
}

static void cache_changed(struct file *f)
{
    __atomic_fetch_add(&f->cache_changes, 1, __ATOMIC_RELAXED);
}

static bool is_direct(const struct file *f, const struct vd_request *r)
{
    uintptr_t bits = 0;

    if (f->direct_fd < 0 || ((r->offset + r->done) | (r->length - r->done)) % f->offset_align)
        return false;
    for (uint32_t i = 0; i < r->data_count; i++)
        bits |= (uintptr_t)r->data[i].iov_base | r->data[i].iov_len;
    return !(bits % f->memory_align);
}

/*
 * tmpfs and its like do not take io_uring's "do not wait": each request would go through a thread of the kernel's, for
 * a copy that this thread makes in less time than it takes to wake another.
 */
static void copy(struct vd_queue *q, struct vd_request *r)
{
    const struct file *f = q->engine->backend;
    off_t offset = (off_t)(r->offset + r->done);
    ssize_t n = r->operation == VD_READ ? preadv(f->buffered_fd, r->data, (int)r->data_count, offset)
                                        : pwritev(f->buffered_fd, r->data, (int)r->data_count, offset);

    int result = n < 0 ? -errno : (int)n;

    q->now_ns = now_ns(); /* the copy is all of the request's latency */
    file_complete(q, r, result);
}

/* Submit what is left of a read or write. */
static void transfer(struct vd_queue *q, struct vd_request *r)
{
    struct file *f = q->engine->backend;
    uint64_t offset = r->offset + r->done;
    struct io_uring_sqe *sqe;

    if (f->in_memory) {
        copy(q, r);
        return;
    }
    sqe = vd_queue_sqe(q, r);
    bool direct = is_direct(f, r);
    int fd = direct ? f->direct_fd : f->buffered_fd;

    r->method = direct ? NOTHING : WRITE;
    if (r->operation == VD_READ) {
        io_uring_prep_readv(sqe, fd, r->data, r->data_count, offset);
    } else {
        if (!direct)
            cache_changed(f);
        io_uring_prep_writev(sqe, fd, r->data, r->data_count, offset);
        if (!can_flush(q))
            sqe->rw_flags = RWF_DSYNC;
    }
    io_uring_sqe_set_data(sqe, r);
}

/* A step of a request failed: have it tried again if the reason may pass, else tell the driver. */
static void failed(struct vd_queue *q, struct vd_request *r, int error)
{
    const struct file *f = q->engine->backend;
    bool dirty = load_relaxed(&f->cache_changes) != load_relaxed(&f->cache_clean) ||
                 (q->config.resume && !load_relaxed(&f->synced));

    if ((r->method == SYNC && dirty) || !vd_request_wait(q, r, error))
        vd_request_finish(q, r, error);
}

static void sync_data(struct vd_queue *q, struct vd_request *r)
{
    const struct file *f = q->engine->backend;
    struct io_uring_sqe *sqe = vd_queue_sqe(q, r);

    r->method = SYNC;
    r->mark = load_relaxed(&f->cache_changes);
    io_uring_prep_fsync(sqe, f->buffered_fd, IORING_FSYNC_DATASYNC);
    io_uring_sqe_set_data(sqe, r);
}

/* Start the step that r->step counts, of a discard or of zeroing, by the best means that is left. */
static void next_extent(struct vd_queue *q, struct vd_request *r)
{
    struct file *f = q->engine->backend;
    bool discard = r->operation == VD_DISCARD, punch = !load_relaxed(&f->no_punch);

    while (r->step < r->extent_count && (!r->extents[r->step].length || (discard && !punch)))
        r->step++;
    if (r->step == r->extent_count) {
        if (can_flush(q) || r->method == NOTHING)
            vd_request_finish(q, r, 0);
        else
            sync_data(q, r);
        return;
    }
    const struct vd_extent *e = &r->extents[r->step];
    struct io_uring_sqe *sqe = vd_queue_sqe(q, r);

    r->method = punch && (discard || e->unmap) ? PUNCH : load_relaxed(&f->no_zero_range) ? WRITE : ZERO_RANGE;
    if (r->method == WRITE) {
        uint64_t left = e->length - r->done;

        cache_changed(f);
        io_uring_prep_write(sqe, f->buffered_fd, f->zeroes, left < ZEROES_BYTES ? (unsigned)left : ZEROES_BYTES,
                            e->offset + r->done);
    } else {
        int mode = r->method == PUNCH ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE;

        io_uring_prep_fallocate(sqe, f->buffered_fd, mode | FALLOC_FL_KEEP_SIZE, (off_t)e->offset, (off_t)e->length);
    }
    io_uring_sqe_set_data(sqe, r);
}

static void file_submit(struct vd_queue *q, struct vd_request *r)
{
    switch (r->operation) {
    case VD_READ:
    case VD_WRITE:
        r->method = NOTHING;
        if (!r->length)
            vd_request_finish(q, r, 0);
        else
            transfer(q, r);
        return;
    case VD_FLUSH:
        sync_data(q, r);
        return;
    default:
        if (!r->failing_since_ns) /* else it goes on where it failed */
            r->method = NOTHING;
        next_extent(q, r);
    }
}

/* A transfer moved some bytes; go on with the rest, unless it was the end of the file: an image cut short. */
static void transferred(struct vd_queue *q, struct vd_request *r, uint32_t bytes)
{
    if (!bytes) {
        vd_request_finish(q, r, EIO);
        return;
    }
    r->done += bytes;
    if (r->done == r->length) {
        vd_request_finish(q, r, 0);
        return;
    }
    while (bytes >= r->data->iov_len) {
        bytes -= (uint32_t)r->data->iov_len;
        r->data++;
        r->data_count--;
    }
    r->data->iov_base = (uint8_t *)r->data->iov_base + bytes;
    r->data->iov_len -= bytes;
    transfer(q, r);
}

/* A step of a discard or of zeroing ended. */
static void zeroed(struct vd_queue *q, struct vd_request *r, int result)
{
    struct file *f = q->engine->backend;

    if (result == -EOPNOTSUPP && r->method != WRITE) {
        store_relaxed(r->method == PUNCH ? &f->no_punch : &f->no_zero_range, true);
    } else if (result < 0) {
        failed(q, r, -result);
        return;
    } else if (r->method == WRITE && !result) {
        vd_request_finish(q, r, EIO);
        return;
    } else {
        r->done += (uint32_t)result;
        if (r->method != WRITE || r->done == r->extents[r->step].length) {
            r->done = 0;
            r->step++;
        }
    }
    next_extent(q, r);
}

static void synced(struct vd_queue *q, struct vd_request *r)
{
    struct file *f = q->engine->backend;

    store_relaxed(&f->cache_clean, r->mark);
    store_relaxed(&f->synced, true);
    vd_request_finish(q, r, 0);
}

static void file_complete(struct vd_queue *q, struct vd_request *r, int result)
{
    struct file *f = q->engine->backend;
    bool again = result == -EAGAIN || result == -EINTR;

    if (r->method == WRITE && r->operation != VD_READ)
        cache_changed(f);
    if (r->operation == VD_READ || r->operation == VD_WRITE) {
        if (again)
            transfer(q, r);
        else if (result < 0)
            failed(q, r, -result);
        else
            transferred(q, r, (uint32_t)result);
    } else if (r->method == SYNC) {
        if (again)
            sync_data(q, r);
        else if (result < 0)
            failed(q, r, -result);
        else
            synced(q, r);
    } else if (again) {
        next_extent(q, r);
    } else {
        zeroed(q, r, result);
    }
}

const struct vd_backend_ops vd_backend_file = {
    .name = "file",
    .open = file_open,
    .close = file_close,
    .info = file_info,
    .submit = file_submit,
    .complete = file_complete,
};
