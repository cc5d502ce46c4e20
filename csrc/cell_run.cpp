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

CellState CellState::take(Arena& arena, const BoundCell& bound, int64_t rows) {
  CellState state;
  const Cell& cell = bound.cell;
  const auto stride = [](size_t columns, Sums sums) { return round_up(columns * operand_item_bytes(sums), kAlign); };
  const size_t units = static_cast<size_t>(cell.blocks) * kUnits;
  state.h_stride = stride(bound.projects() ? round_up(bound.h_size, kUnits) : units, cell.hidden.sums);
  for (char*& h : state.h) h = arena.take<char>(rows * state.h_stride);
  state.c_stride = units;
  state.c = arena.take<float>(rows * units);
  if (bound.projects()) {
    state.projected_stride = stride(units, cell.next_sums);
    state.projected = arena.take<char>(rows * state.projected_stride);
  }
  return state;
}

Workspace Workspace::take(Arena& arena, const Sizes& sizes, const Kernels& kernels, const Plan& plan) {
  Workspace workspace;
  const size_t depth = std::max({sizes.input_size, sizes.num_directions * sizes.h_size(), sizes.hidden_size});
  const size_t rows = plan.chunk_steps * plan.tile_rows;
  const size_t all_blocks = round_up(sizes.hidden_size, kUnits) / kUnits;
  const size_t blocks = std::min<size_t>(plan.group_blocks, all_blocks);
  workspace.operand = arena.take<char>(rows * max_operand_stride(depth));
  workspace.igates = arena.take<float>(rows * blocks * kBlock);
  if (plan.ahead) workspace.next_igates = arena.take<float>(rows * blocks * kBlock);
  workspace.output = arena.take<float>(plan.tile_rows * sizes.hidden_size);
  workspace.hy = arena.take<float>(plan.tile_rows * round_up(sizes.proj_size, kBlock));
  const size_t scratch_bytes = kernels.scratch_bytes(rows, round_up(depth, kDepthStep));
  workspace.scratch = workspace.input_scratch = arena.take<char>(scratch_bytes);
  // the forms of both operands are kept from one group to the next
  if (blocks < all_blocks) workspace.input_scratch = arena.take<char>(scratch_bytes);
  if (plan.delta) workspace.changes = ChangeList::take(arena, round_up(depth, kDepthStep));
  return workspace;
}

namespace {

// Zeros for what pads the last block of an operand row, of which these are some columns.
void pad_h(const BoundCell& bound, const Share::Columns& columns, char* operand) {
  if (columns.first + columns.count != static_cast<size_t>(bound.h_size)) return;
  const size_t item = operand_item_bytes(bound.cell.hidden.sums);
  std::memset(operand + columns.count * item, 0, (round_up(bound.h_size, kUnits) - bound.h_size) * item);
}

Share::Columns columns(int32_t first_block, int32_t last_block, size_t block, size_t size) {
  const size_t first = first_block * block, end = last_block * block;
  return {first, std::min(end, size) - std::min(first, size), end - first};
}

}  // namespace

Share::Columns Share::of_c(const BoundCell& bound) const {
  return columns(first_block, last_block, kUnits, bound.cell.hidden_size);
}

Share::Columns Share::of_h(const BoundCell& bound) const {
  return bound.projects() ? columns(first_hy_block, last_hy_block, kBlock, bound.h_size) : of_c(bound);
}

Share CellRun::share() const {
  const int32_t blocks = bound.cell.blocks, hy_blocks = bound.projects() ? bound.hy_blocks() : 0;
  if (!crew.broken_up()) {
    return {blocks * member / members, blocks * (member + 1) / members, members, hy_blocks * member / members,
            hy_blocks * (member + 1) / members};
  }
  return member == 0 ? Share::all(bound) : Share{0, 0, 0};
}

size_t CellRun::operand_stride() const {
  const Projection& input = bound.cell.input;
  return round_up(input.padded_depth * operand_item_bytes(input.sums), kAlign);
}

FirstStates FirstStates::from(size_t h_item, size_t c_item) const {
  const auto from = [&](const void* data, DType dtype, size_t item) {
    return data == nullptr ? nullptr : static_cast<const char*>(data) + item * item_bytes(dtype);
  };
  return {from(hx, hx_dtype, h_item), hx_dtype, from(cx, cx_dtype, c_item), cx_dtype};
}

