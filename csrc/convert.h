// Rows of values between the caller's arrays and what the kernels work on.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/kernels.h"

namespace lstm_quant {

// Of the arrays that come in and go out.
enum class DType { kFloat32, kUint8, kInt8, kInt16, kInt32 };

size_t item_bytes(DType dtype);

// Bytes of an operand's item.
size_t operand_item_bytes(Sums sums);

// Integers are those of `grid`; beyond its limits they count as the nearest of them. Float32 is taken as it is.
// `values` need no alignment to more than an item.

// An operand row of a projection whose input has `grid` (absent: kFloat and float32 values only).
void to_operand(const Kernels& kernels, Sums sums, const Grid& grid, const void* values, DType dtype, size_t count,
                void* operand);
// That of zeros.
void zeros_to_operand(Sums sums, const Grid& grid, size_t count, void* operand);
void to_floats(const Grid& grid, const void* values, DType dtype, size_t count, float* floats);
void put_on_grid(const Grid& grid, size_t count, float* floats);
void from_floats(const Grid& grid, const float* floats, size_t count, DType dtype, void* values);

}  // namespace lstm_quant
