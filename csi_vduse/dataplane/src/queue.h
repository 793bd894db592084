/* What the two sides of a queue share: its thread (queue.c) and the control thread's calls (queue_control.c). */
#ifndef VD_QUEUE_H
#define VD_QUEUE_H

#include "engine.h"

enum command { RUN, PAUSE, STOP };
enum state { STARTING, RUNNING, PAUSED, STOPPED, FAILED };

/* The thread: argument is the queue. Sets RUNNING, or FAILED and ends. */
void *vd_queue_run(void *argument);

/* Call with the queue's lock held. */
void vd_queue_set_state(struct vd_queue *queue, enum state state);

/* Nothing of it is in flight, and no thread uses it but the caller. */
void vd_queue_free(struct vd_queue *queue);

#endif
