// One thread's part of the steps of one cell, which it shares with the other members of a crew: all the rows of a tile,
// some blocks of units.
#pragma once

#include <cstdint>
#include <optional>

#include "blob.h"
#include "delta.h"
#include "lstm.h"
#include "memory.h"
#include "plan.h"
#include "portions.h"
#include "team.h"

namespace lstm_quant {

// The blocks of units that a member of a crew works on, those of what projects the hidden state, and how many it meets
// after a step. No members: the crew has broken up and goes on without this one.
struct Share {
  int32_t first_block;
  int32_t last_block;
  int members;
  int32_t first_hy_block = 0;
  int32_t last_hy_block = 0;

  static Share all(const BoundCell& bound) { return {0, bound.cell.blocks, 1, 0, bound.hy_blocks()}; }
  int32_t blocks() const { return last_block - first_block; }
  // Some columns of a state: `padded` with those that only pad the last block.
  struct Columns {
    size_t first, count, padded;
  };
  Columns of_c(const BoundCell& bound) const;
  Columns of_h(const BoundCell& bound) const;
  bool operator==(const Share& other) const {
    return first_block == other.first_block && last_block == other.last_block;
  }
};

// States that come in, rows contiguous; null: zeros.
struct FirstStates {
  const void* hx;
  DType hx_dtype;
  const void* cx;
  DType cx_dtype;

  // Those of the items from these on.
  FirstStates from(size_t h_item, size_t c_item) const;
};

// The state of a cell, shared by the threads that work on it. Step s reads h[s % 2] and writes the other.
struct CellState {
  char* h[2];
  size_t h_stride;  // bytes
  float* c;
  size_t c_stride;            // floats
  char* projected = nullptr;  // what a step leaves for the projection of the hidden state; null: none
  size_t projected_stride = 0;

  static CellState take(Arena& arena, const BoundCell& bound, int64_t rows);
  // Of the share's units.
  void load(const Kernels& kernels, const BoundCell& bound, const Share& share, size_t rows,
            const FirstStates& first) const;
  // That of the rows from `row` on.
  CellState from_row(size_t row) const {
    CellState state = *this;
    for (char*& one : state.h) one += row * h_stride;
    state.c += row * c_stride;
    if (projected != nullptr) state.projected += row * projected_stride;
    return state;
  }
};

// A thread's own buffers, large enough for every cell.
struct Workspace {
  char* operand = nullptr;
  float* igates = nullptr;
  float* next_igates = nullptr;  // of the chunk that is projected ahead
  float* output = nullptr;       // float32 rows of a step where kernels cannot write to the caller's
  float* hy = nullptr;           // float32 rows of a step, projected
  void* scratch = nullptr;
  void* input_scratch = nullptr;  // of the input's projection: one of its own where steps go by groups of blocks
  ChangeList changes;
  CellDelta* deltas = nullptr;  // of all cells; null: no delta steps

  static Workspace take(Arena& arena, const Sizes& sizes, const Kernels& kernels, const Plan& plan);
};

// Rows of the steps that a CellRun goes through.
struct Source {
  const char* data;
  DType dtype;
  RowLayout layout;

  const char* row(int64_t position, int64_t row) const { return data + layout.offset(position, row); }
};

struct Sink {
  char* data;
  DType dtype;
  RowLayout layout;

  char* row(int64_t position, int64_t row) const { return data + layout.offset(position, row); }
};

struct CellRun {
  const BoundCell& bound;
  const Kernels& kernels;
  const Plan& plan;
  TileRows rows;
  int64_t steps;       // each of them has a row at least
  int64_t first_step;  // counted in the direction of the cell
  bool backward;       // takes the steps from the last to the first, and so all of them
  Source x;
  Sink output;
  CellState state;
  Workspace workspace;
  CellDelta* delta;  // null: no delta steps
  Crew& crew;
  Portions& portions;
  int member;
  int members;

  // States of the cell: of all the caller's rows, of which these take theirs.
  void load_states(const FirstStates& first) const;
  void run() const;
  // After run(), the last h and c of the rows that ended in it.
  void store_h(void* h_n, DType dtype) const;
  void store_c(void* c_n, DType dtype) const;

 private:
  // A chunk of steps as a member goes through it.
  struct Chunk {
    Share share;
    bool grouped;  // input projection and step follow each other for some blocks at a time
    float* igates;
    const ProjectArgs* ahead;  // projects the next one, a part at each step; null: no part of it
    bool by_changes;           // the igates are made at each step, from what changed in x
  };
  struct Steps {
    int64_t count;
    int64_t rows;  // of all of them
  };
  struct Range {
    int64_t begin, end;
  };

  // Asked for at the start of a chunk of steps and kept for all of it.
  Share share() const;
  size_t operand_stride() const;
  int64_t position(int64_t step) const { return backward ? steps - 1 - step : step; }
  int64_t rows_at(int64_t step) const { return rows.at(first_step + position(step)); }
  // Rows that have their last step here, and which one that is.
  Range ended() const;
  int64_t last_step(int64_t row) const { return backward ? steps - 1 : rows.steps_of(row) - first_step - 1; }
  // The next chunk of steps, the same for all members.
  Steps next_chunk(int64_t start) const;
  void load_operands(int64_t step, int64_t count) const;
  // Whether the next chunk can be projected beside the steps of this one.
  bool projects_ahead() const;
  // Null where delta steps cannot be.
  KeptSums* kept_input() const;
  KeptSums* kept_hidden() const;
  // Whether the rows that load_operands left are to be projected step by step, by what changed from one to the next.
  bool input_changes_little(int64_t count) const;
  // Of the first `count` rows that load_operands left.
  ProjectArgs projection(int64_t count, int32_t first_block, int32_t last_block, float* igates) const;
  // The igates of a step whose x, that row of the chunk, changed little.
  const float* project_changes(int64_t row, const Share& share) const;
  // What changed in h, where the step is to go on by that.
  std::optional<Delta> hidden_changes(const char* h, const Chunk& chunk) const;
  // A step whose rows come after the first `rows_before` of the chunk.
  void step(int64_t step, int64_t rows_before, const Chunk& chunk) const;
  // All its blocks, some at a time: those that this member comes to.
  void step_by_groups(StepArgs args, int64_t step, const Chunk& chunk) const;
  void step_blocks(StepArgs& args, int64_t step, int32_t first_block, int32_t last_block) const;
  // Whether kernels write the output.
  bool writes_in_place() const {
    return output.dtype == DType::kFloat32 && output.layout.order == nullptr && !bound.projects();
  }
  void store_output(int64_t step, int32_t first_block, int32_t last_block) const;
  // From what a step left: the output and what the next step reads.
  void project_h(int64_t step, const Share& share) const;
};

}  // namespace lstm_quant
