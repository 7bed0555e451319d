// clopper_pearson and normal_quantile: the bounds of certificates.
#pragma once

#include "kernels/bounds.h"
#include "operators/tensors.h"

namespace pacd {

inline constexpr const char* schema_clopper_pearson =
    "clopper_pearson(Tensor k, Tensor n, Tensor alpha, bool upper) -> Tensor";
template <class Exec>
Tensor clopper_pearson(Tensor k, Tensor n, Tensor alpha, bool upper) {
  STD_TORCH_CHECK(k.scalar_type() == ScalarType::Long && n.scalar_type() == ScalarType::Long &&
                      alpha.scalar_type() == ScalarType::Double && k.numel() == n.numel() && k.numel() == alpha.numel(),
                  "clopper_pearson: k and n must be int64 and alpha float64, of one size");
  on_one_device("clopper_pearson", k, n, alpha);
  Tensor bound = torch::stable::new_empty(k, k.sizes(), ScalarType::Double);
  const Tensor hits = torch::stable::contiguous(k), draws = torch::stable::contiguous(n),
               levels = torch::stable::contiguous(alpha);
  Exec::run_rows(ClopperPearson{pointer<const int64_t>(hits), pointer<const int64_t>(draws),
                                pointer<const double>(levels), pointer<double>(bound), upper},
                 k.numel(), 1, k);
  return bound;
}

inline constexpr const char* schema_normal_quantile = "normal_quantile(Tensor p, bool up) -> Tensor";
template <class Exec>
Tensor normal_quantile(Tensor p, bool up) {
  STD_TORCH_CHECK(p.scalar_type() == ScalarType::Double, "normal_quantile: p must be float64");
  Tensor z = torch::stable::new_empty(p, p.sizes());
  const Tensor levels = torch::stable::contiguous(p);
  Exec::run_rows(NormalQuantile{pointer<const double>(levels), pointer<double>(z), up}, p.numel(), 4, p);
  return z;
}

}  // namespace pacd
