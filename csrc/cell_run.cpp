#include "cell_run.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace lstm_quant {
namespace {

// Room for a row of any kind of operand.
size_t max_operand_stride(size_t depth) {
  return round_up(round_up(depth, kUnits) * sizeof(float), kAlign);
}

}  // namespace

CellState CellState::take(Arena& arena, const Cell& cell, int64_t rows) {
  CellState state;
  const size_t units = static_cast<size_t>(cell.blocks) * kUnits;
  state.h_stride = round_up(units * operand_item_bytes(cell.hidden.sums), kAlign);
  for (char*& h : state.h) h = arena.take<char>(rows * state.h_stride);
  state.c_stride = units;
  state.c = arena.take<float>(rows * units);
  return state;
}

Workspace Workspace::take(Arena& arena, const Sizes& sizes, const Plan& plan) {
  Workspace workspace;
  const size_t depth = std::max(sizes.input_size, sizes.num_directions * sizes.hidden_size);
  const size_t rows = plan.chunk_steps * plan.tile_rows;
  const size_t blocks = std::min<size_t>(plan.group_blocks, round_up(sizes.hidden_size, kUnits) / kUnits);
  workspace.operand = arena.take<char>(rows * max_operand_stride(depth));
  workspace.igates = arena.take<float>(rows * blocks * kBlock);
  if (plan.ahead) workspace.next_igates = arena.take<float>(rows * blocks * kBlock);
  workspace.output = arena.take<float>(plan.tile_rows * sizes.hidden_size);
  workspace.scratch = arena.take<char>(scratch_bytes(rows, round_up(depth, kUnits)));
  if (plan.delta) workspace.changes = ChangeList::take(arena, round_up(depth, kDepthStep));
  return workspace;
}

size_t Share::units(const Cell& cell) const {
  const size_t end = std::min<size_t>(static_cast<size_t>(last_block) * kUnits, cell.hidden_size);
  return end - std::min(end, first_unit());
}

Share CellRun::share() const {
  const int32_t blocks = bound.cell.blocks;
  if (!crew.broken_up()) return {blocks * member / members, blocks * (member + 1) / members, members};
  return member == 0 ? Share::all(bound.cell) : Share{0, 0, 0};
}

size_t CellRun::operand_stride() const {
  const Projection& input = bound.cell.input;
  return round_up(input.padded_depth * operand_item_bytes(input.sums), kAlign);
}

char* CellRun::output_row(int64_t step, size_t row) const {
  return static_cast<char*>(output.data) + position(step) * output.step_bytes + row * output.row_bytes;
}

void CellState::load(const Kernels& kernels, const BoundCell& bound, const Share& share, size_t rows,
                     const FirstStates& first) const {
  const Cell& cell = bound.cell;
  const size_t units = share.units(cell), padded = static_cast<size_t>(share.blocks()) * kUnits;
  const size_t item = operand_item_bytes(cell.hidden.sums);
  const auto values = [&](const void* data, DType dtype, size_t row) {
    return static_cast<const char*>(data) + (row * cell.hidden_size + share.first_unit()) * item_bytes(dtype);
  };
  for (size_t row = 0; row < rows && units > 0; ++row) {
    char* row_h = h[0] + row * h_stride + share.first_unit() * item;
    float* row_c = c + row * c_stride + share.first_unit();
    // what pads the last block must be initialized too
    std::memset(row_h, 0, padded * item);
    std::memset(row_c, 0, padded * sizeof(float));
    if (first.hx != nullptr) {
      const void* hx = values(first.hx, first.hx_dtype, row);
      to_operand(kernels, cell.hidden.sums, cell.hx, hx, first.hx_dtype, units, row_h);
    } else {  // zeros of c make those of h
      to_operand(kernels, cell.hidden.sums, cell.hx, row_c, DType::kFloat32, units, row_h);
    }
    if (first.cx != nullptr) to_floats(bound.cx, values(first.cx, first.cx_dtype, row), first.cx_dtype, units, row_c);
    if (!cell.cx.present()) put_on_grid(bound.cx, units, row_c);
  }
}

void CellRun::load_states(const FirstStates& first) const {
  const Share mine = share();
  if (mine.members == 0) return;
  state.load(kernels, bound, mine, rows, first);
  crew.meet(mine.members);
}

