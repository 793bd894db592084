/* What a queue's thread calls to count; see stats.c. */
#ifndef VD_STATS_H
#define VD_STATS_H

#include "queue.h"

/* A batch was taken from the ring: how many requests, and how many were in flight with them. */
void vd_count_batch(struct vd_queue *queue, uint32_t taken, uint32_t depth);

/* A request is good and goes to the backend. */
void vd_count_started(struct vd_queue *queue, struct vd_request *request);

/* A request has ended: error is 0 or a positive errno. */
void vd_count_finished(struct vd_queue *queue, const struct vd_request *request, int error);

/* A request is taken. */
void vd_count_taken(struct vd_queue *queue);

/* Nothing is in flight, as far as anybody is interested. */
void vd_count_none(struct vd_queue *queue);

/* Something was answered. */
void vd_count_answered(struct vd_queue *queue);

#endif
