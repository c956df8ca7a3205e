#include "pattern.h"

#include <algorithm>
#include <vector>

namespace sparsebreg {

int64_t sum_counts(int64_t rows, int32_t* rowptr) {
  rowptr[0] = 0;
  int64_t total = 0;
  for (int64_t r = 0; r < rows; ++r) {
    total += rowptr[r + 1];
    if (total > INT32_MAX) return -1;
    rowptr[r + 1] = int32_t(total);
  }
  return total;
}

void fill_columns(const uint64_t* bits, int64_t rows, int64_t cols, const int32_t* rowptr, int32_t* col, int threads) {
  const int64_t words = row_words(cols);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    int32_t* out = col + rowptr[r];
    for (int64_t w = 0; w < words; ++w)
      for (uint64_t left = bits[r * words + w]; left; left &= left - 1)
        *out++ = int32_t(w * 64 + __builtin_ctzll(left));
  }
}

void mark_columns(int64_t rows, int64_t cols, const int32_t* rowptr, const int32_t* col, uint64_t* bits, int threads) {
  const int64_t words = row_words(cols);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    uint64_t* row = bits + r * words;
    std::fill(row, row + words, 0);
    for (int32_t k = rowptr[r]; k < rowptr[r + 1]; ++k) row[col[k] / 64] |= uint64_t(1) << (col[k] & 63);
  }
}

int64_t count_unmarked(const uint64_t* bits, int64_t rows, int64_t cols, int64_t width) {
  const int64_t words = row_words(cols);
  std::vector<uint64_t> any(size_t(words), 0);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t w = 0; w < words; ++w) any[size_t(w)] |= bits[r * words + w];
  int64_t marked = 0, last = -1;
  for (int64_t w = 0; w < words; ++w)
    for (uint64_t left = any[size_t(w)]; left; left &= left - 1) {
      const int64_t group = (w * 64 + __builtin_ctzll(left)) / width;
      marked += group != last;
      last = group;
    }
  return cols / width - marked;
}

void transpose_index(int64_t rows, int64_t cols, const int32_t* rowptr, const int32_t* col, int32_t* colptr,
                     int32_t* row, int32_t* csc_to_csr, int32_t* csr_to_csc, int threads) {
  const int64_t nnz = rowptr[rows], few = 1 << 14;
  const int parts = int(std::max<int64_t>(1, std::min<int64_t>(threads, nnz / few)));
  // Every part has rows of its own with about equal nonzeros. next[part][c]: how many of them column c has, then where
  // the next of them goes.
  std::vector<int32_t> next(size_t(parts) * size_t(cols));
  const auto first_row = [&](int part) {
    return part == parts ? rows : std::lower_bound(rowptr, rowptr + rows, int32_t(nnz * part / parts)) - rowptr;
  };
#pragma omp parallel for num_threads(parts) if (parts > 1) schedule(static)
  for (int part = 0; part < parts; ++part) {
    int32_t* count = next.data() + part * cols;
    for (int32_t k = rowptr[first_row(part)]; k < rowptr[first_row(part + 1)]; ++k) ++count[col[k]];
  }
  int32_t sum = 0;
  for (int64_t c = 0; c < cols; ++c) {
    colptr[c] = sum;
    for (int part = 0; part < parts; ++part) {
      int32_t& place = next[size_t(part * cols + c)];
      const int32_t count = place;
      place = sum;
      sum += count;
    }
  }
  colptr[cols] = sum;
#pragma omp parallel for num_threads(parts) if (parts > 1) schedule(static)
  for (int part = 0; part < parts; ++part) {
    int32_t* place = next.data() + part * cols;
    const int64_t last = first_row(part + 1);
    for (int64_t r = first_row(part); r < last; ++r)
      for (int32_t k = rowptr[r]; k < rowptr[r + 1]; ++k) {
        const int32_t at = place[col[k]]++;
        row[at] = int32_t(r);
        csc_to_csr[at] = k;
        csr_to_csc[k] = at;
      }
  }
}

const char* check_index(int64_t rows, int64_t cols, int64_t nnz, const int32_t* rowptr, const int32_t* col) {
  if (rowptr[0] != 0) return "rowptr: expected to start at 0";
  for (int64_t r = 0; r < rows; ++r)
    if (rowptr[r + 1] < rowptr[r]) return "rowptr: expected values that never fall";
  if (rowptr[rows] != nnz) return "rowptr: expected to end at the number of nonzeros";
  for (int64_t r = 0; r < rows; ++r)
    for (int32_t k = rowptr[r]; k < rowptr[r + 1]; ++k) {
      if (col[k] < 0 || col[k] >= cols) return "col: expected indices inside the matrix";
      if (k > rowptr[r] && col[k] <= col[k - 1]) return "col: expected strictly ascending indices inside each row";
    }
  return nullptr;
}

const int32_t* ChunkStarts::of(int64_t rows, int64_t cols, const int32_t* rowptr, const int32_t* col, int chunks,
                               int threads) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto known = by_chunks_.find(chunks);
  if (known != by_chunks_.end()) return known->second.data();
  std::vector<int32_t> made(size_t(rows) * size_t(chunks) + 1);
  int32_t* starts = made.data();
  const int64_t width = (cols + chunks - 1) / chunks;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    const int32_t* at = col + rowptr[r];
    for (int64_t h = 0; h < chunks; ++h) {
      at = std::lower_bound(at, col + rowptr[r + 1], h * width);
      starts[r * chunks + h] = int32_t(at - col);
    }
  }
  starts[rows * chunks] = rowptr[rows];
  by_chunks_.emplace(chunks, std::move(made));
  return starts;
}

template <class T>
void gather(const T* dense, int64_t rows, int64_t cols, const int32_t* rowptr, const int32_t* col, T* values,
            int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t r = 0; r < rows; ++r)
    for (int32_t k = rowptr[r]; k < rowptr[r + 1]; ++k) values[k] = dense[r * cols + col[k]];
}

template <class T>
void scatter(const T* values, int64_t rows, int64_t cols, const int32_t* rowptr, const int32_t* col, T* dense,
             bool zero_others, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    T* row = dense + r * cols;
    if (zero_others) std::fill(row, row + cols, T(0));
    for (int32_t k = rowptr[r]; k < rowptr[r + 1]; ++k) row[col[k]] = values[k];
  }
}

template void gather(const float*, int64_t, int64_t, const int32_t*, const int32_t*, float*, int);
template void gather(const double*, int64_t, int64_t, const int32_t*, const int32_t*, double*, int);
template void scatter(const float*, int64_t, int64_t, const int32_t*, const int32_t*, float*, bool, int);
template void scatter(const double*, int64_t, int64_t, const int32_t*, const int32_t*, double*, bool, int);

}  // namespace sparsebreg
