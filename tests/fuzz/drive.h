/*
 * What makes the engine go, in one of two ways: direct.c lets the fuzzer's own thread run the queue's turns, fast and
 * the same each time, and looks at each of them; threads.c leaves it to the queue's thread.
 */
#ifndef FUZZ_DRIVE_H
#define FUZZ_DRIVE_H

#include "queue.h"
#include "world.h"

/* Before each start of the queue, which then has this configuration. */
void drive_begin(struct world *world, const struct vd_queue_config *config);
/* After it has started. */
void drive_started(struct vd_queue *queue);
/* The driver has kicked. */
void drive_kick(struct vd_queue *queue);
/* Before a queue that serves all that is in flight is stopped, and after. */
void drive_stopping(struct vd_queue *queue);

#endif
