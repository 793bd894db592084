/*
 * Address map: built by the control thread while no queue runs, read by queue threads without
 * locks, replaced whole. A driver chooses every address that comes in here, so nothing is assumed
 * about them.
 *
 * The files behind the map belong to someone else (the kernel's bounce pages, a guest's memory) who
 * may take pages away while we hold them mapped. Touching such a page raises SIGBUS, and a worker
 * that dies of it would be a way for a driver to kill us; so the guard puts a page of zeros there
 * and counts the fault. The queue that reads the zeros looks at the count and stops. Each engine
 * has a guard of its own, which its threads know.
 */
#include "memory.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/vfs.h>
#include <unistd.h>

static _Thread_local struct vd_guard *guard; /* of the engine that this thread works for */

/*
 * Of no length: each access to a mapping of it is past its end. Made beforehand, for there may be
 * no descriptor left.
 */
static int empty_fd = -1;

static int by_iova(const void *a, const void *b)
{
    const struct vd_region *x = a, *y = b;

    return x->iova < y->iova ? -1 : x->iova > y->iova;
}

int vd_is_anonymous(int fd)
{
    struct statfs file_system;

    return !fstatfs(fd, &file_system) && file_system.f_type == ANON_INODE_FS_MAGIC;
}

/* The size of a file's pages: huge ones are mapped and replaced whole. */
static uint64_t page_bytes(int fd)
{
    struct statfs file_system;

    if (!fstatfs(fd, &file_system) && file_system.f_type == HUGETLBFS_MAGIC)
        return (uint64_t)file_system.f_bsize;
    return (uint64_t)sysconf(_SC_PAGESIZE);
}

/* Map a region, where it is now if it is mapped already. */
static int map(struct vd_mapping *m)
{
    void *base = mmap(m->base, m->length, PROT_READ | (m->writable ? PROT_WRITE : 0),
                      MAP_SHARED | MAP_NORESERVE | (m->base ? MAP_FIXED : 0), m->fd, m->offset);

    if (base == MAP_FAILED)
        return -errno;
    /* our own memory may be locked; what a guest has is not ours to keep */
    (void)munlock(base, m->length);
    m->base = base;
    return 0;
}

int vd_memory_new(const struct vd_region *regions, uint32_t count, struct vd_memory **result)
{
    struct vd_region *sorted = calloc(count ? count : 1, sizeof(*sorted));
    struct vd_memory *memory = calloc(1, sizeof(*memory) + count * sizeof(memory->mappings[0]));
    int error = 0;

    if (!sorted || !memory) {
        free(sorted);
        free(memory);
        return -ENOMEM;
    }
    if (count)
        memcpy(sorted, regions, count * sizeof(*sorted));
    qsort(sorted, count, sizeof(*sorted), by_iova);
    for (uint32_t i = 0; i < count && !error; i++) {
        const struct vd_region *r = &sorted[i];
        struct vd_mapping *m = &memory->mappings[i];
        uint64_t page = page_bytes(r->fd), shift = r->offset % page;

        if (!r->size || r->iova + (r->size - 1) < r->iova || r->size > SIZE_MAX - 2 * page ||
            (i && r->iova <= memory->mappings[i - 1].last)) {
            error = -EINVAL;
            break;
        }
        *m = (struct vd_mapping){ .iova = r->iova,
                                  .last = r->iova + (r->size - 1),
                                  .page = page,
                                  .length = (r->size + shift + page - 1) / page * page,
                                  .writable = r->writable,
                                  .offset = (off_t)(r->offset - shift) };
        m->fd = fcntl(r->fd, F_DUPFD_CLOEXEC, 0);
        error = m->fd < 0 ? -errno : map(m);
        if (error) {
            if (m->fd >= 0)
                close(m->fd);
            break;
        }
        m->address = (uint8_t *)m->base + shift;
        memory->count++;
    }
    free(sorted);
    if (error) {
        vd_memory_free(memory);
        return error;
    }
    *result = memory;
    return 0;
}

void vd_memory_free(struct vd_memory *memory)
{
    while (memory) {
        struct vd_memory *older = memory->older;

        for (uint32_t i = 0; i < memory->count; i++) {
            munmap(memory->mappings[i].base, memory->mappings[i].length);
            close(memory->mappings[i].fd);
        }
        free(memory);
        memory = older;
    }
}

int vd_memory_restore(struct vd_memory *memory)
{
    for (uint32_t i = 0; i < memory->count; i++) {
        struct vd_mapping *m = &memory->mappings[i];

        if (!load_relaxed(&m->patched))
            continue;
        store_relaxed(&m->patched, false);
        int error = map(m);

        if (error)
            return error;
    }
    return 0;
}

void vd_memory_isolate(struct vd_memory *memory)
{
    for (uint32_t i = 0; i < memory->count; i++) {
        struct vd_mapping *m = &memory->mappings[i];

        if (mmap(m->base, m->length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, empty_fd, 0) ==
            MAP_FAILED)
            mprotect(m->base, m->length, PROT_NONE);
    }
}

const struct vd_mapping *vd_memory_find(const struct vd_memory *memory, uint64_t iova)
{
    uint32_t low = 0, high = memory->count;

    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        const struct vd_mapping *m = &memory->mappings[middle];

        if (iova < m->iova)
            high = middle;
        else if (iova > m->last)
            low = middle + 1;
        else
            return m;
    }
    return NULL;
}

void *vd_memory_translate_whole(const struct vd_memory *memory, uint64_t iova, uint64_t length,
                                bool write)
{
    const struct vd_mapping *m = vd_memory_find(memory, iova);

    if (!m || !length || (write && !m->writable) || length - 1 > m->last - iova)
        return NULL;
    return m->address + (iova - m->iova);
}

/* Put zeros where the page was, if it is in one of the engine's memories; whether it was. */
static bool patch(uintptr_t address)
{
    struct vd_memory *newest = load_acquire(&guard->memory);

    for (struct vd_memory *memory = newest; memory; memory = memory->older)
        for (uint32_t i = 0; i < memory->count; i++) {
            struct vd_mapping *m = &memory->mappings[i];
            uintptr_t start = (uintptr_t)m->base;

            if (address < start || address - start >= m->length)
                continue;
            if (mmap((void *)(address / m->page * m->page), m->page, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED)
                return false;
            store_relaxed(&m->patched, true);
            if (memory == newest)
                __atomic_fetch_add(&guard->faults, 1, __ATOMIC_RELAXED);
            return true;
        }
    return false;
}

/*
 * Runs on whichever thread touched the page; mmap is a plain system call, safe here
 * (signal-safety(7)).
 */
static void on_sigbus(int signal_number, siginfo_t *info, void *context)
{
    (void)context;
    /* If it is not ours the instruction runs again, and the process dies of it. */
    if (!guard || !patch((uintptr_t)info->si_addr))
        signal(signal_number, SIG_DFL);
}

int vd_memory_guard(struct vd_guard *g, struct vd_memory *memory)
{
    struct sigaction action = { .sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_NODEFER };

    if (empty_fd < 0)
        empty_fd = memfd_create("isolated", MFD_CLOEXEC);
    if (empty_fd < 0 || sigaction(SIGBUS, &action, NULL))
        return -errno;
    store_release(&g->memory, memory);
    return 0;
}

void vd_memory_guard_me(struct vd_guard *g)
{
    guard = g;
}
