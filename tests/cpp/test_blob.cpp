// A damaged blob is an error, or at worst other numbers; never a read or write elsewhere. Run with -fsanitize=address.
#include <cstring>

#include "check.h"
#include "random_stack.h"
#include "tested_kernels.h"

namespace lstm_quant::testing {
namespace {

const Sizes kSizes{9, 21, 2, 2, 13};

AlignedBytes good_blob(Style style = Style::kInt8Preset) {
  Dice dice(5);
  return RandomStack(dice, kSizes, style).pack();
}

void open_all(const AlignedBytes& bytes) {
  const Blob blob(bytes.data(), bytes.size());
  for (int64_t i = 0; i < blob.sizes().cells(); ++i) blob.cell(i);
}

void put_header(AlignedBytes& bytes, BlobHeader header) {
  header.checksum = checksum(header);
  std::memcpy(bytes.data(), &header, sizeof header);
}

BlobHeader header_of(const AlignedBytes& bytes) {
  BlobHeader header;
  std::memcpy(&header, bytes.data(), sizeof header);
  return header;
}

TEST(a_good_blob_opens) {
  for (Style style : kStyles) open_all(good_blob(style));
}

TEST(truncated_blobs_are_refused) {
  const AlignedBytes good = good_blob();
  for (size_t size :
       {size_t{0}, size_t{1}, sizeof(BlobHeader) - 1, sizeof(BlobHeader), good.size() / 2, good.size() - 1}) {
    AlignedBytes part(size);
    std::memcpy(part.data(), good.data(), size);
    CHECK_ERROR(Blob(part.data(), part.size()), size < sizeof(BlobHeader) ? "truncated" : "bytes, need");
  }
}

TEST(foreign_and_damaged_headers_are_refused) {
  AlignedBytes bytes = good_blob();
  const BlobHeader good = header_of(bytes);
  BlobHeader header = good;
  header.magic ^= 1;
  put_header(bytes, header);
  CHECK_ERROR(open_all(bytes), "magic number");
  header = good;
  header.version += 1;
  put_header(bytes, header);
  CHECK_ERROR(open_all(bytes), "need version");
  header = good;
  header.sizes.hidden_size += 1;
  std::memcpy(bytes.data(), &header, sizeof header);
  CHECK_ERROR(open_all(bytes), "checksum");
}

TEST(sizes_that_do_not_fit_or_overflow_are_refused) {
  const AlignedBytes good = good_blob();
  const BlobHeader good_header = header_of(good);
  const int64_t values[] = {
      0, -1, 1, 22, 1 << 20, kMaxSize, kMaxSize + 1, int64_t{1} << 31, int64_t{1} << 32, INT64_MAX, INT64_MIN};
  for (int field = 0; field < 5; ++field) {
    for (int64_t value : values) {
      AlignedBytes bytes = good;
      BlobHeader header = good_header;
      int64_t* sizes[] = {&header.sizes.input_size, &header.sizes.hidden_size, &header.sizes.num_layers,
                          &header.sizes.num_directions, &header.sizes.proj_size};
      *sizes[field] = value;
      put_header(bytes, header);
      // fewer cells of the same kind are a blob that is longer than it need be
      if ((field == 2 || field == 3) && value == 1) continue;
      CHECK(!error_of([&] { open_all(bytes); }).empty()) << "field " << field << " = " << value;
    }
  }
}

TEST(segments_of_an_unknown_degree_are_refused) {
  AlignedBytes bytes = good_blob(Style::kGates16);
  const Segments* segments = Blob(bytes.data(), bytes.size()).cell(0).cell.functions[0].segments;
  CHECK(segments != nullptr);
  uint8_t* degree = bytes.data() + (reinterpret_cast<const uint8_t*>(&segments->degree) - bytes.data());
  for (const int32_t value : {-1, 0, kMostPieceDegree + 1, INT32_MAX}) {
    std::memcpy(degree, &value, sizeof value);
    CHECK_ERROR(open_all(bytes), "segments of unknown degree");
  }
}

TEST(misaligned_blobs_are_refused) {
  const AlignedBytes good = good_blob();
  AlignedBytes moved(good.size() + 1);
  std::memcpy(moved.data() + 1, good.data(), good.size());
  CHECK_ERROR(Blob(moved.data() + 1, good.size()), "multiple of 64");
}

TEST(random_damage_never_reads_or_writes_elsewhere) {
  SerialParallel serial;
  const std::vector<const Kernels*> usable = tested_kernels();
  std::vector<AlignedBytes> goods;
  for (Style style : kStyles) goods.push_back(good_blob(style));
  for (uint32_t seed = 0; seed < seeds(3000); ++seed) {
    Dice dice(seed);
    AlignedBytes bytes = goods[seed % goods.size()];
    const size_t records = sizeof(BlobHeader) + kSizes.cells() * sizeof(CellRecord);
    for (int64_t changes = dice.integer(1, 3); changes > 0; --changes) {
      const size_t word = dice.integer(sizeof(BlobHeader) / 4, records / 4 - 1);
      const uint32_t strange[] = {0, 1, 64, 0x7fc00000, 0x7f800000, 0x3f800000, 0x4b800000, 0xffffffff, 0x80000000};
      uint32_t value = strange[dice.integer(0, std::size(strange) - 1)];
      if (dice.chance(0.5)) {
        std::memcpy(&value, bytes.data() + word * 4, 4);
        value ^= uint32_t{1} << dice.integer(0, 31);
      }
      std::memcpy(bytes.data() + word * 4, &value, 4);
    }
    FloatCall call(dice, kSizes, 2, 2, true);
    error_of([&] {
      const Blob blob(bytes.data(), bytes.size());
      run_lstm(blob, check_evaluators(*usable[seed % usable.size()]), serial, call.call());
    });
  }
}

TEST(sources_that_do_not_fit_are_refused_with_their_place) {
  Dice dice(6);
  const auto error = [&](auto change) {
    RandomStack stack(dice, {3, 4, 1, 2}, Style::kInt8Preset);
    std::vector<double> grids(stack.sources()[1].grids, stack.sources()[1].grids + kParts * 5);
    stack.sources()[1].grids = grids.data();
    change(stack.sources()[1], grids);
    return error_of([&] { stack.pack(); });
  };
  const auto has = [](const std::string& message, const char* words) {
    CHECK(message.find(words) != std::string::npos) << "with the message '" << message << "'";
    CHECK(message.find("layer 0, direction 1") != std::string::npos) << message;
  };
  has(error([](CellSource& source, auto&) { source.grid_rows = 24; }), "grids must have 25 or 33 rows, got 24");
  has(error([](CellSource& source, auto&) { source.grid_rows = 26; }), "grids must have 25 or 33 rows, got 26");
  has(error([](CellSource& source, auto&) { source.tables[1].count -= 1; }),
      "part forget_gate: its table must have 4096");
  has(error([](CellSource&, auto& grids) { grids[0] = -1; }), "part x");
  has(error([](CellSource&, auto& grids) { grids[0] = NAN; }), "part x");
  has(error([](CellSource&, auto& grids) { grids[0] = 1e-42; }), "part x");
  has(error([](CellSource&, auto& grids) { grids[2] = 256; }), "part x");
  has(error([](CellSource&, auto& grids) { grids[4] = 1 << 20; }), "part x");
  has(error([](CellSource&, auto& grids) { grids[11 * 5 + 3] = -2048.5; }), "part gates.input_gate");
}

TEST(equal_tables_are_stored_once) {
  Dice dice(7);
  const RandomStack stack(dice, {3, 4, 3, 2}, Style::kInt8Preset);
  const AlignedBytes bytes = stack.pack();
  const Blob blob(bytes.data(), bytes.size());
  const Cell first = blob.cell(0).cell, last = blob.cell(5).cell;
  CHECK(first.functions[0].table == first.functions[3].table);
  CHECK(first.functions[0].table == last.functions[1].table);
  CHECK(first.functions[2].table != first.functions[0].table);
  CHECK(first.functions[0].evaluator == Evaluator::kSigmoid12);
  CHECK(first.functions[2].evaluator == Evaluator::kTanh12);
  CHECK(first.functions[kTanhCy].evaluator == Evaluator::kTanh10);
}

TEST(the_functions_of_the_16_bit_preset_have_evaluators) {
  const AlignedBytes bytes = good_blob(Style::kGates16Preset);
  const Cell cell = Blob(bytes.data(), bytes.size()).cell(0).cell;
  CHECK(cell.functions[0].evaluator == Evaluator::kFineSigmoid12);
  CHECK(cell.functions[2].evaluator == Evaluator::kFineTanh12);
  CHECK(cell.functions[kTanhCy].evaluator == Evaluator::kFineTanh10);
}

TEST(cells_that_are_all_grids_have_segments) {
  for (const Style style : {Style::kAllInt8, Style::kGates16, Style::kGates16Preset}) {
    const AlignedBytes bytes = good_blob(style);
    const Cell cell = Blob(bytes.data(), bytes.size()).cell(0).cell;
    for (const Function& function : cell.functions) {
      CHECK(function.segments != nullptr);
      CHECK((function.table16 != nullptr) == (style != Style::kAllInt8));
    }
  }
}

}  // namespace
}  // namespace lstm_quant::testing
