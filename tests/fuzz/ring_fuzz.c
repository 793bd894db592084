/*
 * A hostile driver: the input chooses the queue's geometry and features, the memory map, and then steps: chains that
 * are almost right, descriptors and indices that are not, kicks, pauses, stops, other memory, less memory, another log.
 *
 * Built three times: FUZZ_SPLIT and FUZZ_PACKED are rings of one format; FUZZ_LOG is both, and begins with a queue that
 * takes over a log of the input's making.
 */
#include <errno.h>
#include <linux/virtio_blk.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ring.h>
#include <stddef.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "drive.h"
#include "packed.h"

/* Where packed rings begin. */
#define FIRST_PACKED (VD_WRAP | (uint32_t)VD_WRAP << 16)

enum { STEPS_MAX = 64, IMAGE_BYTES = 64 * 1024, PATIENCE_MS = 20000, PIECES_MAX = 8 };

static struct world world;
static struct vd_engine *engines[3]; /* on nothing, on an image, and on an image that is read only */
static struct vd_engine *engine;
static int kick_fd, interrupt_fd;
static struct vd_queue_config config;
static void *log_memory;
static uint16_t next_avail;          /* packed: position */

static bool is_packed(void)
{
    return config.features >> VIRTIO_F_RING_PACKED & 1;
}

static struct vd_engine *engine_open(const char *backend, const char *path, bool read_only)
{
    struct vd_config c = { .max_queues = 1, .block_size_bytes = 512, .capacity_bytes = IMAGE_BYTES, .event_fd = -1,
                           .read_only = read_only, .serial = "fuzz", .backend = backend, .path = path };
    struct vd_engine *result;

    REQUIRE(!vd_engine_new(&c, &result));
    return result;
}

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    static char paths[2][64];

    (void)argc;
    (void)argv;
    world_open(&world);
    for (int i = 0; i < 2; i++) {
        int image = memfd_create("image", MFD_CLOEXEC);

        REQUIRE(image >= 0 && !ftruncate(image, IMAGE_BYTES));
        snprintf(paths[i], sizeof(paths[i]), "/proc/self/fd/%d", image);
    }
    engines[0] = engine_open("null", "", false);
    engines[1] = engine_open("file", paths[0], false);
    engines[2] = engine_open("file", paths[1], true);
    kick_fd = eventfd(0, EFD_CLOEXEC);
    interrupt_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    REQUIRE(kick_fd >= 0 && interrupt_fd >= 0);
    return 0;
}

static void set_regions(struct input *in)
{
    world_map(&world, in);
    int error = vd_engine_set_regions(engine, world.regions, world.region_count);

    if (!error)
        return;
    world.region_count = world.data_first + 1; /* two of the same address: then the first alone */
    world_accept(&world);
    REQUIRE(!vd_engine_set_regions(engine, world.regions, world.region_count));
}

static void geometry(struct input *in)
{
    static const uint16_t sizes[] = { 1, 2, 4, 8, 16, 64, 256, 5 };
    uint8_t size = (uint8_t)take(in, 1), features = (uint8_t)take(in, 1);

    config = (struct vd_queue_config){ .kick_fd = kick_fd, .notify_fd = interrupt_fd };
    config.size = size == 0xff ? (uint32_t)take(in, 2) : sizes[size % 8];
    if (config.size > VD_QUEUE_SIZE_MAX / 4 && config.size < VD_QUEUE_SIZE_MAX)
        config.size %= 256; /* large ones only take time */
    config.features = (features & 1ull) << VIRTIO_RING_F_EVENT_IDX | (features >> 1 & 1ull) << VIRTIO_RING_F_INDIRECT_DESC |
                      (features >> 2 & 1ull) << VIRTIO_BLK_F_DISCARD | (features >> 2 & 1ull) << VIRTIO_BLK_F_WRITE_ZEROES |
                      (features >> 3 & 1ull) << VIRTIO_BLK_F_FLUSH;
#if defined(FUZZ_PACKED)
    config.features |= 1ull << VIRTIO_F_RING_PACKED;
#elif defined(FUZZ_LOG)
    config.features |= (features >> 4 & 1ull) << VIRTIO_F_RING_PACKED;
#endif
}

