// chernoff_newton and chernoff_newton_pairs: the label-flip tail bound, minimised.
#pragma once

#include "kernels/chernoff.h"
#include "operators/tensors.h"

namespace pacd {

// The first Newton step goes no further than here in units of 1 / (largest influence): beyond it every term is
// saturated.  Asked on the host, for either device.
inline double newton_reach(double keep, double other) { return 2.0 + std::log(keep / other); }

inline constexpr const char* schema_chernoff_newton =
    "chernoff_newton(Tensor alpha, Tensor y, float q) -> (Tensor, Tensor)";
template <class Exec>
std::tuple<Tensor, Tensor> chernoff_newton(Tensor alpha, Tensor y, double q) {
  STD_TORCH_CHECK(alpha.scalar_type() == ScalarType::Double && alpha.dim() == 2 &&
                      y.scalar_type() == ScalarType::Long && y.dim() == 1 && y.size(0) == alpha.size(1),
                  "chernoff_newton: alpha must be float64 [m, n] and y int64 [n]");
  STD_TORCH_CHECK(q >= 1e-300 && q < 0.5, "chernoff_newton: q must be in (0, 1/2)");
  on_one_device("chernoff_newton", alpha, y);
  const Tensor rows = torch::stable::contiguous(alpha), labels = torch::stable::contiguous(y);
  const int64_t m = alpha.size(0);
  Tensor t = torch::stable::new_empty(alpha, {m}), log_tail = torch::stable::new_empty(alpha, {m});
  Exec::run_teams(ChernoffNewton{pointer<const double>(rows), pointer<const int64_t>(labels), pointer<double>(t),
                                 pointer<double>(log_tail), alpha.size(1), q, newton_reach(1.0 - q, q)},
                  m, alpha);
  return {t, log_tail};
}

inline constexpr const char* schema_chernoff_newton_pairs =
    "chernoff_newton_pairs(Tensor alpha, Tensor y, Tensor pairs, float q, int classes) -> (Tensor, Tensor)";
template <class Exec>
std::tuple<Tensor, Tensor> chernoff_newton_pairs(Tensor alpha, Tensor y, Tensor pairs, double q, int64_t classes) {
  STD_TORCH_CHECK(alpha.scalar_type() == ScalarType::Double && alpha.dim() == 2 &&
                      y.scalar_type() == ScalarType::Long && y.dim() == 1 && y.size(0) == alpha.size(1),
                  "chernoff_newton_pairs: alpha must be float64 [m, n] and y int64 [n]");
  STD_TORCH_CHECK(pairs.scalar_type() == ScalarType::Long && pairs.dim() == 3 && pairs.size(0) == alpha.size(0) &&
                      pairs.size(2) == 2,
                  "chernoff_newton_pairs: pairs must be int64 [m, P, 2]");
  on_one_device("chernoff_newton_pairs", alpha, y, pairs);
  const double keep = 1.0 - q, other = q / static_cast<double>(classes - 1);
  STD_TORCH_CHECK(classes >= 2 && q >= 1e-300 && keep > other, "chernoff_newton_pairs: q must be in (0, (K - 1) / K)");
  const Tensor rows = torch::stable::contiguous(alpha), labels = torch::stable::contiguous(y);
  const Tensor rivals = torch::stable::contiguous(pairs);
  const int64_t m = alpha.size(0), per_row = pairs.size(1);
  Tensor t = torch::stable::new_empty(alpha, {m, per_row}), log_tail = torch::stable::new_empty(alpha, {m, per_row});
  Exec::run_teams(
      ChernoffPairs{pointer<const double>(rows), pointer<const int64_t>(labels), pointer<const int64_t>(rivals),
                    pointer<double>(t), pointer<double>(log_tail), alpha.size(1), per_row, keep, other,
                    other * static_cast<double>(classes - 2), 1.0 - 2.0 * other, newton_reach(keep, other)},
      m * per_row, alpha);
  return {t, log_tail};
}

}  // namespace pacd
