/*
 * Where a latency is counted: log-linear buckets, as in HdrHistogram. A bucket is at most an eighth
 * as wide as what it counts, so that its middle is at most a sixteenth away from the truth.
 *
 * The unit is an eighth of a microsecond. The first eight buckets are one unit wide; from there on
 * each power of two, which begins at a power of two of microseconds, has eight buckets. The last
 * bucket takes everything that is longer than the rest count. csi_vduse/histogram.py reads them.
 */
#ifndef VD_HISTOGRAM_H
#define VD_HISTOGRAM_H

#include "common.h"
#include "engine_api.h"

enum { VD_UNITS_PER_US = 8, VD_UNIT_NS = 1000 / VD_UNITS_PER_US };

static inline uint32_t vd_latency_bucket(uint64_t ns)
{
    uint64_t units = ns / VD_UNIT_NS;

    if (units < VD_UNITS_PER_US)
        return (uint32_t)units;
    uint32_t doublings = 60 - (uint32_t)__builtin_clzll(units); /* until the units have four bits */
    uint64_t bucket = doublings * VD_UNITS_PER_US + (units >> doublings);

    return bucket < VD_LATENCY_BUCKETS ? (uint32_t)bucket : VD_LATENCY_BUCKETS - 1;
}

/* Bucket of a number that is at least 1: bucket i takes what is above 2^(i-1) and at most 2^i. */
static inline uint32_t vd_count_bucket(uint32_t number)
{
    uint32_t bucket = number > 1 ? 32 - (uint32_t)__builtin_clz(number - 1) : 0;

    return bucket < VD_COUNT_BUCKETS ? bucket : VD_COUNT_BUCKETS - 1;
}

#endif
