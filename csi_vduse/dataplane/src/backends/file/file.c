/*
 * The file backend: an image file or block device, through io_uring, straight from and to the
 * driver's buffers.
 *
 * The image is opened once and then again for each purpose, so that it is one file whatever happens
 * to its path: with O_DIRECT where that is safe, without, and for each queue to make things stable
 * through (sync.c). An OFD lock, exclusive for writers, keeps a second worker away; a block device
 * is opened exclusively too, which keeps away mounts and all others that claim it. Both fall when
 * the last reference to the open file falls, which a request in flight is: so a successor that
 * holds the lock knows that nothing of its predecessor is still on its way to the disk.
 *
 * Direct I/O is not used where the image's blocks are larger than the volume's, because a part of a
 * block can only be written through the page cache, and the two must not meet in one block
 * (transfer.c); nor where the file system keeps checksums of what it writes (btrfs): a driver may
 * change a page while it is on its way, and could not read it any more.
 *
 * Errors of a file system that is full or away are waited for (waiting.c), but for those of a sync
 * (sync.c).
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "file.h"

enum { FILE_DEFAULT_ALIGN = 512 };

/*
 * Both open files can have requests in flight, so each holds a lock; on bytes of their own, or they
 * would clash.
 */
static int lock(int fd, off_t byte, bool read_only)
{
    struct flock range = {
        .l_type = read_only ? F_RDLCK : F_WRLCK, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1
    };

    return fd < 0 || !fcntl(fd, F_OFD_SETLK, &range) ? 0 : -errno;
}

/* The same file once more, as an open file of its own; -1 with errno. */
static int open_again(int fd, int flags)
{
    char path[32];

    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    return open(path, flags);
}

static bool is_in_memory(int fd)
{
    struct statfs system;

    return !fstatfs(fd, &system) && (system.f_type == TMPFS_MAGIC || system.f_type == RAMFS_MAGIC);
}

static bool has_checksums(int fd)
{
    struct statfs system;
    int flags = 0;

    return !fstatfs(fd, &system) && system.f_type == BTRFS_SUPER_MAGIC &&
           (ioctl(fd, FS_IOC_GETFLAGS, &flags) || !(flags & FS_NOCOW_FL));
}

/*
 * Learn what direct requests have to look like: from statx where the file system tells, else by
 * trying.
 */
static bool learn_alignment(struct vd_file *f)
{
    struct statx stat = { 0 };
    void *buffer = NULL;
    bool works;

    f->memory_align = f->offset_align = FILE_DEFAULT_ALIGN;
#ifdef STATX_DIOALIGN
    if (!statx(f->direct_fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &stat) &&
        stat.stx_mask & STATX_DIOALIGN && stat.stx_dio_offset_align) {
        f->memory_align = stat.stx_dio_mem_align;
        f->offset_align = stat.stx_dio_offset_align;
        return true;
    }
#else
    (void)stat;
#endif
    if (posix_memalign(&buffer, 4096, 4096))
        return false;
    if (pread(f->direct_fd, buffer, FILE_DEFAULT_ALIGN, 0) < 0)
        f->offset_align = f->memory_align = 4096;
    works = pread(f->direct_fd, buffer, 4096, 0) >= 0;
    free(buffer);
    return works;
}

/* Have direct I/O if it is there and safe. */
static void open_direct(struct vd_file *f, const struct vd_config *config, int flags)
{
    if (f->in_memory || (!config->read_only && has_checksums(f->buffered_fd)))
        return;
    f->direct_fd = open_again(f->buffered_fd, flags | O_DIRECT);
    if (f->direct_fd < 0)
        return;
    if (!learn_alignment(f) || (!config->read_only && f->offset_align > config->block_size_bytes)) {
        close(f->direct_fd);
        f->direct_fd = -1;
    }
}

/* What each queue has of its own; 0 or -errno. */
static int open_places(struct vd_file *f, int flags)
{
    for (uint32_t i = 0; i < f->place_count; i++) {
        struct vd_file_place *place = &f->places[i];
        void *bounce = NULL;

        place->sync_fd = open_again(f->buffered_fd, flags);
        if (place->sync_fd < 0)
            return -errno;
        if (f->direct_fd >= 0 && posix_memalign(&bounce, 4096, VD_BOUNCE_BYTES))
            return -ENOMEM;
        place->bounce = bounce;
    }
    return 0;
}

static void file_close(void *state)
{
    struct vd_file *f = state;

    for (uint32_t i = 0; i < f->place_count; i++) {
        if (f->places[i].sync_fd >= 0)
            close(f->places[i].sync_fd);
        free(f->places[i].bounce);
    }
    if (f->direct_fd >= 0)
        close(f->direct_fd);
    if (f->buffered_fd >= 0)
        close(f->buffered_fd);
    if (f->zeroes)
        munmap(f->zeroes, VD_FILE_ZEROES_BYTES);
    free(f);
}

