/*
 * The engine with threads of its own, as it is in the worker. What a turn did is not known here; that the queue drains,
 * and what memory looks like then, is.
 */
#include "drive.h"

#include <unistd.h>

void drive_begin(struct world *world, const struct vd_queue_config *config)
{
    (void)world;
    (void)config;
}

void drive_started(struct vd_queue *queue)
{
    (void)queue;
}

void drive_kick(struct vd_queue *queue)
{
    vd_queue_wake(queue);
    usleep(20); /* long enough for it to be somewhere in the middle */
}

void drive_stopping(struct vd_queue *queue)
{
    (void)queue;
}
