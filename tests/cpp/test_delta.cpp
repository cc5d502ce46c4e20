// Delta steps: the same bits as whole sums, and taken where a signal stands still.
#include <algorithm>
#include <atomic>
#include <string>
#include <vector>

#include "calls.h"
#include "check.h"
#include "random_stack.h"
#include "stream.h"
#include "tested_kernels.h"

namespace lstm_quant::testing {
namespace {

// Kernels that count what they sum by changes, of the kernels chosen last.
const Kernels* counted = nullptr;
std::atomic<int64_t> steps_by_changes{0}, projections{0}, projections_by_changes{0};

void counting_step(const StepArgs& args) {
  if (args.delta != nullptr) steps_by_changes.fetch_add(1, std::memory_order_relaxed);
  counted->step(args);
}

void counting_project(const ProjectArgs& args) {
  (args.delta == nullptr ? projections : projections_by_changes).fetch_add(1, std::memory_order_relaxed);
  counted->project(args);
}

Kernels counting(const Kernels& kernels) {
  counted = &kernels;
  steps_by_changes = projections = projections_by_changes = 0;
  Kernels counting = kernels;
  counting.step = counting_step;
  counting.project = counting_project;
  return counting;
}

// What the scalar kernels give by whole sums.
void run_whole(const Blob& blob, FloatCall& call) {
  SerialParallel serial;
  Plan plan = make_plan(blob.sizes(), kScalarKernels.rates, call.steps, call.rows, 1);
  plan.delta = false;
  run_lstm(blob, check_evaluators(kScalarKernels), serial, call.call(), plan);
}

Plan random_delta_plan(Dice& dice, const Sizes& sizes, int64_t steps, int threads) {
  Plan plan = make_plan(sizes, kScalarKernels.rates, steps, 1, threads);
  plan.slots = threads;
  const bool whole = sizes.num_directions == 2 || sizes.num_layers == 1;
  plan.sharing = whole || dice.chance(0.5) ? Sharing::kUnits : Sharing::kLayers;
  plan.pieces_between = plan.sharing == Sharing::kLayers ? 2 : 1;
  plan.delta = true;
  plan.ahead = dice.chance(0.5);
  plan.chunk_steps = plan.ahead ? kAheadRows : std::min<int64_t>(steps, dice.one_of({1, 2, 5, 16, 40}));
  plan.group_blocks = 1000;
  plan.layer_steps = whole ? steps : dice.integer(1, steps);
  plan.zigzag = dice.chance(0.5);
  return plan;
}

TEST(delta_steps_give_the_same_bits) {
  for (const Kernels* kernels : tested_kernels()) {
    const Kernels with_counts = counting(*kernels);
    const CheckedKernels checked = check_evaluators(with_counts);
    for (uint32_t seed = 0; seed < seeds(40); ++seed) {
      Dice dice(seed);
      const int64_t hidden_size = dice.integer(1, 100);
      const Sizes sizes{dice.integer(1, 70), hidden_size, dice.integer(1, 2), dice.integer(1, 2),
                        random_proj_size(dice, hidden_size)};
      const RandomStack stack(dice, sizes, kStyles[seed % std::size(kStyles)]);
      const AlignedBytes bytes = stack.pack();
      const Blob blob(bytes.data(), bytes.size());
      FloatCall expected(dice, sizes, dice.integer(20, 80), 1, dice.chance(0.5));
      expected.make_signal(kSignals[dice.integer(0, 3)], dice.integer(2, 20));
      FloatCall got = expected;
      run_whole(blob, expected);
      ThreadedParallel parallel(static_cast<int>(dice.integer(1, 3)));
      const Plan plan = random_delta_plan(dice, sizes, got.steps, parallel.threads().count);
      run_lstm(blob, checked, parallel, got.call(), plan);
      check_same(expected, got, std::string(kernels->name) + ", seed " + std::to_string(seed));
    }
    CHECK(steps_by_changes > seeds(100)) << "only " << steps_by_changes << " steps by changes, " << kernels->name;
    CHECK(projections_by_changes > seeds(100)) << "only " << projections_by_changes << " by changes, " << kernels->name;
  }
}

TEST(a_stream_goes_on_by_changes_from_call_to_call) {
  for (const Kernels* kernels : tested_kernels()) {
    const Kernels with_counts = counting(*kernels);
    const CheckedKernels checked = check_evaluators(with_counts);
    for (uint32_t seed = 0; seed < 6; ++seed) {  // in fewer there may be none whose projected states are watched
      Dice dice(seed);
      const int64_t hidden_size = dice.integer(64, 100);
      const Sizes sizes{dice.integer(1, 70), hidden_size, dice.integer(1, 2), 1, random_proj_size(dice, hidden_size)};
      const RandomStack stack(dice, sizes, dice.chance(0.5) ? Style::kInt8Preset : Style::kAllInt8);
      const AlignedBytes bytes = stack.pack();
      const Blob blob(bytes.data(), bytes.size());
      Stream stream(bytes.data(), bytes.size(), checked, 1);
      for (int times = 0; times < 2; ++times) {  // the second time over what the first one kept
        FloatCall expected(dice, sizes, 80, 1, true);
        expected.make_signal(kSignals[dice.integer(1, 3)], dice.integer(2, 20));
        FloatCall got = expected;
        run_whole(blob, expected);
        stream.reset(got.hx.data(), got.cx.data());
        Sequence x = got.call().x;
        for (int64_t step = 0, chunk; step < got.steps; step += chunk) {
          chunk = dice.chance(0.9) ? 1 : dice.integer(1, got.steps - step);
          ThreadedParallel parallel(static_cast<int>(dice.integer(1, 20) == 1 ? 2 : 1));
          stream.run(parallel, chunk, x, got.output.data() + step * sizes.h_size());
          x.data = static_cast<const char*>(x.data) + chunk * x.step_bytes;
        }
        stream.copy_state(got.h_n.data(), got.c_n.data());
        check_same(expected, got, std::string(kernels->name) + ", seed " + std::to_string(seed));
      }
    }
    CHECK(steps_by_changes > 10) << "only " << steps_by_changes << " steps by changes, " << kernels->name;
    CHECK(projections_by_changes > 10) << "only " << projections_by_changes << " by changes, " << kernels->name;
  }
}

// Sums begin with those of a row of equal bytes, and here the first row is that one.
TEST(a_row_without_changes_has_igates_too) {
  const CheckedKernels checked = check_evaluators(*tested_kernels().front());
  Dice dice(6);
  const RandomStack stack(dice, {64, 64, 1, 1}, Style::kInt8Preset);
  const AlignedBytes bytes = stack.pack();
  const Blob blob(bytes.data(), bytes.size());
  FloatCall expected(dice, stack.sizes(), 60, 1, false);
  const Grid grid = blob.cell(0).x;
  std::fill(expected.x.begin() + 20 * 64, expected.x.end(), (kMostChange + grid.low) * grid.scale);
  FloatCall got = expected;
  run_whole(blob, expected);
  SerialParallel serial;
  run_lstm(blob, checked, serial, got.call());
  check_same(expected, got, "");
}

TEST(a_long_chunk_is_looked_at_all_along) {
  constexpr size_t kRows = 64, kBytes = 64;
  Projection projection;
  projection.padded_depth = kBytes;
  KeptSums kept;
  const AlignedMemory memory = allocate_for([&](Arena& arena) { kept = KeptSums(arena, projection, 1); });
  std::vector<uint8_t> rows(kRows * kBytes);
  CHECK(kept.watch_all(rows.data(), kBytes, kRows)) << "nothing changes";
  Dice dice(7);
  for (size_t i = rows.size() / 4; i < rows.size(); ++i) rows[i] = static_cast<uint8_t>(dice.integer(0, 255));
  CHECK(!kept.watch_all(rows.data(), kBytes, kRows)) << "all changes after a quarter of it";
}

// Runs a signal of 400 steps through 64 -> 64, at once or by a stream's single steps.
void run_signal(Signal signal, int64_t period, bool streamed) {
  const Kernels with_counts = counting(*tested_kernels().front());
  const CheckedKernels checked = check_evaluators(with_counts);
  Dice dice(5);
  const RandomStack stack(dice, {64, 64, 1, 1}, Style::kInt8Preset);
  const AlignedBytes bytes = stack.pack();
  FloatCall call(dice, stack.sizes(), 400, 1, false);
  call.make_signal(signal, period);
  SerialParallel serial;
  if (!streamed) return run_lstm(Blob(bytes.data(), bytes.size()), checked, serial, call.call());
  Stream stream(bytes.data(), bytes.size(), checked, 1);
  Sequence x = call.call().x;
  for (int64_t step = 0; step < call.steps; ++step) {
    stream.run(serial, 1, x, call.output.data() + step * 64);
    x.data = static_cast<const char*>(x.data) + x.step_bytes;
  }
}

TEST(what_stands_still_is_skipped_and_what_moves_is_not) {
  for (const bool streamed : {false, true}) {
    const auto counts = [&] {
      return std::string(streamed ? "streamed: " : "at once: ") + std::to_string(steps_by_changes) + " steps and " +
             std::to_string(projections_by_changes) + " projections by changes, " + std::to_string(projections) +
             " projections of whole rows";
    };
    run_signal(Signal::kNoise, 0, streamed);
    CHECK(steps_by_changes == 0 && projections_by_changes == 0) << counts();
    // the hidden state comes to rest some steps after x, which is projected twice in a silence at most
    run_signal(Signal::kSilence, 50, streamed);
    CHECK(steps_by_changes > 200 && projections < 110 && projections_by_changes <= 4) << counts();
    run_signal(Signal::kSlowSensor, 50, streamed);
    CHECK(steps_by_changes > 200 && projections <= 4 && projections_by_changes <= 8) << counts();
    // one feature of many, but the hidden state moves with each
    run_signal(Signal::kOneByOne, 0, streamed);
    CHECK(projections_by_changes > 350 && projections <= 4) << counts();
  }
}

}  // namespace
}  // namespace lstm_quant::testing
