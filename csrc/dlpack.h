// What of DLPack's C interface (https://dmlc.github.io/dlpack) makes tensors of Python objects and objects of tensors
// without going through Python. torch's own header for it may not be used together with its stable ABI.
#pragma once

#include <cstdint>

namespace lstm_quant::dlpack {

constexpr const char* kCapsuleName = "dlpack_exchange_api";
constexpr int32_t kCpu = 1;
constexpr uint8_t kInt = 0;
constexpr uint8_t kFloat = 2;

struct Tensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  uint8_t dtype_code;
  uint8_t dtype_bits;
  uint16_t dtype_lanes;
  int64_t* shape;
  int64_t* strides;  // in items
  uint64_t byte_offset;
};

struct Version {
  uint32_t major;
  uint32_t minor;
};
constexpr Version kVersion = {1, 3};

// A tensor that whoever takes it gives back.
struct ManagedTensor {
  Version version;
  void* context;
  void (*give_back)(ManagedTensor* self);
  uint64_t flags;
  Tensor tensor;
};

struct ExchangeApi {
  Version version;
  void* previous;
  void* allocate;
  void* managed_from_object;
  // Makes a PyObject that takes the tensor; other than 0: it does not, and a Python error is set.
  int (*object_from_managed)(ManagedTensor* managed, void** object);
  // Borrows what a PyObject holds; other than 0: it does not, and a Python error is set. May be null.
  int (*tensor_from_object)(void* object, Tensor* tensor);
  void* current_work_stream;
};

}  // namespace lstm_quant::dlpack