static void place_rings(struct input *in)
{
    if (world.apart) {
        config.desc_iova = RING_IOVA;
        config.driver_iova = RING_IOVA + 4 * PAGE;
        config.device_iova = RING_IOVA + 5 * PAGE;
        return;
    }
    uint64_t keep = take(in, 1) ? ~15ull : ~0ull; /* or misaligned */

    config.desc_iova = world_address(&world, in) & keep;
    config.driver_iova = world_address(&world, in) & keep;
    config.device_iova = world_address(&world, in) & keep;
}

/* A log of exactly the right size, so that the sanitizer sees what goes beyond. */
static void make_log(void)
{
    config.inflight_bytes = vd_inflight_bytes(config.size, is_packed());
    if (posix_memalign(&log_memory, 64, config.inflight_bytes))
        abort();
    memset(log_memory, 0, config.inflight_bytes);
    config.inflight = log_memory;
    if (config.size && config.size <= VD_QUEUE_SIZE_MAX)
        REQUIRE(!vd_inflight_init(log_memory, config.inflight_bytes, config.size, is_packed()));
}

static void spoil_log(struct input *in)
{
    static const uint8_t widths[] = { 1, 2, 4, 8 };
    uint8_t how = (uint8_t)take(in, 1), width = widths[how & 3];
    uint64_t bytes = config.inflight_bytes, value;
    uint64_t offset = how & 4 ? take(in, 1) % 32 : take(in, 2) % bytes; /* mostly in the head */

    value = take(in, width);
    if (offset + width <= bytes)
        memcpy((uint8_t *)log_memory + offset, &value, width);
}

static struct vd_queue *queue(void)
{
    return engine->queues[0];
}

static void start(struct input *in, bool resume)
{
    uint8_t how = (uint8_t)take(in, 1);

    if (queue())
        return;
    config.resume = resume || how & 1;
    if (how & 2)
        config.state = (uint32_t)take(in, 4);
    else if (vd_queue_state(engine, 0, &config.state) || how & 4)
        config.state = is_packed() ? FIRST_PACKED : 0;
    drive_begin(&world, &config);
    if (!vd_queue_start(engine, 0, &config)) {
        next_avail = queue()->ring.next_avail;
        drive_started(queue());
    }
}

static void stop(void)
{
    if (!queue())
        return;
    drive_stopping(queue());
    REQUIRE(!vd_queue_stop(engine, 0, PATIENCE_MS));
    REQUIRE(!load_relaxed(&engine->stats[0].of.in_flight));
}

static void put_desc(uint64_t table, uint32_t index, uint64_t iova, uint32_t length, uint16_t flags, uint16_t next)
{
    struct vring_desc split = { iova, length, flags, next };
    struct vring_packed_desc packed = { iova, length, next, flags };

    world_poke(&world, table + 16ull * index, is_packed() ? (void *)&packed : &split, 16);
}

/* Make the chain at head available; packed: it has been since its first descriptor's flags were right. */
static void show(uint16_t head)
{
    uint16_t idx = (uint16_t)(next_avail + 1);

    if (is_packed() || !config.size)
        return;
    world_poke(&world, config.driver_iova + 4 + 2ull * (next_avail % config.size), &head, 2);
    world_poke(&world, config.driver_iova + 2, &idx, 2);
    next_avail = idx;
}

struct piece {
    uint64_t iova;
    uint32_t length;
    uint16_t flags;
};

