// The CUDA executor: a grid-stride launch of any kernel on torch's current stream.
#if defined(__CUDACC__)
#include "launch.h"
#endif
#include "operators/registry.h"

namespace pacd {
namespace {

constexpr int block_size = 256;

// A thread takes Kernel::wide neighbouring lanes of a tile: what it writes lies together, and its divisions serve many
// numbers.
template <class Kernel>
__global__ void __launch_bounds__(block_size) tiles_kernel(Kernel kernel, int64_t rows, int64_t tiles) {
  constexpr int wide = Kernel::wide, threads = tile_lanes / wide, words = tile_size / tile_lanes;  // threads: of a tile
  const int64_t count = rows * tiles * threads;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
    const int64_t r = quotient(i, tiles * threads), place = i - r * tiles * threads, tile = place / threads;
    const int lane = static_cast<int>(place % threads) * wide;
    const typename Kernel::Row row = kernel.row(r);
    float numbers[words][wide];
#pragma unroll
    for (int j = 0; j < wide; ++j) {
      const auto block = static_cast<uint32_t>(tile * tile_lanes + lane + j);
      four_normals<typename Kernel::Pairs>(random_words(row.key, block), &numbers[0][j], wide);
    }
#pragma unroll
    for (int word = 0; word < words; ++word) {
      const int64_t e = tile * tile_size + word * tile_lanes + lane;
      if (e < kernel.elements) kernel.put_neighbours(row, e, numbers[word]);
    }
  }
}

template <class Kernel>
__global__ void __launch_bounds__(block_size) rows_kernel(Kernel kernel, int64_t rows) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; row < rows; row += stride)
    kernel(row);
}

// The threads of a warp whose rows count for one number add to it once: votes for one class of one image would queue.
template <class Kernel>
__global__ void __launch_bounds__(block_size) counts_kernel(Kernel kernel, int64_t rows) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int lane = static_cast<int>(threadIdx.x % 32);
  int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x - lane;
  for (; first < rows; first += stride) {  // all of a warp, or none
    int64_t* counter = first + lane < rows ? kernel.counter(first + lane) : nullptr;
    const unsigned same = __match_any_sync(0xFFFFFFFFu, reinterpret_cast<unsigned long long>(counter));
    if (counter && lane == __ffs(static_cast<int>(same)) - 1)
      atomicAdd(reinterpret_cast<unsigned long long*>(counter), static_cast<unsigned long long>(__popc(same)));
  }
}

// A block is a team: thread l plays lane l, in the order of SerialTeam, so that the bits are those of the CPU.
struct BlockTeam {
  template <int R, class Step, class Settle, class Join>
  __device__ __forceinline__ void reduce(int64_t n, const double (&start)[R], double (&out)[R], int period, Step step,
                                         Settle settle, Join join) const {
    __shared__ double lanes[R][team_lanes];
    const int lane = static_cast<int>(threadIdx.x);
    double mine[R], other[R];
    for (int r = 0; r < R; ++r) mine[r] = start[r];
    int round = 0;
    for (int64_t i = lane; i < n; i += team_lanes) {
      step(mine, i);
      if (++round == period) {
        settle(mine);
        round = 0;
      }
    }
    settle(mine);
    __syncthreads();  // everyone has read the last reduction's result
    for (int r = 0; r < R; ++r) lanes[r][lane] = mine[r];
    for (int half = team_lanes / 2; half > 0; half /= 2) {
      __syncthreads();
      if (lane < half) {
        for (int r = 0; r < R; ++r) other[r] = lanes[r][lane + half];
        join(mine, other);
        for (int r = 0; r < R; ++r) lanes[r][lane] = mine[r];
      }
    }
    __syncthreads();
    for (int r = 0; r < R; ++r) out[r] = lanes[r][0];
  }
};

template <class Kernel>
__global__ void __launch_bounds__(team_lanes) teams_kernel(Kernel kernel, int64_t rows) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) kernel(BlockTeam(), row);
}

// Sixteen neighbouring threads are the lanes of a CopiesKernel.
struct LaneSum {
  static constexpr int lanes = 16;
  unsigned mask;

  template <class T>
  __device__ bool operator()(T (&part)[1]) const {
    for (int width = lanes / 2; width > 0; width /= 2)
      part[0] = part[0] + __shfl_down_sync(mask, part[0], width, lanes);
    return threadIdx.x % lanes == 0;
  }
};

template <class Kernel>
__global__ void __launch_bounds__(block_size) copies_kernel(Kernel kernel, int64_t images) {
  const int64_t group = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / LaneSum::lanes;
  const int64_t groups = static_cast<int64_t>(gridDim.x) * blockDim.x / LaneSum::lanes;
  const int lane = threadIdx.x % LaneSum::lanes;
  const LaneSum sum{0xFFFFu << (threadIdx.x & 16u)};
  for (int64_t image = group; image < images; image += groups) {
    for (int64_t first = 0; first < kernel.copies; first += LaneSum::lanes) {
      kernel.template operator()<1>(image, first + lane, nullptr, sum);
    }
  }
}

struct Cuda {
  static constexpr bool channels_together = false, readable = false;

  // Enough blocks of threads to fill the card several times over; the rest is the grid-stride loop's.
  static int64_t blocks(int64_t items) {
    const int64_t wanted = (items + block_size - 1) / block_size;
    return wanted < multiprocessors * 32 ? wanted : multiprocessors * 32;
  }

  template <class Kernel>
  static void run_tiles(const Kernel& kernel, int64_t rows, const Tensor& on) {
    const int64_t tiles = (kernel.elements + tile_size - 1) / tile_size;
    launch(tiles_kernel<Kernel>, blocks(rows * tiles * tile_lanes / Kernel::wide), block_size, on, kernel, rows, tiles);
  }

  template <class Kernel>
  static void run_rows(const Kernel& kernel, int64_t rows, int64_t, const Tensor& on) {
    if (rows > 0) launch(rows_kernel<Kernel>, blocks(rows), block_size, on, kernel, rows);
  }

  template <class Kernel>
  static void run_counts(const Kernel& kernel, int64_t rows, int64_t, const Tensor& on) {
    if (rows > 0) launch(counts_kernel<Kernel>, blocks(rows), block_size, on, kernel, rows);
  }

  template <class Kernel>
  static void run_teams(const Kernel& kernel, int64_t rows, const Tensor& on) {
    const int64_t blocks = rows < multiprocessors * 64 ? rows : multiprocessors * 64;
    if (rows > 0) launch(teams_kernel<Kernel>, blocks, team_lanes, on, kernel, rows);
  }

  template <class Kernel>
  static void run_copies(const Kernel& kernel, int64_t images, const Tensor& on) {
    if (images > 0) launch(copies_kernel<Kernel>, blocks(images * LaneSum::lanes), block_size, on, kernel, images);
  }
};

}  // namespace
}  // namespace pacd

#if defined(__CUDACC__)
STABLE_TORCH_LIBRARY_IMPL(pacd_fast, CUDA, library) { pacd::implement(library, pacd::operators<pacd::Cuda>); }

// For the Python loader, which refuses a driver that is too old for the runtime in this library: the CUDA version that
// the driver supports (0 without one), and the runtime's, each as 1000 * major + 10 * minor.
extern "C" int pacd_cuda_driver() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

extern "C" int pacd_cuda_runtime() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : CUDART_VERSION;
}
#endif
