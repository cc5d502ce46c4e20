#include "blob.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

namespace lstm_quant {
namespace {

[[noreturn]] void fail(const std::string& what) {
  throw std::runtime_error("packed LSTM: " + what +
                           ": pack the cells again with torch_lstm_quant.ops.pack, or export the model again");
}

bool is_absent(const Grid& grid) {
  return grid == Grid{};
}

const BlobHeader* checked_header(const void* data, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(data) % kAlign != 0) fail("must start at a multiple of 64 bytes");
  if (bytes < sizeof(BlobHeader)) fail("truncated, got " + std::to_string(bytes) + " bytes, less than a header");
  const auto* header = static_cast<const BlobHeader*>(data);
  if (header->magic != kBlobMagic) fail("not a packed LSTM (the magic number differs)");
  if (header->version != kBlobVersion || header->record_bytes != sizeof(CellRecord)) {
    fail("got version " + std::to_string(header->version) + ", need version " + std::to_string(kBlobVersion));
  }
  if (header->checksum != checksum(*header)) fail("damaged header (its checksum differs)");
  if (header->bytes != bytes) {
    fail("got " + std::to_string(bytes) + " bytes, need " + std::to_string(header->bytes));
  }
  const Sizes& sizes = header->sizes;
  const bool sizes_fit = 1 <= sizes.input_size && sizes.input_size <= kMaxSize && 1 <= sizes.hidden_size &&
                         sizes.hidden_size <= kMaxSize && 0 <= sizes.proj_size && sizes.proj_size <= kMaxSize &&
                         1 <= sizes.num_layers && sizes.num_layers <= kMaxLayers && 1 <= sizes.num_directions &&
                         sizes.num_directions <= 2;
  if (!sizes_fit) fail("sizes out of range");
  if (bytes < sizeof(BlobHeader) + static_cast<size_t>(sizes.cells()) * sizeof(CellRecord))
    fail("too few bytes for its cells");
  return header;
}

void check_sums(const ProjectionRecord& record, const Grid& grid, int64_t depth) {
  if (record.depth != depth) fail("a projection's depth differs from the header's sizes");
  switch (record.sums) {
    case Sums::kInt8: {
      const double span = grid.high - grid.low;
      if (!grid.present() || span > 255 || span * 128 * depth >= 0x1p31)
        fail("a projection's sum could overflow int32");
      return;
    }
    case Sums::kWide:
      if (!grid.present() || !is_idempotent(grid)) fail("a projection's integer sum needs a grid of at most 16 bits");
      return;
    case Sums::kFloat:
      return;
  }
  fail("unknown kind of projection");
}

// What is taken from the steps of a grid of at most 16 bits so that they fit int16: mostly nothing.
int32_t middle_of(const Grid& grid) {
  if (grid.low >= INT16_MIN && grid.high <= INT16_MAX) return 0;
  return static_cast<int32_t>(grid.low) - INT16_MIN;
}

bool is_known(Evaluator evaluator) {
  return static_cast<uint32_t>(evaluator) < kEvaluators;
}

void copy(const Grid* from, Grid* to) {
  std::memcpy(static_cast<void*>(to), from, kGates * sizeof(Grid));
}

}  // namespace

uint64_t checksum(const BlobHeader& header) {
  // FNV-1a over words
  uint64_t words[offsetof(BlobHeader, checksum) / sizeof(uint64_t)];
  std::memcpy(words, &header, sizeof words);
  uint64_t hash = 0xcbf29ce484222325u;
  for (uint64_t word : words) hash = (hash ^ word) * 0x100000001b3u;
  return hash;
}

void check_grid(const Grid& grid) {
  if (is_absent(grid)) return;
  constexpr float kLimit = 1 << 24;
  // written so that NaN fails
  const bool fits = std::isnormal(grid.scale) && grid.scale > 0 && std::isnormal(grid.inv_scale) &&
                    grid.inv_scale > 0 && -kLimit <= grid.low && grid.low <= 0 && 0 <= grid.high &&
                    grid.high <= kLimit && grid.low < grid.high && grid.low == std::floor(grid.low) &&
                    grid.high == std::floor(grid.high) && -kLimit <= grid.zero_point && grid.zero_point <= kLimit;
  if (!fits) fail("a quantization grid is out of range");
}

Blob::Blob(const void* data, size_t bytes)
    : data_(static_cast<const char*>(data)), header_(checked_header(data, bytes)) {}

template <class T>
const T* Blob::section(uint64_t offset, uint64_t count) const {
  // count * sizeof(T) cannot overflow: see kMaxSize
  if (offset % kAlign != 0 || offset > header_->bytes || count * sizeof(T) + kAlign > header_->bytes - offset) {
    fail("a section lies outside the blob");
  }
  return reinterpret_cast<const T*>(data_ + offset);
}

