#include "stack.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "ieee_scope.h"
#include "pipeline.h"
#include "team.h"

namespace lstm_quant {
namespace {

// Throws unless integers of `dtype` can be those of `grid`.
void check_integers(const char* part, const Grid& grid, DType dtype, bool must_fit) {
  if (dtype == DType::kFloat32) return;
  if (!grid.present()) {
    throw std::runtime_error(std::string("integers for part ") + part + ", which has no grid: use float32");
  }
  const double low = grid.zero_point + static_cast<double>(grid.low),
               high = grid.zero_point + static_cast<double>(grid.high);
  double least = std::numeric_limits<int32_t>::min(), largest = std::numeric_limits<int32_t>::max();
  if (dtype == DType::kUint8) least = 0, largest = UINT8_MAX;
  if (dtype == DType::kInt8) least = INT8_MIN, largest = INT8_MAX;
  if (dtype == DType::kInt16) least = INT16_MIN, largest = INT16_MAX;
  if (must_fit && (low < least || high > largest)) {
    throw std::runtime_error(std::string("part ") + part + " has integers from " +
                             std::to_string(static_cast<int64_t>(low)) + " to " +
                             std::to_string(static_cast<int64_t>(high)) + ", more than the dtype asked for holds");
  }
}

int64_t layer_bytes(const Sizes& sizes, DType dtype) {
  return sizes.num_directions * sizes.h_size() * item_bytes(dtype);
}

// Where the members of a team meet.
struct Crews {
  // `members`: how many take portions in a direction.
  Crews(int64_t pauses, int members)
      : all(pauses), directions{Crew(pauses), Crew(pauses)}, portions{Portions(members), Portions(members)} {}

  Crew all;
  Crew directions[2];
  Portions portions[2];
};

// A call on one tile of rows after the other, by the threads that share them.
class TileRun {
 public:
  TileRun(const Sizes& sizes, const Kernels& kernels, const std::vector<BoundCell>& cells, const Call& call,
          const Buffers& buffers, Crews& crews)
      : sizes_(sizes), kernels_(kernels), cells_(cells), call_(call), buffers_(buffers), crews_(crews) {}

  void by_rows(Parallel& parallel) const;
  void by_units(Parallel& parallel) const;
  void by_layers(Parallel& parallel) const;

 private:
  // The rows of a tile.
  TileRows rows_of(int64_t tile) const;
  // A member's part of a tile, and of a piece of it in one layer.
  void run(const Tile& tile, const Workspace& workspace, const TileRows& rows, int member, int members) const;
  void run_layer(const Tile& tile, const Workspace& workspace, const TileRows& rows, int64_t layer, int64_t first_step,
                 int member, int members) const;
  CellRun make_run(const Tile& tile, const Workspace& workspace, const TileRows& rows, int64_t layer, int64_t direction,
                   int64_t first_step, int member, int members) const;
  // Where the caller has the rows from a step on.
  RowLayout layout(const TileRows& rows, int64_t first_step, int64_t step_bytes, int64_t row_bytes) const;

