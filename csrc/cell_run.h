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
#include "team.h"

namespace lstm_quant {

// The blocks of units that a member of a crew works on, and how many it meets after a step. No members: the crew has
// broken up and goes on without this one.
struct Share {
  int32_t first_block;
  int32_t last_block;
  int members;

  static Share all(const Cell& cell) { return {0, cell.blocks, 1}; }
  int32_t blocks() const { return last_block - first_block; }
  size_t first_unit() const { return static_cast<size_t>(first_block) * kUnits; }
  // Without those that only pad the last block.
  size_t units(const Cell& cell) const;
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
};

// The state of a cell, shared by the threads that work on it. Step s reads h[s % 2] and writes the other.
struct CellState {
  char* h[2];
  size_t h_stride;  // bytes
  float* c;
  size_t c_stride;  // floats

  static CellState take(Arena& arena, const Cell& cell, int64_t rows);
  // Of the share's units.
  void load(const Kernels& kernels, const BoundCell& bound, const Share& share, size_t rows,
            const FirstStates& first) const;
  // That of the rows from `row` on.
  CellState from_row(size_t row) const {
    return {{h[0] + row * h_stride, h[1] + row * h_stride}, h_stride, c + row * c_stride, c_stride};
  }
};

// A thread's own buffers, large enough for every cell.
struct Workspace {
  char* operand = nullptr;
  float* igates = nullptr;
  float* next_igates = nullptr;  // of the chunk that is projected ahead
  float* output = nullptr;       // float32 rows where the caller wants integers
  void* scratch = nullptr;
  ChangeList changes;
  CellDelta* deltas = nullptr;  // of all cells; null: no delta steps

  static Workspace take(Arena& arena, const Sizes& sizes, const Plan& plan);
};

struct Sink {
  void* data;
  DType dtype;
  int64_t step_bytes;
  int64_t row_bytes;
};

struct CellRun {
  const BoundCell& bound;
  const Kernels& kernels;
  const Plan& plan;
  size_t rows;
  int64_t steps;
  int64_t first_step;  // counted in the direction of the cell
  bool backward;       // takes the steps from the last to the first
  Sequence x;
  Sink output;
  CellState state;
  Workspace workspace;
  CellDelta* delta;  // null: no delta steps
  Crew& crew;
  int member;
  int members;

  void load_states(const FirstStates& first) const;
  void run() const;
  // The last h and c, after the last run().
  void store_h(void* h_n, DType dtype) const;
  void store_c(void* c_n, DType dtype) const;

 private:
  // A chunk of steps as a member goes through it.
  struct Chunk {
    Share share;
    float* igates;
    const ProjectArgs* ahead;  // projects the next one, a part at each step; null: no part of it
    bool by_changes;           // the igates are made at each step, from what changed in x
  };

  // Asked for at the start of a chunk of steps and kept for all of it.
  Share share() const;
  size_t operand_stride() const;
  int64_t position(int64_t step) const { return backward ? steps - 1 - step : step; }
  char* output_row(int64_t step, size_t row) const;
  void load_operands(int64_t step, int64_t count) const;
  // Whether the next chunk can be projected beside the steps of this one.
  bool projects_ahead() const;
  // Null where delta steps cannot be.
  KeptSums* kept_input(const Share& share) const;
  KeptSums* kept_hidden() const;
  // Whether the rows that load_operands left are to be projected step by step, by what changed from one to the next.
  bool input_changes_little(int64_t count, const Share& share) const;
  ProjectArgs projection(int64_t count, int32_t first_block, int32_t last_block, float* igates) const;
  // The igates of a step whose x changed little.
  const float* project_changes(int64_t in_chunk, const Share& share) const;
  // What changed in h, where the step is to go on by that.
  std::optional<Delta> hidden_changes(const char* h, const Chunk& chunk) const;
  void step(int64_t step, int64_t in_chunk, const Chunk& chunk) const;
  void store_integers(int64_t step, const Share& share) const;
};

}  // namespace lstm_quant
