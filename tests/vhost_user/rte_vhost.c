/*
 * A vhost-user-blk server on DPDK's rte_vhost, the library that SPDK's vhost is built on: it serves an image, and does
 * it as SPDK does where that matters to a front-end. It polls and asks for no kicks, offers neither EVENT_IDX nor packed
 * rings nor CONFIGURE_MEM_SLOTS, keeps the log of what is in flight, and stops all rings when one is stopped. A batch is
 * served from its end, so that what comes back is out of order.
 *
 * server SOCKET IMAGE QUEUES: until it is killed.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/virtio_blk.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ring.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <rte_config.h>
#undef RTE_USE_LIBBSD /* whose headers are not needed */
#include <rte_eal.h>
#include <rte_vhost.h>

enum { SECTOR = 512, RINGS_MAX = 16, BATCH_MAX = 64, PIECES_MAX = 256, GET_CONFIG = 24, IDLE_US = 50, PAUSE_US = 200 };

/* As rte_vhost has it in front of its own context. */
struct message {
    uint32_t request, flags, size;
    uint32_t offset, bytes, access;
    uint8_t config[256];
} __attribute__((packed));

struct ring {
    pthread_t thread;
    bool started, enabled;
    int stop;
    uint16_t index, last_avail, last_used;
    struct rte_vhost_vring vring;
};

static int image;
static uint64_t image_bytes;
static uint16_t queues;
static int device = -1;
static bool running;
static struct rte_vhost_memory *memory;
static struct ring rings[RINGS_MAX];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void die(const char *what)
{
    perror(what);
    _exit(1);
}

static void *at(uint64_t address, uint64_t length)
{
    uint64_t got = length;
    void *p = (void *)(uintptr_t)rte_vhost_va_from_guest_pa(memory, address, &got);

    if (!p || got != length)
        die("address outside of the driver's memory");
    return p;
}

/* The pieces of a chain, and how many of them are the device's to read. */
static int pieces_of(const struct ring *r, uint16_t head, struct iovec *iov, int *readable)
{
    const struct vring_desc *table = r->vring.desc;
    int n = 0;

    *readable = 0;
    if (table[head].flags & VRING_DESC_F_INDIRECT) {
        table = at(table[head].addr, table[head].len);
        head = 0;
    }
    for (;; head = table[head].next) {
        iov[n++] = (struct iovec){ at(table[head].addr, table[head].len), table[head].len };
        *readable += !(table[head].flags & VRING_DESC_F_WRITE);
        if (!(table[head].flags & VRING_DESC_F_NEXT) || n == PIECES_MAX)
            return n;
    }
}

static ssize_t discard(const struct iovec *iov, int count)
{
    for (int i = 0; i < count; i++) {
        const struct virtio_blk_discard_write_zeroes *range = iov[i].iov_base;

        for (size_t left = iov[i].iov_len / sizeof(*range); left; left--, range++)
            if (fallocate(image, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)range->sector * SECTOR,
                          (off_t)range->num_sectors * SECTOR))
                return -1;
    }
    return 0;
}

/* Serve a chain; returns how much was written into it. */
static uint32_t serve(const struct ring *r, uint16_t head)
{
    struct iovec iov[PIECES_MAX];
    int readable, n = pieces_of(r, head, iov, &readable);
    struct virtio_blk_outhdr *header = iov[0].iov_base;
    uint8_t *status = iov[n - 1].iov_base;
    off_t offset = (off_t)header->sector * SECTOR;
    ssize_t done = 0;

    *status = VIRTIO_BLK_S_OK;
    switch (header->type) {
    case VIRTIO_BLK_T_IN:
        done = preadv(image, iov + 1, n - 2, offset);
        break;
    case VIRTIO_BLK_T_OUT:
        done = pwritev(image, iov + 1, n - 2, offset);
        break;
    case VIRTIO_BLK_T_FLUSH:
        done = fdatasync(image);
        break;
    case VIRTIO_BLK_T_DISCARD:
        done = discard(iov + 1, n - 2);
        break;
    case VIRTIO_BLK_T_GET_ID:
        memset(iov[1].iov_base, 0, iov[1].iov_len);
        memcpy(iov[1].iov_base, "rte_vhost", 9);
        break;
    default:
        *status = VIRTIO_BLK_S_UNSUPP;
    }
    if (done < 0)
        *status = VIRTIO_BLK_S_IOERR;
    return 1 + (header->type == VIRTIO_BLK_T_IN && done > 0 ? (uint32_t)done : 0);
}

