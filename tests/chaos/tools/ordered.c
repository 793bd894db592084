/*
 * Ordered writes: what of them is there after a power cut tells whether flushes were respected.
 *
 *     ordered write DEVICE BYTES SEED      until the power goes; prints `flushed EPOCH` after each flush
 *     ordered check DEVICE BYTES FLUSHED   prints what it found; code 1 if that cannot be
 *
 * Blocks of 4 KiB are written in epochs: WIDTH writes in flight at once, then a flush, and only then the next epoch.
 * Write number n goes to a pseudo-random slot (BYTES / 4096 of them, a power of two) and says: its number, its own
 * slot, its predecessor's number and slot, the seed, a checksum. As many writes in a row as there are slots all go to
 * different ones, so that each of that many is still there if it ever was.
 *
 * After the cut: let N be the highest number found. Its epoch was begun, so each earlier one was flushed: from N back,
 * each write names the one before it, and all those of earlier epochs have to be there. So has epoch FLUSHED, the last
 * that the writer had told of. Nothing but zeroes and whole blocks may be anywhere, except torn ones in N's epoch.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <liburing.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { BLOCK = 4096, WIDTH = 8, WORDS = BLOCK / 8 };
enum word { MAGIC, NUMBER, SLOT, BEFORE_NUMBER, BEFORE_SLOT, SEED, FILL, SUM = WORDS - 1 };
static const uint64_t MAGIC_WORD = 0x6f72646572656421; /* "ordered!" */

static uint64_t mixed(uint64_t x)
{
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return x ^ x >> 31;
}

/* Numbers begin at 1. As slots is a power of two and the stride odd, any `slots` writes in a row differ in their slot. */
static uint64_t slot_of(uint64_t number, uint64_t slots, uint64_t seed)
{
    return ((number - 1) * (mixed(seed) | 1) + mixed(~seed)) % slots;
}

static uint64_t checksum(const uint64_t *block)
{
    uint64_t sum = 0;

    for (int i = 0; i < SUM; i++)
        sum = mixed(sum + block[i] + (uint64_t)i);
    return sum;
}

static void fill(uint64_t *block, uint64_t number, uint64_t slots, uint64_t seed)
{
    block[MAGIC] = MAGIC_WORD;
    block[NUMBER] = number;
    block[SLOT] = slot_of(number, slots, seed);
    block[BEFORE_NUMBER] = number - 1;
    block[BEFORE_SLOT] = number > 1 ? slot_of(number - 1, slots, seed) : 0;
    block[SEED] = seed;
    for (int i = FILL; i < SUM; i++)
        block[i] = mixed(number + (uint64_t)i);
    block[SUM] = checksum(block);
}

static int fail(const char *what, int error)
{
    printf("error: %s: %s\n", what, strerror(error));
    return 1;
}

static int write_until_dark(int fd, uint64_t slots, uint64_t seed)
{
    struct io_uring ring;
    uint64_t *blocks = NULL;
    int error = posix_memalign((void **)&blocks, BLOCK, WIDTH * BLOCK);

    if (error || (error = -io_uring_queue_init(WIDTH, &ring, 0)))
        return fail("starting", error);
    for (uint64_t epoch = 1;; epoch++) {
        for (uint64_t i = 0; i < WIDTH; i++) {
            uint64_t number = (epoch - 1) * WIDTH + i + 1, *block = blocks + i * WORDS;

            fill(block, number, slots, seed);
            io_uring_prep_write(io_uring_get_sqe(&ring), fd, block, BLOCK, block[SLOT] * BLOCK);
        }
        io_uring_submit(&ring);
        for (int i = 0; i < WIDTH; i++) {
            struct io_uring_cqe *cqe;

            if (io_uring_wait_cqe(&ring, &cqe) || cqe->res != BLOCK)
                return fail("writing", cqe->res < 0 ? -cqe->res : EIO);
            io_uring_cqe_seen(&ring, cqe);
        }
        if (fdatasync(fd))
            return fail("flushing", errno);
        printf("flushed %" PRIu64 "\n", epoch);
    }
}