void CellRun::load_operands(int64_t step, int64_t count) const {
  const Projection& input = bound.cell.input;
  const size_t item = operand_item_bytes(input.sums);
  char* operand = workspace.operand;
  for (int64_t s = step; s < step + count; ++s) {
    for (size_t row = 0; row < rows; ++row, operand += operand_stride()) {
      const char* values = static_cast<const char*>(x.data) + position(s) * x.step_bytes + row * x.row_bytes;
      to_operand(kernels, input.sums, bound.x, values, x.dtype, input.depth, operand);
      // what only pads is not to differ from row to row
      std::memset(operand + input.depth * item, 0, (input.padded_depth - input.depth) * item);
    }
  }
}

bool CellRun::projects_ahead() const {
  const Projection &input = bound.cell.input, &hidden = bound.cell.hidden;
  if (!plan.ahead || plan.group_blocks < bound.cell.blocks || !kernels.projects_ahead) return false;
  if (input.sums != Sums::kInt8 || hidden.sums != Sums::kInt8) return false;
  // a shallow input is projected fast anyway, a deep one takes longer than reading the hidden weights
  return 2 * input.depth >= hidden.depth && input.depth <= hidden.depth;
}

ProjectArgs CellRun::projection(int64_t count, int32_t first_block, int32_t last_block, float* igates) const {
  const size_t stride = static_cast<size_t>(last_block - first_block) * kBlock;
  return {&bound.cell.input, count * rows, workspace.operand, operand_stride(), igates, stride,
          first_block,       last_block,   workspace.scratch};
}

KeptSums* CellRun::kept_input(const Share& mine) const {
  const bool can = delta != nullptr && bound.cell.input.sums == Sums::kInt8 && mine.blocks() <= plan.group_blocks;
  return can ? &delta->input : nullptr;
}

KeptSums* CellRun::kept_hidden() const {
  return delta != nullptr && bound.cell.hidden.sums == Sums::kInt8 ? &delta->hidden : nullptr;
}

bool CellRun::input_changes_little(int64_t count, const Share& mine) const {
  KeptSums* kept = kept_input(mine);
  if (kept == nullptr) return false;
  const auto* rows = reinterpret_cast<const uint8_t*>(workspace.operand);
  return count == 1 ? kept->watch(rows) : kept->watch_all(rows, operand_stride(), count);
}

void CellRun::run() const {
  float *igates = workspace.igates, *next_igates = workspace.next_igates;
  Share projected{};  // that for which the chunk's igates are there
  for (int64_t start = 0; start < steps; start += plan.chunk_steps) {
    const Share mine = share();
    if (mine.members == 0) return;
    if (delta != nullptr) delta->set_blocks(mine.first_block, mine.last_block);
    const int64_t count = std::min(plan.chunk_steps, steps - start);
    bool by_changes = false;
    if (!(projected == mine)) {
      load_operands(start, count);
      by_changes = input_changes_little(count, mine);
      if (!by_changes && mine.blocks() <= plan.group_blocks)
        kernels.project(projection(count, mine.first_block, mine.last_block, igates));
    }
    // a shorter chunk takes less time by itself than beside the steps, and so do chunks and steps in which little
    // changes
    const bool quiet = by_changes || (kept_hidden() != nullptr && kept_hidden()->quiet());
    bool next = projects_ahead() && !quiet && start + 2 * plan.chunk_steps <= steps;
    if (next) {
      load_operands(start + count, plan.chunk_steps);
      next = !input_changes_little(plan.chunk_steps, mine);
    }
    const ProjectArgs ahead = projection(plan.chunk_steps, mine.first_block, mine.last_block, next_igates);
    for (int64_t s = 0; s < count; ++s) {
      step(start + s, s, {mine, igates, next ? &ahead : nullptr, by_changes});
      crew.meet(mine.members);
    }
    if (next) std::swap(igates, next_igates);
    projected = next ? mine : Share{};
  }
}

const float* CellRun::project_changes(int64_t in_chunk, const Share& mine) const {
  const auto* row = reinterpret_cast<const uint8_t*>(workspace.operand) + in_chunk * operand_stride();
  const bool kept = delta->input.kept();
  const Delta changed = delta->input.change(kernels, row, workspace.changes);
  if (!kept || changed.count > 0) {
    ProjectArgs args = projection(1, mine.first_block, mine.last_block, delta->igates);
    args.delta = &changed;
    kernels.project(args);
  }
  return delta->igates;
}

