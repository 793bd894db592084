/*
 * A driver that makes random mistakes. Whatever it does, the engine lives, answers control, does good requests
 * right, and reads and writes nothing but the memory it was given. RING_SEED repeats a run; RING_SECONDS makes it
 * longer.
 */
#include <string.h>
#include <unistd.h>

#include "harness.h"

enum { SLOTS = 16, SLOT_BYTES = 8192, GOOD_SECTORS = 1024, LIVES_MIN = 4 };

struct slot {
    struct blk b;
    bool busy, good;
    uint32_t type, sector;
    uint64_t seed;
};

static uint64_t wild_address(uint64_t *seed, const struct rig *rig)
{
    const struct vd_region *r = &rig->driver.regions[random_below(seed, rig->driver.region_count)];

    switch (random_below(seed, 8)) {
    case 0:
        return harness_random(seed) << 20;
    case 1:
        return UINT64_MAX - random_below(seed, 5000);
    case 2:
        return r->iova + r->size - random_below(seed, 600);
    case 3:
        return r->iova - random_below(seed, 600);
    case 4:
        return random_below(seed, 64);
    default:
        return r->iova + random_below(seed, r->size);
    }
}

static uint32_t wild_length(uint64_t *seed)
{
    static const uint32_t some[] = { 0, 1, 15, 16, 17, 48, 511, 512, 513, 4096, 1u << 20, 0x7fffffff, 0xffffffff, 0xfffffff0 };

    return random_below(seed, 3) ? some[random_below(seed, sizeof(some) / sizeof(some[0]))]
                                 : (uint32_t)harness_random(seed);
}

static void spoil_packed(uint64_t *seed, struct rig *rig, struct dqueue *q)
{
    struct vring_packed_desc *d = random_below(seed, 2)
                                      ? &q->ring[random_below(seed, q->size)]
                                      : (struct vring_packed_desc *)&q->tables[random_below(seed, (uint64_t)q->size * INDIRECT_MAX)];

    switch (random_below(seed, 7)) {
    case 0:
        store_relaxed(&d->addr, wild_address(seed, rig));
        break;
    case 1:
        store_relaxed(&d->len, wild_length(seed));
        break;
    case 2: /* available or used in any lap, too */
        store_relaxed(&d->flags, (uint16_t)(random_below(seed, 8) | random_below(seed, 2) << 7 | random_below(seed, 2) << 15));
        break;
    case 3:
        store_relaxed(&d->id, (uint16_t)(random_below(seed, 4) ? random_below(seed, q->size) : harness_random(seed)));
        break;
    case 4:
        store_relaxed(&q->driver_event->off_wrap, (uint16_t)harness_random(seed));
        break;
    case 5:
        store_relaxed(&q->driver_event->flags, (uint16_t)random_below(seed, 5));
        break;
    default: /* out of turn */
        q->avail_at = (uint16_t)(random_below(seed, q->size) | random_below(seed, 2) << 15);
    }
}

/* Change one field of one descriptor that the device may be looking at. */
static void spoil(uint64_t *seed, struct rig *rig, struct dqueue *q)
{
    struct vring_desc *d = random_below(seed, 2) ? &q->desc[random_below(seed, q->size)]
                                                 : &q->tables[random_below(seed, (uint64_t)q->size * INDIRECT_MAX)];

    if (q->packed) {
        spoil_packed(seed, rig, q);
        return;
    }
    switch (random_below(seed, 8)) {
    case 0:
        store_relaxed(&d->addr, wild_address(seed, rig));
        break;
    case 1:
        store_relaxed(&d->len, wild_length(seed));
        break;
    case 2:
        store_relaxed(&d->flags, (uint16_t)random_below(seed, 8));
        break;
    case 3:
        store_relaxed(&d->next, (uint16_t)(random_below(seed, 4) ? random_below(seed, q->size) : harness_random(seed)));
        break;
    case 4:
        store_relaxed(&q->avail->ring[random_below(seed, q->size + 1u)], (uint16_t)random_below(seed, q->size + 2u));
        break;
    case 5:
        store_relaxed(&q->used->idx, (uint16_t)harness_random(seed));
        break;
    case 6:
        store_relaxed(&q->avail->flags, (uint16_t)harness_random(seed));
        break;
    default:
        store_relaxed(&q->avail->idx, (uint16_t)(q->next_avail + random_below(seed, 3)));
    }
}

