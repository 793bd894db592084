/*
 * What one fuzzing input plays with: memory that stands for the guest's, a map of regions over it that the engine gets,
 * and a reader of the input's bytes. The engine may change nothing but what a writable region covers: world_check says
 * whether that has held since the last world_map.
 *
 * The driver's side writes through world_poke alone, so that what the engine changed can be told apart.
 */
#ifndef FUZZ_WORLD_H
#define FUZZ_WORLD_H

#include <stdio.h>
#include <stdlib.h>

#include "common.h"
#include "engine_api.h"

/* The oracles. abort is what libFuzzer takes for a finding. */
#define REQUIRE(condition)                                                                    \
    do {                                                                                      \
        if (!(condition)) {                                                                   \
            fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition);         \
            abort();                                                                          \
        }                                                                                     \
    } while (0)

enum {
    PAGE = 4096,
    RING_PAGES = 8,           /* where the rings are if they are apart from the data */
    PAGES = RING_PAGES + 12,
    MEMORY_BYTES = PAGES * PAGE,
    DATA_REGIONS_MAX = 5,
};

/* Far from all addresses that inputs can name for data. */
#define RING_IOVA (1ull << 44)

struct input {
    const uint8_t *data;
    size_t left;
};

/* Zero once the input has ended. */
uint64_t take(struct input *in, unsigned bytes);

struct world {
    int fd;
    uint8_t *memory;          /* all of it, whatever the engine has mapped */
    uint8_t *expected;        /* what is in it but for the engine's writes */
    uint8_t *may_change;
    uint64_t bytes;           /* what is left of the file */
    struct vd_region regions[DATA_REGIONS_MAX + 1];
    uint32_t region_count;
    uint32_t data_first;      /* the first region that is not for rings alone */
    bool apart;               /* no address for data reaches the rings */
    bool rings_cut;           /* they went away, if only for a moment, and what was in them with them */
};

/* Once per process; then a fresh start for each input. */
void world_open(struct world *world);
void world_reset(struct world *world, bool apart);

/* Regions as the input wants them; the caller hands them to the engine. */
void world_map(struct world *world, struct input *in);
/* Cut the file, or make it whole again, with zeros where it was cut. */
void world_resize(struct world *world, uint64_t pages);
void world_check(const struct world *world);
/* What is there now is right. */
void world_accept(struct world *world);

/* An address as the input wants it: mostly good. */
uint64_t world_address(const struct world *world, struct input *in);
/* Write as the driver; what is not mapped or not there is left out. */
void world_poke(struct world *world, uint64_t iova, const void *from, size_t length);
void world_peek(const struct world *world, uint64_t iova, void *to, size_t length);

#endif
