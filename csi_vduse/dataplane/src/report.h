/* What went wrong, for the control thread; see report.c. */
#ifndef VD_REPORT_H
#define VD_REPORT_H

#include <pthread.h>

#include "backend.h"

struct vd_report {
    pthread_mutex_t lock;
    struct vd_failure newest;
    int event_fd; /* eventfd of the control thread's, or -1 */
};

void vd_report_open(struct vd_report *report, int event_fd);
void vd_report_close(struct vd_report *report);

/* A request failed, or waits to be tried again; the control thread is woken. */
void vd_report_failure(struct vd_report *report, const struct vd_request *request, int error,
                       bool waits);

/* Have the control thread look. */
void vd_report_wake(struct vd_report *report);

#endif
