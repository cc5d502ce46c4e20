#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace lstm_quant {
namespace {

bool always() {
  return true;
}

struct Isa {
  const Kernels* kernels;
  bool (*usable)();
};

// In order of preference.
const Isa kIsas[] = {
    {&kScalarKernels, always},
};

}  // namespace

std::vector<const Kernels*> built_kernels() {
  std::vector<const Kernels*> kernels;
  for (const Isa& isa : kIsas) kernels.push_back(isa.kernels);
  return kernels;
}

std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> kernels;
  for (const Isa& isa : kIsas) {
    if (isa.usable()) kernels.push_back(isa.kernels);
  }
  return kernels;
}

const Kernels& choose_kernels(const std::string& name) {
  const auto usable = usable_kernels();
  if (name.empty()) return *usable.front();
  for (const Kernels* kernels : usable) {
    if (name == kernels->name) return *kernels;
  }
  throw std::runtime_error("TORCH_LSTM_QUANT_ISA must be one of " + names(usable) + " on this machine, got '" + name +
                           "'");
}

const Kernels& active_kernels() {
  static const Kernels& kernels = [&]() -> const Kernels& {
    const char* name = std::getenv("TORCH_LSTM_QUANT_ISA");
    return choose_kernels(name == nullptr ? "" : name);
  }();
  return kernels;
}

std::string names(const std::vector<const Kernels*>& kernels) {
  std::string joined;
  for (const Kernels* one : kernels) joined += (joined.empty() ? "" : ", ") + std::string(one->name);
  return joined;
}

}  // namespace lstm_quant
