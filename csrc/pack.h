// From a cell's plain matrices, grids and tables to the packed form of blob.h.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "blob.h"

namespace lstm_quant {

// One of a cell's two projections, row-major [kGates * hidden_size, depth]. Either int8 weights with a scale and a zero
// point for each row, or float32 weights.
struct MatrixSource {
  int64_t depth = 0;
  const int8_t* int8_weights = nullptr;
  const float* float_weights = nullptr;
  const float* scales = nullptr;
  const int32_t* zero_points = nullptr;
  const float* bias = nullptr;  // [kGates * hidden_size]
};

struct TableSource {
  const float* values = nullptr;
  int64_t count = 0;
};

struct CellSource {
  MatrixSource input;
  MatrixSource hidden;
  const double* grids = nullptr;  // [grid_rows, 5]: scale, inv_scale, zero_point, quant_min, quant_max
  int64_t grid_rows = 0;          // kParts or kAllGrids
  TableSource tables[kGates + 1];
};

// Lays a stack of cells out, then writes it. The sources' arrays must outlive the packer.
class Packer {
 public:
  // Throws std::runtime_error for sizes, grids or tables that do not fit together, naming cell and part.
  Packer(const Sizes& sizes, std::vector<CellSource> cells);

  size_t bytes() const { return header_.bytes; }
  // Writes bytes() bytes to `blob`, which starts at a multiple of kAlign.
  void write(uint8_t* blob) const;

 private:
  // A table as it is stored; equal ones share a place.
  struct Table {
    TableForm form;
    std::vector<char> content;
    bool operator<(const Table& other) const;
  };

  uint64_t reserve(uint64_t bytes);
  void lay_out_projection(const MatrixSource& source, const Grid& grid, ProjectionRecord& record);
  void lay_out_function(const char* part, const TableSource& source, const Grid& input, const Grid& output,
                        FunctionRecord& record);
  void write_projection(const MatrixSource& source, const ProjectionRecord& record, const Grid& grid,
                        uint8_t* blob) const;

  BlobHeader header_{};
  std::vector<CellSource> sources_;
  std::vector<CellRecord> records_;
  std::map<Table, uint64_t> tables_;  // to their offsets
};

}  // namespace lstm_quant
