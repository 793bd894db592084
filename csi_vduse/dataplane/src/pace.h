/*
 * When a queue's thread polls instead of sleeping, and when it interrupts the driver: decisions of
 * values and times, without effects. One queue thread owns a pace.
 *
 * Polling: waking a thread costs more than most requests. A thread that found out that work came
 * soon after it went to sleep polls for a while before the next sleep; one that slept long stops
 * polling. An idle queue sleeps.
 *
 * Interrupts: one costs more than a request does, and it stops a driver that is busy making
 * requests. Completions are visible in the ring at once, but the interrupt for them waits for
 * company: for as many more as were worth waiting for before. How many those are is learned: a
 * little more when they came, less when they did not. The wait ends when nothing has completed for
 * a few times the usual gap, so that what a driver pays for a wait in vain is small. A driver that
 * keeps one request going has no company, and never waits.
 */
#ifndef VD_PACE_H
#define VD_PACE_H

#include "common.h"

struct vd_pace {
    uint32_t poll_ns; /* poll this long before sleeping */
    uint32_t company; /* completions beyond the first that an interrupt waits for, times 8 */
    uint32_t owed;    /* completions shown whose interrupt was not decided */
    bool more;        /* while they were, the driver had other requests going */
    uint64_t owed_since_ns, shown_ns; /* when the first and the last of them were shown */
    uint64_t gap_ns;                  /* between completions, on average, pauses left out */
    uint64_t idle_since_ns;           /* when the thread ran out of work; 0: it has some */
};

/* count completions were shown; more: the driver has other requests going. */
void vd_pace_shown(struct vd_pace *pace, uint32_t count, bool more, uint64_t now_ns);

/* Whether the interrupt for what is owed has to be decided now. */
bool vd_pace_interrupt_due(const struct vd_pace *pace, uint64_t now_ns);

/* The interrupt for all that is owed was decided; learns from how many they are. */
void vd_pace_interrupted(struct vd_pace *pace);

/* A turn found no work: until when to poll before sleeping; not later than now: not at all. */
uint64_t vd_pace_poll_until(struct vd_pace *pace, uint64_t now_ns);

/* Work was found, after a sleep or without. */
void vd_pace_woke(struct vd_pace *pace, bool slept, uint64_t now_ns);

#endif
