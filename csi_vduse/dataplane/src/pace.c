/* See pace.h. The numbers were chosen by measurement: docs/performance.md. */
#include "pace.h"

enum {
    POLL_MIN_NS = 10000,
    POLL_MAX_NS = 1000000,
    WAKE_NS = 10000,   /* until that is known */
    SAMPLE_NS = 50000, /* a sleep that measures it */
    SAMPLES = 64,      /* one sleep of so many does */
    GAP_MIN_NS = 20000,
    GAP_MAX_NS = 200000,
    GAPS = 3, /* this many times the usual gap without a completion: no more will come */
    HOLD_MAX_NS = 500000,
    COMPANY_MAX = 15, /* completions beyond the first */
    ONE = 8,          /* fixed point: a completion */
    GROWTH = 2,
};

void vd_pace_shown(struct vd_pace *p, uint32_t count, bool more, uint64_t now_ns)
{
    uint64_t gap_ns = now_ns - p->shown_ns;

    if (gap_ns < GAP_MAX_NS)
        p->gap_ns = (15 * p->gap_ns + gap_ns / count) / 16;
    if (!p->owed) {
        p->owed_since_ns = now_ns;
        p->more = false;
    }
    p->more |= more || p->owed || count > 1;
    p->owed += count;
    p->shown_ns = now_ns;
}

/* When the interrupt is due, whatever has come by then. */
static uint64_t due_ns(const struct vd_pace *p)
{
    uint64_t gap_ns = GAPS * p->gap_ns, longest = p->owed_since_ns + HOLD_MAX_NS;

    gap_ns = gap_ns < GAP_MIN_NS ? GAP_MIN_NS : gap_ns > GAP_MAX_NS ? GAP_MAX_NS : gap_ns;
    return p->shown_ns + gap_ns < longest ? p->shown_ns + gap_ns : longest;
}

static bool has_company(const struct vd_pace *p)
{
    return p->owed > p->company / ONE;
}

bool vd_pace_interrupt_due(const struct vd_pace *p, uint64_t now_ns)
{
    return p->owed && (has_company(p) || now_ns >= due_ns(p));
}

void vd_pace_interrupted(struct vd_pace *p)
{
    if (!has_company(p))
        p->company -= (p->company - p->owed / 2 * ONE + 3) / 4;
    else if (p->more && p->company < COMPANY_MAX * ONE)
        p->company += GROWTH;
    p->owed = 0;
}

/*
 * How long the window of this wait may become, in wakes. Longer ones for the driver's requests gain
 * nothing at a thousand requests a second, and take the whole processor (docs/performance.md).
 */
static uint32_t poll_max_ns(const struct vd_pace *p)
{
    static const uint32_t wakes[VD_WAITS] = { 2, 4, 1 };
    uint32_t ns = wakes[p->wait] * (p->wake_ns ? p->wake_ns : WAKE_NS);

    return ns < 2 * POLL_MIN_NS ? 2 * POLL_MIN_NS : ns < POLL_MAX_NS ? ns : POLL_MAX_NS;
}

uint64_t vd_pace_poll_until(struct vd_pace *p, enum vd_wait wait, uint64_t now_ns)
{
    if (!p->idle_since_ns) {
        p->idle_since_ns = now_ns;
        p->wait = wait;
    }
    return p->owed ? due_ns(p) : p->idle_since_ns + p->poll_ns[p->wait];
}

void vd_pace_woke(struct vd_pace *p, bool slept, uint64_t now_ns)
{
    uint64_t idle_ns = now_ns - p->idle_since_ns;
    uint32_t *poll_ns = &p->poll_ns[p->wait], max_ns = poll_max_ns(p);

    p->idle_since_ns = 0;
    if (!slept)
        return;
    if (idle_ns > max_ns)
        *poll_ns = *poll_ns > 2 * POLL_MIN_NS ? *poll_ns / 2 : 0;
    else if (*poll_ns < POLL_MIN_NS)
        *poll_ns = POLL_MIN_NS;
    else
        *poll_ns = 2 * *poll_ns < max_ns ? 2 * *poll_ns : max_ns;
}

uint32_t vd_pace_sample_ns(struct vd_pace *p)
{
    if (p->wake_ns && ++p->sleeps < SAMPLES)
        return 0;
    p->sleeps = 0;
    return SAMPLE_NS;
}

void vd_pace_sampled(struct vd_pace *p, uint64_t late_ns)
{
    uint32_t ns = late_ns < POLL_MAX_NS ? (uint32_t)late_ns : POLL_MAX_NS;

    p->wake_ns = p->wake_ns ? (7 * p->wake_ns + ns) / 8 : ns ? ns : 1;
}
