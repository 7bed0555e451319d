// The pybind11 module pacd_fast._C: bindings of what is no tensor operator, and what the build and the process are.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#if defined(__linux__)
#include <malloc.h>
#endif

#include <tuple>
#include <utility>
#include <vector>

#include "kernels/flips.h"
#include "kernels/lattice.h"
#include "math/lattice_errors.h"
#include "math/normal.h"
#include "certification/bindings.h"
#include "certification/table.h"

namespace py = pybind11;

namespace pacd {
namespace {

py::array_t<double> bound_table(int64_t n, double alpha, bool upper) {
  if (!in_range(0, n, alpha)) throw py::value_error("n must be in [1, 2^31) and alpha in [1e-200, 1 - 2^-20]");
  py::array_t<double> table(n + 1);
  double* bounds = table.mutable_data();
  py::gil_scoped_release release;
  clopper_pearson_table(n, alpha, upper, bounds);
  return table;
}

// The bits that noise is made of: `count` words of one image on one stream, sample after sample, `blocks` blocks each.
py::array_t<uint32_t> random_bits(uint64_t seed, uint32_t stream, uint64_t image, uint32_t first, uint32_t blocks,
                                  int64_t samples) {
  py::array_t<uint32_t> out({samples, static_cast<int64_t>(blocks), int64_t{4}});
  uint32_t* words = out.mutable_data();
  py::gil_scoped_release release;
  for (int64_t s = 0; s < samples; ++s) {
    for (uint32_t b = 0; b < blocks; ++b, words += 4) {
      const Words w = random_words({seed, image, stream, first + static_cast<uint32_t>(s)}, b);
      words[0] = w.w0;
      words[1] = w.w1;
      words[2] = w.w2;
      words[3] = w.w3;
    }
  }
  return out;
}

std::vector<uint32_t> philox(std::vector<uint32_t> counter, std::vector<uint32_t> key) {
  if (counter.size() != 4 || key.size() != 2) throw py::value_error("counter has 4 words and key has 2");
  const Words w = philox4x32({counter[0], counter[1], counter[2], counter[3]}, key[0], key[1]);
  return {w.w0, w.w1, w.w2, w.w3};
}

py::array_t<float> normals(py::array_t<uint32_t, py::array::c_style | py::array::forcecast> words) {
  if (words.ndim() != 2 || words.shape(1) != 2) throw py::value_error("words must be [N, 2]");
  py::array_t<float> out({words.shape(0), words.shape(1)});
  for (py::ssize_t i = 0; i < words.shape(0); ++i) {
    const NormalPair pair = BoxMuller::pair(words.at(i, 0), words.at(i, 1));
    out.mutable_at(i, 0) = pair.first;
    out.mutable_at(i, 1) = pair.second;
  }
  return out;
}

using Pixels = py::array_t<float, py::array::c_style | py::array::forcecast>;

// The evidence for lattice noise; see lattice_errors.h.
std::pair<double, double> lattice_radius_errors(uint32_t first, uint32_t last, uint32_t stride, int threads) {
  if (first > last || stride < 1) throw py::value_error("first must not be above last, and stride positive");
  py::gil_scoped_release release;
  const RadiusErrors found = radius_errors(first, last, stride, threads);
  return {found.radius, found.number};
}

std::pair<double, double> lattice_angle_errors(uint32_t eighth, uint32_t stride, int threads) {
  if (eighth > 7 || stride < 1) throw py::value_error("eighth must be in [0, 8), and stride positive");
  py::gil_scoped_release release;
  const AngleErrors found = angle_errors(eighth, stride, threads);
  return {found.error, found.size};
}

py::dict lattice_cell_errors(Pixels x, float sigma, double step, double offset, uint64_t seed, int64_t samples,
                             int threads) {
  CellErrors found;
  {
    const float* pixels = x.data();
    const int64_t elements = x.size();
    py::gil_scoped_release release;
    found = cell_errors(Lattice(sigma, step, offset), pixels, elements, sigma, seed, samples, threads);
  }
  py::dict result;
  result["cells"] = found.cells;
  result["open"] = found.open;
  result["near"] = found.near;
  result["voids"] = found.voids;
  result["wrong_quick"] = found.wrong_quick;
  result["wrong_exact"] = found.wrong_exact;
  result["quick_share"] = found.quick_share;
  result["exact_share"] = found.exact_share;
  return result;
}

// Samples first, first + 1, ... of one image, float32 [samples, elements], by the kernel's code for single elements and
// without SIMD.
py::array_t<float> lattice_points(Pixels x, float sigma, double step, double offset, uint64_t seed, uint32_t stream,
                                  int64_t image, int64_t first, int64_t samples) {
  const int64_t elements = x.size();
  py::array_t<float> out({samples, elements});
  Lattice lattice(sigma, step, offset);
  std::vector<float> whole(elements), part(elements);
  std::vector<uint8_t> voids(samples);
  const PlacePixels place{x.data(), &lattice, whole.data(), part.data(), elements, elements, 1};
  for (int64_t item = 0; item * tile_size < elements; ++item) place(item);
  const BatchRows rows{&image, nullptr, 1, samples, first, seed, stream};
  const LatticeCopies<float> kernel{x.data(),     whole.data(), part.data(), &lattice, out.mutable_data(),
                                    voids.data(), rows,         elements,    1,        elements,
                                    false};
  for (int64_t r = 0; r < samples; ++r) {
    const auto row = kernel.row(r);
    for (int64_t e = 0; e < elements; ++e) {
      float number[tile_size / tile_lanes];
      const auto block = static_cast<uint32_t>(e / tile_size * tile_lanes + e % tile_lanes);
      four_normals<BoundedBoxMuller>(random_words(row.key, block), number, 1);
      kernel.put(row, e, number[e % tile_size / tile_lanes]);
    }
  }
  return out;
}

// log tau(r), r = 0..: see flips.h.
py::array_t<double> flip_table(double q, int64_t classes, int64_t r_max, double log_smallest) {
  if (r_max < 0) throw py::value_error("r_max must not be negative");
  std::vector<double> table;
  {
    py::gil_scoped_release release;
    table = log_flip_table(LabelNoise(q, classes), r_max, log_smallest);
  }
  return py::array_t<double>(static_cast<py::ssize_t>(table.size()), table.data());
}

using Influences = py::array_t<double, py::array::c_style | py::array::forcecast>;
using Counts = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

std::pair<py::array_t<int64_t>, py::array_t<int64_t>> flips_of_linear_votes(Influences alpha, Counts y, double q,
                                                                            int64_t classes, bool smoothed,
                                                                            int threads) {
  if (alpha.ndim() != 2 || y.ndim() != 1 || y.size() != alpha.shape(1))
    throw py::value_error("alpha must be [m, n] and y [n]");
  for (py::ssize_t i = 0; i < y.size(); ++i)
    if (y.data()[i] < 0 || y.data()[i] >= classes) throw py::value_error("labels must be in [0, classes)");
  const LabelNoise noise(q, classes);
  py::array_t<int64_t> prediction(alpha.shape(0)), flips(alpha.shape(0));
  const double* rows = alpha.data();
  int64_t *classes_out = prediction.mutable_data(), *flips_out = flips.mutable_data();
  {
    py::gil_scoped_release release;
    linear_flips(rows, alpha.shape(0), y.data(), y.size(), noise, smoothed, classes_out, flips_out, threads);
  }
  return {prediction, flips};
}

// Per rival (rival, margin, harm of the r worst flips, bound on losing the noisy vote after them); see LinearVote.
std::vector<std::tuple<int64_t, double, double, double>> flip_bounds(Influences alpha, Counts y, double q,
                                                                     int64_t classes, bool smoothed, int64_t r) {
  if (alpha.ndim() != 1 || y.ndim() != 1 || y.size() != alpha.size()) throw py::value_error("alpha and y must be [n]");
  if (r < 0 || r > y.size()) throw py::value_error("r must be in [0, n]");
  for (py::ssize_t i = 0; i < y.size(); ++i)
    if (y.data()[i] < 0 || y.data()[i] >= classes) throw py::value_error("labels must be in [0, classes)");
  LinearVote vote(y.data(), y.size(), LabelNoise(q, classes), smoothed);
  std::vector<std::tuple<int64_t, double, double, double>> out;
  for (const LinearVote::Bound& b : vote.bounds(alpha.data(), r)) out.emplace_back(b.rival, b.margin, b.harm, b.miss);
  return out;
}

std::pair<double, double> pair_of(Dd x) { return {x.hi, x.lo}; }

const char* simd_level() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4 (AVX-512)";
  if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3 (AVX2)";
  return "x86-64 (SSE2)";
#else
  return "the compiler's default";
#endif
}

// Freed memory stays with the process and is used again, instead of fresh, zeroed pages from the kernel for every large
// tensor.  Training allocates the same sizes at every step, and page faults took up to a third of its time.
bool keep_freed_memory() {
#if defined(__GLIBC__)
  return mallopt(M_MMAP_MAX, 0) == 1 && mallopt(M_TRIM_THRESHOLD, -1) == 1;
#else
  return false;
#endif
}

py::dict build_info() {
  py::dict info;
  info["version"] = PACD_VERSION;
  info["compiler"] = PACD_COMPILER;
  info["simd"] = simd_level();
  info["built_with_torch"] = PACD_TORCH_VERSION;
#if defined(__SANITIZE_ADDRESS__)
  info["sanitized"] = true;
#else
  info["sanitized"] = false;
#endif
  info["cuda_compiler"] = PACD_CUDA_COMPILER;
  info["cuda_architectures"] = PACD_CUDA_ARCHITECTURES;
  return info;
}

}  // namespace
}  // namespace pacd

