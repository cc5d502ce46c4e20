// torch_lstm_quant._direct: calls that go around torch's dispatcher. A step of a small LSTM takes a microsecond; the
// dispatcher takes four, and each few attributes of a tensor that Python reads one more. So tensors are taken as they
// come, and what a function does not take it leaves to Python, by returning None: Python has the words to refuse it.
#include <Python.h>

#include <atomic>
#include <memory>
#include <vector>

#include "dispatch.h"
#include "dlpack.h"
#include "lstm.h"
#include "python_call.h"
#include "python_rows.h"
#include "python_tensor.h"
#include "stream.h"
#include "torch_parallel.h"

namespace lstm_quant {
namespace {

constexpr const char* kLayersName = "torch_lstm_quant.layers";

// What a blob is opened with.
struct Bound {
  Reference packed;  // keeps the blob, unless its storage is given other memory: then it must be bound anew
  const dlpack::ExchangeApi& api;
};

struct BoundLayers : Bound {
  Blob blob;
};

struct BoundStream : Bound {
  Stream stream;
  std::vector<int64_t> numbers = std::vector<int64_t>(stream.rows());  // a copy: who gave them may change them
  std::atomic<bool> used{false};

  // The rows that a call is for; None: all. False, and no Python error, where they are not numbers of rows, each once.
  bool choose(PyObject* object, ChosenRows& rows) {
    rows = stream.all_rows();
    if (object == Py_None) return true;
    rows = {numbers.data(), read_rows(api, object, stream.rows(), numbers.data())};
    return rows.count >= 0 && stream.has(rows);
  }
};

// What Python's Stream derives from.
struct StreamObject {
  PyObject object;
  BoundStream* bound;  // null until _bind()
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

// Of the args of a function that takes (packed, address, size, exchange_api, ...).
struct Packed {
  const void* data;
  size_t bytes;
  const dlpack::ExchangeApi* api;

  // False with a Python error.
  bool open(PyObject* const* args, Py_ssize_t count, Py_ssize_t needed) {
    if (!has_count(count, needed)) return false;
    data = PyLong_AsVoidPtr(args[1]);
    bytes = PyLong_AsSize_t(args[2]);
    api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(args[3], dlpack::kCapsuleName));
    if (PyErr_Occurred() != nullptr) return false;
    if (reinterpret_cast<uintptr_t>(data) % kAlign != 0) {
      PyErr_Format(PyExc_RuntimeError, "torch_lstm_quant: packed cells must start at a multiple of %zu bytes", kAlign);
      return false;
    }
    if (api->version.major == dlpack::kVersion.major && api->tensor_from_object != nullptr) return true;
    PyErr_Format(PyExc_RuntimeError, "torch_lstm_quant needs version %u of DLPack's exchange API, this torch has %u",
                 dlpack::kVersion.major, api->version.major);
    return false;
  }
};

// bind_layers(packed, address, size, exchange_api)
PyObject* bind_layers(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Packed packed;
  if (!packed.open(args, count, 4)) return nullptr;
  return guarded([&] {
    auto bound = std::unique_ptr<BoundLayers>(
        new BoundLayers{{Reference(args[0]), *packed.api}, Blob(packed.data, packed.bytes)});
    PyObject* capsule = PyCapsule_New(bound.get(), kLayersName, [](PyObject* self) {
      delete static_cast<BoundLayers*>(PyCapsule_GetPointer(self, kLayersName));
    });
    if (capsule != nullptr) bound.release();
    return capsule;
  });
}

// What lstm() and lstm_cell() are given: (layers, x, hx or None, cx or None), tensors of the caller's.
struct LayersCall {
  const BoundLayers* bound;
  PyTensor x;
  const void* states[2] = {};

