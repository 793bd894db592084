/*
 * virtio-blk requests (VIRTIO 1.3, 5.2.6): from a descriptor chain to a checked request, and back
 * to a status.
 *
 * A verdict, and nothing else: the queue acts on it. Everything that a backend sees has been
 * checked here: offset and length are whole sectors inside the capacity, extents too, writes do not
 * reach a read-only device. What is wrong in a well-formed chain fails that request alone.
 */
#include "virtio_blk.h"

#include <errno.h>
#include <linux/virtio_blk.h>
#include <string.h>

/*
 * Take length bytes off the front of the pieces, copying them to out; the caller knows that they
 * are there.
 */
static void take_front(struct iovec **iov, uint32_t *count, void *out, size_t length)
{
    uint8_t *to = out;

    while (length) {
        size_t n = (*iov)->iov_len < length ? (*iov)->iov_len : length;

        memcpy(to, (*iov)->iov_base, n);
        to += n;
        length -= n;
        (*iov)->iov_base = (uint8_t *)(*iov)->iov_base + n;
        (*iov)->iov_len -= n;
        if (!(*iov)->iov_len) {
            (*iov)++;
            (*count)--;
        }
    }
}

static void put_serial(struct vd_request *r, const char *serial)
{
    size_t left = VD_SERIAL_BYTES;

    for (uint32_t i = 0; i < r->data_count && left; i++) {
        size_t n = r->data[i].iov_len < left ? r->data[i].iov_len : left;

        memcpy(r->data[i].iov_base, serial + (VD_SERIAL_BYTES - left), n);
        left -= n;
    }
}

static bool in_capacity(const struct vd_disk *disk, uint64_t sector, uint64_t sectors)
{
    uint64_t capacity = load_relaxed(&disk->capacity_bytes) / VD_SECTOR_BYTES;

    return sector <= capacity && sectors <= capacity - sector;
}

/* Read the segments of DISCARD or WRITE_ZEROES into extents; 0 or a positive errno. */
static int read_extents(const struct vd_disk *disk, struct vd_request *r)
{
    struct iovec *iov = r->data;
    uint32_t count = r->data_count;

    if (!r->length || r->length % sizeof(struct virtio_blk_discard_write_zeroes) ||
        r->length / sizeof(struct virtio_blk_discard_write_zeroes) > VD_EXTENTS_MAX)
        return EINVAL;
    r->extent_count = (uint32_t)(r->length / sizeof(struct virtio_blk_discard_write_zeroes));
    r->length = 0;
    for (uint32_t i = 0; i < r->extent_count; i++) {
        struct virtio_blk_discard_write_zeroes segment;
        uint32_t known = r->operation == VD_WRITE_ZEROES ? VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP : 0;

        take_front(&iov, &count, &segment, sizeof(segment));
        if (segment.flags & ~known)
            return ENOTSUP;
        if (!in_capacity(disk, segment.sector, segment.num_sectors))
            return EINVAL;
        r->extents[i] = (struct vd_extent){ segment.sector * VD_SECTOR_BYTES,
                                            (uint64_t)segment.num_sectors * VD_SECTOR_BYTES,
                                            segment.flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP };
        r->length += r->extents[i].length;
    }
    return 0;
}

/* Decide what the request is and whether it may be done; 0 or a positive errno. */
static int check(const struct vd_disk *disk, uint64_t features, struct vd_request *r, uint32_t type,
                 uint64_t sector)
{
    switch (type) {
    case VIRTIO_BLK_T_IN:
    case VIRTIO_BLK_T_OUT:
        r->operation = type == VIRTIO_BLK_T_IN ? VD_READ : VD_WRITE;
        if (r->operation == VD_WRITE && disk->read_only)
            return EROFS;
        if (r->length % VD_SECTOR_BYTES || !in_capacity(disk, sector, r->length / VD_SECTOR_BYTES))
            return EINVAL;
        r->offset = sector * VD_SECTOR_BYTES;
        return 0;
    case VIRTIO_BLK_T_FLUSH:
        r->operation = VD_FLUSH;
        r->length = 0;
        return 0;
    case VIRTIO_BLK_T_DISCARD:
    case VIRTIO_BLK_T_WRITE_ZEROES:
        if (!(features >> (type == VIRTIO_BLK_T_DISCARD ? VIRTIO_BLK_F_DISCARD
                                                        : VIRTIO_BLK_F_WRITE_ZEROES) &
              1))
            return ENOTSUP;
        r->operation = type == VIRTIO_BLK_T_DISCARD ? VD_DISCARD : VD_WRITE_ZEROES;
        return disk->read_only ? EROFS : read_extents(disk, r);
    case VIRTIO_BLK_T_GET_ID:
        r->operation = VD_GET_ID;
        if (r->length > VD_SERIAL_BYTES)
            r->length = VD_SERIAL_BYTES;
        return 0;
    default:
        return ENOTSUP;
    }
}

enum vd_verdict vd_blk_begin(const struct vd_disk *disk, uint64_t features, struct vd_request *r,
                             const struct vd_chain *chain, int *error)
{
    struct virtio_blk_outhdr header;
    struct iovec *readable = chain->iov, *writable = chain->iov + chain->readable;
    uint32_t readable_count = chain->readable, writable_count = chain->writable;
    struct iovec *last;

    r->operation = VD_UNSUPPORTED;
    r->extent_count = 0;
    r->offset = r->length = r->done = 0;
    r->data_count = r->step = 0;
    last = &writable[writable_count - 1];
    r->status = (uint8_t *)last->iov_base + last->iov_len - 1;
    if (!--last->iov_len)
        writable_count--;
    if (chain->readable_bytes < sizeof(header)) {
        *error = EINVAL;
        return VD_MALFORMED;
    }
    if (readable->iov_len == sizeof(header)) { /* as all drivers have it */
        memcpy(&header, readable->iov_base, sizeof(header));
        readable++;
        readable_count--;
    } else {
        take_front(&readable, &readable_count, &header, sizeof(header));
    }
    if (header.type == VIRTIO_BLK_T_IN || header.type == VIRTIO_BLK_T_GET_ID) {
        r->data = writable;
        r->data_count = writable_count;
        r->length = chain->writable_bytes - 1;
    } else {
        r->data = readable;
        r->data_count = readable_count;
        r->length = chain->readable_bytes - sizeof(header);
    }
    *error = check(disk, features, r, header.type, header.sector);
    if (r->operation == VD_GET_ID) {
        put_serial(r, disk->serial);
        return VD_ANSWER;
    }
    if (!*error)
        return VD_SERVE;
    return *error == ENOTSUP || *error == EROFS ? VD_ANSWER : VD_MALFORMED;
}
