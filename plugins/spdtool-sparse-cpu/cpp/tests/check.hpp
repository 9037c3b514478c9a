// What every test program uses: checks that count, numbers by chance that are the same everywhere, and a main function.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <functional>
#include <string>
#include <vector>

namespace check {

inline int failed = 0, told = 0;  // told: of this section
inline std::string where;  // what is being tested, for messages

inline void report(const char* file, int line, const std::string& what) {
  failed++;
  if (++told <= 5) std::printf("%s:%d: %s: %s\n", file, line, where.c_str(), what.c_str());
}

inline void that(bool good, const char* file, int line, const std::string& what) {
  if (!good) report(file, line, what);
}

// Whether `work` throws an Error whose message holds `text`.
template <class Error>
std::string refusal(const std::function<void()>& work, const char* text) {
  try {
    work();
  } catch (const Error& error) {
    return std::string(error.what()).find(text) != std::string::npos ? "" : "another message: " + std::string(error.what());
  } catch (const std::exception& error) {
    return "another error: " + std::string(error.what());
  }
  return "no error";
}

template <class Error>
void refused(const std::function<void()>& work, const std::string& text, const char* file, int line, const char* what) {
  const std::string found = refusal<Error>(work, text.c_str());
  that(found.empty(), file, line, found.empty() ? found : std::string(what) + ": " + found);
}

// splitmix64: the same numbers with every compiler and library.
class Chance {
 public:
  explicit Chance(uint64_t seed) : state_(seed) {}

  uint64_t bits() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  uint64_t below(uint64_t n) { return bits() % n; }
  double uniform() { return double(bits() >> 11) * 0x1p-53; }
  float number() { return float(uniform() * 2 - 1); }  // in [-1, 1)

 private:
  uint64_t state_;
};

// The largest |a - b| / (1 + |b|); infinite where one of them is not finite.
template <class A, class B>
double distance(const A& a, const B& b) {
  if (a.size() != b.size()) return INFINITY;
  double most = 0;
  for (size_t i = 0; i < a.size(); i++) {
    const double d = std::fabs(double(a[i]) - double(b[i])) / (1 + std::fabs(double(b[i])));
    if (!(d <= most)) most = std::isfinite(d) ? d : INFINITY;
  }
  return most;
}

struct Section {
  const char* name;
  std::function<void()> run;
};

// Runs the sections; where the program is given arguments, those whose names hold one of them.
inline int run(const std::vector<Section>& sections, int count, char** arguments) {
  for (const Section& section : sections) {
    const auto asked = [&](const char* part) { return std::string(section.name).find(part) != std::string::npos; };
    if (count > 1 && std::none_of(arguments + 1, arguments + count, asked)) continue;
    const auto begun = std::chrono::steady_clock::now();
    const int before = failed;
    where = section.name;
    told = 0;
    try {
      section.run();
    } catch (const std::exception& error) {
      that(false, section.name, 0, std::string("stopped by ") + error.what());
    }
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begun;
    std::printf("%-40s %s  %.1f s\n", section.name, failed == before ? "passed" : "FAILED", seconds.count());
    std::fflush(stdout);
  }
  return failed != 0;
}

}  // namespace check

#define CHECK(good) ((good) ? void() : check::report(__FILE__, __LINE__, #good))
#define CHECK_REFUSED(Error, work, text) \
  check::refused<Error>([&] { (void)(work); }, text, __FILE__, __LINE__, #work)
// Relative to the larger of 1 and the expected number.
#define CHECK_CLOSE(a, b, tolerance)                                                                          \
  do {                                                                                                        \
    const double far = check::distance(a, b);                                                                 \
    check::that(far <= (tolerance), __FILE__, __LINE__, #a " is " + std::to_string(far / 1e-6) + "e-6 away"); \
  } while (0)
