/*
 * The queue's turns on the fuzzer's own thread: queue_control.c and queue_state.c are compiled with the pthread calls
 * that create, join and wait for a queue's thread renamed to those here.
 *
 * The model, where no address for data reaches the rings: what a turn fetches is what the rings said before it, and what
 * it shows as used is among what was fetched and not shown before. A queue that has drained owes nothing.
 */
#include <linux/virtio_config.h>
#include <string.h>

#include "drive.h"
#include "packed.h"
#include "turn.h"
#include "uring.h"

enum { TURNS_MAX = 100000, PENDING_MAX = 4 * VD_QUEUE_SIZE_MAX, RING_BYTES = RING_PAGES * PAGE };

struct chain {
    uint16_t id, entries;
};

static struct world *world;
static struct vd_queue *queue;
static struct io_uring uring;
static bool uring_open;
static uint8_t before[RING_BYTES];
static struct chain pending[PENDING_MAX];
static uint32_t pending_count;
static bool blind; /* the model has lost sight, until the next start */

int fuzz_thread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *), void *argument);
int fuzz_thread_join(pthread_t thread, void **result);
int fuzz_thread_wait(pthread_cond_t *condition, pthread_mutex_t *mutex, const struct timespec *until);

static void pending_add(uint16_t id, uint16_t entries)
{
    REQUIRE(pending_count < PENDING_MAX);
    pending[pending_count++] = (struct chain){ id, entries };
}

/* The oldest one with the id. */
static uint16_t pending_take(uint32_t id)
{
    uint32_t i = 0;

    while (i < pending_count && pending[i].id != id)
        i++;
    REQUIRE(i < pending_count); /* or the driver gets back what it has not given, or twice */
    uint16_t entries = pending[i].entries;

    pending_count--;
    for (; i < pending_count; i++)
        pending[i] = pending[i + 1];
    return entries;
}

static void split_fetched(const struct vd_queue *q, uint16_t from)
{
    const uint16_t *ring = (const uint16_t *)(before + (q->config.driver_iova - RING_IOVA) + 4);

    for (; from != q->ring.next_avail; from++)
        pending_add(ring[from & (q->ring.size - 1)], 1);
}

static void packed_fetched(const struct vd_queue *q, uint16_t from)
{
    const struct vring_packed_desc *ring = (const struct vring_packed_desc *)before;
    uint16_t entries = 0;

    while (from != q->ring.next_avail) {
        const struct vring_packed_desc *desc = &ring[packed_index(from)];

        entries++;
        from = packed_moved(from, 1, q->ring.size);
        if (desc->flags & VRING_DESC_F_NEXT)
            continue;
        pending_add(desc->id, entries);
        entries = 0;
    }
    REQUIRE(!entries);
}

static void used_shown(const struct vd_queue *q, uint16_t from)
{
    const struct vring_used *used = (const void *)(world->memory + (q->config.device_iova - RING_IOVA));
    const struct vring_packed_desc *ring = (const void *)world->memory;

    if (!q->ring.is_packed) {
        REQUIRE(q->stats->fault || used->idx == q->ring.published_used);
        /* A held request and as many as the ring has, of a driver that did not wait for the first: one is overwritten. */
        blind |= (uint16_t)(q->ring.published_used - from) > q->ring.size;
        if (blind)
            return;
        for (; from != q->ring.published_used; from++)
            pending_take(used->ring[from & (q->ring.size - 1)].id);
        return;
    }
    while (from != q->ring.published_used) {
        const struct vring_packed_desc *desc = &ring[packed_index(from)];
        uint16_t entries;

        REQUIRE((desc->flags & (VD_AVAIL | VD_USED)) == packed_used_flags(from));
        entries = pending_take(desc->id);
        for (uint16_t i = 0; i < entries; i++) {
            from = packed_moved(from, 1, q->ring.size);
            REQUIRE(i + 1 == entries || from != q->ring.published_used);
        }
    }
}

