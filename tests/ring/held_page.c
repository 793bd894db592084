#include "held_page.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "queue.h"

void hold_page(struct rig *rig, struct held_page *held, uint8_t *page)
{
    struct uffdio_api api = { .api = UFFD_API };
    struct uffdio_register area = { .mode = UFFDIO_REGISTER_MODE_MISSING };

    held->fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (held->fd < 0 || ioctl(held->fd, UFFDIO_API, &api))
        harness_skip("no userfaultfd");
    held->page = page;
    held->address =
        (uint64_t)(uintptr_t)vd_memory_translate_whole(rig->engine->memory, driver_iova(&rig->driver, page), 1, true);
    area.range.start = held->address;
    area.range.len = 4096;
    CHECK(held->address % 4096 == 0);
    CHECK(!ioctl(held->fd, UFFDIO_REGISTER, &area));
}

void wait_until_held(struct held_page *held)
{
    struct pollfd wait = { .fd = held->fd, .events = POLLIN };
    struct uffd_msg message;

    CHECK(poll(&wait, 1, 20000) == 1);
    CHECK(read(held->fd, &message, sizeof(message)) == sizeof(message));
    CHECK_EQUAL(message.event, UFFD_EVENT_PAGEFAULT);
}

void give_page(struct held_page *held, const void *content)
{
    static uint8_t copy[4096] __attribute__((aligned(4096)));
    struct uffdio_copy with = { .dst = held->address, .src = (uint64_t)(uintptr_t)copy, .len = 4096 };

    memcpy(copy, content, 4096);
    CHECK(!ioctl(held->fd, UFFDIO_COPY, &with));
}
