// Which samples to draw next when images stop at different times: every batch full, no image waited for.
//
// An image's samples come in intervals: the n0 selection samples, then those between one look and the next.  A batch holds
// whole intervals of many images and at most one that goes on in the next batch.  Votes are counted per interval, in a row
// ("slot") of a small table, never per image: so a batch may run ahead of a look, and the look still sees exactly its first
// T samples.  What decides an image is a pure function of its votes by interval (rules.h); batch size, order,
// device and how late votes are reported change which samples are drawn in vain, never an outcome.
//
// On a GPU nobody waits for an image.  After a batch, the slots it completed are copied (gathered in one kernel, one copy
// to pinned memory, not waited for) and zeroed, in stream order, so the next batch may use them again.  The host plans on
// and reports the votes of batch b when its copy is there, usually while b + 1 or b + 2 runs.  Reports are in the order
// of the plans.
//
// Which interval next: (1) the oldest image whose votes so far are all reported; (2) a new image; (3) once there are no
// new ones, intervals ahead of the reports, the image with the fewest samples on their way first.  So samples are drawn in
// vain only at the end of a run, where a batch would not be full otherwise.
//
// New images come in order, or from a source that is asked for each when it is needed: several processes then share them.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <utility>

#include "certification/rules.h"

namespace pacd {

class SequentialPlanner {
 public:
  // Samples [first, first + count) of an image on a stream (0 selection, 1 estimation), counted in `slot`.
  struct Piece {
    int64_t image, stream, first, count, slot;
  };

  // The rows to draw, and the slots that are complete once they are counted, in the order in which report() wants them.
  struct Batch {
    std::vector<Piece> pieces;
    std::vector<int64_t> complete;
  };

  // ids: what errors call the images; images are counted from 0.  source: the next image to start, each at most once, or
  // a negative number where none is left; without it, all of them in order.
  SequentialPlanner(std::shared_ptr<const Rule> rule, std::vector<int64_t> ids, int64_t classes,
                    std::function<int64_t()> source = nullptr)
      : rule_(std::move(rule)), ids_(std::move(ids)), classes_(classes), source_(std::move(source)) {
    if (!source_) {
      const int64_t images = static_cast<int64_t>(ids_.size());
      exhausted_ = images == 0;
      source_ = [this, images, next = int64_t{0}]() mutable {
        exhausted_ = next + 1 == images;
        return next++;
      };
    }
    if (!rule_) throw std::invalid_argument("a rule is needed");
    if (classes < 2) throw std::invalid_argument("there must be at least 2 classes");
  }

  SequentialPlanner(const SequentialPlanner&) = delete;  // the source points here
  SequentialPlanner& operator=(const SequentialPlanner&) = delete;

  // At most `rows` samples; fewer only where all that can still be of use is on its way.  Every plan is to be reported, in
  // order, also one without pieces; without pieces, nothing new will come before a report().
  Batch plan(int64_t rows) {
    if (rows < 1) throw std::invalid_argument("rows must be positive");
    Batch batch;
    std::vector<Interval> complete;
    int64_t slot = 0;
    if (partial_) {
      // Its slot holds counts already.  An image that was decided meanwhile needs no more of it, but the slot is cleared.
      if (active_.count(partial_->image)) {
        rows -= draw(*partial_, rows, batch);
      } else {
        partial_->drawn = partial_->count;
      }
      if (partial_->drawn < partial_->count) return finish(std::move(batch), std::move(complete));
      complete.push_back(*partial_);
      slot = partial_->slot == 0 ? 1 : 0;
    }
    const int64_t taken = partial_ ? partial_->slot : -1;
    partial_.reset();
    while (rows > 0) {
      Active* image = next_image();
      if (image == nullptr) break;
      Interval interval = next_interval(*image);
      interval.slot = slot;
      if (++slot == taken) ++slot;
      rows -= draw(interval, rows, batch);
      if (interval.drawn == interval.count) {
        complete.push_back(interval);
      } else {
        partial_ = interval;
      }
    }
    return finish(std::move(batch), std::move(complete));
  }

  // The votes of the oldest plan that has not been reported, a row of [classes] for each of its complete slots; `voids`:
  // how many samples of each were void, or null.  A sample without a vote (NaN or infinite logits) is a failure that names the image:
  // no new image is started then, and those on their way are decided before the caller gives up.
  void report(const int64_t* votes, const int64_t* voids, int64_t slots) {
    if (waiting_.empty()) throw std::invalid_argument("there is no plan to report");
    const std::vector<Interval>& intervals = waiting_.front();
    if (slots != static_cast<int64_t>(intervals.size()))
      throw std::invalid_argument("votes have " + std::to_string(slots) + " rows, the oldest plan completed " +
                                  std::to_string(intervals.size()) + " slots");
    for (size_t i = 0; i < intervals.size(); ++i) {
      const int64_t* row = votes + static_cast<int64_t>(i) * classes_;
      const int64_t none = voids == nullptr ? 0 : voids[i];
      const auto at = active_.find(intervals[i].image);
      if (at == active_.end()) continue;  // decided without them
      int64_t sum = none;
      for (int64_t c = 0; c < classes_; ++c) sum += row[c];
      if (sum != intervals[i].count) {
        if (failure_.empty()) failure_ = no_vote(intervals[i], sum);
        active_.erase(at);
        exhausted_ = true;
      } else {
        take(at->second, row, none);
      }
    }
    waiting_.pop_front();
  }

