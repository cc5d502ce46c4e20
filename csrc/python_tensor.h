// torch's tensors as Python objects, read and made through the C interface that torch has for this: neither Python nor
// torch's dispatcher is in the way. Python is used by its limited API, so that one build serves every Python from 3.10
// on.
#pragma once

#include <Python.h>

#include <cstdint>
#include <initializer_list>
#include <new>
#include <utility>

#include "dlpack.h"
#include "lstm.h"
#include "memory.h"

namespace lstm_quant {

class Reference {
 public:
  // `is_mine`: the caller's reference becomes this one.
  explicit Reference(PyObject* object, bool is_mine = false) : object_(object) {
    if (!is_mine) Py_XINCREF(object_);
  }
  ~Reference() { Py_XDECREF(object_); }
  Reference(const Reference&) = delete;
  Reference& operator=(const Reference&) = delete;

  PyObject* get() const { return object_; }
  // The caller's reference becomes this one.
  void take(PyObject* object) { Py_XDECREF(std::exchange(object_, object)); }
  PyObject* release() { return std::exchange(object_, nullptr); }

 private:
  PyObject* object_;
};

// Whether a tensor's memory holds the negative of its values, which DLPack does not say; true too where it cannot be
// asked.
inline bool is_negated(PyObject* tensor) {
  static PyObject* const name = PyUnicode_InternFromString("is_neg");
  const Reference answer(PyObject_CallMethodObjArgs(tensor, name, nullptr), true);
  if (answer.get() == nullptr) PyErr_Clear();
  return answer.get() != Py_False;
}

// A float32 CPU tensor [rows, columns] or [steps, rows, columns], borrowed, whose rows are contiguous.
class PyTensor {
 public:
  // False, and no Python error, where `object` is something else.
  bool open(const dlpack::ExchangeApi& api, PyObject* object, int64_t rows, int64_t columns) {
    if (!open(api, object)) return false;
    const int last = tensor_.ndim - 1;
    return tensor_.shape[last - 1] == rows && tensor_.shape[last] == columns;
  }
  // Of any size.
  bool open(const dlpack::ExchangeApi& api, PyObject* object) {
    if (api.tensor_from_object(object, &tensor_) != 0) {
      PyErr_Clear();
      return false;
    }
    const int last = tensor_.ndim - 1;
    return (last == 1 || last == 2) && tensor_.device_type == dlpack::kCpu && tensor_.dtype_code == dlpack::kFloat &&
           tensor_.dtype_bits == 32 && tensor_.dtype_lanes == 1 && tensor_.strides[last] == 1 && has_memory() &&
           !is_negated(object);
  }

  bool is_chunk() const { return tensor_.ndim == 3; }
  int64_t steps() const { return is_chunk() ? tensor_.shape[0] : 1; }
  int64_t rows() const { return tensor_.shape[tensor_.ndim - 2]; }
  int64_t columns() const { return tensor_.shape[tensor_.ndim - 1]; }
  char* begin() const { return static_cast<char*>(tensor_.data) + tensor_.byte_offset; }
  // Of a tensor that is not empty.
  const char* end() const {
    int64_t items = 1;
    for (int i = 0; i < tensor_.ndim; ++i) items += (tensor_.shape[i] - 1) * tensor_.strides[i];
    return begin() + items * sizeof(float);
  }
  bool is_contiguous() const {
    int64_t stride = 1;
    for (int i = tensor_.ndim - 1; i >= 0; stride *= tensor_.shape[i--]) {
      if (tensor_.shape[i] != 1 && tensor_.strides[i] != stride) return false;
    }
    return true;
  }
  Sequence sequence() const {
    constexpr int64_t kItem = sizeof(float);
    const int64_t step = is_chunk() ? tensor_.strides[0] * kItem : 0;
    return {begin(), DType::kFloat32, step, tensor_.strides[tensor_.ndim - 2] * kItem};
  }

 private:
  // Not so of zeros that torch has not written down yet.
  bool has_memory() const {
    if (tensor_.data != nullptr) return true;
    for (int i = 0; i < tensor_.ndim; ++i) {
      if (tensor_.shape[i] == 0) return true;
    }
    return false;
  }

  dlpack::Tensor tensor_;
};

// A new contiguous float32 tensor and its memory, in one allocation, and where its values are; null with a Python
// error. Throws std::bad_alloc.
inline PyObject* new_tensor(const dlpack::ExchangeApi& api, std::initializer_list<int64_t> shape, float*& values) {
  struct Memory {
    dlpack::ManagedTensor managed;
    int64_t shape[3];
    int64_t strides[3];
    alignas(kAlign) float values[1];
  };
  int64_t bytes = sizeof(float);
  for (int64_t size : shape) {
    if (__builtin_mul_overflow(bytes, size, &bytes) || bytes > PTRDIFF_MAX / 2) throw std::bad_alloc();
  }
  auto* memory = new (allocate(sizeof(Memory) + bytes).release()) Memory;
  const int dimensions = static_cast<int>(shape.size());
  int64_t stride = 1;
  for (int i = dimensions - 1; i >= 0; --i) {
    memory->shape[i] = shape.begin()[i];
    memory->strides[i] = stride;
    stride *= memory->shape[i];
  }
  const auto give_back = [](dlpack::ManagedTensor* self) { AlignedDelete()(reinterpret_cast<char*>(self)); };
  const dlpack::Tensor tensor{memory->values, dlpack::kCpu,    0, dimensions, dlpack::kFloat, 32, 1,
                              memory->shape,  memory->strides, 0};
  memory->managed = {dlpack::kVersion, nullptr, give_back, 0, tensor};
  void* object = nullptr;
  if (api.object_from_managed(&memory->managed, &object) != 0) {
    give_back(&memory->managed);
    return nullptr;
  }
  values = memory->values;
  return static_cast<PyObject*>(object);
}

}  // namespace lstm_quant