static void finish(struct ring *r, uint16_t head, uint32_t length)
{
    struct vring_used *used = r->vring.used;

    rte_vhost_set_last_inflight_io_split(device, r->index, head);
    used->ring[r->last_used & (r->vring.size - 1)] = (struct vring_used_elem){ head, length };
    __atomic_store_n(&used->idx, ++r->last_used, __ATOMIC_RELEASE);
    rte_vhost_clr_inflight_desc_split(device, r->index, r->last_used, head);
}

static void resubmit(struct ring *r)
{
    struct rte_vhost_ring_inflight log;
    struct rte_vhost_resubmit_info *again;

    if (rte_vhost_get_vhost_ring_inflight(device, r->index, &log) || !(again = log.resubmit_inflight))
        return;
    while (again->resubmit_num) {
        uint16_t head = again->resubmit_list[--again->resubmit_num].index;

        finish(r, head, serve(r, head));
    }
}

static int take(struct ring *r, uint16_t *heads)
{
    uint16_t avail = __atomic_load_n(&r->vring.avail->idx, __ATOMIC_ACQUIRE);
    int n = 0;

    while (r->last_avail != avail && n < BATCH_MAX) {
        heads[n] = r->vring.avail->ring[r->last_avail++ & (r->vring.size - 1)];
        rte_vhost_set_inflight_desc_split(device, r->index, heads[n++]);
    }
    return n;
}

/* Not by rte_vhost_vring_call, which waits for a lock that is held while we are told to stop. */
static void interrupt(const struct ring *r)
{
    uint64_t one = 1;

    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (!(r->vring.avail->flags & VRING_AVAIL_F_NO_INTERRUPT))
        (void)!write(r->vring.callfd, &one, sizeof(one));
}

static void *run(void *argument)
{
    struct ring *r = argument;
    uint16_t heads[BATCH_MAX];

    resubmit(r);
    interrupt(r);
    while (!__atomic_load_n(&r->stop, __ATOMIC_ACQUIRE)) {
        int n = take(r, heads);

        usleep(n ? PAUSE_US : IDLE_US); /* with what was taken in flight: that is when it is killed */
        while (n--)
            finish(r, heads[n], serve(r, heads[n]));
        interrupt(r);
    }
    return NULL;
}

static void start_ring(struct ring *r)
{
    if (!r->enabled || r->started || !running)
        return;
    if (rte_vhost_get_vhost_vring(device, r->index, &r->vring) ||
        rte_vhost_get_vring_base(device, r->index, &r->last_avail, &r->last_used))
        die("ring");
    r->vring.used->flags = VRING_USED_F_NO_NOTIFY;
    r->stop = 0;
    r->started = !pthread_create(&r->thread, NULL, run, r);
}

static void stop_ring(struct ring *r)
{
    if (!r->started)
        return;
    __atomic_store_n(&r->stop, 1, __ATOMIC_RELEASE);
    pthread_join(r->thread, NULL);
    r->started = false;
    rte_vhost_set_vring_base(device, r->index, r->last_avail, r->last_used);
}

static int new_device(int vid)
{
    pthread_mutex_lock(&lock);
    device = vid;
    running = true;
    free(memory);
    if (rte_vhost_get_mem_table(vid, &memory))
        die("memory");
    for (uint16_t i = 0; i < queues; i++)
        start_ring(&rings[i]);
    pthread_mutex_unlock(&lock);
    return 0;
}

