/* Pace: when a queue polls and when it interrupts, as a function of what it was told. */
#include "engine.h"
#include "harness.h"

enum { US = 1000, MS = 1000 * US };

CASE(a_driver_with_one_request_is_interrupted_at_once)
{
    struct vd_pace pace = { 0 };

    for (uint64_t now = MS; now < 2 * MS; now += 10 * US) {
        vd_pace_shown(&pace, 1, 1, now);
        CHECK(vd_pace_interrupt_due(&pace, now));
        pace.owed = 0;
    }
}

CASE(a_driver_with_many_requests_gets_them_back_several_at_a_time)
{
    struct vd_pace pace = { 0 };
    uint32_t shown = 0;

    do {
        vd_pace_shown(&pace, 1, 32, MS);
        shown++;
    } while (!vd_pace_interrupt_due(&pace, MS));
    CHECK_EQUAL(shown, 16);
}

CASE(an_interrupt_is_held_for_a_bounded_time)
{
    struct vd_pace pace = { 0 };

    vd_pace_shown(&pace, 1, 32, MS);
    CHECK(!vd_pace_interrupt_due(&pace, MS));
    CHECK(vd_pace_poll_until(&pace, MS) <= MS + 100 * US); /* and until then the queue does not sleep */
    CHECK(vd_pace_interrupt_due(&pace, MS + 100 * US));
}

CASE(a_driver_that_calms_down_is_soon_interrupted_at_once_again)
{
    struct vd_pace pace = { 0 };
    uint32_t held = 0;

    vd_pace_shown(&pace, 1, 128, MS);
    pace.owed = 0;
    for (int i = 0; i < 100; i++) {
        vd_pace_shown(&pace, 1, 1, MS);
        held += !vd_pace_interrupt_due(&pace, MS);
        pace.owed = 0;
    }
    CHECK(held < 90);
    vd_pace_shown(&pace, 1, 1, MS);
    CHECK(vd_pace_interrupt_due(&pace, MS));
}

CASE(polling_grows_with_short_sleeps_and_an_idle_queue_does_not_poll)
{
    struct vd_pace pace = { 0 };
    uint64_t now = MS;

    CHECK_EQUAL(vd_pace_poll_until(&pace, now), now);
    for (int i = 0; i < 10; i++) {
        vd_pace_woke(&pace, true, now += 20 * US);
        (void)vd_pace_poll_until(&pace, now);
    }
    uint64_t budget_ns = vd_pace_poll_until(&pace, now) - now;

    CHECK(budget_ns >= 100 * US && budget_ns <= MS);
    for (int i = 0; i < 10; i++) {
        vd_pace_woke(&pace, true, now += 50 * MS);
        (void)vd_pace_poll_until(&pace, now);
    }
    CHECK_EQUAL(vd_pace_poll_until(&pace, now), now);
}