static void place_chain(struct input *in, const struct piece *pieces, uint32_t count, uint16_t head, bool indirect)
{
    uint64_t table = indirect ? world_address(&world, in) & ~15ull : config.desc_iova;

    for (uint32_t i = 0; i < count; i++) {
        uint16_t flags = pieces[i].flags | (i + 1 < count ? VRING_DESC_F_NEXT : 0);

        if (indirect || !is_packed()) {
            uint32_t at = indirect ? i : (head + i) % config.size;

            put_desc(table, at, pieces[i].iova, pieces[i].length, flags,
                     (uint16_t)(indirect ? i + 1 : (head + i + 1) % config.size));
            continue;
        }
        put_desc(table, packed_index(next_avail), pieces[i].iova, pieces[i].length,
                 flags | packed_avail_flags(next_avail), head);
        next_avail = packed_moved(next_avail, 1, (uint16_t)config.size);
    }
    if (indirect && is_packed()) {
        put_desc(config.desc_iova, packed_index(next_avail), table, 16 * count,
                 VRING_DESC_F_INDIRECT | packed_avail_flags(next_avail), head);
        next_avail = packed_moved(next_avail, 1, (uint16_t)config.size);
    } else if (indirect) {
        put_desc(config.desc_iova, head, table, 16 * count, VRING_DESC_F_INDIRECT, 0);
    }
    show(head);
}

/* A request as a driver would make it, but for what the input has it get wrong. */
static void request(struct input *in)
{
    static const uint32_t types[] = { VIRTIO_BLK_T_IN,      VIRTIO_BLK_T_OUT,    VIRTIO_BLK_T_FLUSH,
                                      VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_WRITE_ZEROES };
    uint8_t type = (uint8_t)take(in, 1), shape = (uint8_t)take(in, 1);
    struct virtio_blk_outhdr header = { .type = type < 0xf0 ? types[type % 6] : (uint32_t)take(in, 4) };
    uint64_t at = world_address(&world, in), sector = take(in, 1);
    struct piece pieces[PIECES_MAX];
    bool reads = header.type == VIRTIO_BLK_T_IN || header.type == VIRTIO_BLK_T_GET_ID;
    uint32_t count = 0, head = (uint32_t)take(in, 1) % config.size;

    header.sector = sector == 0xff ? take(in, 8) : sector;
    world_poke(&world, at, &header, sizeof(header));
    if (shape & 1) /* a header in two pieces */
        pieces[count++] = (struct piece){ at, 5, 0 };
    pieces[count] = (struct piece){ at + (count ? 5 : 0), count ? 11 : 16, 0 };
    count++;
    for (uint32_t i = 0; i < (shape >> 1 & 3u); i++) {
        uint64_t data = world_address(&world, in);
        uint32_t length = (uint32_t)take(in, 1);

        if (header.type == VIRTIO_BLK_T_DISCARD || header.type == VIRTIO_BLK_T_WRITE_ZEROES) {
            struct virtio_blk_discard_write_zeroes segment = { .sector = take(in, 1), .num_sectors = length,
                                                               .flags = (uint32_t)take(in, 1) & 3 };

            world_poke(&world, data, &segment, sizeof(segment));
            length = shape & 8 ? length : sizeof(segment);
        } else {
            length = length & 0x80 ? length : length * 512;
        }
        pieces[count++] = (struct piece){ data, length, reads ? VRING_DESC_F_WRITE : 0 };
    }
    if (!(shape & 0x10))
        pieces[count++] = (struct piece){ world_address(&world, in), 1, VRING_DESC_F_WRITE };
    place_chain(in, pieces, count, (uint16_t)head, shape & 0x20);
}

