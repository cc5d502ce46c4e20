// The packed form of a stack of cells: one block of bytes, the same for every ISA.
//
//   BlobHeader | CellRecord for each cell, layer by layer, each layer's directions in order | sections
//
// A section is an array as kernels.h lays it out. It starts at a multiple of kAlign bytes and is followed by at least
// kAlign bytes, so that kernels may read past its end. Offsets are in bytes from the start of the blob. Equal tables
// and equal segments are stored once. Everything is in the machine's own byte order; the magic number differs in the
// other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "kernels/kernels.h"

namespace lstm_quant {

constexpr uint64_t kBlobMagic = 0x4b4c42514d54534cu;
constexpr uint32_t kBlobVersion = 4;
constexpr int64_t kMaxSize = 1 << 24;      // of the three sizes: no product of them overflows 64 bits
constexpr int64_t kMaxLayers = 1 << 16;    // likewise
constexpr float kMaxTableSteps = 1 << 16;  // high - low of the widest grid that is no UNBOUNDED one

struct Sizes {
  int64_t input_size;
  int64_t hidden_size;
  int64_t num_layers;
  int64_t num_directions;
  int64_t proj_size = 0;  // 0: hidden states are not projected

  int64_t cells() const { return num_layers * num_directions; }
  // Of a hidden state as it is given and read; that of the cell state is hidden_size.
  int64_t h_size() const { return proj_size == 0 ? hidden_size : proj_size; }
  int64_t depth(int64_t layer) const { return layer == 0 ? input_size : num_directions * h_size(); }
};

struct BlobHeader {
  uint64_t magic;
  uint32_t version;
  uint32_t record_bytes;
  uint64_t bytes;
  Sizes sizes;
  uint64_t checksum;  // of the fields before
};

// The grids. Rows of qparams.pack_grids are in this order; those of a cell without second grids lack these, and those
// of a cell without a grid for hy that one.
struct Grids {
  Grid x, hx, cx;
  Grid igates[kGates], hgates[kGates], gates[kGates], gate_outputs[kGates];
  Grid fgate_cx, igate_cgate, fgate_cx_igate_cgate, tanh_cy_input, tanh_cy, ogate_cy;
  Grid gates_again[kGates], outputs_again[kGates];
  Grid hy;
};
constexpr int kSecondGrids = 2 * kGates;
constexpr int kAllGrids = sizeof(Grids) / sizeof(Grid);
constexpr int kParts = kAllGrids - kSecondGrids - 1;  // that every cell has

struct ProjectionRecord {
  Sums sums;
  int32_t depth;
  uint64_t weights;
  uint64_t weight_sums;         // 0 if kFloat
  uint64_t weight_zero_points;  // 0 unless kWide
  uint64_t multipliers;
  uint64_t biases;
};

enum class TableForm : uint32_t { kNone, kFloat, kUint16 };

struct FunctionRecord {
  TableForm form;
  Evaluator evaluator;
  uint64_t table;
  uint64_t segments;  // 0: none
};

struct CellRecord {
  Grids grids;
  ProjectionRecord input;
  ProjectionRecord hidden;
  ProjectionRecord hy;  // zeros without proj_size
  FunctionRecord functions[kGates + 1];
};
static_assert(std::is_trivially_copyable_v<CellRecord> && std::is_trivially_copyable_v<BlobHeader>);

// A cell as the kernels take it, and what only its surroundings need.
struct BoundCell {
  Cell cell;
  Grid x;
  Grid hx;
  Grid cx;  // where cell.cx is absent, the first c is put on this one
  Grid h;   // on which the new hidden state is given: hy, or ogate_cy where there is no projection
  int32_t h_size;
  // Of a cell with proj_size: what makes the new hidden state of output_gate * tanh_cy. Its blocks of kBlock outputs
  // are as those of any projection, [gate][unit], and mean nothing. Depth 0: none.
  Projection hy;

  bool projects() const { return hy.depth != 0; }
  int32_t hy_blocks() const { return (h_size + kBlock - 1) / kBlock; }
};

// Reads a blob. Nothing in it is trusted: whatever could make a kernel read or write elsewhere is checked, in time
// proportional to the number of cells.
class Blob {
 public:
  // Throws std::runtime_error unless the header is that of a whole blob of this version. `data` stays the caller's.
  Blob(const void* data, size_t bytes);

  const Sizes& sizes() const { return header_->sizes; }
  // Throws std::runtime_error where the cell's record does not fit the header or points outside the blob.
  BoundCell cell(int64_t index) const;

 private:
  // `outputs`: as many as there are, those that pad the last block included.
  void bind_projection(const ProjectionRecord& record, const Grid& grid, int64_t depth, uint64_t outputs,
                       Projection& projection) const;
  void bind_function(const FunctionRecord& record, Function& function) const;
  template <class T>
  const T* section(uint64_t offset, uint64_t count) const;

  const char* data_;
  const BlobHeader* header_;
};

uint64_t checksum(const BlobHeader& header);

// Throws std::runtime_error unless `grid` is absent or one that the kernels can work with.
void check_grid(const Grid& grid);

inline bool operator==(const Grid& a, const Grid& b) {
  return a.scale == b.scale && a.inv_scale == b.inv_scale && a.low == b.low && a.high == b.high &&
         a.zero_point == b.zero_point;
}

// Whether a value on the grid stays where it is when quantized again: true of all but the unbounded grids.
inline bool is_idempotent(const Grid& grid) {
  return grid.high - grid.low <= kMaxTableSteps;
}

}  // namespace lstm_quant
