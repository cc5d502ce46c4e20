// What the kernels of an ISA compute, and what they may rely on: plain structs and one table of functions.
//
// scalar.cpp specifies every function; any other ISA gives the same bits. The arithmetic is docs/numerics.md:
//
//   steps(v, grid)   = clamp(rne(v * grid.inv_scale), grid.low, grid.high), NaN gives low; an integer, so never -0.0
//   on_grid(v, grid) = steps(v, grid) * grid.scale, or v where the grid is absent
//   sum              = the projection's exact integer sum rounded once to float32, or its float32 sum, k ascending
//   projected        = on_grid(sum * multiplier + bias, projection.output[gate])
//
// each operation rounded to float32 on its own: no fused multiply-add.
//
// Padding contract
// - Hidden units come in blocks of kUnits; the weights, multipliers and biases of units beyond hidden_size are zero.
// - Every array of the packed blob starts at a multiple of kAlign bytes and may be read kAlign bytes beyond its end.
// - Operand rows, igates, cell states and scratch start at multiples of kAlign bytes, and so do their rows.
// - An operand row may be read to the end of its stride: what lies beyond its depth is initialized but arbitrary, so
//   integer weights there are zero, and float sums stop at depth.
// - Rows of igates, c and h_next hold whole blocks, and a kernel writes whole blocks there.
// - Rows of `output` hold exactly hidden_size floats without alignment: nothing beyond may be written.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lstm_quant {

constexpr int kUnits = 16;               // hidden units in a block
constexpr int kGates = 4;                // input, forget, cell and output gate, in this order
constexpr int kBlock = kGates * kUnits;  // what a projection gives for one block: [gate][unit]
constexpr int kGroup = 4;                // neighbouring bytes of a row that one 32-bit dot product takes
constexpr int kDepthStep = 2 * kGroup;   // integer weights are padded with zero columns to a multiple of this
constexpr size_t kAlign = 64;

