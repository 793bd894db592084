/*
 * Processes that serve a queue and are killed under load, at a random moment or at a random step of the in-flight log;
 * each is followed by another. The driver lives here, in their parent, and must not notice: every request ends once,
 * and what it wrote or read is right.
 */
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "harness.h"

enum { LIVES = 40, QUEUE = 128, SLOTS = 24, SLOT_BYTES = 4096, SLOT_SECTORS = SLOT_BYTES / 512, LOG_BYTES = 64 * 1024 };

struct slot {
    struct blk b;
    uint32_t type;
    uint64_t written, seed; /* what the image holds there, and what is on its way */
};

struct scene {
    const char *backend;
    char path[128];
    int image_fd;
    struct driver d;
    struct dqueue q;
    void *log;
    struct slot slots[SLOTS];
    uint64_t seed, sent, done;
    bool failing; /* what ends from now on ends with an error */
};

static uint64_t steps_left;

static void step(void)
{
    if (steps_left && !--steps_left)
        kill(getpid(), SIGKILL);
}

/* The process that serves; it ends by being killed. */
static _Noreturn void serve(struct scene *s, bool resume, uint64_t steps)
{
    struct vd_config config = { .max_queues = 1, .block_size_bytes = 512, .capacity_bytes = MIB, .event_fd = -1,
                                .serial = "", .backend = s->backend, .path = s->path };
    struct vd_queue_config queue = dqueue_config(&s->q, ALL_BLK_FEATURES);
    struct vd_engine *engine;
    int error;

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    steps_left = steps;
    harness_step = step;
    queue.resume = resume;
    queue.state = s->q.packed ? 0x80008000 : 0;
    queue.inflight = s->log;
    queue.inflight_bytes = LOG_BYTES;
    do /* the lock falls with the last request of the one before */
        error = vd_engine_new(&config, &engine);
    while (error == -EAGAIN);
    if (!error)
        error = vd_engine_set_regions(engine, s->d.regions, s->d.region_count);
    if (!error)
        error = vd_queue_start(engine, 0, &queue);
    if (error)
        _exit(-error);
    for (;;)
        pause();
}

static pid_t serve_in_child(struct scene *s, bool resume, uint64_t steps)
{
    pid_t child = fork();

    CHECK(child >= 0);
    if (!child)
        serve(s, resume, steps);
    return child;
}

static void collect(struct scene *s)
{
    bool file = !strcmp(s->backend, "file");
    uint32_t written;
    struct slot *slot;

    while ((slot = dqueue_get(&s->q, &written))) {
        /* 0xff: shown as used before it was done */
        CHECK_EQUAL(*slot->b.status, s->failing ? VIRTIO_BLK_S_IOERR : VIRTIO_BLK_S_OK);
        slot->b.done = true;
        s->done++;
        if (s->failing)
            continue;
        CHECK_EQUAL(written, slot->type == VIRTIO_BLK_T_IN ? SLOT_BYTES + 1 : 1);
        if (slot->type == VIRTIO_BLK_T_OUT)
            slot->written = slot->seed;
        else if (slot->type == VIRTIO_BLK_T_IN && file)
            CHECK(slot->written ? is_pattern(slot->b.data, SLOT_BYTES, slot->written)
                                : is_byte(slot->b.data, SLOT_BYTES, 0));
    }
}

static void send(struct scene *s)
{
    for (uint32_t i = 0; i < SLOTS; i++) {
        struct slot *slot = &s->slots[i];
        static const uint32_t types[] = { VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_FLUSH };

        if (!slot->b.done || random_below(&s->seed, 4) == 0)
            continue;
        slot->type = types[random_below(&s->seed, 4)];
        if (slot->type == VIRTIO_BLK_T_OUT) {
            slot->seed = harness_random(&s->seed) | 1;
            pattern(slot->b.data, SLOT_BYTES, slot->seed);
        } else {
            memset(slot->b.data, 0xee, SLOT_BYTES);
        }
        blk_send(&s->q, &slot->b, slot->type, i * SLOT_SECTORS, slot->type == VIRTIO_BLK_T_FLUSH ? 0 : SLOT_BYTES);
        s->sent++;
    }
}

