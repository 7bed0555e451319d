// The one list of operators: defining and implementing them follows from it.
#pragma once

#include <cstring>
#include <string>

#include "operators/bounds.h"
#include "operators/chernoff.h"
#include "operators/lattice.h"
#include "operators/noise.h"
#include "operators/pooling.h"
#include "operators/soft.h"
#include "operators/votes.h"

namespace pacd {

struct Operator {
  const char* schema;
  void (*boxed)(StableIValue*, uint64_t, uint64_t);
};

#define PACD_OPERATOR(name, Exec) {schema_##name, TORCH_BOX(&name<Exec>)}

// For every executor; ops_cpu.cpp adds what the CPU alone has.
template <class Exec>
inline constexpr Operator operators[] = {
    PACD_OPERATOR(noisy_copies_, Exec),
    PACD_OPERATOR(noisy_copies, Exec),
    PACD_OPERATOR(lattice_copies_, Exec),
    PACD_OPERATOR(lattice_copies, Exec),
    PACD_OPERATOR(add_votes_, Exec),
    PACD_OPERATOR(clopper_pearson, Exec),
    PACD_OPERATOR(normal_quantile, Exec),
    PACD_OPERATOR(chernoff_newton, Exec),
    PACD_OPERATOR(chernoff_newton_pairs, Exec),
    PACD_OPERATOR(pool_max, Exec),
    PACD_OPERATOR(pool_choose, Exec),
    PACD_OPERATOR(pool_pick, Exec),
    PACD_OPERATOR(pool_spread, Exec),
    PACD_OPERATOR(soft_smooth, Exec),
    PACD_OPERATOR(soft_smooth_backward, Exec),
    PACD_OPERATOR(soft_radius, Exec),
    PACD_OPERATOR(soft_radius_backward, Exec),
};

template <size_t count>
void define(torch::stable::detail::StableLibrary& library, const Operator (&list)[count]) {
  for (const Operator& op : list) library.def(op.schema);
}

// A schema begins with the operator's name.
template <size_t count>
void implement(torch::stable::detail::StableLibrary& library, const Operator (&list)[count]) {
  for (const Operator& op : list) library.impl(std::string(op.schema, std::strchr(op.schema, '(')).c_str(), op.boxed);
}

}  // namespace pacd
