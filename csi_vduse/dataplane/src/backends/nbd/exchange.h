/*
 * A queue's connection in use: commands and replies.
 *
 *   link.c        states, loss, and replay; it alone says that a connection is lost
 *   steps.c       a virtio-blk request as one or several NBD commands
 *   partial.c     parts of blocks that are smaller than the server takes: read, changed, written,
 *                 and nothing else meanwhile
 *   suspect.c     requests that make a server hang up
 *   send.c        commands into the socket, many in one system call
 *   receive.c     replies out of the socket, straight into the driver's buffers
 *   reply.c       one reply's header: read and checked
 *   plain.c       the socket itself, or with the kernel's TLS: a transport
 *   secure.c      TLS that the kernel does not do: the other one
 */
#ifndef VD_NBD_EXCHANGE_H
#define VD_NBD_EXCHANGE_H

#include "nbd.h"

enum {
    NBD_IOV_MAX = 1024,     /* of one system call: UIO_MAXIOV */
    NBD_PREDICTED_MAX = 32, /* replies whose place is prepared before they are here */
    /* what may have to be put elsewhere because it was not what was predicted */
    NBD_SPILL_BYTES = 256 * 1024,
    NBD_TLS_BYTES = 64 * 1024,
    NBD_COOKIE_SHIFT = 16, /* a command's number; below it the slot's */
};

struct nbd_queue;

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
    /* something was written that the request must make stable before it ends */
    bool unstable;
    bool flushed;
    /* the command moves the queue's block, of which the request needs a part */
    bool in_block;
    bool block_read; /* it was read, and is to be written */
    enum nbd_hold hold;
    struct iovec *iov; /* payload */
    struct iovec block_iov;
    uint32_t iov_count;
    uint32_t send_end; /* index into send_iov, behind the command's last piece */
    uint32_t received; /* of a read's payload */
    int error;         /* positive errno, of a chunk */
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
    uint32_t at;      /* where its payload or hole begins in the command's */
    uint32_t payload; /* bytes that follow the header and belong into the command's buffers */
    uint32_t hole;    /* zeros that do not follow */
    uint32_t skip;    /* bytes that follow and are nobody's */
    int error;        /* positive errno */
    bool done;        /* the command's last */
};

/*
 * Why a connection is of no use any more: the kernel said so (error is 0 or -errno), or what the
 * server sent (-errno).
 */
enum nbd_ending { NBD_GOES_ON, NBD_BROKE, NBD_MISUNDERSTOOD };

struct nbd_loss {
    enum nbd_ending ending;
    int error;
};

/* How bytes go through a connection. Each function says whether it is lost. */
struct nbd_transport {
    /* Send what send_iov has from send_first on; and go on after a step of it. */
    struct nbd_loss (*send)(struct nbd_queue *nq);
    struct nbd_loss (*sent)(struct nbd_queue *nq, int result);
    /* Receive what is to come; and take what has. */
    void (*receive)(struct nbd_queue *nq);
    struct nbd_loss (*received)(struct nbd_queue *nq, int result);
};

extern const struct nbd_transport nbd_plain, nbd_secure;

enum nbd_link_state { NBD_DOWN, NBD_UP, NBD_CLOSING };

/* What a queue's thread has. */
struct nbd_queue {
    struct nbd *nbd;
    struct vd_queue *queue;
    struct vd_remote_stats *stats;
    const struct nbd_transport *transport; /* of the connection that it has */
    struct nbd_queue *next_wanting, *next_queue;
    bool blocked;   /* behind nbd.lock: wake it when a hold is given back */
    uint8_t *block; /* one that is changed in part */
    struct nbd_slot *block_owner;
    struct nbd_link fresh; /* behind nbd.lock until ready */
    bool ready;            /* the connector has filled fresh */
    bool asked;
    uint64_t settle_until_ns; /* behind nbd.lock: it is given no connection before */
    /* behind nbd.lock: it was abandoned, and its connection was ended by the connector */
    bool ended;

    struct nbd_link link; /* changed behind nbd.lock */
    enum nbd_link_state state;
    /* is to be closed as soon as the kernel is done with our buffers */
    bool broken;
    bool sending, receiving, watching; /* submissions under way */
    /* it was lost; NULL: never, or given up by ourselves with nothing on its way */
    const char *why;
    bool hung_up;             /* by the server, perhaps because of what it was asked */
    struct nbd_slot *suspect; /* of whose command it hangs up, perhaps; NULL: nobody's */
    /* how often it hung up with that one waiting longest for an answer */
    uint32_t suspected;
    uint64_t suspected_since_ns;
    uint64_t cookies;

