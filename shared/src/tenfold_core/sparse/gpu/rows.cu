// SPDX-License-Identifier: Apache-2.0
// y = alpha A X + beta y for CSR: LANES neighbouring threads a row, then a tree over their sums.
//
// The macros: VALUE, float or double; LANES, 2 to 32, a power of two; COLUMNS, 1, 2, 4 or 8.

#define EVERY 0xffffffffu

typedef unsigned long long u64;

__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }

extern "C" __global__ void __launch_bounds__(256) rows_product(
    const VALUE* __restrict__ x, VALUE* y, VALUE alpha, VALUE beta, unsigned stride,
    unsigned rows, const long long* __restrict__ ptr, const int* __restrict__ col,
    const VALUE* __restrict__ val)
{
    const u64 thread = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    const u64 row = thread / LANES;
    const unsigned lane = threadIdx.x % LANES;
    VALUE sums[COLUMNS];
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) sums[j] = 0;
    if (row < rows) {
        const long long end = ptr[row + 1];
        for (long long p = ptr[row] + lane; p < end; p += LANES) {
            const VALUE value = val[p];
            const VALUE* from = x + (u64)(unsigned)col[p] * stride;
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j) sums[j] = multiply_add(value, from[j], sums[j]);
        }
    }
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j)
        for (int far = LANES / 2; far; far /= 2) sums[j] += __shfl_xor_sync(EVERY, sums[j], far);
    if (row >= rows || lane != 0) return;
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) {
        VALUE* at = y + row * stride + j;
        *at = beta == 0 ? alpha * sums[j] : multiply_add(alpha, sums[j], beta * *at);
    }
}
