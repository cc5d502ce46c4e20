// AVX2 without VNNI: vpmaddubsw multiplies uint8 with int8, and adds two products in int16, where they may not fit.
// Rows of which few pairs of groups do not fit are multiplied as signed_avx2.h says, others as masked_avx2.h does; a
// single row, which needs all its operations for one multiplication, and rows of few values always so.
//
// The CPU does not foresee the next block. Several rows leave time to read its weights: while the rows go through a
// block, those that are read next are fetched, a line with each group. A single row fetches its weights some groups
// ahead, at the end of a block those that come after it.
//
// Measured on Zen 4 (EPYC, 3.7 GHz, one thread), masked: 512->512 with 64 rows 96 G products/s of 118 (with vpsignb
// 71); one row reads 1 to 4 MB of weights at 77 to 84 GB/s, plain reads 100 to 118; tail 2.6 ns a unit with its loads.
// On Zen 3 (EPYC, 3.0 GHz, one thread), `project` alone, called again and again for the same 60 rows of 512->512 whose
// pairs all fit, the best of 50: 99 G products/s in signed pairs, 84 in masked ones. Fetching the next block's weights
// took 13 to 29 % off whole calls with 64 rows of 512.
#ifdef __x86_64__

#include "evaluators.h"
#include "float_function.h"
#include "kernels.h"
#include "scalar_sums.h"
#include "target.h"

LSTM_QUANT_BEGIN_TARGET("avx2,fma")

#include "masked_avx2.h"
#include "signed_avx2.h"
#include "simd_avx2.h"
#include "steps-inl.h"

namespace lstm_quant {
namespace {

// Rows of fewer values gain less from pairs than looking at them costs.
constexpr size_t kLeastPaired = 96;

// The sums of rows by the first Dot that takes all of them, of those that need ever more operations.
class Int8Sums {
 public:
  Int8Sums(const Projection& projection, const CallRows& rows, const Walk& walk)
      : projection_(projection), walk_(walk), all_rows_(rows.count) {
    auto* written = reinterpret_cast<Written*>(rows.scratch);
    if (!rows.written) {
      const size_t depth = projection.depth;
      const bool paired =
          depth >= kLeastPaired && ((rows.count > 1 && write<SignedPairs>(Form::kSignedPairs, rows, depth, *written)) ||
                                    write<MaskedPairs>(Form::kMaskedPairs, rows, depth, *written));
      if (!paired) write<MaskedDot>(Form::kMasked, rows, depth, *written);
    }
    written_ = *written;
  }

  static size_t scratch_bytes(size_t rows, size_t padded_depth) {
    const size_t row_bytes =
        std::max({Layout<SignedPairs>(padded_depth).row_bytes, Layout<MaskedPairs>(padded_depth).row_bytes,
                  Layout<MaskedDot>(padded_depth).row_bytes});
    return sizeof(Written) + rows * (row_bytes + sizeof(int32_t));
  }

  template <class Sink>
  void operator()(int32_t block, size_t first_row, size_t rows, const Sink& sink) const {
    switch (written_.form) {
      case Form::kSignedPairs:
        return sum<SignedPairs>(block, first_row, rows, sink);
      case Form::kMaskedPairs:
        return sum<MaskedPairs>(block, first_row, rows, sink);
      case Form::kMasked:
        return sum<MaskedDot>(block, first_row, rows, sink);
    }
  }

 private:
  enum class Form { kSignedPairs, kMaskedPairs, kMasked };
  // How the scratch holds the rows: this stands before them, what each adds to its sums after them.
  struct alignas(kAlign) Written {
    Form form;
    OperandRows rows;
  };

  // A row in the form of Dot.
  template <class Dot>
  struct Layout {
    size_t most_apart = 0;  // groups; of all rows half as many on an average
    size_t apart_at;        // bytes
    size_t row_bytes;

