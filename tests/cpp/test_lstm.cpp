// Whatever kernels, threads and plan a call runs with, it gives what the scalar kernels give on one thread.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>

#include "calls.h"
#include "check.h"
#include "random_stack.h"
#include "tested_kernels.h"

namespace lstm_quant::testing {
namespace {

// All slots on one thread: in parts one after another, or in a single part.
class OneThreadParallel final : public Parallel {
 public:
  OneThreadParallel(int threads, int slots_each) : threads_(threads), slots_each_(slots_each) {}
  Threads threads() const override { return threads_; }
  void run(int slots, const Task& task) override {
    for (int slot = 0; slot < slots; slot += slots_each_) task(slot, std::min(slot + slots_each_, slots));
  }

 private:
  int threads_, slots_each_;
};

CheckedKernels scalar() {
  return check_evaluators(kScalarKernels);
}

Sizes random_sizes(Dice& dice) {
  const int64_t hidden_size = dice.integer(1, 70);
  return {dice.integer(1, 40), hidden_size, dice.integer(1, 3), dice.integer(1, 2),
          random_proj_size(dice, hidden_size)};
}

TEST(every_kernel_gives_the_scalar_bits) {
  for (const Kernels* kernels : tested_kernels()) {
    const CheckedKernels checked = check_evaluators(*kernels);
    SerialParallel serial;
    for (uint32_t seed = 0; seed < seeds(60); ++seed) {
      Dice dice(seed);
      const Style style = kStyles[seed % std::size(kStyles)];
      const RandomStack stack(dice, random_sizes(dice), style);
      const AlignedBytes bytes = stack.pack();
      const Blob blob(bytes.data(), bytes.size());
      FloatCall expected(dice, stack.sizes(), dice.integer(1, 7), dice.integer(1, 30), dice.chance(0.5));
      FloatCall got = expected;
      run_lstm(blob, scalar(), serial, expected.call());
      run_lstm(blob, checked, serial, got.call());
      check_same(expected, got, std::string(kernels->name) + ", seed " + std::to_string(seed));
    }
  }
}

// Single rows whose next chunk is projected beside the steps of this one.
TEST(projecting_ahead_gives_the_same_bits) {
  for (const Kernels* kernels : tested_kernels()) {
    const CheckedKernels checked = check_evaluators(*kernels);
    for (uint32_t seed = 0; seed < seeds(60); ++seed) {
      Dice dice(seed);
      Sizes sizes = random_sizes(dice);
      sizes.input_size = dice.integer((sizes.h_size() + 1) / 2, sizes.h_size());
      const RandomStack stack(dice, sizes, kStyles[seed % std::size(kStyles)]);
      const AlignedBytes bytes = stack.pack();
      const Blob blob(bytes.data(), bytes.size());
      const int64_t steps = dice.integer(17, 70);
      FloatCall expected(dice, sizes, steps, 1, dice.chance(0.5));
      FloatCall got = expected;
      SerialParallel serial;
      run_lstm(blob, scalar(), serial, expected.call());
      const int threads = static_cast<int>(dice.integer(1, 3));
      Plan plan = random_plan(dice, sizes, steps, 1, threads);
      plan.chunk_steps = kAheadRows;
      plan.group_blocks = 1000;
      plan.ahead = true;
      ThreadedParallel parallel(threads, std::chrono::milliseconds(0));
      run_lstm(blob, checked, parallel, got.call(), plan);
      check_same(expected, got, std::string(kernels->name) + ", seed " + std::to_string(seed));
    }
  }
}

TEST(every_plan_gives_the_same_bits) {
  const CheckedKernels checked = check_evaluators(*usable_kernels().front());
  for (uint32_t seed = 0; seed < seeds(100); ++seed) {
    Dice dice(seed);
    const RandomStack stack(dice, random_sizes(dice), kStyles[seed % std::size(kStyles)]);
    const AlignedBytes bytes = stack.pack();
    const Blob blob(bytes.data(), bytes.size());
    const int64_t steps = dice.integer(1, 9), rows = dice.integer(1, 9);
    FloatCall expected(dice, stack.sizes(), steps, rows, dice.chance(0.5));
    FloatCall got = expected;
    SerialParallel serial;
    run_lstm(blob, scalar(), serial, expected.call());
    const int threads = static_cast<int>(dice.integer(1, 5));
    Plan plan = random_plan(dice, stack.sizes(), steps, rows, threads);
    const std::string where = "seed " + std::to_string(seed);
    switch (dice.integer(0, 3)) {
      case 0: {
        OneThreadParallel parallel(threads, static_cast<int>(dice.integer(1, threads)));
        run_lstm(blob, checked, parallel, got.call(), plan);
        check_same(expected, got, where + ", one thread");
        break;
      }
      case 1: {
        ThreadedParallel parallel(threads, std::chrono::milliseconds(1));
        run_lstm(blob, checked, parallel, got.call(), plan);
        check_same(expected, got, where + ", late threads");
        break;
      }
      default: {
        ThreadedParallel parallel(threads);
        plan.patience = std::chrono::seconds(10);  // all take part
        run_lstm(blob, checked, parallel, got.call(), plan);
        check_same(expected, got, where + ", threads");
      }
    }
  }
}

// Set on threads whose steps take long.
thread_local bool is_slow = false;
std::atomic<int64_t> steps_taken{0};

void slow_step(const StepArgs& args) {
  if (is_slow) std::this_thread::sleep_for(std::chrono::milliseconds(2));
  // any other order would make steps happen one after another for ThreadSanitizer, races among them too
  steps_taken.fetch_add(1, std::memory_order_relaxed);
  kScalarKernels.step(args);
}

// As ThreadedParallel, with one slow thread.
class UnevenParallel final : public Parallel {
 public:
  explicit UnevenParallel(int threads) : parallel_(threads) {}
  Threads threads() const override { return parallel_.threads(); }
  void run(int slots, const Task& task) override {
    parallel_.run(slots, [&](int begin, int end) {
      is_slow = begin == 1;
      task(begin, end);
    });
  }

