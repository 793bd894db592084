/*
 * A queue's side of a vhost-user server: requests are put into its ring as descriptors of the
 * driver's own pages, and answers are taken from it.
 *
 * A request is waiting (no server works on the ring, or it has not been put there yet) or posted.
 * When a server is lost what was posted waits again, and is posted to the next one: nothing is
 * answered that a server has not answered. Everything that a server writes is read once and
 * checked; one that returns what it was not given is left.
 *
 * The ring's memory belongs to this thread while no server works on it; from vd_vhost_serve on its
 * used part is the server's.
 */
#include "vhost.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { EVENT_CALL };

struct vhost_queue {
    struct vhost *vhost;
    struct vhost_ring *ring;
    struct vd_request **posted; /* by number */
    struct vd_request *waiting, **waiting_end;
    uint32_t posted_count;
    uint16_t avail, used; /* free-running */
    bool call_armed;
};

static void wait_for_server(struct vhost_queue *vq, struct vd_request *r)
{
    r->next = NULL;
    *vq->waiting_end = r;
    vq->waiting_end = &r->next;
}

static struct vd_request *next_waiting(struct vhost_queue *vq)
{
    struct vd_request *r = vq->waiting;

    vq->waiting = r->next;
    if (!vq->waiting)
        vq->waiting_end = &vq->waiting;
    return r;
}

static struct vring_desc *add(struct vring_desc *desc, uint64_t iova, size_t length, uint16_t flags)
{
    *desc = (struct vring_desc){ .addr = iova, .len = (uint32_t)length, .flags = flags };
    return desc + 1;
}

static uint32_t type_of(enum vd_operation operation)
{
    switch (operation) {
    case VD_READ:
        return VIRTIO_BLK_T_IN;
    case VD_WRITE:
        return VIRTIO_BLK_T_OUT;
    case VD_FLUSH:
        return VIRTIO_BLK_T_FLUSH;
    case VD_DISCARD:
        return VIRTIO_BLK_T_DISCARD;
    default:
        return VIRTIO_BLK_T_WRITE_ZEROES;
    }
}

static struct vring_desc *add_extents(struct vring_desc *desc, const struct vhost_ring *ring,
                                      uint32_t index, const struct vd_request *r)
{
    struct vhost_slot *slot = vhost_slot(ring, index);

    for (uint32_t i = 0; i < r->extent_count; i++)
        slot->segments[i] = (struct virtio_blk_discard_write_zeroes){
            .sector = r->extents[i].offset / VD_SECTOR_BYTES,
            .num_sectors = (uint32_t)(r->extents[i].length / VD_SECTOR_BYTES),
            .flags = r->extents[i].unmap ? VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP : 0,
        };
    return add(desc, vhost_slot_iova(ring, index, slot->segments),
               r->extent_count * sizeof(slot->segments[0]), 0);
}

/* Fill the request's descriptors; returns how many bytes of table there are. */
static size_t describe(struct vd_queue *q, const struct vhost_ring *ring, uint32_t index,
                       const struct vd_request *r)
{
    struct vhost_slot *slot = vhost_slot(ring, index);
    struct vring_desc *end;
    bool data = r->operation == VD_READ || r->operation == VD_WRITE;

    slot->header = (struct virtio_blk_outhdr){ .type = type_of(r->operation),
                                               .sector = r->offset / VD_SECTOR_BYTES };
    slot->status = 0xff;
    end = add(slot->table, vhost_slot_iova(ring, index, &slot->header), sizeof(slot->header), 0);
    for (uint32_t i = 0; data && i < r->data_count; i++)
        end = add(end, vd_queue_iova(q, r->data[i].iov_base), r->data[i].iov_len,
                  r->operation == VD_READ ? VRING_DESC_F_WRITE : 0);
    if (r->extent_count)
        end = add_extents(end, ring, index, r);
    end = add(end, vhost_slot_iova(ring, index, &slot->status), 1, VRING_DESC_F_WRITE);
    for (uint16_t i = 0; &slot->table[i + 1] < end; i++) {
        slot->table[i].flags |= VRING_DESC_F_NEXT;
        slot->table[i].next = (uint16_t)(i + 1);
    }
    return (size_t)((uint8_t *)end - (uint8_t *)slot->table);
}

