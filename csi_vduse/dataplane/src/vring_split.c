/*
 * Split virtqueue, device side. All state is the queue thread's; the rings themselves are shared
 * with the driver.
 *
 * Three pairs of barriers, each with its partner in the driver (drivers/virtio/virtio_ring.c):
 *   - avail: we load-acquire avail->idx before reading entries; pairs with the driver's write
 *     barrier between entries and idx.
 *   - used: we store-release used->idx after writing entries; pairs with the driver's read barrier
 *     after idx.
 *   - notification: both sides store their index, full barrier, then load the other's event index.
 *     One of the two always sees the other's store, so a sleeping side is always woken.
 *
 * Nothing here trusts the driver: indices are reduced to the ring size, descriptors are copied
 * before use, a chain has at most as many descriptors as the queue, and every address goes through
 * vd_memory.
 */
#include "vring.h"

bool vd_split_move(struct vd_vring *ring, const struct vd_memory *memory,
                   const struct vd_queue_config *config)
{
    uint64_t n = ring->size;
    struct vring_desc *desc;
    struct vring_avail *avail;
    struct vring_used *used;

    if (n & (n - 1) || config->desc_iova % 16 || config->driver_iova % 2 || config->device_iova % 4)
        return false;
    desc = vd_memory_translate_whole(memory, config->desc_iova, n * sizeof(struct vring_desc),
                                     false);
    avail = vd_memory_translate_whole(memory, config->driver_iova, 6 + 2 * n, false);
    used = vd_memory_translate_whole(memory, config->device_iova, 6 + 8 * n, true);
    if (!desc || !avail || !used)
        return false;
    /* Whoever made the regions may have shifted them against their addresses. */
    if ((uintptr_t)desc % 8 || (uintptr_t)avail % 2 || (uintptr_t)used % 4)
        return false;
    ring->split.desc = desc;
    ring->split.avail = avail;
    ring->split.used = used;
    ring->split.used_event = &avail->ring[n];
    ring->split.avail_event = (uint16_t *)&used->ring[n];
    return true;
}

enum vd_queue_fault vd_split_begin(struct vd_vring *ring, const struct vd_queue_config *config)
{
    struct vd_log *log = ring->log;

    ring->next_used = load_relaxed(&ring->split.used->idx);
    ring->next_avail = config->resume ? ring->next_used : (uint16_t)config->state;
    ring->published_used = ring->split.decided_used = ring->next_used;
    if (log && config->resume && !vd_log_beginning(log)) {
        if (vd_log_recover_split(log, ring->next_used))
            return VD_FAULT_LOG;
        /* Chains are fetched in the ring's order: what was fetched has ended or is in the log. */
        ring->next_avail = (uint16_t)(ring->next_used + log->replay_count);
    } else if (log) {
        vd_log_begin(log, false, ring->next_used);
    }
    return VD_FAULT_NONE;
}

int vd_split_available(const struct vd_vring *ring)
{
    /* Pairs with the write barrier in virtqueue_add_split before it stores avail->idx. */
    uint16_t count = (uint16_t)(load_acquire(&ring->split.avail->idx) - ring->next_avail);

    return count > ring->size ? -1 : count;
}

/* Translate the chain that starts at head. */
static enum vd_queue_fault walk(const struct vd_vring *ring, uint16_t head, struct vd_chain *chain)
{
    const struct vring_desc *table = ring->split.desc;
    uint32_t entries = ring->size, index = head, seen = 0;
    /* not to be told by table: the driver may say that the ring itself is one */
    bool indirect = false;

