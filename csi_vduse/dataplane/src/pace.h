/*
 * When a queue's thread polls instead of sleeping, and when it interrupts the driver: decisions of values and times,
 * without effects. One queue thread owns a pace.
 *
 * Polling: waking a thread costs more than most requests. A thread that found out that work came soon after it went
 * to sleep polls for a while before the next sleep; one that slept long stops polling. An idle queue sleeps.
 *
 * Interrupts: a driver that keeps many requests going gets them back several at a time, because each interrupt costs
 * more than a request does. Completions are visible in the ring at once; only the interrupt waits: until half of what
 * the driver keeps going is done, or HOLD_NS have passed. A driver that keeps one or two going never waits.
 */
#ifndef VD_PACE_H
#define VD_PACE_H

#include "common.h"

struct vd_pace {
    uint32_t poll_ns;      /* poll this long before sleeping */
    uint32_t depth;        /* requests that the driver keeps going, times 16; falls slowly */
    uint32_t owed;         /* completions shown whose interrupt was not decided */
    uint64_t owed_since_ns;
    uint64_t idle_since_ns; /* when the thread ran out of work; 0: it has some */
};

/* count completions were shown, while the driver had outstanding requests that it did not know to be done. */
void vd_pace_shown(struct vd_pace *pace, uint32_t count, uint32_t outstanding, uint64_t now_ns);

/* Whether the interrupt for what is owed has to be decided now. */
bool vd_pace_interrupt_due(const struct vd_pace *pace, uint64_t now_ns);

/* A turn found no work: until when to poll before sleeping; not later than now: not at all. */
uint64_t vd_pace_poll_until(struct vd_pace *pace, uint64_t now_ns);

/* Work was found, after a sleep or without. */
void vd_pace_woke(struct vd_pace *pace, bool slept, uint64_t now_ns);

#endif