void CellState::load(const Kernels& kernels, const BoundCell& bound, const Share& share, size_t rows,
                     const FirstStates& first) const {
  const Cell& cell = bound.cell;
  const Share::Columns of_h = share.of_h(bound), of_c = share.of_c(bound);
  const size_t item = operand_item_bytes(cell.hidden.sums);
  for (size_t row = 0; row < rows; ++row) {
    char* row_h = h[0] + row * h_stride + of_h.first * item;
    float* row_c = c + row * c_stride + of_c.first;
    // what pads the last block must be initialized too
    pad_h(bound, of_h, row_h);
    std::memset(row_c, 0, of_c.padded * sizeof(float));
    const FirstStates of_row = first.from(row * bound.h_size + of_h.first, row * cell.hidden_size + of_c.first);
    if (first.hx != nullptr) {
      to_operand(kernels, cell.hidden.sums, bound.hx, of_row.hx, first.hx_dtype, of_h.count, row_h);
    } else {
      zeros_to_operand(cell.hidden.sums, bound.hx, of_h.count, row_h);
    }
    if (first.cx != nullptr) to_floats(bound.cx, of_row.cx, first.cx_dtype, of_c.count, row_c);
    if (!cell.cx.present()) put_on_grid(bound.cx, of_c.count, row_c);
  }
}

void CellRun::load_states(const FirstStates& first) const {
  const Share mine = share();
  if (mine.members == 0) return;
  for (int64_t row = 0; row < rows.count; ++row) {
    CellState one = state.from_row(row);
    // a shorter row comes in later on the way back, where it is read from what that step reads
    const bool odd = backward && (steps - rows.steps_of(row)) % 2 != 0;
    if (odd) std::swap(one.h[0], one.h[1]);
    const size_t index = rows.index(row);
    one.load(kernels, bound, mine, 1, first.from(index * bound.h_size, index * bound.cell.hidden_size));
  }
  crew.meet(mine.members);
}

CellRun::Steps CellRun::next_chunk(int64_t start) const {
  if (rows.lengths == nullptr) {
    const int64_t count = std::min(plan.chunk_steps, steps - start);
    return {count, count * rows.count};
  }
  // as many steps as there is room for, counted as if each member had all units
  const int64_t blocks = bound.cell.blocks;
  const int64_t room = plan.chunk_steps * plan.tile_rows * std::min<int64_t>(plan.group_blocks, blocks) / blocks;
  Steps chunk{1, rows_at(start)};
  for (; start + chunk.count < steps; ++chunk.count) {
    const int64_t next = rows_at(start + chunk.count);
    if (chunk.rows + next > room) break;
    chunk.rows += next;
  }
  return chunk;
}

