// The tail of a step, from the hidden projection's sums to the new h and c, written once over a small vector class V.
// An ISA includes this inside its target region, after all other headers, and instantiates it with a V of its own;
// scalar.cpp has the V that specifies the others:
//
//   kLanes, F (floats), I (int32s)
//   set(float), load(const float*), store(float*, F): no alignment
//   store_first(float*, F, int count): only the first `count` lanes, 1 <= count <= kLanes
//   add, sub, mul, min                         max(a, b): b where a is NaN
//   round(F): to nearest, ties to even         to_int(F): of a value that is an integer
//   lookup(const float*, I), lookup16(const uint16_t*, I) -> F
//   store_u8(uint8_t*, I), store_i32(int32_t*, I)
//   evaluate(Evaluator, F steps): the known tables (only called where Kernels::evaluate is not null)
//   kHasSegments: whether segments-inl.h takes it; else the tables serve
//
// Like all *-inl.h it is in an unnamed namespace: code that is compiled for one ISA must not stand in for another's.
#pragma once

#include "evaluate-inl.h"
#include "float_function.h"
#include "kernels.h"
#include "segments-inl.h"

#define LSTM_QUANT_INLINE inline __attribute__((always_inline))

namespace lstm_quant {
namespace {

// What is known of a cell when its tail is compiled.
enum class CellForm {
  kAny,    // nothing: every part is looked up
  kInt8,   // that of LSTMQConfig.int8(), see has_int8_form
  kGrids,  // that of LSTMQConfig.int8_gates16() and its like, see has_grids_form
};

// Whether the gates' sums and tanh's input are on grids of evaluators, h is its own operand, and all else is float32.
template <class V>
bool has_int8_form(const Cell& cell) {
  for (const Function& function : cell.functions) {
    if (!is_rational(function.evaluator)) return false;
    const float limit = rational_of(function.evaluator).limit;
    if (function.input.low > -limit || function.input.high < limit) return false;
  }
  for (const Grid& grid : cell.hidden.output) {
    if (grid.present()) return false;
  }
  const Grid* const float32[] = {&cell.cx, &cell.fgate_cx, &cell.igate_cgate, &cell.cell};
  for (const Grid* grid : float32) {
    if (grid->present()) return false;
  }
  return cell.next_sums == Sums::kInt8 && cell.h_is_operand && cell.ogate_cy.present();
}

// Whether every part has a grid, the cell state keeps its own, and h is its own operand.
inline bool has_grids_form(const Cell& cell) {
  for (const Function& function : cell.functions) {
    if (!function.input.present()) return false;
  }
  for (const Grid& grid : cell.hidden.output) {
    if (!grid.present()) return false;
  }
  const Grid* const grids[] = {&cell.fgate_cx, &cell.igate_cgate, &cell.cell, &cell.ogate_cy};
  for (const Grid* grid : grids) {
    if (!grid->present()) return false;
  }
  return cell.next_sums == Sums::kInt8 && cell.h_is_operand && !cell.cx.present();
}

// A grid's steps as floats; -0.0 may appear.
template <class V>
LSTM_QUANT_INLINE typename V::F round_to(typename V::F v, const Grid& grid) {
  const auto scaled = V::mul(v, V::set(grid.inv_scale));
  return V::round(V::min(V::max(scaled, V::set(grid.low)), V::set(grid.high)));
}

template <class V>
LSTM_QUANT_INLINE typename V::F dequantize(typename V::F steps, const Grid& grid) {
  return V::mul(V::add(steps, V::set(0.0f)), V::set(grid.scale));  // adding 0 makes -0.0 the integers' only zero
}

template <class V>
LSTM_QUANT_INLINE typename V::F on_grid(typename V::F v, const Grid& grid) {
  return grid.present() ? dequantize<V>(round_to<V>(v, grid), grid) : v;
}

// on_grid, of a grid within the cell that is absent in CellForm::kInt8 and present in CellForm::kGrids, where -0.0 may
// stay: no sum, product or rounding tells it from 0.0, and what a step writes is made without it.
template <class V, CellForm kForm>
LSTM_QUANT_INLINE typename V::F on_inner_grid(typename V::F v, const Grid& grid) {
  if constexpr (kForm == CellForm::kInt8) return v;
  if constexpr (kForm == CellForm::kGrids) return V::mul(round_to<V>(v, grid), V::set(grid.scale));
  return on_grid<V>(v, grid);
}

template <class V>
LSTM_QUANT_INLINE typename V::F float_function_of(typename V::F v, const Function& function) {
  float lanes[V::kLanes];
  V::store(lanes, v);
  for (float& lane : lanes) lane = float_function(function.is_tanh, lane);
  return on_grid<V>(on_grid<V>(V::load(lanes), function.output), function.output_again);
}

// Sigmoid or tanh by segments.
template <class V, int N>
LSTM_QUANT_INLINE void apply_segments(const Function& function, typename V::F* v) {
  const Segments& segments = *function.segments;
#pragma GCC unroll 8
  for (int j = 0; j < N; ++j) {
    // the limits lie within the grid's, and may be fractions
    const auto steps = V::round(V::mul(v[j], V::set(function.input.inv_scale)));
    v[j] = V::min(V::max(steps, V::set(segments.low)), V::set(segments.high));
  }
  segments_within<V, N>(segments, v);
#pragma GCC unroll 8
  for (int j = 0; j < N; ++j) v[j] = V::mul(v[j], V::set(function.output.scale));
}

// Sigmoid or tanh of N vectors in place.
template <class V, int N, CellForm kForm>
LSTM_QUANT_INLINE void apply(const Function& function, typename V::F* v) {
  if constexpr (kForm == CellForm::kInt8) {
    const Rational& r = rational_of(function.evaluator);
    // the evaluation's limits lie within the grid's, and beyond them it does not change
    Grid grid = function.input;
    grid.low = -r.limit;
    grid.high = r.limit;
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) v[j] = round_to<V>(v[j], grid);
    rational_within<V, N>(r, v);
    return;
  }
  if constexpr (V::kHasSegments) {
    if (function.segments != nullptr) return apply_segments<V, N>(function, v);
  }
  if (kForm != CellForm::kGrids && !function.input.present()) {
    for (int j = 0; j < N; ++j) v[j] = float_function_of<V>(v[j], function);
    return;
  }
  for (int j = 0; j < N; ++j) v[j] = round_to<V>(v[j], function.input);
  if constexpr (kForm == CellForm::kGrids) {
    if (is_power(function.evaluator)) return power_within<V, N>(power_of(function.evaluator), v);
  }
  if (function.evaluator != Evaluator::kNone) {
    for (int j = 0; j < N; ++j) v[j] = V::evaluate(function.evaluator, v[j]);
    return;
  }
  const auto low = V::set(function.input.low);
  if (function.table != nullptr) {
    for (int j = 0; j < N; ++j) v[j] = V::lookup(function.table, V::to_int(V::sub(v[j], low)));
    return;
  }
  const auto output_low = V::set(function.output.low);
  for (int j = 0; j < N; ++j) {
    const auto steps = V::add(V::lookup16(function.table16, V::to_int(V::sub(v[j], low))), output_low);
    v[j] = dequantize<V>(steps, function.output);
  }
}

// N vectors: along the units of one row, or along the rows of one column of units.
template <class V, int N, bool kAlongRows>
struct Tile {
  size_t first_row;
  size_t first_unit;

