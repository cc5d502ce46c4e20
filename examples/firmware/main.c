/* Runs the LSTM of model.h over sequences from standard input: float32s in the machine's own byte order, for each row x
   [steps][input_size], then h [num_layers * num_directions][width of h] and c, which is hidden_size wide. It writes the
   output [steps][num_directions * width of h] and the new h and c of each row to standard output. The steps are its one
   argument. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* lstm_step.h needs what model.h defines */
/* clang-format off */
#include "model.h"
#include "lstm_step.h"
/* clang-format on */

/* A layer's one direction over all steps: x [steps][width] to its columns of output [steps][stride]. */
static void run_direction(const lstmq_cell* cell, int reverse, long steps, const float* x, float* h, float* c,
                          float* output, size_t stride, float* gates, int32_t* q) {
  long i;
  for (i = 0; i < steps; ++i) {
    const long t = reverse ? steps - 1 - i : i;
    lstm_cell_step(cell, x + (size_t)t * cell->input_size, h, c, gates, q);
    memcpy(output + (size_t)t * stride, h, lstm_h_size(cell) * sizeof *h);
  }
}

int main(int argc, char** argv) {
  const lstmq_model* model = &model_model;
  const long steps = argc == 2 ? strtol(argv[1], NULL, 10) : 0;
  const size_t units = model->hidden_size, h_size = lstm_h_size(&model->cells[0]);
  const size_t wide = h_size * model->num_directions, cells = (size_t)model->num_layers * model->num_directions;
  const size_t widest = wide > (size_t)model->input_size ? wide : (size_t)model->input_size;
  const size_t inputs = (size_t)steps * model->input_size, h_states = cells * h_size, c_states = cells * units;
  float *x = malloc((size_t)steps * widest * sizeof *x), *output = malloc((size_t)steps * widest * sizeof *output);
  float *h = malloc(h_states * sizeof *h), *c = malloc(c_states * sizeof *c),
        *gates = malloc(8 * units * sizeof *gates);
  long rows = 0;
  int32_t* q = malloc((widest > units ? widest : units) * sizeof *q);
  if (steps < 1 || !x || !output || !h || !c || !gates || !q) {
    fprintf(stderr, "usage: %s STEPS < floats > floats\n", argv[0]);
    return 2;
  }
  for (;;) {
    int32_t layer, direction;
    const size_t got = fread(x, sizeof *x, inputs, stdin);
    if (got == 0 && rows > 0) break;
    if (got < inputs || fread(h, sizeof *h, h_states, stdin) < h_states ||
        fread(c, sizeof *c, c_states, stdin) < c_states) {
      fprintf(stderr, "row %ld: needs %lu floats: x, then h and c\n", rows,
              (unsigned long)(inputs + h_states + c_states));
      return 1;
    }
    ++rows;
    for (layer = 0; layer < model->num_layers; ++layer) {
      float* swapped = x;
      for (direction = 0; direction < model->num_directions; ++direction) {
        const int32_t index = layer * model->num_directions + direction;
        run_direction(&model->cells[index], direction, steps, x, h + index * h_size, c + index * units,
                      output + direction * h_size, wide, gates, q);
      }
      x = output; /* what the next layer reads */
      output = swapped;
    }
    fwrite(x, sizeof *x, (size_t)steps * wide, stdout);
    fwrite(h, sizeof *h, h_states, stdout);
    fwrite(c, sizeof *c, c_states, stdout);
  }
  return 0;
}
