// Pieces go through the layers in order, each once, whatever threads there are.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "pipeline.h"
#include "random_stack.h"

namespace lstm_quant::testing {
namespace {

// Notes what was done, and where it was not its turn.
class Log {
 public:
  Log(int64_t layers, int64_t most_ahead) : most_ahead_(most_ahead), done_(layers) {}

  void begin(int64_t layer, int64_t piece) {
    const bool in_order = done(layer) == piece;
    const bool has_input = layer == 0 || done(layer - 1) > piece;
    const bool has_room = layer + 1 == layers() || piece - done(layer + 1) < most_ahead_;
    if (!in_order || !has_input || !has_room) ++wrong_;
  }
  void end(int64_t layer) { ++done_[layer]; }

  int64_t layers() const { return static_cast<int64_t>(done_.size()); }
  int64_t done(int64_t layer) const { return done_[layer]; }
  int wrong() const { return wrong_; }

 private:
  const int64_t most_ahead_;
  std::vector<std::atomic<int64_t>> done_;
  std::atomic<int> wrong_{0};
};

TEST(every_piece_is_done_once_and_in_its_turn) {
  for (uint32_t seed = 0; seed < seeds(200); ++seed) {
    Dice dice(seed);
    const int64_t layers = dice.integer(1, 4), pieces = dice.integer(0, 30), most_ahead = dice.integer(1, 4);
    Pipeline pipeline(layers, pieces, most_ahead);
    Log log(layers, most_ahead);
    const int64_t slow_layer = dice.integer(-3, layers - 1);
    const auto take_part = [&](int64_t delay) {
      std::this_thread::sleep_for(std::chrono::microseconds(delay));
      pipeline.run([&](int64_t layer, int64_t piece) {
        log.begin(layer, piece);
        // long enough for the others to fall asleep
        if (layer == slow_layer) std::this_thread::sleep_for(std::chrono::microseconds(300));
        log.end(layer);
      });
    };
    std::vector<std::thread> threads;
    for (int64_t i = dice.integer(1, 5); i > 0; --i) threads.emplace_back(take_part, dice.integer(0, 2000));
    for (auto& thread : threads) thread.join();
    CHECK(log.wrong() == 0) << "pieces out of turn, seed " << seed;
    for (int64_t layer = 0; layer < layers; ++layer) CHECK(log.done(layer) == pieces) << "seed " << seed;
  }
}

TEST(layers_work_at_the_same_time) {
  Pipeline pipeline(2, 2, 2);
  std::atomic<int> present{0};
  std::atomic<bool> met{true};
  // the second piece of the first layer and the first of the second layer wait for each other
  const auto take_part = [&] {
    pipeline.run([&](int64_t layer, int64_t piece) {
      if (layer + piece != 1) return;
      ++present;
      const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
      while (present < 2 && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
      if (present < 2) met = false;
    });
  };
  std::thread other(take_part);
  take_part();
  other.join();
  CHECK(met) << "one layer waited for the other";
}

TEST(a_thread_stays_with_its_layer_while_it_can) {
  Pipeline pipeline(3, 4, 2);
  std::string order;
  pipeline.run([&](int64_t layer, int64_t) { order += std::to_string(layer); });
  CHECK(order == "001122001122") << order;
}

}  // namespace
}  // namespace lstm_quant::testing
