// The operators as torch sees them: schemas, checks, allocation. Beside torch_parallel.h the only file that includes
// torch, through its stable ABI, so that one build serves every torch from 2.10 on.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "blob.h"
#include "dispatch.h"
#include "lengths.h"
#include "lstm.h"
#include "memory.h"
#include "pack.h"
#include "torch_parallel.h"

namespace lstm_quant {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using Shape = std::initializer_list<int64_t>;

template <class... Words>
[[noreturn]] void fail(const Words&... words) {
  std::ostringstream message;
  (message << ... << words);
  throw std::runtime_error("torch_lstm_quant: " + message.str());
}

template <class... Words>
void check(bool holds, const Words&... words) {
  if (!holds) fail(words...);
}

template <class Sizes>
std::string to_string(const Sizes& sizes) {
  std::string text;
  for (int64_t size : sizes) text += (text.empty() ? "[" : ", ") + std::to_string(size);
  return text.empty() ? "[]" : text + "]";
}

// Null unless a dtype that the core knows.
std::optional<DType> to_dtype(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Byte:
      return DType::kUint8;
    case ScalarType::Char:
      return DType::kInt8;
    case ScalarType::Short:
      return DType::kInt16;
    case ScalarType::Int:
      return DType::kInt32;
    default:
      return std::nullopt;
  }
}

// As Python names it.
const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

DType dtype_of(const char* name, const Tensor& tensor) {
  const auto dtype = to_dtype(tensor.scalar_type());
  check(dtype.has_value(), name, " must be float32, uint8, int8, int16 or int32, got ", name_of(tensor.scalar_type()));
  return *dtype;
}

void check_tensor(const char* name, const Tensor& tensor, Shape shape) {
  check(tensor.is_cpu(), name, " must be on the CPU");
  const auto sizes = tensor.sizes();
  if (!std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end())) {
    fail(name, " must be ", to_string(shape), ", got ", to_string(sizes));
  }
}

// `tensor` as a contiguous array of T, kept alive by `tensor` itself.
template <class T>
const T* contiguous_data(const char* name, Tensor& tensor, ScalarType type, Shape shape) {
  check_tensor(name, tensor, shape);
  check(tensor.scalar_type() == type, name, " must be ", name_of(type), ", got ", name_of(tensor.scalar_type()));
  if (!tensor.is_contiguous()) tensor = torch::stable::contiguous(tensor);
  return static_cast<const T*>(tensor.const_data_ptr());
}

// A contiguous CPU tensor, straight from the C shim: torch::stable::empty looks its operator up by name at every call.
template <size_t kDims>
Tensor empty(const std::array<int64_t, kDims>& sizes, ScalarType type) {
  std::array<int64_t, kDims> strides;
  bool overflows = false;
  strides[kDims - 1] = 1;
  for (size_t i = kDims - 1; i > 0; --i) {
    overflows |= __builtin_mul_overflow(strides[i], std::max<int64_t>(sizes[i], 1), &strides[i - 1]);
  }
  AtenTensorHandle handle = nullptr;
  if (overflows || aoti_torch_empty_strided(kDims, sizes.data(), strides.data(),
                                            torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
                                            aoti_torch_device_type_cpu(), 0, &handle) != AOTI_TORCH_SUCCESS) {
    fail("cannot allocate a result of size ", to_string(sizes));
  }
  return Tensor(handle);
}

// `bias`: null for none.
MatrixSource matrix_source(const char* name, Tensor& weight, Tensor* bias, Tensor& scale, Tensor& zero_point,
                           int64_t rows, int64_t depth) {
  MatrixSource source;
  source.depth = depth;
  if (bias != nullptr) source.bias = contiguous_data<float>("bias", *bias, ScalarType::Float, {rows});
  if (weight.scalar_type() == ScalarType::Float) {
    source.float_weights = contiguous_data<float>(name, weight, ScalarType::Float, {rows, depth});
    return source;
  }
  check(weight.scalar_type() == ScalarType::Char, name, " must be float32 or int8, got ",
        name_of(weight.scalar_type()));
  source.int8_weights = contiguous_data<int8_t>(name, weight, ScalarType::Char, {rows, depth});
  source.scales = contiguous_data<float>("weight scale", scale, ScalarType::Float, {rows});
  source.zero_points = contiguous_data<int32_t>("weight zero point", zero_point, ScalarType::Int, {rows});
  return source;
}

