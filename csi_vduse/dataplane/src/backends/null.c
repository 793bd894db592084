/*
 * The null backend: reads leave the buffer as it is after the first one (zeros), writes vanish. For
 * measurement.
 */
#include "../backend.h"

static int null_open(const struct vd_config *config, void **state)
{
    (void)config;
    *state = NULL;
    return 0;
}

static void null_close(void *state)
{
    (void)state;
}

static void null_info(void *state, struct vd_backend_info *info)
{
    (void)state;
    info->discard = 1;
}

static void null_submit(struct vd_queue *q, struct vd_request *r)
{
    vd_request_finish(q, r, 0);
}

static void null_complete(struct vd_queue *q, struct vd_request *r, int result)
{
    vd_request_finish(q, r, result < 0 ? -result : 0);
}

const struct vd_backend_ops vd_backend_null = {
    .name = "null",
    .open = null_open,
    .close = null_close,
    .info = null_info,
    .submit = null_submit,
    .complete = null_complete,
};
