// Runs all tests, or those whose names contain the first argument; says first which kernels they compare.
#include <cstdio>
#include <cstring>
#include <exception>

#include "check.h"
#include "dispatch.h"
#include "tested_kernels.h"

int main(int argc, char** argv) {
  using namespace lstm_quant;
  std::printf("kernels: %s; chosen: %s\n", names(testing::tested_kernels()).c_str(), choose_kernels("").name);
  int failed = 0, run = 0;
  for (const auto& test : testing::tests()) {
    if (argc > 1 && std::strstr(test.name, argv[1]) == nullptr) continue;
    ++run;
    try {
      test.run();
      std::printf("passed %s\n", test.name);
    } catch (const std::exception& error) {
      ++failed;
      std::printf("FAILED %s\n  %s\n", test.name, error.what());
    }
    std::fflush(stdout);
  }
  std::printf("%d of %d tests failed\n", failed, run);
  return failed == 0 && run > 0 ? 0 : 1;
}
