/*
 * Bytes through the socket itself, by the queue's io_uring, from and to the driver's buffers; also
 * where the kernel does TLS beneath. One send and one receive are under way at a time. The kernel
 * has our pieces until they end, also while it waits for room or for bytes.
 */
#include <errno.h>

#include "exchange.h"

static struct nbd_loss plain_send(struct nbd_queue *nq)
{
    struct io_uring_sqe *sqe = vd_queue_sqe(nq->queue);

    nq->send_message = (struct msghdr){ .msg_iov = nq->send_iov + nq->send_first,
                                        .msg_iovlen = nq->send_count - nq->send_first };
    /* kTLS takes no MSG_WAITALL */
    io_uring_prep_sendmsg(sqe, nq->link.fd, &nq->send_message, MSG_NOSIGNAL);
    vd_sqe_of_event(sqe, NBD_SEND);
    nq->sending = true;
    count_up(&nq->stats->sends, 1);
    return (struct nbd_loss){ NBD_GOES_ON, 0 };
}

static struct nbd_loss plain_sent(struct nbd_queue *nq, int result)
{
    size_t bytes = result > 0 ? (size_t)result : 0;
    uint32_t before = nq->send_first;

    if (result <= 0 && result != -EAGAIN && result != -EINTR)
        return (struct nbd_loss){ NBD_BROKE, result };
    while (nq->send_first < nq->send_count && bytes >= nq->send_iov[nq->send_first].iov_len)
        bytes -= nq->send_iov[nq->send_first++].iov_len;
    nbd_link_count_records(&nq->link, (size_t)(result > 0 ? result : 0), nq->send_first - before);
    if (nq->send_first == nq->send_count || nq->broken)
        return (struct nbd_loss){ NBD_GOES_ON, 0 };
    nq->send_iov[nq->send_first].iov_base = (uint8_t *)nq->send_iov[nq->send_first].iov_base +
                                            bytes;
    nq->send_iov[nq->send_first].iov_len -= bytes;
    return plain_send(nq);
}

static void plain_receive(struct nbd_queue *nq)
{
    struct io_uring_sqe *sqe;

    nbd_receive_prepare(nq);
    sqe = vd_queue_sqe(nq->queue);
    nq->receive_message = (struct msghdr){ .msg_iov = nq->receive_iov,
                                           .msg_iovlen = nq->receive_count };
    io_uring_prep_recvmsg(sqe, nq->link.fd, &nq->receive_message, 0);
    vd_sqe_of_event(sqe, NBD_RECEIVE);
    nq->receiving = true;
}

static struct nbd_loss plain_received(struct nbd_queue *nq, int result)
{
    int error;

    if (result == -EAGAIN || result == -EINTR)
        return (struct nbd_loss){ NBD_GOES_ON, 0 };
    if (result <= 0 || nq->broken)
        return (struct nbd_loss){ NBD_BROKE, result };
    count_up(&nq->stats->receives, 1);
    error = nbd_receive_take(nq, (uint32_t)result);
    return (struct nbd_loss){ error ? NBD_MISUNDERSTOOD : NBD_GOES_ON, error };
}

const struct nbd_transport nbd_plain = {
    .send = plain_send,
    .sent = plain_sent,
    .receive = plain_receive,
    .received = plain_received,
};
