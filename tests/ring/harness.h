/*
 * What the cases share: a list of named cases, checks that say where they failed, images, and a rig: an engine with
 * a driver and its queues. Each case runs in a process of its own, so it cleans up files and nothing else.
 */
#ifndef RING_HARNESS_H
#define RING_HARNESS_H

#include <stdio.h>
#include <stdlib.h>

#include "common.h"
#include "driver.h"

#define CHECK(condition)                                                                  \
    do {                                                                                  \
        if (!(condition)) {                                                               \
            fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition);     \
            harness_die();                                                                \
        }                                                                                 \
    } while (0)

#define CHECK_EQUAL(a, b)                                                                             \
    do {                                                                                              \
        long long left_ = (long long)(a), right_ = (long long)(b);                                    \
        if (left_ != right_) {                                                                        \
            fprintf(stderr, "%s:%d: %s is %lld, %s is %lld\n", __FILE__, __LINE__, #a, left_, #b, right_); \
            harness_die();                                                                            \
        }                                                                                             \
    } while (0)

struct ring_case {
    const char *name;
    void (*run)(void);
    bool both; /* formats: also runs with packed queues, as name/packed */
    struct ring_case *next;
};

void harness_add(struct ring_case *c);
_Noreturn void harness_die(void);
/* This machine cannot do what the case needs. */
_Noreturn void harness_skip(const char *why);
/* What is mounted from here on ends with the process; skips the case where that is not possible. */
void harness_private_mounts(void);
/* Called before the process ends, whatever happened. */
void harness_at_end(void (*undo)(void));

/* From now on the system call fails so in this thread and those that it begins. */
void harness_refuse(uint32_t call, uint32_t error);

#define CASE(name) RING_CASE(name, false)
/* A case for both formats of queues. */
#define BOTH(name) RING_CASE(name, true)
#define RING_CASE(name, both)                                                         \
    static void name(void);                                                           \
    __attribute__((constructor)) static void add_##name(void)                         \
    {                                                                                 \
        static struct ring_case this_case = { #name, name, both, NULL };                    \
        harness_add(&this_case);                                                      \
    }                                                                                 \
    static void name(void)

/* Wait for a condition to become true. */
#define WAIT_FOR(condition)                                              \
    do {                                                                 \
        uint64_t until_ = now_ns() + 20000000000ull;                     \
        while (!(condition)) {                                           \
            if (now_ns() > until_) {                                     \
                fprintf(stderr, "%s:%d: never true: %s\n", __FILE__, __LINE__, #condition); \
                harness_die();                                           \
            }                                                            \
            harness_breathe();                                           \
        }                                                                \
    } while (0)

void harness_breathe(void);

/* Called between any two stores of the in-flight log, if set. */
extern void (*harness_step)(void);
void vd_test_step(void);

/* Whether the case was asked for with packed queues. */
bool harness_packed(void);

/* xorshift64*: small, seeded, the same everywhere. */
uint64_t harness_random(uint64_t *state);
static inline uint64_t random_below(uint64_t *state, uint64_t bound)
{
    return harness_random(state) % bound;
}

enum { MIB = 1 << 20, QUEUES_MAX = 4 };

#define ALL_BLK_FEATURES (1ull << VIRTIO_BLK_F_FLUSH | 1ull << VIRTIO_BLK_F_DISCARD | 1ull << VIRTIO_BLK_F_WRITE_ZEROES)

/* What to build; zero means the usual. */
struct plan {
    const char *backend;      /* "file" */
    const char *directory;    /* of the image: TEST_DIRECTORY, or /tmp */
    uint64_t capacity;        /* 4 MiB */
    uint64_t image_bytes;     /* the capacity */
    bool read_only, event_idx, indirect, no_start;
    bool brokered;            /* NBD: connections are asked of a process beside it */
    bool no_flush, packed;    /* the format that the case was asked for */
    uint32_t away_ms;         /* 0: what fails is told at once */
    uint32_t queues;          /* 1 */
    uint16_t size;            /* 64 */
    uint64_t memory;          /* 8 MiB */
    uint32_t regions;         /* 1 */
    uint64_t iova, gap;    const char *image;      /* of the file backend; NULL: a new file */
    uint32_t block_bytes;   /* of the volume; 0: 512 */
};

struct rig {
    struct plan plan;
    char path[128];
    int image_fd;
    int event_fd;
    struct vd_config config;
    struct vd_engine *engine;
    struct driver driver;
    struct dqueue q[QUEUES_MAX];
};

void rig_open(struct rig *rig, struct plan plan);
/* Stops queues, checks that none lost a request unless it faulted, frees everything. */
void rig_close(struct rig *rig);
int rig_start(struct rig *rig, uint32_t queue);
void rig_stop(struct rig *rig, uint32_t queue);
/* How far the engine says that it is. */
uint32_t rig_state(struct rig *rig, uint32_t queue);
struct vd_queue_stats rig_stats(struct rig *rig, uint32_t queue);
/* A file of bytes in directory that goes away with the process; path has room for 128. */
int image_new(const char *directory, uint64_t bytes, char *path);

/* One request and the memory it uses. */
struct blk {
    struct virtio_blk_outhdr *header;
    uint8_t *status;
    uint8_t *data;
    uint32_t written;
    bool done;
};

struct blk blk_new(struct rig *rig, uint64_t data_bytes);
/* Send a request of the usual shape: header, data, status. */
void blk_send(struct dqueue *q, struct blk *b, uint32_t type, uint64_t sector, uint32_t length);
/* Wait until it is done; its status. */
uint8_t blk_finish(struct dqueue *q, struct blk *b);
uint8_t blk_do(struct dqueue *q, struct blk *b, uint32_t type, uint64_t sector, uint32_t length);
/* A write and a read come back right: the queue works. */
void blk_prove(struct rig *rig, uint32_t queue);

void pattern(void *to, size_t length, uint64_t seed);
bool is_pattern(const void *from, size_t length, uint64_t seed);
bool is_byte(const void *from, size_t length, uint8_t byte);
/* The image's own bytes, read past the engine. */
void image_read(const struct rig *rig, void *to, size_t length, uint64_t offset);

#endif
