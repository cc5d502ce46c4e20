// Rows of different lengths in one call give what each gives alone, however the call is divided.
#include <algorithm>
#include <atomic>
#include <numeric>

#include "calls.h"
#include "check.h"
#include "lengths.h"
#include "random_stack.h"
#include "tested_kernels.h"

namespace lstm_quant::testing {
namespace {

using Values = std::vector<int64_t>;

Values random_lengths(Dice& dice, int64_t rows, int64_t steps) {
  Values lengths(rows);
  const bool equal = dice.chance(0.1);
  for (int64_t& length : lengths) length = equal ? steps : dice.integer(1, steps);
  return lengths;
}

// The padded rows one by one, with what padding has in the output left as it is.
FloatCall each_alone(const Blob& blob, const FloatCall& padded, const Values& lengths) {
  FloatCall result = padded;
  const Sizes& sizes = padded.sizes;
  const int64_t width = sizes.num_directions * sizes.h_size();
  SerialParallel serial;
  for (int64_t row = 0; row < padded.rows; ++row) {
    Dice dice(0);
    FloatCall one(dice, sizes, lengths[row], 1, !padded.hx.empty());
    const auto copy = [&](std::vector<float>& to, const std::vector<float>& from, int64_t count, int64_t size) {
      for (int64_t i = 0; i < count && !from.empty(); ++i)
        std::copy_n(from.begin() + (i * padded.rows + row) * size, size, to.begin() + i * size);
    };
    copy(one.x, padded.x, lengths[row], sizes.input_size);
    copy(one.hx, padded.hx, sizes.cells(), sizes.h_size());
    copy(one.cx, padded.cx, sizes.cells(), sizes.hidden_size);
    run_lstm(blob, check_evaluators(kScalarKernels), serial, one.call());
    const auto put = [&](std::vector<float>& to, const std::vector<float>& from, int64_t count, int64_t size) {
      for (int64_t i = 0; i < count; ++i)
        std::copy_n(from.begin() + i * size, size, to.begin() + (i * padded.rows + row) * size);
    };
    put(result.output, one.output, lengths[row], width);
    put(result.h_n, one.h_n, sizes.cells(), sizes.h_size());
    put(result.c_n, one.c_n, sizes.cells(), sizes.hidden_size);
  }
  return result;
}

// Moves values between the padded form and the packed one, whose rows are in `order`.
struct Packing {
  const FloatCall& padded;
  const Values& lengths;
  Values order;
  Values batch_sizes;

  Packing(const FloatCall& padded_, const Values& lengths_)
      : padded(padded_), lengths(lengths_), order(lengths_.size()) {
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
    for (int64_t step = 0; step < lengths[order[0]]; ++step)
      batch_sizes.push_back(std::count_if(lengths.begin(), lengths.end(), [&](int64_t n) { return n > step; }));
  }
  int64_t total() const { return std::accumulate(lengths.begin(), lengths.end(), int64_t{0}); }

