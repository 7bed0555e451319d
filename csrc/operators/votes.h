// add_votes_: the classes of noisy copies, counted.
#pragma once

#include "kernels/votes.h"
#include "operators/tensors.h"

namespace pacd {

inline constexpr const char* schema_add_votes_ =
    "add_votes_(Tensor(a!) counts, Tensor logits, Tensor image_index, Tensor? void=None) -> Tensor";
template <class Exec>
Tensor add_votes_(Tensor counts, Tensor logits, Tensor image_index, std::optional<Tensor> voids) {
  STD_TORCH_CHECK(counts.scalar_type() == ScalarType::Long && counts.dim() == 2 && counts.is_contiguous(),
                  "add_votes_: counts must be a contiguous int64 [N, classes]");
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) + voids.has_value() == counts.size(1) && logits.size(1) > 0,
                  "add_votes_: logits must be [M, classes], and counts have one more column where void is given");
  STD_TORCH_CHECK(
      image_index.scalar_type() == ScalarType::Long && image_index.dim() == 1 && image_index.size(0) == logits.size(0),
      "add_votes_: image_index must be int64 [M]");
  STD_TORCH_CHECK(!voids || (voids->scalar_type() == ScalarType::Bool && voids->numel() == logits.size(0)),
                  "add_votes_: void must be bool [M]");
  on_one_device("add_votes_", counts, logits, image_index, voids.value_or(logits));
  Tensor nan_rows = torch::stable::new_zeros(counts, {counts.size(0)});
  const Tensor values = torch::stable::contiguous(logits), index = torch::stable::contiguous(image_index);
  const auto flags = contiguous(voids);
  const auto run = [&](auto type) {
    using In = decltype(type);
    Exec::run_counts(AddVotes<In>{pointer<const In>(values), pointer<const int64_t>(index), pointer<const uint8_t>(flags),
                                  pointer<int64_t>(counts), pointer<int64_t>(nan_rows), counts.size(0), logits.size(1)},
                     logits.size(0), 8192 / logits.size(1) + 1, counts);
  };
  if (logits.scalar_type() == ScalarType::Double) {
    run(double{});
  } else {
    with_float_type(logits.scalar_type(), run);
  }
  return nan_rows;
}

}  // namespace pacd