    vd_chain_clear(chain);
    for (;;) {
        if (index >= entries || seen++ == ring->size)
            return VD_FAULT_CHAIN;

        uint64_t iova = load_relaxed(&table[index].addr);
        uint32_t length = load_relaxed(&table[index].len);
        uint16_t flags = load_relaxed(&table[index].flags);
        uint16_t next = load_relaxed(&table[index].next);

        if (flags & VRING_DESC_F_INDIRECT) {
            if (indirect || flags & VRING_DESC_F_NEXT)
                return VD_FAULT_CHAIN;
            indirect = true;
            table = ring->indirect ? vd_chain_table(chain, ring->memory, iova, length) : NULL;
            if (!table)
                return VD_FAULT_CHAIN;
            entries = length / sizeof(*table);
            index = 0;
            seen = 0;
            continue;
        }
        enum vd_queue_fault fault = vd_chain_add(chain, ring->size, ring->memory, iova, length,
                                                 flags & VRING_DESC_F_WRITE);

        if (fault)
            return fault;
        if (!(flags & VRING_DESC_F_NEXT))
            return VD_FAULT_NONE;
        index = next;
    }
}

enum vd_queue_fault vd_split_next(struct vd_vring *ring, struct vd_chain *chain)
{
    uint16_t head = load_relaxed(&ring->split.avail->ring[ring->next_avail & (ring->size - 1)]);

    if (head >= ring->size || ring->slots[head])
        return VD_FAULT_HEAD;
    enum vd_queue_fault fault = walk(ring, head, chain);

    if (fault)
        return fault;
    if (!chain->writable)
        return VD_FAULT_CHAIN;            /* nowhere to say how it went */
    if (load_relaxed(&ring->abandoned)) { /* walking may have taken as long as that */
        chain->writable = 0;
        return VD_FAULT_NONE;
    }
    if (ring->log)
        vd_log_take_split(ring->log, head);
    chain->id = head;
    ring->slots[head] = 1;
    /* the control thread may look */
    store_relaxed(&ring->next_avail, (uint16_t)(ring->next_avail + 1));
    return VD_FAULT_NONE;
}

enum vd_queue_fault vd_split_replay(struct vd_vring *ring, struct vd_chain *chain, uint16_t head)
{
    chain->id = head;
    ring->slots[head] = 1;
    enum vd_queue_fault fault = walk(ring, head, chain);

    return !fault && !chain->writable ? VD_FAULT_CHAIN : fault;
}

void vd_split_push(struct vd_vring *ring, uint16_t id, uint32_t written)
{
    struct vring_used_elem *slot = &ring->split.used->ring[ring->next_used++ & (ring->size - 1)];

    ring->slots[id] = 0;
    store_relaxed(&slot->id, id);
    store_relaxed(&slot->len, written);
    if (ring->log)
        vd_log_push_split(ring->log, id);
}

void vd_split_publish(struct vd_vring *ring)
{
    /* Pairs with the read barrier in virtqueue_get_buf after it loads used->idx. */
    store_release(&ring->split.used->idx, ring->next_used);
    if (ring->log)
        vd_log_published_split(ring->log, ring->next_used);
    ring->published_used = ring->next_used;
}

bool vd_split_wants_interrupt(struct vd_vring *ring)
{
    uint16_t old = ring->split.decided_used, new = ring->published_used;

    ring->split.decided_used = new;
    /*
     * Pairs with the barrier in virtqueue_enable_cb between storing used_event and loading
     * used->idx.
     */
    full_barrier();
    return ring->event_idx
               ? vring_need_event(load_relaxed(ring->split.used_event), new, old)
               : !(load_relaxed(&ring->split.avail->flags) & VRING_AVAIL_F_NO_INTERRUPT);
}

bool vd_split_enable_kick(struct vd_vring *ring)
{
    if (ring->event_idx)
        store_relaxed(ring->split.avail_event, ring->next_avail);
    else
        store_relaxed(&ring->split.used->flags, 0);
    /*
     * Pairs with the barrier in virtqueue_kick_prepare between storing avail->idx and loading
     * avail_event.
     */
    full_barrier();
    return load_relaxed(&ring->split.avail->idx) != ring->next_avail;
}

void vd_split_disable_kick(struct vd_vring *ring)
{
    /*
     * With event indices there is nothing to do: a past avail_event is not passed again for 65536
     * entries.
     */
    if (!ring->event_idx)
        store_relaxed(&ring->split.used->flags, VRING_USED_F_NO_NOTIFY);
}
