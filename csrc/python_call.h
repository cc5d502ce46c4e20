// What every function that Python calls needs: errors and exceptions as Python's, and its lock let go.
#pragma once

#include <Python.h>

#include <cstdint>
#include <exception>
#include <new>

#include "blob.h"

namespace lstm_quant {

// Lets other Python threads run during calls of some length.
class ReleasedGil {
 public:
  ReleasedGil(const Sizes& sizes, int64_t steps, int64_t rows)
      : state_(products(sizes, steps, rows) > kLong ? PyEval_SaveThread() : nullptr) {}
  ~ReleasedGil() {
    if (state_ != nullptr) PyEval_RestoreThread(state_);
  }
  ReleasedGil(const ReleasedGil&) = delete;
  ReleasedGil& operator=(const ReleasedGil&) = delete;

 private:
  static constexpr double kLong = 4e6;  // multiply-accumulates of some tens of microseconds
  static double products(const Sizes& sizes, int64_t steps, int64_t rows) {
    double columns = 0;
    for (int64_t layer = 0; layer < sizes.num_layers; ++layer) {
      columns += static_cast<double>(sizes.depth(layer) + sizes.h_size());
    }
    return columns * static_cast<double>(sizes.num_directions * kGates * sizes.hidden_size) *
           static_cast<double>(steps) * static_cast<double>(rows);
  }

  PyThreadState* const state_;
};

// Runs `body`, which returns a new reference or null with a Python error.
template <class Body>
PyObject* guarded(const Body& body) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  } catch (const std::exception& error) {
    return PyErr_Format(PyExc_RuntimeError, "torch_lstm_quant: %s", error.what());
  }
}

// False with a Python error.
inline bool has_count(Py_ssize_t count, Py_ssize_t needed) {
  if (count == needed) return true;
  PyErr_Format(PyExc_TypeError, "needs %zd arguments, got %zd", needed, count);
  return false;
}

}  // namespace lstm_quant
