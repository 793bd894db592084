/*
 * The memory of the rings for a vhost-user server: one file, with a part for each queue.
 *
 * A part has the three areas of a split ring (VIRTIO 1.3, 2.7) and a slot for each request. A
 * request has the descriptor of its number, which is indirect and points into its slot: so neither
 * is ever searched for.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "vhost.h"

enum { PAGE = 4096, ENDS = 2 /* pieces of a request beside its data: header and status */ };

static size_t rounded(size_t bytes, size_t to)
{
    return (bytes + to - 1) / to * to;
}

static size_t desc_bytes(uint32_t size)
{
    return size * sizeof(struct vring_desc);
}

static size_t avail_bytes(uint32_t size)
{
    return rounded(6 + 2 * (size_t)size, VD_CACHE_LINE_BYTES);
}

static size_t used_bytes(uint32_t size)
{
    return rounded(6 + 8 * (size_t)size, VD_CACHE_LINE_BYTES);
}

static size_t slot_bytes(uint32_t size)
{
    return rounded(sizeof(struct vhost_slot) + (size + ENDS) * sizeof(struct vring_desc),
                   VD_CACHE_LINE_BYTES);
}

static size_t part_bytes(uint32_t size)
{
    return rounded(
        desc_bytes(size) + avail_bytes(size) + used_bytes(size) + size * slot_bytes(size), PAGE);
}

static void place_ring(struct vhost *v, uint32_t index)
{
    struct vhost_ring *ring = &v->rings[index];
    uint32_t size = v->config.queue_size;
    size_t at = index * v->ring_bytes;

    ring->desc = (struct vring_desc *)(v->memory + at);
    at += desc_bytes(size);
    ring->avail = (struct vring_avail *)(v->memory + at);
    at += avail_bytes(size);
    ring->used = (struct vring_used *)(v->memory + at);
    at += used_bytes(size);
    ring->slots = v->memory + at;
    ring->slots_iova = VHOST_IOVA + at;
    ring->slot_bytes = slot_bytes(size);
}

int vhost_new(const struct vd_config *config, struct vhost **result)
{
    struct vhost *v = calloc(1, sizeof(*v));

    if (!v)
        return -ENOMEM;
    v->config = *config;
    v->ring_bytes = part_bytes(config->queue_size);
    v->bytes = v->ring_bytes * config->max_queues;
    v->fd = memfd_create("vhost-user-rings", MFD_CLOEXEC);
    if (v->fd >= 0 && !ftruncate(v->fd, (off_t)v->bytes))
        v->memory = mmap(NULL, v->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, v->fd, 0);
    if (!v->memory || v->memory == MAP_FAILED) {
        int error = -errno;

        v->memory = NULL;
        vhost_free(v);
        return error;
    }
    for (uint32_t i = 0; i < config->max_queues; i++) {
        place_ring(v, i);
        v->rings[i].kick_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        v->rings[i].call_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    }
    *result = v;
    return 0;
}

void vhost_free(struct vhost *v)
{
    for (uint32_t i = 0; v->memory && i < v->config.max_queues; i++) {
        close(v->rings[i].kick_fd);
        close(v->rings[i].call_fd);
    }
    if (v->memory)
        munmap(v->memory, v->bytes);
    if (v->fd >= 0)
        close(v->fd);
    free(v);
}

void vhost_ring_clear(const struct vhost *v, struct vhost_ring *ring)
{
    uint32_t size = v->config.queue_size;

    memset(ring->avail, 0, avail_bytes(size));
    memset(ring->used, 0, used_bytes(size));
}

struct vhost_slot *vhost_slot(const struct vhost_ring *ring, uint32_t index)
{
    return (struct vhost_slot *)(ring->slots + index * ring->slot_bytes);
}

uint64_t vhost_slot_iova(const struct vhost_ring *ring, uint32_t index, const void *in_slot)
{
    return ring->slots_iova + index * ring->slot_bytes +
           (uint64_t)((const uint8_t *)in_slot - (const uint8_t *)vhost_slot(ring, index));
}
