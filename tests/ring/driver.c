#include "driver.h"

#include <errno.h>
#include <linux/virtio_config.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "common.h"
#include "harness.h"

void driver_open(struct driver *d, uint64_t size, uint32_t count, uint64_t iova, uint64_t gap)
{
    uint64_t piece = size / count;

    memset(d, 0, sizeof(*d));
    CHECK(count <= REGIONS_MAX && piece % 4096 == 0);
    d->fd = memfd_create("driver", MFD_CLOEXEC);
    CHECK(d->fd >= 0 && !ftruncate(d->fd, (off_t)size));
    d->base = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, d->fd, 0);
    CHECK(d->base != MAP_FAILED);
    d->size = size;
    d->region_count = count;
    for (uint32_t i = 0; i < count; i++)
        d->regions[i] = (struct vd_region){ iova + i * (piece + gap), piece, i * piece, d->fd, 1 };
}

void driver_close(struct driver *d)
{
    munmap(d->base, d->size);
    close(d->fd);
}

void *driver_alloc(struct driver *d, uint64_t size, uint64_t align)
{
    uint64_t piece = d->regions[0].size, start = (d->used + align - 1) / align * align;

    if (start / piece != (start + size - 1) / piece)
        start = (start / piece + 1) * piece;
    CHECK(size <= piece && start + size <= d->size);
    d->used = start + size;
    return d->base + start;
}

uint64_t driver_iova(const struct driver *d, const void *p)
{
    uint64_t offset = (uint64_t)((const uint8_t *)p - d->base);
    const struct vd_region *r = &d->regions[offset / d->regions[0].size];

    return r->iova + (offset - r->offset);
}

void dqueue_open(struct dqueue *q, struct driver *d, uint16_t size, bool packed, bool event_idx, bool indirect)
{
    memset(q, 0, sizeof(*q));
    q->d = d;
    q->size = size;
    q->packed = packed;
    q->event_idx = event_idx;
    q->indirect = indirect;
    q->desc = driver_alloc(d, 16ul * size, 16);
    if (packed) {
        packed_open(q);
    } else {
        q->avail = driver_alloc(d, 6 + 2ul * size, 2);
        q->used = driver_alloc(d, 6 + 8ul * size, 4);
    }
    q->tables = driver_alloc(d, 16ul * size * INDIRECT_MAX, 16);
    q->cookies = calloc(size, sizeof(*q->cookies));
    q->chain_length = calloc(size, sizeof(*q->chain_length));
    q->kick_fd = eventfd(0, EFD_CLOEXEC);
    q->interrupt_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    q->next = calloc(size, sizeof(*q->next));
    CHECK(q->next && q->cookies && q->chain_length && q->kick_fd >= 0 && q->interrupt_fd >= 0);
    dqueue_reset(q, 0);
}

void dqueue_close(struct dqueue *q)
{
    close(q->kick_fd);
    close(q->interrupt_fd);
    free(q->next);
    free(q->cookies);
    free(q->chain_length);
}

void dqueue_reset(struct dqueue *q, uint16_t first)
{
    memset(q->desc, 0, 16ul * q->size);
    for (uint16_t i = 0; i < q->size; i++)
        q->next[i] = (uint16_t)(i + 1);
    memset(q->cookies, 0, q->size * sizeof(*q->cookies));
    q->free_head = 0;
    q->free_count = q->size;
    q->next_avail = q->kicked_avail = q->last_used = first;
    if (q->packed) {
        packed_reset(q, first);
    } else {
        memset(q->avail, 0, 6 + 2ul * q->size);
        memset(q->used, 0, 6 + 8ul * q->size);
        store_relaxed(&q->avail->idx, first);
        store_relaxed(&q->used->idx, first);
    }
    dqueue_interrupts(q);
}

struct vd_queue_config dqueue_config(const struct dqueue *q, uint64_t features)
{
    features |= 1ull << VIRTIO_F_VERSION_1 | 1ull << VIRTIO_F_ACCESS_PLATFORM;
    features |= (uint64_t)q->event_idx << VIRTIO_RING_F_EVENT_IDX | (uint64_t)q->indirect << VIRTIO_RING_F_INDIRECT_DESC;
    features |= (uint64_t)q->packed << VIRTIO_F_RING_PACKED;
    return (struct vd_queue_config){
        .features = features,
        .size = q->size,
        .desc_iova = driver_iova(q->d, q->packed ? (void *)q->ring : q->desc),
        .driver_iova = driver_iova(q->d, q->packed ? (void *)q->driver_event : q->avail),
        .device_iova = driver_iova(q->d, q->packed ? (void *)q->device_event : q->used),
        .state = dqueue_state(q),
        .kick_fd = q->kick_fd,
        .notify_fd = q->interrupt_fd,
    };
}

static void fill(struct vring_desc *desc, const struct piece *piece, bool more, uint16_t next)
{
    desc->addr = piece->iova;
    desc->len = piece->length;
    desc->flags = (uint16_t)((piece->write ? VRING_DESC_F_WRITE : 0) | (more ? VRING_DESC_F_NEXT : 0));
    desc->next = next;
}

