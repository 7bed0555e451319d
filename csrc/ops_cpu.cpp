// The operators' schemas, and the CPU executor: torch's threads times compiler-written SIMD.
#include "ops.h"
#include "tile_cpu.h"

namespace pacd {
namespace {

// The two loops below are compiled once per instruction set; what they call is inlined into each copy, but draw_tiles,
// which has copies of its own.
template <class Kernel>
PACD_CLONES void tiles_between(const Kernel& shared, int64_t begin, int64_t end, int64_t tiles) {
  const Kernel kernel = shared;  // a copy: what is written cannot alias it
  constexpr int64_t most = 16;   // tiles at a time, so that their numbers stay in the first cache
  alignas(64) float numbers[most * tile_size];
  const RoundKeys rounds(kernel.seed);
  for (int64_t i = begin; i < end;) {
    const int64_t r = i / tiles, first = i - r * tiles;
    const int64_t last = first + (end - i) < tiles ? first + (end - i) : tiles;
    const typename Kernel::Row row = kernel.row(r);
    int64_t tile = first;
    if constexpr (Kernel::plain) {  // whole tiles go where they belong at once
      const int64_t whole = kernel.elements / tile_size < last ? kernel.elements / tile_size : last;
      if (!kernel.scattered() && tile < whole) {
        draw_tiles(rounds, row.key, tile, static_cast<int>(whole - tile), tile_size, row.target + tile * tile_size,
                   row.pixels + tile * tile_size, kernel.sigma);
        tile = whole;
      }
    }
    for (; tile < last; tile += most) {
      const int64_t count = last - tile < most ? last - tile : most;
      const int64_t full = (tile + count) * tile_size, stop = full < kernel.elements ? full : kernel.elements;
      draw_tiles(rounds, row.key, tile, static_cast<int>(count), static_cast<int>(tile_size - (full - stop)), numbers, nullptr, 0.0f);
      kernel.put_run(row, tile * tile_size, stop, numbers);
    }
    i += last - first;
  }
}

template <class Kernel>
PACD_CLONES void rows_between(const Kernel& kernel, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) kernel(row);
}

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

}  // namespace
}  // namespace pacd

STABLE_TORCH_LIBRARY(pacd_fast, library) {
  for (const char* schema : pacd::schemas) library.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(pacd_fast, CPU, library) { pacd::register_operators<pacd::Cpu>(library); }
