/*
 * The NBD backend's parts and what they share.
 *
 *   nbd.c         the backend as the engine sees it: open, close, info
 *   connector.c   one thread of the backend: makes connections, again and again, and hands them to queues
 *   dial.c        a socket to the server, and the files of its keys
 *   broker.c      the same, asked of a process that may: the worker may not
 *   negotiate.c   a fresh socket becomes a connection: the protocol's handshake
 *   stream.c      bytes through a socket, plain or TLS, with a deadline
 *   link.c        a queue's connection in use: states, loss, and replay
 *   goodbye.c     how a connection ends: dropped, or with a goodbye
 *   send.c        requests into the socket, many in one system call
 *   receive.c     replies out of the socket, straight into the driver's buffers
 *   reply.c       one reply's header: read and checked
 *   steps.c       a virtio-blk request as one or several NBD commands
 *   partial.c     parts of blocks that are smaller than the server takes: read, changed, written, and nothing else meanwhile
 *   secure.c      send and receive through TLS that the kernel does not do
 *
 * Queue threads own their link, and the connector ends it if they are abandoned; the connector owns what it has not handed
 * over yet. What both touch is behind nbd.lock, which nobody holds while waiting for anything but the lock's own condition.
 */
#ifndef VD_NBD_H
#define VD_NBD_H

#include <openssl/ssl.h>
#include <sys/socket.h>

#include "../../engine.h"
#include "wire.h"

enum {
    NBD_REASON_BYTES = 160,
    NBD_IOV_MAX = 1024,           /* of one system call: UIO_MAXIOV */
    NBD_PREDICTED_MAX = 32,       /* replies whose place is prepared before they are here */
    NBD_SPILL_BYTES = 256 * 1024, /* what may have to be put elsewhere because it was not what was predicted */
    NBD_TLS_BYTES = 64 * 1024,
    NBD_RECORD_BYTES = 16384,     /* of a TLS record at most (RFC 8446, 5.1) */
    NBD_RECORD_PIECES = 16,       /* of memory, that the kernel puts into one at most */
    NBD_RECORDS_MAX = 1 << 24,    /* to be sent with the same keys: AES-GCM is good for 2^24.5 (RFC 8446, 5.5) */
    NBD_BLOCK_MAX = 64 * 1024,    /* smallest unit of a server, the largest that we take */
    NBD_COOKIE_SHIFT = 16,        /* a command's number; below it the slot's */
    NBD_KEYS = 3,                 /* files: CA certificate, our certificate, its key; or PSKs in the first */
};

/* Which goodbye the server would understand now. */
enum nbd_phase { NBD_MUTE, NBD_HAGGLING, NBD_SERVED };

/* A socket with a deadline; ssl is NULL when the bytes in it are plain, or the kernel's TLS makes them so. */
struct nbd_stream {
    int fd;
    SSL *ssl;
    int cancel_fd;       /* readable: give up */
    uint64_t deadline_ns;
    enum nbd_phase phase;
    bool any_tls;        /* not only what OpenSSL can give to the kernel */
    int keys[NBD_KEYS];  /* open, or -1 */
    bool kernel_has_tls;
};

/* What the server says of the export. */
struct nbd_export {
    uint64_t size_bytes; /* of whole blocks */
    uint64_t said_bytes; /* of all of it */
    uint16_t flags;      /* enum nbd_flag */
    uint32_t min_block;  /* bytes; every offset and length is a multiple */
    uint32_t max_payload;
    bool structured, extended;
};

/* A negotiated connection. */
struct nbd_link {
    int fd;
    SSL *ssl;
    bool tls;            /* by us or by the kernel */
    bool kernel_tls;     /* by the kernel, in one direction at least */
    enum nbd_phase phase;
    uint64_t records;    /* of TLS that were sent; at most */
    struct nbd_export export;
};

/* Whom to connect to; strings of our own. */
struct nbd_target {
    char *host, *service, *socket, *export;
    bool tls, write_through;
    uint32_t tls_records;
    char *certificates, *psk_file, *psk_identity, *tls_hostname;
    int broker_fd;       /* who is asked for sockets; -1: we make our own */
};

