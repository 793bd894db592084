/*
 * A queue's connection in use. The queue's thread runs all of it.
 *
 *   DOWN      no connection: the connector was asked for one, requests wait
 *   UP        commands are sent and answered; answered only, if the volume has become larger than its server said, or if
 *             enough has been encrypted with the connection's keys
 *   CLOSING   lost: shut down, and closed as soon as the kernel has let go of our buffers
 *
 * Kept true: a request that was taken from the driver is in one of the lists, waiting or sent, until it is answered.
 * After a loss all that was sent waits again, in the order in which it was sent first, in front of what has not been sent. Reads,
 * writes, zeroes and discards may be done twice; what was not answered has no order towards each other, and a FLUSH covers
 * only what was answered before it came, so the order of sending is enough.
 *
 * A request whose server hangs up because of it would be sent again and again, and nothing behind it be done. So what waits longest
 * for an answer is suspected when the server hangs up; from the second time on it is sent alone, ever more slowly, and if it is
 * alone to blame, it fails: after HANG_UPS, and not before a server that fails is taken for one that does not come back.
 */
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/socket.h>

#include "nbd.h"
#include "secure.h"

enum { HANG_UPS = 5 };

int nbd_queue_open(struct vd_queue *q)
{
    struct nbd_queue *nq = NULL;

    if (posix_memalign((void **)&nq, 64, sizeof(*nq)))
        return -ENOMEM;
    memset(nq, 0, sizeof(*nq));
    q->backend = nq;
    nq->nbd = q->engine->backend;
    nq->queue = q;
    nq->link.fd = -1;
    nq->slots = calloc(q->config.size, sizeof(*nq->slots));
    nq->send_iov = calloc(NBD_IOV_MAX, sizeof(*nq->send_iov));
    nq->receive_iov = calloc(NBD_IOV_MAX, sizeof(*nq->receive_iov));
    nq->spill = malloc(NBD_SPILL_BYTES + NBD_HEADER_MAX);
    nq->tls_buffer = malloc(NBD_TLS_BYTES);
    nq->block = malloc(NBD_BLOCK_MAX);
    nbd_register(nq);
    if (nq->block && nq->slots && nq->send_iov && nq->receive_iov && nq->spill && nq->tls_buffer) {
        nbd_want(nq);
        return 0;
    }
    nbd_queue_close(q);
    return -ENOMEM;
}

static bool is_busy(const struct nbd_queue *nq)
{
    return nq->sending || nq->receiving || nq->watching;
}

/* Nothing is under way on its connection, and nothing was left half done: another queue can go on with it. */
static bool is_idle(const struct nbd_queue *nq)
{
    return nq->state == NBD_UP && !load_relaxed(&nq->queue->abandoned) && !nq->sent.first && !nq->sending && !nq->receiving &&
           !nq->in_payload && !nq->header_have && nq->send_first == nq->send_count && nq->tls_sent == nq->tls_have;
}

static void stop_watching(struct nbd_queue *nq)
{
    struct io_uring_sqe *sqe;

    if (!nq->watching)
        return;
    sqe = vd_queue_sqe(nq->queue, NULL);
    io_uring_prep_cancel(sqe, nbd_tag(nq, NBD_WATCH), 0);
    io_uring_sqe_set_data(sqe, NULL);
}

void nbd_queue_close(struct vd_queue *q)
{
    struct nbd_queue *nq = q->backend;

    nbd_want_no_more(nq);
    if (is_idle(nq))
        stop_watching(nq);
    else if (nq->link.fd >= 0 && nq->state == NBD_UP)
        nbd_cut(&nq->link);
    while (is_busy(nq)) {
        struct io_uring_cqe *cqe;
        unsigned head, n = 0;

        io_uring_submit_and_wait(&q->uring, 1);
        io_uring_for_each_cqe(&q->uring, head, cqe) {
            n++;
            if (vd_event_is_backends(io_uring_cqe_get_data(cqe)))
                nbd_event(q, io_uring_cqe_get_data(cqe), cqe->res);
        }
        io_uring_cq_advance(&q->uring, n);
    }
    if (is_idle(nq))
        nbd_leave_behind(nq);
    nbd_let_go(nq);
    nbd_unregister(nq);
    store_relaxed(&q->stats->remote.connected, 0);
    free(nq->slots);
    free(nq->send_iov);
    free(nq->receive_iov);
    free(nq->spill);
    free(nq->tls_buffer);
    free(nq->block);
    free(nq);
    q->backend = NULL;
}

