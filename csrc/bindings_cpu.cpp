// kr_fast._cpu: addresses in, work done, nothing kept. No arithmetic and no checks here: Python has validated dtype,
// shape, strides, device and lifetime before it takes an address. Every call releases the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings_common.h"
#include "cpu/membership/attack_r.h"
#include "cpu/data/resize_image.h"
#include "cpu/nn/batch_norm_act.h"
#include "cpu/nn/block/preactivation_block.h"
#include "cpu/nn/direct_conv2d.h"
#include "cpu/membership/bootstrap_auc.h"
#include "cpu/distillation/distillation_loss.h"
#include "cpu/distillation/distillation_metrics.h"
#include "cpu/sampling/encode_png.h"
#include "cpu/nn/group_norm_silu.h"
#include "cpu/nn/optimizer_step.h"
#include "cpu/simd/isa.h"
#include "cpu/membership/lira.h"
#include "cpu/membership/membership_signals.h"
#include "cpu/sampling/pack_uint8.h"
#include "cpu/sampling/philox_normal.h"
#include "cpu/nn/qkv_attention.h"
#include "cpu/privacy/conv2d_grad_norms.h"
#include "cpu/privacy/embedding_grad_norms.h"
#include "cpu/privacy/group_norm_grad_norms.h"
#include "cpu/privacy/layer_norm_grad_norms.h"
#include "cpu/privacy/linear_grad_norms.h"
#include "cpu/membership/rmia.h"
#include "cpu/membership/roc.h"
#include "cpu/sampling/solver_step.h"
#include "cpu/nn/block/residual_block.h"
#include "cpu/nn/winograd_conv2d.h"

namespace py = pybind11;

