#include "plan.h"

#include <algorithm>
#include <cmath>

#include "progress.h"

namespace lstm_quant {
namespace {

// What things cost beside the kernels' work, in nanoseconds, measured on Zen 4. They need not be right on other
// machines: they only decide how many threads a call takes, and what each of them does.
constexpr double kStepNs = 60;               // a step of one layer, whatever its size
constexpr double kMeetingNsPerMember = 110;  // a step's meeting
constexpr double kPieceNs = 250;             // taking a piece of a layer, and its input from another CPU's cache
constexpr double kAheadGain = 1.06;          // from projecting the next chunk beside the steps of this one
constexpr double kPauseNs = 20;              // a pause of a thread that waits
constexpr double kManyReaders = 1.15;        // threads that all read many weights (Zen 3)
// What sharing must save to be worth disturbing other threads.
constexpr double kGain = 1.1;

// Steps of a piece, where layers work at the same time: the fewer, the sooner the next layer begins.
constexpr int64_t kPieceSteps[] = {1, 2, 4, 8, 16};
// Room for a layer to go on while the next is late.
constexpr int64_t kPiecesBetween = 4;
// Rows beyond which a tile's states leave the second-level cache without making better use of the weights.
constexpr int64_t kMaxTileRows = 64;
// Rows times steps for which the weights of the input projection are read once, and where they are many.
constexpr int64_t kProjectedRows = 32;
constexpr int64_t kMaxChunkSteps = 16;
constexpr int64_t kManyProjectedRows = 64;
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

int64_t hidden_bytes(const Sizes& sizes) {
  return sizes.hidden_size * sizes.h_size() * kGates;
}

bool projects_ahead(const Sizes& sizes, int64_t rows, int64_t chunk_steps) {
  return rows == 1 && chunk_steps == kAheadRows && hidden_bytes(sizes) > kLeastAheadBytes &&
         hidden_bytes(sizes) < kMostAheadBytes;
}

bool has_many_weights(const Sizes& sizes, const Rates& rates) {
  const int64_t depth = std::max(sizes.input_size, sizes.num_layers > 1 ? sizes.depth(1) : 0);
  const int64_t bytes = hidden_bytes(sizes) + sizes.hidden_size * depth * kGates;
  return rates.many_weights_bytes != 0 && bytes >= rates.many_weights_bytes;
}

int64_t chunk_of(const Sizes& sizes, const Rates& rates, int64_t steps, int64_t rows) {
  if (has_many_weights(sizes, rates)) {
    return std::clamp<int64_t>(kManyProjectedRows / rows, 1, steps);
  }
  return std::clamp<int64_t>(kProjectedRows / rows, 1, std::min(kMaxChunkSteps, steps));
}

// What a call takes, in nanoseconds, divided in one way or another.
class Cost {
 public:
  Cost(const Sizes& sizes, const Rates& rates, int64_t steps, int64_t rows, double start_ns)
      : sizes_(sizes), rates_(rates), steps_(steps), rows_(rows), start_ns_(start_ns) {}

  double alone() const { return layers(rows_, 1); }
  // `threads` threads with rows of their own, each of which reads all weights.
  double by_rows(int threads) const {
    const double readers = has_many_weights(sizes_, rates_) ? kManyReaders : 1;
    return start_ns_ + layers(divide_up(rows_, threads), 1) * readers;
  }
  // `threads` threads that share each step; two directions do not meet.
  double by_units(int threads) const {
    const int64_t blocks = divide_up(sizes_.hidden_size, kUnits);
    const int64_t members = std::max<int64_t>(threads / sizes_.num_directions, 1);
    const double part = static_cast<double>(divide_up(blocks, members)) / (blocks * sizes_.num_directions);
    const int64_t a_step = sizes_.proj_size == 0 ? 1 : 2;
    const double meetings = static_cast<double>(members > 1 ? steps_ * sizes_.num_layers * a_step : 0);
    return start_ns_ + layers(rows_, part) + meetings * kMeetingNsPerMember * members;
  }
  // `threads` threads that take pieces of `piece` steps, one layer each at a time.
  double by_layers(int threads, int64_t piece) const {
    const double first = kPieceNs + layer(sizes_.input_size, piece, rows_, 1);
    const double other = kPieceNs + layer(sizes_.h_size(), piece, rows_, 1);
    const double all = first + other * (sizes_.num_layers - 1);
    const double pieces = static_cast<double>(steps_) / piece;
    // a layer begins when the one before has done its first piece, and so ends later
    const double waiting = all / sizes_.num_layers * (threads - 1);
    return start_ns_ + std::max(all / threads, std::max(first, other)) * pieces + waiting;
  }

