#include "segments.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <utility>

#include "kernels/float_function.h"
#include "kernels/scalar_evaluate.h"
#include "kernels/segments-inl.h"

namespace lstm_quant {
namespace {

constexpr double kPi = 3.14159265358979323846;
constexpr int kMostTerms = kMostPieceDegree + 1;
constexpr int kMostOrigins = 64;  // that are tried for a piece; mostly the first or second does
constexpr int kHalvings = 60;     // of an interval around a root: all of float64's digits
constexpr int kMostPasses = 200;
constexpr int kMostWrong = 2;     // entries for each degree
constexpr double kNear = 0.02;    // of a step
constexpr double kMargin = 2e-4;  // of a step: about what is lost to rounding coefficients and sums to float32

// Of a polynomial in u, from -1 to 1 over a piece: its factors of Chebyshev polynomials or of powers.
using Terms = std::array<double, kMostTerms>;

// Steps of a table's input from `first` to `last`.
struct Interval {
  int first;
  int last;

  double center() const { return (first + last) / 2.0; }
  double radius() const { return (last - first) / 2.0; }
};

float entry(const StepsTable& table, int steps) {
  return table.steps[steps - static_cast<int>(table.input.low)];
}

// The Chebyshev polynomials of u.
Terms chebyshev(double u) {
  Terms values{1, u};
  for (int i = 2; i < kMostTerms; ++i) values[i] = 2 * u * values[i - 1] - values[i - 2];
  return values;
}

double product(const Terms& a, const Terms& b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
}

// An entry that is or may come to be on the wrong side of the halves between integers.
struct Near {
  Terms values;  // of the Chebyshev polynomials up to the degree
  double entry;

  double excess(const Terms& factors) const { return std::abs(product(factors, values) - entry) - 0.5; }
};

// Moves the polynomial by the least that brings one entry after the other to the right side, again and again, until all
// are there; false if they are too many or will not stay. The distance from the halves that it asks for shrinks to
// nothing, as there may be none that suits all.
bool put_right(const std::vector<Near>& near, int degree, Terms& factors) {
  const auto is_wrong = [&](const Near& one) { return one.excess(factors) > 0; };
  if (std::count_if(near.begin(), near.end(), is_wrong) > kMostWrong * degree) return false;
  for (int pass = 0; pass < kMostPasses; ++pass) {
    const double margin = kMargin * (kMostPasses - 1 - pass) / kMostPasses;
    bool moved = false;
    for (const Near& one : near) {
      const double excess = one.excess(factors) + margin;
      if (excess <= 0) continue;
      moved = true;
      const double error = product(factors, one.values) - one.entry;
      const double change = std::copysign(excess, -error) / product(one.values, one.values);
      for (int k = 0; k <= degree; ++k) factors[k] += change * one.values[k];
    }
    if (!moved) return true;
  }
  return false;
}

Terms to_powers(const Terms& factors) {
  Terms powers{}, previous{1}, current{0, 1};  // of the Chebyshev polynomials k and k + 1
  for (int k = 0; k < kMostTerms; ++k) {
    Terms next{};
    for (int i = 0; i < kMostTerms; ++i) {
      powers[i] += factors[k] * previous[i];
      next[i] = (i > 0 ? 2 * current[i - 1] : 0) - previous[i];
    }
    previous = current;
    current = next;
  }
  return powers;
}

// Those of the same polynomial in u - origin.
Terms shift(Terms powers, double origin) {
  for (int i = 0; i < kMostTerms; ++i) {
    for (int k = kMostTerms - 2; k >= i; --k) powers[k] += origin * powers[k + 1];
  }
  return powers;
}

double evaluate(const Terms& powers, double u) {
  double value = 0;
  for (int i = kMostTerms - 1; i >= 0; --i) value = value * u + powers[i];
  return value;
}

// Halves the interval from `a` to `b`, of which the middle becomes the new `a` where moves_a(middle), else the new `b`.
template <class Condition>
std::pair<double, double> bisect(double a, double b, const Condition& moves_a) {
  for (int i = 0; i < kHalvings; ++i) {
    const double middle = (a + b) / 2;
    (moves_a(middle) ? a : b) = middle;
  }
  return {a, b};
}

// Where in -1 to 1 a monotone polynomial takes a value that it does take there.
double solve(const Terms& powers, double value) {
  const bool rises = evaluate(powers, -1) < evaluate(powers, 1);
  const auto [low, high] = bisect(-1, 1, [&](double u) { return (evaluate(powers, u) < value) == rises; });
  return (low + high) / 2;
}

class Search {
 public:
  Search(const StepsTable& table, int degree) : table_(table) { segments_.degree = degree; }

  std::optional<Segments> run() {
    const Interval changing = changing_entries();
    set_limits(changing);
    for (Interval piece{changing.first, changing.first}; piece.first <= changing.last; piece.first = piece.last + 1) {
      const int index = index_of(piece.first);
      piece.last = piece.first;
      while (piece.last < changing.last && index_of(piece.last + 1) == index) ++piece.last;
      if (!set_constant(piece, index) && !set_function(piece, index) && !set_line(piece, index)) return {};
    }
    if (!is_exact({static_cast<int>(table_.input.low), static_cast<int>(table_.input.high)})) return {};
    return segments_;
  }

 private:
  double function(double steps) const {
    return double_function(table_.is_tanh, steps * table_.input.scale) / table_.output.scale;
  }

  bool is_exact(const Interval& interval) const {
    int steps = interval.first;
    while (steps <= interval.last && scalar_evaluate(segments_, static_cast<float>(steps)) == entry(table_, steps))
      ++steps;
    return steps > interval.last;
  }

