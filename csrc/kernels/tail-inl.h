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
//
// Every function here is a template over V, so that no code of one ISA can stand in for another's.
#pragma once

#include "float_function.h"
#include "kernels.h"

#define LSTM_QUANT_INLINE inline __attribute__((always_inline))

namespace lstm_quant {

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

template <class V>
LSTM_QUANT_INLINE typename V::F float_function_of(typename V::F v, const Function& function) {
  float lanes[V::kLanes];
  V::store(lanes, v);
  for (float& lane : lanes) lane = float_function(function.is_tanh, lane);
  return on_grid<V>(on_grid<V>(V::load(lanes), function.output), function.output_again);
}

// Sigmoid or tanh of N vectors in place.
template <class V, int N>
LSTM_QUANT_INLINE void apply(const Function& function, typename V::F* v) {
  if (!function.input.present()) {
    for (int j = 0; j < N; ++j) v[j] = float_function_of<V>(v[j], function);
    return;
  }
  for (int j = 0; j < N; ++j) v[j] = round_to<V>(v[j], function.input);
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

// Where vector j of N lies: along the units of one row, or along the rows of one column of units.
template <class V, int N, bool kAlongRows>
struct Tile {
  size_t first_row;
  int first_unit;

  size_t row(int j) const { return kAlongRows ? first_row + j : first_row; }
  int unit(int j) const { return kAlongRows ? first_unit : first_unit + j * V::kLanes; }
  // of vector j's gate g in arrays [block][gate][unit]
  size_t in_blocks(int j, int gate) const {
    return static_cast<size_t>(unit(j) / kUnits) * kBlock + gate * kUnits + unit(j) % kUnits;
  }
};

// A gate from the sums of the hidden projection: sums[j's row within the tile * sums_stride + as igates].
template <class V, int N, bool kAlongRows>
LSTM_QUANT_INLINE void gate(const StepArgs& args, const Tile<V, N, kAlongRows>& tile, const float* sums,
                            size_t sums_stride, int gate, typename V::F* v) {
  const Projection& hidden = args.cell->hidden;
  const size_t first_sum = tile.in_blocks(0, 0);
  const size_t first_igate = static_cast<size_t>(args.first_block) * kBlock;
  for (int j = 0; j < N; ++j) {
    const size_t at = tile.in_blocks(j, gate);
    const auto sum = V::load(sums + (tile.row(j) - tile.first_row) * sums_stride + at - first_sum);
    const auto hgate = V::add(V::mul(sum, V::load(hidden.multipliers + at)), V::load(hidden.biases + at));
    const auto igate = V::load(args.igates + tile.row(j) * args.igates_stride + at - first_igate);
    v[j] = V::add(igate, on_grid<V>(hgate, hidden.output[gate]));
  }
  apply<V, N>(args.cell->functions[gate], v);
}

// The new cell state, from the gates: written to args.c and left in `c`, as tanh is to see it.
template <class V, int N, bool kAlongRows>
LSTM_QUANT_INLINE void update_cell(const StepArgs& args, const Tile<V, N, kAlongRows>& tile,
                                   const typename V::F* forget_gate, const typename V::F* igate_cgate,
                                   typename V::F* c) {
  const Cell& cell = *args.cell;
  for (int j = 0; j < N; ++j) {
    float* state = args.c + tile.row(j) * args.c_stride + tile.unit(j);
    const auto fgate_cx = on_grid<V>(V::mul(forget_gate[j], on_grid<V>(V::load(state), cell.cx)), cell.fgate_cx);
    const auto cy = on_grid<V>(V::add(fgate_cx, igate_cgate[j]), cell.cell);
    V::store(state, cy);
    c[j] = on_grid<V>(cy, cell.tanh_cy_input);
  }
}

// What the next step's hidden projection reads for h; `steps` are those on the grid of ogate_cy.
template <class V>
LSTM_QUANT_INLINE void store_operand(const StepArgs& args, size_t row, int unit, typename V::F h, typename V::F steps) {
  const Cell& cell = *args.cell;
  char* out = static_cast<char*>(args.h_next) + row * args.h_stride;
  if (cell.hidden.sums == Sums::kFloat) {
    V::store(reinterpret_cast<float*>(out) + unit, on_grid<V>(h, cell.hx));
    return;
  }
  const auto operand = cell.h_is_operand ? steps : round_to<V>(h, cell.hx);
  if (cell.hidden.sums == Sums::kInt8) {
    V::store_u8(reinterpret_cast<uint8_t*>(out) + unit, V::to_int(V::sub(operand, V::set(cell.hx.low))));
  } else {
    V::store_i32(reinterpret_cast<int32_t*>(out) + unit, V::to_int(operand));
  }
}

template <class V>
LSTM_QUANT_INLINE void store_h(const StepArgs& args, size_t row, int unit, typename V::F h) {
  const int32_t inside = args.cell->hidden_size - unit;
  float* out = args.output + row * args.output_stride + unit;
  if (inside >= V::kLanes) {
    V::store(out, h);
  } else if (inside > 0) {
    V::store_first(out, h, inside);
  }
}

// The whole tail of N vectors. sums: those of the tile's first row, unit and the input gate; then as in `gate`.
template <class V, int N, bool kAlongRows>
LSTM_QUANT_INLINE void tail(const StepArgs& args, const Tile<V, N, kAlongRows>& tile, const float* sums,
                            size_t sums_stride) {
  using F = typename V::F;
  const Cell& cell = *args.cell;
  F a[N], b[N];
  gate(args, tile, sums, sums_stride, 0, a);
  gate(args, tile, sums, sums_stride, 2, b);
  for (int j = 0; j < N; ++j) a[j] = on_grid<V>(V::mul(a[j], b[j]), cell.igate_cgate);
  gate(args, tile, sums, sums_stride, 1, b);
  F c[N];
  update_cell(args, tile, b, a, c);
  apply<V, N>(cell.functions[kTanhCy], c);
  gate(args, tile, sums, sums_stride, 3, a);
  for (int j = 0; j < N; ++j) {
    const F h = V::mul(a[j], c[j]);
    const F steps = cell.ogate_cy.present() ? round_to<V>(h, cell.ogate_cy) : h;
    const F value = cell.ogate_cy.present() ? dequantize<V>(steps, cell.ogate_cy) : h;
    store_operand<V>(args, tile.row(j), tile.unit(j), value, steps);
    store_h<V>(args, tile.row(j), tile.unit(j), value);
  }
}

}  // namespace lstm_quant