/* The backend's state. */
struct nbd {
    struct nbd_target target;
    struct vd_config config;     /* its numbers; the strings are not ours */
    int cancel_fd;
    pthread_t thread;
    bool threaded, any_tls; /* of who connects: as in nbd_stream, since it was found to be needed */
    pthread_mutex_t lock;        /* all below */
    pthread_cond_t changed;
    bool closing, finished;
    bool looking;                /* resize waits for what the next connection says, or for why there is none: look_error */
    int look_error;
    struct nbd_queue *queues;    /* all that run */
    uint32_t writers;            /* commands under way that change whole blocks; counted only where blocks are large */
    uint32_t changers;           /* slots that wait to change a part of a block */
    bool changing;               /* one does */
    struct nbd_queue *wanting;   /* queues that wait for a connection */
    struct nbd_link spare[VD_QUEUES_MAX]; /* what open made, and what queues left that have stopped; for those that start */
    uint32_t spares;
    bool flush_failed;           /* once: queues look without the lock */
    struct nbd_export export;    /* what the server said when it was last spoken to; size 0: never */
    uint64_t settle_until_ns;    /* no queue is given a connection before: one that was abandoned has just lost its own */
    uint64_t needed_bytes;       /* an export that is smaller is refused; queues look without the lock */
    struct vd_backend_status status;
};

/* What a slot has of the right to change blocks; partial.c. */
enum nbd_hold { NBD_NO_HOLD, NBD_WAITS, NBD_SHARED, NBD_ALONE };

/* What a request needs next. */
enum nbd_next { NBD_ENDED, NBD_COMMAND, NBD_BLOCKED };

/* A command of a request, under way or waiting; one for each request of the queue. */
struct nbd_slot {
    struct nbd_slot *next, *prev; /* in a list, in order of submission */
    struct vd_request *request;
    uint64_t cookie;
    uint64_t offset, length;
    uint16_t type, flags;
    bool sent;
    bool unstable;                /* something was written that the request must make stable before it ends */
    bool flushed;
    bool in_block;                /* the command moves the queue's block, of which the request needs a part */
    bool block_read;              /* it was read, and is to be written */
    enum nbd_hold hold;
    struct iovec *iov;            /* payload */
    struct iovec block_iov;
    uint32_t iov_count;
    uint32_t send_end;            /* index into send_iov, behind the command's last piece */
    uint32_t received;            /* of a read's payload */
    int error;                    /* positive errno, of a chunk */
    uint64_t sent_ns;
    uint8_t header[NBD_EXTENDED_REQUEST_BYTES];
};

struct nbd_list {
    struct nbd_slot *first, *last;
};

/* A reply's header, read and checked; the numbers are the protocol's. */
struct nbd_reply {
    struct nbd_slot *slot;
    uint32_t header_bytes;
    uint32_t at;          /* where its payload or hole begins in the command's */
    uint32_t payload;     /* bytes that follow the header and belong into the command's buffers */
    uint32_t hole;        /* zeros that do not follow */
    uint32_t skip;        /* bytes that follow and are nobody's */
    int error;            /* positive errno */
    bool done;            /* the command's last */
};

enum nbd_link_state { NBD_DOWN, NBD_UP, NBD_CLOSING };

/* What a queue's thread has. */
struct nbd_queue {
    struct nbd *nbd;
    struct vd_queue *queue;
    struct nbd_queue *next_wanting, *next_queue;
    bool blocked;                 /* behind nbd.lock: wake it when a hold is given back */
    uint8_t *block;               /* one that is changed in part */
    struct nbd_slot *block_owner;
    struct nbd_link fresh;        /* behind nbd.lock until ready */
    bool ready;                   /* the connector has filled fresh */
    bool asked;
    uint64_t settle_until_ns;     /* behind nbd.lock: it is given no connection before */
    bool ended;                   /* behind nbd.lock: it was abandoned, and its connection was ended by the connector */

    struct nbd_link link;         /* changed behind nbd.lock */
    enum nbd_link_state state;
    bool broken;                  /* is to be closed as soon as the kernel is done with our buffers */
    bool sending, receiving, watching; /* submissions under way */
    const char *why;              /* it was lost; NULL: never, or given up by ourselves with nothing on its way */
    bool hung_up;                 /* by the server, perhaps because of what it was asked */
    struct nbd_slot *suspect;     /* of whose command it hangs up, perhaps; NULL: nobody's */
    uint32_t suspected;           /* how often it hung up with that one waiting longest for an answer */
    uint64_t suspected_since_ns;
    uint64_t cookies;

    struct nbd_slot *slots;       /* by the request's number */
    struct nbd_list waiting;      /* to be sent */
    struct nbd_list sent;         /* to be answered */

    struct iovec *send_iov;       /* pieces of what is being sent; the kernel is done with those before send_first */
    uint32_t send_count, send_first;
    uint64_t sent_before;         /* cookies up to this one: all of their pieces are */
    struct msghdr send_message;

