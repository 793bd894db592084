#include "fake_nbd_parts.h"

#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "fake_lookup.h"
#include "fake_tls.h"

enum { TOGETHER_MAX = 128, ALL_FLAGS = 0x1ed };

struct connection {
    struct fake_nbd *s;
    int fd, place;
    uint32_t number;
    bool unwelcome, tls;
    uint64_t size; /* of the export, as it was said: no growth changes it */
};

static bool get(int fd, void *to, size_t n)
{
    return !n || recv(fd, to, n, MSG_WAITALL) == (ssize_t)n;
}

static void count(uint32_t *counter)
{
    __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED);
}

static bool option_reply(int fd, uint32_t option, uint32_t type, const void *data, uint32_t length)
{
    uint8_t header[20];

    put64(header, NBD_OPTION_REPLY_MAGIC);
    put32(header + 8, option);
    put32(header + 12, type);
    put32(header + 16, length);
    return fake_nbd_give(fd, header, sizeof(header)) && fake_nbd_give(fd, data, length);
}

static bool say_export(struct connection *me)
{
    struct fake_nbd *s = me->s;
    int fd = me->fd;
    uint8_t export[12] = { 0 }, sizes[14] = { 0 };

    me->size = load_relaxed(&s->size);
    put64(export + 2, me->size);
    put16(export + 10, load_relaxed(&s->flags));
    put16(sizes, NBD_INFO_BLOCK_SIZE);
    put32(sizes + 2, s->min_block);
    put32(sizes + 6, 4096);
    put32(sizes + 10, s->max_payload);
    return option_reply(fd, NBD_OPT_GO, NBD_REP_INFO, export, sizeof(export)) &&
           option_reply(fd, NBD_OPT_GO, NBD_REP_INFO, sizes, sizeof(sizes)) &&
           option_reply(fd, NBD_OPT_GO, NBD_REP_ACK, NULL, 0);
}

static bool negotiate(struct connection *me, bool *structured, bool *extended)
{
    struct fake_nbd *s = me->s;
    int fd = me->fd;
    uint8_t greeting[18], flags[4], header[16], data[8192];

    while (load_relaxed(&s->shy) && !load_relaxed(&s->stopping))
        usleep(1000);
    put64(greeting, NBD_MAGIC);
    put64(greeting + 8, NBD_OPTION_MAGIC);
    put16(greeting + 16, NBD_FIXED_NEWSTYLE | NBD_NO_ZEROES);
    if (!fake_nbd_give(fd, greeting, sizeof(greeting)) || !get(fd, flags, sizeof(flags)))
        return false;
    *structured = *extended = false;
    while (get(fd, header, sizeof(header))) {
        uint32_t option = get32(header + 8), length = get32(header + 12);
        bool can = (option == NBD_OPT_STRUCTURED_REPLY && s->structured) ||
                   (option == NBD_OPT_EXTENDED_HEADERS && s->extended), refuse = load_relaxed(&s->refuse);

        if (length > sizeof(data) || !get(fd, data, length))
            return false;
        if (option == NBD_OPT_GO && !refuse)
            return say_export(me);
        if (option == NBD_OPT_ABORT) {
            count(&s->aborts);
            return false;
        }
        *structured |= can;
        *extended |= can && option == NBD_OPT_EXTENDED_HEADERS;
        if (option == NBD_OPT_STARTTLS && s->tls_version) {
            if (!option_reply(fd, option, NBD_REP_ACK, NULL, 0))
                return false;
            me->tls = true;
            me->fd = fd = fake_tls_start(s, fd, me->number);
            continue;
        }
        uint32_t error = NBD_REPLY_ERROR | (option == NBD_OPT_GO ? NBD_ERR_UNKNOWN : NBD_ERR_UNSUP);

        if (!option_reply(fd, option, can ? NBD_REP_ACK : error, NULL, 0))
            return false;
    }
    return false;
}

static bool more(int fd, int wait_ms)
{
    struct pollfd p = { .fd = fd, .events = POLLIN };

    return poll(&p, 1, wait_ms) > 0;
}

static bool is_deaf(const struct connection *me)
{
    return me->number < load_relaxed(&me->s->deaf);
}

/* Wait for something to read, or for the end; false: the server stops. */
static bool listen_for(const struct connection *me)
{
    while (!load_relaxed(&me->s->stopping))
        if (is_deaf(me))
            usleep(1000);
        else if (more(me->fd, 5) && !is_deaf(me))
            return true;
    return false;
}

static uint32_t disk_error(const struct fake_nbd *s, const struct command *c)
{
    uint64_t end = load_relaxed(&s->bad_end);

    return end && c->offset >= end ? 0 : load_relaxed(&s->disk_error);
}