static uint64_t file_size(const struct vd_file *f)
{
    struct stat stat;
    uint64_t size = 0;

    if (f->block_device)
        return ioctl(f->buffered_fd, BLKGETSIZE64, &size) ? 0 : size;
    return fstat(f->buffered_fd, &stat) ? 0 : (uint64_t)stat.st_size;
}

/* Open all of it; 0 or -errno. */
static int open_image(struct vd_file *f, const struct vd_config *config)
{
    int flags = (config->read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC, error;
    struct stat stat;

    /* O_EXCL is for block devices and nothing to regular files (open(2)). */
    f->buffered_fd = open(config->path, flags | (config->read_only ? 0 : O_EXCL));
    if (f->buffered_fd < 0 || fstat(f->buffered_fd, &stat))
        return -errno;
    if (!S_ISREG(stat.st_mode) && !S_ISBLK(stat.st_mode))
        return -EISDIR;
    f->block_device = S_ISBLK(stat.st_mode);
    f->in_memory = !f->block_device && is_in_memory(f->buffered_fd);
    open_direct(f, config, flags);
    error = lock(f->buffered_fd, 0, config->read_only);
    if (!error)
        error = lock(f->direct_fd, 1, config->read_only);
    if (!error && file_size(f) < config->capacity_bytes)
        error = -ENOSPC;
    if (!error)
        error = open_places(f, flags);
    return error;
}

static int file_open(const struct vd_config *config, void **state)
{
    struct vd_file *f = calloc(1, sizeof(*f) + config->max_queues * sizeof(f->places[0]));
    int error;

    if (!f)
        return -ENOMEM;
    f->direct_fd = f->buffered_fd = -1;
    f->place_count = config->max_queues;
    for (uint32_t i = 0; i < f->place_count; i++)
        f->places[i].sync_fd = -1;
    error = open_image(f, config);
    if (!error) { /* the kernel's one page of zeros, as often as it takes */
        f->zeroes = mmap(NULL, VD_FILE_ZEROES_BYTES, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (f->zeroes == MAP_FAILED) {
            f->zeroes = NULL;
            error = -ENOMEM;
        }
    }
    if (error) {
        file_close(f);
        return error;
    }
    *state = f;
    return 0;
}

static void file_info(void *state, struct vd_backend_info *info)
{
    const struct vd_file *f = state;

    info->direct = f->direct_fd >= 0;
    info->discard = 1;
    info->capacity_bytes = file_size(f);
}

static int file_queue_open(struct vd_queue *q)
{
    struct vd_file *f = vd_queue_volume(q);
    struct vd_file_queue *fq = calloc(1, sizeof(*fq));

    if (!fq)
        return -ENOMEM;
    fq->file = f;
    fq->place = &f->places[vd_queue_index(q)];
    fq->unbounced_end = &fq->unbounced;
    vd_queue_set_backend(q, fq);
    return 0;
}

static void file_queue_close(struct vd_queue *q)
{
    free(vd_queue_backend(q));
    vd_queue_set_backend(q, NULL);
}

static void file_submit(struct vd_queue *q, struct vd_request *r)
{
    switch (r->operation) {
    case VD_READ:
    case VD_WRITE:
        vd_file_transfer(q, r);
        return;
    case VD_FLUSH:
        vd_file_sync(q, r);
        return;
    default:
        vd_file_zero(q, r);
    }
}

static void file_complete(struct vd_queue *q, struct vd_request *r, int result)
{
    if (r->operation == VD_READ || r->operation == VD_WRITE)
        vd_file_transferred(q, r, result);
    else
        vd_file_zeroed(q, r, result);
}

static void file_event(struct vd_queue *q, unsigned event, int result)
{
    struct vd_file_queue *fq = vd_file_queue_of(q);
    struct vd_request *r = fq->bouncing;

    if (event == VD_FILE_SYNCED) {
        vd_file_synced(q, result);
        return;
    }
    fq->bouncing = NULL;
    if (vd_queue_is_abandoned(q))
        vd_request_finish(q, r, ECANCELED); /* not another step of it */
    else
        vd_file_transferred(q, r, result);
}

/*
 * Those that wait for another one's end begin, or end themselves if nobody waits for them any more.
 */
static void file_turn(struct vd_queue *q)
{
    struct vd_file_queue *fq = vd_file_queue_of(q);
    struct vd_request *r;

    if (vd_queue_is_abandoned(q)) {
        while ((r = vd_file_take_unsynced(fq)) || (r = vd_file_take_unbounced(fq)))
            vd_request_finish(q, r, ECANCELED);
        return;
    }
    while (!fq->bouncing && (r = vd_file_take_unbounced(fq)))
        vd_file_transfer(q, r);
    if (fq->unsynced && !fq->syncing)
        vd_file_begin_sync(q);
}

const struct vd_backend_ops vd_backend_file = {
    .name = "file",
    .open = file_open,
    .close = file_close,
    .info = file_info,
    .submit = file_submit,
    .complete = file_complete,
    .queue_open = file_queue_open,
    .queue_close = file_queue_close,
    .turn = file_turn,
    .event = file_event,
};