    struct nbd_slot *slots;  /* by the request's number */
    struct nbd_list waiting; /* to be sent */
    struct nbd_list sent;    /* to be answered */

    /* pieces of what is being sent; the kernel is done with those before send_first */
    struct iovec *send_iov;
    uint32_t send_count, send_first;
    uint64_t sent_before; /* cookies up to this one: all of their pieces are */
    struct msghdr send_message;

    /* Of the reply that is being received. */
    uint8_t header[NBD_HEADER_MAX];
    uint32_t header_have;
    /* slot or skip is set: payload_left or skip_left bytes of it are to come */
    struct nbd_reply reply;
    bool in_payload;
    uint32_t payload_left, skip_left;

    /* Of the receive under way: first what is certain, then what is predicted. */
    struct iovec *receive_iov;
    uint32_t receive_count;
    struct msghdr receive_message;
    uint32_t certain_bytes;
    uint32_t predicted; /* replies; 0: the rest of the receive goes to spill */
    struct {
        struct nbd_slot *slot;
        uint32_t iov; /* index of its header's piece */
        uint32_t header_bytes, payload_bytes;
    } prediction[NBD_PREDICTED_MAX];
    uint8_t stage[NBD_PREDICTED_MAX][NBD_HEADER_MAX];
    uint32_t trust; /* how often predictions were right lately */
    /* bytes of the last reply's header of a read, and of anything else */
    uint32_t read_header, other_header;
    uint8_t *spill;
    uint8_t *tls_buffer;
    uint32_t tls_have, tls_sent;
};

/* Completions that the queue gets. */
enum nbd_event { NBD_SEND, NBD_RECEIVE, NBD_WATCH };

/* link.c */
int nbd_queue_open(struct vd_queue *q);
void nbd_queue_close(struct vd_queue *q);
void nbd_turn(struct vd_queue *q);
void nbd_event(struct vd_queue *q, unsigned event, int result);

/* suspect.c */
/* The connection is lost: if the server hung up, whose command made it? */
void nbd_suspect(struct nbd_queue *nq);
/* Whether only the oldest command may be on its way. */
bool nbd_one_by_one(const struct nbd_queue *nq);
/* The slot's command was answered, or is not asked any more. */
void nbd_unsuspect(struct nbd_queue *nq, const struct nbd_slot *slot);
/* Whose command it was, for certain; or NULL. */
struct nbd_slot *nbd_culprit(const struct nbd_queue *nq);

/* send.c */
struct nbd_loss nbd_send(struct nbd_queue *nq);

/* receive.c */
void nbd_receive_reset(struct nbd_queue *nq);
void nbd_receive(struct nbd_queue *nq);
/* Where to put what comes next: receive_iov. And so many bytes are there: 0 or -errno. */
void nbd_receive_prepare(struct nbd_queue *nq);
int nbd_receive_take(struct nbd_queue *nq, uint32_t bytes);
/* Bytes as they come; 0 or -errno. */
int nbd_feed(struct nbd_queue *nq, const uint8_t *from, uint32_t bytes);
void nbd_acknowledge(struct nbd_queue *nq);

/*
 * reply.c: 0 with the header read, 1 if more bytes than have are needed (header_bytes says how
 * many), or -EPROTO.
 */
int nbd_reply_parse(struct nbd_queue *nq, const uint8_t *header, uint32_t have,
                    struct nbd_reply *reply);

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
/*
 * The right to change whole blocks, or a part of one; false: not now, and the queue is woken when
 * it may be.
 */
bool nbd_hold(struct nbd_queue *nq, struct nbd_slot *slot, enum nbd_hold hold);
/* Give back whatever the slot has. */
void nbd_release(struct nbd_queue *nq, struct nbd_slot *slot);
/* The request's next bytes, at offset, are a part of a block only: a command for that block. */
enum nbd_next nbd_part(struct nbd_queue *nq, struct nbd_slot *slot, uint64_t offset);
/* The command for the block has been answered: how much of the request is done by it. */
uint64_t nbd_part_done(struct nbd_queue *nq, struct nbd_slot *slot);

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
