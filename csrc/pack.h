// From a cell's plain matrices, grids and tables to the packed form of blob.h.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "blob.h"

namespace lstm_quant {

// One of a cell's projections, row-major [rows, depth]: [kGates * hidden_size, depth] of input and hidden,
// [proj_size, hidden_size] of hy. Either int8 weights with a scale and a zero point for each row, or float32 weights.
struct MatrixSource {
  int64_t depth = 0;
  const int8_t* int8_weights = nullptr;
  const float* float_weights = nullptr;
  const float* scales = nullptr;
  const int32_t* zero_points = nullptr;
  const float* bias = nullptr;  // [rows]; null: zeros
};

struct TableSource {
  const float* values = nullptr;
  int64_t count = 0;
};

struct CellSource {
  MatrixSource input;
  MatrixSource hidden;
  MatrixSource hy;                // with proj_size
  const double* grids = nullptr;  // [grid_rows, 5]: scale, inv_scale, zero_point, quant_min, quant_max
  int64_t grid_rows = 0;          // kParts, and kSecondGrids more, and one more for hy
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
  // A function as it is stored. Most cells have the same ones.
  struct LaidOutFunction {
    bool is_tanh;
    Grid input;
    Grid output;
    FunctionRecord record;
  };

  uint64_t reserve(uint64_t bytes);
  uint64_t share(const void* content, size_t bytes);
  void lay_out_projection(const MatrixSource& source, const Grid& grid, int64_t rows, ProjectionRecord& record);
  void lay_out_table(const TableSource& source, const std::vector<float>& steps, float low, FunctionRecord& record);
  void lay_out_function(int index, const TableSource& source, const Grid& input, const Grid& output,
                        FunctionRecord& record);
  void find_evaluation(const TableSource& source, std::vector<float> steps, LaidOutFunction& function);
  // `row` of the source, as the output number `index` of the packed projection.
  void write_row(const MatrixSource& source, const ProjectionRecord& record, const Grid& grid, int64_t row,
                 int64_t index, uint8_t* blob) const;

  BlobHeader header_{};
  std::vector<CellSource> sources_;
  std::vector<CellRecord> records_;
  std::map<std::vector<char>, uint64_t> shared_;  // content of tables and the like, to its offset
  std::vector<LaidOutFunction> functions_;
};

}  // namespace lstm_quant
