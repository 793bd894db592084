#include "fake_nbd.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "backends/nbd/wire.h"

enum { TOGETHER_MAX = 128, ALL_FLAGS = 0x1ed };

struct command {
    uint16_t flags, type;
    uint64_t cookie, offset, length;
};

struct connection {
    struct fake_nbd *s;
    int fd, place;
    uint64_t size; /* of the export, as it was said: no growth changes it */
};

static bool get(int fd, void *to, size_t n)
{
    return !n || recv(fd, to, n, MSG_WAITALL) == (ssize_t)n;
}

static bool give(int fd, const void *from, size_t n)
{
    return !n || send(fd, from, n, MSG_NOSIGNAL) == (ssize_t)n;
}

static bool option_reply(int fd, uint32_t option, uint32_t type, const void *data, uint32_t length)
{
    uint8_t header[20];

    put64(header, NBD_OPTION_REPLY_MAGIC);
    put32(header + 8, option);
    put32(header + 12, type);
    put32(header + 16, length);
    return give(fd, header, sizeof(header)) && give(fd, data, length);
}

static bool say_export(struct connection *me)
{
    struct fake_nbd *s = me->s;
    int fd = me->fd;
    uint8_t export[12] = { 0 }, sizes[14] = { 0 };

    if (load_relaxed(&s->refuse)) {
        option_reply(fd, NBD_OPT_GO, NBD_REPLY_ERROR | NBD_ERR_UNKNOWN, NULL, 0);
        return false;
    }
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
    if (!give(fd, greeting, sizeof(greeting)) || !get(fd, flags, sizeof(flags)))
        return false;
    *structured = *extended = false;
    while (get(fd, header, sizeof(header))) {
        uint32_t option = get32(header + 8), length = get32(header + 12);
        bool can = (option == NBD_OPT_STRUCTURED_REPLY && s->structured) ||
                   (option == NBD_OPT_EXTENDED_HEADERS && s->extended);

        if (length > sizeof(data) || !get(fd, data, length))
            return false;
        if (option == NBD_OPT_GO)
            return say_export(me);
        *structured |= can;
        *extended |= can && option == NBD_OPT_EXTENDED_HEADERS;
        if (!option_reply(fd, option, can ? NBD_REP_ACK : NBD_REPLY_ERROR | NBD_ERR_UNSUP, NULL, 0))
            return false;
    }
    return false;
}

/* A chunk's header; returns its length. */
static size_t chunk(uint8_t *to, bool extended, uint16_t flags, uint16_t type, const struct command *c, uint64_t length)
{
    put32(to, extended ? NBD_EXTENDED_REPLY_MAGIC : NBD_STRUCTURED_REPLY_MAGIC);
    put16(to + 4, flags);
    put16(to + 6, type);
    put64(to + 8, c->cookie);
    if (!extended) {
        put32(to + 16, (uint32_t)length);
        return NBD_STRUCTURED_BYTES;
    }
    put64(to + 16, c->offset);
    put64(to + 24, length);
    return NBD_EXTENDED_BYTES;
}

static size_t simple(uint8_t *to, uint64_t cookie, uint32_t error)
{
    put32(to, NBD_SIMPLE_REPLY_MAGIC);
    put32(to + 4, error);
    put64(to + 8, cookie);
    return NBD_SIMPLE_BYTES;
}

static size_t data_chunk(struct fake_nbd *s, uint8_t *to, bool extended, uint16_t flags, const struct command *c, uint64_t at,
                         uint64_t bytes)
{
    size_t n = chunk(to, extended, flags, NBD_CHUNK_DATA, c, bytes + 8);

    put64(to + n, at);
    memcpy(to + n + 8, s->image + at, bytes);
    return n + 8 + bytes;
}

static size_t hole_chunk(uint8_t *to, bool extended, uint16_t flags, const struct command *c, uint64_t at, uint64_t bytes)
{
    size_t n = chunk(to, extended, flags, NBD_CHUNK_HOLE, c, 12);

    put64(to + n, at);
    put32(to + n + 8, (uint32_t)bytes);
    return n + 12;
}