/* Read a command and do it; false: the connection ends. */
static bool serve(const struct connection *me, bool extended, struct command *c, uint8_t *buffer)
{
    struct fake_nbd *s = me->s;
    int fd = me->fd;
    uint8_t header[32];

    if (!listen_for(me) || !get(fd, header, extended ? 32 : 28))
        return false;
    c->flags = get16(header + 4);
    c->type = get16(header + 6);
    c->cookie = get64(header + 8);
    c->offset = get64(header + 16);
    c->length = extended ? get64(header + 24) : get32(header + 24);
    if (get32(header) != (extended ? NBD_EXTENDED_REQUEST_MAGIC : NBD_REQUEST_MAGIC) || c->offset > me->size ||
        c->length > me->size - c->offset || (c->offset | c->length) % s->min_block ||
        (c->type <= NBD_WRITE && (!c->length || c->length > s->max_payload)) ||
        (extended && c->type == NBD_WRITE && !(c->flags & NBD_CMD_PAYLOAD_LENGTH))) {
        count(&s->violations);
        return false;
    }
    if (load_relaxed(&s->poison) && c->offset == load_relaxed(&s->poison))
        return false;
    if (c->flags & NBD_CMD_FUA)
        count(&s->fuas);
    c->error = disk_error(s, c);
    switch (c->type) {
    case NBD_READ:
        count(&s->reads);
        return true;
    case NBD_WRITE:
        count(&s->writes);
        if (fake_nbd_take_misdeed(s, true)) {
            fake_nbd_give(fd, buffer, fake_nbd_answer(s, buffer, false, extended, c));
            usleep(100000);
            return false;
        }
        if (!get(fd, buffer, c->length))
            return false;
        if (c->error)
            return true;
        pthread_mutex_lock(&s->lock);
        memcpy(s->image + c->offset, buffer, c->length);
        pthread_mutex_unlock(&s->lock);
        return true;
    case NBD_FLUSH:
        count(&s->flushes);
        return true;
    case NBD_TRIM:
        count(&s->trims);
        return true;
    case NBD_WRITE_ZEROES:
        count(&s->zeroes);
        if (c->flags & NBD_CMD_NO_HOLE)
            count(&s->no_holes);
        pthread_mutex_lock(&s->lock);
        memset(s->image + c->offset, 0, c->length);
        pthread_mutex_unlock(&s->lock);
        return true;
    case NBD_DISCONNECT:
        count(&s->goodbyes);
        return false;
    default:
        return false;
    }
}

static void *serve_connection(void *argument)
{
    struct connection *me = argument;
    struct fake_nbd *s = me->s;
    struct command commands[TOGETHER_MAX];
    uint8_t *buffer = malloc(4 * MIB);
    bool structured = false, extended = false;
    bool going = !me->unwelcome && negotiate(me, &structured, &extended);

    while (going) {
        uint32_t n = 0;

        do
            going = serve(me, extended, &commands[n++], buffer);
        while (going && n < TOGETHER_MAX && load_relaxed(&s->reverse) && more(me->fd, 5));
        while (load_relaxed(&s->hold) && !load_relaxed(&s->stopping))
            if (more(me->fd, 5))
                break; /* takes more, or sees the end */
        if (load_relaxed(&s->hold))
            continue;
        for (uint32_t i = 0; i < n - !going && going; i++)
            going = fake_nbd_reply(s, me->fd, structured, extended, &commands[load_relaxed(&s->reverse) ? n - 1 - i : i], buffer);
    }
    shutdown(me->fd, SHUT_RDWR);
    if (!me->unwelcome)
        usleep(s->forgets_ms * 1000);
    pthread_mutex_lock(&s->lock);
    if (!me->tls) /* else the socket is fake_tls.h's, for the plain bytes' other end to be closed by it */
        s->sockets[me->place] = -1;
    close(me->fd);
    s->alive--;
    pthread_mutex_unlock(&s->lock);
    free(buffer);
    free(me);
    return NULL;
}

static void *accept_connections(void *argument)
{
    struct fake_nbd *s = argument;
    int fd;

    while ((fd = accept(s->listener, NULL, NULL)) >= 0) {
        struct connection *connection = malloc(sizeof(*connection));
        pthread_t thread;

        pthread_mutex_lock(&s->lock);
        *connection = (struct connection){ .s = s, .fd = fd, .place = (int)(s->connections % FAKE_CONNECTIONS),
                                           .number = s->connections,
                                           .unwelcome = s->limit && s->alive >= s->limit };
        s->sockets[connection->place] = fd;
        s->alive++;
        store_relaxed(&s->connections, s->connections + 1);
        CHECK(!pthread_create(&thread, NULL, serve_connection, connection));
        pthread_detach(thread);
        pthread_mutex_unlock(&s->lock);
    }
    return NULL;
}

void fake_nbd_misbehave(struct fake_nbd *s, int misdeed, uint32_t skip)
{
    pthread_mutex_lock(&s->lock);
    s->misdeed = misdeed;
    s->skip = skip;
    pthread_mutex_unlock(&s->lock);
}

void fake_nbd_settle(struct fake_nbd *s)
{
    pthread_mutex_lock(&s->lock);
    pthread_mutex_unlock(&s->lock);
}

