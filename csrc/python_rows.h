// Numbers of rows as Python gives them.
#pragma once

#include <Python.h>

#include <cstdint>

#include "dlpack.h"
#include "python_tensor.h"

namespace lstm_quant {

// False, and no Python error, where `object` is no int that fits.
inline bool read_row(PyObject* object, int64_t& row) {
  if (PyLong_Check(object) == 0 || PyBool_Check(object) != 0) return false;
  row = PyLong_AsLongLong(object);
  if (row != -1 || PyErr_Occurred() == nullptr) return true;
  PyErr_Clear();
  return false;
}

// Writes the numbers of a list of ints or of an int64 CPU tensor [count], and gives their count. -1, and no Python
// error, where `object` is something else or there are more than `most`.
inline int64_t read_rows(const dlpack::ExchangeApi& api, PyObject* object, int64_t most, int64_t* numbers) {
  if (PyList_Check(object) != 0) {
    const int64_t count = PyList_Size(object);
    if (count > most) return -1;
    for (int64_t i = 0; i < count; ++i) {
      if (!read_row(PyList_GetItem(object, i), numbers[i])) return -1;
    }
    return count;
  }
  dlpack::Tensor tensor;
  if (api.tensor_from_object(object, &tensor) != 0) {
    PyErr_Clear();
    return -1;
  }
  const bool is_plain = tensor.ndim == 1 && tensor.device_type == dlpack::kCpu && tensor.dtype_code == dlpack::kInt &&
                        tensor.dtype_bits == 64 && tensor.dtype_lanes == 1;
  if (!is_plain || tensor.shape[0] > most || (tensor.data == nullptr && tensor.shape[0] > 0) || is_negated(object)) {
    return -1;
  }
  const char* data = static_cast<const char*>(tensor.data) + tensor.byte_offset;
  for (int64_t i = 0; i < tensor.shape[0]; ++i) {
    numbers[i] = reinterpret_cast<const int64_t*>(data)[i * tensor.strides[0]];
  }
  return tensor.shape[0];
}

}  // namespace lstm_quant
