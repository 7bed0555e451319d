// The bounds of certificates, one a row: Clopper-Pearson and the normal quantile, each rounded outward.
#pragma once

#include "math/binomial.h"
#include "math/quantile.h"

namespace pacd {

struct ClopperPearson {
  const int64_t* k;
  const int64_t* n;
  const double* alpha;
  double* bound;
  bool upper;

  PACD_INLINE void operator()(int64_t i) const { bound[i] = clopper_pearson_bound(k[i], n[i], alpha[i], upper); }
};

struct NormalQuantile {
  const double* p;
  double* z;
  bool up;

  PACD_INLINE void operator()(int64_t i) const { z[i] = normal_quantile(p[i], up); }
};

}  // namespace pacd
