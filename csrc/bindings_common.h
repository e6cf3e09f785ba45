// The structs of csrc/common by the names of their fields, for both modules.
#pragma once
#include "bindings_struct.h"
#include "common/distillation/distillation_loss.h"
#include "common/membership/lira.h"
#include "common/membership/membership_signals.h"
#include "common/membership/rmia.h"
#include "common/nn/group_norm_silu.h"
#include "common/sampling/solver_step.h"

namespace kr {

#define KR_LOGIT_PAIR                                                                                 \
    KR_FIELD(input), KR_FIELD(target), KR_FIELD(input_dtype), KR_FIELD(target_dtype), KR_FIELD(rows), \
        KR_FIELD(classes), KR_FIELD(input_stride), KR_FIELD(target_stride), KR_FIELD(labels)

KR_FIELDS(DistillationLoss, KR_FIELD(temperature), KR_FIELD_AS(soft_weight, soft), KR_FIELD_AS(hard_weight, hard),
          KR_FIELD_AS(label_smoothing, smoothing), KR_FIELD(ignore_index), KR_FIELD(divergence), KR_FIELD(alpha),
          KR_FIELD(beta), KR_FIELD(target_kind), KR_FIELD(smooth_tail), KR_FIELD(mean), KR_LOGIT_PAIR, KR_FIELD(weight),
          KR_FIELD(indices), KR_FIELD(top_k))

// The numbers of a row in the order of solver_row; the guidance scale is a field of its own.
inline void assign(SolverRow& to, PyObject* from) {
    const Py_ssize_t count = PyList_Size(from), terms = count - kSolverNumbers;
    if (terms < 0 || terms > kSolverHistory) throw py::type_error("SolverStep: row must hold 11 to 15 numbers");
    float numbers[kSolverNumbers + kSolverHistory];
    for (Py_ssize_t i = 0; i < count; ++i) assign(numbers[i], PyList_GET_ITEM(from, i));
    to = solver_row(numbers, (int)terms, to.guidance);
}

KR_FIELDS(SolverTable, KR_FIELD(step), KR_FIELD(steps), KR_FIELD(rows), KR_FIELD(slots), KR_FIELD(samples),
          KR_FIELD(kept))

inline void assign(SolverTable& to, PyObject* from) {
    if (from != Py_None) to = from_dict<SolverTable>(from);
}

KR_FIELDS(SolverStep, KR_FIELD(x), KR_FIELD(cond), KR_FIELD(uncond), KR_FIELD(output_dtype),
          KR_FIELD(output_channels_last), KR_FIELD(ids), KR_FIELD(limits), KR_FIELD(history), KR_FIELD(row),
          KR_FIELD_AS(guidance, row.guidance), KR_FIELD(seed), KR_FIELD(stream), KR_FIELD(batch), KR_FIELD(channels),
          KR_FIELD(pixels), KR_FIELD(y), KR_FIELD(kept), KR_FIELD(input), KR_FIELD(input_dtype), KR_FIELD(copies),
          KR_FIELD(image), KR_FIELD(table))

KR_FIELDS(GroupNorm, KR_FIELD(x), KR_FIELD(skip), KR_FIELD(batch), KR_FIELD(pixels), KR_FIELD(x_channels),
          KR_FIELD(skip_channels), KR_FIELD(dtype), KR_FIELD(weight), KR_FIELD(bias), KR_FIELD(affine_dtype),
          KR_FIELD(shift), KR_FIELD(shift_dtype), KR_FIELD(shift_stride), KR_FIELD(groups), KR_FIELD(eps),
          KR_FIELD(silu), KR_FIELD(y))

KR_FIELDS(MembershipSignals, KR_FIELD(logits), KR_FIELD(dtype), KR_FIELD(rows), KR_FIELD(classes), KR_FIELD(stride),
          KR_FIELD(labels), KR_FIELD_AS(phi, out.phi), KR_FIELD_AS(loss, out.loss), KR_FIELD_AS(entropy, out.entropy),
          KR_FIELD_AS(modified_entropy, out.modified_entropy), KR_FIELD_AS(confidence, out.confidence),
          KR_FIELD_AS(correct, out.correct))

#define KR_SHADOW_VALUES                                                                                      \
    KR_FIELD(phi), KR_FIELD(keep), KR_FIELD(target), KR_FIELD(queries), KR_FIELD(examples), KR_FIELD(models), \
        KR_FIELD(targets)

KR_FIELDS(Lira, KR_SHADOW_VALUES, KR_FIELD(online), KR_FIELD(variance), KR_FIELD(scores))

KR_FIELDS(Rmia, KR_FIELD(x), KR_FIELD(z), KR_FIELD(float64), KR_FIELD(queries), KR_FIELD(num_x), KR_FIELD(num_z),
          KR_FIELD(gamma), KR_FIELD(predicate))

}  // namespace kr
