#include "nbd_rig.h"

#include <string.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "fake_tls.h"

enum { UNIT = 4096, TOGETHER = 24, PIECE_MAX = 16 };

static char reason[160];
static struct vd_nbd_config config;
pid_t nbd_broker;

static void end_broker(void)
{
    if (nbd_broker)
        kill(nbd_broker, SIGKILL);
}

static void start_broker(void)
{
    int ends[2];

    CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends));
    nbd_broker = fork();
    CHECK(nbd_broker >= 0);
    if (!nbd_broker) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        close(ends[0]);
        _exit(-vd_nbd_broker(&config, ends[1]));
    }
    close(ends[1]);
    harness_at_end(end_broker);
    config.brokered = true;
    config.broker_fd = ends[0];
}

void nbd_rig_plan(struct rig *rig, struct fake_nbd *s, struct plan plan)
{
    memset(rig, 0, sizeof(*rig));
    plan.capacity = plan.capacity ? plan.capacity : s->size;
    plan.queues = plan.queues ? plan.queues : 1;
    plan.packed |= harness_packed();
    rig->plan = plan;
    rig->image_fd = -1;
    rig->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    config = s->tls_version ? fake_tls_config(s) : fake_nbd_config(s);
    if (plan.brokered)
        start_broker();
    rig->config = (struct vd_config){
        .max_queues = plan.queues,
        .block_size_bytes = 512,
        .capacity_bytes = plan.capacity,
        .read_only = plan.read_only,
        .away_ms = plan.away_ms,
        .event_fd = rig->event_fd,
        .serial = "remote",
        .backend = "nbd",
        .nbd = &config,
        .reason = reason,
    };
}

void nbd_rig_open(struct rig *rig, struct fake_nbd *s, struct plan plan)
{
    nbd_rig_plan(rig, s, plan);
    nbd_rig_start(rig);
}

void nbd_rig_start(struct rig *rig)
{
    const struct plan plan = rig->plan;

    CHECK_EQUAL(vd_engine_new(&rig->config, &rig->engine), 0);
    driver_open(&rig->driver, 16 * MIB, 2, 0x10000, 0x1000000);
    CHECK_EQUAL(vd_engine_set_regions(rig->engine, rig->driver.regions, rig->driver.region_count), 0);
    for (uint32_t i = 0; i < rig->plan.queues; i++) {
        dqueue_open(&rig->q[i], &rig->driver, plan.size, rig->plan.packed, plan.event_idx, plan.indirect);
        CHECK_EQUAL(rig_start(rig, i), 0);
    }
}

struct work {
    struct blk blk;
    uint64_t unit, units;
    bool write;
};

/* What is to be on the disk, by unit: the seed of its pattern; 0: zeros. */
struct expected {
    uint64_t seeds[1024];
};

static void begin(struct rig *rig, struct work *w, const bool *busy, uint64_t *random, uint64_t *seed, struct expected *e)
{
    uint64_t total = rig->plan.capacity / UNIT;

    do {
        w->units = 1 + random_below(random, random_below(random, 4) ? 2 : PIECE_MAX);
        w->unit = random_below(random, total - w->units);
    } while (memchr(busy + w->unit, true, w->units));
    w->write = random_below(random, 2);
    for (uint64_t i = 0; w->write && i < w->units; i++) {
        e->seeds[w->unit + i] = ++*seed;
        pattern(w->blk.data + i * UNIT, UNIT, *seed);
    }
    if (!w->write)
        memset(w->blk.data, 0xee, w->units * UNIT);
}

static void check(const struct work *w, const struct expected *e)
{
    CHECK_EQUAL(*w->blk.status, VIRTIO_BLK_S_OK);
    for (uint64_t i = 0; !w->write && i < w->units; i++) {
        uint64_t seed = e->seeds[w->unit + i];

        CHECK(seed ? is_pattern(w->blk.data + i * UNIT, UNIT, seed) : is_byte(w->blk.data + i * UNIT, UNIT, 0));
    }
}

void nbd_exercise(struct rig *rig, struct fake_nbd *s, uint32_t rounds, uint64_t seed)
{
    static struct work works[TOGETHER];
    static struct expected expected;
    static bool busy[1024];
    struct dqueue *q = &rig->q[0];
    struct blk flush = blk_new(rig, 0);
    uint64_t random = seed, used = 0;

    CHECK(rig->plan.capacity <= sizeof(busy) * UNIT);
    memset(&expected, 0, sizeof(expected));
    fake_nbd_settle(s);
    memset(s->image, 0, s->size);
    fake_nbd_settle(s);
    for (uint32_t i = 0; i < TOGETHER; i++)
        works[i].blk = blk_new(rig, PIECE_MAX * UNIT);
    for (uint32_t round = 0; round < rounds; round++) {
        uint32_t n = 1 + (uint32_t)random_below(&random, TOGETHER);

        for (uint32_t i = 0; i < n; i++) {
            struct work *w = &works[i];

            begin(rig, w, busy, &random, &used, &expected);
            memset(busy + w->unit, true, w->units);
            blk_send(q, &w->blk, w->write ? VIRTIO_BLK_T_OUT : VIRTIO_BLK_T_IN, w->unit * UNIT / 512,
                     (uint32_t)(w->units * UNIT));
        }
        for (uint32_t i = 0; i < n; i++)
            blk_finish(q, &works[i].blk);
        for (uint32_t i = 0; i < n; i++) {
            check(&works[i], &expected);
            memset(busy + works[i].unit, false, works[i].units);
        }
        if (!random_below(&random, 8))
            CHECK_EQUAL(blk_do(q, &flush, VIRTIO_BLK_T_FLUSH, 0, 0), VIRTIO_BLK_S_OK);
    }
    fake_nbd_settle(s);
    for (uint64_t i = 0; i < rig->plan.capacity / UNIT; i++)
        CHECK(expected.seeds[i] ? is_pattern(s->image + i * UNIT, UNIT, expected.seeds[i])
                                : is_byte(s->image + i * UNIT, UNIT, 0));
}

struct vd_backend_status nbd_status(struct rig *rig)
{
    struct vd_backend_info info;

    vd_engine_backend_info(rig->engine, &info);
    return info.status;
}
