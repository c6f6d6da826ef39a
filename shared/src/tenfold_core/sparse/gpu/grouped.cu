// SPDX-License-Identifier: Apache-2.0
// y = alpha A X + beta y for a matrix stored in groups of 32 rows; see `layout.py` for the arrays.
//
// Compiled at run time for one matrix type. The macros:
//   VALUE    float or double
//   INDEX    unsigned short or unsigned: a column offset
//   PACK     1, 2 or 4: neighbouring elements of a row that lie together, for wide loads
//   UNIFORM  1 if all values are equal and only one is stored
//   COLUMNS  1, 2, 4 or 8: columns of X and y that one launch computes
//   LOCAL_X  strip kernel: 1 to read X from shared memory
//
// A sum has one order whatever the launch, so results are deterministic: a row of a group is one
// chain of fused multiply-adds, a segment 32 interleaved chains and a tree, a split row a chain or
// a tree over its parts.

#define WARP 32
#define EVERY 0xffffffffu
#define NOWHERE 0xffffffffu
#define CHAINS (PACK * COLUMNS >= 4 ? 1 : 4 / (PACK * COLUMNS))

typedef unsigned short u16;
typedef unsigned long long u64;

#ifndef DYNAMIC_SHARED
#define DYNAMIC_SHARED(type, name) extern __shared__ __align__(16) type name[]
#endif

#ifndef LOAD_STREAM
// Values and indices are read once: they bypass the first-level cache, which x needs.
template <int BYTES> struct Raw;
template <> struct Raw<2> { u16 part[1]; };
template <> struct Raw<4> { unsigned part[1]; };
template <> struct Raw<8> { unsigned part[2]; };
template <> struct Raw<16> { unsigned part[4]; };

__device__ __forceinline__ Raw<2> stream(const Raw<2>* at) {
    Raw<2> r;
    asm("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=h"(r.part[0]) : "l"(at));
    return r;
}
__device__ __forceinline__ Raw<4> stream(const Raw<4>* at) {
    Raw<4> r;
    asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(r.part[0]) : "l"(at));
    return r;
}
__device__ __forceinline__ Raw<8> stream(const Raw<8>* at) {
    Raw<8> r;
    asm("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
        : "=r"(r.part[0]), "=r"(r.part[1]) : "l"(at));
    return r;
}
__device__ __forceinline__ Raw<16> stream(const Raw<16>* at) {
    Raw<16> r;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(r.part[0]), "=r"(r.part[1]), "=r"(r.part[2]), "=r"(r.part[3]) : "l"(at));
    return r;
}
template <typename T> __device__ __forceinline__ T load_stream(const T* at) {
    union { Raw<sizeof(T)> raw; T value; } word;
    word.raw = stream(reinterpret_cast<const Raw<sizeof(T)>*>(at));
    return word.value;
}
#define LOAD_STREAM(at) load_stream(at)
#endif

// PACK neighbouring elements, loaded in pieces of at most 16 bytes.
template <typename T> struct Packed {
    static const int PIECE = sizeof(T) * PACK > 16 ? 16 / sizeof(T) : PACK;
    struct __align__(sizeof(T) * PIECE) Piece { T item[PIECE]; };
    Piece piece[PACK / PIECE];

    __device__ __forceinline__ void load(const T* at) {
#pragma unroll
        for (int i = 0; i < PACK / PIECE; ++i)
            piece[i] = LOAD_STREAM(reinterpret_cast<const Piece*>(at) + i);
    }
    __device__ __forceinline__ T operator[](int k) const { return piece[k / PIECE].item[k % PIECE]; }
};

__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }

struct Sums {
    VALUE of[COLUMNS];

    __device__ __forceinline__ Sums() {
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) of[j] = 0;
    }
    // Add value * X[column, :]; `x` points to the columns of X this launch computes.
    __device__ __forceinline__ void add(VALUE value, const VALUE* x, u64 column, unsigned stride) {
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j)
            of[j] = multiply_add(value, x[column * stride + j], of[j]);
    }
};

// Where results go. A target below `rows` is a row of y, another one a slot of `partial`.
struct Result {
    VALUE* y;
    VALUE* partial;
    VALUE alpha, beta;
    unsigned rows, stride;

    __device__ __forceinline__ void row(unsigned target, int j, VALUE sum) const {
        VALUE* at = y + (u64)target * stride + j;
        *at = beta == 0 ? alpha * sum : multiply_add(alpha, sum, beta * *at);
    }
    __device__ __forceinline__ void store(unsigned target, const Sums& sums) const {
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) {
            if (target < rows) row(target, j, sums.of[j]);
            else partial[(u64)(target - rows) * stride + j] = sums.of[j];
        }
    }
};

