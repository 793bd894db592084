/*
 * Bytes through a fresh connection, for the connector's thread: whole or an error, never longer
 * than the deadline, and ended at once by the cancel descriptor. The socket does not block.
 */
#include <errno.h>
#include <openssl/err.h>
#include <poll.h>
#include <sys/socket.h>

#include "connection.h"

/* Wait until the socket can; 0 or -errno. */
static int await_stream(const struct nbd_stream *s, short events)
{
    struct pollfd polled[2] = { { .fd = s->fd, .events = events },
                                { .fd = s->cancel_fd, .events = POLLIN } };
    uint64_t now = now_ns();

    if (now >= s->deadline_ns)
        return -ETIMEDOUT;
    int n = poll(polled, 2, (int)((s->deadline_ns - now) / 1000000 + 1));

    if (n < 0)
        return errno == EINTR ? 0 : -errno;
    return polled[1].revents ? -ECANCELED : 0;
}

/*
 * Wait for what an operation on the TLS session that did not move anything asks for; 0: try again,
 * or -errno.
 */
static int tls_wait(const struct nbd_stream *s, int result)
{
    switch (SSL_get_error(s->ssl, result)) {
    case SSL_ERROR_WANT_READ:
        return await_stream(s, POLLIN);
    case SSL_ERROR_WANT_WRITE:
        return await_stream(s, POLLOUT);
    default:
        return -ECONNRESET;
    }
}

/* Move some bytes; how many, 0 to try again, or -errno. */
static ssize_t move_tls(const struct nbd_stream *s, void *at, size_t bytes, bool out)
{
    size_t moved = 0;

    ERR_clear_error();
    int result = out ? SSL_write_ex(s->ssl, at, bytes, &moved)
                     : SSL_read_ex(s->ssl, at, bytes, &moved);

    return result == 1 ? (ssize_t)moved : tls_wait(s, result);
}

static ssize_t move_plain(const struct nbd_stream *s, void *at, size_t bytes, bool out)
{
    ssize_t n = out ? send(s->fd, at, bytes, MSG_DONTWAIT | MSG_NOSIGNAL)
                    : recv(s->fd, at, bytes, MSG_DONTWAIT);

    if (n > 0)
        return n;
    if (!n)
        return -ECONNRESET;
    return errno == EAGAIN || errno == EINTR ? await_stream(s, out ? POLLOUT : POLLIN) : -errno;
}

static int move_all(const struct nbd_stream *s, uint8_t *at, size_t bytes, bool out)
{
    while (bytes) {
        ssize_t n = s->ssl ? move_tls(s, at, bytes, out) : move_plain(s, at, bytes, out);

        if (n < 0)
            return (int)n;
        at += n;
        bytes -= (size_t)n;
    }
    return 0;
}

int nbd_stream_read(struct nbd_stream *s, void *to, size_t bytes)
{
    return move_all(s, to, bytes, false);
}

int nbd_stream_write(struct nbd_stream *s, const void *from, size_t bytes)
{
    return move_all(s, (uint8_t *)from, bytes, true);
}

int nbd_stream_connect(struct nbd_stream *s, const struct sockaddr *address, socklen_t length)
{
    int error;
    socklen_t size = sizeof(error);

    if (!connect(s->fd, address, length))
        return 0;
    if (errno != EINPROGRESS)
        return -errno;
    error = await_stream(s, POLLOUT);
    if (error)
        return error;
    if (getsockopt(s->fd, SOL_SOCKET, SO_ERROR, &error, &size))
        return -errno;
    return -error;
}

int nbd_stream_handshake(struct nbd_stream *s)
{
    for (;;) {
        /* what others left in this thread's queue is taken for ours (SSL_get_error(3)) */
        ERR_clear_error();
        int result = SSL_connect(s->ssl);

        if (result == 1)
            return 0;
        int error = tls_wait(s, result);

        if (error)
            return error;
    }
}
