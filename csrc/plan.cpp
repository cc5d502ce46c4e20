#include "plan.h"

#include <algorithm>

namespace lstm_quant {
namespace {

// Multiply-accumulates below which starting other threads costs more than it saves.
constexpr double kSerialWork = 4e6;
// Rows for each thread from which threads take rows of their own instead of meeting at each step.
constexpr int64_t kRowsPerThread = 8;
// Rows beyond which a tile's states leave the second-level cache without making better use of the weights.
constexpr int64_t kMaxTileRows = 64;
// Rows times steps for which the weights of the input projection are read once.
constexpr int64_t kProjectedRows = 32;
constexpr int64_t kMaxChunkSteps = 16;
// Rows from which the gates of all units no longer stay in the cache between input projection and step.
constexpr int64_t kGroupedRows = 16;
constexpr int32_t kGroupBlocks = 4;
constexpr int64_t kLayerSteps = 64;
// Bytes of hidden weights from which the cache does not hold them from step to step.
constexpr int64_t kZigzagBytes = 512 << 10;

int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace

Plan make_plan(const Sizes& sizes, int64_t steps, int64_t rows, int threads) {
  steps = std::max<int64_t>(steps, 1);
  rows = std::max<int64_t>(rows, 1);
  const int64_t blocks = divide_up(sizes.hidden_size, kUnits);
  double work = 0;
  for (int64_t layer = 0; layer < sizes.num_layers; ++layer) {
    work += static_cast<double>(sizes.num_directions * kGates * sizes.hidden_size) *
            static_cast<double>(sizes.depth(layer) + sizes.hidden_size);
  }
  work *= static_cast<double>(steps) * static_cast<double>(rows);

  Plan plan{};
  plan.slots = work < kSerialWork ? 1 : threads;
  plan.by_rows = plan.slots == 1 || rows >= plan.slots * kRowsPerThread;
  if (plan.by_rows) {
    plan.slots = static_cast<int>(std::min<int64_t>(plan.slots, rows));
    const int64_t slot_rows = divide_up(rows, plan.slots);
    plan.tile_rows = divide_up(slot_rows, divide_up(slot_rows, kMaxTileRows));
  } else {
    plan.slots = static_cast<int>(std::min<int64_t>(plan.slots, blocks * sizes.num_directions));
    plan.tile_rows = rows;
  }
  plan.chunk_steps = std::clamp<int64_t>(kProjectedRows / plan.tile_rows, 1, std::min(kMaxChunkSteps, steps));
  const bool grouped = plan.chunk_steps == 1 && plan.tile_rows >= kGroupedRows;
  plan.group_blocks = grouped ? kGroupBlocks : static_cast<int32_t>(blocks);
  // a backward direction begins with the last step, so two directions need all that the layer below gives
  const bool whole = sizes.num_directions == 2 || sizes.num_layers == 1;
  plan.layer_steps = whole ? steps : std::min(steps, std::max(plan.chunk_steps, kLayerSteps / plan.tile_rows));
  plan.zigzag = sizes.hidden_size * sizes.hidden_size * kGates > kZigzagBytes;
  // a quarter of what the work would take one thread at 50 multiply-accumulates a nanosecond
  plan.patience = std::chrono::microseconds(static_cast<int64_t>(std::clamp(work / 200e3, 50.0, 10e3)));
  return plan;
}

}  // namespace lstm_quant
