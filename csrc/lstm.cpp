#include "lstm.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "cell_run.h"
#include "ieee_scope.h"
#include "plan.h"
#include "team.h"

namespace lstm_quant {
namespace {

struct AlignedDelete {
  void operator()(char* memory) const { ::operator delete(memory, std::align_val_t{kAlign}); }
};
using AlignedMemory = std::unique_ptr<char, AlignedDelete>;

AlignedMemory allocate(size_t bytes) {
  return AlignedMemory(static_cast<char*>(::operator new(bytes, std::align_val_t{kAlign})));
}

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

// A call on some of its rows, by some threads.
class Stack {
 public:
  Stack(const Blob& blob, const CheckedKernels& checked, const Call& call, const Plan& plan)
      : sizes_(blob.sizes()), kernels_(checked.kernels), call_(call), plan_(plan) {
    for (int64_t i = 0; i < sizes_.cells(); ++i) {
      cells_.push_back(blob.cell(i));
      for (Function& function : cells_.back().cell.functions) {
        if (!checked.exact[static_cast<uint32_t>(function.evaluator)]) function.evaluator = Evaluator::kNone;
      }
    }
    check_dtypes();
  }

  void run(Parallel& parallel) const;
  void copy_states() const;

 private:
  // What the threads that share a tile of rows share.
  struct Tile {
    std::vector<CellState> states;
    float* between[2] = {};  // a layer's output for the next
    Crew all;
    Crew directions[2];
  };

  void check_dtypes() const;
  size_t between_bytes() const;
  void take(Arena& arena, Tile& tile) const;
  void run_tile(Tile& tile, const Workspace& workspace, int64_t first_row, int member, int members) const;
  void run_layer(Tile& tile, const Workspace& workspace, int64_t first_row, int64_t layer, int64_t first_step,
                 int member, int members) const;
  CellRun make_run(Tile& tile, const Workspace& workspace, int64_t first_row, int64_t layer, int64_t direction,
                   int64_t first_step, int member, int members) const;
  int64_t layer_bytes(DType dtype) const { return sizes_.num_directions * sizes_.hidden_size * item_bytes(dtype); }

