/*
 * Connections to the server: one thread of the backend makes them, as often and for as long as it takes, and hands them to
 * the queues that wait for one. Everything that may take long is here: looking up names, connecting, TLS, a
 * server that does not answer. Queue threads never wait for it but in their usual sleep.
 *
 * The same thread looks at the server when the volume is to grow: with a connection that is closed at once.
 *
 * A server that is not there, or is not the one that it was (too small, read-only, one connection where several are
 * needed), is asked again and again, ever more slowly; meanwhile requests wait and the status says why.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "nbd.h"

enum {
    /*
     * After a loss, ours or a dead predecessor's: what the lost connection still carried shall be done or dropped by the
     * server before anything is sent again, or anything at all where it was abandoned.
     */
    SETTLE_MS = 100,
    RETRY_MAX_MS = 5000,
    ATTEMPT_MS = 10000,
};

/* Smaller ones than a sector are all the same to us. */
static uint32_t block_of(uint32_t min_block)
{
    return min_block > VD_SECTOR_BYTES ? min_block : VD_SECTOR_BYTES;
}

/* Whether an export can serve what the driver was told; 0 or -errno. */
static int check_fit(struct nbd *n, const struct nbd_export *e, char *reason)
{
    pthread_mutex_lock(&n->lock);
    uint64_t needed = n->needed_bytes;
    uint32_t block = n->export.min_block;

    pthread_mutex_unlock(&n->lock);
    if (e->size_bytes < needed) {
        snprintf(reason, NBD_REASON_BYTES, "the export has %llu bytes, the volume needs %llu",
                 (unsigned long long)e->size_bytes, (unsigned long long)needed);
        return -ENOSPC;
    }
    if (e->flags & NBD_FLAG_READ_ONLY && !n->config.read_only) {
        snprintf(reason, NBD_REASON_BYTES, "the export is read-only");
        return -EROFS;
    }
    if (!(e->flags & NBD_FLAG_MULTI_CONN) && n->config.max_queues > 1) {
        snprintf(reason, NBD_REASON_BYTES, "the server does not allow several connections (MULTI_CONN), one for each queue");
        return -EMLINK;
    }
    if (block && block_of(e->min_block) != block_of(block)) { /* what partial.c has begun counts in those */
        snprintf(reason, NBD_REASON_BYTES, "the server's blocks have %u bytes now, and had %u", e->min_block, block);
        return -EPROTO;
    }
    return 0;
}

static int connect_once(struct nbd *n, uint64_t timeout_ms, struct nbd_link *link, char reason[NBD_REASON_BYTES])
{
    uint64_t timeout_ns = timeout_ms * 1000000;
    struct nbd_stream s = { .fd = -1, .cancel_fd = n->cancel_fd, .deadline_ns = now_ns() + timeout_ns,
                            .any_tls = n->any_tls, .keys = { -1, -1, -1 } };
    int error;

    reason[0] = 0;
    error = nbd_dial(&s, &n->target, timeout_ns, reason);
    if (error)
        return error == -ECANCELED ? error : -ECONNREFUSED; /* what else the numbers say is said of an export */
    error = nbd_negotiate(&s, &n->target, &link->export, reason);
    nbd_close_keys(&s);
    if (!error)
        error = check_fit(n, &link->export, reason);
    link->fd = s.fd;
    link->ssl = s.ssl;
    link->tls = s.ssl;
    link->phase = s.phase;
    link->records = 0;
    link->kernel_tls = s.ssl && nbd_tls_uses_kernel(s.ssl);
    if (error) {
        nbd_leave(link, 0);
        return error;
    }
    /* io_uring waits for a socket that blocks, and says "again" for one that does not. */
    if (!link->ssl || nbd_tls_is_kernel(link->ssl)) {
        SSL_free(link->ssl);
        link->ssl = NULL;
        (void)fcntl(link->fd, F_SETFL, fcntl(link->fd, F_GETFL) & ~O_NONBLOCK);
    }
    return 0;
}

int nbd_connect(struct nbd *n, uint64_t timeout_ms, struct nbd_link *link, char reason[NBD_REASON_BYTES])
{
    int error = connect_once(n, timeout_ms, link, reason);

    if (error != -EPROTONOSUPPORT)
        return error;
    n->any_tls = true;
    error = connect_once(n, timeout_ms, link, reason);
    n->any_tls = !error; /* or it was for another reason */
    return error;
}

static void say(struct nbd *n, enum vd_backend_state state, const char *reason)
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
    return error == -ENOENT || error == -EACCES || error == -EPROTO || error == -ENOSPC || error == -EROFS ||
           error == -EMLINK || error == -EINVAL;
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

/* End the connections of abandoned queues, whose threads may not have come to it yet; with the lock held. */
static void end_abandoned(struct nbd *n)
{
    for (struct nbd_queue *each = n->queues; each; each = each->next_queue) {
        if (!load_relaxed(&each->queue->abandoned) || each->ended || each->link.fd < 0)
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
    for (struct nbd_queue *each = n->wanting; each; each = each->next_wanting)
        if (!next || each->settle_until_ns <= next->settle_until_ns) /* of equals the last: it has waited longest */
            next = each;
    *when_ns = next && next->settle_until_ns > n->settle_until_ns ? next->settle_until_ns : n->settle_until_ns;
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

/* Give the connection to a queue that waits and may have it now: true. Or to nobody. With the lock held. */
static bool hand_over(struct nbd *n, struct nbd_link *link)
{
    uint64_t when_ns;
    struct nbd_queue *nq = next_in_line(n, &when_ns);

    if (!nq || when_ns > now_ns()) {
        nbd_leave(link, 0);
        return false;
    }
    say(n, VD_BACKEND_CONNECTED, "");
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
        bool look = n->looking; /* one that is asked for from here on wants to hear what is said later */

        pthread_mutex_unlock(&n->lock);
        int error = nbd_connect(n, ATTEMPT_MS, &link, reason);

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
        say(n, is_refusal(error) ? VD_BACKEND_REFUSED : VD_BACKEND_CONNECTING, reason);
        pause_ms = pause_ms ? (2 * pause_ms < RETRY_MAX_MS ? 2 * pause_ms : RETRY_MAX_MS) : SETTLE_MS;
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
    if (nq->why || nq->queue->ring.replay_left)
        nq->settle_until_ns = settled_after(nq->suspect ? nq->suspected - 1 : 0);
    if (nq->why)
        say(n, VD_BACKEND_CONNECTING, nq->why);
    pthread_cond_broadcast(&n->changed);
    pthread_mutex_unlock(&n->lock);
}

bool nbd_take(struct nbd_queue *nq)
{
    bool abandoned;

    if (!load_acquire(&nq->ready))
        return false;
    pthread_mutex_lock(&nq->nbd->lock);
    abandoned = load_relaxed(&nq->queue->abandoned); /* after which nothing may be sent: end_abandoned comes once */
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
    if (load_relaxed(&nq->queue->abandoned) && nq->link.fd >= 0)
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
