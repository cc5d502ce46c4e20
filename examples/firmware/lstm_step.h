/* One step of a quantized LSTM cell in plain C99, over the structs of a header that torch_lstm_quant.export_qparams
   wrote: include that one first. It is docs/numerics.md line by line, short rather than fast, and gives the fused
   module's bits wherever a float is IEEE 754's float32 and each operation is rounded on its own: with
   -ffp-contract=off, without -ffast-math and without flushing of denormals. */
#ifndef LSTM_STEP_H
#define LSTM_STEP_H

#include <math.h>
#include <stdint.h>
#include <string.h>

/* To integers, NaN to the least. Rounding is to even, C's default. */
static int32_t lstm_quantize(const lstmq_grid* grid, float v) {
  const float low = (float)(grid->quant_min - grid->zero_point);
  const float high = (float)(grid->quant_max - grid->zero_point);
  float steps = v * grid->inv_scale;
  steps = steps > low ? steps : low;
  steps = steps < high ? steps : high;
  return (int32_t)nearbyintf(steps) + grid->zero_point;
}

static float lstm_dequantize(const lstmq_grid* grid, int32_t q) {
  return (float)(q - grid->zero_point) * grid->scale;
}

/* [v]_part: on the part's grid, or as it is where the part has none. */
static float lstm_on_grid(const lstmq_grid* grid, float v) {
  return grid->scale == 0.0f ? v : lstm_dequantize(grid, lstm_quantize(grid, v));
}

/* [v] . W + b for all rows. The sum of integers is exact; `q` has room for `depth` of them. */
static void lstm_project(const lstmq_projection* p, int32_t rows, const float* v, int32_t* q, float* result) {
  int32_t row, k;
  if (p->multiplier != NULL) {
    for (k = 0; k < p->depth; ++k) q[k] = lstm_quantize(&p->grid, v[k]);
  }
  for (row = 0; row < rows; ++row) {
    float sum = 0.0f;
    if (p->multiplier != NULL) {
      const int8_t* weight = p->weight + (size_t)row * p->depth;
      int64_t total = p->offset[row]; /* an int32_t does where accumulator_bits is 32 */
      for (k = 0; k < p->depth; ++k) total += (int64_t)q[k] * (weight[k] - p->weight_zero_point[row]);
      sum = (float)total * p->multiplier[row];
    } else {
      for (k = 0; k < p->depth; ++k) {
        const size_t place = (size_t)row * p->depth + k;
        const float weight = p->weight_float != NULL
                                 ? p->weight_float[place]
                                 : (float)(p->weight[place] - p->weight_zero_point[row]) * p->weight_scale[row];
        const float product = lstm_on_grid(&p->grid, v[k]) * weight;
        sum = sum + product;
      }
    }
    result[row] = sum + (p->bias != NULL ? p->bias[row] : 0.0f);
  }
}

/* exp of y <= 0 by these operations and no others: a Taylor series, scaled by a power of two. */
static double lstm_exp(double y) {
  double n, r, total, coefficients[14];
  int i;
  if (y < -708.0) y = -708.0;
  n = nearbyint(y * 1.4426950408889634);
  r = y - n * 0.6931471805599453;
  coefficients[0] = 1.0;
  for (i = 1; i < 14; ++i) coefficients[i] = coefficients[i - 1] / i;
  total = coefficients[13];
  for (i = 12; i >= 0; --i) total = total * r + coefficients[i];
  return ldexp(total, isnan(n) ? 0 : (int)n);
}

/* Sigmoid or tanh of a float32 that has no grid. */
static float lstm_float_function(int is_tanh, float v) {
  const double x = v;
  double e, large;
  if (!is_tanh) {
    e = lstm_exp(-fabs(x));
    return (float)((x >= 0 ? 1.0 : e) / (1.0 + e));
  }
  if (fabs(x) < 0x1p-12) return (float)(x - x * x * x / 3.0);
  e = lstm_exp(-2.0 * fabs(x));
  large = (1.0 - e) / (1.0 + e);
  return (float)(x < 0 ? -large : large);
}

/* Sigmoid or tanh: looked up where the input has a grid. */
static float lstm_function(const lstmq_function* f, float v) {
  int32_t index;
  if (f->input.scale == 0.0f) {
    return lstm_on_grid(&f->output_again, lstm_on_grid(&f->output, lstm_float_function(f->is_tanh, v)));
  }
  index = lstm_quantize(&f->input, v) - f->input.quant_min;
  if (f->table_float != NULL) return f->table_float[index];
  return lstm_dequantize(f->output_again.scale != 0.0f ? &f->output_again : &f->output,
                         f->table16 != NULL ? f->table16[index] : f->table32[index]);
}

/* How wide h is. */
static int32_t lstm_h_size(const lstmq_cell* cell) {
  return cell->proj_size != 0 ? cell->proj_size : cell->hidden_size;
}

/* One step of one row: x [input_size] in, the states h [lstm_h_size] and c [hidden_size] in and out. `gates` has room
   for 8 * hidden_size floats, `q` for as many integers as the largest of the three sizes. */
static void lstm_cell_step(const lstmq_cell* cell, const float* x, float* h, float* c, float* gates, int32_t* q) {
  const int32_t units = cell->hidden_size;
  float *igates = gates, *hgates = gates + 4 * units, *ogate_cy = gates; /* igates of a unit are read before */
  int32_t unit, g;
  lstm_project(&cell->ih, 4 * units, x, q, igates);
  lstm_project(&cell->hh, 4 * units, h, q, hgates);
  for (unit = 0; unit < units; ++unit) {
    float gate[4], fgate_cx, igate_cgate, tanh_cy;
    for (g = 0; g < 4; ++g) {
      const int32_t row = g * units + unit;
      const float igate = lstm_on_grid(&cell->igates[g], igates[row]);
      const float hgate = lstm_on_grid(&cell->hgates[g], hgates[row]);
      gate[g] = lstm_function(&cell->functions[g], igate + hgate);
    }
    fgate_cx = lstm_on_grid(&cell->fgate_cx, gate[1] * lstm_on_grid(&cell->cx, c[unit]));
    igate_cgate = lstm_on_grid(&cell->igate_cgate, gate[0] * gate[2]);
    c[unit] = lstm_on_grid(&cell->fgate_cx_igate_cgate, fgate_cx + igate_cgate);
    tanh_cy = lstm_function(&cell->functions[4], c[unit]);
    ogate_cy[unit] = lstm_on_grid(&cell->ogate_cy, gate[3] * tanh_cy);
  }
  if (cell->proj_size == 0) {
    memcpy(h, ogate_cy, units * sizeof *h);
    return;
  }
  lstm_project(&cell->hr, cell->proj_size, ogate_cy, q, h);
  for (unit = 0; unit < cell->proj_size; ++unit) h[unit] = lstm_on_grid(&cell->hy, h[unit]);
}

#endif
