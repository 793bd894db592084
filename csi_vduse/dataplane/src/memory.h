/* The driver's memory as the engine sees it: a map from addresses of the driver (IOVA) to ours. */
#ifndef VD_MEMORY_H
#define VD_MEMORY_H

#include <sys/types.h>

#include "common.h"
#include "engine_api.h"

struct vd_mapping {
    uint64_t iova;
    uint64_t last; /* inclusive: a region may end at the top of the address space */
    uint8_t *address;
    void *base; /* what mmap gave, and how much: rounded to whole pages */
    size_t length;
    size_t page; /* of the file */
    bool writable;
    bool patched; /* the guard has put pages of zeros in */
    int fd;       /* our own duplicate, to map it again */
    off_t offset; /* of base */
};

struct vd_memory {
    /* what this one replaced while requests still used it; freed with it */
    struct vd_memory *older;
    uint32_t count;
    struct vd_mapping mappings[]; /* by iova, not overlapping */
};

int vd_memory_new(const struct vd_region *regions, uint32_t count, struct vd_memory **memory);
void vd_memory_free(struct vd_memory *memory);

/* Map again what the guard has patched: the driver's pages may be back. 0 or -errno. */
int vd_memory_restore(struct vd_memory *memory);

/*
 * Take the driver's memory away from abandoned requests: what the kernel still wants to copy from
 * or to these addresses fails (EFAULT) from now on. Pages that it has pinned for direct I/O are
 * beyond our reach.
 */
void vd_memory_isolate(struct vd_memory *memory);

/* The mapping that an address is in, or NULL. */
const struct vd_mapping *vd_memory_find(const struct vd_memory *memory, uint64_t iova);

/* Translate all of it in one piece, or NULL. */
void *vd_memory_translate_whole(const struct vd_memory *memory, uint64_t iova, uint64_t length,
                                bool write);

/* What answers a SIGBUS of an engine's threads: a page of zeros, instead of death. */
struct vd_guard {
    struct vd_memory *memory; /* and what it replaced */
    uint64_t faults;          /* answered, in memory itself */
};

/* From now on guard this memory; 0 or -errno. */
int vd_memory_guard(struct vd_guard *guard, struct vd_memory *memory);
/* The calling thread touches an engine's memory: this is its guard. */
void vd_memory_guard_me(struct vd_guard *guard);

#endif