 private:
  double layers(int64_t rows, double part) const {
    return layer(sizes_.input_size, steps_, rows, part) +
           layer(sizes_.depth(1), steps_, rows, part) * (sizes_.num_layers - 1);
  }
  // All directions of a layer, or that part of their units. The weights are read once for each step, those of the input
  // projection for each chunk.
  double layer(int64_t depth, int64_t steps, int64_t rows, double part) const {
    const int64_t chunk = chunk_of(sizes_, rates_, steps, rows);
    const double units = part * sizes_.num_directions * sizes_.hidden_size;
    const double hidden = projection(sizes_.h_size() * units, 1, rows);
    // W_hr has a row for each column of h, not four for each unit
    const double hy = sizes_.proj_size == 0 ? 0 : projection(sizes_.proj_size * units / kGates, 1, rows);
    const double step = kStepNs + rows * units * rates_.unit_ns + hidden + hy;
    const double input = projection(depth * units, divide_up(steps, chunk), steps * rows);
    const bool ahead = steps >= 2 * chunk && projects_ahead(sizes_, rows, chunk);
    return (steps * step + input) / (ahead ? kAheadGain : 1);
  }
  // `rows` rows by weights that are read `times` times: mostly what takes longer, reading or multiplying, but where
  // they take about as long neither hides all of the other.
  double projection(double columns, int64_t times, int64_t rows) const {
    const double weights = kGates * columns;
    const double read = weights * times / rates_.weights_per_ns, multiply = weights * rows / rates_.products_per_ns;
    return std::sqrt(std::sqrt(read * read * read * read + multiply * multiply * multiply * multiply));
  }

  const Sizes& sizes_;
  const Rates& rates_;
  const int64_t steps_;
  const int64_t rows_;
  const double start_ns_;  // of other threads
};

// The number of threads and the way of sharing that take least time.
void choose_slots(const Cost& cost, const Sizes& sizes, int64_t steps, int64_t rows, const Threads& threads,
                  Plan& plan) {
  plan.sharing = Sharing::kRows;
  plan.slots = 1;
  double least = cost.alone() / kGain;
  if (threads.count <= 1 || least <= threads.start_ns) return;
  const auto consider = [&](double ns, Sharing sharing, int slots, int64_t layer_steps) {
    if (ns >= least) return;
    least = ns;
    plan.sharing = sharing;
    plan.slots = slots;
    plan.layer_steps = layer_steps;
  };
  const int64_t most_by_units = divide_up(sizes.hidden_size, kUnits) * sizes.num_directions;
  for (int n = 2; n <= threads.count; n = n < threads.count ? std::min(2 * n, threads.count) : n + 1) {
    if (n <= rows) consider(cost.by_rows(n), Sharing::kRows, n, 0);
    if (n <= most_by_units) consider(cost.by_units(n), Sharing::kUnits, n, 0);
  }
  const int by_layers = static_cast<int>(std::min<int64_t>(threads.count, sizes.num_layers));
  // a backward direction begins with the last step, so layers of two directions cannot work at the same time
  if (by_layers == 1 || sizes.num_directions == 2 || rows > kMaxTileRows) return;
  for (const int64_t piece : kPieceSteps) {
    if (piece < steps) consider(cost.by_layers(by_layers, piece), Sharing::kLayers, by_layers, piece);
  }
}

}  // namespace

Plan make_plan(const Sizes& sizes, const Rates& rates, int64_t steps, int64_t rows, const Threads& threads,
               std::optional<int64_t> row_steps) {
  steps = std::max<int64_t>(steps, 1);
  rows = std::max<int64_t>(rows, 1);
  // what a call takes is that of a step in the middle, what it must have room for that of the fullest
  const int64_t mean_rows = std::max<int64_t>(row_steps.value_or(steps * rows) / steps, 1);
  const Cost cost(sizes, rates, steps, mean_rows, threads.start_ns);
  Plan plan{};
  choose_slots(cost, sizes, steps, mean_rows, threads, plan);
  const bool by_layers = plan.sharing == Sharing::kLayers;
  const int64_t slot_rows = plan.sharing == Sharing::kRows ? divide_up(rows, plan.slots) : rows;
  plan.tile_rows = divide_up(slot_rows, divide_up(slot_rows, kMaxTileRows));
  plan.chunk_steps = chunk_of(sizes, rates, by_layers ? plan.layer_steps : steps, plan.tile_rows);
  // one step at a time, so that threads can take blocks as they get on
  if (plan.sharing == Sharing::kUnits && plan.tile_rows >= kGroupedRows) plan.chunk_steps = 1;
  const bool grouped = plan.chunk_steps == 1 && plan.tile_rows >= kGroupedRows;
  plan.group_blocks = grouped ? kGroupBlocks : static_cast<int32_t>(divide_up(sizes.hidden_size, kUnits));
  // a backward direction begins with the last step, so two directions need all that the layer below gives
  const bool whole = sizes.num_directions == 2 || sizes.num_layers == 1;
  if (!by_layers)
    plan.layer_steps = whole ? steps : std::min(steps, std::max(plan.chunk_steps, kLayerRows / plan.tile_rows));
  plan.pieces_between = by_layers ? kPiecesBetween : 1;
  plan.zigzag = hidden_bytes(sizes) > kZigzagBytes;
  plan.ahead = projects_ahead(sizes, plan.tile_rows, plan.chunk_steps);
  plan.delta = rows == 1 && hidden_bytes(sizes) >= kLeastDeltaBytes;
  // a quarter of the time that one thread takes, for all or for a step
  const double patience_us = std::clamp(cost.alone() / 4000, 50.0, 10e3);
  const double step_ns = cost.alone() / static_cast<double>(steps * sizes.num_layers);
  plan.pauses = std::max(Progress::kPauses, static_cast<int64_t>(std::min(step_ns, 10e6) / 4 / kPauseNs));
  plan.patience = std::chrono::microseconds(static_cast<int64_t>(patience_us));
  return plan;
}

}  // namespace lstm_quant