  // False with a Python error, or without where these functions do not take it. All tensors are chunks, or none is.
  bool open(PyObject* const* args, Py_ssize_t count, bool is_chunk) {
    if (!has_count(count, 4)) return false;
    bound = static_cast<const BoundLayers*>(PyCapsule_GetPointer(args[0], kLayersName));
    if (bound == nullptr) return false;
    const Sizes& sizes = bound->blob.sizes();
    if (!x.open(bound->api, args[1]) || x.is_chunk() != is_chunk || x.columns() != sizes.input_size || x.steps() == 0 ||
        x.rows() == 0 || (!is_chunk && sizes.cells() != 1)) {
      return false;
    }
    const int64_t columns[] = {sizes.h_size(), sizes.hidden_size};
    for (int i = 0; i < 2; ++i) {
      PyTensor state;
      if (args[2 + i] == Py_None) continue;
      if (!state.open(bound->api, args[2 + i], x.rows(), columns[i]) || state.is_chunk() != is_chunk ||
          state.steps() != sizes.cells() || !state.is_contiguous()) {
        return false;
      }
      states[i] = state.begin();
    }
    return true;
  }

  void run(float* output, float* h_n, float* c_n) const {
    TorchParallel parallel;
    const ReleasedGil released(bound->blob.sizes(), x.steps(), x.rows());
    run_lstm(bound->blob, active_kernels(), parallel,
             {x.steps(), x.rows(), x.sequence(), states[0], DType::kFloat32, states[1], DType::kFloat32, output, h_n,
              DType::kFloat32, c_n, DType::kFloat32});
  }
};

// After LayersCall::open() gave false.
PyObject* not_taken() {
  if (PyErr_Occurred() != nullptr) return nullptr;
  Py_RETURN_NONE;
}

// lstm(layers, x, hx or None, cx or None) -> (output, h_n, c_n)
PyObject* lstm(PyObject*, PyObject* const* args, Py_ssize_t count) {
  LayersCall call;
  if (!call.open(args, count, true)) return not_taken();
  const Sizes& sizes = call.bound->blob.sizes();
  return guarded([&]() -> PyObject* {
    float *output_values = nullptr, *h_values = nullptr, *c_values = nullptr;
    const auto make = [&](int64_t first, int64_t last, float*& values) {
      return Reference(new_tensor(call.bound->api, {first, call.x.rows(), last}, values), true);
    };
    const Reference output = make(call.x.steps(), sizes.num_directions * sizes.h_size(), output_values);
    const Reference h_n = make(sizes.cells(), sizes.h_size(), h_values);
    const Reference c_n = make(sizes.cells(), sizes.hidden_size, c_values);
    if (output.get() == nullptr || h_n.get() == nullptr || c_n.get() == nullptr) return nullptr;
    call.run(output_values, h_values, c_values);
    return PyTuple_Pack(3, output.get(), h_n.get(), c_n.get());
  });
}

// lstm_cell(layers, x, hx or None, cx or None) -> (h, c), of one cell and for one step: [rows, size] each
PyObject* lstm_cell(PyObject*, PyObject* const* args, Py_ssize_t count) {
  LayersCall call;
  if (!call.open(args, count, false)) return not_taken();
  return guarded([&]() -> PyObject* {
    float *h_values = nullptr, *c_values = nullptr;
    const Sizes& sizes = call.bound->blob.sizes();
    const auto make = [&](int64_t size, float*& values) {
      return Reference(new_tensor(call.bound->api, {call.x.rows(), size}, values), true);
    };
    const Reference h = make(sizes.h_size(), h_values), c = make(sizes.hidden_size, c_values);
    if (h.get() == nullptr || c.get() == nullptr) return nullptr;
    call.run(h_values, nullptr, c_values);  // the output of the only step is the hidden state
    return PyTuple_Pack(2, h.get(), c.get());
  });
}

// The stream of a StreamObject; null with a Python error before it is bound.
BoundStream* bound_in(PyObject* self) {
  BoundStream* bound = reinterpret_cast<StreamObject*>(self)->bound;
  if (bound == nullptr)
    PyErr_SetString(PyExc_RuntimeError, "torch_lstm_quant: this Stream has no LSTM yet: call Stream.__init__(module)");
  return bound;
}

// _bind(packed, address, size, exchange_api, rows), once
PyObject* bind_stream(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  auto& object = *reinterpret_cast<StreamObject*>(self);
  Packed packed;
  if (!packed.open(args, count, 5)) return nullptr;
  const long long rows = PyLong_AsLongLong(args[4]);
  if (PyErr_Occurred() != nullptr) return nullptr;
  if (object.bound != nullptr)
    return PyErr_Format(PyExc_RuntimeError, "torch_lstm_quant: this Stream has its LSTM already: make another Stream");
  return guarded([&] {
    object.bound =
        new BoundStream{{Reference(args[0]), *packed.api}, {packed.data, packed.bytes, active_kernels(), rows}};
    return Reference(Py_None).release();
  });
}

void delete_stream(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  delete reinterpret_cast<StreamObject*>(self)->bound;
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
  Py_DECREF(type);
}

// Whether `out` can take what is made of `x`.
bool goes_with(const PyTensor& out, const PyTensor& x) {
  if (out.is_chunk() != x.is_chunk() || out.steps() != x.steps()) return false;
  if (x.steps() == 0 || x.rows() == 0) return true;  // without items there is nothing to overlap
  return out.is_contiguous() && (out.end() <= x.begin() || x.end() <= out.begin());
}

// Feeds the stream's rows, and gives `out_object` or, where that is None, a new tensor; None if it does not take them.
PyObject* feed(PyObject* self, PyObject* x_object, PyObject* out_object, PyObject* rows_object) {
  BoundStream* bound = bound_in(self);
  if (bound == nullptr) return nullptr;
  const Use use(*bound);
  if (!use.mine()) return nullptr;
  Stream& stream = bound->stream;
  const int64_t columns = stream.sizes().h_size();
  ChosenRows rows;
  PyTensor x, out;
  if (!bound->choose(rows_object, rows)) Py_RETURN_NONE;
  if (!x.open(bound->api, x_object, rows.count, stream.sizes().input_size)) Py_RETURN_NONE;
  return guarded([&]() -> PyObject* {
    float* values = nullptr;
    Reference result(out_object);
    if (out_object != Py_None) {
      if (!out.open(bound->api, out_object, rows.count, columns) || !goes_with(out, x)) Py_RETURN_NONE;
      values = reinterpret_cast<float*>(out.begin());
    } else {
      result.take(x.is_chunk() ? new_tensor(bound->api, {x.steps(), rows.count, columns}, values)
                               : new_tensor(bound->api, {rows.count, columns}, values));
      if (result.get() == nullptr) return nullptr;
    }
    TorchParallel parallel;
    {
      const ReleasedGil released(stream.sizes(), x.steps(), rows.count);
      stream.run(parallel, x.steps(), x.sequence(), values, rows);
    }
    return result.release();
  });
}

// stream(x, out=None, *, rows=None): what _run() does not take goes to the method _run_unusual(x, out, rows).
PyObject* call_stream(PyObject* self, PyObject* args, PyObject* keywords) {
  PyObject *x = nullptr, *out = Py_None, *rows = Py_None;
  if (keywords == nullptr) {  // without parsing, which takes a tenth of a microsecond
    if (PyArg_UnpackTuple(args, "Stream", 1, 2, &x, &out) == 0) return nullptr;
  } else {
    static const char* const names[] = {"x", "out", "rows", nullptr};
    if (PyArg_ParseTupleAndKeywords(args, keywords, "O|O$O:Stream", const_cast<char**>(names), &x, &out, &rows) == 0)
      return nullptr;
  }
  PyObject* y = feed(self, x, out, rows);
  if (y != Py_None) return y;
  Py_DECREF(y);
  return PyObject_CallMethod(self, "_run_unusual", "OOO", x, out, rows);
}

// _run(x, out or None, rows or None)
PyObject* run_stream(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  return has_count(count, 3) ? feed(self, args[0], args[1], args[2]) : nullptr;
}

// Does `action` on a stream, two addresses of states, with how many float32 each has, and the rows that they are of.
template <class Action>
PyObject* with_states(PyObject* self, PyObject* const* args, Py_ssize_t count, const Action& action) {
  BoundStream* bound = bound_in(self);
  if (bound == nullptr || !has_count(count, 5)) return nullptr;
  auto* h = static_cast<float*>(PyLong_AsVoidPtr(args[0]));
  auto* c = static_cast<float*>(PyLong_AsVoidPtr(args[1]));
  const long long h_values = PyLong_AsLongLong(args[2]), c_values = PyLong_AsLongLong(args[3]);
  const Use use(*bound);
  if (!use.mine() || PyErr_Occurred() != nullptr) return nullptr;
  ChosenRows rows;
  if (!bound->choose(args[4], rows))
    return PyErr_Format(PyExc_RuntimeError, "torch_lstm_quant: rows must be of the stream, each once");
  // Python's attributes can be set to other sizes
  const Sizes& sizes = bound->stream.sizes();
  const long long states = sizes.cells() * rows.count;
  const long long h_needed = states * sizes.h_size(), c_needed = states * sizes.hidden_size;
  if (h_values != h_needed || c_values != c_needed) {
    return PyErr_Format(PyExc_RuntimeError,
                        "torch_lstm_quant: the stream's states have %lld and %lld values, got %lld and %lld", h_needed,
                        c_needed, h_values, c_values);
  }
  action(bound->stream, h, c, rows);
  Py_RETURN_NONE;
}

// _set_state(address of hx or 0, address of cx or 0, values of hx, values of cx, rows or None)
PyObject* set_state(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  return with_states(self, args, count, [](Stream& stream, const float* hx, const float* cx, const ChosenRows& rows) {
    stream.reset(hx, cx, rows);
  });
}

// _copy_state(address of h_n, address of c_n, values of h_n, values of c_n, rows or None)
PyObject* copy_state(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  return with_states(self, args, count, [](Stream& stream, float* h_n, float* c_n, const ChosenRows& rows) {
    stream.copy_state(h_n, c_n, rows);
  });
}

template <PyObject* (*kFunction)(PyObject*, PyObject* const*, Py_ssize_t)>
PyMethodDef method(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(kFunction)), METH_FASTCALL, nullptr};
}

