// SPDX-License-Identifier: Apache-2.0
// y = A x by the known GPU kernels that HBP is compared with; `gpu_baselines.py` prepares the arrays.
//
// Compiled at run time for one type of values. The macros:
//   VALUE    float or double
//   THREADS  threads of a block, a multiple of 32
//   ITEMS    csr_merge: steps of the merge path that a thread takes; odd, against bank conflicts
//   STAGED   csr_adaptive: products that a block keeps in shared memory
//
// Rows and columns are 32-bit, as the vendor's products take them. Every sum has an order that
// depends on the matrix alone, so results are deterministic.

#define WARP 32
#define WARPS (THREADS / WARP)
#define TILE (THREADS * ITEMS)
#define EVERY 0xffffffffu

typedef unsigned long long u64;

#ifndef LOAD_STREAM
#define LOAD_STREAM(at) __ldcs(at)  // read once: evicted first, so that x stays in the caches
#endif

__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }

// Add the sums of `lanes` neighbouring lanes, a power of two, by a tree; all of them get the result.
__device__ __forceinline__ VALUE add_lanes(VALUE sum, unsigned lanes)
{
    for (unsigned far = lanes / 2; far; far /= 2) sum += __shfl_xor_sync(EVERY, sum, far);
    return sum;
}

// The sum over nonzeros p, p + STRIDE, ... before `end`, four at a time so that their loads overlap.
template <unsigned STRIDE> __device__ __forceinline__ VALUE sum_strided(
    const VALUE* __restrict__ x, const unsigned* __restrict__ col, const VALUE* __restrict__ val,
    unsigned p, unsigned end)
{
    VALUE sum = 0;
    for (; p < end; p += 4 * STRIDE) {
        unsigned columns[4] = {};
        VALUE values[4] = {};
#pragma unroll
        for (unsigned k = 0; k < 4; ++k)
            if (p + k * STRIDE < end) columns[k] = LOAD_STREAM(col + p + k * STRIDE);
#pragma unroll
        for (unsigned k = 0; k < 4; ++k)
            if (p + k * STRIDE < end) values[k] = LOAD_STREAM(val + p + k * STRIDE);
#pragma unroll
        for (unsigned k = 0; k < 4; ++k)
            if (p + k * STRIDE < end) sum = multiply_add(values[k], x[columns[k]], sum);
    }
    return sum;
}

// One thread a row, rows in strides of the grid.
extern "C" __global__ void __launch_bounds__(THREADS) csr_scalar(
    const VALUE* __restrict__ x, VALUE* __restrict__ y, unsigned rows,
    const unsigned* __restrict__ ptr, const unsigned* __restrict__ col,
    const VALUE* __restrict__ val)
{
    const unsigned stride = gridDim.x * blockDim.x;
    for (unsigned row = blockIdx.x * blockDim.x + threadIdx.x; row < rows; row += stride) {
        VALUE sum = 0;
        const unsigned end = ptr[row + 1];
        for (unsigned p = ptr[row]; p < end; ++p) sum = multiply_add(val[p], x[col[p]], sum);
        y[row] = sum;
    }
}

// LANES threads a row.
template <unsigned LANES> __device__ __forceinline__ void vector_rows(
    const VALUE* __restrict__ x, VALUE* __restrict__ y, unsigned rows,
    const unsigned* __restrict__ ptr, const unsigned* __restrict__ col,
    const VALUE* __restrict__ val)
{
    const unsigned lane = threadIdx.x % LANES;
    const unsigned row = blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES;
    VALUE sum = 0;
    if (row < rows) sum = sum_strided<LANES>(x, col, val, ptr[row] + lane, ptr[row + 1]);
    sum = add_lanes(sum, LANES);
    if (row < rows && lane == 0) y[row] = sum;
}

#define VECTOR(LANES)                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS) csr_vector_##LANES(                     \
        const VALUE* __restrict__ x, VALUE* __restrict__ y, unsigned rows,                        \
        const unsigned* __restrict__ ptr, const unsigned* __restrict__ col,                       \
        const VALUE* __restrict__ val)                                                            \
    {                                                                                             \
        vector_rows<LANES>(x, y, rows, ptr, col, val);                                            \
    }
VECTOR(2)
VECTOR(4)
VECTOR(8)
VECTOR(16)
VECTOR(32)

