// The votes of noisy copies: a row kernel, `void operator()(int64_t row) const`.
#pragma once

#include "math/half.h"

namespace pacd {

// counts[image_index[row], argmax(logits[row])] += 1; a row with a NaN goes to nan_rows[image_index[row]] instead.
template <class In>
struct AddVotes {
  const In* logits;
  const int64_t* image_index;
  int64_t* counts;
  int64_t* nan_rows;
  int64_t images, classes;

  PACD_INLINE void operator()(int64_t row) const {
    const int64_t image = image_index[row];
    if (image < 0 || image >= images) return;  // refused by the caller where it can be; never written through
    const In* values = logits + row * classes;
    float best = to_float(values[0]);
    int64_t vote = 0;
    bool nan = best != best;
    for (int64_t c = 1; c < classes; ++c) {
      const float v = to_float(values[c]);
      nan = nan || v != v;
      if (v > best) {  // strictly: the lowest index wins a tie
        best = v;
        vote = c;
      }
    }
    add_atomically(nan ? nan_rows + image : counts + image * classes + vote, 1);
  }
};

}  // namespace pacd