  std::vector<float> pack(const std::vector<float>& values, int64_t size) const {
    std::vector<float> packed;
    for (size_t step = 0; step < batch_sizes.size(); ++step) {
      for (int64_t i = 0; i < batch_sizes[step]; ++i) {
        const auto from = values.begin() + (static_cast<int64_t>(step) * padded.rows + order[i]) * size;
        packed.insert(packed.end(), from, from + size);
      }
    }
    return packed;
  }
  std::vector<float> sort(const std::vector<float>& states, int64_t size) const {
    std::vector<float> sorted(states.size());
    for (size_t i = 0; i < states.size() / size; ++i) {
      const int64_t cell = static_cast<int64_t>(i) / padded.rows, row = static_cast<int64_t>(i) % padded.rows;
      std::copy_n(states.begin() + (cell * padded.rows + order[row]) * size, size, sorted.begin() + i * size);
    }
    return sorted;
  }
};

// `call` with its rows packed.
FloatCall pack(const FloatCall& call, const Packing& packing) {
  const Sizes& sizes = call.sizes;
  FloatCall packed = call;
  packed.steps = static_cast<int64_t>(packing.batch_sizes.size());
  packed.x = packing.pack(call.x, sizes.input_size);
  packed.output = packing.pack(call.output, sizes.num_directions * sizes.h_size());
  for (auto states : {&FloatCall::hx, &FloatCall::h_n}) packed.*states = packing.sort(call.*states, sizes.h_size());
  for (auto states : {&FloatCall::cx, &FloatCall::c_n}) packed.*states = packing.sort(call.*states, sizes.hidden_size);
  return packed;
}

TEST(rows_of_different_lengths_give_what_each_gives_alone) {
  for (const Kernels* kernels : tested_kernels()) {
    const CheckedKernels checked = check_evaluators(*kernels);
    for (uint32_t seed = 0; seed < seeds(60); ++seed) {
      Dice dice(seed);
      const int64_t hidden_size = dice.integer(1, 70);
      const Sizes sizes{dice.integer(1, 40), hidden_size, dice.integer(1, 3), dice.integer(1, 2),
                        random_proj_size(dice, hidden_size)};
      const RandomStack stack(dice, sizes, kStyles[seed % std::size(kStyles)]);
      const AlignedBytes bytes = stack.pack();
      const Blob blob(bytes.data(), bytes.size());
      const int64_t steps = dice.integer(1, 9), rows = dice.integer(1, 20);
      FloatCall got(dice, sizes, steps, rows, dice.chance(0.5));
      const Values row_lengths = random_lengths(dice, rows, steps);
      FloatCall expected = each_alone(blob, got, row_lengths);
      const Packing packing(got, row_lengths);
      const FloatCall expected_packed = pack(expected, packing);
      FloatCall got_packed = pack(got, packing);

      const int threads = static_cast<int>(dice.integer(1, 4));
      ThreadedParallel parallel(threads);
      const bool own_plan = dice.chance(0.3);
      const auto run = [&](Call call, const Lengths& lengths) {
        call.lengths = &lengths;
        call.steps = lengths.steps();
        if (own_plan) return run_lstm(blob, checked, parallel, call);
        run_lstm(blob, checked, parallel, call, random_plan(dice, sizes, call.steps, rows, threads));
      };
      const std::string where = std::string(kernels->name) + ", seed " + std::to_string(seed);
      run(got.call(), Lengths::of_padded(row_lengths.data(), rows, steps));
      check_same(expected, got, where + ", padded");
      Call call = got_packed.call();
      call.x.step_bytes = -1;  // not to be used
      run(call, Lengths::of_packed(packing.batch_sizes.data(), static_cast<int64_t>(packing.batch_sizes.size()),
                                   packing.total()));
      check_same(expected_packed, got_packed, where + ", packed");
    }
  }
}

std::atomic<int64_t> rows_stepped{0}, rows_projected{0};

TEST(padding_is_no_work) {
  Kernels counting = kScalarKernels;
  counting.step = [](const StepArgs& args) {
    rows_stepped += static_cast<int64_t>(args.rows) * (args.last_block - args.first_block);
    kScalarKernels.step(args);
  };
  counting.project = [](const ProjectArgs& args) {
    rows_projected += static_cast<int64_t>(args.rows) * (args.last_block - args.first_block);
    kScalarKernels.project(args);
  };
  const CheckedKernels checked = check_evaluators(counting);
  for (const Sharing sharing : {Sharing::kRows, Sharing::kUnits, Sharing::kLayers}) {
    for (const int32_t group_blocks : {2, 1000}) {
      Dice dice(7);
      const Sizes sizes{5, 70, 2, sharing == Sharing::kLayers ? 1 : 2};
      const RandomStack stack(dice, sizes, Style::kInt8Preset);
      const AlignedBytes bytes = stack.pack();
      const Blob blob(bytes.data(), bytes.size());
      const Values row_lengths{3, 1, 40, 2, 7, 7};
      FloatCall floats(dice, sizes, 40, 6, true);
      const Lengths lengths = Lengths::of_padded(row_lengths.data(), 6, 40);
      Call call = floats.call();
      call.lengths = &lengths;
      Plan plan = make_plan(sizes, counting.rates, 40, 6, 2);
      plan.sharing = sharing;
      plan.slots = 2;
      plan.tile_rows = sharing == Sharing::kRows ? 3 : 6;
      plan.chunk_steps = group_blocks == 2 ? 1 : 4;
      plan.group_blocks = group_blocks;
      plan.layer_steps = sizes.num_directions == 2 ? 40 : 8;
      plan.pieces_between = sharing == Sharing::kLayers ? 2 : 1;
      ThreadedParallel parallel(2);
      rows_stepped = rows_projected = 0;
      run_lstm(blob, checked, parallel, call, plan);
      const int64_t needed = lengths.total() * sizes.cells() * 5;
      CHECK(rows_stepped == needed) << rows_stepped.load() << " rows of blocks stepped, of " << needed;
      CHECK(rows_projected == needed) << rows_projected.load() << " rows of blocks projected, of " << needed;
    }
  }
}

// One slot after the other, with the rows that each of them stepped.
class CountingParallel final : public Parallel {
 public:
  Threads threads() const override { return 2; }
  void run(int slots, const Task& task) override {
    for (int slot = 0; slot < slots; ++slot) {
      rows_stepped = 0;
      task(slot, slot + 1);
      counts.push_back(rows_stepped);
    }
  }

