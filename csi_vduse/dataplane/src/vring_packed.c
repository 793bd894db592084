/*
 * Packed virtqueue, device side (VIRTIO 1.3, 2.8). One ring of descriptors goes both ways: the
 * driver writes chains into it, we write used descriptors over them, in the order in which requests
 * end. A used descriptor moves our position by as many entries as its chain took, so that driver
 * and device agree on it without talking.
 *
 * Barriers, each with its partner in the driver (drivers/virtio/virtio_ring.c):
 *   - available: we load-acquire the flags of a chain's first descriptor before reading the rest of
 *     the chain; pairs with the driver's write barrier before it stores those flags, last of all.
 *   - used: we store-release the flags of a batch's first used descriptor after all others of the
 *     batch; pairs with the driver's read barrier after it loads the flags. The driver reads in
 *     ring order, so the batch shows at once.
 *   - notification: both sides store what the other looks for (flags of a descriptor, or an event
 *     structure), full barrier, then load what the other stored. One of the two always sees the
 *     other's store.
 *
 * Nothing here trusts the driver: descriptors are copied before use, ids are checked, and all
 * chains that we have fetched and not yet shown as used take no more entries than the ring has. So
 * no position gets more than a lap ahead of another, whatever the driver writes.
 */
#include "packed.h"
#include "vring.h"

bool vd_packed_move(struct vd_vring *ring, const struct vd_memory *memory,
                    const struct vd_queue_config *config)
{
    struct vring_packed_desc *desc;
    struct vring_packed_desc_event *driver, *device;

    if (config->desc_iova % 16 || config->driver_iova % 4 || config->device_iova % 4)
        return false;
    desc = vd_memory_translate_whole(memory, config->desc_iova, ring->size * sizeof(*desc), true);
    driver = vd_memory_translate_whole(memory, config->driver_iova, sizeof(*driver), false);
    device = vd_memory_translate_whole(memory, config->device_iova, sizeof(*device), true);
    /* Whoever made the regions may have shifted them against their addresses. */
    if (!desc || !driver || !device || (uintptr_t)desc % 8 || (uintptr_t)driver % 4 ||
        (uintptr_t)device % 4)
        return false;
    ring->packed.desc = desc;
    ring->packed.driver = driver;
    ring->packed.device = device;
    return true;
}

enum vd_queue_fault vd_packed_begin(struct vd_vring *ring, const struct vd_queue_config *config)
{
    struct vd_log *log = ring->log;
    uint16_t avail = (uint16_t)config->state, used = (uint16_t)(config->state >> 16);

    if (log && config->resume && !vd_log_beginning(log)) {
        if (vd_log_recover_packed(log, ring->packed.desc, &used, &ring->packed.taken))
            return VD_FAULT_LOG;
        /* Chains are fetched in the ring's order: what was fetched has ended or is in the log. */
        avail = packed_moved(used, ring->packed.taken, ring->size);
    } else {
        /*
         * Whoever starts with nothing in flight is at one place. Nothing but a log tells where
         * others are.
         */
        if ((config->resume && !log) || packed_index(avail) >= ring->size || avail != used)
            return VD_FAULT_AVAIL_INDEX;
        if (log)
            vd_log_begin(log, true, used);
    }
    ring->next_avail = avail;
    ring->next_used = ring->published_used = used;
    return VD_FAULT_NONE;
}

int vd_packed_available(const struct vd_vring *ring)
{
    uint16_t flags = load_relaxed(&ring->packed.desc[packed_index(ring->next_avail)].flags);

    return packed_is_available(flags, ring->next_avail) ? ring->size : 0;
}

