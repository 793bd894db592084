/* A file system of one file that stalls at a word: how a backend hangs for real. Needs CAP_SYS_ADMIN. */
#ifndef RING_FUSE_IMAGE_H
#define RING_FUSE_IMAGE_H

#include <stdbool.h>
#include <stdint.h>

enum fuse_image_kind {
    FUSE_IMAGE_PLAIN,
    FUSE_IMAGE_PARALLEL,  /* no write waits for another one, and there is no page cache: as a disk is */
    FUSE_IMAGE_WRITEBACK, /* writes stay in the page cache until they are written back; no direct I/O of 512 bytes */
};

struct fuse_image {
    char path[128];
    int32_t *stall;   /* how many transfers wait at most, 0: none, and those that do are done; shared with the server */
    int32_t *stalled; /* how many wait */
    int32_t *error;   /* what everything is answered with, if not 0 */
    int32_t *cached;  /* how many writes came from the page cache */
    int32_t *syncs;   /* how many there were */
    int32_t *zeroing; /* what fallocate is answered with, 0: ENOSYS */
    uint8_t *content; /* shared too: what is on the disk */
};

/* Mount it; skips the case where that is not possible. The size is at most a few MiB. */
void fuse_image_open(struct fuse_image *image, uint64_t size);
void fuse_image_open_kind(struct fuse_image *image, uint64_t size, enum fuse_image_kind kind);
void fuse_image_stall(struct fuse_image *image, bool stall);
/* Only the next one stalls. */
void fuse_image_stall_one(struct fuse_image *image);
void fuse_image_fail(struct fuse_image *image, int error);
int32_t fuse_image_stalled(const struct fuse_image *image);

#endif
