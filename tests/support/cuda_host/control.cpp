// What tests may set on the machine that runs the blocks; called through ctypes.
#include <cuda_runtime.h>

// The order of blocks and threads, and a bound on the blocks of a grid: kernels that walk in strides must not notice.
extern "C" __attribute__((visibility("default"))) void cuda_host_set(bool descending, unsigned most_blocks) {
    cuda_host::machine.descending = descending;
    cuda_host::machine.most_blocks = most_blocks;
}

// The generation that the device is of, how many clusters fit on it at once, and the generation that kernels were
// compiled for.
extern "C" __attribute__((visibility("default"))) void cuda_host_device(int compute_capability, int most_clusters,
                                                                        int compiled_for) {
    cuda_host::machine.compute_capability = compute_capability;
    cuda_host::machine.most_clusters = most_clusters;
    cuda_host::machine.compiled_for = compiled_for;
}

// Its multiprocessors, and the bytes of shared memory that a block may have.
extern "C" __attribute__((visibility("default"))) void cuda_host_size(int processors, size_t shared_at_most) {
    cuda_host::machine.processors = processors;
    cuda_host::machine.shared_at_most = shared_at_most;
}
