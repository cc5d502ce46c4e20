// The kernels that tests compare.
#pragma once

#include <vector>

#include "kernels/kernels.h"

namespace lstm_quant::testing {

// Those of AVX-VNNI with its one instruction in the form that AVX-512 has of it.
extern const Kernels kAvxVnniTwinKernels;

// All that this machine runs; where it has no AVX-VNNI but AVX-512 with VNNI, the twin too.
std::vector<const Kernels*> tested_kernels();
// The same without the scalar ones.
std::vector<const Kernels*> vector_kernels();

}  // namespace lstm_quant::testing
