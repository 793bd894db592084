/*
 * Interrupts of a device whose rings somebody else works on: a vhost-user server writes to an
 * eventfd, and VDUSE wants an ioctl. One thread per device waits for all of its eventfds.
 *
 * They are watched for edges and never read: each write wakes us again whatever the counter is (the
 * kernel's fs/eventfd.c wakes who polls at every write), several before we come are one interrupt,
 * and a counter of 64 bits does not fill up by ones.
 */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "common.h"
#include "engine_api.h"

enum { RELAY_QUEUES = 64, RELAY_END = RELAY_QUEUES };

struct vd_relay {
    pthread_t thread;
    int epoll_fd, end_fd;
    uint64_t interrupts;
    /* written before its eventfd is watched */
    struct vd_relay_queue queues[RELAY_QUEUES];
};

static void relay_interrupt(struct vd_relay *relay, uint32_t index)
{
    const struct vd_relay_queue *queue = &relay->queues[index];
    uint64_t one = 1;

    count_up(&relay->interrupts, 1);
    if (queue->notify_ioctl)
        (void)!ioctl(queue->notify_fd, queue->notify_ioctl, &index);
    else
        (void)!write(queue->notify_fd, &one, sizeof(one));
}

static void *relay_run(void *argument)
{
    struct vd_relay *relay = argument;
    struct epoll_event events[RELAY_QUEUES];

    prctl(PR_SET_NAME, "vduse-relay");
    for (;;) {
        int n = epoll_wait(relay->epoll_fd, events, RELAY_QUEUES, -1);

        for (int i = 0; i < n; i++) {
            if (events[i].data.u32 == RELAY_END)
                return NULL;
            relay_interrupt(relay, events[i].data.u32);
        }
    }
}

static int relay_poll(struct vd_relay *relay, int fd, uint32_t index)
{
    struct epoll_event event = { .events = EPOLLIN | EPOLLET, .data.u32 = index };

    return epoll_ctl(relay->epoll_fd, EPOLL_CTL_ADD, fd, &event) ? -errno : 0;
}

int vd_relay_new(struct vd_relay **result)
{
    struct vd_relay *relay = calloc(1, sizeof(*relay));
    int error;

    if (!relay)
        return -ENOMEM;
    relay->end_fd = eventfd(0, EFD_CLOEXEC);
    relay->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    error = relay->end_fd < 0 || relay->epoll_fd < 0 ? -errno
                                                     : relay_poll(relay, relay->end_fd, RELAY_END);
    if (!error)
        error = -pthread_create(&relay->thread, NULL, relay_run, relay);
    if (!error) {
        *result = relay;
        return 0;
    }
    close(relay->epoll_fd);
    close(relay->end_fd);
    free(relay);
    return error;
}

void vd_relay_free(struct vd_relay *relay)
{
    uint64_t one = 1;

    (void)!write(relay->end_fd, &one, sizeof(one));
    pthread_join(relay->thread, NULL);
    close(relay->epoll_fd);
    close(relay->end_fd);
    free(relay);
}

int vd_relay_watch(struct vd_relay *relay, uint32_t index, const struct vd_relay_queue *queue)
{
    if (index >= RELAY_QUEUES)
        return -EINVAL;
    relay->queues[index] = *queue;
    return relay_poll(relay, queue->call_fd, index);
}

void vd_relay_unwatch(struct vd_relay *relay, int call_fd)
{
    epoll_ctl(relay->epoll_fd, EPOLL_CTL_DEL, call_fd, NULL);
}

uint64_t vd_relay_interrupts(const struct vd_relay *relay)
{
    return load_relaxed(&relay->interrupts);
}
