/*
 * How connections end: dropped, or with a goodbye.
 *
 * Dropped is what may have something of ours under way. The kernel must not go on sending it when
 * somebody else has sent it again and the driver has written the same place since; so no socket
 * lingers (SO_LINGER, 0 s), from before it is connected on: whenever it is closed, by the end of a
 * process that was killed too, what it holds is thrown away and the server's side reset. A
 * connection that is given up while the kernel works for it, or by another thread, is cut:
 * disconnected, which does the same at once. Not so with the kernel's TLS, which cannot be
 * disconnected (EOPNOTSUPP; before Linux 6.15 it is let, and corrupts itself): it is shut down,
 * which makes the kernel let go, and what it holds is thrown away when it is closed right after
 * that. What the server's own kernel has received is out of our reach, and so is all that was sent
 * through a unix socket.
 *
 * A goodbye is said where nothing is under way: servers tell it from a client's death, and stop
 * counting it. Best effort, and never waited for but where the caller says how long.
 */
#include <openssl/err.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "connection.h"

static void set_linger(int fd, bool reset)
{
    const struct linger linger = { .l_onoff = reset, .l_linger = 0 };

    (void)setsockopt(fd, SOL_SOCKET, SO_LINGER, &linger, sizeof(linger));
}

void nbd_drop_at_close(int fd)
{
    set_linger(fd, true);
}

void nbd_cut(const struct nbd_link *link)
{
    /* no more than that: a worker in jail may connect to nothing longer (jail.py) */
    const sa_family_t nowhere = AF_UNSPEC;

    if (link->kernel_tls || connect(link->fd, (const struct sockaddr *)&nowhere, sizeof(nowhere)))
        (void)shutdown(link->fd, SHUT_RDWR);
}

void nbd_link_close(struct nbd_link *link)
{
    SSL_free(link->ssl);
    if (link->fd >= 0)
        close(link->fd);
    link->ssl = NULL;
    link->fd = -1;
}

/* The protocol's last word, where the other side listens for one; returns its length. */
static size_t last_word(const struct nbd_link *link, uint8_t word[NBD_EXTENDED_REQUEST_BYTES])
{
    memset(word, 0, NBD_EXTENDED_REQUEST_BYTES);
    switch (link->phase) {
    case NBD_HAGGLING:
        put64(word, NBD_OPTION_MAGIC);
        put32(word + 8, NBD_OPT_ABORT);
        return NBD_OPTION_BYTES;
    case NBD_SERVED:
        put32(word, link->export.extended ? NBD_EXTENDED_REQUEST_MAGIC : NBD_REQUEST_MAGIC);
        put16(word + 6, NBD_DISCONNECT);
        return link->export.extended ? NBD_EXTENDED_REQUEST_BYTES : NBD_REQUEST_BYTES;
    default:
        return 0;
    }
}

/* All of it or nothing that counts, without waiting. */
static bool say_word(const struct nbd_link *link, const uint8_t *word, size_t bytes)
{
    size_t moved = 0;

    if (!link->ssl)
        return send(link->fd, word, bytes, MSG_DONTWAIT | MSG_NOSIGNAL) == (ssize_t)bytes;
    ERR_clear_error();
    if (SSL_write_ex(link->ssl, word, bytes, &moved) != 1 || moved != bytes)
        return false;
    ERR_clear_error();
    (void)SSL_shutdown(link->ssl);
    return true;
}

void nbd_say_goodbye(const struct nbd_link *link)
{
    uint8_t word[NBD_EXTENDED_REQUEST_BYTES];
    size_t bytes = last_word(link, word);

    if (bytes && say_word(link, word, bytes))
        set_linger(link->fd, false);
    (void)shutdown(link->fd, SHUT_WR);
}

void nbd_leave(struct nbd_link *link, uint64_t wait_ms)
{
    struct pollfd end = { .fd = link->fd, .events = POLLRDHUP };

    if (link->fd < 0)
        return;
    nbd_say_goodbye(link);
    if (wait_ms)
        (void)poll(&end, 1, (int)wait_ms);
    nbd_link_close(link);
}
