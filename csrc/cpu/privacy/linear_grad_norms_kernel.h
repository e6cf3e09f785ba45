// Included once per instruction set by linear_grad_norms.cpp.
#include "cpu/simd/doubles.h"

static double squares(const float* from, int64_t n) { return sum_squares(from, n); }