/* Remember what the turn may fetch. */
static void look(const struct vd_queue *q)
{
    size_t avail = q->config.driver_iova - RING_IOVA;

    if (q->ring.is_packed)
        memcpy(before, world->memory, q->ring.size * sizeof(struct vring_packed_desc));
    else
        memcpy(before + avail, world->memory + avail, 4 + 2ul * q->ring.size);
}

static unsigned turn(struct vd_queue *q)
{
    bool model = world->apart && !world->rings_cut && !blind && !vd_queue_memory_lost(q);
    uint16_t avail = q->ring.next_avail, used = q->ring.published_used;
    enum vd_command command = vd_turn_command(q);
    unsigned work;

    if (model)
        look(q);
    work = vd_turn_begin(q, command);
    if (command != VD_RUN && q->in_flight && !q->held && !io_uring_cq_ready(&q->uring))
        io_uring_submit_and_wait(&q->uring, 1);
    pthread_mutex_lock(&q->lock);
    work += vd_turn_end(q, command);
    if (command != VD_RUN && !q->in_flight)
        vd_queue_set_state(q, command == VD_STOP ? VD_STOPPED : VD_PAUSED);
    pthread_mutex_unlock(&q->lock);
    if (model && !vd_queue_memory_lost(q)) {
        if (q->ring.is_packed)
            packed_fetched(q, avail);
        else
            split_fetched(q, avail);
        used_shown(q, used);
        if (!q->in_flight && !q->stats->fault && !blind)
            REQUIRE(pending_count == q->ring.replay_left);
    }
    REQUIRE(q->in_flight <= q->ring.size);
    return work;
}

void drive_begin(struct world *w, const struct vd_queue_config *config)
{
    (void)config;
    world = w;
    world->rings_cut = world->bytes < RING_BYTES;
    pending_count = 0;
    blind = false;
}

void drive_started(struct vd_queue *q)
{
    const struct vd_log *log = q->ring.log;

    for (uint16_t i = 0; log && i < log->replay_count; i++) {
        uint16_t entry = log->replay[i];

        if (q->ring.is_packed)
            pending_add(log->id[entry], log->packed->states[entry].num);
        else
            pending_add(entry, 1);
    }
    REQUIRE(pending_count <= q->ring.size);
}

void drive_kick(struct vd_queue *q)
{
    for (int i = 0; i < 3; i++) {
        if (vd_turn_command(q) == VD_RUN && !q->stats->fault)
            vd_vring_disable_kick(&q->ring);
        if (!turn(q) && !q->stats->fault)
            (void)vd_vring_enable_kick(&q->ring);
    }
}

void drive_stopping(struct vd_queue *q)
{
    (void)q;
}

int fuzz_thread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *), void *argument)
{
    (void)thread;
    (void)attributes;
    (void)run;
    queue = argument;
    if (!uring_open)
        REQUIRE(!vd_uring_open(&queue->uring, VD_QUEUE_SIZE_MAX));
    else
        queue->uring = uring;
    uring_open = true;
    REQUIRE(!queue->engine->ops->queue_open || !queue->engine->ops->queue_open(queue));
    vd_queue_set_state(queue, VD_RUNNING);
    return 0;
}

int fuzz_thread_join(pthread_t thread, void **result)
{
    (void)thread;
    (void)result;
    if (queue->engine->ops->queue_close)
        queue->engine->ops->queue_close(queue);
    uring = queue->uring; /* nothing is in flight: the next queue may have it */
    return 0;
}

/* The control thread waits for the queue: so let it run. A queue that does not drain hangs a device's reset. */
int fuzz_thread_wait(pthread_cond_t *condition, pthread_mutex_t *mutex, const struct timespec *until)
{
    static uint64_t turns;

    (void)condition;
    (void)until;
    turns = queue->state == VD_RUNNING ? 0 : turns;
    REQUIRE(turns++ < TURNS_MAX);
    pthread_mutex_unlock(mutex);
    turn(queue);
    pthread_mutex_lock(mutex);
    return 0;
}