 private:
  ThreadedParallel parallel_;
};

TEST(a_crew_that_breaks_up_on_the_way_changes_nothing) {
  Kernels kernels = kScalarKernels;
  kernels.step = slow_step;
  for (const int64_t directions : {1, 2}) {
    for (const int64_t layers : {1, 2, 3}) {
      for (const int crew : {2, 3}) {  // members for each direction
        for (const int64_t rows : {1, 2}) {
          Dice dice(static_cast<uint32_t>(10 * layers + crew));
          const Sizes sizes{7, 70, layers, directions, rows == 2 ? 130 : 0};
          const int64_t steps = 40;
          const RandomStack stack(dice, sizes, Style::kInt8Preset);
          const AlignedBytes bytes = stack.pack();
          const Blob blob(bytes.data(), bytes.size());
          FloatCall expected(dice, sizes, steps, rows, true);
          expected.make_signal(Signal::kSlowSensor, steps);  // sums of x are kept from the start
          FloatCall got = expected;
          SerialParallel serial;
          run_lstm(blob, scalar(), serial, expected.call());
          UnevenParallel uneven(static_cast<int>(directions) * crew);
          Plan plan = make_plan(sizes, kernels.rates, steps, rows, uneven.threads());
          plan.slots = uneven.threads().count;
          plan.sharing = Sharing::kUnits;
          plan.tile_rows = rows;
          plan.chunk_steps = 4;
          plan.group_blocks = 5;
          plan.layer_steps = directions == 2 ? steps : 32;
          plan.pieces_between = 1;
          plan.patience = std::chrono::seconds(10);
          steps_taken = 0;
          run_lstm(blob, check_evaluators(kernels), uneven, got.call(), plan);
          const std::string where = std::to_string(layers) + " layers, " + std::to_string(plan.slots) + " threads";
          check_same(expected, got, where);
          CHECK(steps_taken < layers * steps * plan.slots) << "no crew broke up: " << where;
        }
      }
    }
  }
}

TEST(rows_do_not_depend_on_each_other) {
  Dice dice(1);
  const RandomStack stack(dice, {20, 40, 2, 2}, Style::kInt8Preset);
  const AlignedBytes bytes = stack.pack();
  const Blob blob(bytes.data(), bytes.size());
  const CheckedKernels checked = check_evaluators(*usable_kernels().front());
  SerialParallel serial;
  FloatCall all(dice, stack.sizes(), 5, 70, false);
  run_lstm(blob, checked, serial, all.call());
  for (int64_t row : {0, 1, 33, 69}) {
    FloatCall one(dice, stack.sizes(), 5, 1, false);
    Call call = one.call();
    call.x = all.call().x;
    call.x.data = static_cast<const char*>(call.x.data) + row * call.x.row_bytes;
    run_lstm(blob, checked, serial, call);
    for (int64_t t = 0; t < 5; ++t) {
      CHECK(std::equal(&one.output[t * 80], &one.output[(t + 1) * 80], &all.output[(t * 70 + row) * 80]))
          << "row " << row;
    }
  }
}

void compare_integers(int64_t proj_size) {
  Dice dice(2);
  const RandomStack stack(dice, {20, 40, 2, 1, proj_size}, Style::kAllInt8);
  const AlignedBytes bytes = stack.pack();
  const Blob blob(bytes.data(), bytes.size());
  const CheckedKernels checked = check_evaluators(*usable_kernels().front());
  SerialParallel serial;
  FloatCall floats(dice, stack.sizes(), 6, 3, false);
  run_lstm(blob, checked, serial, floats.call());

  const Grid x_grid = blob.cell(0).x;
  std::vector<int32_t> x(floats.x.size());
  from_floats(x_grid, floats.x.data(), x.size(), DType::kInt32, x.data());
  std::vector<int32_t> output(floats.output.size()), h_n(floats.h_n.size()), c_n(floats.c_n.size());
  Call call = floats.call();
  call.x = {x.data(), DType::kInt32, call.x.step_bytes, call.x.row_bytes};
  call.output = output.data();
  call.h_n = h_n.data();
  call.c_n = c_n.data();
  call.h_dtype = call.c_dtype = DType::kInt32;
  run_lstm(blob, checked, serial, call);
  std::vector<float> back(output.size());
  to_floats(blob.cell(1).h, output.data(), DType::kInt32, output.size(), back.data());
  CHECK(same_bits(back, floats.output)) << "output";
}

TEST(integers_in_and_out_are_those_of_the_grids) {
  for (const int64_t proj_size : {0, 12}) compare_integers(proj_size);
}

TEST(a_hidden_state_that_is_not_wanted_is_the_output_alone) {
  Dice dice(4);
  const RandomStack stack(dice, {20, 40, 1, 1}, Style::kInt8Preset);
  const AlignedBytes bytes = stack.pack();
  const Blob blob(bytes.data(), bytes.size());
  SerialParallel serial;
  FloatCall with(dice, stack.sizes(), 1, 3, true), without = with;
  run_lstm(blob, scalar(), serial, with.call());
  Call call = without.call();
  call.h_n = nullptr;
  run_lstm(blob, scalar(), serial, call);
  CHECK(same_bits(without.output, with.h_n)) << "output";
  CHECK(same_bits(without.c_n, with.c_n)) << "c_n";
}

TEST(integers_for_a_part_without_a_grid_are_refused) {
  Dice dice(3);
  const RandomStack stack(dice, {4, 5, 1, 1}, Style::kFloat);
  const AlignedBytes bytes = stack.pack();
  const Blob blob(bytes.data(), bytes.size());
  SerialParallel serial;
  FloatCall floats(dice, stack.sizes(), 2, 1, false);
  Call call = floats.call();
  call.x.dtype = DType::kUint8;
  CHECK_ERROR(run_lstm(blob, scalar(), serial, call), "part x, which has no grid");
  call = floats.call();
  call.h_dtype = DType::kInt16;
  CHECK_ERROR(run_lstm(blob, scalar(), serial, call), "part ogate_cy, which has no grid");
}

TEST(a_sequence_without_steps_gives_the_states_back) {
  Dice dice(4);
  const RandomStack stack(dice, {4, 5, 2, 2, 3}, Style::kInt8Preset);
  const AlignedBytes bytes = stack.pack();
  const Blob blob(bytes.data(), bytes.size());
  SerialParallel serial;
  FloatCall call(dice, stack.sizes(), 0, 3, true);
  run_lstm(blob, scalar(), serial, call.call());
  CHECK(same_bits(call.h_n, call.hx)) << "h_n";
  CHECK(same_bits(call.c_n, call.cx)) << "c_n";
  FloatCall none(dice, stack.sizes(), 3, 0, false);
  run_lstm(blob, scalar(), serial, none.call());
}

}  // namespace
}  // namespace lstm_quant::testing
