/*
 * From a descriptor's addresses to ours, for both ring formats. Nothing here trusts the driver:
 * every address goes through vd_memory, and a chain has at most as many pieces as the queue has
 * entries.
 */
#include "chain.h"

#include <linux/virtio_ring.h>

enum vd_queue_fault vd_chain_add_any(struct vd_chain *chain, uint32_t room,
                                     const struct vd_memory *memory, uint64_t iova, uint32_t length,
                                     bool write)
{
    if (!write && chain->writable)
        return VD_FAULT_CHAIN; /* what the device reads comes first */
    if (length && iova + (length - 1) < iova)
        return VD_FAULT_CHAIN; /* it would go on at address 0 */
    *(write ? &chain->writable_bytes : &chain->readable_bytes) += length;
    while (length) {
        const struct vd_mapping *m = vd_memory_find(memory, iova);
        uint32_t count = chain->readable + chain->writable, piece;

        if (!m || (write && !m->writable) || count == room)
            return VD_FAULT_CHAIN;
        piece = length - 1 <= m->last - iova ? length : (uint32_t)(m->last - iova) + 1;
        chain->mapping = m;
        chain->iov[count] = (struct iovec){ m->address + (iova - m->iova), piece };
        *(write ? &chain->writable : &chain->readable) += 1;
        iova += piece;
        length -= piece;
    }
    return VD_FAULT_NONE;
}

const void *vd_chain_table(struct vd_chain *chain, const struct vd_memory *memory, uint64_t iova,
                           uint32_t length)
{
    _Static_assert(sizeof(struct vring_desc) == 16 && sizeof(struct vring_packed_desc) == 16,
                   "one size for both");
    const struct vd_mapping *m = vd_memory_find(memory, iova);
    const void *table;

    if (!m || !length || length % sizeof(struct vring_desc) || length - 1 > m->last - iova)
        return NULL;
    chain->mapping = m;
    table = m->address + (iova - m->iova);
    return (uintptr_t)table % _Alignof(struct vring_desc) ? NULL : table;
}
