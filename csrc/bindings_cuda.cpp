// kr_fast._cuda: as bindings_cpu.cpp, with the CUDA stream as one more address. A launch error raises RuntimeError.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "bindings_common.h"
#include "cuda/distillation/distillation_loss.h"
#include "cuda/nn/group_norm_silu.h"
#include "cuda/membership/lira.h"
#include "cuda/membership/membership_signals.h"
#include "cuda/batched/model_residual_block.h"
#include "cuda/sampling/pack_uint8.h"
#include "cuda/sampling/philox_normal.h"
#include "cuda/membership/rmia.h"
#include "cuda/sampling/solver_step.h"

namespace py = pybind11;

namespace kr {

KR_FIELDS(cuda::DistillationBuffers, KR_FIELD(row_loss), KR_FIELD(loss), KR_FIELD(stats), KR_FIELD(grad),
          KR_FIELD(scale), KR_FIELD(upstream), KR_FIELD(unless_one), KR_FIELD(upstream_step), KR_FIELD(workspace))

KR_FIELDS(cuda::LiraBuffers, KR_FIELD(constant), KR_FIELD(pooled), KR_FIELD(num_unscored))

KR_FIELDS(cuda::ResidualBlock, KR_FIELD(x), KR_FIELD(weight1), KR_FIELD(bias1), KR_FIELD(weight2), KR_FIELD(bias2),
          KR_FIELD(scale), KR_FIELD(shift), KR_FIELD(models), KR_FIELD(images), KR_FIELD(height), KR_FIELD(width),
          KR_FIELD(channels), KR_FIELD(bf16), KR_FIELD(relu), KR_FIELD(y))

}  // namespace kr

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

void check(int status, const char* op) {
    if (status != cudaSuccess)
        throw std::runtime_error(std::string(op) +
                                 ": CUDA launch failed: " + cudaGetErrorString(static_cast<cudaError_t>(status)));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "CUDA kernels of kr_fast.";
    m.attr("cuda_version") = CUDART_VERSION;
#ifdef KR_CUDA_ARCHITECTURES  // of setup.py, the items of TORCH_CUDA_ARCH_LIST
    m.attr("architectures") = KR_CUDA_ARCHITECTURES;
#endif
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

    // group_norm_silu
    m.def(
        "group_norm_silu",
        [](const kr::GroupNorm& call, Address queue) {
            check(kr::cuda::group_norm_silu(call, at<void>(queue)), "group_norm_silu");
        },
        release());

    // lira: first the pooled variances' sums, where the variance asks for them
    m.attr("lira_models") = kr::cuda::kLiraModels;
    m.attr("lira_blocks") = kr::cuda::kLiraBlocks;
    m.def(
        "lira_pool",
        [](const kr::Lira& call, Address partial, Address queue) {
            check(kr::cuda::lira_pool(call, at<double>(partial), at<void>(queue)), "lira");
        },
        release());
    m.def(
        "lira",
        [](const kr::Lira& call, const kr::cuda::LiraBuffers& buffers, Address queue) {
            check(kr::cuda::lira(call, buffers, at<void>(queue)), "lira");
        },
        release());

    // membership_signals
    m.def(
        "membership_signals",
        [](const kr::MembershipSignals& call, Address queue) {
            check(kr::cuda::membership_signals(call, at<void>(queue)), "membership_signals");
        },
        release());

    // model_residual_block
    m.def("residual_block_images", &kr::cuda::residual_block_images);
    m.def(
        "model_residual_block",
        [](const kr::cuda::ResidualBlock& call, Address queue) {
            check(kr::cuda::model_residual_block(call, at<void>(queue)), "model_residual_block");
        },
        release());

    // pack_uint8
    m.def(
        "pack_uint8",
        [](Address x, int dtype, int64_t batch, int64_t channels, int64_t pixels, bool channels_last, Address out,
           Address queue) {
            check(kr::cuda::pack_uint8(at<const void>(x), static_cast<kr::Dtype>(dtype), batch, channels, pixels,
                                       channels_last, at<uint8_t>(out), at<void>(queue)),
                  "pack_uint8");
        },
        release());

    // rmia: counts of a query, then the vote of several
    m.def(
        "rmia_below",
        [](const kr::Rmia& call, Address below, Address queue) {
            check(kr::cuda::rmia_below(call, at<int32_t>(below), at<void>(queue)), "rmia");
        },
        release());
    m.def(
        "rmia_vote",
        [](const kr::Rmia& call, Address below, Address rank, Address count, Address queue) {
            check(kr::cuda::rmia_vote(call, at<const int32_t>(below), at<const int32_t>(rank),
                                      at<unsigned long long>(count), at<void>(queue)),
                  "rmia");
        },
        release());

    // solver_step
    m.def(
        "solver_step",
        [](const kr::SolverStep& call, Address queue) {
            check(kr::cuda::solver_step(call, at<void>(queue)), "solver_step");
        },
        release());

    // distillation_loss
    m.attr("distillation_loss_workspace") = kr::cuda::kDistillationWorkspace;
    m.def(
        "distillation_loss",
        [](const kr::DistillationLoss& call, const kr::cuda::DistillationBuffers& buffers, bool forward,
           Address queue) {
            auto run = forward ? kr::cuda::distillation_loss_forward : kr::cuda::distillation_loss_backward;
            check(run(call, buffers, at<void>(queue)), "distillation_loss");
        },
        release());
    m.def("distillation_loss_use_clusters", &kr::cuda::distillation_loss_use_clusters);
    m.def("distillation_loss_cluster", [](int64_t classes, int input_dtype, int target_dtype) {
        kr::DistillationLoss call = {};
        call.classes = classes, call.temperature = call.soft = 1;
        call.input_dtype = static_cast<kr::Dtype>(input_dtype),
        call.target_dtype = static_cast<kr::Dtype>(target_dtype);
        return kr::cuda::distillation_loss_cluster(call);
    });
}
