/*
 * The in-flight log: init, take, publish, recover. Runs on the queue's thread, but for init, open
 * and recover, which come before that starts.
 *
 * Split: an entry is in flight from `inflight = 1` on. A batch is published by the ring's used
 * index; until the log's used_idx has followed, the last (used index - used_idx) entries of the
 * list of those that ended are in doubt, and recovery takes them off.
 *
 * Packed: chains are copied into entries of a free list, and are in flight once the free list
 * begins behind them (old_free_head). A batch goes onto the free list, the position is moved, and
 * the ring's used descriptors are shown; the old values follow. If they have not, the ring tells
 * whether the batch was shown: then recovery finishes the move, else it takes it back. Heads of
 * lists change together with their old values in one store, and so do positions, where the order of
 * two stores would leave a moment that recovery could misread.
 */
#include "inflight.h"

#include <errno.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ring.h>
#include <stdlib.h>
#include <string.h>

#include "packed.h"

enum { VERSION = 1, BEGINNING = 0x8001, ALIGN = 64 };

/* The one thing that decides the layout; 0 for split rings, as vhost-user has it. */
static const uint64_t PACKED = 1ull << VIRTIO_F_RING_PACKED;

_Static_assert(sizeof(struct vd_log_split) == 16 && sizeof(struct vd_log_split_state) == 16,
               "as in vhost-user");
_Static_assert(sizeof(struct vd_log_packed) == 32 && sizeof(struct vd_log_packed_state) == 32,
               "as in vhost-user");
_Static_assert(offsetof(struct vd_log_packed, heads) == 12 &&
                   offsetof(struct vd_log_packed, positions) == 16,
               "as in vhost-user, and where one store can write them");

static void set_heads(struct vd_log_packed *p, uint16_t head, uint16_t old)
{
    store_release(&p->heads, head | (uint32_t)old << 16);
}

static void set_positions(struct vd_log_packed *p, uint16_t used, uint16_t old)
{
    store_release(&p->positions, packed_index(used) | (uint64_t)packed_index(old) << 16 |
                                     (uint64_t)(used >> 15) << 32 | (uint64_t)(old >> 15) << 40);
}

uint64_t vd_inflight_bytes(uint32_t queue_size, int packed)
{
    uint64_t bytes =
        packed ? sizeof(struct vd_log_packed) + queue_size * sizeof(struct vd_log_packed_state)
               : sizeof(struct vd_log_split) + queue_size * sizeof(struct vd_log_split_state);

    return (bytes + ALIGN - 1) / ALIGN * ALIGN;
}

/* Both layouts begin alike. */
static uint16_t *version_of(const struct vd_log *log)
{
    return &log->split->version;
}

static void begin_split(struct vd_log_split *s, uint16_t size, uint16_t used)
{
    store_release(&s->version, BEGINNING);
    s->features = 0;
    s->desc_num = size;
    s->last_batch_head = 0;
    s->used_idx = used;
    memset(s->states, 0, size * sizeof(s->states[0]));
    store_release(&s->version, VERSION);
}

static void begin_packed(struct vd_log_packed *p, uint16_t size, uint16_t used)
{
    store_release(&p->version, BEGINNING);
    p->features = PACKED;
    p->desc_num = size;
    set_heads(p, 0, 0);
    set_positions(p, used, used);
    memset(p->states, 0, size * sizeof(p->states[0]));
    for (uint16_t i = 0; i < size; i++)
        p->states[i].next = (uint16_t)(i + 1); /* the last one's is the end of the list */
    store_release(&p->version, VERSION);
}

int vd_inflight_init(void *address, uint64_t bytes, uint32_t queue_size, int packed)
{
    if (!queue_size || queue_size > VD_LOG_ENTRIES_MAX || (uintptr_t)address % ALIGN ||
        bytes < vd_inflight_bytes(queue_size, packed))
        return -EINVAL;
    if (packed)
        begin_packed(address, (uint16_t)queue_size, VD_WRAP);
    else
        begin_split(address, (uint16_t)queue_size, 0);
    return 0;
}

int vd_log_open(const struct vd_queue_config *config, struct vd_log **result)
{
    bool packed = config->features >> VIRTIO_F_RING_PACKED & 1;
    struct vd_log *log;

    *result = NULL;
    if (!config->inflight)
        return 0;
    if ((uintptr_t)config->inflight % ALIGN ||
        config->inflight_bytes < vd_inflight_bytes(config->size, packed))
        return -EINVAL;
    log = calloc(1, sizeof(*log));
    if (!log)
        return -ENOMEM;
    log->split = config->inflight;
    log->size = (uint16_t)config->size;
    *result = log;
    return 0;
}

