// A sparsity pattern as Python holds it.
#pragma once

#include <algorithm>
#include <mutex>
#include <utility>
#include <vector>

#include "bindings/checks.h"
#include "pattern.h"
#include "pool.h"

namespace sparsebreg {

// A valid index. It owns copies of all arrays, so that no caller can change what a kernel reads.
class NativeIndex {
 public:
  // From one bit a place; see kernels/marks.h.
  NativeIndex(int64_t rows, int64_t cols, int64_t nnz, PoolArray<uint64_t> marks, const std::vector<int32_t>& rowptr,
              int threads)
      : index{rows, cols, nnz}, storage_(size_t(rows + 1 + nnz)), marks_(std::move(marks)) {
    int32_t* col = std::copy(rowptr.begin(), rowptr.end(), storage_.data());
    fill_columns(marks_.data(), rows, cols, rowptr.data(), col, threads);
    index.rowptr = storage_.data(), index.col = col;
    index.row_chunks = &row_chunks_;
  }

  // From arrays, which are checked.
  NativeIndex(int64_t rows, int64_t cols, const Array& rowptr, const Array& col) {
    check_shape("shape", rows, cols);
    const int64_t nnz = col.size;
    if (nnz > INT32_MAX) refuse("col", "at most 2147483647 nonzeros", std::to_string(nnz));
    const int32_t* const from[] = {in<int32_t>("rowptr", rowptr, rows + 1), in<int32_t>("col", col, nnz)};
    storage_ = PoolArray<int32_t>(size_t(rows + 1 + nnz));
    int32_t* own_col = std::copy(from[0], from[0] + rows + 1, storage_.data());
    std::copy(from[1], from[1] + nnz, own_col);
    index = Index{rows, cols, nnz, storage_.data(), own_col};
    index.row_chunks = &row_chunks_;
    if (const char* wrong = check_index(rows, cols, nnz, index.rowptr, index.col)) throw py::value_error(wrong);
  }

  // The index with its transpose, which is computed on first use: convolutions and first layers need none.
  Index transposed(int threads) const {
    std::call_once(once_, [&] {
      const int64_t nnz = index.nnz;
      PoolArray<int32_t> made(size_t(index.cols + 1 + 3 * nnz));
      int32_t* row = made.data() + index.cols + 1;
      transpose_index(index.rows, index.cols, index.rowptr, index.col, made.data(), row, row + nnz, row + 2 * nnz,
                      threads);
      transpose_ = std::move(made);
    });
    Index both = index;
    both.col_chunks = &col_chunks_;
    both.colptr = transpose_.data();
    both.row = both.colptr + index.cols + 1;
    both.csc_to_csr = both.row + index.nnz;
    both.csr_to_csc = both.csc_to_csr + index.nnz;
    return both;
  }

  // One bit a place, rows x row_words(cols); computed on first use.
  const uint64_t* marks(int threads) const {
    std::call_once(marked_, [&] {
      if (marks_.data()) return;
      PoolArray<uint64_t> made(size_t(index.rows * row_words(index.cols)));
      mark_columns(index.rows, index.cols, index.rowptr, index.col, made.data(), threads);
      marks_ = std::move(made);
    });
    return marks_.data();
  }

  Index index;  // without its transpose

 private:
  mutable ChunkStarts row_chunks_, col_chunks_;
  PoolArray<int32_t> storage_;
  mutable PoolArray<int32_t> transpose_;
  mutable std::once_flag once_;
  mutable PoolArray<uint64_t> marks_;
  mutable std::once_flag marked_;
};

}  // namespace sparsebreg