bool dqueue_add(struct dqueue *q, const struct piece *pieces, uint32_t count, void *cookie)
{
    if (q->packed)
        return packed_add(q, pieces, count, cookie);
    bool indirect = q->indirect && count > 1 && count <= INDIRECT_MAX;
    uint16_t head = q->free_head, at = head, needed = indirect ? 1 : (uint16_t)count;

    if (needed > q->free_count)
        return false;
    if (indirect) {
        struct vring_desc *table = q->tables + (size_t)head * INDIRECT_MAX;
        uint16_t next = q->next[head];

        for (uint32_t i = 0; i < count; i++)
            fill(&table[i], &pieces[i], i + 1 < count, (uint16_t)(i + 1));
        q->desc[head] = (struct vring_desc){ driver_iova(q->d, table), count * 16, VRING_DESC_F_INDIRECT, next };
        q->free_head = next;
    } else {
        for (uint32_t i = 0; i < count; i++) {
            fill(&q->desc[at], &pieces[i], i + 1 < count, q->next[at]);
            at = q->next[at];
        }
        q->free_head = at;
    }
    q->free_count = (uint16_t)(q->free_count - needed);
    q->chain_length[head] = needed;
    CHECK(cookie && !q->cookies[head]);
    q->cookies[head] = cookie;
    store_relaxed(&q->avail->ring[q->next_avail & (q->size - 1)], head);
    q->next_avail++;
    return true;
}

void dqueue_put(struct dqueue *q, uint16_t head)
{
    if (q->packed) {
        packed_put(q, head);
        return;
    }
    store_relaxed(&q->avail->ring[q->next_avail & (q->size - 1)], head);
    q->next_avail++;
}

void dqueue_show(struct dqueue *q)
{
    if (q->packed)
        packed_show(q);
    else
        store_release(&q->avail->idx, q->next_avail); /* pairs with the acquire in vd_split_available */
}

void dqueue_kick_always(struct dqueue *q)
{
    uint64_t one = 1;

    dqueue_show(q);
    q->added = 0;
    q->kicked_avail = q->next_avail;
    q->kicks++;
    CHECK(write(q->kick_fd, &one, sizeof(one)) == sizeof(one));
}

void dqueue_kick(struct dqueue *q)
{
    uint16_t old = q->kicked_avail;

    dqueue_show(q);
    full_barrier(); /* pairs with the ones in vd_split_enable_kick and vd_packed_enable_kick */
    q->kicked_avail = q->next_avail;
    if (q->packed         ? packed_kick_wanted(q)
        : q->event_idx ? vring_need_event(load_relaxed((uint16_t *)&q->used->ring[q->size]), q->next_avail, old)
                     : !(load_relaxed(&q->used->flags) & VRING_USED_F_NO_NOTIFY))
        dqueue_kick_always(q);
}

void *dqueue_get(struct dqueue *q, uint32_t *written)
{
    if (q->packed)
        return packed_get(q, written);
    struct vring_used_elem *slot = &q->used->ring[q->last_used & (q->size - 1)];

    if (load_acquire(&q->used->idx) == q->last_used)
        return NULL;
    uint32_t head = load_relaxed(&slot->id);
    void *cookie;

    CHECK(head < q->size);
    cookie = q->cookies[head];
    CHECK(cookie); /* or it was completed twice, or never sent */
    if (written)
        *written = load_relaxed(&slot->len);
    q->cookies[head] = NULL;
    uint16_t last = (uint16_t)head;
    for (uint16_t i = 1; i < q->chain_length[head]; i++)
        last = q->next[last];
    q->next[last] = q->free_head;
    q->free_head = (uint16_t)head;
    q->free_count = (uint16_t)(q->free_count + q->chain_length[head]);
    q->last_used++;
    return cookie;
}

bool dqueue_enable_interrupt(struct dqueue *q)
{
    if (q->packed)
        return packed_enable_interrupt(q);
    if (q->event_idx)
        store_relaxed(&q->avail->ring[q->size], q->last_used);
    else
        store_relaxed(&q->avail->flags, 0);
    full_barrier(); /* pairs with the one in vd_split_publish */
    return load_relaxed(&q->used->idx) != q->last_used;
}

void dqueue_want_interrupt(struct dqueue *q, uint16_t entries, uint16_t descriptors)
{
    if (q->packed)
        packed_want_interrupt(q, (uint16_t)((entries - 1) * (q->indirect ? 1 : descriptors)));
    else
        store_relaxed(&q->avail->ring[q->size], (uint16_t)(q->last_used + entries - 1));
}

void dqueue_want_none(struct dqueue *q)
{
    if (q->packed)
        store_relaxed(&q->driver_event->flags, VRING_PACKED_EVENT_FLAG_DISABLE);
    else if (q->event_idx)
        store_relaxed(&q->avail->ring[q->size], (uint16_t)(q->last_used - 100)); /* long past */
    else
        store_relaxed(&q->avail->flags, VRING_AVAIL_F_NO_INTERRUPT);
}

uint32_t dqueue_state(const struct dqueue *q)
{
    return q->packed ? q->avail_at | (uint32_t)q->avail_at << 16 : q->next_avail;
}

uint32_t dqueue_shown(const struct dqueue *q)
{
    return q->packed ? packed_shown(q) : load_acquire(&q->used->idx);
}

bool dqueue_wait(struct dqueue *q, int timeout_ms)
{
    struct pollfd wait = { .fd = q->interrupt_fd, .events = POLLIN };

    while (!dqueue_enable_interrupt(q)) {
        if (poll(&wait, 1, timeout_ms) <= 0)
            return false;
        dqueue_interrupts(q);
    }
    return true;
}

uint64_t dqueue_interrupts(struct dqueue *q)
{
    uint64_t count;

    return read(q->interrupt_fd, &count, sizeof(count)) == sizeof(count) ? count : 0;
}