/* A read's answer in pieces of 1024 bytes, last first; those of zeros as holes. */
static size_t in_fragments(struct fake_nbd *s, uint8_t *to, bool extended, const struct command *c)
{
    size_t n = 0;

    for (uint64_t left = c->length; left;) {
        uint64_t bytes = left % 1024 ? left % 1024 : 1024, at = c->offset + left - bytes;
        bool zero = s->holes && is_byte(s->image + at, bytes, 0);

        left -= bytes;
        n += zero ? hole_chunk(to + n, extended, 0, c, at, bytes) : data_chunk(s, to + n, extended, 0, c, at, bytes);
    }
    return n + chunk(to + n, extended, NBD_CHUNK_DONE, NBD_CHUNK_NONE, c, 0);
}

static size_t answer_error(uint8_t *to, bool structured, bool extended, const struct command *c, uint32_t error, const char *text)
{
    if (!structured)
        return simple(to, c->cookie, error);
    size_t n = chunk(to, extended, NBD_CHUNK_DONE, NBD_CHUNK_ERROR | 1, c, 6 + strlen(text));

    put32(to + n, error);
    put16(to + n + 4, (uint16_t)strlen(text));
    memcpy(to + n + 6, text, strlen(text));
    return n + 6 + strlen(text);
}

/* The right answer; returns its length. */
static size_t answer(struct fake_nbd *s, uint8_t *to, bool structured, bool extended, const struct command *c)
{
    size_t n;

    if (c->type != NBD_READ)
        return extended ? chunk(to, true, NBD_CHUNK_DONE, NBD_CHUNK_NONE, c, 0) : simple(to, c->cookie, 0);
    if (structured)
        return s->fragments ? in_fragments(s, to, extended, c)
                            : data_chunk(s, to, extended, NBD_CHUNK_DONE, c, c->offset, c->length);
    n = simple(to, c->cookie, 0);
    memcpy(to + n, s->image + c->offset, c->length);
    return n + c->length;
}

static int take_misdeed(struct fake_nbd *s, bool early)
{
    int misdeed = BE_GOOD;

    pthread_mutex_lock(&s->lock);
    if (s->misdeed && (s->misdeed == EARLY) == early && !s->skip--) {
        misdeed = s->misdeed;
        s->skip = 0;
        s->misdeed = BE_GOOD;
    }
    pthread_mutex_unlock(&s->lock);
    return misdeed;
}

/* Answer, rightly or as told; false: the connection ends. */
static bool reply(struct fake_nbd *s, int fd, bool structured, bool extended, const struct command *c, uint8_t *buffer)
{
    size_t n, base = extended ? 32 : 20;

    pthread_mutex_lock(&s->lock);
    n = answer(s, buffer, structured, extended, c);
    pthread_mutex_unlock(&s->lock);
    switch (take_misdeed(s, false)) {
    case CLOSE:
        return false;
    case HALF:
        give(fd, buffer, n / 2);
        return false;
    case BAD_MAGIC:
        buffer[0] ^= 0xff;
        break;
    case BAD_COOKIE:
        buffer[15] ^= 0x3f;
        break;
    case TWICE:
        if (!give(fd, buffer, n))
            return false;
        break;
    case ABSURD:
        put32(buffer + (extended ? 28 : 16), 0x7fffffff);
        break;
    case OUTSIDE:
        put64(buffer + base, c->offset - 4096);
        break;
    case TOO_MUCH:
        n = data_chunk(s, buffer, extended, 0, c, c->offset, c->length);
        n += data_chunk(s, buffer + n, extended, 0, c, c->offset, c->length);
        break;
    case MISSING:
        n = chunk(buffer, extended, NBD_CHUNK_DONE, NBD_CHUNK_NONE, c, 0);
        break;
    case UNKNOWN_TYPE:
        n = chunk(buffer, extended, NBD_CHUNK_DONE, 77, c, 0);
        break;
    case FAIL_EIO:
        n = answer_error(buffer, structured, extended, c, EIO, "");
        break;
    case FAIL_SHUTDOWN:
        n = answer_error(buffer, structured, extended, c, ESHUTDOWN, "");
        break;
    case FAIL_EIO_WITH_TEXT:
        n = data_chunk(s, buffer, extended, 0, c, c->offset, c->length / 2);
        n += answer_error(buffer + n, structured, extended, c, EIO, "the disk is on fire");
        break;
    default:
        break;
    }
    return give(fd, buffer, n);
}

