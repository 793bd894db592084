/*
 * The in-flight log of a queue: shared memory that says, at whatever point the process dies, which
 * chains have been taken from the ring and not returned. Layout and rules are those of vhost-user
 * ("Inflight I/O tracking" in QEMU's docs/interop/vhost-user.rst), so that a log can travel between
 * programs.
 *
 * The log is written while the queue runs and read only when a successor takes it over. Death stops
 * a process between two instructions and loses no store that came before: so all that counts is the
 * order of stores in the program, which every store_release here keeps.
 */
#ifndef VD_INFLIGHT_H
#define VD_INFLIGHT_H

#include "common.h"
#include "engine_api.h"

struct vring_packed_desc;

enum { VD_LOG_ENTRIES_MAX = 1024 };

struct vd_log_split_state {
    uint8_t inflight;
    uint8_t padding[5];
    uint16_t next;    /* the entry that ended before this one */
    uint64_t counter; /* order of submission */
};

struct vd_log_split {
    uint64_t features;
    uint16_t version;
    uint16_t desc_num;
    uint16_t last_batch_head; /* the entry that ended last */
    uint16_t used_idx;        /* up to where entries that ended are known not to be in flight */
    struct vd_log_split_state states[]; /* by head */
};

struct vd_log_packed_state {
    uint8_t inflight;
    uint8_t padding;
    uint16_t next;    /* entry of the chain, or of the free list */
    uint16_t last;    /* entry of the chain that begins here */
    uint16_t num;     /* entries of the chain that begins here */
    uint64_t counter; /* order of submission */
    /* the rest is a copy of the descriptor, which used ones may overwrite in the ring */
    uint16_t id;
    uint16_t flags;
    uint32_t len;
    uint64_t addr;
};

/*
 * Two lists and two positions, each as it is and as it was before the batch that is being
 * published.
 */
struct vd_log_packed {
    uint64_t features;
    uint16_t version;
    uint16_t desc_num;
    union {
        struct {
            uint16_t free_head;
            uint16_t old_free_head;
        };
        uint32_t heads;
    };
    union {
        struct {
            uint16_t used_idx;
            uint16_t old_used_idx;
            uint8_t used_wrap_counter;
            uint8_t old_used_wrap_counter;
        };
        uint64_t positions;
    };
    uint8_t padding[8];
    struct vd_log_packed_state states[];
};

/*
 * A queue's view of its log. What it has to know again while it runs it keeps here, and does not
 * read from the log, which others may write to.
 */
struct vd_log {
    union {
        struct vd_log_split *split;
        struct vd_log_packed *packed;
    };
    uint64_t counter;
    uint16_t size;
    uint16_t batch_count;
    uint16_t replay_count;
    uint16_t free_head;
    /* entries that ended and have not been published, in that order */
    uint16_t batch[VD_LOG_ENTRIES_MAX];
    /* entries that a predecessor left, in order of submission */
    uint16_t replay[VD_LOG_ENTRIES_MAX];
    uint16_t next[VD_LOG_ENTRIES_MAX]; /* packed: as in states */
    uint16_t last[VD_LOG_ENTRIES_MAX];
    uint16_t entry[VD_LOG_ENTRIES_MAX]; /* packed: by id, where its chain begins */
    uint16_t id[VD_LOG_ENTRIES_MAX];    /* packed: the reverse, for those to be replayed */
};

/*
 * Take the log that config names; *log is NULL if it names none. 0, -EINVAL if it is too small, or
 * -ENOMEM.
 */
int vd_log_open(const struct vd_queue_config *config, struct vd_log **log);
void vd_log_close(struct vd_log *log);

/*
 * Begin an empty log of a queue that fetches nothing before this returns; used: index or position.
 */
void vd_log_begin(struct vd_log *log, bool packed, uint16_t used);

/* Whether it was being begun when the process died: nothing has been fetched since. */
bool vd_log_beginning(const struct vd_log *log);

/*
 * Find out what a predecessor left, where the ring's used index is `used`. Fills replay; -EINVAL if
 * this is no log of such a queue.
 */
int vd_log_recover_split(struct vd_log *log, uint16_t used);
/*
 * The same for a packed ring, which is made good where used descriptors were not shown; *used: its
 * position.
 */
int vd_log_recover_packed(struct vd_log *log, struct vring_packed_desc *ring, uint16_t *used,
                          uint16_t *taken);

/* A chain is taken from the ring. */
void vd_log_take_split(struct vd_log *log, uint16_t head);
/*
 * Packed: note each of its descriptors, beginning at entry log->free_head, which returns the next
 * entry; then take.
 */
uint16_t vd_log_note(struct vd_log *log, uint16_t entry, uint64_t addr, uint32_t len, uint16_t id,
                     uint16_t flags);
void vd_log_take_packed(struct vd_log *log, uint16_t last, uint16_t num, uint16_t id);

/* It has ended; then, around the store that shows the whole batch to the driver. */
void vd_log_push_split(struct vd_log *log, uint16_t head);
void vd_log_push_packed(struct vd_log *log, uint16_t id);
void vd_log_publish_packed(struct vd_log *log, uint16_t used, uint16_t old);
void vd_log_published_split(struct vd_log *log, uint16_t used);
void vd_log_published_packed(struct vd_log *log, uint16_t used);

/* The tests kill the process at each of these. */
#ifdef VD_TEST_STEPS
void vd_test_step(void);
#define VD_STEP() vd_test_step()
#else
#define VD_STEP() ((void)0)
#endif

#endif
