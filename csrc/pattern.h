// Building and checking sparsity patterns, and the two crossings between dense and sparse. No vector code here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <vector>

namespace sparsebreg {

// Turns counts, that of row r at rowptr[r + 1], into starts. Returns their sum, or -1 where it does not fit int32.
int64_t sum_counts(int64_t rows, int32_t* rowptr);

// Words of a row of one bit a column.
inline int64_t row_words(int64_t cols) { return (cols + 63) / 64; }

// Column indices, ascending inside each row, of places marked by one bit each, rows x row_words(cols). rowptr: starts
// of the rows.
void fill_columns(const uint64_t* bits, int64_t rows, int64_t cols, const int32_t* rowptr, int32_t* col, int threads);

// The bits of such columns.
void mark_columns(int64_t rows, int64_t cols, const int32_t* rowptr, const int32_t* col, uint64_t* bits, int threads);

// How many groups of `width` columns are without a marked place; cols is a multiple of it.
int64_t count_unmarked(const uint64_t* bits, int64_t rows, int64_t cols, int64_t width);

// The transposed index: colptr (cols + 1), row, csc_to_csr and its inverse (nnz), rows ascending inside each column.
// O(nnz + cols).
void transpose_index(int64_t rows, int64_t cols, const int32_t* rowptr, const int32_t* col, int32_t* colptr,
                     int32_t* row, int32_t* csc_to_csr, int32_t* csr_to_csc, int threads);

// What is wrong with an index, or null: rowptr from 0 to nnz, never falling; columns in range and ascending.
const char* check_index(int64_t rows, int64_t cols, int64_t nnz, const int32_t* rowptr, const int32_t* col);

// Where each row's nonzeros begin inside each of several equal ranges of columns. Kept from the first time on that
// somebody asks: it depends on the pattern alone, and searching takes a sixteenth of a pass that needs it. Safe across
// threads.
class ChunkStarts {
 public:
  // rows x chunks + 1 starts, valid as long as this object. Throws std::bad_alloc.
  const int32_t* of(int64_t rows, int64_t cols, const int32_t* rowptr, const int32_t* col, int chunks, int threads);

 private:
  std::mutex mutex_;
  std::map<int, std::vector<int32_t>> by_chunks_;
};

// values[k] = dense[row of k][col[k]].
template <class T>
void gather(const T* dense, int64_t rows, int64_t cols, const int32_t* rowptr, const int32_t* col, T* values,
            int threads);

// dense[row of k][col[k]] = values[k]; other places keep what they hold, or become zero.
template <class T>
void scatter(const T* values, int64_t rows, int64_t cols, const int32_t* rowptr, const int32_t* col, T* dense,
             bool zero_others, int threads);

}  // namespace sparsebreg
