/*
 * Connections to the server: one thread of the backend makes them, as often and for as long as it
 * takes, and hands them to the queues that wait for one. Everything that may take long is here:
 * looking up names, connecting, TLS, a server that does not answer. Queue threads never wait for it
 * but in their usual sleep.
 *
 * The same thread looks at the server when the volume is to grow: with a connection that is closed
 * at once.
 *
 * A server that is not there, or is not the one that it was (too small, read-only, one connection
 * where several are needed), is asked again and again, ever more slowly; meanwhile requests wait
 * and the status says why.
 */
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "exchange.h"

enum {
    /*
     * After a loss, ours or a dead predecessor's: what the lost connection still carried shall be
     * done or dropped by the server before anything is sent again, or anything at all where it was
     * abandoned.
     */
    SETTLE_MS = 100,
    RETRY_MAX_MS = 5000,
    ATTEMPT_MS = 10000,
};

/* Whether it can serve what the driver has been told by now; 0 or -errno. */
static int check_link(struct nbd *n, const struct nbd_link *link, char reason[NBD_REASON_BYTES])
{
    struct nbd_needs needs;

    pthread_mutex_lock(&n->lock);
    needs = (struct nbd_needs){ n->needed_bytes, n->export.min_block, n->config.max_queues,
                                !n->config.read_only };
    pthread_mutex_unlock(&n->lock);
    return nbd_check_fit(&needs, &link->export, reason);
}

int nbd_connect_now(struct nbd *n, uint64_t timeout_ms, struct nbd_link *link,
                    char reason[NBD_REASON_BYTES])
{
    struct nbd_attempt attempt = { .target = &n->target,
                                   .cancel_fd = n->cancel_fd,
                                   .any_tls = &n->any_tls };
    int error = nbd_connect(&attempt, timeout_ms, link, reason);

    if (error)
        return error;
    /* not before: the volume may have grown while it connected */
    error = check_link(n, link, reason);
    if (error)
        nbd_leave(link, 0);
    return error;
}

static void set_status(struct nbd *n, enum vd_backend_state state, const char *reason)
{
    bool news = n->status.state != state || strcmp(n->status.reason, reason);
    uint64_t one = 1;

    n->status.state = state;
    snprintf(n->status.reason, sizeof(n->status.reason), "%s", reason);
    if (news && n->config.event_fd >= 0)
        (void)!write(n->config.event_fd, &one, sizeof(one));
}

/* It is there but not as it should be, and that will hardly change by itself. */
static bool is_refusal(int error)
{
    return error == -ENOENT || error == -EACCES || error == -EPROTO || error == -ENOSPC ||
           error == -EROFS || error == -EMLINK || error == -EINVAL;
}

/* For the number-th time of the same: each one takes twice as long. */
static uint64_t settled_after(uint32_t number)
{
    uint64_t ms = (uint64_t)SETTLE_MS << (number < 16 ? number : 16);

    return now_ns() + at_most(ms, RETRY_MAX_MS) * 1000000;
}

static uint64_t settled(void)
{
    return settled_after(0);
}

/*
 * End the connections of abandoned queues, whose threads may not have come to it yet; with the lock
 * held.
 */
static void end_abandoned(struct nbd *n)
{
    for (struct nbd_queue *each = n->queues; each; each = each->next_queue) {
        if (!vd_queue_is_abandoned(each->queue) || each->ended || each->link.fd < 0)
            continue;
        nbd_cut(&each->link);
        each->ended = true;
        n->settle_until_ns = settled();
    }
}

/* Whose turn it is, and when; NULL: nobody waits. With the lock held. */
static struct nbd_queue *next_in_line(struct nbd *n, uint64_t *when_ns)
{
    struct nbd_queue *next = NULL;

    end_abandoned(n);
    /* Of equals the last: it has waited longest. */
    for (struct nbd_queue *each = n->wanting; each; each = each->next_wanting)
        if (!next || each->settle_until_ns <= next->settle_until_ns)
            next = each;
    *when_ns = next && next->settle_until_ns > n->settle_until_ns ? next->settle_until_ns
                                                                  : n->settle_until_ns;
    return next;
}

static void remove_wanting(struct nbd *n, const struct nbd_queue *nq)
{
    for (struct nbd_queue **at = &n->wanting; *at; at = &(*at)->next_wanting)
        if (*at == nq) {
            *at = nq->next_wanting;
            break;
        }
}

/*
 * Give the connection to a queue that waits and may have it now: true. Or to nobody. With the lock
 * held.
 */
static bool hand_over(struct nbd *n, struct nbd_link *link)
{
    uint64_t when_ns;
    struct nbd_queue *nq = next_in_line(n, &when_ns);

    if (!nq || when_ns > now_ns()) {
        nbd_leave(link, 0);
        return false;
    }
    set_status(n, VD_BACKEND_CONNECTED, "");
    remove_wanting(n, nq);
    nq->fresh = *link;
    store_release(&nq->ready, true);
    vd_queue_wake(nq->queue);
    return true;
}

/* The server has not ended it while nobody looked. */
static bool is_whole(const struct nbd_link *link)
{
    struct pollfd polled = { .fd = link->fd, .events = POLLRDHUP };

    return poll(&polled, 1, 0) == 0;
}