    explicit Layout(size_t padded_depth)
        : apart_at(round_up(padded_depth / kGroup / Dot::kGroups * Dot::kOperandBytes, kAlign)) {
      if constexpr (Dot::kApart) most_apart = 2 * (padded_depth / kPair) / Dot::kPairsApart;
      row_bytes = apart_at + round_up((most_apart + 1) * sizeof(Apart), kAlign);
    }
  };

  // Writes the rows as Dot reads them; what pads them is taken for the middle, of which nothing is kept apart. False:
  // too much of them is.
  template <class Dot>
  static bool write(Form form, const CallRows& rows, size_t depth, Written& written) {
    const Layout<Dot> layout(round_up(depth, kDepthStep));
    char* const first = rows.scratch + sizeof written;
    auto* row_sums = reinterpret_cast<int32_t*>(first + rows.count * layout.row_bytes);
    // each by itself: what pads Written stays as it was, and equal rows leave equal bytes
    written.form = form;
    written.rows = {first, layout.row_bytes, row_sums, layout.apart_at};
    size_t kept_apart = 0;
    for (size_t r = 0; r < rows.count; ++r) {
      char* out = first + r * layout.row_bytes;
      ApartList apart(reinterpret_cast<Apart*>(out + layout.apart_at), layout.most_apart);
      row_sums[r] = Dot::write(rows.row(r), depth, out, apart);
      apart.close();
      if (apart.overflows()) return false;
      kept_apart += apart.size();
    }
    return 2 * kept_apart <= rows.count * layout.most_apart;
  }

  template <class Dot, class Sink>
  void sum(int32_t block, size_t first_row, size_t rows, const Sink& sink) const {
    if (rows == 1) return sum_row<Dot>(block, first_row, sink);
    sum_all_rows<Dot>(written_.rows, first_row, rows, BlockWeights(projection_, block), sink,
                      later<Dot>(block, first_row, rows));
  }

  template <class Dot, class Sink>
  void sum_row(int32_t block, size_t row, const Sink& sink) const {
    const BlockWeights weights(projection_, block);
    const char* after = walk_.after(projection_, block);
    // unknown: of steps that walk there and back, the next begins with this block again
    LaterWeights later{after != nullptr ? after : weights.weights};
    sum_rows<Dot, 1>(written_.rows, row, 1, weights, sink, later);
  }

  // These rows' part of the weights that are read after the block's. Their tiles go through the depth several times, as
  // each has some of the columns.
  template <class Dot>
  LaterWeights later(int32_t block, size_t first_row, size_t rows) const {
    constexpr size_t kMaxRows = Dot::kMaxRows, kTimes = kBlock / (Dot::vectors(kMaxRows) * Dot::V::kLanes);
    const char* after = walk_.after(projection_, block);
    const size_t groups = kTimes * ((rows + kMaxRows - 1) / kMaxRows) * (projection_.padded_depth / kGroup);
    const size_t bytes = projection_.block_bytes * rows / all_rows_;
    const size_t step = (bytes + groups - 1) / groups;
    // fewer groups than lines: so few rows are bound by reading anyway
    if (after == nullptr || step > kAlign) return {projection_.block_weights(0), 0};
    return {after + projection_.block_bytes * first_row / all_rows_, step};
  }

  const Projection& projection_;
  const Walk walk_;
  const size_t all_rows_;
  Written written_;
};

struct Isa {
  using V = Avx2;
  using Int8 = Int8Sums;
  using Wide = WideSums<WideDot<Avx2, 4, 2>>;
  using DeltaDot = MaskedDot;
  using Ahead = void;
  static constexpr size_t kTailVectors = 4;
  static constexpr size_t kOverlapBytes = 0;
  using Float = DotSums<FloatDot<Avx2, 3, 4>>;
};

}  // namespace

const Kernels kAvx2Kernels = KernelsOf<Isa>::table("avx2", {92, 80, 3, 4 << 20});

}  // namespace lstm_quant

LSTM_QUANT_END_TARGET

#endif  // __x86_64__
