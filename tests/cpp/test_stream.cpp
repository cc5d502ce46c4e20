// Streams: any division of a sequence into calls, on any kernels and threads, for all rows at once or some, gives what
// one call for all of it gives.
#include <algorithm>
#include <atomic>
#include <cstring>
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
  const int64_t row_items = stream.sizes().h_size() * whole.rows;
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
    for (uint32_t seed = 0; seed < seeds(60); ++seed) {
      Dice dice(seed);
      const int64_t hidden_size = dice.integer(1, 70);
      const Sizes sizes{dice.integer(1, 40), hidden_size, dice.integer(1, 3), 1, random_proj_size(dice, hidden_size)};
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

// Some of the rows in any order, none of them that has ended.
std::vector<int64_t> choose(Dice& dice, const std::vector<int64_t>& taken, int64_t steps) {
  std::vector<int64_t> chosen;
  for (size_t row = 0; row < taken.size(); ++row) {
    if (taken[row] < steps && dice.chance(0.5))
      chosen.insert(chosen.begin() + dice.integer(0, chosen.size()), static_cast<int64_t>(row));
  }
  return chosen;
}

// Takes `units` values of each of these rows, apart from each other, and puts them together; or the other way round.
template <class Copy>
void for_rows(const std::vector<int64_t>& rows, int64_t all_rows, int64_t units, int64_t groups, const Copy& copy) {
  for (int64_t group = 0; group < groups; ++group) {
    for (size_t i = 0; i < rows.size(); ++i)
      copy((group * all_rows + rows[i]) * units, (group * rows.size() + i) * units);
  }
}

// Each row begins with a reset of its own and goes on in calls with whichever others.
void run_by_rows(Dice& dice, Stream& stream, const Call& whole) {
  const Sizes& sizes = stream.sizes();
  const int64_t inputs = sizes.input_size, cells = sizes.cells(), rows = stream.rows();
  const int64_t width = sizes.h_size(), units = sizes.hidden_size;
  const auto* hx = static_cast<const float*>(whole.hx);
  const auto* cx = static_cast<const float*>(whole.cx);
  std::vector<int64_t> taken(rows, -1);  // steps; -1: not reset
  for (;;) {
    const std::vector<int64_t> chosen = choose(dice, taken, whole.steps);
    const int64_t count = static_cast<int64_t>(chosen.size());
    std::vector<float> h(cells * count * width), c(cells * count * units);
    std::vector<int64_t> fresh;
    for (const int64_t row : chosen) {
      if (taken[row] < 0) fresh.push_back(row), taken[row] = 0;
    }
    if (hx != nullptr) {
      for_rows(fresh, rows, width, cells,
               [&](int64_t from, int64_t to) { std::copy_n(hx + from, width, h.begin() + to); });
      for_rows(fresh, rows, units, cells,
               [&](int64_t from, int64_t to) { std::copy_n(cx + from, units, c.begin() + to); });
    }
    const int64_t none = 0;
    const auto numbers = [&](const std::vector<int64_t>& of) {
      return ChosenRows{of.empty() ? &none : of.data(), static_cast<int64_t>(of.size())};
    };
    CHECK(stream.has(numbers(fresh)) && stream.has(numbers(chosen)));
    stream.reset(hx == nullptr ? nullptr : h.data(), hx == nullptr ? nullptr : c.data(), numbers(fresh));
    int64_t steps = dice.integer(0, 4);
    for (const int64_t row : chosen) steps = std::min(steps, whole.steps - taken[row]);
    std::vector<float> x(steps * count * inputs), output(steps * count * width);
    for (int64_t step = 0; step < steps; ++step) {
      for (int64_t i = 0; i < count; ++i) {
        const char* from = static_cast<const char*>(whole.x.data) + (taken[chosen[i]] + step) * whole.x.step_bytes;
        std::memcpy(&x[(step * count + i) * inputs], from + chosen[i] * whole.x.row_bytes, inputs * sizeof(float));
      }
    }
    ThreadedParallel parallel(static_cast<int>(dice.integer(1, 3)));
    const int64_t row_bytes = inputs * sizeof(float);
    stream.run(parallel, steps, {x.data(), DType::kFloat32, count * row_bytes, row_bytes}, output.data(),
               numbers(chosen));
    for (int64_t step = 0; step < steps; ++step) {
      for (int64_t i = 0; i < count; ++i) {
        std::copy_n(output.begin() + (step * count + i) * width, width,
                    static_cast<float*>(whole.output) + ((taken[chosen[i]] + step) * rows + chosen[i]) * width);
      }
    }
    for (const int64_t row : chosen) taken[row] += steps;
    stream.copy_state(h.data(), c.data(), numbers(chosen));
    for_rows(chosen, rows, width, cells, [&](int64_t to, int64_t from) {
      std::copy_n(h.begin() + from, width, static_cast<float*>(whole.h_n) + to);
    });
    for_rows(chosen, rows, units, cells, [&](int64_t to, int64_t from) {
      std::copy_n(c.begin() + from, units, static_cast<float*>(whole.c_n) + to);
    });
    if (std::all_of(taken.begin(), taken.end(), [&](int64_t steps_of) { return steps_of == whole.steps; })) return;
  }
}

TEST(rows_that_go_on_with_whichever_others_give_the_same) {
  for (const Kernels* kernels : tested_kernels()) {
    const CheckedKernels checked = check_evaluators(*kernels);
    SerialParallel serial;
    for (uint32_t seed = 0; seed < seeds(30); ++seed) {
      Dice dice(seed);
      const int64_t hidden_size = dice.integer(1, 70);
      const Sizes sizes{dice.integer(1, 40), hidden_size, dice.integer(1, 3), 1, random_proj_size(dice, hidden_size)};
      const RandomStack stack(dice, sizes, kStyles[seed % std::size(kStyles)]);
      const AlignedBytes bytes = stack.pack();
      FloatCall expected(dice, sizes, dice.integer(1, 9), dice.integer(1, 20), dice.chance(0.5));
      FloatCall got = expected;
      run_lstm(Blob(bytes.data(), bytes.size()), checked, serial, expected.call());
      Stream stream(bytes.data(), bytes.size(), checked, expected.call().rows);
      for (int times = 0; times < 2; ++times) {
        run_by_rows(dice, stream, got.call());
        check_same(expected, got, std::string(kernels->name) + ", seed " + std::to_string(seed));
      }
    }
  }
}

TEST(a_stream_knows_its_rows) {
  Dice dice(0);
  const RandomStack stack(dice, {4, 5, 1, 1}, Style::kInt8Preset);
  const AlignedBytes bytes = stack.pack();
  Stream stream(bytes.data(), bytes.size(), check_evaluators(*usable_kernels().front()), 3);
  const auto has = [&](const std::vector<int64_t>& rows) {
    return stream.has({rows.data(), static_cast<int64_t>(rows.size())});
  };
  for (int times = 0; times < 2; ++times) {  // what was refused leaves no trace
    CHECK(has({2, 0, 1}) && has({1}));
    CHECK(!has({3}) && !has({-1}) && !has({0, 1, 0}) && !has({0, 1, 2, 1}) && !has({INT64_MIN}) && !has({INT64_MAX}));
  }
}

TEST(layers_of_a_stream_that_work_at_the_same_time_give_the_same) {
  const Sizes sizes{40, 70, 3, 1};
  const int64_t steps = 100;
  const auto compare = [&](const CheckedKernels& checked, int threads) {
    CHECK(make_plan(sizes, checked.kernels.rates, steps, 1, threads).sharing == Sharing::kLayers);
    Dice dice(static_cast<uint32_t>(threads));
    const RandomStack stack(dice, sizes, Style::kInt8Preset);
    const AlignedBytes bytes = stack.pack();
    const Blob blob(bytes.data(), bytes.size());
    FloatCall expected(dice, sizes, 2 * steps, 1, true);
    FloatCall got = expected;
    SerialParallel serial;
    run_lstm(blob, checked, serial, expected.call());
    Stream stream(bytes.data(), bytes.size(), checked, 1);
    const Call call = got.call();
    stream.reset(static_cast<const float*>(call.hx), static_cast<const float*>(call.cx));
    ThreadedParallel parallel(threads);
    for (int64_t step = 0; step < call.steps; step += steps) {
      Sequence x = call.x;
      x.data = static_cast<const char*>(x.data) + step * x.step_bytes;
      stream.run(parallel, steps, x, static_cast<float*>(call.output) + step * sizes.hidden_size);
    }
    stream.copy_state(static_cast<float*>(call.h_n), static_cast<float*>(call.c_n));
    check_same(expected, got, std::string(checked.kernels.name) + ", " + std::to_string(threads) + " threads");
  };
  for (const Kernels* kernels : tested_kernels()) {
    for (const int threads : {2, 3, 8}) compare(check_evaluators(*kernels), threads);
  }
}

// Kernels that count the steps which also project ahead.
const Kernels* counted = nullptr;
std::atomic<int64_t> steps_ahead{0};

void counting_step(const StepArgs& args) {
  // relaxed, as any other order would hide races from ThreadSanitizer
  if (args.ahead != nullptr) steps_ahead.fetch_add(1, std::memory_order_relaxed);
  counted->step(args);
}

// Does all that is projected ahead with the last part, so that machines without AVX-512 test the order of things too.
void scalar_step_ahead(const StepArgs& args) {
  if (args.ahead != nullptr && args.ahead_part == kAheadParts - 1) kScalarKernels.project(*args.ahead);
  kScalarKernels.step(args);
}

TEST(a_stream_that_projects_ahead_gives_what_one_call_gives) {
  Kernels scalar_ahead = kScalarKernels;
  scalar_ahead.name = "scalar, ahead";
  scalar_ahead.step = scalar_step_ahead;
  scalar_ahead.projects_ahead = true;
  std::vector<const Kernels*> all = tested_kernels();
  all.push_back(&scalar_ahead);
  for (const Kernels* kernels : all) {
    if (!kernels->projects_ahead) continue;
    counted = kernels;
    steps_ahead = 0;
    Kernels counting = *kernels;
    counting.step = counting_step;
    const CheckedKernels checked = check_evaluators(counting), scalar = check_evaluators(kScalarKernels);
    for (uint32_t seed = 0; seed < 3; ++seed) {
      Dice dice(seed);
      const int64_t hidden = dice.integer(185, 200);
      const Sizes sizes{dice.integer((hidden + 1) / 2, hidden), hidden, dice.integer(1, 2), 1};
      const RandomStack stack(dice, sizes, seed % 2 == 0 ? Style::kInt8Preset : Style::kAllInt8);
      const AlignedBytes bytes = stack.pack();
      FloatCall expected(dice, sizes, dice.integer(64, 80), 1, true);
      FloatCall got = expected;
      SerialParallel serial;
      run_lstm(Blob(bytes.data(), bytes.size()), scalar, serial, expected.call());
      Stream stream(bytes.data(), bytes.size(), checked, 1);
      for (int times = 0; times < 2; ++times) {
        const Call call = got.call();
        stream.reset(static_cast<const float*>(call.hx), static_cast<const float*>(call.cx));
        run_in_chunks(dice, stream, call);
        stream.copy_state(static_cast<float*>(call.h_n), static_cast<float*>(call.c_n));
        check_same(expected, got, std::string(kernels->name) + ", seed " + std::to_string(seed));
      }
    }
    CHECK(steps_ahead > 0) << "none was projected ahead by " << kernels->name;
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
