// The votes of noisy copies: a counting kernel.  Its `int64_t* counter(int64_t row) const` says which number a row adds 1
// to; null for none.
#pragma once

#include "math/half.h"

namespace pacd {

PACD_INLINE double widened(double x) { return x; }
template <class In>
PACD_INLINE float widened(In x) {
  return to_float(x);
}

// counts[image_index[row], argmax(logits[row])] += 1; a row that chooses no class, with a NaN or whose largest logit is
// infinite, goes to nan_rows[image_index[row]] instead, and a void one to a last column of counts.
template <class In>
struct AddVotes {
  const In* logits;
  const int64_t* image_index;
  const uint8_t* voids;  // or null
  int64_t* counts;
  int64_t* nan_rows;
  int64_t images, classes;

  PACD_INLINE int64_t* counter(int64_t row) const {
    const int64_t image = image_index[row];
    if (image < 0 || image >= images) return nullptr;  // refused by the caller where it can be; never written through
    int64_t* counter = counts + image * (classes + (voids != nullptr));
    if (voids && voids[row]) return counter + classes;
    const In* values = logits + row * classes;
    auto best = widened(values[0]);
    int64_t vote = 0;
    bool nan = best != best;
    for (int64_t c = 1; c < classes; ++c) {
      const auto v = widened(values[c]);
      nan = nan || v != v;
      if (v > best) {  // strictly: the lowest index wins a tie
        best = v;
        vote = c;
      }
    }
    nan = nan || best - best != 0;  // infinite: what overflowed may be less than it seems, or more
    return nan ? nan_rows + image : counter + vote;
  }
};

}  // namespace pacd