/* What a descriptor or an index is, is up to the input. */
static void raw(struct input *in)
{
    uint16_t index = (uint16_t)take(in, 2), flags;
    uint8_t how = (uint8_t)take(in, 1);
    uint64_t value = take(in, how & 1 ? 2 : 1);

    switch (how >> 1 & 7) {
    case 0: /* a descriptor; packed: where the next one is expected, or anywhere */
        flags = (uint16_t)take(in, 2);
        if (is_packed() && how & 0x10) {
            index = packed_index(next_avail);
            flags = (uint16_t)((flags & ~(VD_AVAIL | VD_USED)) | packed_avail_flags(next_avail));
            next_avail = packed_moved(next_avail, 1, (uint16_t)config.size);
        }
        put_desc(config.desc_iova, index % config.size, world_address(&world, in), (uint32_t)value, flags,
                 (uint16_t)take(in, 2));
        break;
    case 1: /* an entry of the avail ring, or the field of an event structure */
        world_poke(&world, config.driver_iova + 4 + 2ull * (index % config.size), &value, 2);
        break;
    case 2: /* flags and index; packed: the event structure */
        world_poke(&world, config.driver_iova + (how >> 3 & 2u), &value, 2);
        next_avail = is_packed() ? next_avail : (uint16_t)value;
        break;
    case 3:
        next_avail = (uint16_t)(next_avail + (int8_t)value);
        if (is_packed())
            next_avail = (uint16_t)(packed_index(next_avail) % config.size | (value & 0x100) << 7);
        else
            world_poke(&world, config.driver_iova + 2, &next_avail, 2);
        break;
    case 4: /* used_event */
        world_poke(&world, config.driver_iova + 4 + 2ull * config.size, &value, 2);
        break;
    case 5:
        show((uint16_t)value);
        break;
    default: /* anything else */
        world_poke(&world, world_address(&world, in), &value, 2);
    }
}

static void pause_and(struct input *in, void (*change)(struct input *))
{
    REQUIRE(!vd_queue_pause(engine, 0, PATIENCE_MS));
    world_check(&world);
    if (change)
        change(in);
    REQUIRE(!vd_queue_resume(engine, 0));
}

static void step(struct input *in)
{
    struct vd_limits limits = { 0 };

    switch (take(in, 1) % 16) {
    default:
        request(in);
        break;
    case 1:
    case 2:
    case 3:
        raw(in);
        break;
    case 4:
    case 5:
        if (queue())
            drive_kick(queue());
        break;
    case 6:
        pause_and(in, NULL);
        break;
    case 7:
        pause_and(in, set_regions);
        break;
    case 8:
        stop();
        break;
    case 9:
        start(in, false);
        break;
    case 10:
        world_resize(&world, take(in, 1) % (PAGES + 1));
        break;
    case 11:
        (void)vd_engine_set_capacity(engine, take(in, 1) * 1024);
        break;
    case 12:
        limits = (struct vd_limits){ take(in, 1), take(in, 2), (uint32_t)take(in, 1) };
        vd_engine_set_limits(engine, &limits);
        break;
    case 13:
        if (log_memory)
            spoil_log(in);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const struct vd_limits no_limits;
    struct input in = { data, size };
    uint8_t how = (uint8_t)take(&in, 1);
    bool resume = false;

    engine = engines[how & 0xc ? 0 : (how & 3) % 3];
    world_reset(&world, how & 0x10);
    set_regions(&in);
    geometry(&in);
    place_rings(&in);
    log_memory = NULL;
#if defined(FUZZ_LOG)
    make_log();
    for (int i = (int)take(&in, 1) % 32; i > 0; i--)
        spoil_log(&in);
    resume = true;
#else
    if (how & 0x20)
        make_log();
#endif
    engine->state[0] = is_packed() ? FIRST_PACKED : 0;
    memset(&engine->stats[0], 0, sizeof(engine->stats[0]));
    vd_engine_set_limits(engine, &no_limits);
    (void)vd_engine_set_capacity(engine, IMAGE_BYTES);
    if (config.size) {
        start(&in, resume);
        for (int i = 0; in.left && i < STEPS_MAX; i++)
            step(&in);
        if (queue())
            drive_kick(queue());
    }
    stop();
    world_check(&world);
    free(log_memory);
    return 0;
}
