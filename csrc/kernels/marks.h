// Where a dense matrix is not zero, or beyond a bound, one bit a place. No include guard: see isa/kernels.inc.

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "nonzero_word packs bytes in memory order");

// Bit i: d[i] is not zero. NaN counts as nonzero.
template <class T>
SB_INLINE uint64_t nonzero_word(const T* d) {
  uint64_t word = 0;
  for (int i = 0; i < 64; i += Vec<T>::n) word |= uint64_t(nonzero_lanes<T>(load(d + i))) << i;
  return word;
}

// The comparisons, to bytes of 0 and 1, are what compilers vectorise.
template <>
SB_INLINE uint64_t nonzero_word(const uint8_t* d) {
  alignas(64) uint8_t nonzero[64];
  for (int i = 0; i < 64; ++i) nonzero[i] = d[i] != 0;
  uint64_t word = 0;
  for (int i = 0; i < 64; i += 8) {
    uint64_t bytes;
    __builtin_memcpy(&bytes, nonzero + i, 8);
    word |= bytes * 0x0102040810204080 >> 56 << i;  // the top byte gathers byte j's lowest bit as its bit j
  }
  return word;
}

// Bit i: the magnitude of d[i] is above `bound`, or it is NaN.
template <class T>
SB_INLINE uint64_t word_beyond(const T* d, T bound) {
  const V<T> high = splat<T>(bound), low = splat<T>(-bound);
  uint64_t word = 0;
  for (int i = 0; i < 64; i += Vec<T>::n) {
    const V<T> x = load(d + i);
    word |= uint64_t(nonzero_lanes<T>((x <= high) & (x >= low) ? zero<T>() : x)) << i;
  }
  return word;
}

// Calls f(word's number, its bits) for the words of a row of `cols` while it returns true; says whether it always did.
template <class T, class Word, class F>
SB_INLINE bool each_word(const T* d, int64_t cols, Word word, F f) {
  int64_t c = 0;
  for (; c + 64 <= cols; c += 64)
    if (!f(c / 64, word(d + c))) return false;
  if (c == cols) return true;
  T rest[64] = {};
  __builtin_memcpy(rest, d + c, size_t(cols - c) * sizeof(T));
  return f(c / 64, word(rest));
}

// Bits (rows x row_words(cols)) and the starts of rows (rows + 1) of what `word` marks in dense (rows x cols). Returns
// their number, or -1 where it does not fit int32.
template <class T, class Word>
SB_INLINE int64_t mark_words(const T* dense, int64_t rows, int64_t cols, Word word, uint64_t* bits, int32_t* rowptr,
                             int threads) {
  const int64_t words = row_words(cols);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    int32_t count = 0;
    each_word(dense + r * cols, cols, word, [&](int64_t w, uint64_t marked) {
      bits[r * words + w] = marked;
      count += __builtin_popcountll(marked);
      return true;
    });
    rowptr[r + 1] = count;
  }
  return sum_counts(rows, rowptr);
}

template <class T>
int64_t mark_nonzeros(const T* dense, int64_t rows, int64_t cols, uint64_t* bits, int32_t* rowptr, int threads) {
  const auto word = [](const T* d) { return nonzero_word<T>(d); };  // a function itself would not be inlined
  return mark_words(dense, rows, cols, word, bits, rowptr, threads);
}

template <class T>
int64_t mark_beyond(const T* dense, int64_t rows, int64_t cols, T bound, uint64_t* bits, int32_t* rowptr, int threads) {
  const auto word = [bound](const T* d) { return word_beyond(d, bound); };
  return mark_words(dense, rows, cols, word, bits, rowptr, threads);
}

// values[k] = row[col[k]] for row r of the index if every nonzero of `row` stands there, where the index's marks are
// `bits`; else says false, and its values are undefined.
template <class T>
SB_INLINE bool gather_row(const T* row, const Index& ix, const uint64_t* bits, int64_t r, T* values) {
  bits += r * row_words(ix.cols);
  const bool all =
      each_word(row, ix.cols, nonzero_word<T>, [&](int64_t w, uint64_t word) { return !(word & ~bits[w]); });
  for (int32_t k = ix.rowptr[r]; all && k < ix.rowptr[r + 1]; ++k) values[k] = row[ix.col[k]];
  return all;
}

// The same of all rows of dense, each gathered while it is in the first-level cache.
template <class T>
bool gather_all(const T* dense, const Index& ix, const uint64_t* bits, T* values, int threads) {
  bool all = true;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static) reduction(&& : all)
  for (int64_t r = 0; r < ix.rows; ++r) all = all && gather_row(dense + r * ix.cols, ix, bits, r, values);
  return all;
}
