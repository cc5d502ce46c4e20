#include "delta.h"

#include <algorithm>
#include <cstring>

namespace lstm_quant {
namespace {

// Shares of changed groups up to which it pays to go on by changes, and to begin, which takes a whole sum and counts on
// what is yet to come. Measured on Zen 4: changes take as long as a whole sum at 75 to 85 % from 128 to 1024 units, at
// 60 to 70 % with 64 (AVX-512 and AVX2), and at 70 % (AVX-512) or 45 % (AVX2) with 1536.
constexpr double kGoOn = 0.7;
constexpr double kBegin = 0.5;
// The same for rows that could be projected together, reading the weights once: 40 % with AVX-512, 75 % with AVX2.
constexpr double kGoOnTogether = 0.35;
constexpr double kBeginTogether = 0.25;
// While whole sums are taken, two rows of so many are compared, or as many of each piece of a chunk: looking is not to
// cost a percent.
constexpr int kLookEvery = 4;
constexpr size_t kPiece = 16;

uint32_t group_at(const uint8_t* row, size_t group) {
  uint32_t bytes;
  std::memcpy(&bytes, row + group * kGroup, kGroup);
  return bytes;
}

size_t count_changed(const uint8_t* a, const uint8_t* b, size_t groups) {
  uint32_t count = 0;
  for (size_t i = 0; i < groups; ++i) count += group_at(a, i) != group_at(b, i);
  return count;
}

}  // namespace

ChangeList ChangeList::take(Arena& arena, size_t depth) {
  const size_t most = 2 * (depth / kGroup) + kChangesBeyond;
  return {arena.take<int32_t>(most), arena.take<uint8_t>(most * 2 * kGroup)};
}

KeptSums::KeptSums(Arena& arena, const Projection& projection, int32_t blocks)
    : projection_(&projection),
      operand_(arena.take<uint8_t>(projection.padded_depth)),
      sums_(arena.take<int32_t>(static_cast<size_t>(blocks) * kBlock)) {}

CellDelta::CellDelta(Arena& arena, const Cell& cell) {
  if (cell.input.sums == Sums::kInt8) {
    input = KeptSums(arena, cell.input, cell.blocks);
    igates = arena.take<float>(static_cast<size_t>(cell.blocks) * kBlock);
  }
  if (cell.hidden.sums == Sums::kInt8) hidden = KeptSums(arena, cell.hidden, cell.blocks);
}

void KeptSums::set_blocks(int32_t first, int32_t last) {
  if (first == first_block_ && last == last_block_) return;
  first_block_ = first;
  last_block_ = last;
  drop();
}

void KeptSums::drop() {
  kept_ = quiet_ = false;
  turn_ = leaps_ = 0;
}

bool KeptSums::at_most(double share, size_t changed, size_t rows) const {
  return static_cast<double>(changed) <= share * static_cast<double>(rows * groups());
}

void KeptSums::copy(const uint8_t* row) {
  std::memcpy(operand_, row, projection_->padded_depth);
}

bool KeptSums::watch(const uint8_t* row) {
  if (kept_) {
    const bool much = !at_most(kGoOn, count_changed(row, operand_, groups()), 1);
    leaps_ = much ? leaps_ + 1 : 0;
    // a single leap is as fast by changes as to begin again after it
    if (leaps_ < 2) return true;
    drop();
  }
  if (turn_ == 1) quiet_ = at_most(kBegin, count_changed(row, operand_, groups()), 1);
  if (turn_ == 0) copy(row);
  turn_ = (turn_ + 1) % kLookEvery;
  return quiet_;
}

bool KeptSums::watch_all(const uint8_t* rows, size_t stride, size_t count) {
  size_t changed = kept_ ? count_changed(rows, operand_, groups()) : 0, looked = 1;
  for (size_t i = 1; i < count; ++i) {
    if (!kept_ && i % kPiece >= kLookEvery) continue;
    changed += count_changed(rows + i * stride, rows + (i - 1) * stride, groups());
    ++looked;
  }
  const bool little = at_most(kept_ ? kGoOnTogether : kBeginTogether, changed, looked);
  if (!little) drop();
  turn_ = leaps_ = 0;
  return little;
}

// With the sums of a row from which no other differs by more than kMostChange.
void KeptSums::begin() {
  std::memset(operand_, kMostChange, projection_->padded_depth);
  const auto factor = static_cast<uint32_t>(projection_->offset) + kMostChange;
  for (int32_t i = first_block_ * kBlock; i < last_block_ * kBlock; ++i) {
    sums_[i] = static_cast<int32_t>(factor * static_cast<uint32_t>(projection_->weight_sums[i]));
  }
  kept_ = quiet_ = true;
}

Delta KeptSums::change(const Kernels& kernels, const uint8_t* row, const ChangeList& list) {
  if (!kept_) begin();
  Delta delta{0, list.groups, list.differences, 0, sums_};
  kernels.list_changes(operand_, row, groups(), delta);
  copy(row);
  return delta;
}

}  // namespace lstm_quant
