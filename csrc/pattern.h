// Building and checking sparsity patterns, and the two crossings between dense and sparse. No vector code: these are
// bound by memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sparsebreg {

// Number of nonzero bytes in each row of mask (rows x cols), as rowptr (rows + 1). Returns nnz, or -1 where it does not
// fit int32 (rowptr is then unspecified). Cost: one pass over the mask.
int64_t count_rows(const uint8_t* mask, int64_t rows, int64_t cols, int32_t* rowptr, int threads);

// Column indices of the nonzero bytes, ascending inside each row. rowptr from count_rows; col has nnz places.
void fill_columns(const uint8_t* mask, int64_t rows, int64_t cols, const int32_t* rowptr, int32_t* col, int threads);

// The transposed index: colptr (cols + 1), row and csc_to_csr (nnz), rows ascending inside each column. O(nnz + cols).
void transpose_index(int64_t rows, int64_t cols, const int32_t* rowptr, const int32_t* col, int32_t* colptr,
                     int32_t* row, int32_t* csc_to_csr);

// What is wrong with an index, or null: rowptr from 0 to nnz, never falling; columns in range and ascending; the
// transposed index exactly the transpose.
const char* check_index(int64_t rows, int64_t cols, int64_t nnz, const int32_t* rowptr, const int32_t* col,
                        const int32_t* colptr, const int32_t* row, const int32_t* csc_to_csr);

// values[k] = dense[row of k][col[k]].
template <class T>
void gather(const T* dense, int64_t rows, int64_t cols, const int32_t* rowptr, const int32_t* col, T* values,
            int threads);

// dense[row of k][col[k]] = values[k]; other places keep what they hold.
template <class T>
void scatter(const T* values, int64_t rows, int64_t cols, const int32_t* rowptr, const int32_t* col, T* dense,
             int threads);

}  // namespace sparsebreg
