/*
 * When a queue's thread polls instead of sleeping, and when it interrupts the driver: decisions of
 * values and times, without effects. One queue thread owns a pace.
 *
 * Polling: waking a thread costs more than most requests. A thread that found out that work came
 * soon after it went to sleep polls for a while before the next sleep; one that slept long stops
 * polling. An idle queue sleeps. There are several waits, for the driver's next request and for the
 * backend's answers, and each has a window of its own: one that pays is not closed by another that
 * does not. How long a window may become is what a wake costs here and now, a few times: the
 * processor time that is lost where it does not pay stays in proportion to what is gained where it
 * does. With many requests under way it is that once: others have work then, and need processors
 * for it. What a wake costs is measured: now and then a thread sleeps until a moment of its own
 * choice, and looks how late it is.
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

/* What a queue without work waits for: a request, one of few answers, or one of many. */
enum vd_wait { VD_WAIT_REQUEST, VD_WAIT_ANSWER, VD_WAIT_MANY, VD_WAITS };

/* That is how many. */
enum { VD_FEW_IN_FLIGHT = 2 };

struct vd_pace {
    uint32_t poll_ns[VD_WAITS]; /* poll this long before sleeping */
    enum vd_wait wait;          /* which one it is in */
    uint32_t wake_ns;           /* what a wake costs, on average; 0: not known yet */
    uint32_t sleeps;            /* since that was measured last */
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
uint64_t vd_pace_poll_until(struct vd_pace *pace, enum vd_wait wait, uint64_t now_ns);

/* Work was found, after a sleep or without. */
void vd_pace_woke(struct vd_pace *pace, bool slept, uint64_t now_ns);

/*
 * Before a sleep: 0, or for how long at most, to see what a wake costs. After that time, if nothing
 * came before: how late it was, and the sleep goes on.
 */
uint32_t vd_pace_sample_ns(struct vd_pace *pace);
void vd_pace_sampled(struct vd_pace *pace, uint64_t late_ns);

#endif
