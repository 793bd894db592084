/*
 * A hostile NBD server, against the backend's own handshake and data path. The input says what the server says: raw bytes of a
 * handshake, or requests of the driver and replies to them that are almost right, in any order and in pieces of any size.
 *
 * What io_uring and the queue's loop do is done here by hand, so that each step is the input's choice. A request's memory is freed
 * when it ends: whoever touches it later, a send that is still under way too, is found by the sanitizer. Whatever has
 * happened, a good server that comes after it brings every request to its end, and so does a queue that is given up.
 */
#include <errno.h>
#include <linux/virtio_blk.h>
#include <poll.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "backends/nbd/exchange.h"
#include "world.h"

enum {
    REQUESTS = 8,
    PIECES = 3,
    DISK_BYTES = 4 << 20,
    STREAM_BYTES = 1 << 20,
    ROUNDS_MAX = 100000,
    GOOD_FLAGS = NBD_FLAG_HAS_FLAGS | NBD_FLAG_FLUSH | NBD_FLAG_FUA | NBD_FLAG_TRIM | NBD_FLAG_WRITE_ZEROES,
};

/* What the backend's queue is here. */
struct vd_queue {
    void *backend;
    struct vd_queue_config config;
    struct vd_remote_stats stats;
    uint32_t in_flight;
    bool abandoned, memory_lost;
};

static struct vd_queue queue;
static struct nbd nbd;
static struct nbd_export export;
static struct vd_request requests[REQUESTS];
static struct vd_extent extents[REQUESTS];
static struct iovec pieces[REQUESTS][PIECES];
static void *memory[REQUESTS][PIECES]; /* NULL: not in flight */
static uint8_t stream[STREAM_BYTES];   /* from the server, and not received yet */
static uint32_t stream_bytes;
static uint8_t sink[STREAM_BYTES];     /* where what is sent goes */
static int any_fd;

struct io_uring_sqe *vd_queue_sqe(struct vd_queue *q)
{
    static struct io_uring_sqe sqe;

    (void)q;
    return &sqe;
}

void vd_sqe_of_event(struct io_uring_sqe *sqe, unsigned event)
{
    sqe->user_data = event;
}

void vd_queue_wake(struct vd_queue *q)
{
    (void)q;
}

void vd_request_finish(struct vd_queue *q, struct vd_request *r, int error)
{
    void **of = memory[r - requests];

    REQUIRE(of[0] && error >= 0);
    for (int i = 0; i < PIECES; i++) {
        free(of[i]);
        of[i] = NULL;
    }
    q->in_flight--;
}

bool vd_request_wait(struct vd_queue *q, struct vd_request *r, int error)
{
    (void)q;
    (void)r;
    (void)error;
    return false;
}

uint32_t vd_request_index(const struct vd_queue *q, const struct vd_request *r)
{
    (void)q;
    return (uint32_t)(r - requests);
}

void vd_queue_fault(struct vd_queue *q, enum vd_queue_fault fault)
{
    q->memory_lost |= fault == VD_FAULT_MEMORY;
}

bool vd_queue_memory_lost(const struct vd_queue *q)
{
    return q->memory_lost;
}

bool vd_queue_is_abandoned(const struct vd_queue *q)
{
    return q->abandoned;
}

bool vd_queue_replays(const struct vd_queue *q)
{
    (void)q;
    return false;
}

void *vd_queue_volume(const struct vd_queue *q)
{
    (void)q;
    return &nbd;
}

void *vd_queue_backend(const struct vd_queue *q)
{
    return q->backend;
}

void vd_queue_set_backend(struct vd_queue *q, void *backend)
{
    q->backend = backend;
}

const struct vd_queue_config *vd_queue_config_of(const struct vd_queue *q)
{
    return &q->config;
}

struct vd_remote_stats *vd_queue_remote(struct vd_queue *q)
{
    return &q->stats;
}

uint64_t vd_queue_now_ns(const struct vd_queue *q)
{
    (void)q;
    return now_ns();
}

uint64_t vd_queue_away_ns(const struct vd_queue *q)
{
    (void)q;
    return 0;
}

void vd_queue_cancel_event(struct vd_queue *q, unsigned event)
{
    nbd_event(q, event, -ECANCELED);
}

unsigned vd_queue_await_event(struct vd_queue *q, int *result)
{
    const struct nbd_queue *own = q->backend;

    *result = -ECANCELED;
    return own->sending ? NBD_SEND : own->receiving ? NBD_RECEIVE : NBD_WATCH;
}

