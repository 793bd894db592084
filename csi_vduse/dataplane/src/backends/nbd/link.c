/*
 * A queue's connection in use. The queue's thread runs all of it.
 *
 *   DOWN      no connection: the connector was asked for one, requests wait
 *   UP        commands are sent and answered; answered only, if the volume has become larger than
 *             its server said, or if enough has been encrypted with the connection's keys
 *   CLOSING   lost: shut down, and closed as soon as the kernel has let go of our buffers
 *
 * Kept true: a request that was taken from the driver is in one of the lists, waiting or sent,
 * until it is answered. After a loss all that was sent waits again, in the order in which it was
 * sent first, in front of what has not been sent. Reads, writes, zeroes and discards may be done
 * twice; what was not answered has no order towards each other, and a FLUSH covers only what was
 * answered before it came, so the order of sending is enough.
 */
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/socket.h>

#include "exchange.h"

/* to be sent with the same keys: AES-GCM is good for 2^24.5 (RFC 8446, 5.5) */
enum { RECORDS_MAX = 1 << 24 };

int nbd_queue_open(struct vd_queue *q)
{
    struct nbd_queue *nq = NULL;

    if (posix_memalign((void **)&nq, 64, sizeof(*nq)))
        return -ENOMEM;
    memset(nq, 0, sizeof(*nq));
    vd_queue_set_backend(q, nq);
    nq->nbd = vd_queue_volume(q);
    nq->queue = q;
    nq->stats = vd_queue_remote(q);
    nq->link.fd = -1;
    nq->slots = calloc(vd_queue_config_of(q)->size, sizeof(*nq->slots));
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

/*
 * Nothing is under way on its connection, and nothing was left half done: another queue can go on
 * with it.
 */
static bool is_idle(const struct nbd_queue *nq)
{
    return nq->state == NBD_UP && !vd_queue_is_abandoned(nq->queue) && !nq->sent.first &&
           !nq->sending && !nq->receiving && !nq->in_payload && !nq->header_have &&
           nq->send_first == nq->send_count && nq->tls_sent == nq->tls_have;
}

void nbd_queue_close(struct vd_queue *q)
{
    struct nbd_queue *nq = vd_queue_backend(q);

    nbd_want_no_more(nq);
    if (is_idle(nq) && nq->watching)
        vd_queue_cancel_event(q, NBD_WATCH);
    else if (nq->link.fd >= 0 && nq->state == NBD_UP)
        nbd_cut(&nq->link);
    while (is_busy(nq)) {
        int result;
        unsigned event = vd_queue_await_event(q, &result);

        nbd_event(q, event, result);
    }
    if (is_idle(nq))
        nbd_leave_behind(nq);
    nbd_let_go(nq);
    nbd_unregister(nq);
    store_relaxed(&nq->stats->connected, 0);
    free(nq->slots);
    free(nq->send_iov);
    free(nq->receive_iov);
    free(nq->spill);
    free(nq->tls_buffer);
    free(nq->block);
    free(nq);
    vd_queue_set_backend(q, NULL);
}

/* The connection cannot be used any more; why as in nbd_queue. */
static void lose(struct nbd_queue *nq, const char *why)
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

/* The kernel said so. */
static void lose_broken(struct nbd_queue *nq, int result)
{
    const char *why = result == -EFAULT      ? "the driver's memory is gone"
                      : result == -ETIMEDOUT ? "the server does not answer any more"
                                             : "the server closed the connection";
    bool closed = !result || result == -ECONNRESET || result == -EPIPE;

    if (result == -EFAULT) /* there is no end of sending again what is not there */
        vd_queue_fault(nq->queue, VD_FAULT_MEMORY);
    if (nq->state != NBD_UP)
        return;
    if (nq->link.tls && !nq->link.ssl && (result == -EIO || result == -EKEYEXPIRED))
        why = nbd_tls_interruption(nq->link.fd, &closed);
    nq->hung_up = closed;
    lose(nq, why);
}

/* Because of what the server said. */
static void lose_misunderstood(struct nbd_queue *nq, int error)
{
    if (nq->state != NBD_UP)
        return;
    nq->hung_up = error != -ESHUTDOWN;
    lose(nq, error == -ESHUTDOWN ? "the server is shutting down" : "the server broke the protocol");
}

/* What sending or receiving says of the connection. */
static void heed(struct nbd_queue *nq, struct nbd_loss loss)
{
    if (loss.ending == NBD_BROKE)
        lose_broken(nq, loss.error);
    else if (loss.ending == NBD_MISUNDERSTOOD)
        lose_misunderstood(nq, loss.error);
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
    count_up(&nq->stats->resent, resent);
}

static void close_lost(struct nbd_queue *nq)
{
    nbd_let_go(nq);
    nbd_suspect(nq);
    take_back(nq);
    nq->state = NBD_DOWN;
    nq->broken = nq->hung_up = false;
    store_relaxed(&nq->stats->connected, 0);
    count_up(&nq->stats->losses, nq->why != NULL);
}

/* Nobody waits for the requests any more. */
static void give_up(struct nbd_queue *nq)
{
    struct nbd_slot *slot;

    lose(nq, "");
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
    struct io_uring_sqe *sqe = vd_queue_sqe(nq->queue);

    io_uring_prep_poll_add(sqe, nq->link.fd, POLLRDHUP);
    vd_sqe_of_event(sqe, NBD_WATCH);
    nq->watching = true;
}

/*
 * The volume has grown since the handshake: servers may refuse what lies beyond the size that they
 * said on this connection. Whoever knows of the new size knows that it is needed (nbd_resize), so
 * this is seen before anything is sent that lies there.
 */
static bool is_outgrown(const struct nbd_queue *nq)
{
    return nq->link.export.size_bytes < load_relaxed(&nq->nbd->needed_bytes);
}

/*
 * Keys are good for so many records. They are not changed on the connection: a kernel that encrypts
 * for us cannot, or not before Linux 6.14.
 */
static bool is_worn(const struct nbd_queue *nq)
{
    uint32_t most = nq->nbd->target.tls_records;

    return nq->link.records >= (most ? most : RECORDS_MAX);
}

void nbd_turn(struct vd_queue *q)
{
    struct nbd_queue *nq = vd_queue_backend(q);
    struct nbd_slot *slot;
    bool over;

    if (vd_queue_is_abandoned(q) || vd_queue_memory_lost(q)) {
        give_up(nq);
        return;
    }
    if (nq->state == NBD_CLOSING && !is_busy(nq)) {
        close_lost(nq);
        if ((slot = nbd_culprit(nq))) {
            nbd_remove(&nq->waiting, slot);
            nbd_finish(nq, slot, EIO);
        }
    }
    if (nq->state == NBD_DOWN) {
        if (!nq->asked)
            nbd_want(nq);
        if (!nbd_take(nq))
            return;
        nq->state = NBD_UP;
        nq->transport = nq->link.ssl ? &nbd_secure : &nbd_plain;
        store_relaxed(&nq->stats->connected, 1);
        nbd_receive_reset(nq);
        nq->send_first = nq->send_count = nq->tls_have = nq->tls_sent = 0;
        watch(nq);
    }
    if (nq->state != NBD_UP)
        return;
    over = is_outgrown(nq) || is_worn(nq);
    if (over && !nq->sent.first) {
        lose(nq, NULL);
        return;
    }
    /*
     * Else what waits is sent on the next connection, when this one has nothing to answer any more.
     */
    if (!over)
        heed(nq, nbd_send(nq));
    if (nq->state == NBD_UP)
        nbd_receive(nq);
}

void nbd_event(struct vd_queue *q, unsigned event, int result)
{
    struct nbd_queue *nq = vd_queue_backend(q);
    /* what came is in nobody's buffers, what is to be sent is nobody's */
    bool abandoned = vd_queue_is_abandoned(q);

    switch (event) {
    case NBD_SEND:
        nq->sending = false;
        if (!abandoned)
            heed(nq, nq->transport->sent(nq, result));
        return;
    case NBD_RECEIVE:
        nq->receiving = false;
        if (abandoned)
            return;
        heed(nq, nq->transport->received(nq, result));
        nbd_acknowledge(nq);
        return;
    default:
        nq->watching = false;
        if (abandoned || result == -ECANCELED)
            return; /* by ourselves */
        /* What the server answered before it went can still be read, and the read finds the end. */
        if (!nq->receiving)
            lose_broken(nq, 0);
    }
}