static void count(uint32_t *counter)
{
    __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED);
}

/* Read a command and do it; false: the connection ends. */
static bool serve(const struct connection *me, bool extended, struct command *c, uint8_t *buffer)
{
    struct fake_nbd *s = me->s;
    int fd = me->fd;
    uint8_t header[32];

    if (!get(fd, header, extended ? 32 : 28))
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
    if (c->flags & NBD_CMD_FUA)
        count(&s->fuas);
    switch (c->type) {
    case NBD_READ:
        count(&s->reads);
        return true;
    case NBD_WRITE:
        count(&s->writes);
        if (take_misdeed(s, true)) {
            give(fd, buffer, answer(s, buffer, false, extended, c));
            usleep(100000);
            return false;
        }
        if (!get(fd, buffer, c->length))
            return false;
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
    default:
        return false;
    }
}

static bool more(int fd, int wait_ms)
{
    struct pollfd p = { .fd = fd, .events = POLLIN };

    return poll(&p, 1, wait_ms) > 0;
}

static void *serve_connection(void *argument)
{
    struct connection *me = argument;
    struct fake_nbd *s = me->s;
    struct command commands[TOGETHER_MAX];
    uint8_t *buffer = malloc(4 * MIB);
    bool structured = false, extended = false, going = negotiate(me, &structured, &extended);

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
            going = reply(s, me->fd, structured, extended, &commands[load_relaxed(&s->reverse) ? n - 1 - i : i], buffer);
    }
    pthread_mutex_lock(&s->lock);
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
        *connection = (struct connection){ .s = s, .fd = fd, .place = (int)(s->connections % FAKE_CONNECTIONS) };
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

void fake_nbd_restart(struct fake_nbd *s)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };

    store_relaxed(&s->stopping, false);
    strcpy(address.sun_path, s->path);
    unlink(s->path);
    s->listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK(!bind(s->listener, (struct sockaddr *)&address, sizeof(address)) && !listen(s->listener, 16));
    CHECK(!pthread_create(&s->thread, NULL, accept_connections, s));
}

void fake_nbd_open(struct fake_nbd *s, uint64_t size)
{
    const char *folder = getenv("TEST_DIRECTORY") ? getenv("TEST_DIRECTORY") : "/tmp";

    memset(s, 0, sizeof(*s));
    /* Names of sockets are short, and those of test folders long. */
    snprintf(s->path, sizeof(s->path), "%.60s/nbd-%d", strlen(folder) < 60 ? folder : "/tmp", (int)getpid());
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

void fake_nbd_kill(struct fake_nbd *s)
{
    store_relaxed(&s->stopping, true);
    shutdown(s->listener, SHUT_RDWR);
    pthread_join(s->thread, NULL);
    close(s->listener);
    unlink(s->path);
    pthread_mutex_lock(&s->lock);
    for (int i = 0; i < FAKE_CONNECTIONS; i++)
        if (s->sockets[i] >= 0)
            shutdown(s->sockets[i], SHUT_RDWR);
    pthread_mutex_unlock(&s->lock);
    for (bool alive = true; alive;) {
        harness_breathe();
        pthread_mutex_lock(&s->lock);
        alive = s->alive;
        pthread_mutex_unlock(&s->lock);
    }
}

void fake_nbd_cut(struct fake_nbd *s, uint32_t number)
{
    pthread_mutex_lock(&s->lock);
    shutdown(s->sockets[number], SHUT_RDWR);
    pthread_mutex_unlock(&s->lock);
}

void fake_nbd_close(struct fake_nbd *s)
{
    fake_nbd_kill(s);
    free(s->image);
}

struct vd_nbd_config fake_nbd_config(const struct fake_nbd *s)
{
    return (struct vd_nbd_config){ .socket = s->path, .export_name = "disk" };
}
