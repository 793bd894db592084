/* Which failures may pass, and how long that is hoped for; see waiting.c. */
#ifndef VD_WAITING_H
#define VD_WAITING_H

#include "common.h"

/* Whether a request that failed so (a positive errno) might not fail later. */
bool vd_waiting_may_help(int error);

/*
 * Whether it is to be tried again. queue_since_ns: when the first of the queue's requests failed
 * since the last good one; request_since_ns: when this one failed first; 0 is now, and is written.
 */
bool vd_waiting_goes_on(uint64_t *queue_since_ns, uint64_t *request_since_ns, uint64_t now_ns,
                        uint64_t away_ns);

#endif
