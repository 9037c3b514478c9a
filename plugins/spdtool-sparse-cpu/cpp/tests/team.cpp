// Phases of work, with threads that come early, late, one after the other, or all at once.
#include "team.hpp"

#include <stdexcept>

#include "plain.hpp"

using namespace sparse_cpu;
using namespace plain;

namespace {

// Each item of a phase sums the results of every item of the phase before, in plain memory. A phase that began too early, or
// a write that a thread does not see, gives another sum, and a race that the thread sanitizer finds.
void sums_through_phases(Lender lender, size_t most, const std::vector<size_t>& items) {
  std::vector<std::vector<uint64_t>> left(items.size() + 1);
  left[0] = {1};
  std::vector<size_t> of_worker(most, 0);
  std::vector<Phase> phases;
  size_t total = 0;
  for (size_t p = 0; p < items.size(); p++) {
    left[p + 1].assign(items[p], 0);
    total += items[p];
    phases.push_back({items[p], [&, p](size_t item, size_t worker) {
                        uint64_t sum = item;
                        for (const uint64_t x : left[p]) sum += x;
                        left[p + 1][item] += sum % 1000003;
                        of_worker[worker]++;
                      }});
  }
  const size_t joined = Team::run(phases, lender, most);
  CHECK(joined >= 1 && joined <= most);

  std::vector<uint64_t> expected = {1};
  for (size_t p = 0; p < items.size(); p++) {
    uint64_t sum = 0;
    for (const uint64_t x : expected) sum += x;
    expected.resize(items[p]);
    for (size_t i = 0; i < items[p]; i++) expected[i] = (sum + i) % 1000003;
    CHECK(left[p + 1] == expected);
  }
  size_t done = 0;
  for (size_t w = 0; w < most; w++) done += of_worker[w];
  CHECK(done == total);
  for (size_t w = joined; w < most; w++) CHECK(of_worker[w] == 0);
}

const std::vector<std::vector<size_t>> kShapes = {
    {1}, {5}, {1, 1, 1, 1}, {3, 1, 7, 2, 64, 1, 1, 30}, {2, 0, 3}, {0, 4}, std::vector<size_t>(100, 2)};

void in_turn() {
  Threads one;
  for (const auto& items : kShapes)
    for (const size_t most : {1, 2, 8}) sums_through_phases(one, most, items);
}

void together() {
  for (const size_t threads : {2, 3, 8})
    for (int again = 0; again < 30; again++) {
      Threads many{threads};
      for (const auto& items : kShapes) sums_through_phases(many, threads, items);
    }
}

void late() {
  for (const size_t threads : {2, 8})
    for (int again = 0; again < 10; again++) {
      Threads many{threads, unsigned(20 + 40 * again)};
      for (const auto& items : kShapes) sums_through_phases(many, threads, items);
    }
}

void more_calls_than_threads() {
  Threads two{2};
  for (const auto& items : kShapes) sums_through_phases(two, 64, items);
}

// An exception on any thread reaches the caller, and no thread waits for ever.
void work_that_throws() {
  for (const size_t threads : {1, 2, 8})
    for (const size_t at : {0, 1, 2}) {
      Threads lender{threads};
      std::vector<Phase> phases;
      for (size_t p = 0; p < 3; p++)
        phases.push_back({7, [p, at](size_t item, size_t) {
                            if (p == at && item == 4) throw std::runtime_error("no memory in phase");
                          }});
      CHECK_REFUSED(std::runtime_error, Team::run(phases, lender, threads), "no memory in phase");
    }
}

}  // namespace

int main(int count, char** arguments) {
  return check::run({{"in turn", in_turn},
                     {"together", together},
                     {"late", late},
                     {"more calls than threads", more_calls_than_threads},
                     {"work that throws", work_that_throws}},
                    count, arguments);
}
