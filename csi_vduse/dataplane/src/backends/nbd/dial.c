/*
 * A socket that is connected to the server, over TCP or a unix socket, and the files of the keys
 * that it is used with: all that a worker in jail cannot have by itself. Of a host with several
 * addresses each gets its share of the time.
 */
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "connection.h"

enum {
    KEEPALIVE_IDLE_S = 10,
    KEEPALIVE_INTERVAL_S = 5,
    KEEPALIVE_PROBES = 3,
    USER_TIMEOUT_MS = 30000
};

/* The kernel gives a peer up that is gone without a word: idle or with data of ours under way. */
static void set_options(int fd)
{
    const int options[][3] = {
        { IPPROTO_TCP, TCP_NODELAY, 1 },
        { SOL_SOCKET, SO_KEEPALIVE, 1 },
        { IPPROTO_TCP, TCP_KEEPIDLE, KEEPALIVE_IDLE_S },
        { IPPROTO_TCP, TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S },
        { IPPROTO_TCP, TCP_KEEPCNT, KEEPALIVE_PROBES },
        { IPPROTO_TCP, TCP_USER_TIMEOUT, USER_TIMEOUT_MS },
    };

    nbd_drop_at_close(fd);
    for (size_t i = 0; i < sizeof(options) / sizeof(options[0]); i++)
        (void)setsockopt(fd, options[i][0], options[i][1], &options[i][2], sizeof(int));
}

static int connect_to(struct nbd_stream *s, const struct sockaddr *address, socklen_t length,
                      int family)
{
    int error;

    s->fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (s->fd < 0)
        return -errno;
    if (family != AF_UNIX)
        set_options(s->fd);
    error = nbd_stream_connect(s, address, length);
    if (error) {
        close(s->fd);
        s->fd = -1;
    }
    return error;
}

static int connect_unix(struct nbd_stream *s, const char *path)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };

    if (strlen(path) >= sizeof(address.sun_path))
        return -ENAMETOOLONG;
    strcpy(address.sun_path, path);
    return connect_to(s, (const struct sockaddr *)&address, sizeof(address), AF_UNIX);
}

static int connect_tcp(struct nbd_stream *s, const struct nbd_target *target, uint64_t timeout_ns,
                       char *reason)
{
    struct addrinfo hints = { .ai_socktype = SOCK_STREAM }, *found = NULL;
    int error = getaddrinfo(target->host, target->service, &hints, &found);
    uint64_t left = 0;

    if (error) {
        snprintf(reason, NBD_REASON_BYTES, "host %.60s: %s", target->host, gai_strerror(error));
        return -EHOSTUNREACH;
    }
    error = -EHOSTUNREACH;
    for (struct addrinfo *each = found; each; each = each->ai_next)
        left++;
    for (struct addrinfo *each = found; each && error && error != -ECANCELED;
         each = each->ai_next) {
        uint64_t now = now_ns();

        /* one that is silent must not cost the others their chance */
        s->deadline_ns = now + timeout_ns / left--;
        error = connect_to(s, each->ai_addr, each->ai_addrlen, each->ai_family);
        timeout_ns -= at_most(timeout_ns, now_ns() - now);
    }
    s->deadline_ns = now_ns() + timeout_ns;
    freeaddrinfo(found);
    return error;
}

/*
 * Without a connection the kernel refuses TLS, but for another reason if it does not have it
 * (tcp_set_ulp, tls_init).
 */
int vd_kernel_has_tls(void)
{
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    bool has = fd >= 0 && setsockopt(fd, IPPROTO_TCP, TCP_ULP, "tls", sizeof("tls")) &&
               errno == ENOTCONN;

    if (fd >= 0)
        close(fd);
    return has;
}

/* What cannot be opened is missed where it is needed (tls.c). */
static void open_keys(struct nbd_stream *s, const struct nbd_target *target)
{
    static const char *const names[NBD_KEYS] = { "ca-cert.pem", "client-cert.pem",
                                                 "client-key.pem" };

    if (target->psk_file[0]) {
        s->keys[0] = open(target->psk_file, O_RDONLY | O_CLOEXEC);
        return;
    }
    for (int i = 0; i < NBD_KEYS; i++) {
        char path[4200];

        snprintf(path, sizeof(path), "%.4096s/%s", target->certificates, names[i]);
        s->keys[i] = open(path, O_RDONLY | O_CLOEXEC);
    }
}

void nbd_close_keys(struct nbd_stream *s)
{
    for (int i = 0; i < NBD_KEYS; i++) {
        if (s->keys[i] >= 0)
            close(s->keys[i]);
        s->keys[i] = -1;
    }
}

int nbd_dial_here(struct nbd_stream *s, const struct nbd_target *target, uint64_t timeout_ns,
                  char reason[NBD_REASON_BYTES])
{
    int error = target->socket[0] ? connect_unix(s, target->socket)
                                  : connect_tcp(s, target, timeout_ns, reason);

    if (error && !reason[0])
        snprintf(reason, NBD_REASON_BYTES, "cannot connect: %s", strerror(-error));
    if (!error && target->tls) {
        s->kernel_has_tls = !target->socket[0] && vd_kernel_has_tls();
        open_keys(s, target);
    }
    return error;
}
