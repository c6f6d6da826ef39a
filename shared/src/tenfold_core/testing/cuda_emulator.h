// SPDX-License-Identifier: Apache-2.0
// Run CUDA kernels on a CPU, for tests: every thread of a block is a fiber of one system thread.
//
// A fiber runs until it waits for its warp or its block; then the next one runs. Blocks follow each
// other. What real hardware leaves undefined stops the program with a message: a warp operation that
// lanes of its mask have left, and a barrier that threads wait for at different places.

#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>
#include <utility>
#include <vector>

struct dim3 { unsigned x = 1, y = 1, z = 1; };

namespace emulator {

enum Wait { RUNNING, AT_WARP, AT_BLOCK, LEFT };

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    dim3 index;
    Wait wait = RUNNING;
    int place = 0;  // source line of the barrier it waits at
    unsigned long long sent = 0;
};

inline std::vector<Fiber> fibers;
inline Fiber* current;
inline ucontext_t scheduler;
inline dim3 block_index, block_size, grid_size;
inline std::vector<unsigned char> dynamic_shared;

[[noreturn]] inline void fail(const char* text, int line) {
    std::fprintf(stderr, "emulated kernel, line %d: %s\n", line, text);
    std::abort();
}

inline void wait(Wait kind, int line) {
    current->wait = kind;
    current->place = line;
    swapcontext(&current->context, &scheduler);
}

inline unsigned lane() { return current->index.x % 32; }
inline Fiber* warp() { return &fibers[current->index.x / 32 * 32]; }

// Exchange one word among the lanes of a warp: send, wait for all, read, wait until all have read.
template <typename T, typename Read> auto exchange(unsigned mask, T value, int line, Read read) {
    static_assert(sizeof(T) <= 8);
    if (!(mask >> lane() & 1)) fail("a lane outside the mask takes part", line);
    std::memcpy(&current->sent, &value, sizeof(T));
    wait(AT_WARP, line);
    auto result = read();
    wait(AT_WARP, -line);
    return result;
}

template <typename T> T sent_by(unsigned source) {
    T value;
    std::memcpy(&value, &(warp() + source)->sent, sizeof(T));
    return value;
}

// Let those that wait go on once all that must come have come; return whether any did.
inline bool release() {
    bool any = false;
    const unsigned size = fibers.size();
    for (unsigned first = 0; first < size; first += 32) {
        const unsigned last = std::min(first + 32, size);
        unsigned waiting = 0, left = 0;
        int place = 0;
        for (unsigned i = first; i < last; ++i) {
            if (fibers[i].wait == AT_WARP) { ++waiting; place = fibers[i].place; }
            if (fibers[i].wait == LEFT) ++left;
        }
        if (!waiting) continue;
        if (left) fail("a lane has left before an operation of its warp", std::abs(place));
        if (waiting < last - first) continue;
        for (unsigned i = first; i < last; ++i) {
            if (fibers[i].place != place) fail("lanes wait at different places", std::abs(place));
            fibers[i].wait = RUNNING;
        }
        any = true;
    }
    if (any) return true;
    unsigned waiting = 0, left = 0;
    for (const Fiber& fiber : fibers) {
        waiting += fiber.wait == AT_BLOCK;
        left += fiber.wait == LEFT;
    }
    if (!waiting || waiting + left < size) return false;
    int place = 0;
    for (Fiber& fiber : fibers) {
        if (fiber.wait != AT_BLOCK) continue;
        if (place && fiber.place != place) fail("threads wait at different barriers", place);
        place = fiber.place;
        fiber.wait = RUNNING;
    }
    return true;
}

template <typename... Args, std::size_t... I>
void call(void (*kernel)(Args...), void** args, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_reference_t<Args>*>(args[I])...);
}

inline void (*body)(void*);
inline void* body_data;
inline void enter() {
    body(body_data);
    current->wait = LEFT;
    swapcontext(&current->context, &scheduler);
}

