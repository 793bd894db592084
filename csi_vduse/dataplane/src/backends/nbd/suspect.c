/*
 * A request whose server hangs up because of it would be sent again and again, and nothing behind
 * it be done. So what waits longest for an answer is suspected when the server hangs up; from the
 * second time on it is sent alone, ever more slowly, and if it is alone to blame, it is the
 * culprit: after HANG_UPS, and not before a server that fails is taken for one that does not come
 * back.
 */
#include "exchange.h"

enum { HANG_UPS = 5 };

bool nbd_one_by_one(const struct nbd_queue *nq)
{
    return nq->suspect && nq->suspected > 1;
}

void nbd_unsuspect(struct nbd_queue *nq, const struct nbd_slot *slot)
{
    if (nq->suspect == slot)
        nq->suspect = NULL;
}

void nbd_suspect(struct nbd_queue *nq)
{
    struct nbd_slot *oldest = nq->sent.first;

    if (!nq->hung_up || !oldest)
        return;
    if (nq->suspect != oldest) {
        nq->suspect = oldest;
        nq->suspected = 0;
        nq->suspected_since_ns = now_ns();
    }
    nq->suspected++;
}

struct nbd_slot *nbd_culprit(const struct nbd_queue *nq)
{
    bool certain = nq->suspect && nq->suspected >= HANG_UPS &&
                   now_ns() - nq->suspected_since_ns >= vd_queue_away_ns(nq->queue);

    return certain ? nq->suspect : NULL;
}
