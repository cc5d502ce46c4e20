#include "plan.h"

#include <algorithm>

namespace lstm_quant {
namespace {

// What things cost, in nanoseconds, measured on Zen 4 with AVX-512. They need not be right on other machines: they only
// decide how many threads a call takes.
constexpr double kWeightsPerNs = 90;      // int8 weights read again and again, where they are few
constexpr double kManyWeightsPerNs = 55;  // and where a thread reads more than kFewWeights
constexpr double kFewWeights = 3 << 20;
constexpr double kProductsPerNs = 180;       // multiply-accumulates on weights that are at hand
constexpr double kRegionNs = 4000;           // starting other threads, and waiting for the last to end
constexpr double kMeetingNsPerMember = 150;  // a step's meeting
// What sharing must save to be worth disturbing other threads.
constexpr double kGain = 1.1;

// Rows beyond which a tile's states leave the second-level cache without making better use of the weights.
constexpr int64_t kMaxTileRows = 64;
// Rows times steps for which the weights of the input projection are read once.
constexpr int64_t kProjectedRows = 32;
constexpr int64_t kMaxChunkSteps = 16;
// Rows from which the gates of all units no longer stay in the cache between input projection and step.
constexpr int64_t kGroupedRows = 16;
constexpr int32_t kGroupBlocks = 4;
// Rows times steps that a layer does before the next: few enough for the cache, many enough to read its weights seldom.
constexpr int64_t kLayerRows = 64;
// Bytes of hidden weights from which the first-level cache does not hold them from step to step.
constexpr int64_t kZigzagBytes = 32 << 10;
// Bytes of hidden weights whose reading leaves time to project the next chunk, from caches that its weights fit in too.
constexpr int64_t kLeastAheadBytes = 128 << 10;
constexpr int64_t kMostAheadBytes = 6 << 20;
// Bytes of hidden weights from which skipping what did not change can pay: with 32 units it costs up to 15 %, with 64
// it gains 10 to 80 % where the signal stands still.
constexpr int64_t kLeastDeltaBytes = 16 << 10;

int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

int64_t chunk_of(int64_t steps, int64_t rows) {
  return std::clamp<int64_t>(kProjectedRows / rows, 1, std::min(kMaxChunkSteps, steps));
}

// A call's multiply-accumulates, and what they take.
class Work {
 public:
  Work(const Sizes& sizes, int64_t steps) : steps_(steps), layers_(static_cast<double>(sizes.num_layers)) {
    const auto outputs = static_cast<double>(sizes.num_directions * kGates * sizes.hidden_size);
    hidden_ = outputs * static_cast<double>(sizes.hidden_size * sizes.num_layers);
    for (int64_t layer = 0; layer < sizes.num_layers; ++layer)
      input_ += outputs * static_cast<double>(sizes.depth(layer));
  }

  // Of one thread on `rows` rows and one of `parts` equal parts of the units. The weights are read once for each step,
  // those of the input projection for each chunk.
  double ns(int64_t rows, int parts = 1) const {
    const auto steps = static_cast<double>(steps_);
    const auto chunks = static_cast<double>(divide_up(steps_, chunk_of(steps_, rows)));
    const double products = static_cast<double>(rows) * steps / kProductsPerNs;
    const double hidden = hidden_ / parts, input = input_ / parts;
    const double per_ns = hidden / layers_ > kFewWeights ? kManyWeightsPerNs : kWeightsPerNs;
    return std::max(hidden * products, hidden * steps / per_ns) + std::max(input * products, input * chunks / per_ns);
  }
  // Of `threads` threads with rows of their own.
  double ns_by_rows(int64_t rows, int threads) const { return kRegionNs + ns(divide_up(rows, threads)); }
  // Of `threads` threads that share each step; two directions do not meet.
  double ns_by_units(int64_t rows, int threads, int64_t directions) const {
    const auto members = static_cast<double>(divide_up(threads, directions));
    const double meeting = members > 1 ? kMeetingNsPerMember * members : 0;
    return kRegionNs + ns(rows, threads) + static_cast<double>(steps_) * meeting;
  }

 private:
  int64_t steps_;
  double layers_;
  double hidden_ = 0;  // for one step of one row
  double input_ = 0;
};

// The number of threads and the way of sharing that take least time.
void choose_slots(const Work& work, const Sizes& sizes, int64_t rows, int threads, Plan& plan) {
  plan.slots = 1;
  plan.by_rows = true;
  double least = work.ns(rows) / kGain;
  const int64_t most_by_units = divide_up(sizes.hidden_size, kUnits) * sizes.num_directions;
  for (int n = 2; n <= threads; n = n < threads ? std::min(2 * n, threads) : n + 1) {
    if (n <= rows && work.ns_by_rows(rows, n) < least) {
      least = work.ns_by_rows(rows, n);
      plan.slots = n;
      plan.by_rows = true;
    }
    if (n <= most_by_units && work.ns_by_units(rows, n, sizes.num_directions) < least) {
      least = work.ns_by_units(rows, n, sizes.num_directions);
      plan.slots = n;
      plan.by_rows = false;
    }
  }
}

}  // namespace

Plan make_plan(const Sizes& sizes, int64_t steps, int64_t rows, int threads) {
  steps = std::max<int64_t>(steps, 1);
  rows = std::max<int64_t>(rows, 1);
  const Work work(sizes, steps);
  Plan plan{};
  choose_slots(work, sizes, rows, threads, plan);
  const int64_t slot_rows = plan.by_rows ? divide_up(rows, plan.slots) : rows;
  plan.tile_rows = plan.by_rows ? divide_up(slot_rows, divide_up(slot_rows, kMaxTileRows)) : rows;
  plan.chunk_steps = chunk_of(steps, plan.tile_rows);
  const bool grouped = plan.chunk_steps == 1 && plan.tile_rows >= kGroupedRows;
  plan.group_blocks = grouped ? kGroupBlocks : static_cast<int32_t>(divide_up(sizes.hidden_size, kUnits));
  // a backward direction begins with the last step, so two directions need all that the layer below gives
  const bool whole = sizes.num_directions == 2 || sizes.num_layers == 1;
  plan.layer_steps = whole ? steps : std::min(steps, std::max(plan.chunk_steps, kLayerRows / plan.tile_rows));
  const int64_t hidden_bytes = sizes.hidden_size * sizes.hidden_size * kGates;
  plan.zigzag = hidden_bytes > kZigzagBytes;
  plan.ahead = plan.tile_rows == 1 && plan.chunk_steps == kAheadRows && hidden_bytes > kLeastAheadBytes &&
               hidden_bytes < kMostAheadBytes;
  plan.delta = rows == 1 && hidden_bytes >= kLeastDeltaBytes;
  // a quarter of the time that one thread takes
  const double patience_us = std::clamp(work.ns(rows) / 4000, 50.0, 10e3);
  plan.patience = std::chrono::microseconds(static_cast<int64_t>(patience_us));
  return plan;
}

}  // namespace lstm_quant