PYBIND11_MODULE(_C, m) {
  using namespace pacd;
  m.doc() = "Sequential certification, bound tables, known answers and build information of pacd_fast.";
  m.def("clopper_pearson_table", &bound_table, py::arg("n"), py::arg("alpha"), py::arg("upper") = false,
        "Clopper-Pearson bounds for k = 0..n as float64 [n + 1], rounded outward.");
  m.def("flip_table", &flip_table, py::arg("q"), py::arg("classes"), py::arg("r_max"),
        py::arg("log_smallest") = -INFINITY,
        "log tau(r) for r = 0, 1, ..., rounded down; ends at r_max or with the first entry <= log_smallest.");
  m.def("linear_flips", &flips_of_linear_votes, py::arg("alpha"), py::arg("y"), py::arg("q"), py::arg("classes"),
        py::arg("smoothed"), py::arg("threads") = 1,
        "(prediction, flips) of the white-box certificate (smoothed) or of the unsmoothed classifier.");
  m.def("flip_bounds", &flip_bounds, py::arg("alpha"), py::arg("y"), py::arg("q"), py::arg("classes"),
        py::arg("smoothed"), py::arg("r"),
        "What linear_flips decides r flips by: [(rival, margin, harm, miss)], for the tests.");
  m.def("random_bits", &random_bits, py::arg("seed"), py::arg("stream"), py::arg("image"), py::arg("first"),
        py::arg("blocks"), py::arg("samples"), "The uniform words behind the noise: uint32 [samples, blocks, 4].");
  m.def("philox4x32", &philox, py::arg("counter"), py::arg("key"),
        "Philox4x32-10 of four counter words and two key words.");
  m.def("normals", &normals, py::arg("words"), "Box-Muller of uint32 [N, 2] -> float32 [N, 2].");
  m.def(
      "lattice_constants",
      [] { return std::make_tuple(first_radius_word, last_radius_word, noise_error, angle_error, further_digits); },
      "(first, last radius word, bound on float's normal number, on its sine and cosine, stream of further digits).");
  m.def("lattice_radius_errors", &lattice_radius_errors, py::arg("first"), py::arg("last"), py::arg("stride") = 1,
        py::arg("threads") = 1,
        "Worst errors over radius words, for every value of the unread digits: of float's radius, of its normal number.");
  m.def("lattice_angle_errors", &lattice_angle_errors, py::arg("eighth"), py::arg("stride") = 1, py::arg("threads") = 1,
        "Worst error of float's sine and cosine over the angle words of an eighth of a turn, and their largest size.");
  m.def("lattice_cell_errors", &lattice_cell_errors, py::arg("x"), py::arg("sigma"), py::arg("step"), py::arg("offset"),
        py::arg("seed"), py::arg("samples"), py::arg("threads") = 1,
        "Cells of samples of x against double-double arithmetic, counted.");
  m.def("lattice_points", &lattice_points, py::arg("x"), py::arg("sigma"), py::arg("step"), py::arg("offset"),
        py::arg("seed"), py::arg("stream"), py::arg("image"), py::arg("first"), py::arg("samples"),
        "Lattice noise of one image, element by element: float32 [samples, elements], for the tests.");
  m.def("lattice_radius", &exact_radius, py::arg("digits"), "sqrt(-2 log((digits + 1/2) / 2^64)), for the tests.");
  m.def("lattice_circle", &exact_circle, py::arg("word"), py::arg("further"), py::arg("sine"),
        "Sine or cosine of an angle word and 32 further digits, for the tests.");
  m.def(
      "exp_negative",
      [](double x) {
        const ExpPair p = exp_negative(x);
        return std::make_pair(p.e, p.g);
      },
      py::arg("x"), "(exp(-x), 1 - exp(-x)) as the label-flip bound computes them, for the tests.");
  m.def(
      "log_near_one", [](double p) { return log_near_one(p); }, py::arg("p"), "log on [2^-1/2, 2^1/2), for the tests.");
  m.def("soft_exp", [](double x) { return soft_exp(x); }, py::arg("x"), "exp(x) for x <= 0 in double, for the tests.");
  m.def(
      "soft_exp_float", [](float x) { return soft_exp(x); }, py::arg("x"),
      "exp(x) for x <= 0 in float, for the tests.");
  m.def("log_positive", &log_positive, py::arg("x"), "log of a normal positive double, for the tests.");
  m.def("quick_quantile", &quick_quantile, py::arg("p"), py::arg("q"),
        "Phi^-1(p) from p and q = 1 - p, for the tests.");
  m.def("exp_dd", [](double hi, double lo) { return pair_of(exp(Dd(hi, lo))); }, "Double-double exp, for the tests.");
  m.def("log_dd", [](double hi, double lo) { return pair_of(log(Dd(hi, lo))); }, "Double-double log, for the tests.");
  m.def(
      "log_factorial_dd", [](int64_t n) { return pair_of(log_factorial(n)); }, "Double-double log(n!), for the tests.");
  m.def("product_down", &product_down, py::arg("sigma"), py::arg("z"), "sigma * z rounded down.");
  m.def("keep_freed_memory", &keep_freed_memory,
        "Tells the C library's malloc to keep freed memory for this process; False where it is not glibc.");
  m.def("build_info", &build_info, "Versions, compilers and the SIMD level in use.");
  bind_sequential(m);
}
