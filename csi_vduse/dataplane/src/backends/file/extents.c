/*
 * DISCARD and WRITE_ZEROES of the file backend, on the queue's thread: extent by extent, each by
 * the best means left.
 *
 * A discard is the device's own trim, or a hole; what cannot do either does nothing, as it may.
 * Zeroes are a hole if the driver lets blocks go, else a range that the file system zeroes, else
 * they are written, as any write is (transfer.c). That a means is not there at all (EOPNOTSUPP,
 * ENOSYS) is remembered; that it cannot do this extent, misaligned for example (EINVAL), is not.
 */
#include <errno.h>
#include <linux/falloc.h>

#include "file.h"

enum {
    ZEROES_AT_ONCE = VD_FILE_ZEROES_BYTES,
    TRIM_COMMAND = 0x1200, /* BLOCK_URING_CMD_DISCARD, linux/blkdev.h of 6.12: _IO(0x12, 0) */
};

/*
 * The next means to try of an extent after the one that did not work; NONE: nothing is left, or to
 * be done.
 */
static enum vd_method means_after(const struct vd_file *f, const struct vd_request *r,
                                  const struct vd_extent *e, enum vd_method failed)
{
    bool discard = r->operation == VD_DISCARD;

    switch (failed) {
    case VD_METHOD_NONE:
        if (discard && f->block_device && !load_relaxed(&f->no_trim))
            return VD_METHOD_TRIM;
        /* fall through */
    case VD_METHOD_TRIM:
        if ((discard || e->unmap) && !load_relaxed(&f->no_punch))
            return VD_METHOD_PUNCH;
        /* fall through */
    case VD_METHOD_PUNCH:
        if (discard)
            return VD_METHOD_NONE;
        if (!load_relaxed(&f->no_zero_range))
            return VD_METHOD_ZERO_RANGE;
        /* fall through */
    default:
        return VD_METHOD_ZEROES;
    }
}

/* Begin with the extent that r->step counts, if there is one. */
static void begin_extent(const struct vd_file *f, struct vd_request *r)
{
    r->method = r->step < r->extent_count ? means_after(f, r, &r->extents[r->step], VD_METHOD_NONE)
                                          : 0;
}

static void write_zeroes(struct vd_queue *q, struct vd_request *r, const struct vd_extent *e)
{
    struct vd_file *f = vd_file_queue_of(q)->file;
    uint64_t offset = e->offset + r->done, left = e->length - r->done;
    unsigned length = left < ZEROES_AT_ONCE ? (unsigned)left : ZEROES_AT_ONCE;

    if (f->direct_fd >= 0 && !vd_file_is_aligned(f, offset, length)) {
        vd_request_finish(q, r, EINVAL);
        return;
    }
    struct io_uring_sqe *sqe = vd_queue_sqe(q);

    if (f->direct_fd < 0)
        vd_file_cache_changed(f);
    io_uring_prep_write(sqe, f->direct_fd >= 0 ? f->direct_fd : f->buffered_fd, f->zeroes, length,
                        offset);
    vd_sqe_of_request(sqe, r);
}

/* Do the extent that r->step counts by r->method, or go on to the next. */
static void proceed(struct vd_queue *q, struct vd_request *r)
{
    struct vd_file *f = vd_file_queue_of(q)->file;

    while (r->step < r->extent_count &&
           (!r->extents[r->step].length || r->method == VD_METHOD_NONE)) {
        r->step++;
        begin_extent(f, r);
    }
    if (r->step == r->extent_count) {
        if (vd_file_can_flush(q))
            vd_request_finish(q, r, 0);
        else
            vd_file_sync(q, r);
        return;
    }
    const struct vd_extent *e = &r->extents[r->step];

    if (r->method == VD_METHOD_ZEROES) {
        write_zeroes(q, r, e);
        return;
    }
    struct io_uring_sqe *sqe = vd_queue_sqe(q);

    if (r->method == VD_METHOD_TRIM) {
        io_uring_prep_rw(IORING_OP_URING_CMD, sqe, f->buffered_fd, (void *)(uintptr_t)e->offset, 0,
                         0);
        sqe->cmd_op = TRIM_COMMAND;
        sqe->addr3 = e->length;
    } else {
        int mode = r->method == VD_METHOD_PUNCH ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE;

        io_uring_prep_fallocate(sqe, f->buffered_fd, mode | FALLOC_FL_KEEP_SIZE, (off_t)e->offset,
                                (off_t)e->length);
    }
    vd_sqe_of_request(sqe, r);
}

void vd_file_zero(struct vd_queue *q, struct vd_request *r)
{
    if (!r->failing_since_ns) /* else it goes on where it failed */
        begin_extent(vd_file_queue_of(q)->file, r);
    proceed(q, r);
}

/* A means does not work: remember that if it never will, and try the next. */
static void replace(struct vd_queue *q, struct vd_request *r, int error)
{
    struct vd_file *f = vd_file_queue_of(q)->file;

    if (error != EINVAL)
        store_relaxed(r->method == VD_METHOD_TRIM    ? &f->no_trim
                      : r->method == VD_METHOD_PUNCH ? &f->no_punch
                                                     : &f->no_zero_range,
                      true);
    r->method = means_after(f, r, &r->extents[r->step], r->method);
    proceed(q, r);
}

void vd_file_zeroed(struct vd_queue *q, struct vd_request *r, int result)
{
    struct vd_file *f = vd_file_queue_of(q)->file;
    bool written = r->method == VD_METHOD_ZEROES;

    if (written && f->direct_fd < 0)
        vd_file_cache_changed(f);
    if (result == -EINTR) {
        proceed(q, r);
    } else if (!written && (result == -EOPNOTSUPP || result == -ENOSYS || result == -EINVAL ||
                            result == -ENOTTY)) {
        replace(q, r, -result);
    } else if (result < 0) {
        vd_file_failed(q, r, -result);
    } else if (written && !result) {
        vd_request_finish(q, r, EIO);
    } else {
        r->done += written ? (uint32_t)result : 0;
        if (!written || r->done == r->extents[r->step].length) {
            r->done = 0;
            r->step++;
            begin_extent(f, r);
        }
        proceed(q, r);
    }
}
