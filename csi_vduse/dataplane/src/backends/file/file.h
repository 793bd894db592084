/*
 * What the files of the file backend share: the image, and what each queue has of its own.
 *
 * file.c opens, probes and locks; transfer.c reads and writes; extents.c discards and zeroes;
 * sync.c makes stable.
 */
#ifndef VD_FILE_H
#define VD_FILE_H

#include <linux/virtio_blk.h>

#include "../../backend.h"

enum { VD_BOUNCE_BYTES = 64 * 1024, VD_FILE_ZEROES_BYTES = 256 * 1024 };

/* By what a request is being done, so that a completion knows what it is the end of. */
enum vd_method {
    VD_METHOD_NONE,
    VD_METHOD_CACHED, /* a transfer through the page cache */
    VD_METHOD_DIRECT,
    VD_METHOD_BOUNCED, /* direct, from the queue's buffer */
    VD_METHOD_PUNCH,
    VD_METHOD_ZERO_RANGE,
    VD_METHOD_TRIM,
    VD_METHOD_ZEROES, /* zeroes are written */
};

/* Completions that are not one request's: of a sync, and of a write from the queue's buffer. */
enum vd_file_event { VD_FILE_SYNCED, VD_FILE_BOUNCED };

/*
 * What the queue of an index has, one after the other: none begins anything before the one before
 * has ended.
 */
struct vd_file_place {
    int sync_fd;     /* an open file of its own: an error of writing back is told to each once */
    uint8_t *bounce; /* for what a direct request cannot take as it is; aligned */
};

/* Of one queue; only its thread touches it. */
struct vd_file_queue {
    struct vd_file *file;
    const struct vd_file_place *place;
    struct vd_request *syncing;                    /* all that the sync under way answers */
    struct vd_request *unsynced;                   /* those that came after it began */
    uint64_t mark;                                 /* cache_changes when it began */
    struct vd_request *bouncing;                   /* whose data the place's buffer holds */
    struct vd_request *unbounced, **unbounced_end; /* those that wait for it, in their order */
};

struct vd_file {
    int direct_fd; /* -1: everything goes through the page cache */
    int buffered_fd;
    uint32_t memory_align, offset_align;
    bool block_device;
    bool in_memory; /* copying is all there is to a transfer */
    /* learned; each queue thread may set them, to the same value */
    bool no_punch, no_zero_range, no_trim;
    /* what was written may be lost, and no later sync will tell: set for good */
    bool lost;
    uint64_t cache_changes; /* writes through the page cache begun, and ended; any queue's */
    uint64_t cache_clean;   /* what that was when the last sync began that went well */
    bool synced;            /* there was one */
    void *zeroes;
    uint32_t place_count;
    struct vd_file_place places[];
};

static inline struct vd_file_queue *vd_file_queue_of(const struct vd_queue *q)
{
    return vd_queue_backend(q);
}

/*
 * A driver that cannot send FLUSH counts on what it writes to be stable when it completes (VIRTIO
 * 1.3, 5.2.6.2).
 */
static inline bool vd_file_can_flush(const struct vd_queue *q)
{
    return vd_queue_config_of(q)->features >> VIRTIO_BLK_F_FLUSH & 1;
}

/* The next of those that wait, out of its list; or NULL. */
static inline struct vd_request *vd_file_take_unsynced(struct vd_file_queue *fq)
{
    struct vd_request *r = fq->unsynced;

    if (r)
        fq->unsynced = r->next;
    return r;
}

static inline struct vd_request *vd_file_take_unbounced(struct vd_file_queue *fq)
{
    struct vd_request *r = fq->unbounced;

    if (r && !(fq->unbounced = r->next))
        fq->unbounced_end = &fq->unbounced;
    return r;
}

/* Whether offset and length are what a direct request may have. */
static inline bool vd_file_is_aligned(const struct vd_file *f, uint64_t offset, uint64_t length)
{
    return !((offset | length) % f->offset_align);
}

static inline void vd_file_cache_changed(struct vd_file *f)
{
    __atomic_fetch_add(&f->cache_changes, 1, __ATOMIC_RELAXED);
}

/* A step of a request failed: have it tried again if the reason may pass, else tell the driver. */
static inline void vd_file_failed(struct vd_queue *q, struct vd_request *r, int error)
{
    if (!vd_request_wait(q, r, error))
        vd_request_finish(q, r, error);
}

/*
 * Begin a read or write, or what is left of it; and go on after a step of it. Begin is for one that
 * waited for the buffer too.
 */
void vd_file_transfer(struct vd_queue *q, struct vd_request *r);
void vd_file_transferred(struct vd_queue *q, struct vd_request *r, int result);

/* The same of DISCARD and WRITE_ZEROES. */
void vd_file_zero(struct vd_queue *q, struct vd_request *r);
void vd_file_zeroed(struct vd_queue *q, struct vd_request *r, int result);

/*
 * Make stable all that completed before, then finish the request: with the sync that this turn, or
 * a later one, begins.
 */
void vd_file_sync(struct vd_queue *q, struct vd_request *r);
void vd_file_begin_sync(struct vd_queue *q);
void vd_file_synced(struct vd_queue *q, int result);

#endif
