/* What both ring formats share: setting up, and serving again what a predecessor left. */
#include "vring.h"

#include <linux/virtio_config.h>
#include <string.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
               "virtio 1 rings are little endian, and so must we be");

bool vd_vring_move(struct vd_vring *ring, const struct vd_memory *memory,
                   const struct vd_queue_config *config)
{
    ring->memory = memory;
    return ring->is_packed ? vd_packed_move(ring, memory, config)
                           : vd_split_move(ring, memory, config);
}

enum vd_queue_fault vd_vring_init(struct vd_vring *ring, const struct vd_memory *memory,
                                  const struct vd_queue_config *config, struct vd_log *log)
{
    uint64_t n = config->size;

    memset(ring, 0, sizeof(*ring));
    ring->log = log;
    if (!n || n > VD_QUEUE_SIZE_MAX)
        return VD_FAULT_RING_ADDRESS;
    ring->size = (uint16_t)n;
    ring->is_packed = config->features >> VIRTIO_F_RING_PACKED & 1;
    ring->event_idx = config->features >> VIRTIO_RING_F_EVENT_IDX & 1;
    ring->indirect = config->features >> VIRTIO_RING_F_INDIRECT_DESC & 1;
    if (!vd_vring_move(ring, memory, config))
        return VD_FAULT_RING_ADDRESS;
    enum vd_queue_fault fault = ring->is_packed ? vd_packed_begin(ring, config)
                                                : vd_split_begin(ring, config);

    if (log)
        ring->replay_left = log->replay_count;
    return fault;
}

enum vd_queue_fault vd_vring_replay(struct vd_vring *ring, struct vd_chain *chain)
{
    uint16_t entry = ring->log->replay[ring->log->replay_count - ring->replay_left--];
    enum vd_queue_fault fault = ring->is_packed ? vd_packed_replay(ring, chain, entry)
                                                : vd_split_replay(ring, chain, entry);

    if (load_relaxed(&ring->abandoned))
        chain->writable = 0;
    return fault;
}

uint32_t vd_vring_state(const struct vd_vring *ring)
{
    uint32_t avail = load_relaxed(&ring->next_avail);

    return ring->is_packed ? avail | (uint32_t)load_relaxed(&ring->published_used) << 16 : avail;
}
