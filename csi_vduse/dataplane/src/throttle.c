/*
 * Throttle: a generic cell rate algorithm for each resource, shared by an engine's queues without a
 * lock.
 *
 * For each resource there is one moment, free_ns: when everything that has been granted will be
 * paid for at the configured rate. A request adds its cost to it, by compare-and-swap, and in that
 * one step learns when it may start: burst_ns before the moment that it found. So queues are served
 * in the order in which they asked, none of them starves whatever it sends, and a request larger
 * than any burst waits its turn and passes like another. That a sleeper wakes late costs nothing,
 * as long as it is less than the burst: the moment does not move for it.
 *
 * A request that has to wait is held by its queue (turn.c), one at most, with its tokens taken;
 * all others stay in the driver's ring. A change of limits forgives all debts, and held requests
 * ask again.
 *
 * FLUSH passes free; DISCARD and WRITE_ZEROES are one request without bytes. What the engine
 * answers itself (GET_ID, errors) never comes here.
 *
 * Runs on queue threads, but for vd_throttle_set. Numbers of an old and a new limit may be seen
 * mixed for one request, which then waits a little wrongly.
 */
#include "throttle.h"

/*
 * No single debt is longer: sums cannot overflow, and a limit that is lifted later is not forgotten
 * behind it.
 */
#define DEBT_MAX_NS (24ull * 3600 * 1000000000)

enum { PRICE_SHIFT = 32 };

static uint64_t price_of(uint64_t per_second)
{
    return per_second ? (1000000000ull << PRICE_SHIFT) / per_second : 0;
}

void vd_throttle_set(struct vd_throttle *t, const struct vd_limits *limits)
{
    store_relaxed(&t->price[VD_REQUESTS], price_of(limits->requests_per_s));
    store_relaxed(&t->price[VD_BYTES], price_of(limits->bytes_per_s));
    store_relaxed(&t->burst_ns, (uint64_t)limits->burst_ms * 1000000);
    for (int i = 0; i < VD_RESOURCES; i++)
        store_relaxed(&t->free_ns[i], 0);
    store_relaxed(&t->enabled, limits->requests_per_s || limits->bytes_per_s);
    /*
     * Pairs with the acquire in vd_throttle_generation: who sees the new generation sees the new
     * limits.
     */
    store_release(&t->generation, t->generation + 1);
}

/* Pay for units of a resource; returns when the buyer may start. */
static uint64_t buy(struct vd_throttle *t, enum vd_resource resource, uint64_t units, uint64_t now)
{
    uint64_t price = load_relaxed(&t->price[resource]), burst = load_relaxed(&t->burst_ns);
    uint64_t before = load_relaxed(&t->free_ns[resource]), from, after;
    unsigned __int128 cost = (unsigned __int128)units * price >> PRICE_SHIFT;

    if (!cost)
        return now;
    do {
        from = before > now ? before : now;
        after = cost < DEBT_MAX_NS ? from + (uint64_t)cost : from + DEBT_MAX_NS;
        if (after > now + burst + DEBT_MAX_NS)
            after = now + burst + DEBT_MAX_NS;
    } while (!__atomic_compare_exchange_n(&t->free_ns[resource], &before, after, true,
                                          __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return from > now + burst ? from - burst : now;
}

uint64_t vd_throttle_start(struct vd_throttle *t, enum vd_operation operation, uint64_t bytes,
                           uint64_t now)
{
    bool moves = operation == VD_READ || operation == VD_WRITE;
    uint64_t by_requests, by_bytes;

    if (operation == VD_FLUSH)
        return now;
    by_requests = buy(t, VD_REQUESTS, 1, now);
    by_bytes = buy(t, VD_BYTES, moves ? bytes : 0, now);
    return by_requests > by_bytes ? by_requests : by_bytes;
}
