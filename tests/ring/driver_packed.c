/* Packed virtqueues (VIRTIO 1.3, 2.8), as a driver sees them. */
#include <string.h>

#include "common.h"
#include "driver.h"
#include "harness.h"

enum { WRAP = 1 << 15, AVAIL = 1 << VRING_PACKED_DESC_F_AVAIL, USED = 1 << VRING_PACKED_DESC_F_USED };

static uint16_t index_of(uint16_t position)
{
    return position & (WRAP - 1);
}

static uint16_t moved(const struct dqueue *q, uint16_t position, uint32_t n)
{
    uint32_t at = index_of(position) + n;

    return (uint16_t)(at < q->size ? at | (position & WRAP) : (at - q->size) | (~position & WRAP));
}

static uint16_t flags_of(const struct piece *piece)
{
    return piece->write ? VRING_DESC_F_WRITE : 0;
}

static bool is_used(const struct dqueue *q, uint16_t position)
{
    uint16_t flags = load_acquire(&q->ring[index_of(position)].flags); /* pairs with the release in vd_packed_publish */

    return (flags & (AVAIL | USED)) == (position & WRAP ? AVAIL | USED : 0);
}

void packed_open(struct dqueue *q)
{
    q->ring = driver_alloc(q->d, 16ul * q->size, 16);
    q->driver_event = driver_alloc(q->d, sizeof(*q->driver_event), 4);
    q->device_event = driver_alloc(q->d, sizeof(*q->device_event), 4);
}

void packed_reset(struct dqueue *q, uint16_t first)
{
    uint16_t wrap = first / q->size % 2 ? 0 : WRAP;

    q->avail_at = q->used_at = (uint16_t)(first % q->size | wrap);
    q->held = false;
    q->added = 0;
    memset(q->driver_event, 0, sizeof(*q->driver_event));
    memset(q->device_event, 0, sizeof(*q->device_event));
    /* As a ring looks where all that lies behind was used in this lap, and all that lies ahead in the one before. */
    for (uint16_t i = 0; i < q->size; i++) {
        bool set = (i < first % q->size) == (wrap != 0);

        q->ring[i] = (struct vring_packed_desc){ .flags = set ? AVAIL | USED : 0 };
    }
}

/* Write the next descriptor; the first of what is to be shown at once is held back by its flags. */
static void append(struct dqueue *q, uint64_t iova, uint32_t length, uint16_t id, uint16_t flags)
{
    struct vring_packed_desc *desc = &q->ring[index_of(q->avail_at)];

    flags |= q->avail_at & WRAP ? AVAIL : USED;
    store_relaxed(&desc->addr, iova);
    store_relaxed(&desc->len, length);
    store_relaxed(&desc->id, id);
    if (q->held) {
        store_relaxed(&desc->flags, flags);
    } else {
        q->held = true;
        q->held_at = index_of(q->avail_at);
        q->held_flags = flags;
    }
    q->avail_at = moved(q, q->avail_at, 1);
    q->added++;
}

bool packed_add(struct dqueue *q, const struct piece *pieces, uint32_t count, void *cookie)
{
    bool indirect = q->indirect && count > 1 && count <= INDIRECT_MAX;
    uint16_t id = q->free_head, needed = indirect ? 1 : (uint16_t)count;

    if (needed > q->free_count)
        return false;
    if (indirect) {
        struct vring_packed_desc *table = (struct vring_packed_desc *)q->tables + (size_t)id * INDIRECT_MAX;

        for (uint32_t i = 0; i < count; i++)
            table[i] = (struct vring_packed_desc){ pieces[i].iova, pieces[i].length, 0xdead, flags_of(&pieces[i]) };
        append(q, driver_iova(q->d, table), count * 16, id, VRING_DESC_F_INDIRECT);
    } else {
        for (uint32_t i = 0; i < count; i++) {
            bool last = i + 1 == count; /* of the ids only the last one's counts */

            append(q, pieces[i].iova, pieces[i].length, last ? id : 0xdead,
                   flags_of(&pieces[i]) | (last ? 0 : VRING_DESC_F_NEXT));
        }
    }
    q->free_head = q->next[id];
    q->free_count = (uint16_t)(q->free_count - needed);
    q->chain_length[id] = needed;
    CHECK(cookie && !q->cookies[id]);
    q->cookies[id] = cookie;
    q->next_avail++;
    return true;
}

