// The entries of a bank that may be among the best, as far as coarse scores tell.
//
// What lies above the topk-th greatest of the lowest scores that entries can have, is no less than
// the topk-th best score. An entry whose highest possible score lies below that is none of the
// best; all others are candidates, and their exact scores decide.

#pragma once

#include "best_entries.h"
#include "coarse_keys.h"

namespace adatape::ADATAPE_ISA {

class Candidates {
 public:
  // With more candidates than this, exact scores of a whole bank are not much slower.
  static constexpr int64_t kMost = 256;

  // Returns how many entries `memory` has.
  static int64_t memory_size(int64_t topk) { return topk + kMost; }

  Candidates() = default;
  Candidates(ScoredEntry* memory, int64_t topk, const CoarseQuery& query)
      : query_(query), list_(memory + topk), lows_(memory), topk_(topk) {
    lowest().clear();
  }

  // Offers `count` entries from `first` on, both multiples of kLanes, as far as their bits of
  // `unread` are set. `sums` are the bits of their whole numbers.
  void offer(const float* sums, const float* steps, const uint32_t* unread, int64_t first,
             int64_t count) {
    if (too_many_) return;
    float bound = this->bound();
    if (bound != bound) {
      Vec greatest = broadcast(-kInfinity);
      for (int64_t c = 0; c < count; c += kLanes) {
        const Vec low = score(load(sums + c), load(steps + c), -query_.reach);
        greatest = max(chosen_lanes(lanes_of(unread, first + c), low, -kInfinity), greatest);
      }
      bound = bound_of_lanes(greatest, topk_) - 2 * query_.slack;
    }
    for (int64_t c = 0; c < count; c += kLanes) {
      const Vec sum = load(sums + c), step = load(steps + c);
      const Vec high = score(sum, step, query_.reach);
      uint32_t lanes = bound != bound ? ~0u : lanes_above(high, bound);
      if (lanes == 0) continue;
      lanes &= lanes_of(unread, first + c);
      if (lanes == 0) continue;
      alignas(kVecBytes) float highs[kLanes], lows[kLanes];
      store(highs, high);
      store(lows, score(sum, step, -query_.reach));
      for (; lanes != 0; lanes &= lanes - 1) {
        const int lane = __builtin_ctz(lanes);
        const auto entry = static_cast<int32_t>(first + c + lane);
        if (count_ == kMost && !make_room()) return;
        list_[count_++] = {highs[lane], entry};
        lowest().offer({lows[lane], entry});
      }
      if (!(this->bound() <= bound) && this->bound() == this->bound()) bound = this->bound();
    }
  }

  // Drops all that are none of the best. Returns whether the rest are few.
  bool finish() {
    drop();
    return !too_many_;
  }

  // The candidates, in the order of the bank.
  const ScoredEntry* list() const { return list_; }
  int64_t count() const { return count_; }

 private:
  BestEntries lowest() { return {lows_, topk_}; }

  // Returns what the highest score of a candidate lies above; NaN where any is one.
  float bound() const { return lows_[topk_ - 1].score - 2 * query_.slack; }

  // Returns s · (t (n·m) + reach).
  Vec score(Vec sums, Vec steps, float reach) const {
    using SignedVec = int32_t __attribute__((vector_size(kVecBytes)));
    const IntVec wholes = reinterpret_cast<IntVec>(sums) - query_.added;
    const Vec products = __builtin_convertvector(reinterpret_cast<SignedVec>(wholes), Vec);
    return steps * (products * query_.step + reach);
  }

  void drop() {
    const float bound = this->bound();
    int64_t left = 0;
    for (int64_t j = 0; j < count_; ++j) {
      if (!(list_[j].score < bound)) list_[left++] = list_[j];
    }
    count_ = left;
  }

  bool make_room() {
    drop();
    too_many_ = count_ > kMost * 3 / 4;
    return !too_many_;
  }

  CoarseQuery query_;
  ScoredEntry* list_;  // the highest score that each can have
  ScoredEntry* lows_;
  int64_t topk_;
  int64_t count_ = 0;
  bool too_many_ = false;
};

}  // namespace adatape::ADATAPE_ISA