// The sums of one group, one row per lane. Lengths descend from lane to lane, so the lanes that are
// active in a step are the first ones, and their packs are neighbours in memory.
__device__ __forceinline__ Sums sum_group(
    const VALUE* x, unsigned stride, const INDEX* col, const VALUE* val, u64 p, unsigned length,
    unsigned lane)
{
    Sums sums;
    const VALUE shared_value = UNIFORM ? val[0] : (VALUE)0;
    const unsigned shortest = __shfl_sync(EVERY, length, WARP - 1);
    const unsigned longest = __shfl_sync(EVERY, length, 0);
    unsigned step = 0;
    // Every lane is active and every pack is full: load all indices, then all values, then x.
    for (; step + CHAINS * PACK <= shortest; step += CHAINS * PACK) {
        Packed<INDEX> columns[CHAINS];
        Packed<VALUE> values[CHAINS];
#pragma unroll
        for (int c = 0; c < CHAINS; ++c) columns[c].load(col + p + (c * WARP + lane) * PACK);
        if (!UNIFORM) {
#pragma unroll
            for (int c = 0; c < CHAINS; ++c) values[c].load(val + p + (c * WARP + lane) * PACK);
        }
#pragma unroll
        for (int c = 0; c < CHAINS; ++c) {
#pragma unroll
            for (int k = 0; k < PACK; ++k)
                sums.add(UNIFORM ? shared_value : values[c][k], x, columns[c][k], stride);
        }
        p += CHAINS * PACK * WARP;
    }
    // The rest: the last pack of a row may hold padding, whose column is not followed.
    for (; step < longest; step += PACK) {
        const bool active = length > step;
        if (active) {
            Packed<INDEX> columns;
            Packed<VALUE> values;
            columns.load(col + p + lane * PACK);
            if (!UNIFORM) values.load(val + p + lane * PACK);
#pragma unroll
            for (int k = 0; k < PACK; ++k)
                if (step + k < length)
                    sums.add(UNIFORM ? shared_value : values[k], x, columns[k], stride);
        }
        p += PACK * __popc(__ballot_sync(EVERY, active));
    }
    return sums;
}

// The sum of one segment of a long row: 32 interleaved chains, then a tree.
__device__ __forceinline__ Sums sum_segment(
    const VALUE* x, unsigned stride, const INDEX* col, const VALUE* val, u64 p, u64 end,
    unsigned lane)
{
    Sums sums;
    const VALUE shared_value = UNIFORM ? val[0] : (VALUE)0;
    p += lane;
    for (; p + 3 * WARP < end; p += 4 * WARP) {
        INDEX columns[4];
        VALUE values[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) columns[c] = LOAD_STREAM(col + p + c * WARP);
#pragma unroll
        for (int c = 0; c < 4; ++c)
            values[c] = UNIFORM ? shared_value : LOAD_STREAM(val + p + c * WARP);
#pragma unroll
        for (int c = 0; c < 4; ++c) sums.add(values[c], x, columns[c], stride);
    }
    for (; p < end; p += WARP)
        sums.add(UNIFORM ? shared_value : LOAD_STREAM(val + p), x, LOAD_STREAM(col + p), stride);
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j)
        for (int far = WARP / 2; far; far /= 2)
            sums.of[j] += __shfl_xor_sync(EVERY, sums.of[j], far);
    return sums;
}

// One launch for everything that needs no order: the first blocks take a group per warp, the next
// a segment per warp, the last a row without nonzeros per thread.
extern "C" __global__ void __launch_bounds__(256) grouped_product(
    const VALUE* __restrict__ x, VALUE* y, VALUE* partial, VALUE alpha, VALUE beta,
    unsigned stride, unsigned rows, unsigned groups, unsigned segments, unsigned empties,
    unsigned group_blocks, unsigned segment_blocks,
    const long long* __restrict__ start, const u16* __restrict__ lengths,
    const unsigned* __restrict__ targets, const unsigned* __restrict__ group_base,
    const long long* __restrict__ segment_start, const unsigned* __restrict__ segment_target,
    const unsigned* __restrict__ segment_base, const unsigned* __restrict__ empty_rows,
    const INDEX* __restrict__ col, const VALUE* __restrict__ val)
{
    const Result result = {y, partial, alpha, beta, rows, stride};
    const unsigned lane = threadIdx.x % WARP;
    const unsigned warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    unsigned block = blockIdx.x;
    if (block < group_blocks) {
        const unsigned group = block * warps + warp;
        if (group >= groups) return;
        const unsigned slot = group * WARP + lane, target = targets[slot];
        const Sums sums = sum_group(x + (u64)group_base[group] * stride, stride, col, val,
                                    start[group], lengths[slot], lane);
        if (target != NOWHERE) result.store(target, sums);
        return;
    }
    block -= group_blocks;
    if (block < segment_blocks) {
        const unsigned segment = block * warps + warp;
        if (segment >= segments) return;
        const Sums sums = sum_segment(x + (u64)segment_base[segment] * stride, stride, col, val,
                                      segment_start[segment], segment_start[segment + 1], lane);
        if (lane == 0) result.store(segment_target[segment], sums);
        return;
    }
    const unsigned place = (block - segment_blocks) * blockDim.x + threadIdx.x;
    if (place >= empties) return;
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) {
        VALUE* at = y + (u64)empty_rows[place] * stride + j;
        *at = beta == 0 ? (VALUE)0 : beta * *at;
    }
}

