// SPDX-License-Identifier: Apache-2.0
// Build grouped rows from CSR on the device: order the rows of each window by hash, size the groups,
// fill them. A part is a row, or the piece of a row inside a column strip.
//
// The macros: INDEX, an unsigned column offset; VALUE; PACK; UNIFORM; KEEP, 1 to record where each
// element came from.

#define WARP 32
#define EVERY 0xffffffffu
#define NOWHERE 0xffffffffu

typedef unsigned short u16;
typedef unsigned long long u64;

#ifndef DYNAMIC_SHARED
#define DYNAMIC_SHARED(type, name) extern __shared__ __align__(16) type name[]
#endif

// The hash order of one window per block: sort keys (rank << 16 | place in the window) in shared
// memory, drop the parts of rank NO_RANK, cut the rest into groups of 32 and put the longest first.
// Ranks are 16-bit, so equal ones keep their order.
#define NO_RANK 0xffffu

extern "C" __global__ void __launch_bounds__(256) order_windows(
    const long long* __restrict__ windows, const u16* __restrict__ rank,
    const int* __restrict__ length, const long long* __restrict__ first_group, unsigned size,
    unsigned* parts)
{
    DYNAMIC_SHARED(unsigned, keys);
    const long long top = windows[blockIdx.x];
    const unsigned count = (unsigned)(windows[blockIdx.x + 1] - top);
    for (unsigned i = threadIdx.x; i < size; i += blockDim.x)
        keys[i] = i < count ? (unsigned)rank[top + i] << 16 | i : EVERY;
    for (unsigned width = 2; width <= size; width *= 2)
        for (unsigned far = width / 2; far; far /= 2) {
            __syncthreads();
            for (unsigned i = threadIdx.x; i < size / 2; i += blockDim.x) {
                const unsigned low = i / far * far * 2 + i % far, high = low + far;
                const unsigned a = keys[low], b = keys[high];
                if ((a > b) == ((low & width) == 0)) {
                    keys[low] = b;
                    keys[high] = a;
                }
            }
        }
    __syncthreads();
    const unsigned lane = threadIdx.x % WARP;
    const unsigned groups = (unsigned)(first_group[blockIdx.x + 1] - first_group[blockIdx.x]);
    for (unsigned group = threadIdx.x / WARP; group < groups; group += blockDim.x / WARP) {
        const unsigned slot = group * WARP + lane;
        const unsigned key = slot < size ? keys[slot] : EVERY;
        const bool kept = key >> 16 != NO_RANK;
        const unsigned part = (unsigned)top + (key & 0xffff);
        const int mine = kept ? length[part] : 0;
        unsigned place = 0;
        for (unsigned other = 0; other < WARP; ++other) {
            const int theirs = __shfl_sync(EVERY, mine, other);
            place += theirs > mine || (theirs == mine && other < lane);
        }
        parts[(first_group[blockIdx.x] + group) * WARP + place] = kept ? part : NOWHERE;
    }
}

// Smallest and largest column of each group.
extern "C" __global__ void __launch_bounds__(256) span_groups(
    const unsigned* __restrict__ parts, unsigned groups, const long long* __restrict__ low,
    const int* __restrict__ length, const int* __restrict__ col, unsigned* smallest,
    unsigned* largest)
{
    const unsigned group = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (group >= groups) return;
    const unsigned lane = threadIdx.x % WARP, part = parts[group * WARP + lane];
    unsigned least = EVERY, most = 0;
    if (part != NOWHERE) {
        least = (unsigned)col[low[part]];
        most = (unsigned)col[low[part] + length[part] - 1];
    }
    for (unsigned far = WARP / 2; far; far /= 2) {
        least = min(least, __shfl_xor_sync(EVERY, least, far));
        most = max(most, __shfl_xor_sync(EVERY, most, far));
    }
    if (lane == 0) {
        smallest[group] = least;
        largest[group] = most;
    }
}

// Write the elements of one group per warp, pack by pack; padding gets column 0 and value 0.
extern "C" __global__ void __launch_bounds__(256) fill_groups(
    const unsigned* __restrict__ parts, unsigned groups, const long long* __restrict__ low,
    const int* __restrict__ length, const unsigned* __restrict__ target,
    const int* __restrict__ source_col, const VALUE* __restrict__ source_val,
    const long long* __restrict__ start, const unsigned* __restrict__ base, u16* lengths,
    unsigned* targets, INDEX* col, VALUE* val, long long* perm)
{
    const unsigned group = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (group >= groups) return;
    const unsigned lane = threadIdx.x % WARP, slot = group * WARP + lane, part = parts[slot];
    const bool used = part != NOWHERE;
    const unsigned mine = used ? (unsigned)length[part] : 0;
    const long long from = used ? low[part] : 0;
    lengths[slot] = (u16)mine;
    targets[slot] = used ? target[part] : NOWHERE;
    const unsigned longest = __shfl_sync(EVERY, mine, 0);
    u64 p = start[group];
    for (unsigned step = 0; step < longest; step += PACK) {
        const bool active = mine > step;
        if (active) {
            for (unsigned k = 0; k < PACK; ++k) {
                const u64 at = p + lane * PACK + k;
                const bool there = step + k < mine;
                const long long source = from + step + k;
                col[at] = there ? (INDEX)((unsigned)source_col[source] - base[group]) : (INDEX)0;
                if (!UNIFORM) val[at] = there ? source_val[source] : (VALUE)0;
                if (KEEP) perm[at] = there ? source : -1;
            }
        }
        p += PACK * __popc(__ballot_sync(EVERY, active));
    }
}

// Copy the elements of one segment per warp.
extern "C" __global__ void __launch_bounds__(256) fill_segments(
    unsigned segments, const long long* __restrict__ from, const long long* __restrict__ start,
    const unsigned* __restrict__ base, const int* __restrict__ source_col,
    const VALUE* __restrict__ source_val, INDEX* col, VALUE* val, long long* perm)
{
    const unsigned segment = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (segment >= segments) return;
    const long long begin = start[segment], size = start[segment + 1] - begin;
    for (long long i = threadIdx.x % WARP; i < size; i += WARP) {
        const long long source = from[segment] + i;
        col[begin + i] = (INDEX)((unsigned)source_col[source] - base[segment]);
        if (!UNIFORM) val[begin + i] = source_val[source];
        if (KEEP) perm[begin + i] = source;
    }
}