// One bin a block: (target, rows, begin, end). A bin of short rows stages its products in shared
// memory; a longer row is summed by the whole block; a piece of a long row (rows = 0) goes to
// partial[target] and is added up by `add_parts`.
extern "C" __global__ void __launch_bounds__(THREADS) csr_adaptive(
    const VALUE* __restrict__ x, VALUE* __restrict__ y, VALUE* __restrict__ partial,
    const unsigned* __restrict__ bins, const unsigned* __restrict__ ptr,
    const unsigned* __restrict__ col, const VALUE* __restrict__ val)
{
    __shared__ VALUE staged[STAGED];
    const unsigned* bin = bins + 4 * blockIdx.x;
    const unsigned target = bin[0], rows = bin[1], begin = bin[2], end = bin[3];
    if (rows == 0 || end - begin > STAGED) {
        const VALUE sum =
            add_lanes(sum_strided<THREADS>(x, col, val, begin + threadIdx.x, end), WARP);
        if (threadIdx.x % WARP == 0) staged[threadIdx.x / WARP] = sum;
        __syncthreads();
        if (threadIdx.x != 0) return;
        VALUE total = 0;
        for (unsigned warp = 0; warp < WARPS; ++warp) total += staged[warp];
        *(rows == 0 ? partial + target : y + target) = total;
        return;
    }
#pragma unroll
    for (unsigned step = 0; step < STAGED; step += THREADS) {
        const unsigned p = begin + step + threadIdx.x;
        if (p < end) staged[p - begin] = LOAD_STREAM(val + p) * x[LOAD_STREAM(col + p)];
    }
    __syncthreads();
    unsigned lanes = WARP;
    while (lanes * rows > THREADS) lanes /= 2;
    const unsigned lane = threadIdx.x % lanes, row = threadIdx.x / lanes;
    VALUE sum = 0;
    if (row < rows) {
        const unsigned last = ptr[target + row + 1] - begin;
        for (unsigned i = ptr[target + row] - begin + lane; i < last; i += lanes) sum += staged[i];
    }
    sum = add_lanes(sum, lanes);
    if (row < rows && lane == 0) y[target + row] = sum;
}

// One piece of the merge path of row ends and nonzeros a block: TILE steps, from row row_at[piece]
// on. Each thread finds its own steps by a search along its diagonal and walks them; the sum of a
// row that several threads share is a scan by row. The sum of the row that the piece leaves
// unfinished is its carry.
extern "C" __global__ void __launch_bounds__(THREADS) csr_merge(
    const VALUE* __restrict__ x, VALUE* __restrict__ y, VALUE* __restrict__ carry, unsigned rows,
    unsigned nnz, const unsigned* __restrict__ row_at, const unsigned* __restrict__ ptr,
    const unsigned* __restrict__ col, const VALUE* __restrict__ val)
{
    __shared__ VALUE products[TILE];
    __shared__ unsigned ends[TILE];
    __shared__ VALUE warp_sum[WARPS];
    __shared__ unsigned warp_row[WARPS];
    const unsigned piece = blockIdx.x, thread = threadIdx.x, lane = thread % WARP;
    const unsigned first_row = row_at[piece], tall = row_at[piece + 1] - first_row;
    const u64 diagonal = (u64)piece * TILE, length = (u64)rows + nnz;
    const unsigned first = (unsigned)(diagonal - first_row);
    const unsigned steps = (unsigned)min((u64)TILE, length - diagonal), wide = steps - tall;
    unsigned columns[ITEMS] = {};
    VALUE values[ITEMS] = {};
#pragma unroll
    for (unsigned k = 0; k < ITEMS; ++k)
        if (thread + k * THREADS < wide)
            columns[k] = LOAD_STREAM(col + first + thread + k * THREADS);
#pragma unroll
    for (unsigned k = 0; k < ITEMS; ++k)
        if (thread + k * THREADS < wide)
            values[k] = LOAD_STREAM(val + first + thread + k * THREADS);
#pragma unroll
    for (unsigned k = 0; k < ITEMS; ++k)
        if (thread + k * THREADS < wide) values[k] *= x[columns[k]];
#pragma unroll
    for (unsigned k = 0; k < ITEMS; ++k) products[thread + k * THREADS] = values[k];
    for (unsigned i = thread; i < tall; i += THREADS) ends[i] = ptr[first_row + i + 1] - first;
    __syncthreads();
    const unsigned from = min(thread * ITEMS, steps), to = min(from + ITEMS, steps);
    unsigned low = from > wide ? from - wide : 0, high = min(from, tall);
    while (low < high) {
        const unsigned middle = (low + high) / 2;
        if (ends[middle] < from - middle) low = middle + 1;
        else high = middle;
    }
    const unsigned start = low;
    unsigned row = start, place = from - start;
    VALUE sum = 0, head = 0;  // of the row at hand; of the row that others may have begun
    for (unsigned step = from; step < to; ++step) {
        if (row < tall && ends[row] <= place) {
            if (row == start) head = sum;
            else y[first_row + row] = sum;
            sum = 0;
            ++row;
        } else {
            sum += products[place++];
        }
    }
    // Inclusive sums of what threads leave unfinished of the same row: in warps, then over warps.
    for (unsigned far = 1; far < WARP; far *= 2) {
        const unsigned other_row = __shfl_up_sync(EVERY, row, far);
        const VALUE other_sum = __shfl_up_sync(EVERY, sum, far);
        if (lane >= far && other_row == row) sum += other_sum;
    }
    if (lane == WARP - 1) {
        warp_row[thread / WARP] = row;
        warp_sum[thread / WARP] = sum;
    }
    __syncthreads();
    VALUE before = 0;
    for (unsigned warp = 0; warp < thread / WARP; ++warp)
        if (warp_row[warp] == row) before += warp_sum[warp];
    sum += before;
    products[thread] = sum;  // the products have been read: all threads are past their walks
    __syncthreads();
    if (row > start) y[first_row + start] = (thread ? products[thread - 1] : (VALUE)0) + head;
    if (thread == THREADS - 1) carry[piece] = sum;
}