static struct nbd_queue *nq(void)
{
    return queue.backend;
}

static void submit(struct input *in)
{
    static const enum vd_operation operations[] = { VD_READ, VD_WRITE, VD_FLUSH, VD_DISCARD, VD_WRITE_ZEROES };
    uint32_t index = (uint32_t)take(in, 1) % REQUESTS, how = (uint32_t)take(in, 1);
    uint64_t offset = take(in, 1) * 512, sectors = 1 + take(in, 1);
    struct vd_request *r = &requests[index];

    if (memory[index][0])
        return;
    *r = (struct vd_request){ .operation = operations[how % 5], .offset = offset, .storage = pieces[index],
                              .data = pieces[index], .extents = &extents[index] };
    memory[index][0] = malloc(1);
    if (r->operation == VD_READ || r->operation == VD_WRITE) {
        r->length = sectors * 512 * (how & 0x80 ? 4 : 1);
        r->data_count = 1 + (how >> 4) % PIECES;
        for (uint32_t i = 0; i < r->data_count; i++) {
            uint64_t rest = r->length - 100 * i, bytes = i + 1 < r->data_count ? 100 : rest;

            free(memory[index][i]);
            memory[index][i] = calloc(1, bytes);
            pieces[index][i] = (struct iovec){ memory[index][i], bytes };
        }
    } else if (r->operation != VD_FLUSH) {
        extents[index] = (struct vd_extent){ offset, sectors * 512, how & 0x80 };
        r->extent_count = 1;
    }
    queue.in_flight++;
    nbd_submit(&queue, r);
}

static void append(const void *from, uint64_t bytes)
{
    if (bytes > STREAM_BYTES - stream_bytes)
        bytes = STREAM_BYTES - stream_bytes;
    if (from)
        memcpy(stream + stream_bytes, from, bytes);
    else
        memset(stream + stream_bytes, 0xa5, bytes);
    stream_bytes += (uint32_t)bytes;
}

static void simple(uint64_t cookie, uint32_t error, uint64_t payload)
{
    uint8_t header[NBD_SIMPLE_BYTES];

    put32(header, NBD_SIMPLE_REPLY_MAGIC);
    put32(header + 4, error);
    put64(header + 8, cookie);
    append(header, sizeof(header));
    append(NULL, payload);
}

/* A chunk: head bytes that its type has, and payload. */
static void chunk(uint64_t cookie, bool extended, uint16_t flags, uint16_t type, const uint8_t *head, uint32_t head_bytes,
                  uint64_t payload)
{
    uint8_t header[NBD_EXTENDED_BYTES] = { 0 };

    put32(header, extended ? NBD_EXTENDED_REPLY_MAGIC : NBD_STRUCTURED_REPLY_MAGIC);
    put16(header + 4, flags);
    put16(header + 6, type);
    put64(header + 8, cookie);
    if (extended)
        put64(header + 24, head_bytes + payload);
    else
        put32(header + 16, (uint32_t)(head_bytes + payload));
    append(header, extended ? NBD_EXTENDED_BYTES : NBD_STRUCTURED_BYTES);
    append(head, head_bytes);
    append(NULL, payload);
}

static void reply(struct input *in)
{
    uint8_t how = (uint8_t)take(in, 1), head[12] = { 0 };
    const struct nbd_slot *slot = &nq()->slots[take(in, 1) % REQUESTS];
    uint64_t cookie = slot->cookie, at = slot->offset, bytes = slot->length;
    bool extended = export.extended, spoilt = how & 0x80;
    uint16_t done = how & 0x40 ? NBD_CHUNK_DONE : 0;

    if (how & 0x20) { /* a part of it */
        at += take(in, 1) * 512;
        bytes = take(in, 1) * 512;
    }
    if (spoilt)
        switch (take(in, 1) % 5) {
        case 0:
            cookie ^= take(in, 8);
            break;
        case 1:
            at = take(in, 8);
            break;
        case 2:
            bytes = take(in, 3);
            break;
        case 3:
            extended = !extended;
            break;
        default:
            done = (uint16_t)take(in, 2);
        }
    put64(head, at);
    put32(head + 8, (uint32_t)bytes);
    switch (how & 7) {
    case 0:
        simple(cookie, 0, slot->type == NBD_READ ? bytes : 0);
        break;
    case 1:
        simple(cookie, (uint32_t)take(in, 1), 0);
        break;
    case 2:
        chunk(cookie, extended, done, NBD_CHUNK_DATA, head, 8, bytes);
        break;
    case 3:
        chunk(cookie, extended, done, NBD_CHUNK_HOLE, head, 12, 0);
        break;
    case 4:
        chunk(cookie, extended, NBD_CHUNK_DONE, NBD_CHUNK_NONE, NULL, 0, 0);
        break;
    case 5:
        put32(head, (uint32_t)take(in, 1));
        chunk(cookie, extended, done, NBD_CHUNK_ERROR | 1, head, 6, take(in, 1));
        break;
    case 6:
        chunk(cookie, extended, done, (uint16_t)take(in, 2), head, (uint32_t)take(in, 1) % 12, take(in, 1));
        break;
    default:
        for (uint64_t i = take(in, 1) % 64; i; i--) {
            uint8_t byte = (uint8_t)take(in, 1);

            append(&byte, 1);
        }
    }
}