  const Sizes& sizes_;
  const Kernels& kernels_;
  const Call& call_;
  const Plan& plan_;
  std::vector<BoundCell> cells_;
};

void Stack::check_dtypes() const {
  const auto fail = [](size_t index, const std::runtime_error& error) {
    throw std::runtime_error("cell " + std::to_string(index) + " of the stack: " + error.what());
  };
  for (size_t i = 0; i < cells_.size(); ++i) {
    const BoundCell& bound = cells_[i];
    try {
      if (static_cast<int64_t>(i) < sizes_.num_directions) check_integers("x", bound.x, call_.x.dtype, false);
      if (call_.hx != nullptr) check_integers("hx", bound.cell.hx, call_.hx_dtype, false);
      if (call_.cx != nullptr) check_integers("cx", bound.cx, call_.cx_dtype, false);
      check_integers("ogate_cy", bound.cell.ogate_cy, call_.h_dtype, true);
      check_integers("fgate_cx_igate_cgate", bound.cell.cell, call_.c_dtype, true);
    } catch (const std::runtime_error& error) {
      fail(i, error);
    }
  }
}

size_t Stack::between_bytes() const {
  return plan_.layer_steps * plan_.tile_rows * layer_bytes(DType::kFloat32);
}

void Stack::take(Arena& arena, Tile& tile) const {
  tile.states.clear();
  for (const BoundCell& bound : cells_) tile.states.push_back(CellState::take(arena, bound.cell, plan_.tile_rows));
  // a layer reads one and writes the other
  for (int i = 0; i < std::min<int64_t>(2, sizes_.num_layers - 1); ++i) {
    tile.between[i] = reinterpret_cast<float*>(arena.take<char>(between_bytes()));
  }
}

CellRun Stack::make_run(Tile& tile, const Workspace& workspace, int64_t first_row, int64_t layer, int64_t direction,
                        int64_t first_step, int member, int members) const {
  const int64_t rows = std::min(plan_.tile_rows, call_.rows - first_row);
  const int64_t cell = layer * sizes_.num_directions + direction;
  const int64_t float_row = layer_bytes(DType::kFloat32), output_row = layer_bytes(call_.h_dtype);

  Sequence x{tile.between[(layer + 1) % 2], DType::kFloat32, rows * float_row, float_row};
  if (layer == 0) {
    x = call_.x;
    x.data = static_cast<const char*>(x.data) + first_step * x.step_bytes + first_row * x.row_bytes;
  }
  Sink output{tile.between[layer % 2], DType::kFloat32, rows * float_row, float_row};
  if (layer == sizes_.num_layers - 1) {
    output = {call_.output, call_.h_dtype, call_.rows * output_row, output_row};
    output.data = static_cast<char*>(output.data) + first_step * output.step_bytes + first_row * output_row;
  }
  output.data = static_cast<char*>(output.data) + direction * sizes_.hidden_size * item_bytes(output.dtype);

  // with two directions every other member takes the same one
  const bool alternate = sizes_.num_directions == 2 && members > 1;
  const int index = alternate ? member / 2 : member;
  const int count = alternate ? static_cast<int>((members + 1 - direction) / 2) : members;
  return {cells_[cell],
          kernels_,
          plan_,
          static_cast<size_t>(rows),
          std::min(plan_.layer_steps, call_.steps - first_step),
          first_step,
          direction == 1,
          x,
          output,
          tile.states[cell],
          workspace,
          tile.directions[direction],
          index,
          count};
}

void Stack::run_layer(Tile& tile, const Workspace& workspace, int64_t first_row, int64_t layer, int64_t first_step,
                      int member, int members) const {
  for (int64_t direction = 0; direction < sizes_.num_directions; ++direction) {
    if (sizes_.num_directions == 2 && members > 1 && member % 2 != direction) continue;
    const CellRun run = make_run(tile, workspace, first_row, layer, direction, first_step, member, members);
    const int64_t first_item =
        ((layer * sizes_.num_directions + direction) * call_.rows + first_row) * sizes_.hidden_size;
    const auto from = [&](const void* data, DType dtype) {
      return data == nullptr ? nullptr : static_cast<const char*>(data) + first_item * item_bytes(dtype);
    };
    const auto to = [&](void* data, DType dtype) { return static_cast<char*>(data) + first_item * item_bytes(dtype); };
    if (first_step == 0)
      run.load_states(from(call_.hx, call_.hx_dtype), call_.hx_dtype, from(call_.cx, call_.cx_dtype), call_.cx_dtype);
    run.run();
    if (first_step + run.steps == call_.steps) {
      run.store_states(to(call_.h_n, call_.h_dtype), call_.h_dtype, to(call_.c_n, call_.c_dtype), call_.c_dtype);
    }
  }
}

void Stack::run_tile(Tile& tile, const Workspace& workspace, int64_t first_row, int member, int members) const {
  for (int64_t first_step = 0; first_step < call_.steps; first_step += plan_.layer_steps) {
    for (int64_t layer = 0; layer < sizes_.num_layers; ++layer) {
      run_layer(tile, workspace, first_row, layer, first_step, member, members);
      // the steps of one direction meet by themselves; the next layer reads both directions
      if (sizes_.num_directions == 2) tile.all.meet(members);
    }
  }
}

void Stack::run(Parallel& parallel) const {
  const int tiles = plan_.by_rows ? plan_.slots : 1;
  std::vector<Tile> shared(tiles);
  std::vector<Workspace> workspaces(plan_.slots);
  const auto lay_out = [&](char* base) {
    Arena arena(base);
    for (Tile& tile : shared) take(arena, tile);
    for (Workspace& workspace : workspaces) workspace = Workspace::take(arena, sizes_, plan_);
    return arena.used();
  };
  const AlignedMemory memory = allocate(lay_out(nullptr));
  lay_out(memory.get());

  if (plan_.by_rows) {
    const auto work = [&](int begin, int end) {
      const IeeeScope ieee;
      for (int slot = begin; slot < end; ++slot) {
        for (int64_t row = slot * plan_.tile_rows; row < call_.rows; row += plan_.slots * plan_.tile_rows) {
          run_tile(shared[slot], workspaces[slot], row, 0, 1);
        }
      }
    };
    if (plan_.slots == 1) return work(0, 1);
    return parallel.run(plan_.slots, work);
  }
  Team team(plan_.slots, plan_.patience);
  parallel.run(plan_.slots, [&](int begin, int end) {
    const IeeeScope ieee;
    const int member = team.join(end - begin);
    if (member != Team::kTooLate) run_tile(shared[0], workspaces[member], 0, member, team.size());
  });
}

// What is left of a sequence without steps: the states that came in.
void Stack::copy_states() const {
  const IeeeScope ieee;
  const int64_t items = call_.rows * sizes_.hidden_size;
  std::vector<float> values(items);
  const auto copy = [&](const void* from, DType from_dtype, const Grid& from_grid, void* to, DType to_dtype,
                        const Grid& to_grid, size_t cell) {
    std::fill(values.begin(), values.end(), 0.0f);
    if (from != nullptr) {
      to_floats(from_grid, static_cast<const char*>(from) + cell * items * item_bytes(from_dtype), from_dtype, items,
                values.data());
    }
    from_floats(to_grid, values.data(), items, to_dtype, static_cast<char*>(to) + cell * items * item_bytes(to_dtype));
  };
  for (size_t i = 0; i < cells_.size(); ++i) {
    const Cell& cell = cells_[i].cell;
    copy(call_.hx, call_.hx_dtype, cell.hx, call_.h_n, call_.h_dtype, cell.ogate_cy, i);
    copy(call_.cx, call_.cx_dtype, cells_[i].cx, call_.c_n, call_.c_dtype, cell.cell, i);
  }
}

}  // namespace

void run_lstm(const Blob& blob, const CheckedKernels& kernels, Parallel& parallel, const Call& call, const Plan& plan) {
  const Stack stack(blob, kernels, call, plan);
  if (call.rows == 0) return;
  if (call.steps == 0) return stack.copy_states();
  stack.run(parallel);
}

void run_lstm(const Blob& blob, const CheckedKernels& kernels, Parallel& parallel, const Call& call) {
  run_lstm(blob, kernels, parallel, call, make_plan(blob.sizes(), call.steps, call.rows, parallel.threads()));
}

}  // namespace lstm_quant