#if COLUMNS == 1
// Groups by column strips, for operands larger than the second-level cache: a block of warps keeps
// the strip of x it works on in shared memory. A unit is a run of groups of one strip. Each block
// owns a contiguous run of units (fixed allocation) and then draws single ones from the rest by a
// ticket (competitive allocation). The combine kernel that follows sets the ticket back to 0.
extern "C" __global__ void __launch_bounds__(512, 2) strip_product(
    const VALUE* __restrict__ x, VALUE* y, VALUE* partial, VALUE alpha, VALUE beta,
    unsigned rows, unsigned columns, unsigned width, unsigned units,
    const unsigned* __restrict__ runs, const unsigned* __restrict__ unit_group,
    const unsigned* __restrict__ unit_strip, unsigned* ticket,
    const long long* __restrict__ start, const u16* __restrict__ lengths,
    const unsigned* __restrict__ targets, const unsigned* __restrict__ group_base,
    const INDEX* __restrict__ col, const VALUE* __restrict__ val)
{
    DYNAMIC_SHARED(VALUE, strip_x);
    __shared__ unsigned drawn;
    const Result result = {y, partial, alpha, beta, rows, 1};
    const unsigned lane = threadIdx.x % WARP;
    const unsigned warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const unsigned own_end = runs[blockIdx.x + 1], competitive = runs[gridDim.x];
    unsigned unit = runs[blockIdx.x], loaded = NOWHERE;
    for (;;) {
        if (unit >= own_end || unit >= competitive) {
            __syncthreads();  // the last unit's number has been read by all
            if (threadIdx.x == 0) drawn = atomicAdd(ticket, 1u);
            __syncthreads();
            unit = competitive + drawn;
            if (unit >= units || unit < competitive) return;
        }
        const unsigned strip = unit_strip[unit];
        const unsigned first_column = strip * width;
        if (LOCAL_X && strip != loaded) {
            __syncthreads();  // nobody reads the old strip any more
            const unsigned length = min(width, columns - first_column);
            for (unsigned i = threadIdx.x; i < length; i += blockDim.x)
                strip_x[i] = x[first_column + i];
            loaded = strip;
            __syncthreads();
        }
        for (unsigned group = unit_group[unit] + warp; group < unit_group[unit + 1]; group += warps) {
            const unsigned slot = group * WARP + lane, target = targets[slot];
            const VALUE* from = LOCAL_X ? strip_x + (group_base[group] - first_column)
                                        : x + group_base[group];
            const Sums sums =
                sum_group(from, 1, col, val, start[group], lengths[slot], lane);
            if (target != NOWHERE) result.store(target, sums);
        }
        unit = unit < own_end ? unit + 1 : own_end;
    }
}
#endif

// Add the parts of each split row in a fixed order: `lanes` (a power of two) chains, then a tree.
extern "C" __global__ void __launch_bounds__(256) combine_parts(
    VALUE* y, const VALUE* __restrict__ partial, VALUE alpha, VALUE beta, unsigned stride,
    unsigned split, unsigned lanes, const unsigned* __restrict__ split_rows,
    const long long* __restrict__ split_start, unsigned* ticket)
{
    const unsigned thread = blockIdx.x * blockDim.x + threadIdx.x;
    const unsigned place = thread / lanes, lane = thread % lanes;
    if (thread == 0 && ticket) *ticket = 0;
    const bool used = place < split;
    Sums sums;
    if (used) {
        const u64 end = split_start[place + 1];
        for (u64 part = split_start[place] + lane; part < end; part += lanes) {
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j) sums.of[j] += partial[part * stride + j];
        }
    }
    for (unsigned far = lanes / 2; far; far /= 2) {
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) sums.of[j] += __shfl_xor_sync(EVERY, sums.of[j], far);
    }
    if (!used || lane != 0) return;
    const Result result = {y, 0, alpha, beta, NOWHERE, stride};
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) result.row(split_rows[place], j, sums.of[j]);
}