static void post(struct vd_queue *q, struct vhost_queue *vq, struct vd_request *r)
{
    const struct vhost_ring *ring = vq->ring;
    uint32_t size = vq->vhost->config.queue_size, index = vd_request_index(q, r);
    size_t bytes = describe(q, ring, index, r);

    ring->desc[index] = (struct vring_desc){
        .addr = vhost_slot_iova(ring, index, vhost_slot(ring, index)->table),
        .len = (uint32_t)bytes,
        .flags = VRING_DESC_F_INDIRECT,
    };
    ring->avail->ring[vq->avail++ & (size - 1)] = (uint16_t)index;
    vq->posted[index] = r;
    vq->posted_count++;
}

/* Show the server what was posted, and wake it unless it looks by itself. */
static void publish_posted(const struct vhost_queue *vq)
{
    const struct vhost_ring *ring = vq->ring;
    uint64_t one = 1;

    if (ring->avail->idx == vq->avail)
        return;
    store_release(&ring->avail->idx, vq->avail);
    full_barrier();
    if (!(load_relaxed(&ring->used->flags) & VRING_USED_F_NO_NOTIFY))
        (void)!write(ring->kick_fd, &one, sizeof(one));
}

static void answered(struct vd_queue *q, struct vd_request *r, uint8_t status)
{
    int error = status == VIRTIO_BLK_S_OK ? 0 : status == VIRTIO_BLK_S_UNSUPP ? ENOTSUP : EIO;

    if (!error || error == ENOTSUP || !vd_request_wait(q, r, error))
        vd_request_finish(q, r, error);
}

/* Take what the server has answered. */
static void take_answers(struct vd_queue *q, struct vhost_queue *vq)
{
    struct vhost_ring *ring = vq->ring;
    uint32_t size = vq->vhost->config.queue_size;
    uint16_t used = load_acquire(&ring->used->idx);

    if ((uint16_t)(used - vq->used) > vq->posted_count)
        store_release(&ring->liar, 1);
    while (vq->used != used && !load_relaxed(&ring->liar)) {
        uint32_t index = load_relaxed(&ring->used->ring[vq->used++ & (size - 1)].id);
        struct vd_request *r = index < size ? vq->posted[index] : NULL;

        if (!r) {
            store_release(&ring->liar, 1);
            break;
        }
        vq->posted[index] = NULL;
        vq->posted_count--;
        answered(q, r, load_relaxed(&vhost_slot(ring, index)->status));
    }
    if (load_relaxed(&ring->liar))
        vd_queue_report(q);
}

/* Another server than before works on the ring, or none. */
static void change_server(struct vd_queue *q, struct vhost_queue *vq, uint32_t wanted)
{
    struct vhost_ring *ring = vq->ring;

    if (ring->served && !load_relaxed(&ring->liar))
        take_answers(q, vq); /* it was too late for it to hear of them, not for us */
    for (uint32_t i = 0; vq->posted_count; i++) {
        if (!vq->posted[i])
            continue;
        wait_for_server(vq, vq->posted[i]);
        vq->posted[i] = NULL;
        vq->posted_count--;
    }
    if (!wanted) {
        vhost_ring_clear(vq->vhost, ring);
        vq->avail = vq->used = 0;
        store_relaxed(&ring->liar, 0);
    }
    store_release(&ring->served, wanted);
}

static void vhost_turn(struct vd_queue *q)
{
    struct vhost_queue *vq = vd_queue_backend(q);
    uint32_t wanted = load_acquire(&vq->ring->wanted);

    if (wanted != vq->ring->served)
        change_server(q, vq, wanted);
    if (vd_queue_is_abandoned(q))
        while (vq->waiting)
            vd_request_finish(q, next_waiting(vq), ECANCELED);
    if (!vq->call_armed) {
        struct io_uring_sqe *sqe = vd_queue_sqe(q);

        io_uring_prep_poll_add(sqe, vq->ring->call_fd, POLLIN);
        vd_sqe_of_event(sqe, EVENT_CALL);
        vq->call_armed = true;
    }
    if (!vq->ring->served || load_relaxed(&vq->ring->liar))
        return;
    take_answers(q, vq);
    while (vq->waiting)
        post(q, vq, next_waiting(vq));
    publish_posted(vq);
}

