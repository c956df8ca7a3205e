#include "pattern.h"

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

template <class T>
int64_t count_rows(const T* dense, int64_t rows, int64_t cols, int32_t* rowptr, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    const T* d = dense + r * cols;
    int32_t count = 0;
    for (int64_t c = 0; c < cols; ++c) count += d[c] != T(0);
    rowptr[r + 1] = count;
  }
  return sum_counts(rows, rowptr);
}

template <class T>
void fill_columns(const T* dense, int64_t rows, int64_t cols, const int32_t* rowptr, int32_t* col, int threads) {
  constexpr int BLOCK = 64 / sizeof(T) < 16 ? 64 / sizeof(T) : 16;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    const T* d = dense + r * cols;
    int32_t* out = col + rowptr[r];
    const int32_t* end = col + rowptr[r + 1];
    int64_t c = 0;
    // A block at a time: most blocks of a sparse row are skipped by one test.
    for (; c + BLOCK <= cols && out < end; c += BLOCK) {
      int any = 0;
      for (int i = 0; i < BLOCK; ++i) any |= d[c + i] != T(0);
      if (!any) continue;
      if (end - out > BLOCK) {  // room to write without asking: where the nonzeros are is hard to predict
        for (int i = 0; i < BLOCK; ++i) {
          *out = int32_t(c + i);
          out += d[c + i] != T(0);
        }
      } else {
        for (int i = 0; i < BLOCK; ++i)
          if (d[c + i] != T(0)) *out++ = int32_t(c + i);
      }
    }
    for (; c < cols && out < end; ++c)
      if (d[c] != T(0)) *out++ = int32_t(c);
  }
}

void transpose_index(int64_t rows, int64_t cols, const int32_t* rowptr, const int32_t* col, int32_t* colptr,
                     int32_t* row, int32_t* csc_to_csr) {
  std::memset(colptr, 0, size_t(cols + 1) * sizeof(int32_t));
  const int32_t nnz = rowptr[rows];
  for (int32_t k = 0; k < nnz; ++k) ++colptr[col[k] + 1];
  for (int64_t c = 0; c < cols; ++c) colptr[c + 1] += colptr[c];
  std::vector<int32_t> next(colptr, colptr + cols);
  for (int64_t r = 0; r < rows; ++r)
    for (int32_t k = rowptr[r]; k < rowptr[r + 1]; ++k) {
      const int32_t at = next[col[k]]++;
      row[at] = int32_t(r);
      csc_to_csr[at] = k;
    }
}

const char* check_index(int64_t rows, int64_t cols, int64_t nnz, const int32_t* rowptr, const int32_t* col,
                        const int32_t* colptr, const int32_t* row, const int32_t* csc_to_csr) {
  if (rowptr[0] != 0) return "rowptr: expected to start at 0";
  for (int64_t r = 0; r < rows; ++r)
    if (rowptr[r + 1] < rowptr[r]) return "rowptr: expected values that never fall";
  if (rowptr[rows] != nnz) return "rowptr: expected to end at the number of nonzeros";
  for (int64_t r = 0; r < rows; ++r)
    for (int32_t k = rowptr[r]; k < rowptr[r + 1]; ++k) {
      if (col[k] < 0 || col[k] >= cols) return "col: expected indices inside the matrix";
      if (k > rowptr[r] && col[k] <= col[k - 1]) return "col: expected strictly ascending indices inside each row";
    }
  if (colptr[0] != 0 || colptr[cols] != nnz) return "colptr: expected to run from 0 to the number of nonzeros";
  for (int64_t c = 0; c < cols; ++c)
    if (colptr[c + 1] < colptr[c]) return "colptr: expected values that never fall";
  for (int64_t c = 0; c < cols; ++c)
    for (int32_t k = colptr[c]; k < colptr[c + 1]; ++k) {
      const int32_t at = csc_to_csr[k];
      if (at < 0 || at >= nnz || col[at] != c) return "csc_to_csr: expected the transpose of rowptr, col";
      if (row[k] < 0 || row[k] >= rows || at < rowptr[row[k]] || at >= rowptr[row[k] + 1])
        return "row: expected the transpose of rowptr, col";
      if (k > colptr[c] && row[k] <= row[k - 1]) return "row: expected strictly ascending indices inside each column";
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

template int64_t count_rows(const uint8_t*, int64_t, int64_t, int32_t*, int);
template int64_t count_rows(const float*, int64_t, int64_t, int32_t*, int);
template int64_t count_rows(const double*, int64_t, int64_t, int32_t*, int);
template void fill_columns(const uint8_t*, int64_t, int64_t, const int32_t*, int32_t*, int);
template void fill_columns(const float*, int64_t, int64_t, const int32_t*, int32_t*, int);
template void fill_columns(const double*, int64_t, int64_t, const int32_t*, int32_t*, int);
template void gather(const float*, int64_t, int64_t, const int32_t*, const int32_t*, float*, int);
template void gather(const double*, int64_t, int64_t, const int32_t*, const int32_t*, double*, int);
template void scatter(const float*, int64_t, int64_t, const int32_t*, const int32_t*, float*, int);
template void scatter(const double*, int64_t, int64_t, const int32_t*, const int32_t*, double*, int);

}  // namespace sparsebreg