void CellRun::load_operands(int64_t step, int64_t count) const {
  const Projection& input = bound.cell.input;
  const size_t item = operand_item_bytes(input.sums);
  char* operand = workspace.operand;
  for (int64_t s = step; s < step + count; ++s) {
    const int64_t count_rows = rows_at(s);
    for (int64_t row = 0; row < count_rows; ++row, operand += operand_stride()) {
      to_operand(kernels, input.sums, bound.x, x.row(position(s), row), x.dtype, input.depth, operand);
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
  return {
      &bound.cell.input, static_cast<size_t>(count), workspace.operand, operand_stride(), igates, stride, first_block,
      last_block,        workspace.input_scratch};
}

KeptSums* CellRun::kept_input() const {
  return delta != nullptr && bound.cell.input.sums == Sums::kInt8 ? &delta->input : nullptr;
}

KeptSums* CellRun::kept_hidden() const {
  return delta != nullptr && bound.cell.hidden.sums == Sums::kInt8 ? &delta->hidden : nullptr;
}

bool CellRun::input_changes_little(int64_t count) const {
  KeptSums* kept = kept_input();
  if (kept == nullptr) return false;
  const auto* operands = reinterpret_cast<const uint8_t*>(workspace.operand);
  return count == 1 ? kept->watch(operands) : kept->watch_all(operands, operand_stride(), count);
}

void CellRun::run() const {
  float *igates = workspace.igates, *next_igates = workspace.next_igates;
  Share projected{};  // that for which the chunk's igates are there
  for (int64_t start = 0; start < steps;) {
    const Share mine = share();
    if (mine.members == 0) return;
    if (delta != nullptr) delta->set_blocks(mine.first_block, mine.last_block);
    const Steps chunk = next_chunk(start);
    // a step with many rows goes by groups of blocks; chunks of several steps have room for all blocks at once
    const bool grouped = plan.group_blocks < bound.cell.blocks && chunk.count == 1;
    bool by_changes = false;
    if (!(projected == mine)) {
      load_operands(start, chunk.count);
      by_changes = input_changes_little(chunk.count);
      if (!by_changes && !grouped) kernels.project(projection(chunk.rows, mine.first_block, mine.last_block, igates));
    }
    // a shorter chunk takes less time by itself than beside the steps, and so do chunks and steps in which little
    // changes
    const bool quiet = by_changes || (kept_hidden() != nullptr && kept_hidden()->quiet());
    bool next = projects_ahead() && !quiet && start + 2 * plan.chunk_steps <= steps;
    if (next) {
      load_operands(start + chunk.count, plan.chunk_steps);
      next = !input_changes_little(plan.chunk_steps);
    }
    const ProjectArgs ahead = projection(plan.chunk_steps, mine.first_block, mine.last_block, next_igates);
    int64_t rows_before = 0;
    for (int64_t s = start; s < start + chunk.count; ++s) {
      step(s, rows_before, {mine, grouped, igates, next ? &ahead : nullptr, by_changes});
      rows_before += rows_at(s);
      crew.meet(mine.members);
    }
    if (next) std::swap(igates, next_igates);
    projected = next ? mine : Share{};
    start += chunk.count;
  }
}

const float* CellRun::project_changes(int64_t row, const Share& mine) const {
  const auto* operand = reinterpret_cast<const uint8_t*>(workspace.operand) + row * operand_stride();
  const bool kept = delta->input.kept();
  const Delta changed = delta->input.change(kernels, operand, workspace.changes);
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

void CellRun::step(int64_t step, int64_t rows_before, const Chunk& chunk) const {
  const Share& mine = chunk.share;
  const Cell& cell = bound.cell;
  const bool odd = ((first_step + step) & 1) != 0;
  StepArgs args{};
  args.cell = &cell;
  args.rows = static_cast<size_t>(rows_at(step));
  args.h = state.h[odd];
  args.h_next = state.h[!odd];
  args.h_stride = state.h_stride;
  args.h_next_stride = state.h_stride;
  if (bound.projects()) {
    args.h_next = state.projected;
    args.h_next_stride = state.projected_stride;
  }
  args.c = state.c;
  args.c_stride = state.c_stride;
  args.output = workspace.output;
  args.output_stride = cell.hidden_size;
  if (writes_in_place()) {
    args.output = reinterpret_cast<float*>(output.row(position(step), 0));
    args.output_stride = output.layout.apart * output.layout.row_bytes / sizeof(float);
  }
  args.descending = plan.zigzag && odd;
  args.ahead = chunk.ahead;
  args.ahead_part = static_cast<int32_t>(rows_before);  // of single rows
  args.scratch = workspace.scratch;
  // before the changes of h, which are listed in the same place
  const float* changed_igates = chunk.by_changes ? project_changes(rows_before, mine) : nullptr;
  const std::optional<Delta> changed = hidden_changes(state.h[odd], chunk);
  if (changed.has_value()) args.delta = &*changed;
  if (chunk.grouped) {
    step_by_groups(args, step, chunk);
  } else {
    args.igates_stride = static_cast<size_t>(mine.blocks()) * kBlock;
    args.igates = chunk.by_changes ? changed_igates : chunk.igates + rows_before * args.igates_stride;
    step_blocks(args, step, mine.first_block, mine.last_block);
  }
  if (!bound.projects()) return;
  crew.meet(mine.members);  // it reads what all of them left
  project_h(step, mine);
}

void CellRun::step_by_groups(StepArgs args, int64_t step, const Chunk& chunk) const {
  const Cell& cell = bound.cell;
  Portions::Blocks mine{chunk.share.first_block, chunk.share.last_block};
  const bool shared = chunk.share.members > 1;
  if (shared) portions.begin(member, mine);
  for (bool is_first = true;; is_first = false) {
    const Portions::Blocks blocks = shared ? portions.take(member, plan.group_blocks, args.descending)
                                           : Portions::cut(mine, plan.group_blocks, args.descending);
    if (blocks.empty()) return;
    ProjectArgs input = projection(static_cast<int64_t>(args.rows), blocks.begin, blocks.end, chunk.igates);
    input.then = cell.hidden.block_weights(args.descending ? blocks.end - 1 : blocks.begin);
    input.same_operand = args.same_h = !is_first;
    kernels.project(input);
    args.igates = chunk.igates;
    args.igates_stride = input.igates_stride;
    // what this thread takes next, unless others are there first
    const int32_t next = args.descending ? blocks.begin - plan.group_blocks : blocks.end;
    const bool is_last = args.descending ? blocks.begin == 0 : next == cell.blocks;
    args.then = is_last ? nullptr : cell.input.block_weights(std::max(next, 0));
    step_blocks(args, step, blocks.begin, blocks.end);
  }
}

void CellRun::step_blocks(StepArgs& args, int64_t step, int32_t first_block, int32_t last_block) const {
  args.first_block = first_block;
  args.last_block = last_block;
  kernels.step(args);
  if (!bound.projects() && !writes_in_place()) store_output(step, first_block, last_block);
}

void CellRun::store_output(int64_t step, int32_t first_block, int32_t last_block) const {
  const size_t hidden_size = bound.cell.hidden_size;
  const Share::Columns units = columns(first_block, last_block, kUnits, hidden_size);
  const int64_t count = rows_at(step);
  for (int64_t row = 0; row < count; ++row) {
    from_floats(bound.h, workspace.output + row * hidden_size + units.first, units.count, output.dtype,
                output.row(position(step), row) + units.first * item_bytes(output.dtype));
  }
}

void CellRun::project_h(int64_t step, const Share& mine) const {
  const Share::Columns columns = mine.of_h(bound);
  if (columns.count == 0) return;
  const Cell& cell = bound.cell;
  const auto count = static_cast<size_t>(rows_at(step));
  kernels.project({&bound.hy, count, state.projected, state.projected_stride, workspace.hy, columns.padded,
                   mine.first_hy_block, mine.last_hy_block, workspace.scratch});
  const bool odd = ((first_step + step) & 1) != 0;
  char* h_next = state.h[!odd] + columns.first * operand_item_bytes(cell.hidden.sums);
  for (size_t row = 0; row < count; ++row) {
    const float* hy = workspace.hy + row * columns.padded;
    from_floats(bound.h, hy, columns.count, output.dtype,
                output.row(position(step), row) + columns.first * item_bytes(output.dtype));
    char* operand = h_next + row * state.h_stride;
    to_operand(kernels, cell.hidden.sums, bound.hx, hy, DType::kFloat32, columns.count, operand);
    pad_h(bound, columns, operand);
  }
}

CellRun::Range CellRun::ended() const {
  if (backward) return {0, rows.count};
  return {rows.at(first_step + steps), rows.at(first_step)};
}

void CellRun::store_h(void* h_n, DType dtype) const {
  const Share::Columns columns = share().of_h(bound);
  if (columns.count == 0) return;
  const Range range = ended();
  for (int64_t row = range.begin; row < range.end; ++row) {
    const char* h = output.row(position(last_step(row)), row) + columns.first * item_bytes(output.dtype);
    char* to = static_cast<char*>(h_n) + (rows.index(row) * bound.h_size + columns.first) * item_bytes(dtype);
    if (output.dtype == dtype) {
      std::memcpy(to, h, columns.count * item_bytes(dtype));
    } else {
      from_floats(bound.h, reinterpret_cast<const float*>(h), columns.count, dtype, to);
    }
  }
}

void CellRun::store_c(void* c_n, DType dtype) const {
  const Share::Columns columns = share().of_c(bound);
  const Cell& cell = bound.cell;
  if (columns.count == 0) return;
  const Range range = ended();
  for (int64_t row = range.begin; row < range.end; ++row) {
    from_floats(cell.cell, state.c + row * state.c_stride + columns.first, columns.count, dtype,
                static_cast<char*>(c_n) + (rows.index(row) * cell.hidden_size + columns.first) * item_bytes(dtype));
  }
}

}  // namespace lstm_quant