constexpr size_t round_up(size_t value, size_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// A quantization grid in steps from its zero: low = quant_min - zero_point, high = quant_max - zero_point.
struct Grid {
  float scale = 0.0f;  // 0: the part has no grid, it stays float32
  float inv_scale = 0.0f;
  float low = 0.0f;
  float high = 0.0f;
  int32_t zero_point = 0;

  bool present() const { return scale != 0.0f; }
};

// How a projection is summed. It decides what an operand row and the weights are:
enum class Sums : uint32_t {
  kInt8,   // operand uint8 steps - low;  weights int8  [block][padded_depth / 4][gate][unit][4]; the sum fits int32
  kWide,   // operand int32 steps;        weights int8  as above, with zero points; the sum needs int64
  kFloat,  // operand float32;            weights float [block][depth][gate][unit]
};

// A projection: sum over k of operand[k] * weight[k] for each unit and gate. Arrays are [block][gate][unit].
struct Projection {
  Sums sums = Sums::kFloat;
  int32_t depth = 0;         // of an operand row: input_size, hidden_size or proj_size
  int32_t padded_depth = 0;  // depth rounded up to kDepthStep (kFloat: depth)
  // kInt8: sum = dot(operand, weights) + offset * weight_sums, modulo 2**32; kWide: operand - offset fits int16
  int32_t offset = 0;
  const void* weights = nullptr;
  size_t block_bytes = 0;                       // from the weights of a block to those of the next
  const int32_t* weight_sums = nullptr;         // kInt8, kWide: sum of a unit's weights over k
  const int32_t* weight_zero_points = nullptr;  // kWide: sum = sum over k of operand * (weight - zero point)
  const float* multipliers = nullptr;           // scale of the operand * scale of the weights; 1 for kFloat
  const float* biases = nullptr;
  Grid output[kGates];  // part igates or hgates; four times hy

  const char* block_weights(int32_t block) const { return static_cast<const char*>(weights) + block * block_bytes; }
};

// Evaluations that give every entry of a known table exactly: evaluators.h.
enum class Evaluator : uint32_t { kNone, kSigmoid12, kTanh12, kTanh10, kFineSigmoid12, kFineTanh12, kFineTanh10 };
constexpr int kEvaluators = 7;

// A table as polynomials over pieces of its grid: segments-inl.h. The piece of q steps is the integer nearest to
// q * per_step + first, modulo kPieces.
constexpr int kPieces = 32;
constexpr int kMostPieceDegree = 6;
struct alignas(kAlign) Segments {
  float origin[kPieces];
  float value[kPieces];
  float coefficients[kMostPieceDegree][kPieces];  // of t, t * t and so on
  // Where the outermost entries that change are evaluated: their steps, or fractions beside them if the output's grid
  // cuts the function there.
  float low, high;
  float per_step;
  float first;
  int32_t degree;  // from 1 to kMostPieceDegree
};

// Sigmoid or tanh.
// - input present: the value is entry steps(v, input) - input.low of a table. It is either table[i] or, where table is
//   null, (table16[i] + output.low) * output.scale. An evaluator other than kNone gives the same values from the steps.
//   So do segments, which may be null: they give the steps of the output's grid.
// - input absent: on_grid(on_grid(float_function(v), output), output_again), see float_function.h.
struct Function {
  bool is_tanh = false;
  Evaluator evaluator = Evaluator::kNone;
  Grid input;
  Grid output;
  Grid output_again;  // seldom present: cells that quantize a gate twice
  const float* table = nullptr;
  const uint16_t* table16 = nullptr;
  const Segments* segments = nullptr;
};

constexpr int kTanhCy = kGates;  // index of the fifth function, tanh of the cell state
constexpr bool is_tanh(int function) {
  return function == 2 || function == kTanhCy;
}

// One direction of one layer. A step does for each row and unit, with g one of the gates i, f, c, o:
//   gate[g]  = functions[g](igates[g] + projected by hidden[g])
//   c        = on_grid(on_grid(gate[f] * on_grid(c, cx), fgate_cx) + on_grid(gate[i] * gate[c], igate_cgate), cell)
//   tanh_cy  = functions[kTanhCy](c)
//   h        = on_grid(gate[o] * tanh_cy, ogate_cy)
//   output   = h
//   h_next   = the operand that stands for h: steps(h, hx) as next_sums wants it, on_grid(h, hx) for kFloat
// Products and sums are taken in the order written.
struct Cell {
  int32_t hidden_size = 0;
  int32_t blocks = 0;
  Projection input;
  Projection hidden;
  Function functions[kGates + 1];
  Grid cx;  // absent where it equals `cell`, since c is on that grid already (the driver puts the first c there)
  Grid fgate_cx;
  Grid igate_cgate;
  Grid cell;  // part fgate_cx_igate_cgate
  Grid ogate_cy;
  Grid hx;                        // on which h is read next: by `hidden`, or by what projects it first
  Sums next_sums = Sums::kFloat;  // of what reads it
  bool h_is_operand = false;      // hx equals ogate_cy: steps(h, hx) are the steps that h was rounded to
};

// What changed in the operand row of a Sums::kInt8 projection since the row that `sums` stand for. A change is the
// group it is in and its four bytes' differences, each as a magnitude of at most kMostChange and a mask, 0xFF where the
// difference is negative and 0 elsewhere; a group with larger differences is listed twice. With them a sum grows by
// `negatives`, the magnitudes under a mask, and each magnitude * (weight ^ mask), modulo 2**32: -m * weight is
// m * ~weight + m, and such products of two neighbours fit int16.
//
// kChangesBeyond more changes may be read after the last: they name groups of the row and differ in nothing.
constexpr int kMostChange = 128;
constexpr size_t kChangesBeyond = 8;

struct Delta {
  size_t count;
  int32_t* groups;
  uint8_t* differences;  // [count][2][kGroup]: magnitudes and masks
  int32_t negatives;
  int32_t* sums;  // [block][gate][unit]: read, and written as those of this row
};

// Input projection of `rows` operand rows for the blocks [first_block, last_block): writes projected to
// igates[row * igates_stride + (block - first_block) * kBlock + gate * kUnits + unit].
struct ProjectArgs {
  const Projection* projection;
  size_t rows;
  const void* operand;
  size_t operand_stride;  // bytes
  float* igates;
  size_t igates_stride;  // floats
  int32_t first_block;
  int32_t last_block;
  void* scratch;  // Kernels::scratch_bytes(rows, padded_depth), the calling thread's own
  // Of a single row: what to make its sums of, instead of `operand`. Null: the operand.
  const Delta* delta = nullptr;
  // A block's weights that the call after this one begins with, which a kernel may fetch. Null: unknown.
  const char* then = nullptr;
  // The same operand as that of the call before with this scratch, which only was for other blocks.
  bool same_operand = false;
};

// A projection of kAheadRows rows in parts: when all have been done, in ascending order, igates are as project would
// have left them.
constexpr int kAheadRows = 16;
constexpr int kAheadParts = 16;
static_assert(kAheadParts == kAheadRows, "each of the steps does a part");

// One step of `rows` rows for the blocks [first_block, last_block), as Cell says. igates is laid out as project left it
// for the same blocks; all other pointers are to block 0 of row 0. h and h_next never overlap. `descending` asks to
// walk the blocks backwards, which meets first what the cache still holds of the step before.
struct StepArgs {
  const Cell* cell;
  size_t rows;
  const void* h;    // operand of the hidden projection
  size_t h_stride;  // bytes
  const float* igates;
  size_t igates_stride;  // floats
  float* c;              // read and written
  size_t c_stride;       // floats
  void* h_next;
  size_t h_next_stride;  // bytes
  float* output;
  size_t output_stride;  // floats
  int32_t first_block;
  int32_t last_block;
  bool descending;
  void* scratch;  // Kernels::scratch_bytes(rows, hidden.padded_depth), the calling thread's own
  // Where Kernels::projects_ahead, a step of a single row can also do one part of a projection of kAheadRows rows, for
  // the same blocks. Null: none.
  const ProjectArgs* ahead = nullptr;
  int32_t ahead_part = 0;
  // Of a single row, without `ahead`: what to make its sums of, instead of `h`. Null: h.
  const Delta* delta = nullptr;
  const char* then = nullptr;  // as in ProjectArgs
  bool same_h = false;         // as same_operand there
};

// How fast one thread works, roughly: decides only how a call is divided.
struct Rates {
  double products_per_ns;  // multiply-accumulates on weights that are at hand
  double weights_per_ns;   // int8 weights that are read for one row
  double unit_ns;          // functions, new cell and hidden state of a unit
  // Bytes of a cell's weights, input and hidden, from which they are read from a cache that all threads share: then
  // more steps are projected at a time. 0: never.
  int64_t many_weights_bytes = 0;
};

struct Kernels {
  const char* name;
  Rates rates;
  // operand[i] = steps(values[i], grid) - grid.low; the grid has at most 256 values. No alignment, nothing else is
  // touched.
  void (*quantize)(const Grid& grid, const float* values, size_t count, uint8_t* operand);
  void (*project)(const ProjectArgs& args);
  void (*step)(const StepArgs& args);
  // Bytes of scratch that `project` and `step` take at most; fewer rows, and shallower ones, take no more.
  size_t (*scratch_bytes)(size_t rows, size_t padded_depth);
  // Lists what changed between two operand rows of `groups` groups: all of Delta but the sums. There is room for twice
  // as many changes as groups, and kChangesBeyond.
  void (*list_changes)(const uint8_t* before, const uint8_t* now, size_t groups, Delta& delta);
  // results[i] = function(values[i]), as in `step`, for checks: of the evaluators over their whole grids, before `step`
  // is handed a Function with one. Null: neither evaluators nor segments, `step` takes the tables.
  void (*evaluate)(const Function& function, const float* values, size_t count, float* results);
  // Whether `step` takes StepArgs::ahead, for projections that are both Sums::kInt8.
  bool projects_ahead = false;
};

extern const Kernels kScalarKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvxVnniKernels;
extern const Kernels kAvx512VnniKernels;

}  // namespace lstm_quant