void vd_log_close(struct vd_log *log)
{
    free(log);
}

void vd_log_begin(struct vd_log *log, bool packed, uint16_t used)
{
    if (packed)
        begin_packed(log->packed, log->size, used);
    else
        begin_split(log->split, log->size, used);
    for (uint16_t i = 0; i < log->size; i++)
        log->next[i] = (uint16_t)(i + 1);
}

bool vd_log_beginning(const struct vd_log *log)
{
    return load_acquire(version_of(log)) == BEGINNING;
}

/* Put an entry where its counter says among those to be replayed. */
static void add_replay(struct vd_log *log, uint64_t *counters, uint16_t entry, uint64_t counter)
{
    uint16_t at = log->replay_count++;

    for (; at && counters[log->replay[at - 1]] > counter; at--)
        log->replay[at] = log->replay[at - 1];
    log->replay[at] = entry;
    counters[entry] = counter;
    if (counter >= log->counter)
        log->counter = counter + 1;
}

int vd_log_recover_split(struct vd_log *log, uint16_t used)
{
    struct vd_log_split *s = log->split;
    uint64_t counters[VD_LOG_ENTRIES_MAX];
    uint16_t in_doubt = (uint16_t)(used - s->used_idx), at = s->last_batch_head;

    if (s->version != VERSION || s->features || s->desc_num != log->size || in_doubt > log->size)
        return -EINVAL;
    for (uint16_t i = 0; i < in_doubt; i++) {
        if (at >= log->size)
            return -EINVAL;
        store_relaxed(&s->states[at].inflight, 0);
        at = load_relaxed(&s->states[at].next);
    }
    VD_STEP();
    store_release(&s->used_idx, used);
    for (uint16_t i = 0; i < log->size; i++)
        if (load_relaxed(&s->states[i].inflight))
            add_replay(log, counters, i, load_relaxed(&s->states[i].counter));
    return 0;
}

void vd_log_take_split(struct vd_log *log, uint16_t head)
{
    struct vd_log_split_state *state = &log->split->states[head];

    VD_STEP();
    store_release(&state->counter, log->counter++);
    VD_STEP();
    store_release(&state->inflight, 1);
    VD_STEP();
}

void vd_log_push_split(struct vd_log *log, uint16_t head)
{
    struct vd_log_split *s = log->split;
    uint16_t before = log->batch_count ? log->batch[log->batch_count - 1] : 0;

    log->batch[log->batch_count++] = head;
    store_release(&s->states[head].next, before);
    VD_STEP();
    store_release(&s->last_batch_head, head);
    VD_STEP();
}

void vd_log_published_split(struct vd_log *log, uint16_t used)
{
    struct vd_log_split *s = log->split;

    VD_STEP();
    for (uint16_t i = 0; i < log->batch_count; i++) {
        store_release(&s->states[log->batch[i]].inflight, 0);
        VD_STEP();
    }
    log->batch_count = 0;
    store_release(&s->used_idx, used);
    VD_STEP();
}

/*
 * Read the free list, from head on: every entry on it is free, whatever else it says. Returns how
 * many, or -1.
 */
static int recover_free(struct vd_log *log, uint16_t head, bool *seen)
{
    struct vd_log_packed *p = log->packed;
    int count = 0;

    log->free_head = head;
    for (uint16_t at = head; at != log->size; at = log->next[at]) {
        if (at > log->size || seen[at])
            return -1;
        seen[at] = true;
        store_relaxed(&p->states[at].inflight, 0);
        log->next[at] = load_relaxed(&p->states[at].next);
        count++;
    }
    return count;
}

/* Read the chain that begins at head. Returns how many entries it has, or -1. */
static int recover_chain(struct vd_log *log, uint16_t head, bool *seen, bool *ids)
{
    const struct vd_log_packed_state *states = log->packed->states;
    uint16_t num = load_relaxed(&states[head].num), at = head, last = head, id;

    if (!num || num > log->size)
        return -1;
    for (uint16_t i = 0; i < num; i++) {
        if (at >= log->size || seen[at])
            return -1;
        seen[at] = true;
        last = at;
        at = log->next[at] = load_relaxed(&states[at].next);
    }
    id = load_relaxed(&states[last].id);
    if (last != load_relaxed(&states[head].last) || id >= log->size || ids[id])
        return -1;
    ids[id] = true;
    log->last[head] = last;
    log->entry[id] = head;
    log->id[head] = id;
    return num;
}

