#pragma once
#include "common/sampling/solver_step.h"

namespace kr {

void solver_step(const SolverStep& call, int threads);

}  // namespace kr
