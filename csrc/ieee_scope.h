// IEEE 754's own arithmetic for a scope: rounding to nearest and denormals kept, whatever the calling thread has set
// (torch.set_flush_denormal(True) sets it for one thread only, so results would depend on who computes them).
#pragma once

#include <cstdint>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace lstm_quant {

class IeeeScope {
 public:
  IeeeScope() : saved_(get()) { set(kDefault); }
  ~IeeeScope() { set(saved_); }
  IeeeScope(const IeeeScope&) = delete;
  IeeeScope& operator=(const IeeeScope&) = delete;

 private:
#if defined(__SSE__)
  static constexpr uint64_t kDefault = 0x1f80;  // all exceptions masked
  static uint64_t get() { return _mm_getcsr(); }
  static void set(uint64_t state) { _mm_setcsr(static_cast<unsigned>(state)); }
#elif defined(__aarch64__)
  static constexpr uint64_t kDefault = 0;
  static uint64_t get() {
    uint64_t state;
    asm volatile("mrs %0, fpcr" : "=r"(state));
    return state;
  }
  static void set(uint64_t state) { asm volatile("msr fpcr, %0" : : "r"(state)); }
#else
  static constexpr uint64_t kDefault = 0;
  static uint64_t get() { return 0; }
  static void set(uint64_t) {}
#endif

  const uint64_t saved_;
};

}  // namespace lstm_quant
