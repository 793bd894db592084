/*
 * The driver's side of virtqueues of both formats, for the tests: memory in a memfd that the engine maps in several regions
 * at addresses of our choice, and queues in it. Orderly calls build what a driver builds; everything is public so
 * that a test can also write into the rings what no driver would.
 */
#ifndef RING_DRIVER_H
#define RING_DRIVER_H

#include <linux/virtio_blk.h>
#include <linux/virtio_ring.h>
#include <stdbool.h>
#include <stdint.h>

#include "engine_api.h"

enum { REGIONS_MAX = 8, INDIRECT_MAX = 64 };

struct driver {
    int fd;
    uint8_t *base;
    uint64_t size, used;
    struct vd_region regions[REGIONS_MAX];
    uint32_t region_count;
};

/* Memory of size bytes in count regions; region i begins at iova + i * (size / count + gap). */
void driver_open(struct driver *d, uint64_t size, uint32_t count, uint64_t iova, uint64_t gap);
void driver_close(struct driver *d);
/* Never freed, zeroed, inside one region. */
void *driver_alloc(struct driver *d, uint64_t size, uint64_t align);
uint64_t driver_iova(const struct driver *d, const void *p);

struct piece {
    uint64_t iova;
    uint32_t length;
    bool write; /* the device writes it */
};

struct dqueue {
    struct driver *d;
    uint16_t size;
    bool event_idx, indirect, packed;
    struct vring_desc *desc; /* of a packed queue: only what dqueue_put takes */
    struct vring_avail *avail;
    struct vring_used *used;
    struct vring_packed_desc *ring;
    struct vring_packed_desc_event *driver_event, *device_event;
    uint16_t avail_at, used_at; /* packed: positions, index and wrap counter in bit 15 */
    uint16_t held_at, held_flags; /* packed: first descriptor of what was added and not shown, if added is not 0 */
    uint16_t added;        /* packed: entries since the need of a kick was last looked at */
    bool held;
    uint16_t free_head;    /* of descriptors, or of a packed queue's ids */
    uint16_t free_count;   /* entries of the ring */
    uint16_t *next;        /* our own: what is in desc the device, or a test, may have overwritten */
    uint16_t next_avail;   /* entries written */
    uint16_t kicked_avail; /* next_avail when the need of a kick was last looked at */
    uint16_t last_used;
    int kick_fd, interrupt_fd;
    uint64_t kicks;
    struct vring_desc *tables; /* INDIRECT_MAX for each head or id; of a packed queue, in its own layout */
    void **cookies;            /* by head or id; not NULL while the device has it */
    uint16_t *chain_length;
};

void dqueue_open(struct dqueue *q, struct driver *d, uint16_t size, bool packed, bool event_idx, bool indirect);
void dqueue_close(struct dqueue *q);
/* As after a reset of the device: rings zeroed, nothing in flight, indices start at first (packed: laps and rest). */
void dqueue_reset(struct dqueue *q, uint16_t first);
struct vd_queue_config dqueue_config(const struct dqueue *q, uint64_t features);

/* Make a chain available, indirect if the queue can and asks for it; false if it does not fit now. */
bool dqueue_add(struct dqueue *q, const struct piece *pieces, uint32_t count, void *cookie);
/* Make the chain in desc from head on available with the next kick, however wrong it is; packed: with head as id. */
void dqueue_put(struct dqueue *q, uint16_t head);
/* Show the device what was added. */
void dqueue_show(struct dqueue *q);
/* The same, and kick it if it wants that. */
void dqueue_kick(struct dqueue *q);
/* The same, and kick whatever it wants. */
void dqueue_kick_always(struct dqueue *q);
/* Take a used chain: its cookie, or NULL if there is none. */
void *dqueue_get(struct dqueue *q, uint32_t *written);
/* Ask for an interrupt after the next used entry; true if there is one already. */
bool dqueue_enable_interrupt(struct dqueue *q);
/* Ask for an interrupt after the last of so many used entries, each of a chain of so many descriptors. */
void dqueue_want_interrupt(struct dqueue *q, uint16_t entries, uint16_t descriptors);
/* Ask for no interrupts. */
void dqueue_want_none(struct dqueue *q);
/* Where a device is that has served all that was added, as in vd_queue_config. */
uint32_t dqueue_state(const struct dqueue *q);
/* Where a device is that has served all that it shows as used, and fetched no more. */
uint32_t dqueue_shown(const struct dqueue *q);
/* Wait for a used entry by interrupt; false after timeout_ms. */
bool dqueue_wait(struct dqueue *q, int timeout_ms);
/* Interrupts since the last call. */
uint64_t dqueue_interrupts(struct dqueue *q);

/* What driver.c calls for packed queues. */
void packed_open(struct dqueue *q);
void packed_reset(struct dqueue *q, uint16_t first);
bool packed_add(struct dqueue *q, const struct piece *pieces, uint32_t count, void *cookie);
void packed_put(struct dqueue *q, uint16_t id);
void packed_show(struct dqueue *q);
bool packed_kick_wanted(struct dqueue *q);
void *packed_get(struct dqueue *q, uint32_t *written);
bool packed_enable_interrupt(struct dqueue *q);
void packed_want_interrupt(struct dqueue *q, uint16_t slots);
uint32_t packed_shown(const struct dqueue *q);

#endif
