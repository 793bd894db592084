/*
 * From a descriptor's addresses to ours, for both ring formats. Nothing here trusts the driver:
 * every address goes through vd_memory, and a chain has at most as many pieces as the queue has
 * entries.
 */
#include "chain.h"

#include <linux/virtio_ring.h>

enum vd_queue_fault vd_chain_add(struct vd_chain *chain, uint32_t room,
                                 const struct vd_memory *memory, uint64_t iova, uint32_t length,
                                 bool write)
{
    if (!write && chain->writable)
        return VD_FAULT_CHAIN; /* what the device reads comes first */
    if (length && iova + (length - 1) < iova)
        return VD_FAULT_CHAIN; /* it would go on at address 0 */
    *(write ? &chain->writable_bytes : &chain->readable_bytes) += length;
    while (length) {
        uint64_t contiguous;
        void *address = vd_memory_translate(memory, iova, length, write, &contiguous);

        if (!address || chain->readable + chain->writable == room)
            return VD_FAULT_CHAIN;
        chain->iov[chain->readable + chain->writable] = (struct iovec){ address, contiguous };
        *(write ? &chain->writable : &chain->readable) += 1;
        iova += contiguous;
        length -= (uint32_t)contiguous;
    }
    return VD_FAULT_NONE;
}

const void *vd_chain_table(const struct vd_memory *memory, uint64_t iova, uint32_t length)
{
    _Static_assert(sizeof(struct vring_desc) == 16 && sizeof(struct vring_packed_desc) == 16,
                   "one size for both");
    const void *table = NULL;

    if (length && length % sizeof(struct vring_desc) == 0)
        table = vd_memory_translate_whole(memory, iova, length, false);
    return (uintptr_t)table % _Alignof(struct vring_desc) ? NULL : table;
}