inline void run_block() {
    for (Fiber& fiber : fibers) {
        fiber.wait = RUNNING;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, enter, 0);
    }
    for (;;) {
        bool left = true;
        for (Fiber& fiber : fibers) {
            if (fiber.wait == RUNNING) {
                current = &fiber;
                swapcontext(&scheduler, &fiber.context);
            }
            left = left && fiber.wait == LEFT;
        }
        if (left) return;
        if (!release()) fail("a deadlock: some threads wait for others that do not come", 0);
    }
}

template <typename... Args>
void launch(void (*kernel)(Args...), dim3 grid, dim3 block, unsigned shared, void** args) {
    struct Call { void (*kernel)(Args...); void** args; } data = {kernel, args};
    body = [](void* opaque) {
        auto* found = static_cast<Call*>(opaque);
        call(found->kernel, found->args, std::index_sequence_for<Args...>());
    };
    body_data = &data;
    grid_size = grid;
    block_size = block;
    if (block.x % 32) fail("blocks are whole warps here", 0);
    fibers.resize(block.x);
    for (unsigned i = 0; i < block.x; ++i) {
        fibers[i].index = {i, 0, 0};
        fibers[i].stack.resize(64 << 10);
    }
    for (block_index.y = 0; block_index.y < grid.y; ++block_index.y)
        for (block_index.x = 0; block_index.x < grid.x; ++block_index.x) {
            dynamic_shared.assign(shared, 0xff);  // NaN: nothing may rely on zeros
            run_block();
        }
}

}  // namespace emulator

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ static
#define DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(emulator::dynamic_shared.data())
#define LOAD_STREAM(at) (*(at))
#define threadIdx (emulator::current->index)
#define blockIdx (emulator::block_index)
#define blockDim (emulator::block_size)
#define gridDim (emulator::grid_size)
#define __syncthreads() emulator::wait(emulator::AT_BLOCK, __LINE__)
#define __syncwarp() emulator::exchange(0xffffffffu, 0, __LINE__, [] { return 0; })
#define __threadfence() ((void)0)
#define __shfl_sync(mask, value, source) \
    emulator::exchange(mask, value, __LINE__, \
        [&] { return emulator::sent_by<std::decay_t<decltype(value)>>((source) % 32); })
#define __shfl_xor_sync(mask, value, far) \
    emulator::exchange(mask, value, __LINE__, \
        [&] { return emulator::sent_by<std::decay_t<decltype(value)>>(emulator::lane() ^ (far)); })
#define __shfl_up_sync(mask, value, far) \
    emulator::exchange(mask, value, __LINE__, [&] { \
        const unsigned from = emulator::lane() < (unsigned)(far) ? emulator::lane() \
                                                                 : emulator::lane() - (far); \
        return emulator::sent_by<std::decay_t<decltype(value)>>(from); })
#define __shfl_down_sync(mask, value, far) \
    emulator::exchange(mask, value, __LINE__, [&] { \
        const unsigned from = emulator::lane() + (far) > 31 ? emulator::lane() \
                                                            : emulator::lane() + (far); \
        return emulator::sent_by<std::decay_t<decltype(value)>>(from); })
#define __ballot_sync(mask, predicate) \
    emulator::exchange(mask, (int)!!(predicate), __LINE__, [] { \
        unsigned bits = 0; \
        for (unsigned source = 0; source < 32; ++source) \
            bits |= (unsigned)emulator::sent_by<int>(source) << source; \
        return bits; })
#define __popc(bits) __builtin_popcount(bits)
#define __ffs(bits) __builtin_ffs(bits)
#define __clz(bits) ((bits) ? __builtin_clz(bits) : 32)
#define __ldg(at) (*(at))

template <typename T, typename U> T atomicAdd(T* at, U value) { T old = *at; *at += (T)value; return old; }
template <typename T, typename U> T atomicMax(T* at, U value) { T old = *at; *at = std::max(old, (T)value); return old; }
template <typename T, typename U> T atomicMin(T* at, U value) { T old = *at; *at = std::min(old, (T)value); return old; }
using std::max;
using std::min;

#define EMULATE(kernel) \
    extern "C" void emulate_##kernel(const unsigned* size, unsigned shared, void** args) { \
        emulator::launch(kernel, {size[0], size[1], 1}, {size[2], 1, 1}, shared, args); \
    }