static void listen_at(struct fake_nbd *s, const void *address, socklen_t length)
{
    CHECK(!bind(s->listener, address, length) && !listen(s->listener, 16));
}

static void listen_unix(struct fake_nbd *s)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };

    strcpy(address.sun_path, s->path);
    unlink(s->path);
    s->listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    listen_at(s, &address, sizeof(address));
}

static void listen_tcp(struct fake_nbd *s)
{
    socklen_t length = sizeof(s->address);
    const int on = 1;

    s->listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK(!setsockopt(s->listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)) &&
          !setsockopt(s->listener, SOL_SOCKET, SO_RCVBUF, &s->receive_bytes, sizeof(s->receive_bytes)));
    listen_at(s, &s->address, length);
    CHECK(!getsockname(s->listener, (struct sockaddr *)&s->address, &length));
    fake_lookup(&s->address, 1, 0);
}

void fake_nbd_restart(struct fake_nbd *s)
{
    store_relaxed(&s->stopping, false);
    if (s->path[0])
        listen_unix(s);
    else
        listen_tcp(s);
    CHECK(!pthread_create(&s->thread, NULL, accept_connections, s));
}

static void set_up(struct fake_nbd *s, uint64_t size)
{
    s->image = calloc(1, size);
    s->size = size;
    s->structured = true;
    s->flags = ALL_FLAGS;
    s->min_block = 1;
    s->max_payload = 32 * MIB;
    pthread_mutex_init(&s->lock, NULL);
    for (int i = 0; i < FAKE_CONNECTIONS; i++)
        s->sockets[i] = -1;
    fake_nbd_restart(s);
}

void fake_nbd_open(struct fake_nbd *s, uint64_t size)
{
    const char *folder = getenv("TEST_DIRECTORY") ? getenv("TEST_DIRECTORY") : "/tmp";

    memset(s, 0, sizeof(*s));
    /* Names of sockets are short, and those of test folders long. */
    snprintf(s->path, sizeof(s->path), "%.60s/nbd-%d", strlen(folder) < 60 ? folder : "/tmp", (int)getpid());
    set_up(s, size);
}

void fake_nbd_open_tcp(struct fake_nbd *s, uint64_t size)
{
    memset(s, 0, sizeof(*s));
    s->address = (struct sockaddr_in){ .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    s->receive_bytes = 4096;
    set_up(s, size);
}

static uint32_t pumps(struct fake_nbd *s)
{
    pthread_mutex_lock(&s->lock);
    uint32_t count = s->pumps;

    pthread_mutex_unlock(&s->lock);
    return count;
}

void fake_nbd_kill(struct fake_nbd *s)
{
    store_relaxed(&s->stopping, true);
    shutdown(s->listener, SHUT_RDWR);
    pthread_join(s->thread, NULL);
    close(s->listener);
    if (s->path[0])
        unlink(s->path);
    pthread_mutex_lock(&s->lock);
    for (int i = 0; i < FAKE_CONNECTIONS; i++)
        if (s->sockets[i] >= 0)
            shutdown(s->sockets[i], SHUT_RDWR);
    pthread_mutex_unlock(&s->lock);
    while (fake_nbd_alive(s) || pumps(s))
        harness_breathe();
}

void fake_nbd_cut(struct fake_nbd *s, uint32_t number)
{
    pthread_mutex_lock(&s->lock);
    shutdown(s->sockets[number], SHUT_RDWR);
    pthread_mutex_unlock(&s->lock);
}

void fake_nbd_babble(struct fake_nbd *s, uint32_t number)
{
    static const uint8_t nonsense[NBD_SIMPLE_BYTES]; /* all of it is read: bytes left behind would reset the connection */

    pthread_mutex_lock(&s->lock);
    CHECK(fake_nbd_give(s->sockets[number], nonsense, sizeof(nonsense)));
    pthread_mutex_unlock(&s->lock);
}

uint32_t fake_nbd_alive(struct fake_nbd *s)
{
    pthread_mutex_lock(&s->lock);
    uint32_t alive = s->alive;

    pthread_mutex_unlock(&s->lock);
    return alive;
}

uint32_t fake_nbd_unread(struct fake_nbd *s, uint32_t number)
{
    int bytes = 0;

    pthread_mutex_lock(&s->lock);
    CHECK(!ioctl(s->sockets[number], FIONREAD, &bytes));
    pthread_mutex_unlock(&s->lock);
    return (uint32_t)bytes;
}

void fake_nbd_close(struct fake_nbd *s)
{
    fake_nbd_kill(s);
    free(s->image);
}

struct vd_nbd_config fake_nbd_config(const struct fake_nbd *s)
{
    static const char host[] = "fake.example", service[] = "10809"; /* fake_lookup.h knows where that is */

    return s->path[0] ? (struct vd_nbd_config){ .socket = s->path, .export_name = "disk" }
                      : (struct vd_nbd_config){ .host = host, .service = service, .export_name = "disk" };
}
