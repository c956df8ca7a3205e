#include "pattern.h"

#include <algorithm>
#include <cstring>
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

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "nonzero_bits packs bytes in memory order");

// Bit i: d[i] is not zero. The comparisons, to bytes of 0 and 1, are what compilers vectorise.
template <class T>
static uint64_t nonzero_bits(const T* d) {
  alignas(16) uint8_t nonzero[64];
  for (int i = 0; i < 64; ++i) nonzero[i] = d[i] != T(0);
  uint64_t bits = 0;
  for (int i = 0; i < 64; i += 8) {
    uint64_t bytes;
    std::memcpy(&bytes, nonzero + i, 8);
    bits |= bytes * 0x0102040810204080 >> 56 << i;  // the top byte gathers byte j's lowest bit as its bit j
  }
  return bits;
}

template <class T>
int64_t mark_nonzeros(const T* dense, int64_t rows, int64_t cols, uint64_t* bits, int32_t* rowptr, int threads) {
  const int64_t words = row_words(cols);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    const T* d = dense + r * cols;
    uint64_t* word = bits + r * words;
    int64_t c = 0;
    for (; c + 64 <= cols; c += 64) word[c / 64] = nonzero_bits(d + c);
    if (c < cols) {
      T rest[64] = {};
      std::memcpy(rest, d + c, size_t(cols - c) * sizeof(T));
      word[c / 64] = nonzero_bits(rest);
    }
    int32_t count = 0;
    for (int64_t w = 0; w < words; ++w) count += __builtin_popcountll(word[w]);
    rowptr[r + 1] = count;
  }
  return sum_counts(rows, rowptr);
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

bool covers(const int32_t* rowptr, const int32_t* col, const uint64_t* bits, int64_t rows, int64_t cols, int threads) {
  const int64_t words = row_words(cols);
  bool all = true;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static) reduction(&& : all)
  for (int64_t r = 0; r < rows; ++r) {
    if (!all) continue;  // one place is enough
    // Both ascend: after a word's last column of the pattern, none of its bits may be left.
    const uint64_t* word = bits + r * words;
    int32_t k = rowptr[r];
    const int32_t end = rowptr[r + 1];
    for (int64_t w = 0; w < words; ++w) {
      uint64_t left = word[w];
      for (; k < end && col[k] < (w + 1) * 64; ++k) left &= ~(uint64_t(1) << (col[k] & 63));
      all = all && !left;
    }
  }
  return all;
}

void transpose_index(int64_t rows, int64_t cols, const int32_t* rowptr, const int32_t* col, int32_t* colptr,
                     int32_t* row, int32_t* csc_to_csr, int threads) {
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

template <class T>
void gather(const T* dense, int64_t rows, int64_t cols, const int32_t* rowptr, const int32_t* col, T* values,
            int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t r = 0; r < rows; ++r)
    for (int32_t k = rowptr[r]; k < rowptr[r + 1]; ++k) values[k] = dense[r * cols + col[k]];
}

template <class T>
void scatter(const T* values, int64_t rows, int64_t cols, const int32_t* rowptr, const int32_t* col, T* dense,
             int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t r = 0; r < rows; ++r)
    for (int32_t k = rowptr[r]; k < rowptr[r + 1]; ++k) dense[r * cols + col[k]] = values[k];
}

template int64_t mark_nonzeros(const uint8_t*, int64_t, int64_t, uint64_t*, int32_t*, int);
template int64_t mark_nonzeros(const float*, int64_t, int64_t, uint64_t*, int32_t*, int);
template int64_t mark_nonzeros(const double*, int64_t, int64_t, uint64_t*, int32_t*, int);
template void gather(const float*, int64_t, int64_t, const int32_t*, const int32_t*, float*, int);
template void gather(const double*, int64_t, int64_t, const int32_t*, const int32_t*, double*, int);
template void scatter(const float*, int64_t, int64_t, const int32_t*, const int32_t*, float*, int);
template void scatter(const double*, int64_t, int64_t, const int32_t*, const int32_t*, double*, int);

}  // namespace sparsebreg
