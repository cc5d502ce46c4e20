// How a call is divided: among threads, and along rows and steps so that what is worked on stays in the cache.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>

#include "blob.h"
#include "parallel.h"

namespace lstm_quant {

// What each slot takes: rows of its own; or, of the same rows, a direction or some blocks of units; or whatever layer
// is next, on steps of its own.
enum class Sharing { kRows, kUnits, kLayers };

struct Plan {
  Sharing sharing;
  int slots;                           // threads to ask for
  int64_t tile_rows;                   // rows that go through the whole stack together
  int64_t chunk_steps;                 // steps whose input projection is done ahead of the recurrence
  int32_t group_blocks;                // blocks for which input projection and step follow each other
  int64_t layer_steps;                 // steps that a layer does before the next layer takes them: a piece
  int64_t pieces_between;              // pieces for which there is room between two layers
  bool zigzag;                         // walk the blocks backwards on odd steps
  bool ahead;                          // project a single row's next chunk beside the steps of this one, of kAheadRows
  bool delta;                          // skip what did not change in a single row, where it is faster; not by groups
  int64_t pauses;                      // to spend in waiting at a meeting before going to sleep
  std::chrono::microseconds patience;  // how long to wait for the other threads before going on without them
};

// `row_steps`: how many steps the rows have together, where some have fewer than others.
Plan make_plan(const Sizes& sizes, const Rates& rates, int64_t steps, int64_t rows, const Threads& threads,
               std::optional<int64_t> row_steps = std::nullopt);

}  // namespace lstm_quant