  // Beyond them all are the same.
  Interval changing_entries() const {
    Interval interval{static_cast<int>(table_.input.low), static_cast<int>(table_.input.high)};
    while (interval.first < interval.last && entry(table_, interval.first + 1) == table_.steps.front())
      ++interval.first;
    while (interval.first < interval.last && entry(table_, interval.last - 1) == table_.steps.back()) --interval.last;
    return interval;
  }

  void set_limits(const Interval& changing) {
    segments_.low = limit(changing.first, changing.first + 1);
    segments_.high = limit(changing.last, changing.last - 1);
    // less than kPieces - 1 of them, so that however they are rounded no two have the same lowest bits
    const float steps = std::max(segments_.high - segments_.low, 1.0f);
    segments_.per_step = (kPieces - 1) * 0.99999f / steps;
    segments_.first = kWhole - std::nearbyintf(segments_.low * segments_.per_step);
  }

  // Where the function has the value of the outermost changing entry, which the output's grid may have cut.
  float limit(int outermost, int next) const {
    const double value = entry(table_, outermost);
    if (std::abs(function(outermost) - value) <= 0.5) return static_cast<float>(outermost);
    const bool is_above = function(outermost) > value;
    const auto [beyond, within] =
        bisect(outermost, next, [&](double steps) { return (function(steps) > value) == is_above; });
    return static_cast<float>(within);
  }

  // What a step of the input is evaluated at.
  float position(int steps) const {
    return std::min(std::max(static_cast<float>(steps), segments_.low), segments_.high);
  }
  int index_of(int steps) const { return scalar_piece(segments_, position(steps)); }

  void set(int index, float origin, float value, const Terms& powers) {
    segments_.origin[index] = origin;
    segments_.value[index] = kWhole + value;
    for (int i = 0; i < kMostPieceDegree; ++i) segments_.coefficients[i][index] = static_cast<float>(powers[i + 1]);
  }

  bool set_constant(const Interval& piece, int index) {
    set(index, static_cast<float>(piece.first), entry(table_, piece.first), {});
    return is_exact(piece);
  }

  // Chebyshev factors of the polynomial that has the function's values in as many Chebyshev nodes.
  Terms interpolate(const Interval& piece) const {
    Terms factors{};
    const int nodes = segments_.degree + 1;
    for (int i = 0; i < nodes; ++i) {
      const double u = std::cos(kPi * (i + 0.5) / nodes);
      const double value = function(piece.center() + piece.radius() * u);
      const Terms values = chebyshev(u);
      for (int k = 0; k < nodes; ++k) factors[k] += value * values[k] * (k == 0 ? 1.0 : 2.0) / nodes;
    }
    return factors;
  }

  std::vector<Near> find_near(const Interval& piece, const Terms& factors) const {
    const Terms powers = to_powers(factors);
    std::vector<Near> all;
    for (int steps = piece.first; steps <= piece.last; ++steps) {
      const double u = (position(steps) - piece.center()) / piece.radius();
      if (std::abs(evaluate(powers, u) - entry(table_, steps)) < 0.5 - kNear) continue;
      all.push_back({chebyshev(u), entry(table_, steps)});
      std::fill(all.back().values.begin() + segments_.degree + 1, all.back().values.end(), 0.0);
    }
    return all;
  }

  bool set_function(const Interval& piece, int index) {
    Terms factors = interpolate(piece);
    return put_right(find_near(piece, factors), segments_.degree, factors) &&
           set_polynomial(piece, index, to_powers(factors));
  }

  // Tries one integer that the function passes through after the other, from the middle of the piece on: each rounds
  // the coefficients another way.
  bool set_polynomial(const Interval& piece, int index, const Terms& powers) {
    const double ends[] = {evaluate(powers, -1), evaluate(powers, 1)};
    const double least = std::min(ends[0], ends[1]), largest = std::max(ends[0], ends[1]);
    const double middle = std::nearbyint(evaluate(powers, 0)), radius = piece.radius();
    for (int i = 0; i < kMostOrigins; ++i) {
      const double value = middle + (i % 2 == 0 ? -i / 2 : i / 2 + 1);
      if (value < least || value > largest) continue;
      const auto origin = static_cast<float>(piece.center() + radius * solve(powers, value));
      Terms shifted = shift(powers, (origin - piece.center()) / radius);
      for (int k = 1; k < kMostTerms; ++k) shifted[k] /= std::pow(radius, k);
      set(index, origin, static_cast<float>(value), shifted);
      if (is_exact(piece)) return true;
    }
    return false;
  }

  // For a piece in which the function passes through no integer, so that its entries change but once: a line that
  // rises or falls from one to the other over the piece's length, halfway just before the first changed entry.
  bool set_line(const Interval& piece, int index) {
    const float before = entry(table_, piece.first), after = entry(table_, piece.last);
    int changed = piece.first;
    while (changed < piece.last && entry(table_, changed) == before) ++changed;
    const double length = piece.last - piece.first + 1.0;
    set(index, static_cast<float>(changed - 0.5 - length / 2), before, {0, (after - before) / length});
    return is_exact(piece);
  }

  const StepsTable& table_;
  Segments segments_{};
};

}  // namespace

std::optional<Segments> find_segments(const StepsTable& table) {
  for (int degree = 1; degree <= kMostPieceDegree; ++degree) {
    if (auto segments = Search(table, degree).run()) return segments;
  }
  return {};
}

}  // namespace lstm_quant