    /* Of the reply that is being received. */
    uint8_t header[NBD_HEADER_MAX];
    uint32_t header_have;
    struct nbd_reply reply;       /* slot or skip is set: payload_left or skip_left bytes of it are to come */
    bool in_payload;
    uint32_t payload_left, skip_left;

    /* Of the receive under way: first what is certain, then what is predicted. */
    struct iovec *receive_iov;
    uint32_t receive_count;
    struct msghdr receive_message;
    uint32_t certain_bytes;
    uint32_t predicted;           /* replies; 0: the rest of the receive goes to spill */
    struct {
        struct nbd_slot *slot;
        uint32_t iov;             /* index of its header's piece */
        uint32_t header_bytes, payload_bytes;
    } prediction[NBD_PREDICTED_MAX];
    uint8_t stage[NBD_PREDICTED_MAX][NBD_HEADER_MAX];
    uint32_t trust;               /* how often predictions were right lately */
    uint32_t read_header, other_header; /* bytes of the last reply's header of a read, and of anything else */
    uint8_t *spill;
    uint8_t *tls_buffer;
    uint32_t tls_have, tls_sent;
};

/* Who a completion is for: the low bits of its user data, always odd; requests are even. */
enum nbd_tag { NBD_SEND = 1, NBD_RECEIVE = 3, NBD_WATCH = 5, NBD_TAGS = 7 };

static inline void *nbd_tag(struct nbd_queue *nq, enum nbd_tag tag)
{
    return (void *)((uintptr_t)nq | tag);
}

/*
 * dial.c: the stream's descriptor, deadline and, for TLS, keys and what the kernel can, by ourselves or through the broker;
 * on an error reason says what went wrong.
 */
int nbd_dial(struct nbd_stream *s, const struct nbd_target *target, uint64_t timeout_ns, char reason[NBD_REASON_BYTES]);
int nbd_dial_here(struct nbd_stream *s, const struct nbd_target *target, uint64_t timeout_ns, char reason[NBD_REASON_BYTES]);
void nbd_close_keys(struct nbd_stream *s);

/* broker.c */
int nbd_broker_dial(struct nbd_stream *s, const struct nbd_target *target, uint64_t timeout_ns, char reason[NBD_REASON_BYTES]);

/* nbd.c: strings of our own; 0 or -ENOMEM. */
int nbd_copy_target(struct nbd_target *target, const struct vd_nbd_config *config);

/* stream.c */
int nbd_stream_read(struct nbd_stream *s, void *to, size_t bytes);
int nbd_stream_write(struct nbd_stream *s, const void *from, size_t bytes);
int nbd_stream_connect(struct nbd_stream *s, const struct sockaddr *address, socklen_t length);
int nbd_stream_handshake(struct nbd_stream *s);

/* negotiate.c: on an error reason says what went wrong. */
int nbd_negotiate(struct nbd_stream *s, const struct nbd_target *target, struct nbd_export *export,
                  char reason[NBD_REASON_BYTES]);

/* tls.c */
int nbd_tls_start(struct nbd_stream *s, const struct nbd_target *target, char reason[NBD_REASON_BYTES]);
/* What the kernel does in both directions we need not do. */
bool nbd_tls_is_kernel(SSL *ssl);
/* Whether it does anything. */
bool nbd_tls_uses_kernel(SSL *ssl);
/* The kernel's TLS has something that is no data and that it cannot go on after: why the connection ends. */
const char *nbd_tls_interruption(int fd, bool *closed);

/* connector.c */
int nbd_connect(struct nbd *n, uint64_t timeout_ms, struct nbd_link *link, char reason[NBD_REASON_BYTES]);
void *nbd_connector_run(void *argument);
/* The queue needs a connection; it is woken when nbd_link_taken gives one. */
void nbd_want(struct nbd_queue *nq);
/* False: there is none yet, or the queue was abandoned and gets none. */
bool nbd_take(struct nbd_queue *nq);
/* Close the connection that it has. */
void nbd_let_go(struct nbd_queue *nq);
/* Leave it, with nothing under way, to the next queue that starts. */
void nbd_leave_behind(struct nbd_queue *nq);
/* Say goodbye on spare connections that are of an export of less than so many bytes; with the lock held. */
void nbd_clear_spares(struct nbd *n, uint64_t size_bytes);
void nbd_want_no_more(struct nbd_queue *nq);

