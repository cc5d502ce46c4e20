// What follows LSTM_QUANT_BEGIN_TARGET("avx2,fma") is compiled for these instruction sets, up to LSTM_QUANT_END_TARGET,
// and nothing else of the file: no header's inline code can leak them into code that runs on every machine, as with
// -mavx2. So what the headers there include is included here, before.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#define LSTM_QUANT_PRAGMA(words) _Pragma(#words)

#ifdef __clang__
#define LSTM_QUANT_BEGIN_TARGET(isa) \
  LSTM_QUANT_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define LSTM_QUANT_END_TARGET LSTM_QUANT_PRAGMA(clang attribute pop)
#else
#define LSTM_QUANT_BEGIN_TARGET(isa) LSTM_QUANT_PRAGMA(GCC push_options) LSTM_QUANT_PRAGMA(GCC target(isa))
#define LSTM_QUANT_END_TARGET LSTM_QUANT_PRAGMA(GCC pop_options)
#endif
