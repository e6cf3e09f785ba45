// kr_fast._cuda: as bindings_cpu.cpp, with the CUDA stream as one more address. A launch error raises RuntimeError.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/philox_normal.h"
#include "cuda/solver_step.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

void check(int status, const char* op) {
    if (status != cudaSuccess)
        throw std::runtime_error(std::string(op) + ": CUDA launch failed: " +
                                 cudaGetErrorString(static_cast<cudaError_t>(status)));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "CUDA kernels of kr_fast.";
    m.attr("cuda_version") = CUDART_VERSION;
    using release = py::call_guard<py::gil_scoped_release>;

    // philox_normal
    m.def(
        "philox_normal",
        [](Address ids, int64_t count, int64_t numel, uint64_t seed, uint32_t stream, Address out, Address queue) {
            check(kr::cuda::philox_normal(at<const int64_t>(ids), count, numel, seed, stream, at<float>(out),
                                          at<void>(queue)),
                  "philox_normal");
        },
        release());

    // solver_step
    m.def(
        "solver_step",
        [](Address x, Address cond, Address uncond, Address ids, const std::vector<Address>& history,
           const std::vector<float>& row, float guidance, uint64_t seed, uint32_t stream, int64_t batch, int64_t numel,
           Address y, Address queue) {
            std::vector<const float*> terms;
            for (Address each : history) terms.push_back(at<const float>(each));
            check(kr::cuda::solver_step(at<const float>(x), at<const float>(cond), at<const float>(uncond),
                                        at<const int64_t>(ids), terms.data(), static_cast<int>(terms.size()),
                                        row.data(), guidance, seed, stream, batch, numel, at<float>(y),
                                        at<void>(queue)),
                  "solver_step");
        },
        release());
}
