// The threads of a CUDA block as fibers of one host thread. A fiber runs until it must wait for others: at a block
// barrier or at a warp's collective. So these have their true meaning, and misuse is found that a GPU would not report:
// a collective whose lanes came from different places, that waits for a lane which has left, or a barrier that some
// threads never reach.
//
// The blocks of a cluster live side by side, each with its own dynamic shared memory; one runs until all its threads
// wait at the cluster's barrier or have left. Static shared memory is one for all, so that a kernel may keep nothing in
// it across such a barrier.
#pragma once
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace cuda_host {

enum class Wait { none, warp, block, cluster, done };
enum class Collective { shuffle, ballot };

struct Place {
    const char* what;
    int line;
};

// Into shared memory, until it is waited for.
struct Copy {
    void* to;
    const void* from;
    size_t bytes;
};

struct Fiber {
    ucontext_t context;
    jmp_buf at;
    bool started;
    Wait wait;
    Place place;
    uint32_t mask;   // lanes that the collective waits for
    uint64_t value;  // what this lane gives, and then what it gets
    int source;      // lane that a shuffle reads
    bool arrived;    // at the cluster's barrier, and has not waited there
    uint64_t phase;  // of that barrier on arrival
    std::vector<Copy> copies;
};

constexpr int kWarp = 32, kMostThreads = 1024, kMostBlocks = 8;  // of a block; of a cluster
constexpr size_t kStack = 64 << 10, kGuard = 64 << 10;           // below each stack lies memory that nobody may touch

struct Machine {
    std::vector<Fiber> fibers;
    char* stacks = nullptr;
    int threads = 0, current = 0;                    // threads of a block; number of a fiber among those of the cluster
    int cluster = 1;                                 // blocks
    uint64_t first_block = 0;                        // of the cluster
    uint64_t phase = 0;                              // of the cluster's barrier
    int compute_capability = 90, most_clusters = 2;  // what the device says of itself; clusters that fit on it at once
    int compiled_for = 90;                           // what kernels say of themselves
    int processors = 4;                              // that the device says it has
    size_t shared_at_most = 227 << 10;               // bytes of shared memory that a block may have
    bool descending = false;     // the order in which blocks and threads run, so that a race shows as another result
    unsigned most_blocks = ~0u;  // a grid of one dimension is cut down to so many
    std::function<void()> kernel;
    std::vector<char> shared[kMostBlocks];
    size_t shared_bytes = 0;
    ucontext_t scheduler;
    jmp_buf scheduler_at;
    std::string error;
};
inline Machine machine;

inline void switch_to_scheduler() {
    Fiber& self = machine.fibers[machine.current];
#ifdef __SANITIZE_ADDRESS__
    swapcontext(&self.context, &machine.scheduler);
#else
    if (!_setjmp(self.at)) _longjmp(machine.scheduler_at, 1);
#endif
}

inline std::string where(int index) {
    const Fiber& fiber = machine.fibers[index];
    char text[160];
    std::snprintf(text, sizeof text, "thread %d %s%s", index % machine.threads,
                  fiber.wait == Wait::done   ? "has left"
                  : fiber.wait == Wait::none ? "runs"
                                             : "waits at ",
                  fiber.wait == Wait::warp || fiber.wait == Wait::block || fiber.wait == Wait::cluster
                      ? (std::string(fiber.place.what) + ", line " + std::to_string(fiber.place.line)).c_str()
                      : "");
    return text;
}

// Never returns to the kernel: the block is given up.
[[noreturn]] inline void fail(const std::string& why) {
    machine.error = why + " in block " + std::to_string(blockIdx.x) + ": " + where(machine.current);
    for (;;) switch_to_scheduler();
}

inline void finish_collective(Collective kind, uint32_t mask, int first) {
    uint64_t given[kWarp] = {}, ballot = 0;
    for (int lane = 0; lane < kWarp; ++lane)
        if (mask >> lane & 1) {
            given[lane] = machine.fibers[first + lane].value;
            ballot |= (uint64_t)(given[lane] != 0) << lane;
        }
    for (int lane = 0; lane < kWarp; ++lane)
        if (mask >> lane & 1) {
            Fiber& fiber = machine.fibers[first + lane];
            if (kind == Collective::shuffle && !(mask >> fiber.source & 1))
                fail("shuffle from lane " + std::to_string(fiber.source) + ", which is not in its mask,");
            fiber.value = kind == Collective::shuffle ? given[fiber.source] : ballot;
            fiber.wait = Wait::none;
        }
}

inline uint64_t collective(Collective kind, Place place, uint32_t mask, uint64_t value, int source) {
    const int first = machine.current / kWarp * kWarp, lane = machine.current % kWarp;
    Fiber& self = machine.fibers[machine.current];
    self.place = place, self.mask = mask, self.value = value, self.source = source, self.wait = Wait::warp;
    if (!(mask >> lane & 1)) fail("collective by a lane outside its mask");
    for (int other = 0; other < kWarp; ++other) {
        if (!(mask >> other & 1)) continue;
        const Fiber& fiber = machine.fibers[first + other];
        if (first % machine.threads + other >= machine.threads || fiber.wait == Wait::done)
            fail("collective with lane " + std::to_string(other) + ", which has left,");
        if (fiber.wait != Wait::warp) {
            switch_to_scheduler();
            return self.value;
        }
        if (fiber.mask != mask || fiber.place.line != place.line || std::strcmp(fiber.place.what, place.what))
            fail("collective whose lanes differ: " + where(first + other) + ", and");
    }
    finish_collective(kind, mask, first);
    return self.value;
}

// Opens the barrier of the current block if every thread that has not left waits there.
inline bool open_barrier() {
    const int from = machine.current / machine.threads * machine.threads;
    int first = -1;
    for (int k = from; k < from + machine.threads; ++k) {
        const Fiber& fiber = machine.fibers[k];
        if (fiber.wait == Wait::done) continue;
        if (fiber.wait != Wait::block) return false;
        if (first < 0) first = k;
        if (fiber.place.line != machine.fibers[first].place.line)
            fail("barrier that threads reach in different places: " + where(first) + ", " + where(k) + ", and");
    }
    for (int k = from; k < from + machine.threads; ++k)
        if (machine.fibers[k].wait == Wait::block) machine.fibers[k].wait = Wait::none;
    return true;
}

// Opens the cluster's barrier if every thread that has not left has arrived.
inline void open_cluster_barrier() {
    const int all = machine.threads * machine.cluster;
    for (int k = 0; k < all; ++k)
        if (machine.fibers[k].wait != Wait::done &&
            !(machine.fibers[k].arrived && machine.fibers[k].phase == machine.phase))
            return;
    ++machine.phase;
    for (int k = 0; k < all; ++k)
        if (machine.fibers[k].wait == Wait::cluster) machine.fibers[k].wait = Wait::none;
}

inline void cluster_arrive(Place place) {
    Fiber& self = machine.fibers[machine.current];
    self.place = place;
    if (self.arrived) fail("second arrival at the cluster's barrier without a wait");
    self.arrived = true, self.phase = machine.phase;
    open_cluster_barrier();
}

inline void cluster_wait(Place place) {
    Fiber& self = machine.fibers[machine.current];
    self.place = place;
    if (!self.arrived) fail("wait at the cluster's barrier without an arrival");
    if (self.phase == machine.phase) {
        self.wait = Wait::cluster;
        switch_to_scheduler();
    }
    self.arrived = false;
}

inline void barrier(Place place) {
    Fiber& self = machine.fibers[machine.current];
    self.place = place, self.wait = Wait::block;
    if (!open_barrier()) switch_to_scheduler();
}

inline void entry() {
    machine.kernel();
    if (!machine.fibers[machine.current].copies.empty()) fail("end of a thread whose copies were not waited for");
    machine.fibers[machine.current].wait = Wait::done;
    open_barrier();
    if (machine.cluster > 1) open_cluster_barrier();
    switch_to_scheduler();
}

inline void resume(int index) {
    Fiber& fiber = machine.fibers[index];
    machine.current = index;
    const unsigned at = (unsigned)(index % machine.threads);
    const uint64_t block = machine.first_block + index / machine.threads;
    blockIdx = {(unsigned)(block % gridDim.x), (unsigned)(block / gridDim.x % gridDim.y),
                (unsigned)(block / gridDim.x / gridDim.y)};
    threadIdx = {at % blockDim.x, at / blockDim.x % blockDim.y, at / (blockDim.x * blockDim.y)};
#ifndef __SANITIZE_ADDRESS__
    if (_setjmp(machine.scheduler_at)) return;
    if (fiber.started) _longjmp(fiber.at, 1);
#endif
    if (!fiber.started) {
        fiber.started = true;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = machine.stacks + (size_t)index * (kStack + kGuard) + kGuard;
        fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, entry, 0);
    }
    swapcontext(&machine.scheduler, &fiber.context);
}