/* Add the descriptors of an indirect table, which all count, in their order. */
static enum vd_queue_fault add_table(const struct vd_vring *ring, struct vd_chain *chain,
                                     uint64_t iova, uint32_t length)
{
    const struct vring_packed_desc *table = ring->indirect
                                                ? vd_chain_table(chain, ring->memory, iova, length)
                                                : NULL;
    uint32_t entries = length / sizeof(*table);

    if (!table || entries > ring->size)
        return VD_FAULT_CHAIN;
    for (uint32_t i = 0; i < entries; i++) {
        uint16_t flags = load_relaxed(&table[i].flags);
        enum vd_queue_fault fault;

        if (flags & VRING_DESC_F_INDIRECT)
            return VD_FAULT_CHAIN;
        fault = vd_chain_add(chain, ring->size, ring->memory, load_relaxed(&table[i].addr),
                             load_relaxed(&table[i].len), flags & VRING_DESC_F_WRITE);
        if (fault)
            return fault;
    }
    return VD_FAULT_NONE;
}

/* Add a descriptor of the ring, the first of its chain or not. */
static enum vd_queue_fault add_descriptor(const struct vd_vring *ring, struct vd_chain *chain,
                                          uint64_t iova, uint32_t length, uint16_t flags,
                                          bool first)
{
    if (!(flags & VRING_DESC_F_INDIRECT))
        return vd_chain_add(chain, ring->size, ring->memory, iova, length,
                            flags & VRING_DESC_F_WRITE);
    if (flags & VRING_DESC_F_NEXT || !first)
        return VD_FAULT_CHAIN;
    return add_table(ring, chain, iova, length);
}

enum vd_queue_fault vd_packed_next(struct vd_vring *ring, struct vd_chain *chain)
{
    struct vd_packed *p = &ring->packed;
    struct vd_log *log = ring->log;
    uint16_t position = ring->next_avail, seen = 0, flags, id;
    uint16_t entry = log ? log->free_head : 0, last = entry;

    vd_chain_clear(chain);
    do {
        const struct vring_packed_desc *desc = &p->desc[packed_index(position)];
        enum vd_queue_fault fault;

        /*
         * Pairs with the write barrier in virtqueue_add_packed before it stores the first
         * descriptor's flags.
         */
        flags = load_acquire(&desc->flags);
        if (!packed_is_available(flags, position))
            return seen ? VD_FAULT_CHAIN : VD_FAULT_NONE;
        if (p->taken + seen == ring->size)
            return VD_FAULT_AVAIL_INDEX;
        seen++;

        uint64_t iova = load_relaxed(&desc->addr);
        uint32_t length = load_relaxed(&desc->len);

        id = load_relaxed(&desc->id);
        fault = add_descriptor(ring, chain, iova, length, flags, seen == 1);
        if (fault)
            return fault;
        if (load_relaxed(&ring->abandoned)) { /* reading it may have taken as long as that */
            chain->writable = 0;
            return VD_FAULT_NONE;
        }
        if (log) {
            last = entry;
            entry = vd_log_note(log, entry, iova, length, id, flags);
        }
        position = packed_moved(position, 1, ring->size);
    } while (flags & VRING_DESC_F_NEXT);
    if (id >= ring->size || ring->slots[id])
        return VD_FAULT_HEAD;
    if (!chain->writable)
        return VD_FAULT_CHAIN; /* nowhere to say how it went */
    if (log)
        vd_log_take_packed(log, last, seen, id);
    chain->id = id;
    ring->slots[id] = seen;
    p->taken = (uint16_t)(p->taken + seen);
    store_relaxed(&ring->next_avail, position); /* the control thread may look */
    return VD_FAULT_NONE;
}

enum vd_queue_fault vd_packed_replay(struct vd_vring *ring, struct vd_chain *chain, uint16_t entry)
{
    const struct vd_log *log = ring->log;
    const struct vd_log_packed_state *states = log->packed->states;
    uint16_t head = entry, last = log->last[head], seen = 0;

