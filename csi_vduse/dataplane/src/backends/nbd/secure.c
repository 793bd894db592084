/*
 * Send and receive through a TLS session of ours, where the kernel has no TLS: the session works on the socket without
 * blocking, and the queue's io_uring tells when it can go on. What is sent is gathered once, for the records are encrypted
 * anyway; what arrives is decrypted into spill and put in place from there. Keys that the server changes are OpenSSL's affair.
 */
#include <errno.h>
#include <openssl/err.h>
#include <openssl/sslerr.h>
#include <poll.h>

#include "secure.h"

static void wait_for(struct nbd_queue *nq, enum nbd_tag tag, short events)
{
    void *data = nbd_tag(nq, tag);
    struct io_uring_sqe *sqe = vd_queue_sqe(nq->queue, data);

    io_uring_prep_poll_add(sqe, nq->link.fd, (unsigned)events);
    io_uring_sqe_set_data(sqe, data);
    if (tag == NBD_SEND)
        nq->sending = true;
    else
        nq->receiving = true;
}

/* A call that moved nothing, and not for want of room or bytes: the connection is of no use any more. */
static void fail(struct nbd_queue *nq, int error, int number)
{
    if (error == SSL_ERROR_SYSCALL)
        nbd_broke(nq, -number);
    else if (error == SSL_ERROR_ZERO_RETURN || ERR_GET_REASON(ERR_peek_error()) == SSL_R_UNEXPECTED_EOF_WHILE_READING)
        nbd_broke(nq, 0);
    else
        nbd_misunderstood(nq, -EPROTO);
}

/* Fill the buffer from the pieces that are left. */
static void gather(struct nbd_queue *nq)
{
    nq->tls_have = nq->tls_sent = 0;
    while (nq->send_first < nq->send_count && nq->tls_have < NBD_TLS_BYTES) {
        struct iovec *piece = &nq->send_iov[nq->send_first];
        size_t n = piece->iov_len < NBD_TLS_BYTES - nq->tls_have ? piece->iov_len : NBD_TLS_BYTES - nq->tls_have;

        memcpy(nq->tls_buffer + nq->tls_have, piece->iov_base, n);
        nq->tls_have += (uint32_t)n;
        piece->iov_base = (uint8_t *)piece->iov_base + n;
        piece->iov_len -= n;
        if (!piece->iov_len)
            nq->send_first++;
    }
}

void nbd_secure_send(struct nbd_queue *nq)
{
    for (;;) {
        size_t moved;

        if (nq->tls_sent == nq->tls_have)
            gather(nq);
        if (!nq->tls_have)
            return;
        if (vd_queue_memory_lost(nq->queue))
            return; /* what was gathered may be zeros of ours; the queue stops in this turn */
        ERR_clear_error();
        errno = 0;
        int result = SSL_write_ex(nq->link.ssl, nq->tls_buffer + nq->tls_sent, nq->tls_have - nq->tls_sent, &moved);
        int number = errno, error = result == 1 ? SSL_ERROR_NONE : SSL_get_error(nq->link.ssl, result);

        switch (error) {
        case SSL_ERROR_NONE:
            nq->tls_sent += (uint32_t)moved;
            nbd_count_records(nq, moved, 0);
            continue;
        case SSL_ERROR_WANT_WRITE:
            wait_for(nq, NBD_SEND, POLLOUT);
            return;
        case SSL_ERROR_WANT_READ:
            wait_for(nq, NBD_SEND, POLLIN);
            return;
        default:
            fail(nq, error, number);
            return;
        }
    }
}

void nbd_secure_send_done(struct nbd_queue *nq, int result)
{
    nq->sending = false;
    if (result < 0 || nq->broken)
        nbd_broke(nq, result);
    else
        nbd_secure_send(nq);
}

void nbd_secure_receive(struct nbd_queue *nq)
{
    wait_for(nq, NBD_RECEIVE, POLLIN);
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

void nbd_secure_receive_done(struct nbd_queue *nq, int result)
{
    int error = 0, end = SSL_ERROR_NONE, number = 0;
    size_t bytes;

    nq->receiving = false;
    if (result < 0 || nq->broken) {
        nbd_broke(nq, result);
        return;
    }
    count_up(&nq->queue->stats->remote.receives, 1);
    while (!error && !end && !load_relaxed(&nq->queue->abandoned)) {
        end = read_some(nq, &bytes, &number);
        if (!end)
            error = nbd_feed(nq, nq->spill, (uint32_t)bytes);
    }
    if (error)
        nbd_misunderstood(nq, error);
    else if (end && end != SSL_ERROR_WANT_READ && end != SSL_ERROR_WANT_WRITE)
        fail(nq, end, number);
    else
        nbd_acknowledge(nq);
}
