#include "float_function.h"

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace lstm_quant {
namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;
constexpr double kSmallestExponent = -708.0;  // the smallest whose power of two is a normal float64
constexpr int kDegree = 13;

constexpr std::array<double, kDegree + 1> taylor_coefficients() {
  std::array<double, kDegree + 1> coefficients{1.0};
  for (int n = 1; n <= kDegree; ++n) coefficients[n] = coefficients[n - 1] / n;
  return coefficients;
}
constexpr std::array<double, kDegree + 1> kTaylor = taylor_coefficients();

// exp of y <= 0: a Taylor series on [-ln(2)/2, ln(2)/2], scaled by a power of two.
double exp_nonpositive(double y) {
  if (y < kSmallestExponent) y = kSmallestExponent;
  const double n = std::nearbyint(y * kLog2E);
  const double r = y - n * kLn2;
  double total = kTaylor[kDegree];
  for (int i = kDegree - 1; i >= 0; --i) total = total * r + kTaylor[i];
  const int64_t bits = ((std::isnan(n) ? 0 : static_cast<int64_t>(n)) + 1023) << 52;
  double power_of_two;
  std::memcpy(&power_of_two, &bits, sizeof power_of_two);
  return total * power_of_two;
}

double sigmoid(double x) {
  const double e = exp_nonpositive(-std::fabs(x));
  return x >= 0 ? 1.0 / (1.0 + e) : e / (1.0 + e);
}

double tanh_of(double x) {
  // near zero 1 - e loses digits; two terms of the series are exact to float32 there
  if (std::fabs(x) < 0x1p-12) return x - x * x * x / 3.0;
  const double e = exp_nonpositive(-2.0 * std::fabs(x));
  const double large = (1.0 - e) / (1.0 + e);
  return x < 0 ? -large : large;
}

}  // namespace

double double_function(bool is_tanh, double v) {
  return is_tanh ? tanh_of(v) : sigmoid(v);
}

float float_function(bool is_tanh, float v) {
  return static_cast<float>(double_function(is_tanh, v));
}

}  // namespace lstm_quant
