/*
 * A vhost-user server as a backend: requests that the engine fetched go on to it, through a ring of
 * ours for each queue.
 *
 *   memory.c   the rings and what their descriptors point to, in memory that the server has too
 *   vhost.c    a queue's side: requests in, answers out
 *
 * The data stays where the driver has it: the server has that memory as well. Messages to the
 * server are the control thread's (csi_vduse/dataplane/vhost_user): it tells the queue when the
 * server works on its ring (vd_vhost_serve), and the queue says when it has let go of the ring of a
 * server that is lost (vd_vhost_serves).
 */
#ifndef VD_VHOST_H
#define VD_VHOST_H

#include <linux/virtio_blk.h>
#include <linux/virtio_ring.h>

#include "../../backend.h"

/* Where the server sees our memory; no driver's address is there. */
#define VHOST_IOVA (1ull << 45)

/* What a request's descriptors point to, but for its data. */
struct vhost_slot {
    struct virtio_blk_outhdr header;
    uint8_t status;
    struct virtio_blk_discard_write_zeroes segments[VD_EXTENTS_MAX];
    struct vring_desc table[]; /* for as many pieces as a request has, and two */
};

/* A queue's part of the memory, and what its two threads tell each other. */
struct vhost_ring {
    struct vring_desc *desc;
    struct vring_avail *avail;
    struct vring_used *used;
    uint8_t *slots;
    uint64_t slots_iova;
    size_t slot_bytes;
    int kick_fd, call_fd;
    /* the number of the server that works on the ring, as it is wanted and as it is; 0: none */
    uint32_t wanted, served;
    uint32_t liar; /* the server answered what was not asked */
};

struct vhost {
    struct vd_config config;
    int fd; /* of the memory */
    uint8_t *memory;
    size_t bytes, ring_bytes;
    struct vhost_ring rings[VD_QUEUES_MAX];
};

/* memory.c: 0 or -errno. */
int vhost_new(const struct vd_config *config, struct vhost **vhost);
void vhost_free(struct vhost *vhost);
/* Empty a ring that nobody works on. */
void vhost_ring_clear(const struct vhost *vhost, struct vhost_ring *ring);
struct vhost_slot *vhost_slot(const struct vhost_ring *ring, uint32_t index);
uint64_t vhost_slot_iova(const struct vhost_ring *ring, uint32_t index, const void *in_slot);

#endif
