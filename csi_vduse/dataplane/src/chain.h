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
    uint16_t id; /* names the chain when it is returned */
};

static inline void vd_chain_clear(struct vd_chain *chain)
{
    chain->readable = chain->writable = 0;
    chain->readable_bytes = chain->writable_bytes = 0;
}

/*
 * Append the memory of one descriptor, in as many pieces as it has mappings; room: of chain->iov.
 */
enum vd_queue_fault vd_chain_add(struct vd_chain *chain, uint32_t room,
                                 const struct vd_memory *memory, uint64_t iova, uint32_t length,
                                 bool write);

/* The table of an indirect descriptor in our addresses, or NULL if it cannot be one. */
const void *vd_chain_table(const struct vd_memory *memory, uint64_t iova, uint32_t length);

#endif