/* Requests that should work, with now and then a wild header or a wild piece. Returns whether it is a good one. */
static bool send(uint64_t *seed, struct dqueue *q, struct slot *s, uint32_t first, bool wild)
{
    static const uint32_t types[] = { 0, 1, 4, 8, 11, 13, 0, 1, 0, 1 };
    struct piece pieces[8];
    uint32_t count = 0, bytes = 512 * (1 + (uint32_t)random_below(seed, 4));

    s->type = wild ? types[random_below(seed, 10)] : (uint32_t)random_below(seed, 2);
    s->sector = first;
    s->good = !wild;
    s->seed = harness_random(seed);
    *s->b.header = (struct virtio_blk_outhdr){ .type = s->type, .sector = first };
    *s->b.status = 0xff;
    if (wild && !random_below(seed, 3))
        s->b.header->type = (uint32_t)random_below(seed, 20);
    if (wild) /* outside of what good requests use, or outside of the device */
        s->b.header->sector = random_below(seed, 4) ? GOOD_SECTORS + random_below(seed, 2000) : harness_random(seed) << 16;
    if (s->type == VIRTIO_BLK_T_OUT)
        pattern(s->b.data, bytes, s->seed);
    if (wild && s->type > 8) { /* ranges of discards: keep off what good requests use */
        struct virtio_blk_discard_write_zeroes range = { GOOD_SECTORS + random_below(seed, 3000),
                                                         (uint32_t)random_below(seed, 3000), (uint32_t)random_below(seed, 4) };
        for (uint32_t i = 0; i < bytes / 16; i++)
            memcpy(s->b.data + 16 * i, &range, 16);
    }
    pieces[count++] = (struct piece){ driver_iova(q->d, s->b.header), 16, false };
    pieces[count++] = (struct piece){ driver_iova(q->d, s->b.data), bytes, s->type == VIRTIO_BLK_T_IN || s->type == 8 };
    pieces[count++] = (struct piece){ driver_iova(q->d, s->b.status), 1, true };
    s->b.written = bytes;
    if (!dqueue_add(q, pieces, count, s))
        return false;
    s->busy = true;
    return true;
}

static uint64_t environment(const char *name, uint64_t otherwise)
{
    return getenv(name) ? strtoull(getenv(name), NULL, 0) : otherwise;
}

/*
 * One life of the queue: first everything is in order and good requests must be right; then things are spoiled
 * while the device works; then it is stopped, by surprise or after its fault, and what is in flight ends.
 */
static void life(uint64_t *seed, struct rig *rig, struct slot *slots, uint8_t *model)
{
    struct dqueue *q = &rig->q[0];
    uint64_t orderly = random_below(seed, 60), spoiled = random_below(seed, 40), sent = 0;

    while (sent < orderly) {
        for (int i = 0; i < SLOTS; i++)
            if (!slots[i].busy && send(seed, q, &slots[i], (uint32_t)i * 8, false))
                sent++;
        dqueue_kick(q);
        struct slot *s;

        while ((s = dqueue_get(q, NULL))) {
            uint8_t *at = model + s->sector * 512;

            CHECK_EQUAL(*s->b.status, VIRTIO_BLK_S_OK);
            if (s->type == VIRTIO_BLK_T_IN)
                CHECK(!memcmp(s->b.data, at, s->b.written));
            else
                pattern(at, s->b.written, s->seed);
            s->busy = false;
        }
    }
    /* Drain, so that the model knows all: wild descriptors may do anything to the memory of good requests. */
    for (int i = 0; i < SLOTS; i++)
        while (slots[i].busy) {
            struct slot *s = dqueue_get(q, NULL);

            if (!s) {
                CHECK(dqueue_wait(q, 20000));
                continue;
            }
            CHECK_EQUAL(*s->b.status, VIRTIO_BLK_S_OK);
            if (s->type == VIRTIO_BLK_T_OUT)
                pattern(model + s->sector * 512, s->b.written, s->seed);
            else
                CHECK(!memcmp(s->b.data, model + s->sector * 512, s->b.written));
            s->busy = false;
        }
    CHECK_EQUAL(rig_stats(rig, 0).fault, VD_FAULT_NONE);
    for (uint64_t i = 0; i < spoiled; i++) {
        struct slot *s = &slots[random_below(seed, SLOTS)];

        if (!s->busy)
            send(seed, q, s, 0, true);
        for (uint64_t n = random_below(seed, 3); n; n--)
            spoil(seed, rig, q);
        if (random_below(seed, 2))
            dqueue_kick_always(q);
    }
    dqueue_kick_always(q);
    switch (random_below(seed, 4)) {
    case 0: /* by surprise */
        break;
    case 1:
        CHECK_EQUAL(vd_queue_pause(rig->engine, 0, 20000), 0);
        CHECK_EQUAL(rig_stats(rig, 0).in_flight, 0);
        CHECK_EQUAL(vd_queue_resume(rig->engine, 0), 0);
        break;
    default: {
        uint64_t until = now_ns() + 2000000;

        while (!rig_stats(rig, 0).fault && now_ns() < until)
            harness_breathe();
    }
    }
    rig_stop(rig, 0);
    CHECK_EQUAL(rig_stats(rig, 0).in_flight, 0);
    for (int i = 0; i < SLOTS; i++)
        slots[i].busy = false;
    dqueue_reset(q, (uint16_t)harness_random(seed));
    /* Wild writes can reach any sector through a spoiled header: learn the image anew. */
    image_read(rig, model, GOOD_SECTORS * 512, 0);
    CHECK_EQUAL(rig_start(rig, 0), 0);
}

