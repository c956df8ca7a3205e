// Building and checking sparsity patterns, and the two crossings between dense and sparse. No vector code: these are
// bound by memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sparsebreg {

// Turns counts, that of row r at rowptr[r + 1], into starts. Returns their sum, or -1 where it does not fit int32.
int64_t sum_counts(int64_t rows, int32_t* rowptr);

// Words of a row of one bit a column.
inline int64_t row_words(int64_t cols) { return (cols + 63) / 64; }

// Where dense (rows x cols; T is uint8_t for a mask) is not zero, as bits (rows x row_words(cols)), and the starts of
// its rows, as rowptr (rows + 1). Returns nnz, or -1 where it does not fit int32. NaN counts as nonzero. Cost: one
// pass.
template <class T>
int64_t mark_nonzeros(const T* dense, int64_t rows, int64_t cols, uint64_t* bits, int32_t* rowptr, int threads);

// Column indices of the nonzeros, ascending inside each row. bits and rowptr from mark_nonzeros; col has nnz places.
void fill_columns(const uint64_t* bits, int64_t rows, int64_t cols, const int32_t* rowptr, int32_t* col, int threads);

// Whether every bit from mark_nonzeros stands at a place of the pattern (rowptr, col).
bool covers(const int32_t* rowptr, const int32_t* col, const uint64_t* bits, int64_t rows, int64_t cols, int threads);

// The transposed index: colptr (cols + 1), row and csc_to_csr (nnz), rows ascending inside each column. O(nnz + cols).
void transpose_index(int64_t rows, int64_t cols, const int32_t* rowptr, const int32_t* col, int32_t* colptr,
                     int32_t* row, int32_t* csc_to_csr, int threads);

// What is wrong with an index, or null: rowptr from 0 to nnz, never falling; columns in range and ascending.
const char* check_index(int64_t rows, int64_t cols, int64_t nnz, const int32_t* rowptr, const int32_t* col);

// values[k] = dense[row of k][col[k]].
template <class T>
void gather(const T* dense, int64_t rows, int64_t cols, const int32_t* rowptr, const int32_t* col, T* values,
            int threads);

// dense[row of k][col[k]] = values[k]; other places keep what they hold.
template <class T>
void scatter(const T* values, int64_t rows, int64_t cols, const int32_t* rowptr, const int32_t* col, T* dense,
             int threads);

}  // namespace sparsebreg