Tensor pack(std::vector<Tensor> weights, std::vector<Tensor> biases, std::vector<Tensor> weight_scales,
            std::vector<Tensor> weight_zero_points, std::vector<Tensor> grids, std::vector<Tensor> tables,
            int64_t num_directions) {
  const size_t cells = grids.size();
  check(cells > 0 && (num_directions == 1 || num_directions == 2) && cells % num_directions == 0,
        "needs at least one cell and 1 or 2 directions, got ", cells, " cells and num_directions=", num_directions);
  // a third weight, weight_hr, projects the hidden state
  const size_t each = weights.size() == 3 * cells ? 3 : 2;
  for (const auto* list : {&weights, &weight_scales, &weight_zero_points}) {
    check(list->size() == each * cells, "needs two weights, scales and zero points for each of ", cells,
          " cells, or three where hidden states are projected, got ", list->size());
  }
  check(biases.size() == 2 * cells, "needs two biases for each of ", cells, " cells, got ", biases.size());
  check(tables.size() == (kGates + 1) * cells, "needs five tables for each of ", cells, " cells, got ", tables.size());
  for (const Tensor& weight : weights) check(weight.dim() == 2, "weights must have two dimensions");

  const bool projects = each == 3;
  const Sizes sizes{weights[0].size(1), projects ? weights[2].size(1) : weights[1].size(1),
                    static_cast<int64_t>(cells) / num_directions, num_directions, projects ? weights[2].size(0) : 0};
  check(0 < sizes.input_size && sizes.input_size <= kMaxSize && 0 < sizes.hidden_size &&
            sizes.hidden_size <= kMaxSize && sizes.num_layers <= kMaxLayers && 0 < sizes.h_size() &&
            sizes.h_size() <= kMaxSize,
        "sizes out of range: input_size=", sizes.input_size, ", hidden_size=", sizes.hidden_size,
        ", proj_size=", sizes.proj_size);
  std::vector<CellSource> sources(cells);
  for (size_t i = 0; i < cells; ++i) {
    const auto matrix = [&](const char* name, size_t index, Tensor* bias, int64_t rows, int64_t depth) {
      const size_t place = each * i + index;
      return matrix_source(name, weights[place], bias, weight_scales[place], weight_zero_points[place], rows, depth);
    };
    CellSource& source = sources[i];
    const int64_t gates = kGates * sizes.hidden_size;
    source.input = matrix("weight_ih", 0, &biases[2 * i], gates, sizes.depth(i / num_directions));
    source.hidden = matrix("weight_hh", 1, &biases[2 * i + 1], gates, sizes.h_size());
    if (projects) source.hy = matrix("weight_hr", 2, nullptr, sizes.proj_size, sizes.hidden_size);
    check(grids[i].dim() == 2, "grids must have two dimensions");
    source.grid_rows = grids[i].size(0);
    source.grids = contiguous_data<double>("grids", grids[i], ScalarType::Double, {source.grid_rows, 5});
    for (int f = 0; f <= kGates; ++f) {
      Tensor& table = tables[i * (kGates + 1) + f];
      source.tables[f] = {contiguous_data<float>("table", table, ScalarType::Float, {table.numel()}), table.numel()};
    }
  }
  const Packer packer(sizes, std::move(sources));
  const Tensor blob = torch::stable::empty({static_cast<int64_t>(packer.bytes())}, ScalarType::Byte);
  advise_huge_pages(blob.mutable_data_ptr(), packer.bytes());
  packer.write(static_cast<uint8_t*>(blob.mutable_data_ptr()));
  return blob;
}

