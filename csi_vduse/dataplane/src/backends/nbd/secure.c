/*
 * Send and receive through a TLS session of ours, where the kernel has no TLS: the session works on
 * the socket without blocking, and the queue's io_uring tells when it can go on. What is sent is
 * gathered once, for the records are encrypted anyway; what arrives is decrypted into spill and put
 * in place from there. Keys that the server changes are OpenSSL's affair.
 */
#include <errno.h>
#include <openssl/err.h>
#include <openssl/sslerr.h>
#include <poll.h>

#include "exchange.h"

static void await_socket(struct nbd_queue *nq, enum nbd_event event, short events)
{
    struct io_uring_sqe *sqe = vd_queue_sqe(nq->queue);

    io_uring_prep_poll_add(sqe, nq->link.fd, (unsigned)events);
    vd_sqe_of_event(sqe, event);
    *(event == NBD_SEND ? &nq->sending : &nq->receiving) = true;
}

/*
 * A call that moved nothing, and not for want of room or bytes: the connection is of no use any
 * more.
 */
static struct nbd_loss loss_of(int error, int number)
{
    if (error == SSL_ERROR_SYSCALL)
        return (struct nbd_loss){ NBD_BROKE, -number };
    if (error == SSL_ERROR_ZERO_RETURN ||
        ERR_GET_REASON(ERR_peek_error()) == SSL_R_UNEXPECTED_EOF_WHILE_READING)
        return (struct nbd_loss){ NBD_BROKE, 0 };
    return (struct nbd_loss){ NBD_MISUNDERSTOOD, -EPROTO };
}

/* Fill the buffer from the pieces that are left. */
static void gather_plaintext(struct nbd_queue *nq)
{
    nq->tls_have = nq->tls_sent = 0;
    while (nq->send_first < nq->send_count && nq->tls_have < NBD_TLS_BYTES) {
        struct iovec *piece = &nq->send_iov[nq->send_first];
        size_t n = piece->iov_len < NBD_TLS_BYTES - nq->tls_have ? piece->iov_len
                                                                 : NBD_TLS_BYTES - nq->tls_have;

        memcpy(nq->tls_buffer + nq->tls_have, piece->iov_base, n);
        nq->tls_have += (uint32_t)n;
        piece->iov_base = (uint8_t *)piece->iov_base + n;
        piece->iov_len -= n;
        if (!piece->iov_len)
            nq->send_first++;
    }
}

static struct nbd_loss secure_send(struct nbd_queue *nq)
{
    for (;;) {
        size_t moved;

        if (nq->tls_sent == nq->tls_have)
            gather_plaintext(nq);
        if (!nq->tls_have)
            return (struct nbd_loss){ NBD_GOES_ON, 0 };
        /* What was gathered may be zeros of ours; the queue stops in this turn. */
        if (vd_queue_memory_lost(nq->queue))
            return (struct nbd_loss){ NBD_GOES_ON, 0 };
        ERR_clear_error();
        errno = 0;
        int result = SSL_write_ex(nq->link.ssl, nq->tls_buffer + nq->tls_sent,
                                  nq->tls_have - nq->tls_sent, &moved);
        int number = errno,
            error = result == 1 ? SSL_ERROR_NONE : SSL_get_error(nq->link.ssl, result);

        switch (error) {
        case SSL_ERROR_NONE:
            nq->tls_sent += (uint32_t)moved;
            nbd_link_count_records(&nq->link, moved, 0);
            continue;
        case SSL_ERROR_WANT_WRITE:
            await_socket(nq, NBD_SEND, POLLOUT);
            return (struct nbd_loss){ NBD_GOES_ON, 0 };
        case SSL_ERROR_WANT_READ:
            await_socket(nq, NBD_SEND, POLLIN);
            return (struct nbd_loss){ NBD_GOES_ON, 0 };
        default:
            return loss_of(error, number);
        }
    }
}

static struct nbd_loss secure_sent(struct nbd_queue *nq, int result)
{
    return result < 0 || nq->broken ? (struct nbd_loss){ NBD_BROKE, result } : secure_send(nq);
}

static void secure_receive(struct nbd_queue *nq)
{
    await_socket(nq, NBD_RECEIVE, POLLIN);
}

/* Some bytes into spill; 0, or why there are none: of SSL_get_error, and errno. */
static int read_some(struct nbd_queue *nq, size_t *bytes, int *number)
{
    ERR_clear_error();
    errno = 0;
    int result = SSL_read_ex(nq->link.ssl, nq->spill, NBD_SPILL_BYTES, bytes);

    *number = errno;
    return result == 1 ? SSL_ERROR_NONE : SSL_get_error(nq->link.ssl, result);
}

static struct nbd_loss secure_received(struct nbd_queue *nq, int result)
{
    int error = 0, end = SSL_ERROR_NONE, number = 0;
    size_t bytes;

    if (result < 0 || nq->broken)
        return (struct nbd_loss){ NBD_BROKE, result };
    count_up(&nq->stats->receives, 1);
    while (!error && !end && !vd_queue_is_abandoned(nq->queue)) {
        end = read_some(nq, &bytes, &number);
        if (!end)
            error = nbd_feed(nq, nq->spill, (uint32_t)bytes);
    }
    if (error)
        return (struct nbd_loss){ NBD_MISUNDERSTOOD, error };
    if (end && end != SSL_ERROR_WANT_READ && end != SSL_ERROR_WANT_WRITE)
        return loss_of(end, number);
    return (struct nbd_loss){ NBD_GOES_ON, 0 };
}

const struct nbd_transport nbd_secure = {
    .send = secure_send,
    .sent = secure_sent,
    .receive = secure_receive,
    .received = secure_received,
};
