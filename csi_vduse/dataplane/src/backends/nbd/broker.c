/*
 * A worker in jail can connect to nothing and open no file (jail.py). Who can is a process beside
 * it, the broker, which was forked before and does this one thing: looks up the server's name,
 * connects, and hands over the socket with the open files of the keys. It connects to that server
 * and to no other, whatever it is asked.
 *
 * One request is under way at a time; each has a number, so that an answer that nobody waits for
 * any more is told from the next one's. A request that comes while one is under way ends it: who
 * asked has given up. So does the end of the socket, and then the broker returns.
 */
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <sys/socket.h>
#include <unistd.h>

#include "connection.h"

enum { GRACE_NS = 1000000000 };

struct question {
    uint64_t number;
    uint64_t timeout_ns;
};

struct answer {
    uint64_t number;
    int32_t error;
    uint8_t kernel_has_tls;
    uint8_t has_key[NBD_KEYS];
    char reason[NBD_REASON_BYTES];
};

union room {
    struct cmsghdr header;
    char bytes[CMSG_SPACE((1 + NBD_KEYS) * sizeof(int))];
};

/* The packet, with descriptors if there are any; 0 or -errno. */
static int give(int fd, struct answer *answer, const int *fds, size_t count)
{
    union room room = { .bytes = { 0 } };
    struct iovec iov = { answer, sizeof(*answer) };
    struct msghdr message = { .msg_iov = &iov, .msg_iovlen = 1 };

    if (count) {
        message.msg_control = room.bytes;
        message.msg_controllen = CMSG_SPACE(count * sizeof(int));
        *CMSG_FIRSTHDR(&message) = (struct cmsghdr){ CMSG_LEN(count * sizeof(int)), SOL_SOCKET,
                                                     SCM_RIGHTS };
        memcpy(CMSG_DATA(CMSG_FIRSTHDR(&message)), fds, count * sizeof(int));
    }
    return sendmsg(fd, &message, MSG_NOSIGNAL) < 0 ? -errno : 0;
}

static int serve(const struct nbd_target *target, int fd, const struct question *question)
{
    struct nbd_stream s = { .fd = -1,
                            .cancel_fd = fd,
                            .deadline_ns = now_ns() + question->timeout_ns,
                            .keys = { -1, -1, -1 } };
    struct answer answer = { .number = question->number };
    int fds[1 + NBD_KEYS], error;
    size_t count = 0;

    answer.error = nbd_dial_here(&s, target, question->timeout_ns, answer.reason);
    answer.kernel_has_tls = s.kernel_has_tls;
    if (!answer.error)
        fds[count++] = s.fd;
    for (int i = 0; i < NBD_KEYS; i++) {
        answer.has_key[i] = !answer.error && s.keys[i] >= 0;
        if (answer.has_key[i])
            fds[count++] = s.keys[i];
    }
    error = give(fd, &answer, fds, count);
    nbd_close_keys(&s);
    if (s.fd >= 0)
        close(s.fd); /* the connection is the worker's alone, and ends with it */
    return error;
}

int vd_nbd_broker(const struct vd_nbd_config *config, int fd)
{
    struct nbd_target target;
    int error = nbd_target_copy(&target, config);

    while (!error) {
        struct question question;
        ssize_t n = recv(fd, &question, sizeof(question), 0);

        if (!n)
            return 0;
        if (n < 0)
            error = errno == EINTR ? 0 : -errno;
        else if (n == sizeof(question))
            error = serve(&target, fd, &question);
    }
    return error;
}

/* An answer's descriptors, in their order; returns how many. */
static size_t take_descriptors(struct msghdr *message, int fds[1 + NBD_KEYS])
{
    struct cmsghdr *header = CMSG_FIRSTHDR(message);
    size_t count;

    if (!header || header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS)
        return 0;
    count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    memcpy(fds, CMSG_DATA(header), count * sizeof(int)); /* there was room for no more */
    return count;
}

/*
 * Read an answer and put what is in it where it belongs: 1 if it is the number-th, 0 if it is an
 * older one, or -errno.
 */
static int take(struct nbd_stream *s, int fd, uint64_t number, struct answer *answer)
{
    union room room;
    struct iovec iov = { answer, sizeof(*answer) };
    struct msghdr message = { .msg_iov = &iov,
                              .msg_iovlen = 1,
                              .msg_control = room.bytes,
                              .msg_controllen = sizeof(room.bytes) };
    int fds[1 + NBD_KEYS];
    ssize_t n = recvmsg(fd, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    size_t count, next = 1;

    if (n != sizeof(*answer))
        return n < 0 && (errno == EAGAIN || errno == EINTR) ? 0 : -ENOTCONN;
    count = take_descriptors(&message, fds);
    answer->reason[NBD_REASON_BYTES - 1] = 0;
    if (answer->number != number || (!answer->error && !count)) {
        while (count)
            close(fds[--count]);
        return answer->number == number ? -EPROTO : 0;
    }
    if (!answer->error)
        s->fd = fds[0];
    for (int i = 0; i < NBD_KEYS; i++)
        s->keys[i] = answer->has_key[i] && next < count ? fds[next++] : -1;
    return 1;
}

int nbd_broker_dial(struct nbd_stream *s, const struct nbd_target *target, uint64_t timeout_ns,
                    char reason[NBD_REASON_BYTES])
{
    static uint64_t numbers;
    struct question question = { __atomic_add_fetch(&numbers, 1, __ATOMIC_RELAXED), timeout_ns };
    uint64_t until_ns = now_ns() + timeout_ns + GRACE_NS;
    struct answer answer;
    int taken = send(target->broker_fd, &question, sizeof(question), MSG_NOSIGNAL) < 0 ? -errno : 0;

    while (!taken) {
        struct pollfd polled[] = { { .fd = target->broker_fd, .events = POLLIN },
                                   { .fd = s->cancel_fd, .events = POLLIN } };
        uint64_t now = now_ns();

        if (now >= until_ns)
            taken = -ETIMEDOUT;
        else if (poll(polled, 2, (int)((until_ns - now) / 1000000 + 1)) < 0 && errno != EINTR)
            taken = -errno;
        else if (polled[1].revents)
            taken = -ECANCELED;
        else if (polled[0].revents)
            taken = take(s, target->broker_fd, question.number, &answer);
    }
    s->deadline_ns = until_ns - GRACE_NS;
    if (taken < 0) {
        snprintf(reason, NBD_REASON_BYTES, "asking for a connection: %s", strerror(-taken));
        return taken;
    }
    s->kernel_has_tls = answer.kernel_has_tls;
    snprintf(reason, NBD_REASON_BYTES, "%s", answer.reason);
    return answer.error;
}
