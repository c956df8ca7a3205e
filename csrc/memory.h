// Working memory of the kernels: one growing buffer per thread and slot, kept between calls so that a step neither maps
// nor faults in pages. Not tied to an instruction set.
#pragma once

#include <cstddef>

namespace sparsebreg {

enum Slot { slot_source, slot_dest, slot_plan, slot_more_plan, slot_grad, slot_sums, slot_parts, slot_count };

// A buffer of at least `bytes`, 64-byte aligned, valid until the next request for this slot from this thread.
// Throws std::bad_alloc.
void* scratch_bytes(Slot slot, size_t bytes);

// The calling thread's number in its team.
int team_member();

// Gives the calling thread's buffers back; returns how many bytes they held.
size_t release_scratch();

template <class T>
T* scratch(Slot slot, size_t count) {
  return static_cast<T*>(scratch_bytes(slot, count * sizeof(T)));
}

// `count` elements for each thread of a team, taken before the parallel region: no exception may leave one. Between
// them lies what nobody touches: a processor that reads its own elements in strides asks for some behind them, too, and
// would take from its neighbour the cache lines that this one is writing to.
template <class T>
class TeamScratch {
 public:
  TeamScratch(Slot slot, int threads, size_t count)
      : step_((count * sizeof(T) + 63) / 64 * 64 / sizeof(T) + BETWEEN / sizeof(T)),
        data_(scratch<T>(slot, step_ * size_t(threads))) {}
  T* mine() const { return data_ + step_ * size_t(team_member()); }

 private:
  static constexpr size_t BETWEEN = size_t(64) << 10;
  size_t step_;  // whole cache lines: threads write next to each other
  T* data_;
};

}  // namespace sparsebreg
