/*
 * Making stable: FLUSH, and the end of what changes something for drivers that cannot send it.
 *
 * An error of writing back is told once to each open file, and then forgotten, with what could not
 * be written: the next sync would be in order, and the data gone. So each queue syncs through an
 * open file of its own, one sync at a time, which answers all that wait for it; what comes while it
 * is under way waits for the next one. A sync of a regular file that fails is never tried again,
 * and from then on none succeeds, on any queue, until the image is opened anew: the driver is told,
 * and has to mend its file system.
 *
 * A block device is tried again (waiting.c) if nothing can have been in its page cache: nothing was
 * written through it, by us or a predecessor, since the last good sync.
 */
#include <errno.h>

#include "file.h"

void vd_file_sync(struct vd_queue *q, struct vd_request *r)
{
    struct vd_file_queue *fq = vd_file_queue_of(q);

    r->next = fq->unsynced;
    /* the turn begins with it: whatever was fetched together is synced together */
    fq->unsynced = r;
}

void vd_file_begin_sync(struct vd_queue *q)
{
    struct vd_file_queue *fq = vd_file_queue_of(q);
    struct io_uring_sqe *sqe = vd_queue_sqe(q);

    fq->syncing = fq->unsynced;
    fq->unsynced = NULL;
    fq->mark = load_relaxed(&fq->file->cache_changes);
    io_uring_prep_fsync(sqe, fq->place->sync_fd, IORING_FSYNC_DATASYNC);
    vd_sqe_of_event(sqe, VD_FILE_SYNCED);
}

static bool may_be_lost(const struct vd_queue *q)
{
    const struct vd_file *f = vd_file_queue_of(q)->file;

    return !f->block_device || load_relaxed(&f->cache_changes) != load_relaxed(&f->cache_clean) ||
           (vd_queue_config_of(q)->resume && !load_relaxed(&f->synced));
}

void vd_file_synced(struct vd_queue *q, int result)
{
    struct vd_file_queue *fq = vd_file_queue_of(q);
    struct vd_file *f = fq->file;
    struct vd_request *r = fq->syncing, *next;

    fq->syncing = NULL;
    if (!result) {
        store_relaxed(&f->cache_clean, fq->mark);
        store_relaxed(&f->synced, true);
    } else if (result != -EINTR && result != -ECANCELED && may_be_lost(q)) {
        /* those two: it has not done anything */
        store_relaxed(&f->lost, true);
    }
    for (; r; r = next) {
        next = r->next;
        if (load_relaxed(&f->lost))
            vd_request_finish(q, r, EIO);
        else if (!result)
            vd_request_finish(q, r, 0);
        else if (result == -EINTR || result == -ECANCELED)
            vd_file_sync(q, r);
        else
            vd_file_failed(q, r, -result);
    }
}