  Values counts;
};

TEST(threads_share_long_and_short_rows_alike) {
  Kernels counting = kScalarKernels;
  counting.step = [](const StepArgs& args) {
    rows_stepped += static_cast<int64_t>(args.rows);
    kScalarKernels.step(args);
  };
  Dice dice(8);
  const Sizes sizes{3, 16, 1, 1};
  const RandomStack stack(dice, sizes, Style::kInt8Preset);
  const AlignedBytes bytes = stack.pack();
  const Blob blob(bytes.data(), bytes.size());
  const Values row_lengths{1, 2, 3, 4, 5, 6, 7, 8};
  FloatCall floats(dice, sizes, 8, 8, false);
  const Lengths lengths = Lengths::of_padded(row_lengths.data(), 8, 8);
  Call call = floats.call();
  call.lengths = &lengths;
  Plan plan = make_plan(sizes, counting.rates, 8, 8, 2);
  plan.sharing = Sharing::kRows;
  plan.slots = 2;
  plan.tile_rows = 4;
  CountingParallel parallel;
  run_lstm(blob, check_evaluators(counting), parallel, call, plan);
  CHECK(parallel.counts == (Values{8 + 6 + 4 + 2, 7 + 5 + 3 + 1})) << parallel.counts[0] << " of " << lengths.total();
}

TEST(lengths_that_cannot_be_are_refused) {
  const auto packed = [](Values sizes, int64_t total) {
    return error_of([&] { Lengths::of_packed(sizes.data(), static_cast<int64_t>(sizes.size()), total); });
  };
  const auto padded = [](Values lengths, int64_t steps) {
    return error_of([&] { Lengths::of_padded(lengths.data(), static_cast<int64_t>(lengths.size()), steps); });
  };
  CHECK(packed({3, 2, 2}, 7).empty());
  CHECK(packed({}, 0).empty());
  CHECK(packed({0}, 0).find("must be positive and never grow, got 0 at step 0") != std::string::npos);
  CHECK(packed({2, -1}, 3).find("got -1 at step 1 after 2") != std::string::npos);
  CHECK(packed({2, 3}, 5).find("got 3 at step 1 after 2") != std::string::npos);
  CHECK(packed({3, 2}, 6).find("add up to the 6 rows of the packed input, got 5") != std::string::npos);
  CHECK(packed({INT64_MAX, INT64_MAX}, 6).find("got more") != std::string::npos);
  CHECK(padded({1, 4}, 4).empty());
  CHECK(padded({1, 0}, 4).find("from 1 to the 4 steps of the input, got 0 for row 1") != std::string::npos);
  CHECK(padded({5, 1}, 4).find("got 5 for row 0") != std::string::npos);
  CHECK(padded({-1}, 4).find("got -1 for row 0") != std::string::npos);
}

}  // namespace
}  // namespace lstm_quant::testing
