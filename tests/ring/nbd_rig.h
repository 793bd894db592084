/* A rig whose backend is an NBD server of ours. */
#ifndef RING_NBD_RIG_H
#define RING_NBD_RIG_H

#include <errno.h>

#include "backends/nbd/wire.h"
#include "fake_nbd.h"

/* Fill in the configuration; no engine yet. */
void nbd_rig_plan(struct rig *rig, struct fake_nbd *s, struct plan plan);
/* Of what was planned: engine and queues. */
void nbd_rig_start(struct rig *rig);
void nbd_rig_open(struct rig *rig, struct fake_nbd *s, struct plan plan);

/*
 * So many rounds of random reads, writes and flushes on the first queue, many at once and never two of the same blocks; each read
 * is compared with what is to be there, and at the end the server's image is.
 */
void nbd_exercise(struct rig *rig, struct fake_nbd *s, uint32_t rounds, uint64_t seed);

/* The process that is asked for connections, if that was planned. */
extern pid_t nbd_broker;

struct vd_backend_status nbd_status(struct rig *rig);

#endif
