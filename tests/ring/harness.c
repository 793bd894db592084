#include "harness.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <stddef.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <unistd.h>

static struct ring_case *cases;
static bool packed; /* what the case runs with */
static void (*undos[8])(void);
static int undo_count;
static char image_paths[8][128];
static int image_count;

void harness_add(struct ring_case *c)
{
    c->next = cases;
    cases = c;
}

void harness_at_end(void (*undo)(void))
{
    undos[undo_count++] = undo;
}

static void clean_up(void)
{
    while (image_count)
        unlink(image_paths[--image_count]);
    while (undo_count)
        undos[--undo_count]();
}

void harness_die(void)
{
    clean_up();
    _exit(1);
}

void harness_skip(const char *why)
{
    printf("skipped: %s\n", why);
    fflush(stdout);
    clean_up();
    _exit(77);
}

void harness_private_mounts(void)
{
    if (unshare(CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL))
        harness_skip("cannot have mounts of its own");
}

void (*harness_step)(void);

void vd_test_step(void)
{
    if (harness_step)
        harness_step();
}

bool harness_packed(void)
{
    return packed;
}

void harness_breathe(void)
{
    sched_yield();
}

void harness_refuse(uint32_t call, uint32_t error)
{
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, call, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | error),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = { 4, filter };

    CHECK(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) && !prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program));
}

uint64_t harness_random(uint64_t *state)
{
    uint64_t x = *state ? *state : 1;

    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    *state = x;
    return (x * 0x2545f4914f6cdd1dull) >> 16;
}

int image_new(const char *directory, uint64_t bytes, char *path)
{
    int fd;

    if (!directory)
        directory = getenv("TEST_DIRECTORY") ? getenv("TEST_DIRECTORY") : "/tmp";
    snprintf(path, 128, "%s/ring-image-XXXXXX", directory);
    fd = mkstemp(path);
    CHECK(fd >= 0 && !ftruncate(fd, (off_t)bytes));
    memcpy(image_paths[image_count++], path, 128);
    return fd;
}

void rig_open(struct rig *rig, struct plan plan)
{
    memset(rig, 0, sizeof(*rig));
    plan.backend = plan.backend ? plan.backend : "file";
    plan.capacity = plan.capacity ? plan.capacity : 4 * MIB;
    plan.image_bytes = plan.image_bytes ? plan.image_bytes : plan.capacity;
    plan.queues = plan.queues ? plan.queues : 1;
    plan.size = plan.size ? plan.size : 64;
    plan.memory = plan.memory ? plan.memory : 8 * MIB;
    plan.regions = plan.regions ? plan.regions : 1;
    plan.packed |= packed;
    rig->plan = plan;
    rig->image_fd = -1;
    if (plan.image)
        snprintf(rig->path, sizeof(rig->path), "%s", plan.image);
    else if (!strcmp(plan.backend, "file"))
        rig->image_fd = image_new(plan.directory, plan.image_bytes, rig->path);
    rig->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    CHECK(rig->event_fd >= 0);
    rig->config = (struct vd_config){
        .away_ms = plan.away_ms,
        .max_queues = QUEUES_MAX,
        .block_size_bytes = plan.block_bytes ? plan.block_bytes : 512,
        .capacity_bytes = plan.capacity,
        .read_only = plan.read_only,
        .event_fd = rig->event_fd,
        .serial = "serial-of-20-bytes-and-more",
        .backend = plan.backend,
        .path = rig->path,
    };
    CHECK_EQUAL(vd_engine_new(&rig->config, &rig->engine), 0);
    driver_open(&rig->driver, plan.memory, plan.regions, plan.iova, plan.gap);
    CHECK_EQUAL(vd_engine_set_regions(rig->engine, rig->driver.regions, rig->driver.region_count), 0);
    for (uint32_t i = 0; i < plan.queues; i++) {
        dqueue_open(&rig->q[i], &rig->driver, plan.size, plan.packed, plan.event_idx, plan.indirect);
        if (!plan.no_start)
            CHECK_EQUAL(rig_start(rig, i), 0);
    }
}

int rig_start(struct rig *rig, uint32_t queue)
{
    uint64_t features = ALL_BLK_FEATURES & ~((uint64_t)rig->plan.no_flush << VIRTIO_BLK_F_FLUSH);
    struct vd_queue_config config = dqueue_config(&rig->q[queue], features);

    return vd_queue_start(rig->engine, queue, &config);
}

void rig_stop(struct rig *rig, uint32_t queue)
{
    CHECK_EQUAL(vd_queue_stop(rig->engine, queue, 20000), 0);
}

uint32_t rig_state(struct rig *rig, uint32_t queue)
{
    uint32_t state;

    CHECK_EQUAL(vd_queue_state(rig->engine, queue, &state), 0);
    return state;
}

