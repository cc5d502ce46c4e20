#include "pipeline.h"

#include <algorithm>

namespace lstm_quant {

bool Pipeline::take(int64_t layer) {
  int64_t state = layers_[layer].state.load();
  const int64_t piece = state / 2;
  if (state % 2 != 0 || piece == pieces_) return false;
  // what the neighbours have done only grows, so that what may begin now may begin later
  if (layer > 0 && layers_[layer - 1].done() <= piece) return false;
  if (layer + 1 < static_cast<int64_t>(layers_.size()) && piece - layers_[layer + 1].done() >= most_ahead_)
    return false;
  return layers_[layer].state.compare_exchange_strong(state, state + 1);
}

int64_t Pipeline::take_any(int64_t last) {
  if (last != kNone && take(last)) return last;
  for (auto layer = static_cast<int64_t>(layers_.size()) - 1; layer >= 0; --layer) {
    if (take(layer)) return layer;
  }
  return kNone;
}

bool Pipeline::all_taken() const {
  return std::all_of(layers_.begin(), layers_.end(), [&](const Layer& layer) {
    const int64_t state = layer.state.load();
    return state % 2 != 0 || state / 2 == pieces_;
  });
}

void Pipeline::run(const std::function<void(int64_t layer, int64_t piece)>& work) {
  int64_t last = kNone;
  for (;;) {
    const uint32_t seen = progress_.count();
    const int64_t layer = take_any(last);
    if (layer != kNone) {
      work(layer, layers_[layer].done());
      layers_[layer].state.fetch_add(1);
      progress_.advance();
      last = layer;
    } else if (all_taken()) {
      return;
    } else {
      progress_.wait(seen);
    }
  }
}

}  // namespace lstm_quant
