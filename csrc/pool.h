// Large blocks for activations, gradients and indices, kept when they are given back: PyTorch's CPU allocator maps and
// unmaps them every step, and the page faults cost as much as sparse arithmetic. Safe across threads.
#pragma once

#include <cstddef>
#include <utility>

namespace sparsebreg {

// A block of at least `bytes`; from 2 MB on aligned to 2 MB with huge pages asked for. `*size` is what it holds, or 0
// where it is so small that it is not kept. Content undefined. Throws std::bad_alloc.
void* pool_take(size_t bytes, size_t* size);

// Gives a block back; it is kept for later unless the pool would then hold more than its limit.
void pool_give(void* block, size_t size);

// Frees all blocks that the pool holds; returns how many bytes that were.
size_t pool_release();

// How many bytes the pool may hold while nobody uses them; 0 keeps nothing. Returns the limit before.
size_t pool_limit(size_t bytes);

// Bytes held and not in use.
size_t pool_held();

// `count` numbers of undefined content, from the pool where they are many.
template <class T>
class PoolArray {
 public:
  PoolArray() = default;
  explicit PoolArray(size_t count) { block_ = pool_take(count * sizeof(T), &size_); }
  PoolArray(PoolArray&& other) noexcept { *this = std::move(other); }
  PoolArray& operator=(PoolArray&& other) noexcept {
    std::swap(block_, other.block_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~PoolArray() {
    if (block_) pool_give(block_, size_);
  }
  T* data() const { return static_cast<T*>(block_); }

 private:
  void* block_ = nullptr;
  size_t size_ = 0;
};

}  // namespace sparsebreg
