/* One descriptor chain, and how both ring formats make it of descriptors; see chain.c. */
#ifndef VD_CHAIN_H
#define VD_CHAIN_H

#include <sys/uio.h>

#include "common.h"
#include "engine_api.h"
#include "memory.h"

/* A chain in our addresses: first what the device reads, then what it writes. */
struct vd_chain {
    struct iovec *iov; /* room for as many as the queue has descriptors */
    uint32_t readable, writable;
    uint64_t readable_bytes, writable_bytes;
    uint16_t id;                      /* names the chain when it is returned */
    const struct vd_mapping *mapping; /* where its last address was: mostly where the next one is */
};

static inline void vd_chain_clear(struct vd_chain *chain)
{
    chain->readable = chain->writable = 0;
    chain->readable_bytes = chain->writable_bytes = 0;
    chain->mapping = NULL;
}

/* The same as vd_chain_add, for any descriptor. */
enum vd_queue_fault vd_chain_add_any(struct vd_chain *chain, uint32_t room,
                                     const struct vd_memory *memory, uint64_t iova, uint32_t length,
                                     bool write);

/*
 * Append the memory of one descriptor, in as many pieces as it has mappings; room: of chain->iov.
 */
static inline enum vd_queue_fault vd_chain_add(struct vd_chain *chain, uint32_t room,
                                               const struct vd_memory *memory, uint64_t iova,
                                               uint32_t length, bool write)
{
    const struct vd_mapping *m = chain->mapping;
    uint32_t count = chain->readable + chain->writable;

    if (!m || iova < m->iova || iova > m->last || !length || length - 1 > m->last - iova ||
        count == room || (write ? !m->writable : chain->writable))
        return vd_chain_add_any(chain, room, memory, iova, length, write);
    chain->iov[count] = (struct iovec){ m->address + (iova - m->iova), length };
    if (write) {
        chain->writable++;
        chain->writable_bytes += length;
    } else {
        chain->readable++;
        chain->readable_bytes += length;
    }
    return VD_FAULT_NONE;
}

/* The table of an indirect descriptor in our addresses, or NULL if it cannot be one. */
const void *vd_chain_table(struct vd_chain *chain, const struct vd_memory *memory, uint64_t iova,
                           uint32_t length);

#endif
