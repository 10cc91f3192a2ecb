// Loops over tasks on the threads torch uses.
//
// Two OpenMP runtimes in one process fight: after a parallel region the threads of each keep
// spinning for the next one. So nothing here is compiled with OpenMP; Python looks up
// GOMP_parallel in the library that torch itself is linked to, and passes its address. Without it,
// threads are started for each call.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace spartan {

// void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags)
using Runner = void (*)(void (*)(void*), void*, unsigned, unsigned);

inline Runner& runner() {
  static Runner address = nullptr;
  return address;
}

// Calls f(worker, task) for every task, in any order, with at most one call per worker at a time.
template <class F>
void parallel(std::int64_t tasks, int threads, F f) {
  threads = static_cast<int>(std::min<std::int64_t>(threads, tasks));
  if (threads <= 1) {
    for (std::int64_t task = 0; task < tasks; ++task) f(0, task);
    return;
  }
  struct Shared {
    F& f;
    std::int64_t tasks;
    std::atomic<std::int64_t> next_task{0};
    std::atomic<int> next_worker{0};
  } shared{f, tasks};
  const auto work = [](void* data) {
    auto& shared = *static_cast<Shared*>(data);
    const int worker = shared.next_worker++;
    for (std::int64_t task; (task = shared.next_task++) < shared.tasks;) shared.f(worker, task);
  };
  if (runner()) {
    runner()(work, &shared, static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> helpers;
  for (int i = 1; i < threads; ++i) helpers.emplace_back(work, &shared);
  work(&shared);
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace spartan