    vd_chain_clear(chain);
    for (;; entry = log->next[entry]) {
        const struct vd_log_packed_state *state = &states[entry];
        enum vd_queue_fault fault = add_descriptor(ring, chain, load_relaxed(&state->addr),
                                                   load_relaxed(&state->len),
                                                   load_relaxed(&state->flags), !seen);

        if (fault)
            return fault;
        seen++;
        if (entry == last)
            break;
    }
    if (!chain->writable)
        return VD_FAULT_CHAIN;
    chain->id = log->id[head];
    ring->slots[chain->id] = seen; /* and taken counts them already */
    return VD_FAULT_NONE;
}

void vd_packed_push(struct vd_vring *ring, uint16_t id, uint32_t written)
{
    struct vd_packed *p = &ring->packed;
    struct vring_packed_desc *desc = &p->desc[packed_index(ring->next_used)];
    uint16_t flags = (uint16_t)((written ? VRING_DESC_F_WRITE : 0) |
                                packed_used_flags(ring->next_used));
    uint16_t slots = ring->slots[id];

    store_relaxed(&desc->id, id);
    store_relaxed(&desc->len, written);
    if (p->pushed)
        store_relaxed(&desc->flags, flags);
    else
        p->first_flags = flags;
    ring->slots[id] = 0;
    p->pushed = (uint16_t)(p->pushed + slots);
    ring->next_used = packed_moved(ring->next_used, slots, ring->size);
    if (ring->log)
        vd_log_push_packed(ring->log, id);
}

void vd_packed_publish(struct vd_vring *ring)
{
    struct vd_packed *p = &ring->packed;
    uint32_t undecided = p->undecided + p->pushed;

    if (!p->pushed)
        return;
    if (ring->log)
        vd_log_publish_packed(ring->log, ring->next_used, ring->published_used);
    /* Pairs with the read barrier in virtqueue_get_buf_ctx_packed after it loads the flags. */
    store_release(&p->desc[packed_index(ring->published_used)].flags, p->first_flags);
    if (ring->log)
        vd_log_published_packed(ring->log, ring->next_used);
    store_relaxed(&ring->published_used, ring->next_used); /* the control thread may look */
    p->taken = (uint16_t)(p->taken - p->pushed);
    p->undecided = undecided < ring->size ? (uint16_t)undecided : ring->size;
    p->pushed = 0;
}

bool vd_packed_wants_interrupt(struct vd_vring *ring)
{
    struct vd_packed *p = &ring->packed;
    uint16_t new = ring->published_used, count = p->undecided;

    p->undecided = 0;
    /*
     * Pairs with the barrier in virtqueue_enable_cb_prepare_packed after it stores its event
     * structure.
     */
    full_barrier();

    uint16_t wanted = load_acquire(&p->driver->flags);

    if (!ring->event_idx || wanted != VRING_PACKED_EVENT_FLAG_DESC)
        return wanted != VRING_PACKED_EVENT_FLAG_DISABLE;
    uint16_t event = load_relaxed(&p->driver->off_wrap);

    /*
     * All three counted from the start of the lap that new is in; what lies before it is negative.
     */
    return vring_need_event(
        (uint16_t)(packed_index(event) - ((event ^ new) & VD_WRAP ? ring->size : 0)),
        packed_index(new), (uint16_t)(packed_index(new) - count));
}

bool vd_packed_enable_kick(struct vd_vring *ring)
{
    struct vring_packed_desc_event *event = ring->packed.device;

    if (ring->event_idx) {
        store_relaxed(&event->off_wrap, ring->next_avail);
        /* Pairs with the driver's reading of flags and off_wrap in one piece, or of flags first. */
        store_release(&event->flags, VRING_PACKED_EVENT_FLAG_DESC);
    } else {
        store_relaxed(&event->flags, VRING_PACKED_EVENT_FLAG_ENABLE);
    }
    /*
     * Pairs with the barrier in virtqueue_kick_prepare_packed between storing descriptors and
     * loading our event.
     */
    full_barrier();
    return vd_packed_available(ring) != 0;
}

void vd_packed_disable_kick(struct vd_vring *ring)
{
    store_relaxed(&ring->packed.device->flags, VRING_PACKED_EVENT_FLAG_DISABLE);
}
