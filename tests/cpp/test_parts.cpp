// The parts that a call is made of: conversion, dispatch, the team of threads.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <thread>
#include <vector>

#include "check.h"
#include "convert.h"
#include "dispatch.h"
#include "lateness.h"
#include "portions.h"
#include "team.h"
#include "tested_kernels.h"

namespace lstm_quant::testing {
namespace {

const Grid kByte{0.5f, 2.0f, -100.0f, 155.0f, 100};

TEST(quantizing_rounds_to_even_clamps_and_takes_nan_for_the_least) {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  const float values[] = {0.0f,   -0.0f,  0.25f, 0.75f, -0.25f, -0.75f, 77.5f, 78.0f,  1e30f, -50.0f,
                          -50.5f, -1e30f, inf,   -inf,  nan,    -nan,   0.26f, 1e-40f, 3.0f};
  const uint8_t expected[] = {100, 100, 100, 102, 100, 98, 255, 255, 255, 0, 0, 0, 255, 0, 0, 0, 101, 100, 106};
  for (const Kernels* kernels : tested_kernels()) {
    uint8_t got[std::size(values)];
    for (size_t count = 0; count <= std::size(values); ++count) {
      std::fill(std::begin(got), std::end(got), uint8_t{77});
      kernels->quantize(kByte, values, count, got);
      for (size_t i = 0; i < std::size(got); ++i) {
        CHECK(got[i] == (i < count ? expected[i] : 77)) << kernels->name << " value " << values[i];
      }
    }
  }
  std::vector<int32_t> integers(std::size(values));
  from_floats(kByte, values, std::size(values), DType::kInt32, integers.data());
  for (size_t i = 0; i < integers.size(); ++i) CHECK(integers[i] == expected[i]) << "value " << values[i];
}

TEST(integers_beyond_a_grid_count_as_its_nearest) {
  const int32_t values[] = {std::numeric_limits<int32_t>::min(), -1, 0, 100, 255, 256,
                            std::numeric_limits<int32_t>::max()};
  const float expected[] = {-50.0f, -50.0f, -50.0f, 0.0f, 77.5f, 77.5f, 77.5f};
  float got[std::size(values)];
  to_floats(kByte, values, DType::kInt32, std::size(values), got);
  for (size_t i = 0; i < std::size(values); ++i) CHECK(got[i] == expected[i]) << "integer " << values[i];
  uint8_t operand[std::size(values)];
  to_operand(kScalarKernels, Sums::kInt8, kByte, values, DType::kInt32, std::size(values), operand);
  for (size_t i = 0; i < std::size(values); ++i) CHECK(operand[i] == expected[i] * 2 + 100) << "integer " << values[i];
}

TEST(quantized_floats_have_no_negative_zero) {
  float values[] = {-0.0f, -0.1f};
  put_on_grid(kByte, 2, values);
  CHECK(!std::signbit(values[0]) && !std::signbit(values[1]));
}

TEST(an_unknown_isa_is_refused_with_the_legal_names) {
  CHECK_ERROR(choose_kernels("sse2"), "must be one of " + names(usable_kernels()));
  CHECK(choose_kernels("").name == usable_kernels().front()->name);
  for (const Kernels* kernels : usable_kernels()) CHECK(&choose_kernels(kernels->name) == kernels);
  CHECK(usable_kernels().back() == &kScalarKernels);
}

TEST(what_this_cpu_lacks_is_refused) {
  const auto usable = usable_kernels();
  for (const Kernels* kernels : built_kernels()) {
    if (std::find(usable.begin(), usable.end(), kernels) != usable.end()) continue;
    CHECK_ERROR(choose_kernels(kernels->name), std::string("got '") + kernels->name + "'");
  }
}

TEST(every_evaluator_is_exact_on_every_isa_that_has_them) {
  for (const Kernels* kernels : tested_kernels()) {
    const CheckedKernels checked = check_evaluators(*kernels);
    for (int i = 1; i < kEvaluators; ++i) {
      CHECK(checked.exact[i] == (kernels != &kScalarKernels)) << kernels->name << ", evaluator " << i;
    }
  }
}

TEST(threads_that_were_late_are_done_without_for_a_while) {
  using std::chrono::milliseconds;
  for (const bool at_the_end : {false, true}) {
    Attendance late;
    if (!at_the_end) std::this_thread::sleep_for(milliseconds(5));
    late.begin();
    std::this_thread::sleep_for(milliseconds(300));  // work
    late.end();
    if (at_the_end) std::this_thread::sleep_for(milliseconds(5));
    CHECK(late.lost() >= milliseconds(5) && late.lost() < milliseconds(300));
  }

  Lateness lateness;
  const auto note = [&](int times, std::chrono::nanoseconds lost, std::chrono::nanoseconds time) {
    for (int i = 0; i < times; ++i) lateness.note(lost, time);
  };
  note(20, std::chrono::microseconds(900), milliseconds(1));
  CHECK(!lateness.go_alone()) << "for so little";
  note(20, milliseconds(20), milliseconds(50));
  CHECK(!lateness.go_alone()) << "for a part of a long call";
  for (int burst = 0; burst < 20; ++burst) {
    note(1, milliseconds(20), milliseconds(21));
    note(1, {}, milliseconds(1));
  }
  CHECK(!lateness.go_alone()) << "for the first of each burst";
  note(8, milliseconds(20), milliseconds(21));
  CHECK(lateness.go_alone());
  std::this_thread::sleep_for(milliseconds(20));
  CHECK(lateness.go_alone()) << "many times as long";
  std::this_thread::sleep_for(milliseconds(700));
  CHECK(!lateness.go_alone()) << "not for ever";
}

TEST(a_team_closes_when_all_slots_are_there) {
  Team team(5, std::chrono::seconds(60));
  std::atomic<int> sum{0};
  std::vector<std::thread> threads;
  for (int slots : {1, 3, 1}) {
    threads.emplace_back([&, slots] {
      sum += 1 << team.join(slots);
      CHECK(team.size() == 3);
    });
  }
  for (auto& thread : threads) thread.join();
  CHECK(sum == 1 + 2 + 4) << "every member has an index of its own";
}

TEST(a_team_goes_on_without_those_that_are_late) {
  Team team(2, std::chrono::microseconds(10));
  CHECK(team.join(1) == 0);
  CHECK(team.size() == 1);
  CHECK(team.join(1) == Team::kTooLate);
}

TEST(a_crew_goes_on_when_the_last_has_come) {
  constexpr int kThreads = 4, kRounds = 2000;
  Crew crew;
  std::atomic<int> arrivals{0}, early{0}, disagreements{0};
  std::vector<std::atomic<int>> broken(kRounds + 1);
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] {
      for (int round = 1; round <= kRounds; ++round) {
        // now and then long enough for the others to fall asleep
        if (round % 100 == i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        arrivals.fetch_add(1);
        crew.meet(kThreads);
        if (arrivals.load() < round * kThreads) early.fetch_add(1);
        broken[round] += crew.broken_up();
        crew.meet(kThreads);
        if (broken[round] % kThreads != 0) disagreements.fetch_add(1);
      }
    });
  }
  for (auto& thread : threads) thread.join();
  CHECK(early == 0) << early.load() << " returns before the last arrival";
  CHECK(disagreements == 0) << "on whether the crew had broken up";
}