PyMethodDef stream_methods[] = {
    method<bind_stream>("_bind"),      method<run_stream>("_run"),     method<set_state>("_set_state"),
    method<copy_state>("_copy_state"), {nullptr, nullptr, 0, nullptr},
};
PyType_Slot stream_slots[] = {
    {Py_tp_methods, stream_methods},
    {Py_tp_call, reinterpret_cast<void*>(call_stream)},
    {Py_tp_dealloc, reinterpret_cast<void*>(delete_stream)},
    {0, nullptr},
};
PyType_Spec stream_type = {"torch_lstm_quant._direct.Stream", sizeof(StreamObject), 0,
                           Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, stream_slots};

PyMethodDef functions[] = {
    method<bind_layers>("bind_layers"),
    method<lstm>("lstm"),
    method<lstm_cell>("lstm_cell"),
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_direct", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace lstm_quant

PyMODINIT_FUNC PyInit__direct() {
  using lstm_quant::Reference;
  Reference module(PyModule_Create(&lstm_quant::definition), true);
  const Reference type(PyType_FromSpec(&lstm_quant::stream_type), true);
  if (module.get() == nullptr || type.get() == nullptr) return nullptr;
  if (PyModule_AddObjectRef(module.get(), "Stream", type.get()) != 0) return nullptr;
  return module.release();
}
