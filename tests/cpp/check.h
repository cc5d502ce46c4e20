// A tiny test runner: TEST(name) { CHECK(condition) << "what went wrong"; }
#pragma once

#include <cstdint>
#include <functional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace lstm_quant::testing {

struct Test {
  const char* name;
  std::function<void()> run;
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

struct Registration {
  Registration(const char* name, std::function<void()> run) { tests().push_back({name, std::move(run)}); }
};

// How many random cases a test takes: fewer where AddressSanitizer makes each three times as long, or ThreadSanitizer
// ten.
constexpr uint32_t seeds(uint32_t plain) {
#ifdef __SANITIZE_THREAD__
  return (plain + 9) / 10;
#elif defined(__SANITIZE_ADDRESS__)
  return (plain + 2) / 3;
#else
  return plain;
#endif
}

// Throws when it goes out of scope with all its words.
class Failure {
 public:
  Failure(const char* condition, const char* file, int line) {
    words_ << file << ":" << line << ": " << condition << " ";
  }
  ~Failure() noexcept(false) { throw std::logic_error(words_.str()); }
  template <class Word>
  Failure& operator<<(const Word& word) {
    words_ << word;
    return *this;
  }

 private:
  std::ostringstream words_;
};

// The message of the std::runtime_error that `action` throws; empty if it throws none.
template <class Action>
std::string error_of(Action action) {
  try {
    action();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

}  // namespace lstm_quant::testing

#define TEST(name)                                                                   \
  static void name();                                                                \
  static const ::lstm_quant::testing::Registration name##_registration(#name, name); \
  static void name()

#define CHECK(condition) \
  if (condition) {       \
  } else                 \
    ::lstm_quant::testing::Failure(#condition, __FILE__, __LINE__)

#define CHECK_ERROR(action, words)                                                             \
  do {                                                                                         \
    const std::string message = ::lstm_quant::testing::error_of([&] { action; });              \
    CHECK(message.find(words) != std::string::npos) << "with the message '" << message << "'"; \
  } while (false)