TEST(every_block_is_taken_once_at_each_step) {
  constexpr int kThreads = 3, kSteps = 300, kBlocks = 20;
  Crew crew;
  Portions portions(kThreads);
  std::vector<std::atomic<int>> taken(kBlocks);
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] {
      for (int step = 1; step <= kSteps; ++step) {
        portions.begin(i, {kBlocks * i / kThreads, kBlocks * (i + 1) / kThreads});
        for (;;) {
          const Portions::Blocks blocks = portions.take(i, 4, step % 2 == 0);
          if (blocks.empty()) break;
          if (blocks.end - blocks.begin > 4) ++wrong;
          for (int32_t block = blocks.begin; block < blocks.end; ++block) ++taken[block];
          // so that the others take of this one's
          if (step % 50 == i) std::this_thread::sleep_for(std::chrono::microseconds(200));
        }
        crew.meet(kThreads);
        if (i == step % kThreads && std::any_of(taken.begin(), taken.end(), [&](int n) { return n != step; })) ++wrong;
        crew.meet(kThreads);
      }
    });
  }
  for (auto& thread : threads) thread.join();
  CHECK(wrong == 0) << "a block was taken twice, or left, or more than four at once";
}

TEST(who_is_faster_takes_what_the_others_come_to_last) {
  Portions portions(2);
  portions.begin(0, {0, 8});
  portions.begin(1, {8, 12});
  std::vector<int32_t> begins;
  for (;;) {
    const Portions::Blocks blocks = portions.take(1, 4, false);
    if (blocks.empty()) break;
    for (int32_t block = blocks.begin; block < blocks.end; ++block) begins.push_back(block);
  }
  CHECK((begins == std::vector<int32_t>{8, 9, 10, 11, 4, 5, 6, 7, 2, 3, 1, 0})) << "in another order";
}

TEST(a_crew_that_sleeps_at_every_meeting_breaks_up) {
  Crew crew;
  std::thread late([&] {
    for (int i = 0; i < 20; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
      crew.meet(2);
    }
  });
  for (int i = 0; i < 20; ++i) crew.meet(2);
  late.join();
  CHECK(crew.broken_up());
}

}  // namespace
}  // namespace lstm_quant::testing