/* A connection, if the backend waits for one. */
static void connect_it(void)
{
    if (!nq()->asked || nq()->ready)
        return;
    nbd.wanting = nq()->next_wanting;
    nq()->fresh = (struct nbd_link){ .fd = dup(any_fd), .export = export };
    nq()->ready = true;
    stream_bytes = 0;
}

/* Move up to bytes between the message's pieces and a place that has room for them, as the kernel would; returns how many. */
static uint32_t move(const struct msghdr *message, uint8_t *place, uint32_t bytes, bool send)
{
    uint32_t moved = 0;

    for (size_t i = 0; i < message->msg_iovlen && moved < bytes; i++) {
        struct iovec piece = message->msg_iov[i];
        size_t n = piece.iov_len < bytes - moved ? piece.iov_len : bytes - moved;

        memcpy(send ? place + moved : piece.iov_base, send ? piece.iov_base : place + moved, n);
        moved += (uint32_t)n;
    }
    return moved;
}

static void sent(uint32_t bytes)
{
    if (nq()->sending)
        nbd_event(&queue, NBD_SEND, (int)move(&nq()->send_message, sink, bytes, true));
}

static void received(uint32_t bytes)
{
    uint32_t n;

    if (!nq()->receiving || !stream_bytes)
        return;
    n = move(&nq()->receive_message, stream, bytes < stream_bytes ? bytes : stream_bytes, false);
    stream_bytes -= n;
    memmove(stream, stream + n, stream_bytes);
    nbd_event(&queue, NBD_RECEIVE, (int)n);
}

/* The connection ends: so does what is under way. */
static void end(void)
{
    if (nq()->receiving)
        nbd_event(&queue, NBD_RECEIVE, 0);
    if (nq()->sending)
        nbd_event(&queue, NBD_SEND, -EPIPE);
    if (nq()->watching)
        nbd_event(&queue, NBD_WATCH, POLLRDHUP);
}

static void turn(void)
{
    nbd_turn(&queue);
    if (nq()->broken) /* and shut down: the kernel ends what it has */
        end();
}

/* Some of it, and mostly all. */
static uint32_t amount(struct input *in)
{
    uint32_t how = (uint32_t)take(in, 1);

    return how & 0x80 ? STREAM_BYTES : how & 0x40 ? (how & 0x3f) * 512 + 1 : how + 1;
}

static void step(struct input *in)
{
    switch (take(in, 1) % 8) {
    case 0:
    case 1:
        submit(in);
        break;
    case 2:
    case 3:
    case 4:
        reply(in);
        break;
    case 5:
        sent(amount(in));
        break;
    case 6:
        received(amount(in));
        break;
    default:
        if (take(in, 1) % 8 == 0)
            end();
        connect_it();
    }
    turn();
}

/* After all that, a good server, to which everything is said once more. */
static void make_good(void)
{
    export = (struct nbd_export){ .size_bytes = DISK_BYTES, .flags = GOOD_FLAGS, .min_block = export.min_block,
                                  .max_payload = 65536 };
    turn();
    end();
    for (int round = 0; queue.in_flight; round++) {
        REQUIRE(round < ROUNDS_MAX);
        turn();
        connect_it();
        turn();
        while (nq()->sending)
            sent(STREAM_BYTES);
        for (const struct nbd_slot *slot = nq()->sent.first; slot; slot = slot->next)
            simple(slot->cookie, 0, slot->type == NBD_READ ? slot->length : 0);
        while (stream_bytes && nq()->state == NBD_UP) {
            if (!nq()->receiving)
                nbd_receive(nq());
            REQUIRE(nq()->receiving || !stream_bytes);
            received(STREAM_BYTES);
        }
    }
}

