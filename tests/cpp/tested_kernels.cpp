#include "tested_kernels.h"

#include <algorithm>

#include "dispatch.h"

#ifdef __x86_64__
#include "kernels/target.h"

// the file itself, compiled for another instruction set under another name
#undef LSTM_QUANT_BEGIN_TARGET
#ifdef __clang__
#define LSTM_QUANT_BEGIN_TARGET(isa) \
  LSTM_QUANT_PRAGMA(                 \
      clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512vl,avx512vnni"))), apply_to = function))
#else
#define LSTM_QUANT_BEGIN_TARGET(isa)  \
  LSTM_QUANT_PRAGMA(GCC push_options) \
  LSTM_QUANT_PRAGMA(GCC target("avx2,fma,avx512f,avx512vl,avx512vnni"))
#endif
#define kAvxVnniKernels testing::kAvxVnniTwinKernels
#define _mm256_dpbusd_avx_epi32 _mm256_dpbusd_epi32
#include "kernels/avx_vnni.cpp"
#undef kAvxVnniKernels
#endif

namespace lstm_quant::testing {

std::vector<const Kernels*> tested_kernels() {
  auto kernels = usable_kernels();
#ifdef __x86_64__
  const auto usable = [&](const Kernels& one) {
    return std::find(kernels.begin(), kernels.end(), &one) != kernels.end();
  };
  if (usable(kAvx512VnniKernels) && !usable(kAvxVnniKernels)) kernels.insert(kernels.begin(), &kAvxVnniTwinKernels);
#endif
  return kernels;
}

std::vector<const Kernels*> vector_kernels() {
  auto kernels = tested_kernels();
  kernels.pop_back();  // scalar
  return kernels;
}

}  // namespace lstm_quant::testing