// The blob's bytes, aligned as kernels need them: what torch allocates is, but a view or a mapped file may not be.
Blob open_blob(Tensor& packed) {
  check_tensor("packed", packed, {packed.numel()});
  check(packed.scalar_type() == ScalarType::Byte, "packed must be uint8, got ", name_of(packed.scalar_type()));
  if (!packed.is_contiguous() || reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % kAlign != 0) {
    packed = torch::stable::clone(packed);
  }
  return Blob(packed.const_data_ptr(), packed.numel());
}

Sequence open_sequence(Tensor& x, int64_t input_size, bool packed_rows) {
  if (packed_rows) {
    check(x.dim() == 2, "x must have two dimensions [rows of all steps, input_size] with batch_sizes, got ", x.dim());
    check_tensor("x", x, {x.size(0), input_size});
  } else {
    check(x.dim() == 3, "x must have three dimensions [T, B, input_size], got ", x.dim());
    check_tensor("x", x, {x.size(0), x.size(1), input_size});
  }
  const DType dtype = dtype_of("x", x);
  if (input_size > 1 && x.stride(x.dim() - 1) != 1) x = torch::stable::contiguous(x);
  const auto item = static_cast<int64_t>(item_bytes(dtype));
  return {x.const_data_ptr(), dtype, packed_rows ? 0 : x.stride(0) * item, x.stride(x.dim() - 2) * item};
}

// Null where all rows have all steps.
std::optional<Lengths> open_lengths(std::optional<Tensor>& batch_sizes, std::optional<Tensor>& lengths,
                                    const Tensor& x) {
  check(!batch_sizes.has_value() || !lengths.has_value(), "takes batch_sizes or lengths, got both");
  if (batch_sizes.has_value()) {
    const int64_t steps = batch_sizes->numel();
    return Lengths::of_packed(contiguous_data<int64_t>("batch_sizes", *batch_sizes, ScalarType::Long, {steps}), steps,
                              x.size(0));
  }
  if (lengths.has_value()) {
    const int64_t rows = x.size(1);
    return Lengths::of_padded(contiguous_data<int64_t>("lengths", *lengths, ScalarType::Long, {rows}), rows, x.size(0));
  }
  return std::nullopt;
}

// Data and dtype of a state, null if there is none.
std::pair<const void*, DType> open_state(const char* name, std::optional<Tensor>& state, Shape shape) {
  if (!state.has_value()) return {nullptr, DType::kFloat32};
  check_tensor(name, *state, shape);
  if (!state->is_contiguous()) state = torch::stable::contiguous(*state);
  return {state->const_data_ptr(), dtype_of(name, *state)};
}

