// kr_fast._cpu: addresses in, work done, nothing kept. No arithmetic and no checks here: Python has validated dtype,
// shape, strides, device and lifetime before it takes an address. Every call releases the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "cpu/isa.h"
#include "cpu/pack_uint8.h"
#include "cpu/philox_normal.h"
#include "cpu/solver_step.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;  // 0 stands for "no tensor"

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "C++ kernels of kr_fast for CPUs.";
    using release = py::call_guard<py::gil_scoped_release>;

    m.def("isa", &kr::isa_name);
    m.def("isa_available", &kr::isa_available);
    m.def("set_isa", &kr::set_isa);

    // philox_normal
    m.def(
        "philox_normal",
        [](Address ids, int64_t count, int64_t numel, uint64_t seed, uint32_t stream, Address out, int threads) {
            kr::philox_normal(at<const int64_t>(ids), count, numel, seed, stream, at<float>(out), threads);
        },
        release());

    // solver_step
    m.def(
        "solver_step",
        [](Address x, Address cond, Address uncond, Address ids, const std::vector<Address>& history,
           const std::vector<float>& row, float guidance, uint64_t seed, uint32_t stream, int64_t batch, int64_t numel,
           Address y, int threads) {
            std::vector<const float*> terms;
            for (Address each : history) terms.push_back(at<const float>(each));
            kr::solver_step(at<const float>(x), at<const float>(cond), at<const float>(uncond), at<const int64_t>(ids),
                            terms.data(), static_cast<int>(terms.size()), row.data(), guidance, seed, stream, batch,
                            numel, at<float>(y), threads);
        },
        release());

    // pack_uint8
    m.def(
        "pack_uint8",
        [](Address x, int64_t batch, int64_t channels, int64_t pixels, bool channels_last, Address out, int threads) {
            kr::pack_uint8(at<const float>(x), batch, channels, pixels, channels_last, at<uint8_t>(out), threads);
        },
        release());
}