  size_t row(int j) const { return kAlongRows ? first_row + j : first_row; }
  size_t unit(int j) const { return kAlongRows ? first_unit : first_unit + j * V::kLanes; }
  // of the first vector in arrays [block][gate][unit]
  size_t place() const { return first_unit / kUnits * kBlock + first_unit % kUnits; }
  // from there to vector j; if the vectors go along the units, the first one begins a block
  static constexpr size_t column(int j) {
    return kAlongRows ? 0 : j * V::kLanes / kUnits * kBlock + j * V::kLanes % kUnits;
  }
  static constexpr size_t tile_row(int j) { return kAlongRows ? j : 0; }
};

// A gate from the sums of the hidden projection: `sums` are those of the tile's first row, unit and gate, kBlock to a
// row.
template <class V, CellForm kForm, int N, bool kAlongRows>
LSTM_QUANT_INLINE void gate(const StepArgs& args, const Tile<V, N, kAlongRows>& tile, const float* sums, int gate,
                            typename V::F* v) {
  const Projection& hidden = args.cell->hidden;
  const size_t place = tile.place() + gate * kUnits;
  const float* multipliers = hidden.multipliers + place;
  const float* biases = hidden.biases + place;
  const float* igates = args.igates + tile.first_row * args.igates_stride + place - args.first_block * kBlock;
#pragma GCC unroll 8
  for (int j = 0; j < N; ++j) {
    const size_t column = tile.column(j);
    const auto sum = V::load(sums + gate * kUnits + tile.tile_row(j) * kBlock + column);
    const auto hgate = V::add(V::mul(sum, V::load(multipliers + column)), V::load(biases + column));
    const auto igate = V::load(igates + tile.tile_row(j) * args.igates_stride + column);
    v[j] = V::add(igate, on_inner_grid<V, kForm>(hgate, hidden.output[gate]));
  }
  apply<V, N, kForm>(args.cell->functions[gate], v);
}

// The new cell state, from the gates: written to args.c and left in `c`, as tanh is to see it.
template <class V, CellForm kForm, int N, bool kAlongRows>
LSTM_QUANT_INLINE void update_cell(const StepArgs& args, const Tile<V, N, kAlongRows>& tile,
                                   const typename V::F (&gates)[kGates][N], typename V::F* c) {
  const Cell& cell = *args.cell;
#pragma GCC unroll 8
  for (int j = 0; j < N; ++j) {
    float* state = args.c + tile.row(j) * args.c_stride + tile.unit(j);
    const auto cx = kForm == CellForm::kAny ? on_grid<V>(V::load(state), cell.cx) : V::load(state);
    const auto fgate_cx = on_inner_grid<V, kForm>(V::mul(gates[1][j], cx), cell.fgate_cx);
    const auto igate_cgate = on_inner_grid<V, kForm>(V::mul(gates[0][j], gates[2][j]), cell.igate_cgate);
    const auto sum = V::add(fgate_cx, igate_cgate);
    const auto cy = kForm == CellForm::kInt8 ? sum : on_grid<V>(sum, cell.cell);
    V::store(state, cy);
    c[j] = cy;
  }
}

// What reads h next reads for it; `steps` are those on the grid of ogate_cy.
template <class V, CellForm kForm>
LSTM_QUANT_INLINE void store_operand(const StepArgs& args, size_t row, size_t unit, typename V::F h,
                                     typename V::F steps) {
  const Cell& cell = *args.cell;
  char* out = static_cast<char*>(args.h_next) + row * args.h_next_stride;
  if constexpr (kForm != CellForm::kAny) {
    V::store_u8(reinterpret_cast<uint8_t*>(out) + unit, V::to_int(V::sub(steps, V::set(cell.hx.low))));
    return;
  }
  if (cell.next_sums == Sums::kFloat) {
    V::store(reinterpret_cast<float*>(out) + unit, on_grid<V>(h, cell.hx));
    return;
  }
  const auto operand = cell.h_is_operand ? steps : round_to<V>(h, cell.hx);
  if (cell.next_sums == Sums::kInt8) {
    V::store_u8(reinterpret_cast<uint8_t*>(out) + unit, V::to_int(V::sub(operand, V::set(cell.hx.low))));
  } else {
    V::store_i32(reinterpret_cast<int32_t*>(out) + unit, V::to_int(operand));
  }
}

template <class V>
LSTM_QUANT_INLINE void store_h(const StepArgs& args, size_t row, size_t unit, typename V::F h) {
  const auto inside = static_cast<ptrdiff_t>(args.cell->hidden_size - unit);
  float* out = args.output + row * args.output_stride + unit;
  if (inside >= V::kLanes) {
    V::store(out, h);
  } else if (inside > 0) {
    V::store_first(out, h, static_cast<int>(inside));
  }
}

// The whole tail of N vectors, from their sums as in `gate`.
template <class V, CellForm kForm, int N, bool kAlongRows>
LSTM_QUANT_INLINE void tail(const StepArgs& args, const Tile<V, N, kAlongRows>& tile, const float* sums) {
  using F = typename V::F;
  const Cell& cell = *args.cell;
  F gates[kGates][N];
#pragma GCC unroll 1  // the gates side by side are too much for the registers
  for (int g = 0; g < kGates; ++g) gate<V, kForm>(args, tile, sums, g, gates[g]);
  F c[N];
  update_cell<V, kForm>(args, tile, gates, c);
  apply<V, N, kForm>(cell.functions[kTanhCy], c);
  const bool on_ogate_cy = kForm != CellForm::kAny || cell.ogate_cy.present();
  const Grid ogate_cy = cell.ogate_cy;
#pragma GCC unroll 8
  for (int j = 0; j < N; ++j) {
    const F h = V::mul(gates[3][j], c[j]);
    const F steps = on_ogate_cy ? round_to<V>(h, ogate_cy) : h;
    const F value = on_ogate_cy ? dequantize<V>(steps, ogate_cy) : h;
    store_operand<V, kForm>(args, tile.row(j), tile.unit(j), value, steps);
    store_h<V>(args, tile.row(j), tile.unit(j), value);
  }
}

}  // namespace
}  // namespace lstm_quant
