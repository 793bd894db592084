/*
 * The device side of a virtqueue, for the queue's thread: chains come in, used entries go out.
 * Which of the two formats a ring has (VIRTIO 1.3: split in 2.7, packed in 2.8) is known to
 * vring*.[ch] alone; calls go straight to the format's own, by a branch that always goes the same
 * way.
 */
#ifndef VD_VRING_H
#define VD_VRING_H

#include <linux/virtio_ring.h>

#include "chain.h"
#include "common.h"
#include "engine_api.h"
#include "inflight.h"
#include "memory.h"

enum { VD_QUEUE_SIZE_MAX = 1024 };

struct vd_split {
    struct vring_desc *desc;
    struct vring_avail *avail;
    struct vring_used *used;
    uint16_t *used_event;  /* the driver's: interrupt me after this entry */
    uint16_t *avail_event; /* ours: kick me after this entry */
    uint16_t decided_used; /* published_used when it was last decided whether to interrupt */
};

struct vd_packed {
    struct vring_packed_desc *desc;
    struct vring_packed_desc_event *driver; /* when it wants an interrupt */
    struct vring_packed_desc_event *device; /* when we want a kick */
    uint16_t first_flags; /* of the first descriptor of the batch, which is at published_used */
    uint16_t pushed;      /* ring entries since the last publish */
    uint16_t undecided;   /* published ones since it was last decided whether to interrupt */
    /* ring entries of all chains that the driver has not got back, pushed or not */
    uint16_t taken;
};

struct vd_vring {
    const struct vd_memory *memory;
    struct vd_log *log; /* owned; NULL: none */
    union {
        struct vd_split split;
        struct vd_packed packed;
    };
    uint16_t size;
    /* next entry to fetch; of a packed ring, this and the next two are positions */
    uint16_t next_avail;
    uint16_t next_used;      /* next entry to write */
    uint16_t published_used; /* next_used when the driver was last shown it */
    uint16_t replay_left;    /* chains that a predecessor left, which come first */
    /* set by the control thread: the log may be another queue's, and nothing is fetched any more */
    bool abandoned;
    bool is_packed;
    bool event_idx;
    bool indirect;
    /* by id: ring entries that the chain takes while in flight; 0: it is not */
    uint16_t slots[VD_QUEUE_SIZE_MAX];
};

/*
 * Find the rings in memory and take the indices and the log up, which is the ring's from here on,
 * or NULL.
 */
enum vd_queue_fault vd_vring_init(struct vd_vring *ring, const struct vd_memory *memory,
                                  const struct vd_queue_config *config, struct vd_log *log);

/*
 * Find the rings again in another memory; indices stay. False if they are not all there: the ring
 * is unusable, and is where it was.
 */
bool vd_vring_move(struct vd_vring *ring, const struct vd_memory *memory,
                   const struct vd_queue_config *config);

/* How far the queue is, as in vd_queue_config; any thread may ask. */
uint32_t vd_vring_state(const struct vd_vring *ring);

bool vd_split_move(struct vd_vring *ring, const struct vd_memory *memory,
                   const struct vd_queue_config *config);
bool vd_packed_move(struct vd_vring *ring, const struct vd_memory *memory,
                    const struct vd_queue_config *config);
enum vd_queue_fault vd_split_begin(struct vd_vring *ring, const struct vd_queue_config *config);
enum vd_queue_fault vd_packed_begin(struct vd_vring *ring, const struct vd_queue_config *config);
int vd_split_available(const struct vd_vring *ring);
int vd_packed_available(const struct vd_vring *ring);
enum vd_queue_fault vd_split_next(struct vd_vring *ring, struct vd_chain *chain);
enum vd_queue_fault vd_packed_next(struct vd_vring *ring, struct vd_chain *chain);
enum vd_queue_fault vd_vring_replay(struct vd_vring *ring, struct vd_chain *chain);
enum vd_queue_fault vd_split_replay(struct vd_vring *ring, struct vd_chain *chain, uint16_t head);
enum vd_queue_fault vd_packed_replay(struct vd_vring *ring, struct vd_chain *chain, uint16_t entry);
void vd_split_push(struct vd_vring *ring, uint16_t id, uint32_t written);
void vd_packed_push(struct vd_vring *ring, uint16_t id, uint32_t written);
void vd_split_publish(struct vd_vring *ring);
void vd_packed_publish(struct vd_vring *ring);
bool vd_split_wants_interrupt(struct vd_vring *ring);
bool vd_packed_wants_interrupt(struct vd_vring *ring);
bool vd_split_enable_kick(struct vd_vring *ring);
bool vd_packed_enable_kick(struct vd_vring *ring);
void vd_split_disable_kick(struct vd_vring *ring);
void vd_packed_disable_kick(struct vd_vring *ring);

/*
 * At most how many chains the driver has made available and we have not fetched; negative if it
 * claims nonsense.
 */
static inline int vd_vring_available(const struct vd_vring *ring)
{
    if (ring->replay_left)
        return ring->replay_left;
    return ring->is_packed ? vd_packed_available(ring) : vd_split_available(ring);
}

/*
 * Fetch the next available chain and translate it into chain->iov; call at most as often as
 * vd_vring_available said. VD_FAULT_NONE with nothing writable: there is no more. On a fault
 * nothing has been fetched, and the ring cannot be used any more.
 */
static inline enum vd_queue_fault vd_vring_next(struct vd_vring *ring, struct vd_chain *chain)
{
    if (ring->replay_left)
        return vd_vring_replay(ring, chain);
    return ring->is_packed ? vd_packed_next(ring, chain) : vd_split_next(ring, chain);
}

/*
 * Return a chain to the driver, of which written bytes were written; visible with the next publish.
 */
static inline void vd_vring_push(struct vd_vring *ring, uint16_t id, uint32_t written)
{
    if (ring->is_packed)
        vd_packed_push(ring, id, written);
    else
        vd_split_push(ring, id, written);
}

/* Show the driver all pushed entries. */
static inline void vd_vring_publish(struct vd_vring *ring)
{
    if (ring->is_packed)
        vd_packed_publish(ring);
    else
        vd_split_publish(ring);
}

/* Whether the driver wants an interrupt for what was published since this was last asked. */
static inline bool vd_vring_wants_interrupt(struct vd_vring *ring)
{
    return ring->is_packed ? vd_packed_wants_interrupt(ring) : vd_split_wants_interrupt(ring);
}

/*
 * Ask for a kick with the next available entry; true if one came already, so that sleeping would be
 * wrong.
 */
static inline bool vd_vring_enable_kick(struct vd_vring *ring)
{
    return ring->is_packed ? vd_packed_enable_kick(ring) : vd_split_enable_kick(ring);
}

static inline void vd_vring_disable_kick(struct vd_vring *ring)
{
    if (ring->is_packed)
        vd_packed_disable_kick(ring);
    else
        vd_split_disable_kick(ring);
}

#endif