void nbd_lost(struct nbd_queue *nq, const char *why)
{
    if (nq->state != NBD_UP)
        return;
    nq->state = NBD_CLOSING;
    nq->broken = true;
    nq->why = why;
    if (why) {
        nbd_cut(&nq->link);
        return;
    }
    nbd_say_goodbye(&nq->link);
    (void)shutdown(nq->link.fd, SHUT_RDWR); /* what waits for the server has nothing to wait for */
}

void nbd_broke(struct nbd_queue *nq, int result)
{
    const char *why = result == -EFAULT      ? "the driver's memory is gone"
                      : result == -ETIMEDOUT ? "the server does not answer any more"
                                             : "the server closed the connection";
    bool closed = !result || result == -ECONNRESET || result == -EPIPE;

    if (nq->state == NBD_UP && nq->link.tls && !nq->link.ssl && (result == -EIO || result == -EKEYEXPIRED))
        why = nbd_tls_interruption(nq->link.fd, &closed);
    if (result == -EFAULT) /* there is no end of sending again what is not there */
        vd_queue_fault(nq->queue, VD_FAULT_MEMORY);
    if (nq->state == NBD_UP)
        nq->hung_up = closed;
    nbd_lost(nq, why);
}

void nbd_misunderstood(struct nbd_queue *nq, int error)
{
    if (nq->state == NBD_UP)
        nq->hung_up = error != -ESHUTDOWN;
    nbd_lost(nq, error == -ESHUTDOWN ? "the server is shutting down" : "the server broke the protocol");
}

bool nbd_one_by_one(const struct nbd_queue *nq)
{
    return nq->suspect && nq->suspected > 1;
}

void nbd_unsuspect(struct nbd_queue *nq, const struct nbd_slot *slot)
{
    if (nq->suspect == slot)
        nq->suspect = NULL;
}

/* The server hung up: of whose command? */
static void suspect(struct nbd_queue *nq)
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

/* Everything that was sent is to be sent again, first and in the same order. */
static void take_back(struct nbd_queue *nq)
{
    uint64_t resent = 0;

    while (nq->sent.last) {
        struct nbd_slot *slot = nq->sent.last;

        nbd_remove(&nq->sent, slot);
        slot->sent = false;
        slot->prev = NULL;
        slot->next = nq->waiting.first;
        if (slot->next)
            slot->next->prev = slot;
        else
            nq->waiting.last = slot;
        nq->waiting.first = slot;
        resent++;
    }
    count_up(&nq->queue->stats->remote.resent, resent);
}

static void close_lost(struct nbd_queue *nq)
{
    nbd_let_go(nq);
    suspect(nq);
    take_back(nq);
    nq->state = NBD_DOWN;
    nq->broken = nq->hung_up = false;
    store_relaxed(&nq->queue->stats->remote.connected, 0);
    count_up(&nq->queue->stats->remote.losses, nq->why != NULL);
}

/* The suspect has had its chances. */
static void convict(struct nbd_queue *nq)
{
    struct nbd_slot *slot = nq->suspect;
    uint64_t away_ns = (uint64_t)nq->queue->engine->config.away_ms * 1000000;

    if (!slot || nq->suspected < HANG_UPS || now_ns() - nq->suspected_since_ns < away_ns)
        return;
    nbd_remove(&nq->waiting, slot);
    nbd_finish(nq, slot, EIO);
}

