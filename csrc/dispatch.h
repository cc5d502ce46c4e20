// Which kernels run: chosen once, by what the CPU and the operating system allow, or by TORCH_LSTM_QUANT_ISA.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "kernels/kernels.h"

namespace lstm_quant {

// All that this build contains, and those of them that this machine runs, the preferred first.
std::vector<const Kernels*> built_kernels();
std::vector<const Kernels*> usable_kernels();
std::string names(const std::vector<const Kernels*>& kernels);

// Kernels, and which of the evaluators give on this machine what the portable code gives, for every entry of their
// tables. Where one does not, its table is used.
struct CheckedKernels {
  const Kernels& kernels;
  std::array<bool, kEvaluators> exact;
};
CheckedKernels check_evaluators(const Kernels& kernels);

// The usable kernels called `name`, or the preferred ones where it is empty. Throws std::runtime_error that lists the
// legal names for any other.
const Kernels& choose_kernels(const std::string& name);

// The kernels of this process: choose_kernels of the environment variable TORCH_LSTM_QUANT_ISA, read at the first call.
const CheckedKernels& active_kernels();

}  // namespace lstm_quant
