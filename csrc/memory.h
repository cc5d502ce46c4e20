// Aligned memory, its division into parts, and the pages under it.
#pragma once

#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#endif

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#include "kernels/kernels.h"

namespace lstm_quant {

struct AlignedDelete {
  void operator()(char* memory) const { ::operator delete(memory, std::align_val_t{kAlign}); }
};
using AlignedMemory = std::unique_ptr<char, AlignedDelete>;

inline AlignedMemory allocate(size_t bytes) {
  return AlignedMemory(static_cast<char*>(::operator new(bytes, std::align_val_t{kAlign})));
}

// Asks for huge pages under memory that nothing was written to yet, where it spans one: of weights of several MB, all
// of which a step reads, the CPU does not keep the addresses of all small pages.
inline void advise_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr size_t kHugePage = 2 << 20;
  const auto address = reinterpret_cast<uintptr_t>(memory);
  const size_t skipped = round_up(address, kHugePage) - address;
  if (bytes < skipped + kHugePage) return;
  // only advice: where the system does not give any, it says so, and nothing is lost
  madvise(static_cast<char*>(memory) + skipped, bytes - skipped, MADV_HUGEPAGE);
#endif
}

// Gives out aligned parts of one allocation. Without a base it only counts what is needed.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}

  template <class T>
  T* take(size_t count) {
    char* start = base_ == nullptr ? nullptr : base_ + used_;
    used_ += round_up(count * sizeof(T), kAlign);
    return reinterpret_cast<T*>(start);
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// One allocation for all that lay_out(Arena&) takes. It is called twice: to count, and to hand out.
template <class LayOut>
AlignedMemory allocate_for(const LayOut& lay_out) {
  Arena count(nullptr);
  lay_out(count);
  AlignedMemory memory = allocate(count.used());
  Arena parts(memory.get());
  lay_out(parts);
  return memory;
}

}  // namespace lstm_quant
