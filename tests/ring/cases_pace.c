/* Pace: when a queue polls and when it interrupts, as a function of what it was told. */
#include "queue.h"
#include "harness.h"

enum { US = 1000, MS = 1000 * US };

/* Have it learn that waiting pays: completions come one after the other, gap_ns apart, as long as it waits. */
static uint64_t learn(struct vd_pace *pace, uint64_t gap_ns)
{
    uint64_t now = MS;

    for (int i = 0; i < 2000 || pace->owed; i++) {
        vd_pace_shown(pace, 1, true, now += gap_ns);
        if (vd_pace_interrupt_due(pace, now))
            vd_pace_interrupted(pace);
    }
    return now;
}

CASE(a_driver_with_one_request_is_interrupted_at_once)
{
    struct vd_pace pace = { 0 };

    for (uint64_t now = MS; now < 2 * MS; now += 10 * US) {
        vd_pace_shown(&pace, 1, false, now);
        CHECK(vd_pace_interrupt_due(&pace, now));
        vd_pace_interrupted(&pace);
    }
}

CASE(a_driver_with_many_requests_gets_them_back_several_at_a_time)
{
    struct vd_pace pace = { 0 };
    uint64_t now = learn(&pace, 5 * US);
    uint32_t shown = 0;

    do {
        vd_pace_shown(&pace, 1, true, now += 5 * US);
        shown++;
    } while (!vd_pace_interrupt_due(&pace, now));
    CHECK_EQUAL(shown, 16);
}

CASE(an_interrupt_waits_a_few_gaps_for_company_that_does_not_come)
{
    for (uint64_t gap = 10 * US; gap <= 60 * US; gap += 10 * US) {
        struct vd_pace pace = { 0 };
        uint64_t now = learn(&pace, gap) + gap;

        vd_pace_shown(&pace, 1, true, now);
        CHECK(!vd_pace_interrupt_due(&pace, now + 2 * gap));
        CHECK(vd_pace_interrupt_due(&pace, now + 5 * gap));
        CHECK(vd_pace_poll_until(&pace, VD_WAIT_REQUEST, now) <= now + 5 * gap); /* and until then the queue does not sleep */
    }
}

CASE(an_interrupt_is_held_for_a_bounded_time)
{
    struct vd_pace pace = { 0 };
    uint64_t now = learn(&pace, 100 * US), first = now + 100 * US;

    pace.company = 1000000;
    do {
        vd_pace_shown(&pace, 1, true, now += 100 * US);
    } while (!vd_pace_interrupt_due(&pace, now));
    CHECK(now - first <= 500 * US);
}

CASE(a_driver_that_calms_down_is_soon_interrupted_at_once_again)
{
    struct vd_pace pace = { 0 };
    uint64_t now = learn(&pace, 5 * US);
    uint32_t held = 0;

    for (int i = 0; i < 100; i++) {
        vd_pace_shown(&pace, 1, false, now += 500 * US);
        held += !vd_pace_interrupt_due(&pace, now);
        vd_pace_interrupted(&pace);
    }
    CHECK(held <= 16);
    vd_pace_shown(&pace, 1, false, now += 500 * US);
    CHECK(vd_pace_interrupt_due(&pace, now));
}

/* It polls in vain or sleeps: as long as that takes. */
static void idle(struct vd_pace *pace, enum vd_wait wait, uint64_t *now, uint64_t for_ns)
{
    bool slept = vd_pace_poll_until(pace, wait, *now) < *now + for_ns;

    vd_pace_woke(pace, slept, *now += for_ns);
}

static uint64_t window(struct vd_pace *pace, enum vd_wait wait, uint64_t now)
{
    uint64_t until = vd_pace_poll_until(pace, wait, now);

    vd_pace_woke(pace, false, now);
    return until - now;
}

CASE(polling_grows_with_short_sleeps_and_an_idle_queue_does_not_poll)
{
    struct vd_pace pace = { .wake_ns = 100 * US };
    uint64_t now = MS;

    CHECK_EQUAL(window(&pace, VD_WAIT_REQUEST, now), 0);
    for (int i = 0; i < 10; i++)
        idle(&pace, VD_WAIT_REQUEST, &now, 150 * US);
    CHECK(window(&pace, VD_WAIT_REQUEST, now) >= 150 * US);
    for (int i = 0; i < 10; i++)
        idle(&pace, VD_WAIT_REQUEST, &now, 50 * MS);
    CHECK_EQUAL(window(&pace, VD_WAIT_REQUEST, now), 0);
}

CASE(a_wait_that_does_not_pay_closes_no_window_of_one_that_does)
{
    struct vd_pace pace = { .wake_ns = 50 * US };
    uint64_t now = MS;

    for (int i = 0; i < 20; i++) {
        idle(&pace, VD_WAIT_REQUEST, &now, 5 * MS);
        idle(&pace, VD_WAIT_ANSWER, &now, 150 * US);
    }
    CHECK_EQUAL(window(&pace, VD_WAIT_REQUEST, now), 0);
    CHECK(window(&pace, VD_WAIT_ANSWER, now) >= 150 * US);
}

CASE(the_longest_window_is_what_wakes_cost_a_few_times)
{
    static const uint64_t costs[] = { 5 * US, 20 * US, 150 * US, 100 * MS };

    for (size_t i = 0; i < sizeof(costs) / sizeof(costs[0]); i++) {
        struct vd_pace pace = { 0 };
        uint64_t now = MS, longest = 0;

        for (int k = 0; k < 1000; k++) {
            uint64_t most = window(&pace, VD_WAIT_ANSWER, now);

            longest = k > 500 && most > longest ? most : longest;
            if (vd_pace_sample_ns(&pace))
                vd_pace_sampled(&pace, costs[i]);
            idle(&pace, VD_WAIT_ANSWER, &now, most + US);
        }
        CHECK(longest <= 4 * costs[i] || longest <= 20 * US);
        CHECK(longest >= 3 * costs[i] || longest == MS);
    }
}

CASE(with_many_requests_under_way_polling_is_shorter)
{
    struct vd_pace pace = { .wake_ns = 50 * US };
    uint64_t now = MS;

    for (int i = 0; i < 100; i++)
        idle(&pace, VD_WAIT_MANY, &now, 40 * US);
    CHECK(window(&pace, VD_WAIT_MANY, now) <= 50 * US);
    CHECK(window(&pace, VD_WAIT_MANY, now) >= 40 * US);
}

CASE(what_a_wake_costs_is_looked_at_seldom)
{
    struct vd_pace pace = { 0 };
    int samples = 0;

    for (int i = 0; i < 6400; i++) {
        if (!vd_pace_sample_ns(&pace))
            continue;
        samples++;
        vd_pace_sampled(&pace, 30 * US);
    }
    CHECK(samples > 50 && samples <= 101);
}
