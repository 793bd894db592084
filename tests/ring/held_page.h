/* A page of the driver's memory that the engine has to wait for: reading it hangs. Needs userfaultfd. */
#ifndef RING_HELD_PAGE_H
#define RING_HELD_PAGE_H

#include "harness.h"

/* The engine's view of a page that the driver's side can hold back. */
struct held_page {
    int fd;
    uint64_t address;
    uint8_t *page;
};

/* Hold one back that nobody has touched; skips the case where that is not possible. */
void hold_page(struct rig *rig, struct held_page *held, uint8_t *page);
/* Until the engine hangs. */
void wait_until_held(struct held_page *held);
void give_page(struct held_page *held, const void *content);

#endif