// Runs the threads of one block of the cluster until none can go on: a warp as far as it gets before the next, so that
// a missing barrier between warps shows.
inline bool run_block(int block) {
    const int warps = (machine.threads + kWarp - 1) / kWarp;
    auto run_warp = [&](int warp) {
        bool any = false;
        for (bool moved = true; moved && machine.error.empty(); any |= moved) {
            moved = false;
            for (int k = 0; k < kWarp && machine.error.empty(); ++k) {
                const int thread = warp * kWarp + (machine.descending ? kWarp - 1 - k : k);
                const int index = block * machine.threads + thread;
                if (thread < machine.threads && machine.fibers[index].wait == Wait::none) resume(index), moved = true;
            }
        }
        return any;
    };
    bool any = false;
    for (bool moved = true; moved && machine.error.empty(); any |= moved) {
        moved = false;
        for (int w = 0; w < warps; ++w) moved |= run_warp(machine.descending ? warps - 1 - w : w);
    }
    return any;
}

inline void run_cluster() {
    const int all = machine.threads * machine.cluster;
    for (int k = 0; k < all; ++k) {
        Fiber& fiber = machine.fibers[k];
        fiber.started = fiber.arrived = false, fiber.wait = Wait::none;
        fiber.copies.clear();
    }
    for (int b = 0; b < machine.cluster; ++b) {
        machine.shared[b].resize(machine.shared_bytes + 128);
        std::memset(machine.shared[b].data(), 0xFF, machine.shared[b].size());  // NaN to whoever reads before writing
    }
    for (bool moved = true; moved && machine.error.empty();) {
        moved = false;
        for (int b = 0; b < machine.cluster; ++b) moved |= run_block(machine.descending ? machine.cluster - 1 - b : b);
    }
    for (int k = 0; k < all && machine.error.empty(); ++k)
        if (machine.fibers[k].wait != Wait::done)
            machine.error =
                "deadlock in block " + std::to_string(machine.first_block + k / machine.threads) + ": " + where(k);
}

