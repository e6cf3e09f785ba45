#include "cpu/nn/optimizer_step.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/simd/parallel.h"

namespace kr {

enum class OptimizerRule { none, plain, momentum, nesterov, adamw };

struct OptimizerTensor {
    int64_t numbers;
    const double* group;
    float *parameter, *first, *second, *steps, *average;
    const float* grad;
};

// A tensor's factors in this step.
struct OptimizerScalars {
    OptimizerRule rule;
    float clip, rate, decay, average;
    float first;                     // SGD: momentum; AdamW: 1 - beta1
    float second, kept, scale, eps;  // AdamW: 1 - beta2, beta2, 1 / sqrt(1 - beta2^step)
};

}  // namespace kr

#define KR_KERNEL "cpu/nn/kernels/optimizer_step_kernel.h"
#include "cpu/simd/foreach_isa.h"

namespace kr {
namespace {

// Numbers of a run, the same whatever the threads: the norm is the sum over runs in their order. A run's squares are
// added in float32, 64 to a partial sum with AVX-512.
constexpr int64_t kRun = 4096;
constexpr int64_t kRunCost = 256;    // numbers that take as long as going from one run to the next
constexpr int64_t kGrain = 1 << 15;  // numbers worth a thread

struct Run {
    int64_t tensor, begin, end, start;  // start: costs of all runs before
};

std::vector<OptimizerTensor> tensors_of(const OptimizerStep& call) {
    std::vector<OptimizerTensor> tensors(call.tensors);
    for (int64_t i = 0; i < call.tensors; ++i) {
        auto row = [&](int at) { return call.table[at * call.tensors + i]; };
        auto floats = [&](int at) { return reinterpret_cast<float*>(row(at)); };
        tensors[i] = {row(0),    call.groups + row(1) * kOptimizerNumbers,
                      floats(2), floats(3),
                      floats(4), floats(5),
                      floats(6), call.grads[i]};
    }
    return tensors;
}

// body(run) on every run: each thread takes a part of about the same cost, the same one in every call.
template <class Body>
void for_runs(const std::vector<Run>& runs, int64_t cost, int threads, bool backwards, const Body& body) {
    const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, cost / kGrain));
    auto first_of = [&](int64_t part) {
        auto before = [](const Run& run, int64_t start) { return run.start < start; };
        return std::lower_bound(runs.begin(), runs.end(), cost * part / parts, before) - runs.begin();
    };
    parallel_for(parts, 1, threads, [&](int64_t begin, int64_t end) {
        const int64_t first = first_of(begin), last = end == parts ? (int64_t)runs.size() : first_of(end);
        for (int64_t i = first; i < last; ++i) body(backwards ? last - 1 - (i - first) : i);
    });
}

// SGD's group: rate, momentum, weight decay, nesterov. AdamW's: rate, beta1, beta2, eps, weight decay.
OptimizerScalars sgd(const OptimizerTensor& t) {
    const double* g = t.group;
    OptimizerScalars s = {};
    const bool momentum = t.first && g[1] != 0;  // torch leaves the buffer as it is while momentum is 0
    s.rule = !momentum ? OptimizerRule::plain : g[3] != 0 ? OptimizerRule::nesterov : OptimizerRule::momentum;
    s.rate = (float)g[0], s.first = (float)g[1], s.decay = (float)g[2];
    return s;
}

OptimizerScalars adamw(const OptimizerTensor& t, double step) {
    const double *g = t.group, rate = g[0], beta1 = g[1], beta2 = g[2];
    OptimizerScalars s = {};
    s.rule = OptimizerRule::adamw;
    s.rate = (float)(rate / (1.0 - std::pow(beta1, step)));
    s.decay = (float)(1.0 - rate * g[4]);
    s.first = (float)(1.0 - beta1), s.second = (float)(1.0 - beta2), s.kept = (float)beta2;
    s.scale = (float)(1.0 / std::sqrt(1.0 - std::pow(beta2, step)));
    s.eps = (float)g[3];
    return s;
}

}  // namespace

double optimizer_step(const OptimizerStep& call, int threads) {
    const std::vector<OptimizerTensor> tensors = tensors_of(call);
    std::vector<Run> runs;
    int64_t cost = 0;
    for (int64_t i = 0; i < call.tensors; ++i) {
        const int64_t numbers = tensors[i].grad || tensors[i].average ? tensors[i].numbers : 0;
        for (int64_t begin = 0; begin < numbers; begin += kRun) {
            const int64_t end = std::min(numbers, begin + kRun);
            runs.push_back({i, begin, end, cost});
            cost += end - begin + kRunCost;
        }
    }
    std::vector<double> squares(runs.size());
    for_runs(runs, cost, threads, false, [&](int64_t i) {
        const Run& run = runs[i];
        const float* grad = tensors[run.tensor].grad;
        squares[i] = grad ? KR_DISPATCH(squares_of, grad + run.begin, run.end - run.begin) : 0.0;
    });
    double sum = 0.0;
    for (double each : squares) sum += each;
    const double norm = std::sqrt(sum);
    if (!std::isfinite(norm)) return norm;

    const float clip = (float)std::min(1.0, call.max_norm / (norm + 1e-6));
    std::vector<OptimizerScalars> scalars(call.tensors);
    const double* group = nullptr;
    float last_step = 0.0f;
    for (int64_t i = 0; i < call.tensors; ++i) {
        const OptimizerTensor& t = tensors[i];
        if (t.grad) {
            const float step = call.adamw ? ++*t.steps : 0.0f;
            const bool again = i > 0 && scalars[i - 1].rule != OptimizerRule::none && t.group == group &&
                               step == last_step && call.adamw;  // two powers cost more than a small tensor
            scalars[i] = again ? scalars[i - 1] : call.adamw ? adamw(t, step) : sgd(t);
            group = t.group, last_step = step;
        }
        scalars[i].clip = clip, scalars[i].average = (float)call.average_weight;
    }
    // From the end: the gradients read last are still in the cache.
    for_runs(runs, cost, threads, true, [&](int64_t i) {
        const Run& run = runs[i];
        KR_DISPATCH(step_numbers, tensors[run.tensor], scalars[run.tensor], run.begin, run.end);
    });
    return norm;
}

}  // namespace kr
