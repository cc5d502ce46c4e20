// The cells of a blob, made ready to run, and the memory that a call works in: made for one call, or kept from call to
// call by a stream.
#pragma once

#include <cstdint>
#include <vector>

#include "cell_run.h"
#include "dispatch.h"
#include "lstm.h"
#include "memory.h"
#include "plan.h"

namespace lstm_quant {

// What the threads that share a tile of rows share.
struct Tile {
  std::vector<CellState> states;
  std::vector<float*> between;  // pieces of a layer's output for the next
};

// Memory for calls that are divided as `plan` says. With `kept`, the states of all rows, tiles have no states of their
// own.
struct Buffers {
  Buffers(const Sizes& sizes, const std::vector<BoundCell>& cells, const Kernels& kernels, const Plan& plan,
          const std::vector<CellState>* kept = nullptr);

  Plan plan;
  const std::vector<CellState>* kept;
  std::vector<Tile> tiles;
  std::vector<Workspace> workspaces;

 private:
  AlignedMemory memory_;
  std::vector<std::vector<CellDelta>> deltas_;  // of each slot's cells
};

class Stack {
 public:
  // `blob` must outlive it.
  Stack(const Blob& blob, const CheckedKernels& checked);

  const Sizes& sizes() const { return sizes_; }
  const std::vector<BoundCell>& cells() const { return cells_; }

  // Throws std::runtime_error where integers come from or go to a part that has no grid, or whose grid does not fit
  // their dtype.
  void check_dtypes(const Call& call) const;
  // Runs at least one step of at least one row.
  void run(const Call& call, Parallel& parallel, const Buffers& buffers) const;
  // What is left of a sequence without steps: the states that came in.
  void copy_states(const Call& call) const;

 private:
  const Sizes& sizes_;
  const Kernels& kernels_;
  std::vector<BoundCell> cells_;
};

}  // namespace lstm_quant
