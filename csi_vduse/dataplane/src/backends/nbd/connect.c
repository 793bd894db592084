/*
 * From whom to connect to, to a connection: a socket, the protocol's handshake; and whether what
 * the server says of its export is what the volume needs.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>

#include "connection.h"

/* Smaller ones than a sector are all the same to us. */
static uint32_t block_of(uint32_t min_block)
{
    return min_block > VD_SECTOR_BYTES ? min_block : VD_SECTOR_BYTES;
}

int nbd_check_fit(const struct nbd_needs *needs, const struct nbd_export *e,
                  char reason[NBD_REASON_BYTES])
{
    if (e->size_bytes < needs->size_bytes) {
        snprintf(reason, NBD_REASON_BYTES, "the export has %llu bytes, the volume needs %llu",
                 (unsigned long long)e->size_bytes, (unsigned long long)needs->size_bytes);
        return -ENOSPC;
    }
    if (e->flags & NBD_FLAG_READ_ONLY && needs->write) {
        snprintf(reason, NBD_REASON_BYTES, "the export is read-only");
        return -EROFS;
    }
    if (!(e->flags & NBD_FLAG_MULTI_CONN) && needs->connections > 1) {
        snprintf(reason, NBD_REASON_BYTES,
                 "the server does not allow several connections (MULTI_CONN), one for each queue");
        return -EMLINK;
    }
    if (needs->min_block && block_of(e->min_block) != block_of(needs->min_block)) {
        snprintf(reason, NBD_REASON_BYTES, "the server's blocks have %u bytes now, and had %u",
                 e->min_block, needs->min_block);
        return -EPROTO;
    }
    return 0;
}

static int dial(struct nbd_stream *s, const struct nbd_target *target, uint64_t timeout_ns,
                char *reason)
{
    return target->broker_fd >= 0 ? nbd_broker_dial(s, target, timeout_ns, reason)
                                  : nbd_dial_here(s, target, timeout_ns, reason);
}

static int connect_once(const struct nbd_attempt *attempt, uint64_t timeout_ms,
                        struct nbd_link *link, char reason[NBD_REASON_BYTES])
{
    uint64_t timeout_ns = timeout_ms * 1000000;
    struct nbd_stream s = { .fd = -1,
                            .cancel_fd = attempt->cancel_fd,
                            .deadline_ns = now_ns() + timeout_ns,
                            .any_tls = *attempt->any_tls,
                            .keys = { -1, -1, -1 } };
    int error;

    reason[0] = 0;
    error = dial(&s, attempt->target, timeout_ns, reason);
    /* What else the numbers say is said of an export. */
    if (error)
        return error == -ECANCELED ? error : -ECONNREFUSED;
    error = nbd_negotiate(&s, attempt->target, &link->export, reason);
    nbd_close_keys(&s);
    link->fd = s.fd;
    link->ssl = s.ssl;
    link->tls = s.ssl;
    link->phase = s.phase;
    link->records = 0;
    link->kernel_tls = s.ssl && nbd_tls_uses_kernel(s.ssl);
    if (error) {
        nbd_leave(link, 0);
        return error;
    }
    /* io_uring waits for a socket that blocks, and says "again" for one that does not. */
    if (!link->ssl || nbd_tls_is_kernel(link->ssl)) {
        SSL_free(link->ssl);
        link->ssl = NULL;
        (void)fcntl(link->fd, F_SETFL, fcntl(link->fd, F_GETFL) & ~O_NONBLOCK);
    }
    return 0;
}

int nbd_connect(const struct nbd_attempt *attempt, uint64_t timeout_ms, struct nbd_link *link,
                char reason[NBD_REASON_BYTES])
{
    int error = connect_once(attempt, timeout_ms, link, reason);

    if (error != -EPROTONOSUPPORT)
        return error;
    *attempt->any_tls = true;
    error = connect_once(attempt, timeout_ms, link, reason);
    *attempt->any_tls = !error; /* or it was for another reason */
    return error;
}