// Add the parts of each split row, one warp a row: 32 chains and a tree, in a fixed order.
extern "C" __global__ void __launch_bounds__(THREADS) add_parts(
    VALUE* __restrict__ y, const VALUE* __restrict__ partial, unsigned split, unsigned keep,
    const unsigned* __restrict__ split_rows, const unsigned* __restrict__ split_start)
{
    const unsigned lane = threadIdx.x % WARP;
    const unsigned place = blockIdx.x * WARPS + threadIdx.x / WARP;
    if (place >= split) return;
    VALUE sum = 0;
    const unsigned end = split_start[place + 1];
    for (unsigned part = split_start[place] + lane; part < end; part += WARP) sum += partial[part];
    sum = add_lanes(sum, WARP);
    if (lane != 0) return;
    VALUE* at = y + split_rows[place];
    *at = keep ? *at + sum : sum;
}

// One warp a slice of 32 rows, one lane a row, elements step by step. Padding has column -1, and
// nothing is read or computed for it.
extern "C" __global__ void __launch_bounds__(THREADS) sell(
    const VALUE* __restrict__ x, VALUE* __restrict__ y, unsigned rows, unsigned slices,
    const long long* __restrict__ start, const unsigned* __restrict__ targets,
    const int* __restrict__ col, const VALUE* __restrict__ val)
{
    const unsigned lane = threadIdx.x % WARP;
    const unsigned slice = blockIdx.x * WARPS + threadIdx.x / WARP;
    if (slice >= slices) return;
    const u64 end = start[slice + 1];
    u64 p = start[slice] + lane;
    VALUE sum = 0;
    for (; p + 3 * WARP < end; p += 4 * WARP) {
        int columns[4];
        VALUE values[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) columns[k] = LOAD_STREAM(col + p + k * WARP);
#pragma unroll
        for (int k = 0; k < 4; ++k) values[k] = LOAD_STREAM(val + p + k * WARP);
#pragma unroll
        for (int k = 0; k < 4; ++k)
            if (columns[k] >= 0) sum = multiply_add(values[k], x[columns[k]], sum);
    }
    for (; p < end; p += WARP) {
        const int column = LOAD_STREAM(col + p);
        if (column >= 0) sum = multiply_add(LOAD_STREAM(val + p), x[column], sum);
    }
    const unsigned slot = slice * WARP + lane;
    if (slot < rows) y[targets[slot]] = sum;
}
