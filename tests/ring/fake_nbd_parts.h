/* What the files of the server of fake_nbd.h share. */
#ifndef RING_FAKE_NBD_PARTS_H
#define RING_FAKE_NBD_PARTS_H

#include "backends/nbd/wire.h"
#include "fake_nbd.h"

struct command {
    uint16_t flags, type;
    uint64_t cookie, offset, length;
    uint32_t error; /* of the disk */
};

bool fake_nbd_give(int fd, const void *from, size_t n);
/* The right answer; returns its length. */
size_t fake_nbd_answer(struct fake_nbd *s, uint8_t *to, bool structured, bool extended, const struct command *c);
/* Answer, rightly or as told; false: the connection ends. */
bool fake_nbd_reply(struct fake_nbd *s, int fd, bool structured, bool extended, const struct command *c, uint8_t *buffer);
/* What is to be done wrong with this answer; early: before the command's data are read. */
int fake_nbd_take_misdeed(struct fake_nbd *s, bool early);

#endif