static void random_driver(struct plan plan, uint64_t salt)
{
    struct rig rig;
    struct slot slots[SLOTS];
    uint8_t *model = calloc(GOOD_SECTORS, 512), *guarded;
    uint64_t seed = environment("RING_SEED", now_ns() ^ (uint64_t)getpid() << 32) ^ salt;
    uint64_t until = now_ns() + environment("RING_SECONDS", 1) * 1000000000, lives = 0;
    struct vd_region regions[REGIONS_MAX + 1];

    printf("RING_SEED=0x%llx\n", (unsigned long long)(seed ^ salt));
    fflush(stdout);
    CHECK(model);
    plan.no_start = true;
    plan.capacity = 2 * MIB;
    plan.memory = 2 * MIB;
    rig_open(&rig, plan);
    for (int i = 0; i < SLOTS; i++)
        slots[i] = (struct slot){ .b = blk_new(&rig, SLOT_BYTES) };

    /* Memory that the device may read and must never write. */
    struct driver read_only;

    driver_open(&read_only, MIB, 1, 1ull << 36, 0);
    guarded = malloc(MIB);
    CHECK(guarded);
    pattern(guarded, MIB, 77);
    memcpy(read_only.base, guarded, MIB);
    memcpy(regions, rig.driver.regions, sizeof(rig.driver.regions));
    regions[rig.driver.region_count] = read_only.regions[0];
    regions[rig.driver.region_count].writable = 0;
    CHECK_EQUAL(vd_engine_set_regions(rig.engine, regions, rig.driver.region_count + 1), 0);
    rig.driver.regions[rig.driver.region_count++] = read_only.regions[0]; /* wild addresses find it */
    CHECK_EQUAL(rig_start(&rig, 0), 0);
    while (now_ns() < until || lives < LIVES_MIN) { /* on a machine that has no time for us a second is short */
        life(&seed, &rig, slots, model);
        lives++;
    }
    CHECK(!memcmp(guarded, read_only.base, MIB));
    printf("%llu lives, %llu malformed\n", (unsigned long long)lives, (unsigned long long)rig_stats(&rig, 0).malformed);
    blk_prove(&rig, 0);
    driver_close(&read_only);
    rig_close(&rig);
    free(model);
    free(guarded);
}

BOTH(a_random_driver_breaks_nothing)
{
    random_driver((struct plan){ .size = 64, .event_idx = true, .indirect = true }, 1);
}

BOTH(a_random_driver_breaks_nothing_without_features)
{
    random_driver((struct plan){ .size = 32, .directory = "/dev/shm" }, 2);
}

BOTH(a_random_driver_with_many_regions_breaks_nothing)
{
    random_driver((struct plan){ .size = 64, .regions = 4, .iova = 0x7000, .gap = 0x3000, .indirect = true }, 3);
}
