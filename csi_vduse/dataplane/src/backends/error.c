/*
 * The error backend: every request fails at once, those that a dead worker left too. For a device
 * that is to be removed while its own backend is away: what waits has to end, or the kernel never
 * lets the disk go. It does without io_uring, so that it also ends what waits because that was
 * switched off.
 */
#include <errno.h>

#include "../backend.h"

static int error_open(const struct vd_config *config, void **state)
{
    (void)config;
    *state = NULL;
    return 0;
}

static void error_close(void *state)
{
    (void)state;
}

static void error_info(void *state, struct vd_backend_info *info)
{
    (void)state;
    info->discard = 1;
}

static void error_submit(struct vd_queue *q, struct vd_request *r)
{
    vd_request_finish(q, r, EIO);
}

static void error_complete(struct vd_queue *q, struct vd_request *r, int result)
{
    (void)result;
    vd_request_finish(q, r, EIO);
}

const struct vd_backend_ops vd_backend_error = {
    .name = "error",
    .without_uring = true,
    .open = error_open,
    .close = error_close,
    .info = error_info,
    .submit = error_submit,
    .complete = error_complete,
};