int vd_log_recover_packed(struct vd_log *log, struct vring_packed_desc *ring, uint16_t *position,
                          uint16_t *taken)
{
    struct vd_log_packed *p = log->packed;
    bool seen[VD_LOG_ENTRIES_MAX] = { false }, ids[VD_LOG_ENTRIES_MAX] = { false };
    uint64_t counters[VD_LOG_ENTRIES_MAX];
    uint16_t used = p->used_idx, old = p->old_used_idx, head = p->old_free_head;
    int free_count, in_flight = 0;

    if (p->version != VERSION || p->features != PACKED || p->desc_num != log->size ||
        used >= log->size || old >= log->size || p->used_wrap_counter > 1 ||
        p->old_used_wrap_counter > 1)
        return -EINVAL;
    used |= (uint16_t)(p->used_wrap_counter << 15);
    old |= (uint16_t)(p->old_used_wrap_counter << 15);
    if (used != old && !packed_is_available(load_acquire(&ring[packed_index(old)].flags), old)) {
        head = p->free_head; /* the batch was shown */
        old = used;
    }
    set_heads(p, head, head);
    VD_STEP();
    set_positions(p, old, old);
    VD_STEP();
    free_count = recover_free(log, head, seen);
    if (free_count < 0)
        return -EINVAL;
    for (uint16_t i = 0; i < log->size; i++) {
        if (!load_relaxed(&p->states[i].inflight))
            continue;
        int num = recover_chain(log, i, seen, ids);

        if (num < 0)
            return -EINVAL;
        in_flight += num;
        add_replay(log, counters, i, load_relaxed(&p->states[i].counter));
    }
    if (free_count + in_flight != log->size)
        return -EINVAL;
    /*
     * Used descriptors of a batch whose first was not shown must not be met when others end in
     * another order.
     */
    for (uint16_t i = 0, at = old; i < in_flight; i++, at = packed_moved(at, 1, log->size)) {
        uint16_t *flags = &ring[packed_index(at)].flags;

        if (!packed_is_available(load_relaxed(flags), at))
            store_relaxed(flags, packed_avail_flags(at));
    }
    *position = old;
    *taken = (uint16_t)in_flight;
    return 0;
}

uint16_t vd_log_note(struct vd_log *log, uint16_t entry, uint64_t addr, uint32_t len, uint16_t id,
                     uint16_t flags)
{
    struct vd_log_packed_state *state = &log->packed->states[entry];

    store_relaxed(&state->addr, addr);
    store_relaxed(&state->len, len);
    store_relaxed(&state->id, id);
    store_relaxed(&state->flags, flags);
    VD_STEP();
    return log->next[entry];
}

void vd_log_take_packed(struct vd_log *log, uint16_t last, uint16_t num, uint16_t id)
{
    uint16_t head = log->free_head;
    struct vd_log_packed_state *state = &log->packed->states[head];

    store_relaxed(&state->num, num);
    store_relaxed(&state->last, last);
    store_relaxed(&state->counter, log->counter++);
    VD_STEP();
    store_release(&state->inflight, 1);
    VD_STEP();
    log->last[head] = last;
    log->entry[id] = head;
    log->free_head = log->next[last];
    set_heads(log->packed, log->free_head, log->free_head);
    VD_STEP();
}

void vd_log_push_packed(struct vd_log *log, uint16_t id)
{
    VD_STEP();
    log->batch[log->batch_count++] = log->entry[id];
}

void vd_log_publish_packed(struct vd_log *log, uint16_t used, uint16_t old)
{
    struct vd_log_packed *p = log->packed;
    uint16_t old_head = log->free_head;

    VD_STEP();
    for (uint16_t i = 0; i < log->batch_count; i++) {
        uint16_t entry = log->batch[i], last = log->last[entry];

        log->next[last] = log->free_head;
        store_release(&p->states[last].next, log->free_head);
        log->free_head = entry;
        VD_STEP();
    }
    set_heads(p, log->free_head, old_head);
    VD_STEP();
    set_positions(p, used, old);
    VD_STEP();
}

void vd_log_published_packed(struct vd_log *log, uint16_t used)
{
    struct vd_log_packed *p = log->packed;

    VD_STEP();
    for (uint16_t i = 0; i < log->batch_count; i++) {
        store_release(&p->states[log->batch[i]].inflight, 0);
        VD_STEP();
    }
    log->batch_count = 0;
    set_heads(p, log->free_head, log->free_head);
    VD_STEP();
    set_positions(p, used, used);
    VD_STEP();
}
