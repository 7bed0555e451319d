// The CPU executor: torch's threads times compiler-written SIMD; and the definitions of all operators.
#include "kernels/tiles_cpu.h"
#include "operators/convolutions_cpu.h"
#include "operators/registry.h"

namespace pacd {
namespace {

// The two loops below are compiled once per instruction set; what they call is inlined into each copy, but draw_tiles,
// which has copies of its own.
template <class Kernel>
PACD_CLONES void tiles_between(const Kernel& shared, int64_t begin, int64_t end, int64_t tiles) {
  const Kernel kernel = shared;  // a copy: what is written cannot alias it
  constexpr int64_t most = 16;   // tiles at a time, so that their numbers stay in the first cache
  alignas(64) float numbers[most * tile_size];
  const RoundKeys rounds(kernel.rows.seed);
  constexpr typename Kernel::Pairs pairs;
  int64_t r = begin / tiles, first = begin - r * tiles;  // the row, and the tile in it
  for (int64_t i = begin; i < end; ++r, first = 0) {
    const int64_t last = first + (end - i) < tiles ? first + (end - i) : tiles;
    const typename Kernel::Row row = kernel.row(r);
    // The elements before the end of tile `stop`, and how many of them are in the last tile.
    const auto end_of = [&](int64_t stop) {
      return stop * tile_size < kernel.elements ? stop * tile_size : kernel.elements;
    };
    const auto wanted = [&](int64_t stop) { return static_cast<int>(end_of(stop) - (stop - 1) * tile_size); };
    bool written = false;
    if constexpr (Kernel::plain) {  // where they belong at once
      if (!kernel.scattered()) {
        const int64_t at = first * tile_size;
        draw_tiles(pairs, rounds, row.key, first, static_cast<int>(last - first), wanted(last), row.target + at,
                   row.pixels + at, kernel.sigma);
        written = true;
      }
    }
    for (int64_t tile = first; tile < last && !written; tile += most) {
      const int64_t stop = last - tile < most ? last : tile + most;
      draw_tiles(pairs, rounds, row.key, tile, static_cast<int>(stop - tile), wanted(stop), numbers, nullptr, 0.0f);
      kernel.put_run(row, tile * tile_size, end_of(stop), numbers);
    }
    i += last - first;
  }
}

template <class Kernel>
PACD_CLONES void rows_between(const Kernel& kernel, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) kernel(row);
}

// Whole numbers, so the order in which threads add does not matter.
template <class Kernel>
struct AddOnes {
  Kernel kernel;
  PACD_INLINE void operator()(int64_t row) const {
    if (int64_t* counter = kernel.counter(row)) __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED);
  }
};

template <class Kernel>
PACD_CLONES void teams_between(const Kernel& shared, int64_t begin, int64_t end) {
  const Kernel kernel = shared;
  for (int64_t row = begin; row < end; ++row) kernel(SerialTeam(), row);
}

struct LaneSum {
  static constexpr int lanes = 16;

  template <class T>
  PACD_INLINE bool operator()(T (&part)[lanes]) const {
    for (int width = lanes / 2; width > 0; width /= 2) {
      PACD_LANES for (int lane = 0; lane < width; ++lane) part[lane] = part[lane] + part[lane + width];
    }
    return true;
  }
};

template <class Kernel>
PACD_CLONES void copies_between(const Kernel& shared, int64_t begin, int64_t end, typename Kernel::Number* numbers) {
  const Kernel kernel = shared;
  for (int64_t image = begin; image < end; ++image) {
    for (int64_t first = 0; first < kernel.copies; first += LaneSum::lanes) {
      kernel.template operator()<LaneSum::lanes>(image, first, numbers, LaneSum());
    }
  }
}

// Splits [0, count) over torch's threads; at least `grain` items a thread.
template <class Body>
void split(int64_t count, int64_t grain, const Body& body) {
  torch::stable::parallel_for(0, count, grain, [&body](int64_t begin, int64_t end) { body(begin, end); });
}

struct Cpu {
  static constexpr bool channels_together = true;  // the channels of a pixel are one item's loop
  static constexpr bool readable = true;           // a tensor's numbers can be looked at without waiting for a device

  template <class Kernel>
  static void run_tiles(const Kernel& kernel, int64_t rows, const Tensor&) {
    const int64_t tiles = (kernel.elements + tile_size - 1) / tile_size;
    split(rows * tiles, 256, [&](int64_t begin, int64_t end) { tiles_between(kernel, begin, end, tiles); });
  }

  template <class Kernel>
  static void run_rows(const Kernel& kernel, int64_t rows, int64_t grain, const Tensor&) {
    split(rows, grain, [&](int64_t begin, int64_t end) { rows_between(kernel, begin, end); });
  }

  template <class Kernel>
  static void run_counts(const Kernel& kernel, int64_t rows, int64_t grain, const Tensor& on) {
    run_rows(AddOnes<Kernel>{kernel}, rows, grain, on);
  }

  template <class Kernel>
  static void run_teams(const Kernel& kernel, int64_t rows, const Tensor&) {
    split(rows, 1, [&](int64_t begin, int64_t end) { teams_between(kernel, begin, end); });
  }

  template <class Kernel>
  static void run_copies(const Kernel& kernel, int64_t images, const Tensor&) {
    split(images, 16384 / (kernel.copies * kernel.classes) + 1, [&](int64_t begin, int64_t end) {
      std::vector<typename Kernel::Number> numbers(LaneSum::lanes * kernel.classes);
      copies_between(kernel, begin, end, numbers.data());
    });
  }
};

// What the CPU alone has.
constexpr Operator cpu_operators[] = {
    PACD_OPERATOR(narrow_grad, Cpu),
    PACD_OPERATOR(convolve3x3, Cpu),
};

}  // namespace
}  // namespace pacd

STABLE_TORCH_LIBRARY(pacd_fast, library) {
  pacd::define(library, pacd::operators<pacd::Cpu>);
  pacd::define(library, pacd::cpu_operators);
}

STABLE_TORCH_LIBRARY_IMPL(pacd_fast, CPU, library) {
  pacd::implement(library, pacd::operators<pacd::Cpu>);
  pacd::implement(library, pacd::cpu_operators);
}
