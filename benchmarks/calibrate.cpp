// What this CPU can do at most: int8 multiply-accumulates per second with exact int32 sums, and bytes read per second
// by the size of what is read again and again. Prints JSON: {"macs": {threads: 1/s}, "reads": {threads: {bytes a
// thread: bytes/s}}}. Usage: calibrate THREADS...; each thread stays on a CPU of its own. x86-64 with AVX2 or more.
#include <cpuid.h>
#include <immintrin.h>
#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr int kSums = 12;  // accumulators in flight: enough to hide every instruction's latency
constexpr long kSteps = 200'000;

struct Kernel {
  void (*run)();
  double macs;  // of one run
};

// Operands and sums stay in registers, as it is the multipliers' peak that is wanted. The empty asm makes the compiler
// take an operand for a new value, so that it cannot move the product out of the loop.

__attribute__((target("avx2"))) void multiply_avx2() {
  __m256i x = _mm256_set1_epi8(3), w = _mm256_set1_epi8(2), sums[kSums] = {};
  const __m256i ones = _mm256_set1_epi16(1);
  for (long step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
    for (__m256i& sum : sums) {
      asm volatile("" : "+x"(x));
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(x, w), ones));
    }
  }
  for (__m256i& sum : sums) asm volatile("" : "+x"(sum));
}

__attribute__((target("avx2"))) void multiply_avx_vnni() {
  __m256i x = _mm256_set1_epi8(3), w = _mm256_set1_epi8(2), sums[kSums] = {};
  for (long step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
    for (__m256i& sum : sums) asm volatile("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(x), "x"(w));
  }
}

__attribute__((target("avx512f"))) void multiply_avx512_vnni() {
  __m512i x = _mm512_set1_epi8(3), w = _mm512_set1_epi8(2), sums[kSums] = {};
  for (long step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
    for (__m512i& sum : sums) asm volatile("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
  }
}

// A load whose result nobody uses must still bring its line.

__attribute__((target("avx2"))) void read_avx2(const char* data, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 256) {
#pragma GCC unroll 8
    for (size_t k = 0; k < 256; k += 32) {
      asm volatile("vmovdqa %0, %%ymm0" : : "m"(*reinterpret_cast<const __m256i*>(data + i + k)) : "xmm0");
    }
  }
}

__attribute__((target("avx512f"))) void read_avx512(const char* data, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 512) {
#pragma GCC unroll 8
    for (size_t k = 0; k < 512; k += 64) {
      asm volatile("vmovdqa64 %0, %%zmm0" : : "m"(*reinterpret_cast<const __m512i*>(data + i + k)) : "xmm0");
    }
  }
}

bool has_avx_vnni() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

// A thread's CPU: the index-th of those that this process may use.
void pin(int index) {
  cpu_set_t allowed;
  sched_getaffinity(0, sizeof allowed, &allowed);
  int cpu = 0;
  for (int found = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &allowed) && found++ == index) break;
  }
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(cpu, &one);
  pthread_setaffinity_np(pthread_self(), sizeof one, &one);
}

// The highest rate, over rounds, that all threads reach together: the sum of amount / seconds of work(thread).
double best_rate(int threads, int rounds, double amount, const std::function<void(int)>& work) {
  pthread_barrier_t start;
  pthread_barrier_init(&start, nullptr, threads);
  std::vector<std::vector<double>> rates(rounds, std::vector<double>(threads));
  auto body = [&](int thread) {
    pin(thread);
    work(thread);
    for (int round = 0; round < rounds; ++round) {
      pthread_barrier_wait(&start);
      const auto begin = std::chrono::steady_clock::now();
      work(thread);
      rates[round][thread] = amount / std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    }
  };
  std::vector<std::thread> pool;
  for (int thread = 0; thread < threads; ++thread) pool.emplace_back(body, thread);
  for (std::thread& thread : pool) thread.join();
  pthread_barrier_destroy(&start);
  double best = 0;
  for (const auto& round : rates) best = std::max(best, std::accumulate(round.begin(), round.end(), 0.0));
  return best;
}

double multiply_rate(int threads) {
  constexpr double kAmount = double{kSums} * kSteps;
  std::vector<Kernel> kernels = {{multiply_avx2, 32 * kAmount}};
  if (has_avx_vnni()) kernels.push_back({multiply_avx_vnni, 32 * kAmount});
  if (__builtin_cpu_supports("avx512vnni")) kernels.push_back({multiply_avx512_vnni, 64 * kAmount});
  double best = 0;
  for (const Kernel& kernel : kernels) {
    best = std::max(best, best_rate(threads, 20, kernel.macs, [&](int) { kernel.run(); }));
  }
  return best;
}

double read_rate(int threads, size_t bytes) {
  constexpr size_t kAlignment = 2 << 20, kBytesARound = 64 << 20;
  std::vector<std::unique_ptr<char, decltype(&std::free)>> data;
  for (int thread = 0; thread < threads; ++thread) {
    const size_t room = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    data.emplace_back(static_cast<char*>(std::aligned_alloc(kAlignment, room)), &std::free);
    std::fill_n(data.back().get(), room, 1);
  }
  const size_t passes = std::max<size_t>(1, kBytesARound / bytes);
  const auto read = __builtin_cpu_supports("avx512f") ? read_avx512 : read_avx2;
  return best_rate(threads, 30, static_cast<double>(bytes * passes), [&](int thread) {
    for (size_t pass = 0; pass < passes; ++pass) read(data[thread].get(), bytes);
  });
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2 || !__builtin_cpu_supports("avx2")) {
    std::fprintf(stderr, "usage: calibrate THREADS..., on a CPU with AVX2\n");
    return 1;
  }
  std::string macs, reads;
  for (int i = 1; i < argc; ++i) {
    const std::string key = (i > 1 ? ", \"" : "\"") + std::string(argv[i]) + "\": ";
    const int threads = std::atoi(argv[i]);
    macs += key + std::to_string(multiply_rate(threads));
    std::string sizes;
    for (size_t kib = 16; kib <= 128 << 10; kib *= 2) {
      sizes += (kib > 16 ? ", \"" : "\"") + std::to_string(kib << 10) +
               "\": " + std::to_string(read_rate(threads, kib << 10));
    }
    reads += key + "{" + sizes + "}";
  }
  std::printf("{\"macs\": {%s}, \"reads\": {%s}}\n", macs.c_str(), reads.c_str());
}