void packed_put(struct dqueue *q, uint16_t id)
{
    uint16_t at = id < q->size ? id : 0, count = 0;
    struct vring_desc desc;

    do {
        desc = q->desc[at++];
        if (desc.flags & VRING_DESC_F_INDIRECT && q->d->size >= desc.addr && desc.len <= 16 * INDIRECT_MAX) {
            /* Written in the layout of split queues. */
            struct vring_packed_desc *to = (struct vring_packed_desc *)q->tables;

            for (int i = 0; i < INDIRECT_MAX; i++) {
                struct vring_desc from = q->tables[i];

                to[i] = (struct vring_packed_desc){ from.addr, from.len, from.next, from.flags };
            }
        }
        append(q, desc.addr, desc.len, id, desc.flags);
    } while (desc.flags & VRING_DESC_F_NEXT && ++count < 3);
}

void packed_show(struct dqueue *q)
{
    if (q->held)
        store_release(&q->ring[q->held_at].flags, q->held_flags); /* pairs with the acquire in vd_packed_next */
    q->held = false;
}

bool packed_kick_wanted(struct dqueue *q)
{
    uint16_t new = index_of(q->avail_at), old = (uint16_t)(new - q->added), flags = load_acquire(&q->device_event->flags);
    uint16_t event = load_relaxed(&q->device_event->off_wrap);

    q->added = 0;
    if (flags != VRING_PACKED_EVENT_FLAG_DESC)
        return flags == VRING_PACKED_EVENT_FLAG_ENABLE;
    CHECK(q->event_idx && index_of(event) < q->size);
    return vring_need_event((uint16_t)(index_of(event) - ((event ^ q->avail_at) & WRAP ? q->size : 0)), new, old);
}

void *packed_get(struct dqueue *q, uint32_t *written)
{
    const struct vring_packed_desc *desc = &q->ring[index_of(q->used_at)];

    if (q->free_count == q->size || !is_used(q, q->used_at))
        return NULL;
    uint16_t id = load_relaxed(&desc->id);
    void *cookie;

    CHECK(id < q->size);
    cookie = q->cookies[id];
    CHECK(cookie); /* or it was completed twice, or never sent */
    if (written)
        *written = load_relaxed(&desc->flags) & VRING_DESC_F_WRITE ? load_relaxed(&desc->len) : 0;
    q->cookies[id] = NULL;
    q->next[id] = q->free_head;
    q->free_head = id;
    q->free_count = (uint16_t)(q->free_count + q->chain_length[id]);
    q->used_at = moved(q, q->used_at, q->chain_length[id]);
    q->last_used++;
    return cookie;
}

bool packed_enable_interrupt(struct dqueue *q)
{
    if (q->event_idx)
        store_relaxed(&q->driver_event->off_wrap, q->used_at);
    store_release(&q->driver_event->flags, q->event_idx ? VRING_PACKED_EVENT_FLAG_DESC : VRING_PACKED_EVENT_FLAG_ENABLE);
    full_barrier(); /* pairs with the one in vd_packed_publish */
    return is_used(q, q->used_at);
}

void packed_want_interrupt(struct dqueue *q, uint16_t slots)
{
    store_relaxed(&q->driver_event->off_wrap, moved(q, q->used_at, slots));
    store_release(&q->driver_event->flags, VRING_PACKED_EVENT_FLAG_DESC);
}

uint32_t packed_shown(const struct dqueue *q)
{
    uint16_t at = q->used_at, free_count = q->free_count;

    while (free_count < q->size && is_used(q, at)) {
        uint16_t length = q->chain_length[load_relaxed(&q->ring[index_of(at)].id)];

        at = moved(q, at, length);
        free_count = (uint16_t)(free_count + length);
    }
    return at | (uint32_t)at << 16;
}