// All clusters of a grid, one after the other. machine.error is empty if all went well.
inline void run_grid(dim3 grid, dim3 block, size_t shared, std::function<void()> kernel, int cluster = 1) {
    constexpr int kMost = kMostThreads * kMostBlocks;
    if (!machine.stacks) {
        const size_t each = kStack + kGuard, flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        machine.stacks = static_cast<char*>(mmap(nullptr, each * kMost, PROT_READ | PROT_WRITE, flags, -1, 0));
        for (int k = 0; k < kMost; ++k) mprotect(machine.stacks + k * each, kGuard, PROT_NONE);
        machine.fibers.resize(kMost);
    }
    machine.error.clear();
    machine.kernel = std::move(kernel);
    machine.shared_bytes = shared;
    machine.threads = (int)(block.x * block.y * block.z), machine.cluster = cluster;
    if (grid.x > machine.most_blocks)
        grid.x = machine.most_blocks < (unsigned)cluster ? cluster : machine.most_blocks / cluster * cluster;
    gridDim = grid, blockDim = block;
    const uint64_t clusters = (uint64_t)grid.x * grid.y * grid.z / cluster;
    for (uint64_t k = 0; k < clusters && machine.error.empty(); ++k) {
        machine.first_block = (machine.descending ? clusters - 1 - k : k) * cluster;
        run_cluster();
    }
}

}  // namespace cuda_host
