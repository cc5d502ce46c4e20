// Streams: any division of a sequence into calls, on any kernels and threads, gives what one call for all of it gives.
#include <algorithm>
#include <string>
#include <vector>

#include "calls.h"
#include "check.h"
#include "random_stack.h"
#include "stream.h"
#include "tested_kernels.h"

namespace lstm_quant::testing {
namespace {

void run_in_chunks(Dice& dice, Stream& stream, const Call& whole) {
  const int64_t row_items = stream.sizes().hidden_size * whole.rows;
  auto* output = static_cast<float*>(whole.output);
  for (int64_t step = 0, chunk; step < whole.steps; step += chunk) {
    chunk = dice.integer(0, whole.steps - step);
    ThreadedParallel parallel(static_cast<int>(dice.integer(1, 3)));
    Sequence x = whole.x;
    x.data = static_cast<const char*>(x.data) + step * x.step_bytes;
    stream.run(parallel, chunk, x, output + step * row_items);
  }
}

TEST(a_stream_gives_what_one_call_gives) {
  for (const Kernels* kernels : tested_kernels()) {
    const CheckedKernels checked = check_evaluators(*kernels);
    SerialParallel serial;
    for (uint32_t seed = 0; seed < 60; ++seed) {
      Dice dice(seed);
      const Sizes sizes{dice.integer(1, 40), dice.integer(1, 70), dice.integer(1, 3), 1};
      const RandomStack stack(dice, sizes, kStyles[seed % std::size(kStyles)]);
      const AlignedBytes bytes = stack.pack();
      const Blob blob(bytes.data(), bytes.size());
      FloatCall expected(dice, sizes, dice.integer(1, 9), dice.integer(1, 30), dice.chance(0.5));
      FloatCall got = expected;
      run_lstm(blob, checked, serial, expected.call());
      Stream stream(bytes.data(), bytes.size(), checked, expected.call().rows);
      for (int times = 0; times < 2; ++times) {
        const Call call = got.call();
        stream.reset(static_cast<const float*>(call.hx), static_cast<const float*>(call.cx));
        const std::string where = std::string(kernels->name) + ", seed " + std::to_string(seed);
        run_in_chunks(dice, stream, call);
        stream.copy_state(static_cast<float*>(call.h_n), static_cast<float*>(call.c_n));
        check_same(expected, got, where);
      }
    }
  }
}

TEST(a_stream_refuses_what_it_cannot_do) {
  Dice dice(0);
  const RandomStack both(dice, {4, 5, 1, 2}, Style::kInt8Preset), one(dice, {4, 5, 1, 1}, Style::kInt8Preset);
  const CheckedKernels checked = check_evaluators(*usable_kernels().front());
  const AlignedBytes two_directions = both.pack(), bytes = one.pack();
  CHECK_ERROR(Stream(two_directions.data(), two_directions.size(), checked, 1), "goes one way");
  CHECK_ERROR(Stream(bytes.data(), bytes.size(), checked, 0), "rows, got 0");
}

}  // namespace
}  // namespace lstm_quant::testing
