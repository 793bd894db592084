/*
 * What went wrong, from the queues' threads to the control thread: the newest failure, and how many
 * there were. A lock is good enough for what does not happen.
 */
#include "report.h"

#include <unistd.h>

void vd_report_open(struct vd_report *report, int event_fd)
{
    pthread_mutex_init(&report->lock, NULL);
    report->event_fd = event_fd;
}

void vd_report_close(struct vd_report *report)
{
    pthread_mutex_destroy(&report->lock);
}

void vd_report_wake(struct vd_report *report)
{
    uint64_t one = 1;

    if (report->event_fd >= 0)
        (void)!write(report->event_fd, &one, sizeof(one));
}

void vd_report_failure(struct vd_report *report, const struct vd_request *r, int error, bool waits)
{
    struct vd_failure *f = &report->newest;

    pthread_mutex_lock(&report->lock);
    *f = (struct vd_failure){ f->count + !waits, f->waits + waits, r->offset, r->operation, error };
    pthread_mutex_unlock(&report->lock);
    vd_report_wake(report);
}
