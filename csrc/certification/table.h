// Clopper-Pearson bounds for every count at once.
#pragma once

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "math/binomial.h"

namespace pacd {

// Clopper-Pearson bounds for k = 0..n, on all processors, into bounds[n + 1].
inline void clopper_pearson_table(int64_t n, double alpha, bool upper, double* bounds) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    constexpr int64_t chunk = 256;
    for (int64_t begin = next.fetch_add(chunk); begin <= n; begin = next.fetch_add(chunk)) {
      for (int64_t k = begin; k <= std::min(n, begin + chunk - 1); ++k)
        bounds[k] = clopper_pearson_bound(k, n, alpha, upper);
    }
  };
  std::vector<std::thread> threads;
  for (unsigned i = 1; i < std::thread::hardware_concurrency() && n > 1024; ++i) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
}

}  // namespace pacd
