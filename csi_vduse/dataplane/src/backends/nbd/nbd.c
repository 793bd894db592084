/*
 * The NBD backend: an export of a server elsewhere. nbd.h says which part is where; each queue has
 * a connection of its own.
 *
 * At open one connection is made, so that what can never work is refused at once; not so where a
 * device that exists already is to be served again: then the server may be away, and requests wait
 * for it.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "exchange.h"

enum {
    OPEN_MS = 10000,
    LOOK_MS = 3000,
    JOIN_MS = 1000,
    LEAVE_MS = 500,
    FORGET_MS = 500,
    FORGET_STEP_MS = 50
};

/*
 * True if the thread has ended: one that looks up a name cannot be interrupted, and keeps what it
 * uses.
 */
static bool stop_connector(struct nbd *n)
{
    struct timespec until = moment(now_ns() + JOIN_MS * 1000000ull);
    uint64_t one = 1;
    int error = 0;

    (void)!write(n->cancel_fd, &one, sizeof(one));
    pthread_mutex_lock(&n->lock);
    n->closing = true;
    pthread_cond_broadcast(&n->changed);
    while (n->threaded && !n->finished && !error)
        error = pthread_cond_timedwait(&n->changed, &n->lock, &until);
    bool finished = !n->threaded || n->finished;

    pthread_mutex_unlock(&n->lock);
    if (n->threaded && finished)
        pthread_join(n->thread, NULL);
    else if (n->threaded)
        pthread_detach(n->thread);
    return finished;
}

static void nbd_close(void *state)
{
    struct nbd *n = state;

    if (!stop_connector(n))
        return;
    nbd_clear_spares(n, UINT64_MAX);
    if (n->cancel_fd >= 0)
        close(n->cancel_fd);
    nbd_target_free(&n->target);
    pthread_mutex_destroy(&n->lock);
    pthread_cond_destroy(&n->changed);
    free(n);
}

static int new_nbd(const struct vd_config *config, struct nbd **result)
{
    pthread_condattr_t monotonic;
    struct nbd *n = calloc(1, sizeof(*n));

    if (!n)
        return -ENOMEM;
    if (nbd_target_copy(&n->target, config->nbd)) {
        free(n);
        return -ENOMEM;
    }
    n->config = *config;
    n->needed_bytes = config->capacity_bytes;
    pthread_mutex_init(&n->lock, NULL);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&n->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    n->status.state = VD_BACKEND_CONNECTING;
    n->cancel_fd = eventfd(0, EFD_CLOEXEC);
    if (n->cancel_fd < 0) {
        nbd_close(n);
        return -EMFILE;
    }
    *result = n;
    return 0;
}

/*
 * Who opens an export has perhaps just asked what it is: servers that count their clients take a
 * moment to forget one that has left.
 */
static int connect_patiently(struct nbd *n, uint64_t timeout_ms, struct nbd_link *link,
                             char *reason)
{
    uint64_t until_ns = now_ns() + FORGET_MS * 1000000ull;
    int error;

    while ((error = nbd_connect_now(n, timeout_ms, link, reason)) == -ECONNRESET &&
           now_ns() < until_ns)
        usleep(FORGET_STEP_MS * 1000);
    return error;
}

static int nbd_open(const struct vd_config *config, void **state)
{
    char reason[NBD_REASON_BYTES] = "";
    struct nbd *n;
    int error = config->nbd ? new_nbd(config, &n) : -EINVAL;

    if (error)
        return error;
    if (!config->nbd->wait)
        error = connect_patiently(n, OPEN_MS, &n->spare[0], reason);
    if (!error && !config->nbd->wait) {
        n->spares = 1;
        n->export = n->spare[0].export;
        n->status.connects = 1;
        n->status.state = VD_BACKEND_CONNECTED;
    }
    if (!error)
        error = -pthread_create(&n->thread, NULL, nbd_connector_run, n);
    if (error) {
        if (config->reason)
            snprintf(config->reason, NBD_REASON_BYTES, "%s", reason);
        nbd_close(n);
        return error;
    }
    n->threaded = true;
    *state = n;
    return 0;
}

static void nbd_info(void *state, struct vd_backend_info *info)
{
    struct nbd *n = state;

    pthread_mutex_lock(&n->lock);
    info->direct = 1;
    info->discard = 1;
    info->capacity_bytes = n->export.size_bytes;
    info->said_bytes = n->export.said_bytes;
    info->status = n->status;
    pthread_mutex_unlock(&n->lock);
}

/* No connection that was made before may serve the volume from now on; with the lock held. */
static void need(struct nbd *n, uint64_t capacity_bytes)
{
    store_relaxed(&n->needed_bytes, capacity_bytes);
    nbd_clear_spares(n, capacity_bytes);
    for (struct nbd_queue *each = n->queues; each; each = each->next_queue)
        vd_queue_wake(each->queue);
}

/*
 * The size is said in the handshake only: shake hands once more, unless nobody has asked yet since
 * open did. Not here: the control thread may be kept for a moment, and looking up a name may take
 * minutes.
 */
static int nbd_resize(void *state, uint64_t capacity_bytes)
{
    struct nbd *n = state;
    struct timespec until = moment(now_ns() + LOOK_MS * 1000000ull);
    int error = 0;

    pthread_mutex_lock(&n->lock);
    n->looking = n->needed_bytes || !n->export.size_bytes;
    n->look_error = n->looking ? -ETIMEDOUT : 0;
    pthread_cond_broadcast(&n->changed);
    while (n->looking && !error)
        error = pthread_cond_timedwait(&n->changed, &n->lock, &until);
    n->looking = false;
    error = n->look_error;
    if (!error && capacity_bytes > n->export.size_bytes)
        error = -EINVAL;
    if (!error)
        need(n, capacity_bytes);
    pthread_mutex_unlock(&n->lock);
    return error;
}

int vd_nbd_probe(const struct vd_nbd_config *config, uint32_t timeout_ms, struct vd_nbd_info *info,
                 char *reason)
{
    struct vd_config about = { .max_queues = 1, .read_only = 1, .event_fd = -1, .nbd = config };
    struct nbd_link link;
    struct nbd *n;
    int error = new_nbd(&about, &n);

    if (error)
        return error;
    error = connect_patiently(n, timeout_ms, &link, reason);
    nbd_close(n);
    if (error)
        return error;
    *info = (struct vd_nbd_info){
        .size_bytes = link.export.size_bytes,
        .said_bytes = link.export.said_bytes,
        .min_block_bytes = link.export.min_block,
        .max_payload_bytes = link.export.max_payload,
        .flags = link.export.flags,
        .structured = link.export.structured,
        .extended = link.export.extended,
        .tls_in_kernel = config->tls && !link.ssl,
    };
    nbd_leave(&link, LEAVE_MS);
    return 0;
}

const struct vd_backend_ops vd_backend_nbd = {
    .name = "nbd",
    .open = nbd_open,
    .close = nbd_close,
    .info = nbd_info,
    .submit = nbd_submit,
    .resize = nbd_resize,
    .queue_open = nbd_queue_open,
    .queue_close = nbd_queue_close,
    .turn = nbd_turn,
    .event = nbd_event,
};