static void vhost_event(struct vd_queue *q, unsigned event, int result)
{
    struct vhost_queue *vq = vd_queue_backend(q);
    uint64_t count;

    (void)event;
    (void)result;
    (void)!read(vq->ring->call_fd, &count, sizeof(count));
    vq->call_armed = false; /* the next turn takes the answers, and looks again */
}

static void vhost_submit(struct vd_queue *q, struct vd_request *r)
{
    wait_for_server(vd_queue_backend(q), r);
}

static void vhost_complete(struct vd_queue *q, struct vd_request *r, int result)
{
    vd_request_finish(q, r, result < 0 ? -result : 0); /* nothing of a request is the kernel's */
}

static int vhost_open(const struct vd_config *config, void **state)
{
    struct vhost *v;
    int error = vhost_new(config, &v);

    *state = error ? NULL : v;
    return error;
}

static void vhost_close(void *state)
{
    vhost_free(state);
}

static void vhost_info(void *state, struct vd_backend_info *info)
{
    (void)state;
    info->discard = 1;
}

static int vhost_queue_open(struct vd_queue *q)
{
    struct vhost *v = vd_queue_volume(q);
    struct vhost_queue *vq = calloc(1, sizeof(*vq));

    if (vq)
        vq->posted = calloc(v->config.queue_size, sizeof(struct vd_request *));
    if (!vq || !vq->posted) {
        free(vq);
        return -ENOMEM;
    }
    vq->vhost = v;
    vq->ring = &v->rings[vd_queue_index(q)];
    vq->waiting_end = &vq->waiting;
    vhost_ring_clear(v, vq->ring);
    vd_queue_set_backend(q, vq);
    return 0;
}

static void vhost_queue_close(struct vd_queue *q)
{
    struct vhost_queue *vq = vd_queue_backend(q);

    store_release(&vq->ring->served, 0);
    free(vq->posted);
    free(vq);
}

void vd_vhost_memory(struct vd_engine *engine, struct vd_region *region)
{
    const struct vhost *v = vd_engine_backend(engine);

    *region =
        (struct vd_region){ .iova = VHOST_IOVA, .size = v->bytes, .fd = v->fd, .writable = 1 };
}

int vd_vhost_ring(struct vd_engine *engine, uint32_t index, struct vd_vhost_ring *where)
{
    const struct vhost *v = vd_engine_backend(engine);
    const struct vhost_ring *ring = &v->rings[index];

    if (index >= v->config.max_queues)
        return -EINVAL;
    *where = (struct vd_vhost_ring){
        .size = v->config.queue_size,
        .desc_iova = VHOST_IOVA + (uint64_t)((uint8_t *)ring->desc - v->memory),
        .driver_iova = VHOST_IOVA + (uint64_t)((uint8_t *)ring->avail - v->memory),
        .device_iova = VHOST_IOVA + (uint64_t)((uint8_t *)ring->used - v->memory),
        .kick_fd = ring->kick_fd,
        .call_fd = ring->call_fd,
    };
    return 0;
}

void vd_vhost_serve(struct vd_engine *engine, uint32_t index, uint32_t server)
{
    struct vhost *v = vd_engine_backend(engine);

    store_release(&v->rings[index].wanted, server);
    vd_engine_wake(engine, index);
}

uint32_t vd_vhost_serves(struct vd_engine *engine, uint32_t index)
{
    const struct vhost *v = vd_engine_backend(engine);

    return load_acquire(&v->rings[index].served);
}

int vd_vhost_lies(struct vd_engine *engine, uint32_t index)
{
    const struct vhost *v = vd_engine_backend(engine);

    return (int)load_acquire(&v->rings[index].liar);
}

const struct vd_backend_ops vd_backend_vhost = {
    .name = "vhost-user",
    .open = vhost_open,
    .close = vhost_close,
    .info = vhost_info,
    .submit = vhost_submit,
    .complete = vhost_complete,
    .queue_open = vhost_queue_open,
    .queue_close = vhost_queue_close,
    .turn = vhost_turn,
    .event = vhost_event,
};