/* Or nobody waits any more, and the driver's memory is taken away. */
static void abandon(void)
{
    for (int i = 0; i < REQUESTS; i++)
        for (int k = 0; memory[i][0] && k < PIECES; k++) {
            free(memory[i][k]);
            memory[i][k] = k ? NULL : malloc(1);
        }
    queue.abandoned = true;
    if (nq()->sending)
        nbd_event(&queue, NBD_SEND, 1);
    REQUIRE(!nq()->sending);
    turn();
    turn();
    REQUIRE(!queue.in_flight);
}

static void begin(bool flush)
{
    memset(&nbd, 0, sizeof(nbd));
    memset(&queue, 0, sizeof(queue));
    pthread_mutex_init(&nbd.lock, NULL);
    pthread_cond_init(&nbd.changed, NULL);
    nbd.config.event_fd = -1;
    queue.config.size = REQUESTS;
    queue.config.features = (uint64_t)flush << VIRTIO_BLK_F_FLUSH;
    stream_bytes = 0;
    REQUIRE(!nbd_queue_open(&queue));
}

static void finish(bool good)
{
    if (good)
        make_good();
    else
        abandon();
    end();
    turn();
    nbd_queue_close(&queue);
}

/* A server that says the input's bytes, in the handshake and after it. */
static void converse(struct input *in)
{
    static const uint8_t plan[] = { 0, 0, 0, 8, 1, 1, 8, 8, 2, 0x10, 4, 255, 3, 2, 0, 0, 4, 0x23, 1, 9 };
    struct input requests_of = { plan, sizeof(plan) };
    struct nbd_stream s = { .cancel_fd = -1, .deadline_ns = now_ns() + 10000000000ull };
    struct nbd_target target = { .export = (char *)"disk" };
    char reason[NBD_REASON_BYTES] = "";
    int fds[2];

    REQUIRE(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds));
    REQUIRE(write(fds[1], in->data, in->left) == (ssize_t)in->left && !shutdown(fds[1], SHUT_WR));
    s.fd = fds[0];
    int error = nbd_negotiate(&s, &target, &export, reason);

    REQUIRE(error <= 0 && memchr(reason, 0, sizeof(reason)) && (!error || reason[0]));
    if (!error) {
        REQUIRE(export.size_bytes && export.size_bytes <= INT64_MAX && export.min_block && export.min_block <= NBD_BLOCK_MAX &&
                !(export.min_block & (export.min_block - 1)) && export.max_payload >= export.min_block);
        begin(true);
        while (requests_of.left)
            submit(&requests_of);
        connect_it();
        turn();
        sent(STREAM_BYTES);
        for (ssize_t n; (n = read(fds[0], stream + stream_bytes, 4096)) > 0;)
            stream_bytes += (uint32_t)n;
        for (int i = 0; i < 64 && stream_bytes; i++) {
            received(STREAM_BYTES);
            turn();
        }
        finish(true);
    }
    close(fds[0]);
    close(fds[1]);
}

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc;
    (void)argv;
    any_fd = eventfd(0, EFD_CLOEXEC);
    REQUIRE(any_fd >= 0);
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const uint32_t blocks[] = { 1, 512, 1024, 4096 }, payloads[] = { 4096, 65536, 1 << 20, UINT32_MAX };
    struct input in = { data, size };
    uint8_t how = (uint8_t)take(&in, 1);
    bool good;

    if (how & 0x80) {
        converse(&in);
        return 0;
    }
    good = take(&in, 1) & 7;
    export = (struct nbd_export){ .size_bytes = DISK_BYTES, .flags = (uint16_t)(NBD_FLAG_HAS_FLAGS | take(&in, 1)),
                                  .structured = how & 3, .extended = (how & 3) == 3, .min_block = blocks[how >> 2 & 3],
                                  .max_payload = payloads[how >> 4 & 3] };
    begin(how & 0x40);
    connect_it();
    turn();
    while (in.left)
        step(&in);
    finish(good);
    return 0;
}
