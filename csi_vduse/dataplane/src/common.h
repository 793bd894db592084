/*
 * Small things that every file of the engine uses: atomics with the order in their name, and
 * arithmetic.
 *
 * Ring fields are shared with a driver that may be hostile: each is read once, through these
 * helpers, into a local, and the local is checked and used.
 */
#ifndef VD_COMMON_H
#define VD_COMMON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#define VD_SECTOR_BYTES 512u
#define VD_CACHE_LINE_BYTES 64

#define load_relaxed(p) __atomic_load_n((p), __ATOMIC_RELAXED)
#define load_acquire(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
#define store_relaxed(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)
#define store_release(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
#define full_barrier() __atomic_thread_fence(__ATOMIC_SEQ_CST)

/* For counters with one writer: readers may be late but never see a torn value. */
static inline void count_up(uint64_t *counter, uint64_t by)
{
    store_relaxed(counter, load_relaxed(counter) + by);
}

/* In a loop that waits for another processor. */
static inline void cpu_relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb" ::: "memory");
#endif
}

static inline uint64_t now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

#endif
