/*
 * Positions in a packed ring: index in the low bits, the wrap counter of that lap in bit 15. This
 * is how vhost-user and the event suppression structures write them too.
 */
#ifndef VD_PACKED_H
#define VD_PACKED_H

#include <linux/virtio_ring.h>

#include "common.h"

enum {
    VD_WRAP = 1 << 15,
    VD_AVAIL = 1 << VRING_PACKED_DESC_F_AVAIL,
    VD_USED = 1 << VRING_PACKED_DESC_F_USED,
};

static inline uint16_t packed_index(uint16_t position)
{
    return position & (VD_WRAP - 1);
}

/* The position n entries on; n is at most the size of the ring. */
static inline uint16_t packed_moved(uint16_t position, uint32_t n, uint16_t size)
{
    uint32_t index = packed_index(position) + n, wrap = position & VD_WRAP;

    if (index >= size) {
        index -= size;
        wrap ^= VD_WRAP;
    }
    return (uint16_t)(index | wrap);
}

/* What makes a descriptor available, or used, in the lap of position. */
static inline uint16_t packed_avail_flags(uint16_t position)
{
    return position & VD_WRAP ? VD_AVAIL : VD_USED;
}

static inline uint16_t packed_used_flags(uint16_t position)
{
    return position & VD_WRAP ? VD_AVAIL | VD_USED : 0;
}

static inline bool packed_is_available(uint16_t flags, uint16_t position)
{
    return (flags & (VD_AVAIL | VD_USED)) == packed_avail_flags(position);
}

#endif
