#include "world.h"

#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

uint64_t take(struct input *in, unsigned bytes)
{
    uint64_t value = 0;

    for (unsigned i = 0; i < bytes && in->left; i++, in->left--)
        value |= (uint64_t)*in->data++ << 8 * i;
    return value;
}

void world_open(struct world *w)
{
    memset(w, 0, sizeof(*w));
    w->fd = memfd_create("fuzz", MFD_CLOEXEC);
    REQUIRE(w->fd >= 0 && !ftruncate(w->fd, MEMORY_BYTES));
    w->memory = mmap(NULL, MEMORY_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, w->fd, 0);
    w->expected = malloc(MEMORY_BYTES);
    w->may_change = malloc(MEMORY_BYTES);
    REQUIRE(w->memory != MAP_FAILED && w->expected && w->may_change);
    w->bytes = MEMORY_BYTES;
}

void world_reset(struct world *w, bool apart)
{
    world_resize(w, PAGES);
    for (size_t i = 0; i < MEMORY_BYTES; i += 64) /* so that what should not be touched is not all zeros */
        memset(w->memory + i, i < RING_PAGES * PAGE ? 0 : (int)(i / 64), 64);
    w->apart = apart;
    w->region_count = 0;
    world_accept(w);
}

void world_map(struct world *w, struct input *in)
{
    uint32_t count = 1 + take(in, 1) % DATA_REGIONS_MAX;
    uint64_t first = w->apart ? RING_PAGES * PAGE : 0, iova = 0x10000;

    w->region_count = w->data_first = 0;
    if (w->apart) {
        w->regions[w->region_count++] = (struct vd_region){ RING_IOVA, RING_PAGES * PAGE, 0, w->fd, 1 };
        w->data_first = 1;
    }
    for (uint32_t i = 0; i < count; i++) {
        uint8_t how = (uint8_t)take(in, 1);
        uint64_t offset = first + (how & 1 ? take(in, 2) : i * 3ull * PAGE) % (MEMORY_BYTES - first);
        uint64_t size = how & 2 ? 1 + take(in, 2) : 3ull * PAGE;

        if (how & 4)
            iova += take(in, 2); /* a gap; none, and buffers may cross from one region to the next */
        if (size > MEMORY_BYTES - offset)
            size = MEMORY_BYTES - offset;
        if ((how & 0xf8) == 0xf8)
            iova = -size; /* the top of the address space */
        w->regions[w->region_count++] = (struct vd_region){ iova, size, offset, w->fd, (how & 0x18) != 0x18 };
        iova += size;
    }
    world_accept(w);
}

void world_accept(struct world *w)
{
    memcpy(w->expected, w->memory, w->bytes);
    memset(w->may_change, 0, MEMORY_BYTES);
    for (uint32_t i = 0; i < w->region_count; i++)
        if (w->regions[i].writable)
            memset(w->may_change + w->regions[i].offset, 1, w->regions[i].size);
}

void world_resize(struct world *w, uint64_t pages)
{
    uint64_t bytes = pages * PAGE;

    if (bytes == w->bytes)
        return;
    REQUIRE(!ftruncate(w->fd, (off_t)bytes));
    if (bytes > w->bytes)
        memset(w->expected + w->bytes, 0, bytes - w->bytes);
    w->bytes = bytes;
    w->rings_cut |= bytes < RING_PAGES * PAGE;
}

void world_check(const struct world *w)
{
    if (!memcmp(w->memory, w->expected, w->bytes))
        return;
    for (uint64_t i = 0; i < w->bytes; i++)
        REQUIRE(w->memory[i] == w->expected[i] || w->may_change[i]);
}

uint64_t world_address(const struct world *w, struct input *in)
{
    uint8_t how = (uint8_t)take(in, 1);
    const struct vd_region *r = &w->regions[w->data_first + (how >> 3) % (w->region_count - w->data_first)];

    switch (how & 7) {
    case 5:
        return r->iova + r->size - take(in, 1); /* over the end */
    case 6:
        return w->apart ? -take(in, 2) : take(in, 8);
    case 7:
        return w->apart ? (1ull << 40) + take(in, 2) : r->iova - take(in, 1);
    default:
        return r->iova + take(in, 2) % r->size;
    }
}

/* Where in the file an address is, and for how long it goes on there; bytes if nowhere. */
static uint64_t find(const struct world *w, uint64_t iova, uint64_t *length)
{
    for (uint32_t i = 0; i < w->region_count; i++) {
        const struct vd_region *r = &w->regions[i];

        if (iova - r->iova >= r->size)
            continue;
        uint64_t offset = r->offset + (iova - r->iova), left = r->size - (iova - r->iova);

        if (offset >= w->bytes)
            break;
        if (left > w->bytes - offset)
            left = w->bytes - offset;
        if (*length > left)
            *length = left;
        return offset;
    }
    return w->bytes;
}

void world_poke(struct world *w, uint64_t iova, const void *from, size_t length)
{
    uint64_t n = length, offset = find(w, iova, &n);

    if (offset == w->bytes)
        return;
    memcpy(w->memory + offset, from, n);
    memcpy(w->expected + offset, from, n);
}

void world_peek(const struct world *w, uint64_t iova, void *to, size_t length)
{
    uint64_t n = length, offset = find(w, iova, &n);

    memset(to, 0, length);
    if (offset != w->bytes)
        memcpy(to, w->memory + offset, n);
}