struct vd_queue_stats rig_stats(struct rig *rig, uint32_t queue)
{
    struct vd_queue_stats stats;

    vd_queue_stats_read(rig->engine, queue, &stats);
    return stats;
}

void rig_close(struct rig *rig)
{
    for (uint32_t i = 0; i < rig->plan.queues; i++) {
        rig_stop(rig, i);
        CHECK_EQUAL(rig_stats(rig, i).in_flight, 0);
    }
    vd_engine_free(rig->engine);
    for (uint32_t i = 0; i < rig->plan.queues; i++)
        dqueue_close(&rig->q[i]);
    driver_close(&rig->driver);
    close(rig->event_fd);
    if (rig->image_fd >= 0)
        close(rig->image_fd);
}

struct blk blk_new(struct rig *rig, uint64_t data_bytes)
{
    return (struct blk){
        .header = driver_alloc(&rig->driver, sizeof(struct virtio_blk_outhdr), 16),
        .status = driver_alloc(&rig->driver, 1, 1),
        .data = data_bytes ? driver_alloc(&rig->driver, data_bytes, 4096) : NULL,
    };
}

void blk_send(struct dqueue *q, struct blk *b, uint32_t type, uint64_t sector, uint32_t length)
{
    bool read = type == VIRTIO_BLK_T_IN || type == VIRTIO_BLK_T_GET_ID;
    struct piece pieces[3] = { { driver_iova(q->d, b->header), sizeof(*b->header), false } };
    uint32_t count = 1;

    *b->header = (struct virtio_blk_outhdr){ .type = type, .sector = sector };
    *b->status = 0xff;
    b->done = false;
    if (length)
        pieces[count++] = (struct piece){ driver_iova(q->d, b->data), length, read };
    pieces[count++] = (struct piece){ driver_iova(q->d, b->status), 1, true };
    CHECK(dqueue_add(q, pieces, count, b));
    dqueue_kick(q);
}

uint8_t blk_finish(struct dqueue *q, struct blk *b)
{
    while (!b->done) {
        uint32_t written;
        struct blk *other = dqueue_get(q, &written);

        if (other) {
            other->done = true;
            other->written = written;
        } else {
            CHECK(dqueue_wait(q, 20000));
        }
    }
    return *b->status;
}

uint8_t blk_do(struct dqueue *q, struct blk *b, uint32_t type, uint64_t sector, uint32_t length)
{
    blk_send(q, b, type, sector, length);
    return blk_finish(q, b);
}

void blk_prove(struct rig *rig, uint32_t queue)
{
    struct blk b = blk_new(rig, 8192);
    static uint64_t seed = 1000;

    pattern(b.data, 8192, ++seed);
    CHECK_EQUAL(blk_do(&rig->q[queue], &b, VIRTIO_BLK_T_OUT, 16, 8192), VIRTIO_BLK_S_OK);
    memset(b.data, 0, 8192);
    CHECK_EQUAL(blk_do(&rig->q[queue], &b, VIRTIO_BLK_T_IN, 16, 8192), VIRTIO_BLK_S_OK);
    CHECK(is_pattern(b.data, 8192, seed));
}

void pattern(void *to, size_t length, uint64_t seed)
{
    uint8_t *p = to;

    seed = seed * 0x9e3779b97f4a7c15ull + 1;
    for (size_t i = 0; i < length; i++)
        p[i] = (uint8_t)(harness_random(&seed) >> 3);
}

bool is_pattern(const void *from, size_t length, uint64_t seed)
{
    uint8_t *expected = malloc(length);

    CHECK(expected);
    pattern(expected, length, seed);
    bool same = !memcmp(expected, from, length);
    free(expected);
    return same;
}

bool is_byte(const void *from, size_t length, uint8_t byte)
{
    const uint8_t *p = from;

    for (size_t i = 0; i < length; i++)
        if (p[i] != byte)
            return false;
    return true;
}

void image_read(const struct rig *rig, void *to, size_t length, uint64_t offset)
{
    CHECK(pread(rig->image_fd, to, length, (off_t)offset) == (ssize_t)length);
}

int main(int argc, char **argv)
{
    char *format = argc < 2 ? NULL : strchr(argv[1], '/');

    if (format)
        *format++ = 0;
    packed = format && !strcmp(format, "packed");
    for (struct ring_case *c = cases; c; c = c->next) {
        if (argc < 2) {
            puts(c->name);
            if (c->both)
                printf("%s/packed\n", c->name);
        } else if (!strcmp(argv[1], c->name) && (!packed || c->both)) {
            c->run();
            clean_up();
            return 0;
        }
    }
    return argc < 2 ? 0 : 2;
}
