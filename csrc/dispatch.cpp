#include "dispatch.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "kernels/scalar_evaluate.h"

#ifdef __x86_64__
#include <cpuid.h>
#endif

#include "ieee_scope.h"

namespace lstm_quant {
namespace {

struct Isa {
  const Kernels* kernels;
  bool (*usable)();
};

bool always() {
  return true;
}

#ifdef __x86_64__

// What __get_cpuid_count writes.
struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  if (__get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d) == 0) return {};
  return r;
}

bool has_bits(unsigned value, std::initializer_list<int> bits) {
  for (int bit : bits) {
    if ((value >> bit & 1) == 0) return false;
  }
  return true;
}

// Whether the operating system saves these registers when it switches threads, by their bits in XCR0.
bool saves(unsigned registers) {
  constexpr int kOsxsave = 27;
  if (!has_bits(cpuid(1, 0).c, {kOsxsave})) return false;
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & registers) == registers;
}

bool has_avx2() {
  constexpr unsigned kYmm = 0x06;
  constexpr int kFma = 12, kAvx2 = 5;
  return saves(kYmm) && has_bits(cpuid(1, 0).c, {kFma}) && has_bits(cpuid(7, 0).b, {kAvx2});
}

bool has_avx_vnni() {
  constexpr int kAvxVnni = 4;
  return has_avx2() && has_bits(cpuid(7, 1).a, {kAvxVnni});
}

bool has_avx512_vnni() {
  constexpr unsigned kZmm = 0xe6;
  constexpr int kF = 16, kDq = 17, kBw = 30, kVl = 31, kVnni = 11;
  return has_avx2() && saves(kZmm) && has_bits(cpuid(7, 0).b, {kF, kDq, kBw, kVl}) && has_bits(cpuid(7, 0).c, {kVnni});
}

#endif

// In order of preference.
const Isa kIsas[] = {
#ifdef __x86_64__
    {&kAvx512VnniKernels, has_avx512_vnni},
    {&kAvxVnniKernels, has_avx_vnni},
    {&kAvx2Kernels, has_avx2},
#endif
    {&kScalarKernels, always},
};

bool is_exact(const Kernels& kernels, Evaluator evaluator) {
  const IeeeScope ieee;
  Function function;
  function.evaluator = evaluator;
  const EvaluatedSteps evaluated = evaluated_steps(evaluator);
  function.input = {1.0f, 1.0f, static_cast<float>(evaluated.least), static_cast<float>(evaluated.largest), 0};
  std::vector<float> steps, expected;
  for (int i = evaluated.least; i <= evaluated.largest; ++i) {
    steps.push_back(static_cast<float>(i));
    expected.push_back(scalar_evaluate(evaluator, steps.back()));
  }
  std::vector<float> values(steps.size());
  kernels.evaluate(function, steps.data(), steps.size(), values.data());
  return std::memcmp(values.data(), expected.data(), values.size() * sizeof(float)) == 0;
}

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

std::string names(const std::vector<const Kernels*>& kernels) {
  std::string joined;
  for (const Kernels* one : kernels) joined += (joined.empty() ? "" : ", ") + std::string(one->name);
  return joined;
}

CheckedKernels check_evaluators(const Kernels& kernels) {
  CheckedKernels checked{kernels, {}};
  if (kernels.evaluate == nullptr) return checked;
  for (int i = 1; i < kEvaluators; ++i) checked.exact[i] = is_exact(kernels, static_cast<Evaluator>(i));
  return checked;
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

const CheckedKernels& active_kernels() {
  static const CheckedKernels kernels = [] {
    const char* name = std::getenv("TORCH_LSTM_QUANT_ISA");
    return check_evaluators(choose_kernels(name == nullptr ? "" : name));
  }();
  return kernels;
}

}  // namespace lstm_quant