/* Nobody waits for the requests any more. */
static void give_up(struct nbd_queue *nq)
{
    struct nbd_slot *slot;

    nbd_lost(nq, "");
    if (nq->state == NBD_CLOSING && !is_busy(nq))
        close_lost(nq);
    while (nq->state == NBD_DOWN && (slot = nq->waiting.first)) {
        nbd_remove(&nq->waiting, slot);
        nbd_finish(nq, slot, ECANCELED);
    }
}

/* Have the end of the connection wake the queue, also when nothing is to be received. */
static void watch(struct nbd_queue *nq)
{
    void *tag = nbd_tag(nq, NBD_WATCH);
    struct io_uring_sqe *sqe = vd_queue_sqe(nq->queue, tag);

    io_uring_prep_poll_add(sqe, nq->link.fd, POLLRDHUP);
    io_uring_sqe_set_data(sqe, tag);
    nq->watching = true;
}

/*
 * The volume has grown since the handshake: servers may refuse what lies beyond the size that they said on this connection.
 * Whoever knows of the new size knows that it is needed (nbd_resize), so this is seen before anything is sent that lies there.
 */
static bool is_outgrown(const struct nbd_queue *nq)
{
    return nq->link.export.size_bytes < load_relaxed(&nq->nbd->needed_bytes);
}

void nbd_count_records(struct nbd_queue *nq, size_t bytes, size_t pieces)
{
    if (nq->link.tls)
        nq->link.records += 1 + bytes / NBD_RECORD_BYTES + pieces / NBD_RECORD_PIECES;
}

/*
 * Keys are good for so many records. They are not changed on the connection: a kernel that encrypts for us cannot, or not before
 * Linux 6.14.
 */
static bool is_worn(const struct nbd_queue *nq)
{
    uint32_t most = nq->nbd->target.tls_records;

    return nq->link.records >= (most ? most : NBD_RECORDS_MAX);
}

void nbd_turn(struct vd_queue *q)
{
    struct nbd_queue *nq = q->backend;
    bool over;

    if (load_relaxed(&q->abandoned) || q->fault == VD_FAULT_MEMORY || vd_queue_memory_lost(q)) {
        give_up(nq);
        return;
    }
    if (nq->state == NBD_CLOSING && !is_busy(nq)) {
        close_lost(nq);
        convict(nq);
    }
    if (nq->state == NBD_DOWN) {
        if (!nq->asked)
            nbd_want(nq);
        if (!nbd_take(nq))
            return;
        nq->state = NBD_UP;
        store_relaxed(&q->stats->remote.connected, 1);
        nbd_receive_reset(nq);
        nq->send_first = nq->send_count = nq->tls_have = nq->tls_sent = 0;
        watch(nq);
    }
    if (nq->state != NBD_UP)
        return;
    over = is_outgrown(nq) || is_worn(nq);
    if (over && !nq->sent.first) {
        nbd_lost(nq, NULL);
        return;
    }
    if (!over)
        nbd_send(nq); /* else what waits is sent on the next connection, as soon as this one has nothing to answer */
    nbd_receive(nq);
}

void nbd_event(struct vd_queue *q, void *data, int result)
{
    struct nbd_queue *nq = q->backend;
    enum nbd_tag tag = (uintptr_t)data & NBD_TAGS;

    if (load_relaxed(&q->abandoned)) { /* what came is in nobody's buffers, and what is left to be sent is nobody's */
        *(tag == NBD_SEND ? &nq->sending : tag == NBD_RECEIVE ? &nq->receiving : &nq->watching) = false;
        return;
    }
    switch (tag) {
    case NBD_SEND:
        if (nq->link.ssl)
            nbd_secure_send_done(nq, result);
        else
            nbd_send_done(nq, result);
        return;
    case NBD_RECEIVE:
        if (nq->link.ssl)
            nbd_secure_receive_done(nq, result);
        else
            nbd_receive_done(nq, result);
        return;
    default:
        nq->watching = false;
        if (result == -ECANCELED)
            return; /* by ourselves */
        /* What the server answered before it went can still be read, and the read finds the end. */
        if (!nq->receiving)
            nbd_broke(nq, 0);
    }
}