void Blob::bind_projection(const ProjectionRecord& record, const Grid& grid, int64_t depth, uint64_t outputs,
                           Projection& projection) const {
  check_sums(record, grid, depth);
  const bool is_float = record.sums == Sums::kFloat;
  const uint64_t padded_depth = is_float ? depth : round_up(depth, kDepthStep);
  projection.sums = record.sums;
  projection.depth = static_cast<int32_t>(depth);
  projection.padded_depth = static_cast<int32_t>(padded_depth);
  projection.block_bytes = padded_depth * kBlock * (is_float ? sizeof(float) : 1);
  if (is_float) {
    projection.weights = section<float>(record.weights, padded_depth * outputs);
  } else {
    projection.weights = section<int8_t>(record.weights, padded_depth * outputs);
  }
  if (record.sums == Sums::kInt8) projection.offset = static_cast<int32_t>(grid.low);
  if (record.sums == Sums::kWide) projection.offset = middle_of(grid);
  if (!is_float) projection.weight_sums = section<int32_t>(record.weight_sums, outputs);
  if (record.sums == Sums::kWide) projection.weight_zero_points = section<int32_t>(record.weight_zero_points, outputs);
  projection.multipliers = section<float>(record.multipliers, outputs);
  projection.biases = section<float>(record.biases, outputs);
}

void Blob::bind_function(const FunctionRecord& record, Function& function) const {
  if (!function.input.present()) return;
  if (!is_idempotent(function.input)) fail("a function's input needs a grid of at most 16 bits");
  const uint64_t entries = static_cast<uint64_t>(function.input.high - function.input.low) + 1;
  if (record.form == TableForm::kFloat) {
    function.table = section<float>(record.table, entries);
  } else if (record.form == TableForm::kUint16 && function.output.present()) {
    function.table16 = section<uint16_t>(record.table, entries);
  } else {
    fail("a function's table is missing");
  }
  if (!is_known(record.evaluator)) fail("unknown evaluator");
  function.evaluator = record.evaluator;
  if (record.segments == 0 || !function.output.present()) return;
  function.segments = section<Segments>(record.segments, 1);
  // whatever else they hold, no more than other numbers come of it: kernels take five bits as the number of a piece
  const int32_t degree = function.segments->degree;
  if (degree < 1 || degree > kMostPieceDegree) fail("segments of unknown degree");
}

BoundCell Blob::cell(int64_t index) const {
  const CellRecord& record = reinterpret_cast<const CellRecord*>(data_ + sizeof(BlobHeader))[index];
  const Grids& grids = record.grids;
  for (int i = 0; i < kAllGrids; ++i) check_grid((&grids.x)[i]);

  BoundCell bound;
  Cell& cell = bound.cell;
  cell.hidden_size = static_cast<int32_t>(sizes().hidden_size);
  cell.blocks = static_cast<int32_t>(round_up(sizes().hidden_size, kUnits) / kUnits);
  const uint64_t gates = static_cast<uint64_t>(cell.blocks) * kBlock;
  bind_projection(record.input, grids.x, sizes().depth(index / sizes().num_directions), gates, cell.input);
  bind_projection(record.hidden, grids.hx, sizes().h_size(), gates, cell.hidden);
  copy(grids.igates, cell.input.output);
  copy(grids.hgates, cell.hidden.output);
  const bool projects = sizes().proj_size != 0;
  if (projects) {
    bind_projection(record.hy, grids.ogate_cy, sizes().hidden_size, round_up(sizes().proj_size, kBlock), bound.hy);
    std::fill_n(bound.hy.output, kGates, grids.hy);
  }
  for (int i = 0; i <= kGates; ++i) {
    Function& function = cell.functions[i];
    const bool is_gate = i < kGates;
    const Grid& tanh_input = grids.tanh_cy_input.present() ? grids.tanh_cy_input : grids.fgate_cx_igate_cgate;
    function.is_tanh = is_tanh(i);
    function.input = is_gate ? grids.gates[i] : tanh_input;
    function.output = is_gate ? grids.gate_outputs[i] : grids.tanh_cy;
    if (is_gate) function.output_again = grids.outputs_again[i];
    if (function.input.present() && function.output_again.present()) {
      // a table already holds both roundings: what it stores is on the last grid
      function.output = function.output_again;
      function.output_again = {};
    }
    bind_function(record.functions[i], function);
  }
  const bool cx_is_cell = grids.cx == grids.fgate_cx_igate_cgate && is_idempotent(grids.cx);
  cell.cx = cx_is_cell ? Grid{} : grids.cx;
  cell.fgate_cx = grids.fgate_cx;
  cell.igate_cgate = grids.igate_cgate;
  cell.cell = grids.fgate_cx_igate_cgate;
  cell.ogate_cy = grids.ogate_cy;
  cell.hx = projects ? grids.ogate_cy : grids.hx;
  cell.next_sums = projects ? bound.hy.sums : cell.hidden.sums;
  cell.h_is_operand = cell.hx == grids.ogate_cy && is_idempotent(cell.hx) && cell.next_sums != Sums::kFloat;
  bound.x = grids.x;
  bound.hx = grids.hx;
  bound.cx = grids.cx;
  bound.h = projects ? grids.hy : grids.ogate_cy;
  bound.h_size = static_cast<int32_t>(sizes().h_size());
  return bound;
}

}  // namespace lstm_quant
