// SPDX-License-Identifier: Apache-2.0
// y = alpha A x + beta y for the published layout; see `method.py` for the six arrays.
//
// "A Nonlinear Hash-based Optimization Method for SpMV on GPUs", CCGrid 2025, arXiv 2504.08860: the
// product with its mixed allocation (fixed runs of blocks, then a ticket), and the combination.
//
// Compiled at run time for one matrix. The macros:
//   VALUE    float or double
//   POINTER  int or i64: the type of begin_ptr
//   LOCAL_X  1 if a warp keeps its strip of x in shared memory
//
// Deviation: fixed runs are cut by work (`schedule.cut`), not by the published division, which
// divides by zero on narrow matrices and repeats or skips blocks on others.
// Deviation: blocks without nonzeros are no tasks; their part of `mid` stays zero.
// Deviation: the ticket starts at 0 in every product, the strip of x ends with x, and barriers
// stand on both sides of loading it.

#define WARP 32
#define EVERY 0xffffffffu
#define NOWHERE 0xffffffffu
#define SUB_N 10  // blocks that a ticket stands for

typedef long long i64;
typedef unsigned long long u64;

#ifndef DYNAMIC_SHARED
#define DYNAMIC_SHARED(type, name) extern __shared__ __align__(16) type name[]
#endif

__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }

struct Layout {
    unsigned rows, columns, height, width, strips, block_rows;
    const POINTER* __restrict__ begin_ptr;
    const int* __restrict__ zero_row;
    const int* __restrict__ output_hash;
    const int* __restrict__ col;
    const VALUE* __restrict__ data;
    const int* __restrict__ add_sign;
};

// The row sums of one block, one lane a slot; x[0] is column `shift`.
__device__ __forceinline__ void multiply_block(
    const Layout& a, const VALUE* __restrict__ x, unsigned shift, VALUE* __restrict__ mid,
    unsigned task)
{
    const unsigned strip = task / a.block_rows, block_row = task % a.block_rows;
    const unsigned top = block_row * a.height, tall = min(a.height, a.rows - top);
    const unsigned groups = (tall + WARP - 1) / WARP;
    const unsigned slots = top * a.strips + strip * tall;
    const unsigned first_group =
        block_row * ((a.height + WARP - 1) / WARP) * a.strips + strip * groups;
    for (unsigned group = 0; group < groups; ++group) {
        const unsigned slot = group * WARP + threadIdx.x;
        if (slot >= tall) return;
        const int empty = a.zero_row[slots + slot];
        VALUE sum = 0;
        if (empty >= 0) {
            POINTER j = a.begin_ptr[first_group + group] + (int)threadIdx.x - empty;
            int step = 0;
            do {
                j += step;
                sum = multiply_add(a.data[j], x[a.col[j] - shift], sum);
                step = a.add_sign[j];
            } while (step >= 0);
        }
        mid[slots + a.output_hash[slots + slot]] = sum;
    }
}

// A block of threads is one warp. It owns the tasks runs[b]..runs[b+1]-1, in strip-major order, and
// then draws ten at a time of those from runs[last] on.
extern "C" __global__ void __launch_bounds__(WARP) paper_product(
    const VALUE* __restrict__ x, VALUE* __restrict__ mid, unsigned rows, unsigned columns,
    unsigned height, unsigned width, unsigned strips, unsigned block_rows, unsigned num_tasks,
    const unsigned* __restrict__ runs, const unsigned* __restrict__ tasks, unsigned* ticket,
    const POINTER* __restrict__ begin_ptr, const int* __restrict__ zero_row,
    const int* __restrict__ output_hash, const int* __restrict__ col,
    const VALUE* __restrict__ data, const int* __restrict__ add_sign)
{
    DYNAMIC_SHARED(VALUE, strip_x);
    const Layout a = {rows, columns, height, width, strips, block_rows,
                      begin_ptr, zero_row, output_hash, col, data, add_sign};
    const unsigned lane = threadIdx.x, own_end = runs[blockIdx.x + 1];
    unsigned loaded = NOWHERE;
    for (unsigned place = runs[blockIdx.x]; place < own_end; ++place) {
        const unsigned task = tasks[place];
        if (!LOCAL_X) {
            multiply_block(a, x, 0, mid, task);
            continue;
        }
        const unsigned strip = task / block_rows, shift = strip * width;
        if (strip != loaded) {
            __syncwarp();  // nobody reads the old strip any more
            const unsigned length = min(width, columns - shift);
            for (unsigned i = lane; i < length; i += WARP) strip_x[i] = x[shift + i];
            loaded = strip;
            __syncwarp();
        }
        multiply_block(a, strip_x, shift, mid, task);
    }
    const unsigned competitive = runs[gridDim.x];
    for (;;) {
        unsigned drawn = 0;
        if (lane == 0) drawn = atomicAdd(ticket, (unsigned)SUB_N);
        drawn = __shfl_sync(EVERY, drawn, 0);
        const unsigned first = competitive + drawn;
        if (first >= num_tasks) return;
        const unsigned last = min(first + SUB_N, num_tasks);
        for (unsigned place = first; place < last; ++place)
            multiply_block(a, x, 0, mid, tasks[place]);
    }
}

// Add the strips of each row in order; set the ticket back for the next product of the stream.
extern "C" __global__ void __launch_bounds__(256) paper_combine(
    VALUE* __restrict__ y, const VALUE* __restrict__ mid, VALUE alpha, VALUE beta, unsigned rows,
    unsigned height, unsigned strips, unsigned* ticket)
{
    const unsigned row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row == 0) *ticket = 0;
    if (row >= rows) return;
    const unsigned top = row / height * height, tall = min(height, rows - top);
    const VALUE* at = mid + (u64)top * strips + (row - top);
    VALUE total = 0;
    for (unsigned strip = 0; strip < strips; ++strip) total += at[(u64)strip * tall];
    y[row] = beta == 0 ? alpha * total : multiply_add(alpha, total, beta * y[row]);
}