static bool whole(const uint64_t *block, uint64_t slot, uint64_t slots)
{
    return block[MAGIC] == MAGIC_WORD && block[SUM] == checksum(block) && block[SLOT] == slot && block[NUMBER] &&
           slot_of(block[NUMBER], slots, block[SEED]) == slot && block[BEFORE_NUMBER] == block[NUMBER] - 1 &&
           (block[NUMBER] == 1 || block[BEFORE_SLOT] == slot_of(block[BEFORE_NUMBER], slots, block[SEED]));
}

static bool blank(const uint64_t *block)
{
    return !block[0] && !memcmp(block, block + 1, BLOCK - 8);
}

static int check(int fd, uint64_t slots, uint64_t flushed)
{
    uint64_t *found = calloc(slots, sizeof(*found)), *torn = calloc(slots, sizeof(*torn)), *block = NULL;
    uint64_t highest = 0, seed = 0, torn_count = 0, bad = 0;

    if (!found || !torn || posix_memalign((void **)&block, BLOCK, BLOCK))
        return fail("starting", ENOMEM);
    for (uint64_t slot = 0; slot < slots; slot++) {
        if (pread(fd, block, BLOCK, (off_t)(slot * BLOCK)) != BLOCK)
            return fail("reading", errno);
        if (whole(block, slot, slots)) {
            found[slot] = block[NUMBER];
            if (found[slot] > highest) {
                highest = found[slot];
                seed = block[SEED];
            }
        } else if (!blank(block)) {
            torn[slot] = 1;
            torn_count++;
        }
    }
    uint64_t epoch = highest ? (highest - 1) / WIDTH + 1 : 0, settled = epoch ? (epoch - 1) * WIDTH : 0;

    if (highest < flushed * WIDTH) {
        printf("lost: epoch %" PRIu64 " was flushed, and the last write found is %" PRIu64 "\n", flushed, highest);
        bad++;
    }
    if (flushed * WIDTH > settled)
        settled = flushed * WIDTH;
    for (uint64_t number = settled; number && number + slots > settled; number--) {
        uint64_t slot = slot_of(number, slots, seed);
        /* A later write may have taken the slot, if the cut hit its epoch: then it is the one found, or torn. */
        bool overwritten = found[slot] > settled || (torn[slot] && number + slots <= settled + WIDTH);

        if (found[slot] != number && !overwritten) {
            printf("missing: write %" PRIu64 " of epoch %" PRIu64 " in slot %" PRIu64 ", which has %" PRIu64 "%s\n", number,
                   (number - 1) / WIDTH + 1, slot, found[slot], torn[slot] ? " (torn)" : "");
            bad++;
        }
    }
    if (torn_count > WIDTH) {
        printf("torn: %" PRIu64 " blocks, and one epoch has only %d\n", torn_count, WIDTH);
        bad++;
    }
    printf("found %" PRIu64 " epoch %" PRIu64 " torn %" PRIu64 " bad %" PRIu64 "\n", highest, epoch, torn_count, bad);
    return bad ? 1 : 0;
}

int main(int argc, char **argv)
{
    bool writes = argc == 5 && !strcmp(argv[1], "write");
    int fd = argc == 5 ? open(argv[2], (writes ? O_RDWR : O_RDONLY) | O_DIRECT | O_CLOEXEC) : -1;
    uint64_t slots = argc == 5 ? strtoull(argv[3], NULL, 10) / BLOCK : 0, last = argc == 5 ? strtoull(argv[4], NULL, 10) : 0;

    setvbuf(stdout, NULL, _IOLBF, 0);
    if (fd < 0 || !slots || slots & (slots - 1))
        return fail("usage: ordered write|check DEVICE BYTES SEED|FLUSHED, with a power of two of BYTES", fd < 0 ? errno : EINVAL);
    return writes ? write_until_dark(fd, slots, last) : check(fd, slots, last);
}