static void destroy_device(int vid)
{
    (void)vid;
    pthread_mutex_lock(&lock);
    for (uint16_t i = 0; i < queues; i++)
        stop_ring(&rings[i]);
    running = false;
    pthread_mutex_unlock(&lock);
}

static int vring_state_changed(int vid, uint16_t index, int enabled)
{
    (void)vid;
    pthread_mutex_lock(&lock);
    rings[index].enabled = enabled;
    if (enabled)
        start_ring(&rings[index]);
    else
        stop_ring(&rings[index]);
    pthread_mutex_unlock(&lock);
    return 0;
}

static enum rte_vhost_msg_result before(int vid, void *context)
{
    struct message *m = context;
    struct virtio_blk_config config = { .capacity = image_bytes / SECTOR,
                                        .seg_max = 126,
                                        .blk_size = SECTOR,
                                        .num_queues = queues,
                                        .max_discard_sectors = 1 << 15,
                                        .max_discard_seg = 1,
                                        .discard_sector_alignment = 1 };

    (void)vid;
    if (m->request != GET_CONFIG)
        return RTE_VHOST_MSG_RESULT_NOT_HANDLED;
    if (m->offset || m->bytes > sizeof(config))
        return RTE_VHOST_MSG_RESULT_ERR;
    memcpy(m->config, &config, m->bytes);
    return RTE_VHOST_MSG_RESULT_REPLY;
}

static int new_connection(int vid)
{
    static const struct rte_vhost_user_extern_ops ops = { .pre_msg_handle = before };

    return rte_vhost_extern_callback_register(vid, &ops, NULL);
}

int main(int argc, char **argv)
{
    static const struct rte_vhost_device_ops ops = { .new_device = new_device,
                                                     .destroy_device = destroy_device,
                                                     .vring_state_changed = vring_state_changed,
                                                     .new_connection = new_connection };
    char *eal[] = { argv[0], "--no-huge", "--no-pci", "--no-shconf", "-m", "64", "--iova-mode=va", "-l", "0", "--log-level=4" };
    uint64_t features = 1ull << VIRTIO_F_VERSION_1 | 1ull << VIRTIO_RING_F_INDIRECT_DESC | 1ull << VIRTIO_BLK_F_SEG_MAX |
                        1ull << VIRTIO_BLK_F_BLK_SIZE | 1ull << VIRTIO_BLK_F_FLUSH | 1ull << VIRTIO_BLK_F_MQ | 1ull << VIRTIO_BLK_F_DISCARD |
                        1ull << VHOST_USER_F_PROTOCOL_FEATURES;
    uint64_t protocol = 1ull << VHOST_USER_PROTOCOL_F_MQ | 1ull << VHOST_USER_PROTOCOL_F_REPLY_ACK |
                        1ull << VHOST_USER_PROTOCOL_F_CONFIG | 1ull << VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD;
    struct stat found;

    if (argc != 4 || (queues = (uint16_t)atoi(argv[3])) < 1 || queues > RINGS_MAX)
        return 2;
    image = open(argv[2], O_RDWR | O_CLOEXEC);
    if (image < 0 || fstat(image, &found))
        die(argv[2]);
    image_bytes = (uint64_t)found.st_size;
    for (uint16_t i = 0; i < queues; i++)
        rings[i].index = i;
    if (rte_eal_init(sizeof(eal) / sizeof(*eal), eal) < 0)
        die("rte_eal_init");
    (void)unlink(argv[1]);
    if (rte_vhost_driver_register(argv[1], 0) || rte_vhost_driver_set_features(argv[1], features) ||
        rte_vhost_driver_set_protocol_features(argv[1], protocol) ||
        rte_vhost_driver_callback_register(argv[1], &ops) || rte_vhost_driver_start(argv[1]))
        die(argv[1]);
    printf("%s\n", argv[1]);
    fflush(stdout);
    for (;;)
        pause();
}
