/*
 * Reads and writes of the file backend, on the queue's thread.
 *
 * Kept true: where there is direct I/O every write is direct. A write through the page cache takes
 * the rest of its block from the disk first and writes it back later, over whatever a direct write
 * put there meanwhile. So what a direct write cannot take as it is, because its buffers lie oddly,
 * is copied to a buffer of the queue's that lies well, piece by piece; and what is no whole block
 * of the file is no whole block of the volume either (file.c) and is refused. Reads have no such
 * need: the kernel keeps the page cache coherent with direct writes.
 */
#include <errno.h>
#include <linux/virtio_blk.h>
#include <string.h>
#include <unistd.h>

#include "file.h"

/* Whether a direct request can go from or to the driver's buffers. */
static bool lies_well(const struct vd_file *f, const struct vd_request *r)
{
    uintptr_t bits = 0;

    for (uint32_t i = 0; i < r->data_count; i++)
        bits |= (uintptr_t)r->data[i].iov_base | r->data[i].iov_len;
    return !(bits % f->memory_align);
}

/*
 * tmpfs and its like do not take io_uring's "do not wait": each request would go through a thread
 * of the kernel's, for a copy that this thread makes in less time than it takes to wake another.
 */
static void copy_in_memory(struct vd_queue *q, struct vd_request *r)
{
    const struct vd_file *f = vd_file_queue_of(q)->file;
    off_t offset = (off_t)(r->offset + r->done);
    ssize_t n = r->operation == VD_READ
                    ? preadv(f->buffered_fd, r->data, (int)r->data_count, offset)
                    : pwritev(f->buffered_fd, r->data, (int)r->data_count, offset);

    int result = n < 0 ? -errno : (int)n;

    vd_queue_take_time(q); /* the copy is all of the request's latency */
    vd_file_transferred(q, r, result);
}

/*
 * Fill the queue's buffer with the next piece of a write, and write that; or wait until it is free.
 */
static void bounce(struct vd_queue *q, struct vd_request *r)
{
    struct vd_file_queue *fq = vd_file_queue_of(q);
    uint64_t left = r->length - r->done, filled = 0;

    if (fq->bouncing) {
        r->next = NULL;
        *fq->unbounced_end = r;
        fq->unbounced_end = &r->next;
        return;
    }
    for (uint32_t i = 0; i < r->data_count && filled < VD_BOUNCE_BYTES; i++) {
        uint64_t room = VD_BOUNCE_BYTES - filled,
                 n = r->data[i].iov_len < room ? r->data[i].iov_len : room;

        memcpy(fq->place->bounce + filled, r->data[i].iov_base, n);
        filled += n;
    }
    if (vd_queue_memory_lost(q)) { /* what was copied may be zeros of ours */
        vd_queue_fault(q, VD_FAULT_MEMORY);
        vd_request_finish(q, r, EFAULT);
        return;
    }
    struct io_uring_sqe *sqe = vd_queue_sqe(q);

    fq->bouncing = r;
    r->method = VD_METHOD_BOUNCED;
    io_uring_prep_write(sqe, fq->file->direct_fd, fq->place->bounce,
                        (unsigned)(left < filled ? left : filled), r->offset + r->done);
    vd_sqe_of_event(sqe, VD_FILE_BOUNCED);
}

static void finish(struct vd_queue *q, struct vd_request *r)
{
    if (r->operation == VD_READ || vd_file_can_flush(q) || vd_file_queue_of(q)->file->in_memory)
        vd_request_finish(q, r, 0);
    else
        vd_file_sync(q, r);
}

void vd_file_transfer(struct vd_queue *q, struct vd_request *r)
{
    struct vd_file *f = vd_file_queue_of(q)->file;
    uint64_t offset = r->offset + r->done;
    bool aligned = f->direct_fd >= 0 && vd_file_is_aligned(f, offset, r->length - r->done);
    bool direct = aligned && lies_well(f, r);

    if (r->done == r->length) { /* or nothing was asked for */
        finish(q, r);
        return;
    }
    if (f->in_memory) {
        copy_in_memory(q, r);
        return;
    }
    if (r->operation == VD_WRITE && f->direct_fd >= 0 && !direct) {
        if (aligned)
            bounce(q, r);
        else
            vd_request_finish(q, r, EINVAL);
        return;
    }
    struct io_uring_sqe *sqe = vd_queue_sqe(q);
    int fd = direct ? f->direct_fd : f->buffered_fd;

    r->method = direct ? VD_METHOD_DIRECT : VD_METHOD_CACHED;
    if (r->operation == VD_READ) {
        io_uring_prep_readv(sqe, fd, r->data, r->data_count, offset);
    } else {
        if (!direct)
            vd_file_cache_changed(f);
        io_uring_prep_writev(sqe, fd, r->data, r->data_count, offset);
    }
    vd_sqe_of_request(sqe, r);
}

/* Some bytes were moved; go on with the rest. */
static void go_on(struct vd_queue *q, struct vd_request *r, uint32_t bytes)
{
    r->done += bytes;
    while (r->data_count && bytes >= r->data->iov_len) {
        bytes -= (uint32_t)r->data->iov_len;
        r->data++;
        r->data_count--;
    }
    if (bytes) {
        r->data->iov_base = (uint8_t *)r->data->iov_base + bytes;
        r->data->iov_len -= bytes;
    }
    vd_file_transfer(q, r);
}

void vd_file_transferred(struct vd_queue *q, struct vd_request *r, int result)
{
    if (r->operation == VD_WRITE && r->method == VD_METHOD_CACHED)
        vd_file_cache_changed(vd_file_queue_of(q)->file);
    if (result == -EINTR)
        vd_file_transfer(q, r);
    else if (result < 0)
        vd_file_failed(q, r, -result);
    else if (!result)
        vd_request_finish(q, r, EIO); /* the end of the file: an image cut short */
    else
        go_on(q, r, (uint32_t)result);
}