/* For a queue that starts, if there may be one; with the lock held. */
static void keep(struct nbd *n, struct nbd_link *link)
{
    if (n->closing || n->spares == VD_QUEUES_MAX || link->export.size_bytes < n->needed_bytes)
        nbd_leave(link, 0);
    else
        n->spare[n->spares++] = *link;
    link->ssl = NULL;
    link->fd = -1;
}

void nbd_clear_spares(struct nbd *n, uint64_t size_bytes)
{
    uint32_t kept = 0;

    for (uint32_t i = 0; i < n->spares; i++)
        if (n->spare[i].export.size_bytes < size_bytes)
            nbd_leave(&n->spare[i], 0);
        else
            n->spare[kept++] = n->spare[i];
    n->spares = kept;
}

/* Wait until a moment, or until the backend closes; with the lock held. */
static void wait_until(struct nbd *n, uint64_t moment_ns)
{
    struct timespec until = moment(moment_ns);

    while (!n->closing && now_ns() < moment_ns)
        pthread_cond_timedwait(&n->changed, &n->lock, &until);
}

void *nbd_connector_run(void *argument)
{
    struct nbd *n = argument;
    uint64_t pause_ms = 0;

    prctl(PR_SET_NAME, "nbd-connect");
    pthread_mutex_lock(&n->lock);
    while (!n->closing) {
        char reason[NBD_REASON_BYTES];
        struct nbd_link link;
        uint64_t when_ns;
        bool wanted = next_in_line(n, &when_ns), now = wanted && when_ns <= now_ns();

        if (!wanted && !n->looking) {
            pthread_cond_wait(&n->changed, &n->lock);
            continue;
        }
        if (now && n->spares) {
            link = n->spare[--n->spares];
            if (is_whole(&link))
                hand_over(n, &link);
            else
                nbd_link_close(&link);
            continue;
        }
        if (!now && !n->looking) {
            struct timespec until = moment(when_ns);

            pthread_cond_timedwait(&n->changed, &n->lock, &until);
            continue;
        }
        /* one that is asked for from here on wants to hear what is said later */
        bool look = n->looking;

        pthread_mutex_unlock(&n->lock);
        int error = nbd_connect_now(n, ATTEMPT_MS, &link, reason);

        pthread_mutex_lock(&n->lock);
        if (n->closing) {
            if (!error)
                nbd_leave(&link, 0);
            break;
        }
        if (look && n->looking) {
            n->looking = false;
            n->look_error = error;
            pthread_cond_broadcast(&n->changed);
        }
        if (!error) {
            pause_ms = 0;
            n->export = link.export;
            n->status.connects += hand_over(n, &link);
            continue;
        }
        if (!n->wanting)
            continue;
        n->status.failures++;
        set_status(n, is_refusal(error) ? VD_BACKEND_REFUSED : VD_BACKEND_CONNECTING, reason);
        pause_ms = pause_ms ? (2 * pause_ms < RETRY_MAX_MS ? 2 * pause_ms : RETRY_MAX_MS)
                            : SETTLE_MS;
        wait_until(n, now_ns() + pause_ms * 1000000);
    }
    n->finished = true;
    pthread_cond_broadcast(&n->changed);
    pthread_mutex_unlock(&n->lock);
    return NULL;
}

void nbd_want(struct nbd_queue *nq)
{
    struct nbd *n = nq->nbd;

    pthread_mutex_lock(&n->lock);
    nq->next_wanting = n->wanting;
    n->wanting = nq;
    nq->asked = true;
    if (nq->why || vd_queue_replays(nq->queue))
        nq->settle_until_ns = settled_after(nq->suspect ? nq->suspected - 1 : 0);
    if (nq->why)
        set_status(n, VD_BACKEND_CONNECTING, nq->why);
    pthread_cond_broadcast(&n->changed);
    pthread_mutex_unlock(&n->lock);
}

bool nbd_take(struct nbd_queue *nq)
{
    bool abandoned;

    if (!load_acquire(&nq->ready))
        return false;
    pthread_mutex_lock(&nq->nbd->lock);
    /* after which nothing may be sent: end_abandoned comes once */
    abandoned = vd_queue_is_abandoned(nq->queue);
    if (!abandoned) {
        nq->link = nq->fresh;
        nq->ready = nq->asked = false;
    }
    pthread_mutex_unlock(&nq->nbd->lock);
    return !abandoned;
}

void nbd_let_go(struct nbd_queue *nq)
{
    pthread_mutex_lock(&nq->nbd->lock);
    if (vd_queue_is_abandoned(nq->queue) && nq->link.fd >= 0)
        nq->nbd->settle_until_ns = settled();
    nbd_link_close(&nq->link);
    pthread_mutex_unlock(&nq->nbd->lock);
}

void nbd_leave_behind(struct nbd_queue *nq)
{
    pthread_mutex_lock(&nq->nbd->lock);
    keep(nq->nbd, &nq->link);
    pthread_mutex_unlock(&nq->nbd->lock);
}

void nbd_want_no_more(struct nbd_queue *nq)
{
    struct nbd *n = nq->nbd;

    pthread_mutex_lock(&n->lock);
    remove_wanting(n, nq);
    if (nq->ready)
        keep(n, &nq->fresh);
    nq->ready = nq->asked = false;
    pthread_mutex_unlock(&n->lock);
}