  // Images decided since the last call and their outcomes, in the order of their decision.
  std::vector<std::pair<int64_t, Outcome>> finished() { return std::exchange(finished_, {}); }

  bool done() const { return exhausted_ && active_.empty(); }
  int64_t classes() const { return classes_; }
  int64_t in_flight() const { return static_cast<int64_t>(active_.size()); }
  int64_t unreported() const { return static_cast<int64_t>(waiting_.size()); }
  int64_t drawn() const { return drawn_; }
  const std::string& failure() const { return failure_; }

 private:
  // Interval 0 of an image is its selection, interval k + 1 what look k needs beyond look k - 1.
  struct Interval {
    int64_t image, index, count, drawn = 0, slot = 0;
  };

  struct Active {
    int64_t image;
    int64_t planned = 0, reported = 0;  // intervals
    Progress progress;
  };

  std::string no_vote(const Interval& interval, int64_t votes) const {
    return "the model returned NaN or infinity for " + std::to_string(interval.count - votes) + " of " + std::to_string(interval.count) +
           " noisy copies of image " + std::to_string(ids_[static_cast<size_t>(interval.image)]);
  }

  int64_t intervals() const { return static_cast<int64_t>(rule_->looks().size()) + 1; }
  int64_t begin(int64_t index) const { return index < 2 ? 0 : rule_->looks()[static_cast<size_t>(index - 2)]; }
  int64_t end(int64_t index) const { return index == 0 ? rule_->n0() : rule_->looks()[static_cast<size_t>(index - 1)]; }

  Active* next_image() {
    for (auto& [id, image] : active_) {
      // The first look needs the selection and its own samples: neither waits for the other.
      if (image.planned < intervals() && (image.planned == image.reported || image.planned == 1)) return &image;
    }
    if (!exhausted_) {
      const int64_t next = source_();
      if (next >= static_cast<int64_t>(ids_.size()) || active_.count(next)) throw std::invalid_argument("the source gave no new image");
      if (next >= 0) {
        Active& image = active_[next];
        image.image = next;
        return &image;
      }
      exhausted_ = true;
    }
    Active* best = nullptr;
    int64_t fewest = 0;
    for (auto& [id, image] : active_) {
      if (image.planned == intervals()) continue;
      const int64_t ahead = end(image.planned) - (image.reported < 2 ? 0 : end(image.reported - 1));
      if (best == nullptr || ahead < fewest) {
        best = &image;
        fewest = ahead;
      }
    }
    return best;
  }

  Interval next_interval(Active& image) {
    const int64_t index = image.planned++;
    return {image.image, index, end(index) - begin(index)};
  }

  int64_t draw(Interval& interval, int64_t rows, Batch& batch) {
    const int64_t count = std::min(rows, interval.count - interval.drawn);
    batch.pieces.push_back({interval.image, interval.index == 0 ? 0 : 1, begin(interval.index) + interval.drawn, count, interval.slot});
    interval.drawn += count;
    drawn_ += count;
    return count;
  }

  Batch finish(Batch batch, std::vector<Interval> complete) {
    for (const Interval& interval : complete) batch.complete.push_back(interval.slot);
    waiting_.push_back(std::move(complete));
    return batch;
  }

  void take(Active& image, const int64_t* votes, int64_t voids) {
    const int64_t index = image.reported++;
    if (index == 0) {
      rule_->select(image.progress, votes, classes_);
    } else if (rule_->look(image.progress, static_cast<size_t>(index - 1), votes, voids)) {
      const int64_t id = image.image;
      finished_.emplace_back(id, std::move(image.progress.outcome));
      active_.erase(id);
    }
  }

  const std::shared_ptr<const Rule> rule_;
  const std::vector<int64_t> ids_;
  const int64_t classes_;
  std::function<int64_t()> source_;
  bool exhausted_ = false;  // no image will be started any more
  std::string failure_;
  int64_t drawn_ = 0;
  std::map<int64_t, Active> active_;
  std::optional<Interval> partial_;
  std::deque<std::vector<Interval>> waiting_;
  std::vector<std::pair<int64_t, Outcome>> finished_;
};

}  // namespace pacd