namespace kr {

#define KR_RESIZE_AXIS(axis)                                                                                   \
    KR_FIELD_AS(axis##_from, axis.from), KR_FIELD_AS(axis##_to, axis.to), KR_FIELD_AS(axis##_taps, axis.taps), \
        KR_FIELD_AS(axis##_first, axis.first), KR_FIELD_AS(axis##_weights, axis.weights)

KR_FIELDS(ResizeImage, KR_FIELD(pixels), KR_FIELD(stride), KR_FIELD(channels), KR_FIELD(out), KR_FIELD(out_stride),
          KR_FIELD(out_channels), KR_RESIZE_AXIS(rows), KR_RESIZE_AXIS(columns))

KR_FIELDS(DistillationRequest, KR_FIELD(loss), KR_FIELD(row_loss), KR_FIELD(grad), KR_FIELD(upstream),
          KR_FIELD(upstream_step))

KR_FIELDS(DistillationMetrics, KR_LOGIT_PAIR, KR_FIELD(temperature), KR_FIELD(kl), KR_FIELD(agreement),
          KR_FIELD(teacher_confidence), KR_FIELD(teacher_entropy), KR_FIELD(cross_entropy), KR_FIELD(student_correct),
          KR_FIELD(teacher_correct))

KR_FIELDS(AttackR, KR_SHADOW_VALUES, KR_FIELD(float64), KR_FIELD(share))

KR_FIELDS(Roc, KR_FIELD(scores), KR_FIELD(members), KR_FIELD(n), KR_FIELD(thresholds), KR_FIELD(tp), KR_FIELD(fp))

KR_FIELDS(BestThreshold, KR_FIELD(values), KR_FIELD(members), KR_FIELD(examples), KR_FIELD(models), KR_FIELD(leave_out),
          KR_FIELD(thresholds))

KR_FIELDS(BootstrapAuc, KR_FIELD(inside), KR_FIELD(outside), KR_FIELD(groups), KR_FIELD(limits), KR_FIELD(num_limits),
          KR_FIELD(replicates), KR_FIELD(seed), KR_FIELD(auc), KR_FIELD(tp))

KR_FIELDS(ConvGradients, KR_FIELD(x), KR_FIELD(grad_output), KR_FIELD(records), KR_FIELD(images), KR_FIELD(height),
          KR_FIELD(width), KR_FIELD(inputs), KR_FIELD(output_height), KR_FIELD(output_width), KR_FIELD(outputs),
          KR_FIELD(kernel_height), KR_FIELD(kernel_width), KR_FIELD(stride_y), KR_FIELD(stride_x), KR_FIELD(pad_y),
          KR_FIELD(pad_x), KR_FIELD(dilation_y), KR_FIELD(dilation_x), KR_FIELD(groups), KR_FIELD(norms),
          KR_FIELD(weight), KR_FIELD(bias), KR_FIELD(with_bias))

KR_FIELDS(LinearGradients, KR_FIELD(x), KR_FIELD(grad_output), KR_FIELD(records), KR_FIELD(positions), KR_FIELD(inputs),
          KR_FIELD(outputs), KR_FIELD(norms), KR_FIELD(weight), KR_FIELD(bias), KR_FIELD(with_bias))

KR_FIELDS(QkvAttention, KR_FIELD(qkv), KR_FIELD(dtype), KR_FIELD(batch), KR_FIELD(tokens), KR_FIELD(heads),
          KR_FIELD(head_channels), KR_FIELD(out), KR_FIELD(logsumexp))

KR_FIELDS(QkvAttentionBackward, KR_FIELD(qkv), KR_FIELD(dtype), KR_FIELD(batch), KR_FIELD(tokens), KR_FIELD(heads),
          KR_FIELD(head_channels), KR_FIELD(out), KR_FIELD(grad_out), KR_FIELD(logsumexp), KR_FIELD(grad_qkv))

KR_FIELDS(GroupNormStatistics, KR_FIELD(mean), KR_FIELD(rstd))

KR_FIELDS(GroupNormRelu, KR_FIELD(residual))

KR_FIELDS(GroupNormGradient, KR_FIELD(grad), KR_FIELD(mean), KR_FIELD(rstd), KR_FIELD(out), KR_FIELD(skip_out),
          KR_FIELD(grad_shift), KR_FIELD(grad_weight), KR_FIELD(grad_bias), KR_FIELD(samples), KR_FIELD(made),
          KR_FIELD(passed))

KR_FIELDS(DirectConvShape, KR_FIELD(height), KR_FIELD(width), KR_FIELD(inputs), KR_FIELD(output_height),
          KR_FIELD(output_width), KR_FIELD(outputs), KR_FIELD(kernel_height), KR_FIELD(kernel_width),
          KR_FIELD(stride_y), KR_FIELD(stride_x), KR_FIELD(pad_y), KR_FIELD(pad_x))

KR_FIELDS(DirectConvSteps, KR_FIELD(output), KR_FIELD(input), KR_FIELD(tap))

inline void assign(DirectConvShape& to, PyObject* from) { to = from_dict<DirectConvShape>(from); }
inline void assign(DirectConvSteps& to, PyObject* from) { to = from_dict<DirectConvSteps>(from); }

KR_FIELDS(DirectConv, KR_FIELD(shape), KR_FIELD(batch), KR_FIELD(x), KR_FIELD(weight), KR_FIELD(steps), KR_FIELD(bias),
          KR_FIELD(y))

KR_FIELDS(DirectConvBackward, KR_FIELD(shape), KR_FIELD(batch), KR_FIELD(x), KR_FIELD(weight), KR_FIELD(steps),
          KR_FIELD(grad_y), KR_FIELD(grad_x), KR_FIELD(grad_weight), KR_FIELD(grad_steps), KR_FIELD(grad_bias))

KR_FIELDS(PreactivationBlock, KR_FIELD(x), KR_FIELD(skip), KR_FIELD(batch), KR_FIELD(height), KR_FIELD(width),
          KR_FIELD(x_channels), KR_FIELD(skip_channels), KR_FIELD(outputs), KR_FIELD(norm_weight), KR_FIELD(norm_bias),
          KR_FIELD(groups), KR_FIELD(eps), KR_FIELD(shift), KR_FIELD(shift_stride), KR_FIELD(projection),
          KR_FIELD(weight), KR_FIELD(input_step), KR_FIELD(tap_step), KR_FIELD(bias), KR_FIELD(transform),
          KR_FIELD(first), KR_FIELD(second), KR_FIELD(convolved), KR_FIELD(statistics), KR_FIELD(y))

KR_FIELDS(PreactivationBlockGradient, KR_FIELD(grad), KR_FIELD(grad_x), KR_FIELD(grad_skip), KR_FIELD(grad_shift),
          KR_FIELD(grad_weight), KR_FIELD(grad_bias), KR_FIELD(grad_norm_weight), KR_FIELD(grad_norm_bias))

KR_FIELDS(BatchNormAct, KR_FIELD(x), KR_FIELD(residual), KR_FIELD(rows), KR_FIELD(channels), KR_FIELD(dtype),
          KR_FIELD(weight), KR_FIELD(bias), KR_FIELD(eps), KR_FIELD(relu), KR_FIELD(y), KR_FIELD(mean), KR_FIELD(var))

KR_FIELDS(BatchNormActGradient, KR_FIELD(grad), KR_FIELD(x), KR_FIELD(y), KR_FIELD(rows), KR_FIELD(channels),
          KR_FIELD(dtype), KR_FIELD(weight), KR_FIELD(bias), KR_FIELD(mean), KR_FIELD(var), KR_FIELD(eps),
          KR_FIELD(relu), KR_FIELD(out), KR_FIELD(passed), KR_FIELD(grad_weight), KR_FIELD(grad_bias))

KR_FIELDS(WinogradConv, KR_FIELD(x), KR_FIELD(batch), KR_FIELD(height), KR_FIELD(width), KR_FIELD(inputs),
          KR_FIELD(weight), KR_FIELD(scale), KR_FIELD(bias), KR_FIELD(residual), KR_FIELD(activation), KR_FIELD(pool),
          KR_FIELD(y), KR_FIELD(outputs))

KR_FIELDS(WinogradPack, KR_FIELD(weight), KR_FIELD(outputs), KR_FIELD(inputs), KR_FIELD(output_step),
          KR_FIELD(input_step), KR_FIELD(tap_step), KR_FIELD(scale), KR_FIELD(transform), KR_FIELD(packed))

KR_FIELDS(WinogradGradWeight, KR_FIELD(x), KR_FIELD(grad_output), KR_FIELD(batch), KR_FIELD(height), KR_FIELD(width),
          KR_FIELD(inputs), KR_FIELD(outputs), KR_FIELD(grad_weight), KR_FIELD(input_step), KR_FIELD(tap_step),
          KR_FIELD(grad_bias))

KR_FIELDS(ResidualBlock, KR_FIELD(x), KR_FIELD(batch), KR_FIELD(height), KR_FIELD(width), KR_FIELD(inputs),
          KR_FIELD(outputs), KR_FIELD(stride), KR_FIELD(projection), KR_FIELD(winograd), KR_FIELD(weight),
          KR_FIELD(input_step), KR_FIELD(tap_step), KR_FIELD(transform), KR_FIELD(norm_weight), KR_FIELD(norm_bias),
          KR_FIELD(running_mean), KR_FIELD(running_var), KR_FIELD(momentum), KR_FIELD(eps), KR_FIELD(convolved),
          KR_FIELD(statistics), KR_FIELD(positive), KR_FIELD(y))

KR_FIELDS(ResidualBlockGradient, KR_FIELD(grad), KR_FIELD(grad_x), KR_FIELD(grad_weight), KR_FIELD(grad_norm))

KR_FIELDS(OptimizerStep, KR_FIELD(tensors), KR_FIELD(table), KR_FIELD(grads), KR_FIELD(groups), KR_FIELD(adamw),
          KR_FIELD(max_norm), KR_FIELD(average_weight))

KR_FIELDS(GroupNormGradNorms, KR_FIELD(x), KR_FIELD(grad), KR_FIELD(records), KR_FIELD(rows), KR_FIELD(channels),
          KR_FIELD(pixels), KR_FIELD(groups), KR_FIELD(dtype), KR_FIELD(channels_last), KR_FIELD(eps), KR_FIELD(norms),
          KR_FIELD(weight), KR_FIELD(bias))

KR_FIELDS(LayerNormGradNorms, KR_FIELD(x), KR_FIELD(grad), KR_FIELD(records), KR_FIELD(rows), KR_FIELD(size),
          KR_FIELD(dtype), KR_FIELD(eps), KR_FIELD(with_bias), KR_FIELD(norms), KR_FIELD(weight), KR_FIELD(bias))

KR_FIELDS(EmbeddingGradNorms, KR_FIELD(indices), KR_FIELD(grad), KR_FIELD(records), KR_FIELD(rows), KR_FIELD(size),
          KR_FIELD(dtype), KR_FIELD(padding), KR_FIELD(norms))

}  // namespace kr

namespace {

using Address = uintptr_t;  // 0 stands for "no tensor"

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "C++ kernels of kr_fast for CPUs.";
    m.attr("compiler") = __VERSION__;
#ifdef __SANITIZE_ADDRESS__
    m.attr("sanitized") = true;
#else
    m.attr("sanitized") = false;
#endif
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
    m.def("solver_step", &kr::solver_step, release());

    // pack_uint8
    m.def(
        "pack_uint8",
        [](Address x, int64_t batch, int64_t channels, int64_t pixels, bool channels_last, Address out, int threads) {
            kr::pack_uint8(at<const float>(x), batch, channels, pixels, channels_last, at<uint8_t>(out), threads);
        },
        release());

    // encode_png
    m.def(
        "encode_png",
        [](Address images, int64_t batch, int64_t height, int64_t width, int64_t channels, Address out, int threads) {
            kr::encode_png(at<const uint8_t>(images), batch, height, width, channels, at<uint8_t>(out), threads);
        },
        release());

    // resize_image
    m.def("resize_image", &kr::resize_image, release());

    // distillation_loss: the loss over all rows, and the first row whose label or index is wrong
    m.def(
        "distillation_loss",
        [](const kr::DistillationLoss& call, const kr::DistillationRequest& request, int threads) {
            const kr::DistillationResult result = kr::distillation_loss(call, request, threads);
            return std::make_pair(result.loss, result.invalid);
        },
        release());

    // distillation_metrics
    m.def("distillation_metrics", &kr::distillation_metrics, release());

    // group_norm_silu
    m.def(
        "group_norm_silu", [](const kr::GroupNorm& call, int threads) { kr::group_norm_silu(call, {}, threads); },
        release());
    m.def("group_norm_silu_forward", &kr::group_norm_silu, release());
    m.def("group_norm_relu", &kr::group_norm_relu, release());
    m.def("group_norm_silu_backward", &kr::group_norm_silu_backward, release());

    // batch_norm_act
    m.def("batch_norm_act", &kr::batch_norm_act, release());
    m.def("batch_norm_act_backward", &kr::batch_norm_act_backward, release());

    // direct_conv2d
    m.def("direct_conv2d", &kr::direct_conv2d, release());
    m.def("direct_conv2d_backward", &kr::direct_conv2d_backward, release());

    // residual_block
    m.def("residual_block", &kr::residual_block, release());
    m.def("residual_block_inference", &kr::residual_block_inference, release());
    m.def("residual_block_backward", &kr::residual_block_backward, release());

    // preactivation_block
    m.def("preactivation_block", &kr::preactivation_block, release());
    m.def("preactivation_block_backward", &kr::preactivation_block_backward, release());

    // optimizer_step
    m.def("optimizer_step", &kr::optimizer_step, release());

    // conv2d_grad_norms
    m.def("conv2d_grad_norms", &kr::conv2d_grad_norms, release());

    // linear_grad_norms
    m.def("linear_grad_norms", &kr::linear_grad_norms, release());

    // membership_signals
    m.def("membership_signals", &kr::membership_signals, release());

    // lira
    m.def("lira", &kr::lira, release());

    // qkv_attention
    m.def("qkv_attention", &kr::qkv_attention, release());
    m.def("qkv_attention_backward", &kr::qkv_attention_backward, release());

    // winograd_conv2d
    m.attr("winograd_tiles") = kr::kWinogradTiles;
    m.def("winograd_conv2d", &kr::winograd_conv2d, release());
    m.def("winograd_pack", &kr::winograd_pack, release());
    m.def("winograd_conv2d_grad_weight", &kr::winograd_conv2d_grad_weight, release());

    // embedding_grad_norms
    m.def("embedding_grad_norms", &kr::embedding_grad_norms, release());

    // group_norm_grad_norms
    m.def("group_norm_grad_norms", &kr::group_norm_grad_norms, release());

    // layer_norm_grad_norms
    m.def("layer_norm_grad_norms", &kr::layer_norm_grad_norms, release());

    // roc
    m.def("roc", &kr::roc, release());

    // bootstrap_auc
    m.def("bootstrap_auc", &kr::bootstrap_auc, release());

    // attack_r
    m.def("attack_r", &kr::attack_r, release());

    // best_threshold
    m.def("best_threshold", &kr::best_threshold, release());

    // rmia
    m.def(
        "rmia", [](const kr::Rmia& call, Address count, int threads) { kr::rmia(call, at<int64_t>(count), threads); },
        release());
}
