#include "convert.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

namespace lstm_quant {
namespace {

// Calls visit with a value of the C++ type of `dtype`.
template <class Visit>
void with_type(DType dtype, Visit visit) {
  switch (dtype) {
    case DType::kFloat32:
      return visit(float{});
    case DType::kUint8:
      return visit(uint8_t{});
    case DType::kInt8:
      return visit(int8_t{});
    case DType::kInt16:
      return visit(int16_t{});
    case DType::kInt32:
      return visit(int32_t{});
  }
}

float to_steps(float v, const Grid& grid) {
  const float scaled = v * grid.inv_scale;
  const float above = scaled > grid.low ? scaled : grid.low;             // NaN too
  return std::nearbyintf(above < grid.high ? above : grid.high) + 0.0f;  // no -0.0
}

template <class Integer, class = std::enable_if_t<std::is_integral_v<Integer>>>
float to_steps(Integer q, const Grid& grid) {
  const int64_t low = grid.zero_point + static_cast<int64_t>(grid.low);
  const int64_t high = grid.zero_point + static_cast<int64_t>(grid.high);
  return static_cast<float>(std::clamp<int64_t>(q, low, high) - grid.zero_point);
}

}  // namespace

size_t item_bytes(DType dtype) {
  size_t bytes = 0;
  with_type(dtype, [&](auto item) { bytes = sizeof item; });
  return bytes;
}

size_t operand_item_bytes(Sums sums) {
  return sums == Sums::kInt8 ? sizeof(uint8_t) : sizeof(float);
}

void to_operand(const Kernels& kernels, Sums sums, const Grid& grid, const void* values, DType dtype, size_t count,
                void* operand) {
  if (sums == Sums::kInt8 && dtype == DType::kFloat32) {
    return kernels.quantize(grid, static_cast<const float*>(values), count, static_cast<uint8_t*>(operand));
  }
  if (sums == Sums::kFloat) {
    to_floats(grid, values, dtype, count, static_cast<float*>(operand));
    return put_on_grid(grid, count, static_cast<float*>(operand));
  }
  with_type(dtype, [&](auto item) {
    const auto* from = static_cast<const decltype(item)*>(values);
    for (size_t i = 0; i < count; ++i) {
      const float steps = to_steps(from[i], grid);
      if (sums == Sums::kInt8) {
        static_cast<uint8_t*>(operand)[i] = static_cast<uint8_t>(steps - grid.low);
      } else {
        static_cast<int32_t*>(operand)[i] = static_cast<int32_t>(steps);
      }
    }
  });
}

void zeros_to_operand(Sums sums, const Grid& grid, size_t count, void* operand) {
  std::memset(operand, sums == Sums::kInt8 ? static_cast<int>(-grid.low) : 0, count * operand_item_bytes(sums));
}

void to_floats(const Grid& grid, const void* values, DType dtype, size_t count, float* floats) {
  if (dtype == DType::kFloat32) {
    std::memcpy(floats, values, count * sizeof(float));
    return;
  }
  with_type(dtype, [&](auto item) {
    const auto* from = static_cast<const decltype(item)*>(values);
    for (size_t i = 0; i < count; ++i) floats[i] = to_steps(from[i], grid) * grid.scale;
  });
}

void put_on_grid(const Grid& grid, size_t count, float* floats) {
  if (!grid.present()) return;
  for (size_t i = 0; i < count; ++i) floats[i] = to_steps(floats[i], grid) * grid.scale;
}

void from_floats(const Grid& grid, const float* floats, size_t count, DType dtype, void* values) {
  if (dtype == DType::kFloat32) {
    std::memcpy(values, floats, count * sizeof(float));
    return;
  }
  with_type(dtype, [&](auto item) {
    auto* to = static_cast<decltype(item)*>(values);
    for (size_t i = 0; i < count; ++i) {
      to[i] = static_cast<decltype(item)>(static_cast<int64_t>(to_steps(floats[i], grid)) + grid.zero_point);
    }
  });
}

}  // namespace lstm_quant
