/*
 * Requests that their backend fails for a reason that may pass: it is full, or it is away. They are
 * not answered but tried again (backend.c); what is decided here is for which errors, and for how
 * long.
 *
 * A driver that is told of an error never tries again; but a backend that is full, or cannot do its
 * work (EIO and the like), may also be so for good. It is waited for until it has done nothing
 * right for away_ns, and so is a single request that keeps failing among others that do not; then
 * the driver is told.
 */
#include "waiting.h"

#include <errno.h>

bool vd_waiting_may_help(int error)
{
    switch (error) {
    case EAGAIN:
    case ENOSPC:
    case EDQUOT:
    case EIO:
    case ENODEV:
    case ENXIO:
    case ESTALE:
    case ENOTCONN:
    case ETIMEDOUT:
    case EREMOTEIO:
        return true;
    default:
        return false;
    }
}

bool vd_waiting_goes_on(uint64_t *queue_since_ns, uint64_t *request_since_ns, uint64_t now_ns,
                        uint64_t away_ns)
{
    uint64_t since;

    if (!*queue_since_ns)
        *queue_since_ns = now_ns;
    if (!*request_since_ns)
        *request_since_ns = now_ns;
    since = *queue_since_ns < *request_since_ns ? *queue_since_ns : *request_since_ns;
    return now_ns - since < away_ns;
}
