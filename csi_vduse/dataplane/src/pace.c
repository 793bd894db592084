/* See pace.h. The numbers were chosen by measurement: docs/performance.md. */
#include "pace.h"

enum {
    POLL_MIN_NS = 10000,
    POLL_MAX_NS = 200000,
    HOLD_NS = 40000,
    HOLD_MAX = 16,   /* completions */
    DEPTH_ONE = 16,  /* fixed point: a request */
};

void vd_pace_shown(struct vd_pace *p, uint32_t count, uint32_t outstanding, uint64_t now_ns)
{
    uint32_t depth = outstanding * DEPTH_ONE;

    p->depth = depth > p->depth ? depth : p->depth - (p->depth - depth) / 16;
    if (!p->owed)
        p->owed_since_ns = now_ns;
    p->owed += count;
}

bool vd_pace_interrupt_due(const struct vd_pace *p, uint64_t now_ns)
{
    uint32_t goal = p->depth / 2 / DEPTH_ONE;

    if (!p->owed)
        return false;
    return p->owed >= (goal < HOLD_MAX ? goal : HOLD_MAX) || now_ns - p->owed_since_ns >= HOLD_NS;
}

uint64_t vd_pace_poll_until(struct vd_pace *p, uint64_t now_ns)
{
    if (!p->idle_since_ns)
        p->idle_since_ns = now_ns;
    if (p->owed)
        return p->owed_since_ns + HOLD_NS;
    return p->idle_since_ns + p->poll_ns;
}

void vd_pace_woke(struct vd_pace *p, bool slept, uint64_t now_ns)
{
    uint64_t idle_ns = now_ns - p->idle_since_ns;

    p->idle_since_ns = 0;
    if (!slept)
        return;
    if (idle_ns > POLL_MAX_NS)
        p->poll_ns = p->poll_ns > 2 * POLL_MIN_NS ? p->poll_ns / 2 : 0;
    else
        p->poll_ns = p->poll_ns < POLL_MIN_NS ? POLL_MIN_NS : p->poll_ns < POLL_MAX_NS / 2 ? 2 * p->poll_ns : POLL_MAX_NS;
}