  const Sizes& sizes_;
  const Kernels& kernels_;
  const std::vector<BoundCell>& cells_;
  const Call& call_;
  const Buffers& buffers_;
  Crews& crews_;
};

TileRows TileRun::rows_of(int64_t tile) const {
  const int64_t tile_rows = buffers_.plan.tile_rows, tiles = (call_.rows + tile_rows - 1) / tile_rows;
  if (call_.lengths == nullptr) {
    const int64_t first = tile * tile_rows;
    return {nullptr, call_.steps, first, 1, std::min(tile_rows, call_.rows - first)};
  }
  // long and short rows in turn, so that all tiles take about as long
  return {call_.lengths, call_.steps, tile, tiles, (call_.rows - tile + tiles - 1) / tiles};
}

RowLayout TileRun::layout(const TileRows& rows, int64_t first_step, int64_t step_bytes, int64_t row_bytes) const {
  RowLayout layout{step_bytes, row_bytes, rows.apart};
  if (rows.lengths == nullptr) return layout;
  if (rows.lengths->starts() != nullptr) layout.starts = rows.lengths->starts() + first_step;
  if (rows.lengths->order() != nullptr) layout.order = rows.lengths->order() + rows.first;
  return layout;
}

CellRun TileRun::make_run(const Tile& tile, const Workspace& workspace, const TileRows& rows, int64_t layer,
                          int64_t direction, int64_t first_step, int member, int members) const {
  const int64_t cell = layer * sizes_.num_directions + direction;
  const int64_t float_row = layer_bytes(sizes_, DType::kFloat32), output_row = layer_bytes(sizes_, call_.h_dtype);

  const auto between = [&](int64_t from_layer) {
    const int64_t pieces = buffers_.plan.pieces_between, piece = first_step / buffers_.plan.layer_steps;
    return reinterpret_cast<char*>(tile.between[(from_layer * pieces + piece % pieces) % tile.between.size()]);
  };
  // the caller's first step and row: packed steps count from the start, rows in another order from the first of all
  const auto first = [&](const RowLayout& layout) {
    return (layout.starts == nullptr ? first_step * layout.step_bytes : 0) +
           (layout.order == nullptr ? rows.first * layout.row_bytes : 0);
  };
  const bool is_first = layer == 0, is_last = layer == sizes_.num_layers - 1;
  const RowLayout tile_layout{rows.count * float_row, float_row};
  Source x{is_first ? nullptr : between(layer - 1), DType::kFloat32, tile_layout};
  if (is_first) {
    x.layout = layout(rows, first_step, call_.x.step_bytes, call_.x.row_bytes);
    x = {static_cast<const char*>(call_.x.data) + first(x.layout), call_.x.dtype, x.layout};
  }
  Sink output{is_last ? nullptr : between(layer), DType::kFloat32, tile_layout};
  if (is_last) {
    output.layout = layout(rows, first_step, call_.rows * output_row, output_row);
    output = {static_cast<char*>(call_.output) + first(output.layout), call_.h_dtype, output.layout};
  }
  output.data += direction * sizes_.h_size() * item_bytes(output.dtype);

  // with two directions every other member takes the same one
  const bool alternate = sizes_.num_directions == 2 && members > 1;
  const int index = alternate ? member / 2 : member;
  const int count = alternate ? static_cast<int>((members + 1 - direction) / 2) : members;
  return {cells_[cell],
          kernels_,
          buffers_.plan,
          rows,
          std::min(buffers_.plan.layer_steps, rows.steps_of(0) - first_step),
          first_step,
          direction == 1,
          x,
          output,
          buffers_.kept == nullptr ? tile.states[cell] : (*buffers_.kept)[cell].from_row(rows.first),
          workspace,
          workspace.deltas == nullptr ? nullptr : &workspace.deltas[cell],
          crews_.directions[direction],
          crews_.portions[direction],
          index,
          count};
}

void TileRun::run_layer(const Tile& tile, const Workspace& workspace, const TileRows& rows, int64_t layer,
                        int64_t first_step, int member, int members) const {
  for (int64_t direction = 0; direction < sizes_.num_directions; ++direction) {
    if (sizes_.num_directions == 2 && members > 1 && member % 2 != direction) continue;
    const CellRun run = make_run(tile, workspace, rows, layer, direction, first_step, member, members);
    const int64_t first_row = (layer * sizes_.num_directions + direction) * call_.rows;
    const int64_t first_h = first_row * sizes_.h_size(), first_c = first_row * sizes_.hidden_size;
    if (first_step == 0 && buffers_.kept == nullptr)
      run.load_states(FirstStates{call_.hx, call_.hx_dtype, call_.cx, call_.cx_dtype}.from(first_h, first_c));
    run.run();
    if (call_.h_n != nullptr)
      run.store_h(static_cast<char*>(call_.h_n) + first_h * item_bytes(call_.h_dtype), call_.h_dtype);
    if (buffers_.kept == nullptr)
      run.store_c(static_cast<char*>(call_.c_n) + first_c * item_bytes(call_.c_dtype), call_.c_dtype);
  }
}

void TileRun::run(const Tile& tile, const Workspace& workspace, const TileRows& rows, int member, int members) const {
  const int64_t steps = rows.steps_of(0);
  for (int64_t first_step = 0; first_step < steps; first_step += buffers_.plan.layer_steps) {
    for (int64_t layer = 0; layer < sizes_.num_layers; ++layer) {
      run_layer(tile, workspace, rows, layer, first_step, member, members);
      // the steps of one direction meet by themselves; the next layer reads both directions
      if (sizes_.num_directions == 2) crews_.all.meet(members);
    }
  }
}

void TileRun::by_rows(Parallel& parallel) const {
  const Plan& plan = buffers_.plan;
  const auto work = [&](int begin, int end) {
    const IeeeScope ieee;
    for (int slot = begin; slot < end; ++slot) {
      for (int64_t tile = slot; tile * plan.tile_rows < call_.rows; tile += plan.slots) {
        run(buffers_.tiles[slot], buffers_.workspaces[slot], rows_of(tile), 0, 1);
      }
    }
  };
  if (plan.slots == 1) return work(0, 1);
  parallel.run(plan.slots, work);
}

void TileRun::by_units(Parallel& parallel) const {
  Team team(buffers_.plan.slots, buffers_.plan.patience);
  parallel.run(buffers_.plan.slots, [&](int begin, int end) {
    const IeeeScope ieee;
    const int member = team.join(end - begin);
    if (member == Team::kTooLate) return;
    for (int64_t tile = 0; tile * buffers_.plan.tile_rows < call_.rows; ++tile) {
      run(buffers_.tiles[0], buffers_.workspaces[member], rows_of(tile), member, team.size());
    }
  });
}

void TileRun::by_layers(Parallel& parallel) const {
  const int64_t steps = buffers_.plan.layer_steps;
  Pipeline pipeline(sizes_.num_layers, (call_.steps + steps - 1) / steps, buffers_.plan.pieces_between);
  parallel.run(buffers_.plan.slots, [&](int begin, int) {
    const IeeeScope ieee;
    pipeline.run([&](int64_t layer, int64_t piece) {
      run_layer(buffers_.tiles[0], buffers_.workspaces[begin], rows_of(0), layer, piece * steps, 0, 1);
    });
  });
}

}  // namespace

Buffers::Buffers(const Sizes& sizes, const std::vector<BoundCell>& cells, const Kernels& kernels, const Plan& plan_,
                 const std::vector<CellState>* kept_)
    : plan(plan_),
      kept(kept_),
      tiles(plan.sharing == Sharing::kRows ? plan.slots : 1),
      workspaces(plan.slots),
      deltas_(plan.delta ? plan.slots : 0) {
  const size_t bytes = plan.layer_steps * plan.tile_rows * layer_bytes(sizes, DType::kFloat32);
  // layers that take turns read one and write the other
  const int64_t pieces = plan.sharing == Sharing::kLayers ? (sizes.num_layers - 1) * plan.pieces_between
                                                          : std::min<int64_t>(2, sizes.num_layers - 1);
  memory_ = allocate_for([&](Arena& arena) {
    for (Tile& tile : tiles) {
      tile.states.clear();
      if (kept == nullptr) {
        for (const BoundCell& bound : cells) tile.states.push_back(CellState::take(arena, bound, plan.tile_rows));
      }
      tile.between.clear();
      for (int64_t i = 0; i < pieces; ++i) tile.between.push_back(reinterpret_cast<float*>(arena.take<char>(bytes)));
    }
    for (Workspace& workspace : workspaces) workspace = Workspace::take(arena, sizes, kernels, plan);
    for (std::vector<CellDelta>& slot : deltas_) {
      slot.clear();
      for (const BoundCell& bound : cells) slot.emplace_back(arena, bound.cell);
    }
  });
  for (size_t slot = 0; slot < deltas_.size(); ++slot) workspaces[slot].deltas = deltas_[slot].data();
}

Stack::Stack(const Blob& blob, const CheckedKernels& checked) : sizes_(blob.sizes()), kernels_(checked.kernels) {
  for (int64_t i = 0; i < sizes_.cells(); ++i) {
    cells_.push_back(blob.cell(i));
    for (Function& function : cells_.back().cell.functions) {
      if (!checked.exact[static_cast<uint32_t>(function.evaluator)]) function.evaluator = Evaluator::kNone;
    }
  }
}

void Stack::check_dtypes(const Call& call) const {
  for (size_t i = 0; i < cells_.size(); ++i) {
    const BoundCell& bound = cells_[i];
    try {
      if (static_cast<int64_t>(i) < sizes_.num_directions) check_integers("x", bound.x, call.x.dtype, false);
      if (call.hx != nullptr) check_integers("hx", bound.hx, call.hx_dtype, false);
      if (call.cx != nullptr) check_integers("cx", bound.cx, call.cx_dtype, false);
      check_integers(bound.projects() ? "hy" : "ogate_cy", bound.h, call.h_dtype, true);
      check_integers("fgate_cx_igate_cgate", bound.cell.cell, call.c_dtype, true);
    } catch (const std::runtime_error& error) {
      throw std::runtime_error("cell " + std::to_string(i) + " of the stack: " + error.what());
    }
  }
}

void Stack::run(const Call& call, Parallel& parallel, const Buffers& buffers) const {
  const Plan& plan = buffers.plan;
  const bool by_portions = plan.sharing == Sharing::kUnits && plan.group_blocks < cells_.front().cell.blocks;
  const int directions = static_cast<int>(sizes_.num_directions);
  Crews crews(plan.pauses, by_portions ? (plan.slots + directions - 1) / directions : 0);
  const TileRun run(sizes_, kernels_, cells_, call, buffers, crews);
  switch (plan.sharing) {
    case Sharing::kRows:
      return run.by_rows(parallel);
    case Sharing::kUnits:
      return run.by_units(parallel);
    case Sharing::kLayers:
      return run.by_layers(parallel);
  }
}

void Stack::copy_states(const Call& call) const {
  const IeeeScope ieee;
  std::vector<float> values;
  const auto copy = [&](const void* from, DType from_dtype, const Grid& from_grid, void* to, DType to_dtype,
                        const Grid& to_grid, int64_t size, size_t cell) {
    const int64_t items = call.rows * size;
    values.assign(items, 0.0f);
    if (from != nullptr) {
      to_floats(from_grid, static_cast<const char*>(from) + cell * items * item_bytes(from_dtype), from_dtype, items,
                values.data());
    }
    from_floats(to_grid, values.data(), items, to_dtype, static_cast<char*>(to) + cell * items * item_bytes(to_dtype));
  };
  for (size_t i = 0; i < cells_.size(); ++i) {
    const BoundCell& bound = cells_[i];
    copy(call.hx, call.hx_dtype, bound.hx, call.h_n, call.h_dtype, bound.h, sizes_.h_size(), i);
    copy(call.cx, call.cx_dtype, bound.cx, call.c_n, call.c_dtype, bound.cell.cell, sizes_.hidden_size, i);
  }
}

}  // namespace lstm_quant
