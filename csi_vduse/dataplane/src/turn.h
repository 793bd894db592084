/* What the loop of a queue's thread does again and again; see turn.c. Only that thread calls. */
#ifndef VD_TURN_H
#define VD_TURN_H

#include "queue.h"

/* What to do now. */
enum vd_command vd_turn_command(struct vd_queue *queue);
/* First part: fetch, and let the kernel have it. Returns how much there was. */
unsigned vd_turn_begin(struct vd_queue *queue, enum vd_command command);
/* Second part: take what has completed, and tell the driver. Returns how much there was. */
unsigned vd_turn_end(struct vd_queue *queue, enum vd_command command);
/* Whether chains may be taken from the ring. */
bool vd_turn_may_fetch(const struct vd_queue *queue, enum vd_command command);
/* Whether completions wait to be taken. */
bool vd_turn_has_completions(const struct vd_queue *queue);
/* Interrupt the driver, if it wants to be. */
void vd_turn_interrupt(struct vd_queue *queue);

#endif
