#include "fake_tls.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { KEY_BYTES = 32, KEY = 0x5a, BUFFER_BYTES = 64 * 1024 };

struct pump {
    struct fake_nbd *s;
    int fd, plain;
    uint32_t number, keys;
    SSL *ssl;
};

static bool kernel_has_tls;

void fake_tls_in_kernel(void)
{
    kernel_has_tls = true;
}

/* In the place of the C library's. */
int setsockopt(int fd, int level, int name, const void *value, socklen_t length)
{
    if (kernel_has_tls && level == IPPROTO_TCP && name == TCP_ULP) {
        errno = ENOTCONN;
        return -1;
    }
    return (int)syscall(SYS_setsockopt, fd, level, name, value, length);
}

static unsigned tell_key(SSL *ssl, const char *identity, unsigned char *key, unsigned bytes)
{
    (void)ssl;
    if (strcmp(identity, "alice") || bytes < KEY_BYTES)
        return 0;
    memset(key, KEY, KEY_BYTES);
    return KEY_BYTES;
}

/* One step each way; false: the end, or an error. */
static bool pump_out(struct pump *p, uint8_t *buffer)
{
    ssize_t n = recv(p->plain, buffer, BUFFER_BYTES, MSG_DONTWAIT);
    size_t done = 0, moved;

    if (n < 0)
        return errno == EAGAIN;
    while (done < (size_t)n) {
        struct pollfd room = { .fd = p->fd, .events = POLLOUT };

        ERR_clear_error();
        int result = SSL_write_ex(p->ssl, buffer + done, (size_t)n - done, &moved);

        if (result != 1 && SSL_get_error(p->ssl, result) != SSL_ERROR_WANT_WRITE)
            return false;
        if (result == 1)
            done += moved;
        else if (poll(&room, 1, 20000) <= 0)
            return false;
    }
    return n > 0;
}

static bool pump_in(struct pump *p, uint8_t *buffer)
{
    size_t moved;

    for (;;) {
        ERR_clear_error();
        int result = SSL_read_ex(p->ssl, buffer, BUFFER_BYTES, &moved);

        if (result != 1)
            return SSL_get_error(p->ssl, result) == SSL_ERROR_WANT_READ;
        for (size_t done = 0; done < moved;) {
            ssize_t n = send(p->plain, buffer + done, moved - done, MSG_NOSIGNAL);

            if (n < 0)
                return false;
            done += (size_t)n;
        }
    }
}

static void move_all(struct pump *p)
{
    uint8_t *buffer = malloc(BUFFER_BYTES);
    bool going = true;

    while (going) {
        bool deaf = p->number < load_relaxed(&p->s->deaf);
        struct pollfd polled[2] = { { .fd = p->plain, .events = POLLIN }, { .fd = p->fd, .events = deaf ? 0 : POLLIN } };

        if (load_relaxed(&p->s->new_keys) != p->keys) {
            p->keys++;
            going = SSL_key_update(p->ssl, SSL_KEY_UPDATE_REQUESTED) == 1 && SSL_do_handshake(p->ssl) == 1;
        }
        (void)poll(polled, 2, 5);
        if (polled[0].revents)
            going &= pump_out(p, buffer);
        if (polled[1].revents && !deaf)
            going &= pump_in(p, buffer);
    }
    free(buffer);
}

static void *run(void *argument)
{
    struct pump *p = argument;
    SSL_CTX *context = SSL_CTX_new(TLS_server_method());

    SSL_CTX_set_psk_server_callback(context, tell_key);
    SSL_CTX_set_cipher_list(context, "kDHEPSK+AESGCM:kPSK+AESGCM");
    SSL_CTX_set_min_proto_version(context, p->s->tls_version);
    SSL_CTX_set_max_proto_version(context, p->s->tls_version);
    SSL_CTX_set_mode(context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    p->ssl = SSL_new(context);
    CHECK(p->ssl && SSL_set_fd(p->ssl, p->fd) == 1);
    if (SSL_accept(p->ssl) == 1) {
        CHECK(!fcntl(p->fd, F_SETFL, O_NONBLOCK));
        move_all(p);
        ERR_clear_error();
        (void)SSL_shutdown(p->ssl);
    }
    SSL_free(p->ssl);
    SSL_CTX_free(context);
    close(p->plain);
    pthread_mutex_lock(&p->s->lock);
    for (int i = 0; i < FAKE_CONNECTIONS; i++)
        if (p->s->sockets[i] == p->fd)
            p->s->sockets[i] = -1;
    close(p->fd);
    p->s->pumps--;
    pthread_mutex_unlock(&p->s->lock);
    free(p);
    return NULL;
}

int fake_tls_start(struct fake_nbd *s, int fd, uint32_t number)
{
    struct pump *p = calloc(1, sizeof(*p));
    pthread_t thread;
    int ends[2];

    CHECK(p && !socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends));
    *p = (struct pump){ .s = s, .fd = fd, .plain = ends[0], .number = number, .keys = load_relaxed(&s->new_keys) };
    pthread_mutex_lock(&s->lock);
    s->pumps++;
    pthread_mutex_unlock(&s->lock);
    CHECK(!pthread_create(&thread, NULL, run, p));
    pthread_detach(thread);
    return ends[1];
}

static char key_path[128];

static void remove_key(void)
{
    unlink(key_path);
}

struct vd_nbd_config fake_tls_config(const struct fake_nbd *s)
{
    struct vd_nbd_config config = fake_nbd_config(s);

    if (!key_path[0]) {
        FILE *file;

        snprintf(key_path, sizeof(key_path), "%s.psk", getenv("TEST_DIRECTORY") ? getenv("TEST_DIRECTORY") : "/tmp/ring");
        file = fopen(key_path, "we");
        CHECK(file && fputs("alice:", file) >= 0);
        for (int i = 0; i < KEY_BYTES; i++)
            CHECK(fprintf(file, "%02x", KEY) == 2);
        CHECK(!fclose(file));
        harness_at_end(remove_key);
    }
    config.tls = 1;
    config.psk_file = key_path;
    config.psk_identity = "alice";
    return config;
}
