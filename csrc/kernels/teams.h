// Sums over a row that have the same bits for every vector width, thread count and device.
//
// A team kernel has `void operator()(const Team&, int64_t row) const` and sums over its row in the team's lanes.
#pragma once

#include "portable.h"

namespace pacd {

// The lanes of a row: element i belongs to lane i % team_lanes, each lane runs in order, and lanes are combined as a
// binary tree. A CPU thread plays all lanes (the compiler makes vectors of them), a CUDA block one per thread: the
// result has the same bits for every vector width, thread count and device.
constexpr int team_lanes = 128;

// What a Team does for a row: fold `step(state, i)` over i in [0, n), with `settle(state)` after every `period` steps
// of a lane and at its end (it must be exact, so that its moments do not matter), then combine the lanes with `join`.
struct SerialTeam {
  template <int R, class Step, class Settle, class Join>
  PACD_INLINE void reduce(int64_t n, const double (&start)[R], double (&out)[R], int period, Step step, Settle settle,
                          Join join) const {
    alignas(64) double lanes[R][team_lanes];
    for (int r = 0; r < R; ++r)
      for (int l = 0; l < team_lanes; ++l) lanes[r][l] = start[r];
    const auto settle_all = [&] {
      for (int l = 0; l < team_lanes; ++l) {
        double state[R];
        for (int r = 0; r < R; ++r) state[r] = lanes[r][l];
        settle(state);
        for (int r = 0; r < R; ++r) lanes[r][l] = state[r];
      }
    };
    int round = 0;
    for (int64_t first = 0; first < n; first += team_lanes) {
      const int count = n - first < team_lanes ? static_cast<int>(n - first) : team_lanes;
      for (int l = 0; l < count; ++l) {
        double state[R];
        for (int r = 0; r < R; ++r) state[r] = lanes[r][l];
        step(state, first + l);
        for (int r = 0; r < R; ++r) lanes[r][l] = state[r];
      }
      if (++round == period) {
        settle_all();
        round = 0;
      }
    }
    settle_all();
    for (int half = team_lanes / 2; half > 0; half /= 2)
      for (int l = 0; l < half; ++l) {
        double mine[R], other[R];
        for (int r = 0; r < R; ++r) mine[r] = lanes[r][l], other[r] = lanes[r][l + half];
        join(mine, other);
        for (int r = 0; r < R; ++r) lanes[r][l] = mine[r];
      }
    for (int r = 0; r < R; ++r) out[r] = lanes[r][0];
  }
};

struct AddStates {
  template <int R>
  PACD_INLINE void operator()(double (&mine)[R], const double (&other)[R]) const {
    for (int r = 0; r < R; ++r) mine[r] += other[r];
  }
};

struct NothingToSettle {
  template <int R>
  PACD_INLINE void operator()(double (&)[R]) const {}
};

}  // namespace pacd