/* goodbye.c */
/* From now on what the socket holds is dropped when it is closed, by whomever. */
void nbd_drop_at_close(int fd);
/* End the connection at once, with all that waits for it or is to be sent on it; on any thread. It is still to be closed. */
void nbd_cut(const struct nbd_link *link);
void nbd_link_close(struct nbd_link *link);
/* Nothing is under way: tell the server that nothing will come any more. It is still to be closed. */
void nbd_say_goodbye(const struct nbd_link *link);
/* The same, give the server so long to end it too, and close it; fine if there is none. */
void nbd_leave(struct nbd_link *link, uint64_t wait_ms);

/* link.c */
int nbd_queue_open(struct vd_queue *q);
void nbd_queue_close(struct vd_queue *q);
void nbd_turn(struct vd_queue *q);
void nbd_event(struct vd_queue *q, void *data, int result);
/* The connection cannot be used any more; why as in nbd_queue. */
void nbd_lost(struct nbd_queue *nq, const char *why);
/* The same, because the kernel said so of a send or receive: 0 or -errno. */
void nbd_broke(struct nbd_queue *nq, int result);
/* The same, because of what the server said: -errno of the one who read it. */
void nbd_misunderstood(struct nbd_queue *nq, int error);
/* Bytes, in so many pieces, were sent in one call; counts them if they were encrypted. */
void nbd_count_records(struct nbd_queue *nq, size_t bytes, size_t pieces);
/* Whether only the oldest command may be on its way. */
bool nbd_one_by_one(const struct nbd_queue *nq);
/* The slot's command was answered, or is not asked any more. */
void nbd_unsuspect(struct nbd_queue *nq, const struct nbd_slot *slot);

/* send.c */
void nbd_send(struct nbd_queue *nq);
void nbd_send_done(struct nbd_queue *nq, int result);

/* receive.c */
void nbd_receive(struct nbd_queue *nq);
void nbd_receive_done(struct nbd_queue *nq, int result);
void nbd_receive_reset(struct nbd_queue *nq);
/* After a receive: have the server go on. */
void nbd_acknowledge(struct nbd_queue *nq);
/* Bytes as they come. */
int nbd_feed(struct nbd_queue *nq, const uint8_t *from, uint32_t bytes);

/* reply.c: 0 with the header read, 1 if more bytes than have are needed (header_bytes says how many), or -EPROTO. */
int nbd_reply_parse(struct nbd_queue *nq, const uint8_t *header, uint32_t have, struct nbd_reply *reply);

/* steps.c */
void nbd_submit(struct vd_queue *q, struct vd_request *r);
/* What the request needs next, as a command of the slot if it needs one. */
enum nbd_next nbd_next_command(struct nbd_queue *nq, struct nbd_slot *slot);
/* The request's end: error is 0 or a positive errno. */
void nbd_finish(struct nbd_queue *nq, struct nbd_slot *slot, int error);
/* A command has been answered: the next one of its request, or the request's end. */
void nbd_command_done(struct nbd_queue *nq, struct nbd_slot *slot);

/* partial.c */
void nbd_register(struct nbd_queue *nq);
void nbd_unregister(struct nbd_queue *nq);
/* The right to change whole blocks, or a part of one; false: not now, and the queue is woken when it may be. */
bool nbd_hold(struct nbd_queue *nq, struct nbd_slot *slot, enum nbd_hold hold);
/* Give back whatever the slot has. */
void nbd_release(struct nbd_queue *nq, struct nbd_slot *slot);
/* The request's next bytes, at offset, are a part of a block only: a command for that block. */
enum nbd_next nbd_part(struct nbd_queue *nq, struct nbd_slot *slot, uint64_t offset);
/* The command for the block has been answered: how much of the request is done by it. */
uint64_t nbd_part_done(struct nbd_queue *nq, struct nbd_slot *slot);

/* What now_ns counts, for pthread_cond_timedwait. */
static inline struct timespec moment(uint64_t ns)
{
    return (struct timespec){ (time_t)(ns / 1000000000), (long)(ns % 1000000000) };
}

static inline uint64_t at_most(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

static inline void nbd_append(struct nbd_list *list, struct nbd_slot *slot)
{
    slot->next = NULL;
    slot->prev = list->last;
    if (list->last)
        list->last->next = slot;
    else
        list->first = slot;
    list->last = slot;
}

static inline void nbd_remove(struct nbd_list *list, struct nbd_slot *slot)
{
    if (slot->prev)
        slot->prev->next = slot->next;
    else
        list->first = slot->next;
    if (slot->next)
        slot->next->prev = slot->prev;
    else
        list->last = slot->prev;
}

#endif
