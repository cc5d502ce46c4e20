// Layers that work at the same time, each on other steps of a sequence.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <vector>

#include "progress.h"

namespace lstm_quant {

// A sequence in pieces that go through one layer after the other. A piece waits for the one before it in the same layer
// and for the same one in the layer before; a layer is never more than `most_ahead` pieces ahead of the next, which
// bounds the memory between them. Threads come and go as they like, since nobody waits for a piece that nobody does.
class Pipeline {
 public:
  // `most_ahead` is 1 at least; layers need 2 to work at the same time.
  Pipeline(int64_t layers, int64_t pieces, int64_t most_ahead)
      : layers_(layers), pieces_(pieces), most_ahead_(most_ahead) {}

  // Takes part: calls work(layer, piece) until all pieces are done, or other threads are at work on every layer that
  // has some left.
  void run(const std::function<void(int64_t layer, int64_t piece)>& work);

 private:
  static constexpr int64_t kNone = -1;

  // The state of a layer: twice the number of pieces done, and one more where a thread is at work on the next.
  struct Layer {
    std::atomic<int64_t> state{0};

    int64_t done() const { return state.load() / 2; }
  };

  // Takes the next piece of a layer; false where it must wait, or there is none.
  bool take(int64_t layer);
  // Takes a piece, of the layer `last` if it can, whose weights are in this CPU's cache. The deepest layer comes next,
  // so that what is between the layers is used up before more is made.
  int64_t take_any(int64_t last);
  bool all_taken() const;

  std::vector<Layer> layers_;
  const int64_t pieces_;
  const int64_t most_ahead_;
  Progress progress_;
};

}  // namespace lstm_quant