static void expect_killed(pid_t child)
{
    int status;

    CHECK_EQUAL(waitpid(child, &status, 0), child);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL); /* and not by its own failure */
}

/* last: the backend of the process that comes at the end, to stay. */
static void killed_again_and_again(const char *backend, const char *last, bool event_idx, bool indirect)
{
    static struct scene s;
    uint64_t in_flight = 0;

    s.backend = backend;
    s.seed = getenv("RING_SEED") ? strtoull(getenv("RING_SEED"), NULL, 0) : now_ns();
    printf("RING_SEED=0x%llx\n", (unsigned long long)s.seed);
    fflush(stdout);
    s.image_fd = image_new(NULL, MIB, s.path);
    driver_open(&s.d, 4 * MIB, 1, 0x10000, 0);
    dqueue_open(&s.q, &s.d, QUEUE, harness_packed(), event_idx, indirect);
    s.log = mmap(NULL, LOG_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(s.log != MAP_FAILED);
    CHECK_EQUAL(vd_inflight_init(s.log, LOG_BYTES, QUEUE, harness_packed()), 0);
    for (uint32_t i = 0; i < SLOTS; i++) {
        s.slots[i].b = (struct blk){ .header = driver_alloc(&s.d, sizeof(struct virtio_blk_outhdr), 16),
                                     .status = driver_alloc(&s.d, 1, 1),
                                     .data = driver_alloc(&s.d, SLOT_BYTES, 4096),
                                     .done = true };
    }
    for (int life = 0; life < LIVES; life++) {
        bool by_step = life % 2;
        pid_t child = serve_in_child(&s, life > 0, by_step ? 1 + random_below(&s.seed, 400) : 0);
        uint64_t goal = s.done + random_below(&s.seed, 300), until = 0;
        siginfo_t dead = { 0 };

        /* Some time after it has begun to do something; or when it gets to its step, if there is enough to do. */
        while (!until || now_ns() < until) {
            collect(&s);
            send(&s);
            if (!until && s.done >= goal)
                until = now_ns() + (by_step ? 100000 : random_below(&s.seed, 200000));
            if (!waitid(P_PID, (id_t)child, &dead, WEXITED | WNOHANG | WNOWAIT) && dead.si_pid)
                break;
        }
        kill(child, SIGKILL);
        expect_killed(child);
        collect(&s);
        in_flight += s.sent - s.done;
    }
    CHECK(in_flight > LIVES); /* deaths came when there was something to lose */

    s.failing = strcmp(backend, last) != 0;
    s.backend = last;
    send(&s);
    CHECK(s.sent > s.done);

    pid_t child = serve_in_child(&s, true, 0);

    WAIT_FOR((collect(&s), s.done == s.sent));
    kill(child, SIGKILL);
    expect_killed(child);
    for (uint32_t i = 0; i < SLOTS && !strcmp(last, "file"); i++) {
        uint8_t image[SLOT_BYTES];

        CHECK(pread(s.image_fd, image, SLOT_BYTES, i * SLOT_BYTES) == SLOT_BYTES);
        CHECK(s.slots[i].written ? is_pattern(image, SLOT_BYTES, s.slots[i].written) : is_byte(image, SLOT_BYTES, 0));
    }
    printf("%llu requests, %llu in flight at %d deaths\n", (unsigned long long)s.done, (unsigned long long)in_flight,
           LIVES);
    dqueue_close(&s.q);
    driver_close(&s.d);
    munmap(s.log, LOG_BYTES);
    close(s.image_fd);
}

BOTH(a_killed_process_is_replaced_and_the_driver_does_not_notice)
{
    killed_again_and_again("file", "file", true, true);
}

BOTH(a_killed_process_is_replaced_with_chains_of_direct_descriptors)
{
    killed_again_and_again("file", "file", false, false);
}

BOTH(a_killed_process_is_replaced_when_requests_end_at_once)
{
    killed_again_and_again("null", "null", true, true);
}

BOTH(a_killed_process_is_followed_by_one_that_fails_all_that_is_left)
{
    killed_again_and_again("file", "error", true, true);
}
