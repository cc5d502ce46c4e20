// torch_lstm_quant._stream: streams as Python calls them. The only file that includes Python, through its limited API,
// so that one build serves every Python from 3.10 on. A step of a small LSTM takes a microsecond, and so do torch's
// dispatcher and each few attributes of a tensor that Python reads: so run() takes tensors as they come, through the C
// interface that torch has for this. What it does not take it leaves to Python, which has the words to refuse it.
#include <Python.h>

#include <atomic>
#include <exception>
#include <memory>
#include <utility>

#include "dispatch.h"
#include "dlpack.h"
#include "stream.h"
#include "torch_parallel.h"

namespace lstm_quant {
namespace {

constexpr const char* kBoundName = "torch_lstm_quant.stream";
// Multiply-accumulates of a call from which other Python threads run meanwhile.
constexpr double kLongWork = 4e6;

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
  PyObject* release() { return std::exchange(object_, nullptr); }

 private:
  PyObject* object_;
};

struct BoundStream {
  Reference packed;  // keeps the blob's memory
  const dlpack::ExchangeApi* api;
  Stream stream;
  std::atomic<bool> used{false};
};

// Holds a stream for as long as a function works on it.
class Use {
 public:
  explicit Use(BoundStream& bound) : bound_(bound), mine_(!bound.used.exchange(true)) {
    if (!mine_) PyErr_SetString(PyExc_RuntimeError, "a Stream is used by two threads at once: give each its own");
  }
  ~Use() {
    if (mine_) bound_.used.store(false);
  }
  Use(const Use&) = delete;
  Use& operator=(const Use&) = delete;

  bool mine() const { return mine_; }

 private:
  BoundStream& bound_;
  const bool mine_;
};

BoundStream* bound_stream(PyObject* const* args, Py_ssize_t count, Py_ssize_t needed) {
  if (count != needed) {
    PyErr_Format(PyExc_TypeError, "needs %zd arguments, got %zd", needed, count);
    return nullptr;
  }
  return static_cast<BoundStream*>(PyCapsule_GetPointer(args[0], kBoundName));
}

// A float32 CPU tensor of [rows, columns] or [steps, rows, columns], borrowed.
class View {
 public:
  // False, and no Python error, where `object` is something else.
  bool open(const BoundStream& bound, PyObject* object, int64_t columns) {
    if (bound.api->tensor_from_object(object, &tensor_) != 0) {
      PyErr_Clear();
      return false;
    }
    const int last = tensor_.ndim - 1;
    return (last == 1 || last == 2) && tensor_.device_type == dlpack::kCpu && tensor_.dtype_code == dlpack::kFloat &&
           tensor_.dtype_bits == 32 && tensor_.dtype_lanes == 1 && tensor_.shape[last] == columns &&
           tensor_.shape[last - 1] == bound.stream.rows() && (columns == 1 || tensor_.strides[last] == 1);
  }

  bool is_chunk() const { return tensor_.ndim == 3; }
  int64_t steps() const { return is_chunk() ? tensor_.shape[0] : 1; }
  char* begin() const { return static_cast<char*>(tensor_.data) + tensor_.byte_offset; }
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
  // Whether it can take what is made of `x`.
  bool goes_with(const View& x) const {
    const bool apart = x.steps() == 0 || end() <= x.begin() || x.end() <= begin();
    return is_chunk() == x.is_chunk() && steps() == x.steps() && is_contiguous() && apart;
  }
  Sequence sequence() const {
    constexpr int64_t kItem = sizeof(float);
    const int64_t step = is_chunk() ? tensor_.strides[0] * kItem : 0;
    return {begin(), DType::kFloat32, step, tensor_.strides[tensor_.ndim - 2] * kItem};
  }