std::optional<Delta> CellRun::hidden_changes(const char* h, const Chunk& chunk) const {
  KeptSums* kept = kept_hidden();
  if (kept == nullptr) return std::nullopt;
  const auto* row = reinterpret_cast<const uint8_t*>(h);
  if (!kept->watch(row) || chunk.ahead != nullptr) return std::nullopt;
  return kept->change(kernels, row, workspace.changes);
}

void CellRun::step(int64_t step, int64_t in_chunk, const Chunk& chunk) const {
  const Share& mine = chunk.share;
  const Cell& cell = bound.cell;
  const bool odd = ((first_step + step) & 1) != 0;
  const bool to_integers = output.dtype != DType::kFloat32;
  StepArgs args{};
  args.cell = &cell;
  args.rows = rows;
  args.h = state.h[odd];
  args.h_next = state.h[!odd];
  args.h_stride = state.h_stride;
  args.c = state.c;
  args.c_stride = state.c_stride;
  args.output = to_integers ? workspace.output : reinterpret_cast<float*>(output_row(step, 0));
  args.output_stride = to_integers ? cell.hidden_size : output.row_bytes / sizeof(float);
  args.descending = plan.zigzag && odd;
  args.ahead = chunk.ahead;
  args.ahead_part = static_cast<int32_t>(in_chunk);
  args.scratch = workspace.scratch;
  // before the changes of h, which are listed in the same place
  const float* changed_igates = chunk.by_changes ? project_changes(in_chunk, mine) : nullptr;
  const std::optional<Delta> changed = hidden_changes(state.h[odd], chunk);
  if (changed.has_value()) args.delta = &*changed;
  // a single group was projected ahead of the chunk, several are as they come
  const int32_t group = std::min(plan.group_blocks, mine.blocks());
  for (int32_t begin = 0; begin < mine.blocks(); begin += group) {
    const int32_t length = std::min(group, mine.blocks() - begin);
    args.first_block = args.descending ? mine.last_block - begin - length : mine.first_block + begin;
    args.last_block = args.first_block + length;
    if (group < mine.blocks()) kernels.project(projection(1, args.first_block, args.last_block, chunk.igates));
    args.igates_stride = static_cast<size_t>(length) * kBlock;
    args.igates = chunk.by_changes ? changed_igates : chunk.igates + in_chunk * rows * args.igates_stride;
    kernels.step(args);
  }
  if (to_integers) store_integers(step, mine);
}

void CellRun::store_integers(int64_t step, const Share& mine) const {
  const Cell& cell = bound.cell;
  for (size_t row = 0; row < rows; ++row) {
    from_floats(cell.ogate_cy, workspace.output + row * cell.hidden_size + mine.first_unit(), mine.units(cell),
                output.dtype, output_row(step, row) + mine.first_unit() * item_bytes(output.dtype));
  }
}

void CellRun::store_h(void* h_n, DType dtype) const {
  const Share mine = share();
  const Cell& cell = bound.cell;
  const size_t units = mine.units(cell), first = mine.first_unit();
  for (size_t row = 0; row < rows && units > 0; ++row) {
    const char* h = output_row(steps - 1, row) + first * item_bytes(output.dtype);
    char* to = static_cast<char*>(h_n) + (row * cell.hidden_size + first) * item_bytes(dtype);
    if (output.dtype == dtype) {
      std::memcpy(to, h, units * item_bytes(dtype));
    } else {
      from_floats(cell.ogate_cy, reinterpret_cast<const float*>(h), units, dtype, to);
    }
  }
}

void CellRun::store_c(void* c_n, DType dtype) const {
  const Share mine = share();
  const Cell& cell = bound.cell;
  const size_t units = mine.units(cell), first = mine.first_unit();
  for (size_t row = 0; row < rows && units > 0; ++row) {
    from_floats(cell.cell, state.c + row * state.c_stride + first, units, dtype,
                static_cast<char*>(c_n) + (row * cell.hidden_size + first) * item_bytes(dtype));
  }
}

}  // namespace lstm_quant