std::tuple<Tensor, Tensor, Tensor> lstm(Tensor x, std::optional<Tensor> hx, std::optional<Tensor> cx, Tensor packed,
                                        int64_t hidden_size, int64_t num_layers, int64_t num_directions,
                                        std::optional<ScalarType> h_dtype, std::optional<ScalarType> c_dtype,
                                        std::optional<Tensor> batch_sizes, std::optional<Tensor> lengths,
                                        int64_t proj_size) {
  const Blob blob = open_blob(packed);
  const Sizes& sizes = blob.sizes();
  check(sizes.hidden_size == hidden_size && sizes.num_layers == num_layers && sizes.num_directions == num_directions &&
            sizes.proj_size == proj_size,
        "packed holds hidden_size=", sizes.hidden_size, ", num_layers=", sizes.num_layers,
        ", num_directions=", sizes.num_directions, ", proj_size=", sizes.proj_size, ", got ", hidden_size, ", ",
        num_layers, ", ", num_directions, ", ", proj_size);
  const ScalarType h_type = h_dtype.value_or(ScalarType::Float), c_type = c_dtype.value_or(ScalarType::Float);
  check(to_dtype(h_type).has_value() && to_dtype(c_type).has_value(),
        "h_dtype and c_dtype must be None, float32, uint8, int8, int16 or int32, got ", name_of(h_type), " and ",
        name_of(c_type));

  Call call{};
  call.x = open_sequence(x, sizes.input_size, batch_sizes.has_value());
  const std::optional<Lengths> row_lengths = open_lengths(batch_sizes, lengths, x);
  call.lengths = row_lengths.has_value() ? &*row_lengths : nullptr;
  call.steps = call.lengths != nullptr ? call.lengths->steps() : x.size(0);
  call.rows = call.lengths != nullptr ? call.lengths->rows() : x.size(1);
  std::tie(call.hx, call.hx_dtype) = open_state("hx", hx, {sizes.cells(), call.rows, sizes.h_size()});
  std::tie(call.cx, call.cx_dtype) = open_state("cx", cx, {sizes.cells(), call.rows, hidden_size});
  const int64_t width = num_directions * sizes.h_size();
  const Tensor output =
      batch_sizes.has_value() ? empty<2>({x.size(0), width}, h_type) : empty<3>({x.size(0), x.size(1), width}, h_type);
  const Tensor h_n = empty<3>({sizes.cells(), call.rows, sizes.h_size()}, h_type);
  const Tensor c_n = empty<3>({sizes.cells(), call.rows, hidden_size}, c_type);
  call.output = output.mutable_data_ptr();
  call.h_n = h_n.mutable_data_ptr();
  call.c_n = c_n.mutable_data_ptr();
  call.h_dtype = *to_dtype(h_type);
  call.c_dtype = *to_dtype(c_type);
  if (lengths.has_value()) {
    const auto row_bytes = static_cast<int64_t>(width * item_bytes(call.h_dtype));
    row_lengths->clear_padding(call.output, x.size(0), row_bytes);
  }
  TorchParallel parallel;
  run_lstm(blob, active_kernels(), parallel, call);
  return {output, h_n, c_n};
}

const char* name_of(Sums sums) {
  switch (sums) {
    case Sums::kInt8:
      return "int8";
    case Sums::kWide:
      return "wide";
    case Sums::kFloat:
      return "float";
  }
  return "unknown";
}

// How the input and the hidden projection of each cell are summed, and that of the hidden state where there is one.
std::string sums(Tensor packed) {
  const Blob blob = open_blob(packed);
  std::string names;
  for (int64_t i = 0; i < blob.sizes().cells(); ++i) {
    const BoundCell bound = blob.cell(i);
    names += (names.empty() ? "" : "; ") + std::string(name_of(bound.cell.input.sums)) + ", " +
             name_of(bound.cell.hidden.sums);
    if (bound.projects()) names += std::string(", ") + name_of(bound.hy.sums);
  }
  return names;
}

std::string isa_active() {
  return active_kernels().kernels.name;
}
std::string isas_built() {
  return names(built_kernels());
}
std::string isas_usable() {
  return names(usable_kernels());
}

STABLE_TORCH_LIBRARY(torch_lstm_quant, m) {
  m.def(
      "pack(Tensor[] weights, Tensor[] biases, Tensor[] weight_scales, Tensor[] weight_zero_points, Tensor[] grids, "
      "Tensor[] tables, int num_directions) -> Tensor");
  m.def(
      "lstm(Tensor x, Tensor? hx, Tensor? cx, Tensor packed, int hidden_size, int num_layers, int num_directions, "
      "ScalarType? h_dtype=None, ScalarType? c_dtype=None, Tensor? batch_sizes=None, Tensor? lengths=None, "
      "int proj_size=0) -> (Tensor output, Tensor h_n, Tensor c_n)");
  m.def("sums(Tensor packed) -> str");
  m.def("isa_active() -> str");
  m.def("isas_built() -> str");
  m.def("isas_usable() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(torch_lstm_quant, CPU, m) {
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("lstm", TORCH_BOX(&lstm));
  m.impl("sums", TORCH_BOX(&sums));
}

STABLE_TORCH_LIBRARY_IMPL(torch_lstm_quant, CompositeImplicitAutograd, m) {
  m.impl("isa_active", TORCH_BOX(&isa_active));
  m.impl("isas_built", TORCH_BOX(&isas_built));
  m.impl("isas_usable", TORCH_BOX(&isas_usable));
}

}  // namespace
}  // namespace lstm_quant
