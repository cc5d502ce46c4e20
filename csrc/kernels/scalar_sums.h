// The sums of a projection for one row and one block, in portable code. SIMD paths use it for what they have no code
// for.
#pragma once

#include "kernels.h"

namespace lstm_quant {

// sums[kBlock]: [gate][unit], as Projection says.
void scalar_sums(const Projection& projection, const void* operand, int32_t block, float* sums);

// The same from what changed in the row.
void scalar_sums(const Projection& projection, const Delta& delta, int32_t block, float* sums);

}  // namespace lstm_quant