 private:
  dlpack::Tensor tensor_;
};

// Memory of a tensor that torch is given: all in one allocation, as this is done at every step.
struct Output {
  dlpack::ManagedTensor managed;
  int64_t shape[3];
  int64_t strides[3];
  alignas(kAlign) float values[1];
};

// A new object, a tensor of the shape that goes with `x`; null with a Python error.
PyObject* new_output(const BoundStream& bound, const View& x) {
  const int64_t rows = bound.stream.rows(), columns = bound.stream.sizes().hidden_size;
  const size_t items = x.steps() * rows * columns;
  auto* output = new (allocate(sizeof(Output) + items * sizeof(float)).release()) Output;
  output->shape[0] = x.steps(), output->shape[1] = rows, output->shape[2] = columns;
  output->strides[0] = rows * columns, output->strides[1] = columns, output->strides[2] = 1;
  const auto give_back = [](dlpack::ManagedTensor* self) { AlignedDelete()(reinterpret_cast<char*>(self)); };
  const int first = x.is_chunk() ? 0 : 1;
  output->managed = {dlpack::kVersion,
                     nullptr,
                     give_back,
                     0,
                     {output->values, dlpack::kCpu, 0, 3 - first, dlpack::kFloat, 32, 1, output->shape + first,
                      output->strides + first, 0}};
  void* object = nullptr;
  if (bound.api->object_from_managed(&output->managed, &object) != 0) {
    give_back(&output->managed);
    return nullptr;
  }
  return static_cast<PyObject*>(object);
}

PyObject* fail(const std::exception& error) {
  PyErr_Format(PyExc_RuntimeError, "torch_lstm_quant: %s", error.what());
  return nullptr;
}

void destroy(PyObject* capsule) {
  delete static_cast<BoundStream*>(PyCapsule_GetPointer(capsule, kBoundName));
}

// bind(packed, address, size, rows, exchange_api)
PyObject* bind(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 5) return PyErr_Format(PyExc_TypeError, "needs 5 arguments, got %zd", count);
  const void* address = PyLong_AsVoidPtr(args[1]);
  const size_t bytes = PyLong_AsSize_t(args[2]);
  const long long rows = PyLong_AsLongLong(args[3]);
  const auto* api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(args[4], dlpack::kCapsuleName));
  if (PyErr_Occurred() != nullptr) return nullptr;
  if (api->version.major != dlpack::kVersion.major || api->tensor_from_object == nullptr) {
    return PyErr_Format(PyExc_RuntimeError, "a Stream needs version %u of DLPack's exchange API, this torch has %u",
                        dlpack::kVersion.major, api->version.major);
  }
  try {
    auto bound = std::unique_ptr<BoundStream>(
        new BoundStream{Reference(args[0]), api, {address, bytes, active_kernels(), rows}});
    PyObject* capsule = PyCapsule_New(bound.get(), kBoundName, destroy);
    if (capsule != nullptr) bound.release();
    return capsule;
  } catch (const std::exception& error) {
    return fail(error);
  }
}

void go_on(Stream& stream, const View& x, const View& out) {
  TorchParallel parallel;
  const Sizes& sizes = stream.sizes();
  const auto work = static_cast<double>(x.steps() * stream.rows() * kGates * sizes.hidden_size) *
                    static_cast<double>(sizes.depth(0) + sizes.hidden_size * (2 * sizes.num_layers - 1));
  PyThreadState* released = work > kLongWork ? PyEval_SaveThread() : nullptr;
  stream.run(parallel, x.steps(), x.sequence(), reinterpret_cast<float*>(out.begin()));
  if (released != nullptr) PyEval_RestoreThread(released);
}

// run(bound, x, out or None) -> out or a new tensor; None: x and out are not what it takes.
PyObject* run(PyObject*, PyObject* const* args, Py_ssize_t count) {
  BoundStream* bound = bound_stream(args, count, 3);
  if (bound == nullptr) return nullptr;
  const Use use(*bound);
  if (!use.mine()) return nullptr;
  View x, out;
  if (!x.open(*bound, args[1], bound->stream.sizes().input_size)) Py_RETURN_NONE;
  const bool is_new = args[2] == Py_None;
  try {
    Reference result(is_new ? new_output(*bound, x) : args[2], is_new);
    if (result.get() == nullptr) return nullptr;
    const bool fits = out.open(*bound, result.get(), bound->stream.sizes().hidden_size) && out.goes_with(x);
    if (!fits) Py_RETURN_NONE;
    go_on(bound->stream, x, out);
    return result.release();
  } catch (const std::exception& error) {
    return fail(error);
  }
}

// reset(bound, address of hx or 0, address of cx or 0)
PyObject* reset(PyObject*, PyObject* const* args, Py_ssize_t count) {
  BoundStream* bound = bound_stream(args, count, 3);
  if (bound == nullptr) return nullptr;
  const auto* hx = static_cast<const float*>(PyLong_AsVoidPtr(args[1]));
  const auto* cx = static_cast<const float*>(PyLong_AsVoidPtr(args[2]));
  const Use use(*bound);
  if (!use.mine() || PyErr_Occurred() != nullptr) return nullptr;
  bound->stream.reset(hx, cx);
  Py_RETURN_NONE;
}

// copy_state(bound, address of h_n, address of c_n)
PyObject* copy_state(PyObject*, PyObject* const* args, Py_ssize_t count) {
  BoundStream* bound = bound_stream(args, count, 3);
  if (bound == nullptr) return nullptr;
  auto* h_n = static_cast<float*>(PyLong_AsVoidPtr(args[1]));
  auto* c_n = static_cast<float*>(PyLong_AsVoidPtr(args[2]));
  const Use use(*bound);
  if (!use.mine() || PyErr_Occurred() != nullptr) return nullptr;
  bound->stream.copy_state(h_n, c_n);
  Py_RETURN_NONE;
}

template <PyObject* (*kFunction)(PyObject*, PyObject* const*, Py_ssize_t)>
PyMethodDef method(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(kFunction)), METH_FASTCALL, nullptr};
}

PyMethodDef methods[] = {method<bind>("bind"),
                         method<run>("run"),
                         method<reset>("reset"),
                         method<copy_state>("copy_state"),
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_stream", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace lstm_quant

PyMODINIT_FUNC PyInit__stream() {
  return PyModule_Create(&lstm_quant::module);
}
