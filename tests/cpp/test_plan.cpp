// Plans cover the work, and take other threads only where there is enough to do.
#include "check.h"
#include "plan.h"

namespace lstm_quant::testing {
namespace {

const Rates kRates{220, 110, 2};

TEST(small_calls_stay_on_one_thread) {
  CHECK(make_plan({128, 128, 1, 1}, kRates, 1, 1, 64).slots == 1);
  CHECK(make_plan({16, 16, 1, 1}, kRates, 100, 1, 2).slots == 1);
  for (int threads : {1, 0, -1}) CHECK(make_plan({1024, 1024, 1, 1}, kRates, 100, 1, threads).slots == 1);
}

TEST(large_calls_take_the_threads_there_are) {
  const Plan by_units = make_plan({1024, 1024, 1, 1}, kRates, 1, 1, 2);
  CHECK(by_units.slots == 2 && by_units.sharing == Sharing::kUnits);
  const Plan by_rows = make_plan({512, 512, 1, 1}, kRates, 50, 64, 2);
  CHECK(by_rows.slots == 2 && by_rows.sharing == Sharing::kRows);
  const Plan directions = make_plan({64, 128, 2, 2}, kRates, 200, 1, 2);
  CHECK(directions.slots == 2 && directions.sharing == Sharing::kUnits);
}

TEST(layers_work_at_the_same_time_where_steps_are_too_short_to_be_shared) {
  const Plan by_layers = make_plan({64, 64, 2, 1}, kRates, 100, 1, 8);
  CHECK(by_layers.sharing == Sharing::kLayers && by_layers.slots == 2 && by_layers.layer_steps < 100);
  CHECK(make_plan({64, 64, 2, 1}, kRates, 1, 1, 2).slots == 1)
      << "a single step goes through one layer after the other";
  CHECK(make_plan({64, 64, 2, 2}, kRates, 100, 1, 2).sharing == Sharing::kUnits) << "directions";
}

TEST(threads_that_take_long_to_start_are_left_alone_by_short_calls) {
  const Sizes sizes{128, 128, 1, 1};
  CHECK(make_plan(sizes, kRates, 100, 1, 2).slots == 2);
  CHECK(make_plan(sizes, kRates, 100, 1, {2, 1e6}).slots == 1);
  CHECK(make_plan(sizes, kRates, 10000, 16, {2, 1e6}).slots == 2);
}

TEST(single_rows_of_some_size_are_watched_for_changes) {
  CHECK(make_plan({40, 64, 1, 1}, kRates, 1, 1, 1).delta);
  CHECK(!make_plan({40, 32, 1, 1}, kRates, 100, 1, 1).delta);
  CHECK(!make_plan({128, 128, 1, 1}, kRates, 100, 2, 1).delta);
}

TEST(where_weights_are_many_more_steps_are_projected_at_a_time) {
  const Rates rates{220, 110, 2, 4 << 20};
  CHECK(make_plan({512, 512, 1, 1}, rates, 100, 1, 1).chunk_steps == 16);
  CHECK(make_plan({1024, 1024, 1, 1}, rates, 100, 1, 1).chunk_steps == 64);
  CHECK(make_plan({1024, 1024, 1, 1}, rates, 100, 16, 1).chunk_steps == 4);
  CHECK(make_plan({1024, 1024, 1, 1}, kRates, 100, 1, 1).chunk_steps == 16) << "these rates know no such size";
}

TEST(where_weights_are_many_threads_share_units_so_that_each_reads_some) {
  const Rates rates{92, 80, 3, 4 << 20};
  const Plan many = make_plan({1024, 1024, 1, 1}, rates, 20, 32, 2);
  CHECK(many.sharing == Sharing::kUnits && many.chunk_steps == 1 && many.group_blocks < 64) << "in groups";
  CHECK(make_plan({512, 512, 1, 1}, rates, 20, 64, 2).sharing == Sharing::kRows);
  CHECK(make_plan({1024, 1024, 1, 1}, rates, 20, 200, 2).tile_rows == 50) << "rows in tiles, one after the other";
}

TEST(every_plan_is_one_that_can_run) {
  for (int64_t hidden : {1, 16, 17, 128, 2048}) {
    for (int64_t rows : {1, 2, 15, 64, 65, 1000}) {
      for (int64_t steps : {1, 3, 100, 100000}) {
        for (int threads : {1, 2, 3, 64}) {
          for (int64_t directions : {1, 2}) {
            const Sizes sizes{40, hidden, 2, directions};
            const Plan plan = make_plan(sizes, {220, 110, 2, 4 << 20}, steps, rows, threads);
            const int64_t blocks = (hidden + kUnits - 1) / kUnits;
            CHECK(1 <= plan.slots && plan.slots <= threads);
            const int64_t most = plan.sharing == Sharing::kRows    ? rows
                                 : plan.sharing == Sharing::kUnits ? blocks * directions
                                                                   : sizes.num_layers;
            CHECK(plan.slots <= most);
            CHECK(plan.sharing != Sharing::kLayers || (directions == 1 && plan.pieces_between >= 2));
            CHECK(1 <= plan.tile_rows && plan.tile_rows <= rows);
            CHECK(plan.sharing != Sharing::kLayers || plan.tile_rows == rows);
            CHECK(1 <= plan.chunk_steps && plan.chunk_steps <= steps);
            CHECK(plan.chunk_steps == 1 || plan.group_blocks >= blocks);
            CHECK(plan.layer_steps == steps || (directions == 1 && plan.layer_steps >= 1 && plan.layer_steps < steps));
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace lstm_quant::testing
