// The two inner loops of the package. Included inside an instruction set's namespace; no include guard on purpose.
//
// A tile is TR x TC positions of LANES samples each. Its positions lie in `src` at row pitch `src_row` and column pitch
// LANES; a nonzero shifts the whole tile by its offset. Forward and input gradient *gather* (the tile's sums stay in
// registers while the nonzeros of one destination channel pass by), the value gradient *correlates* (a tile stays in
// registers, every nonzero yields one sum). Both gradients together do both with one load: a tile of x and the sums of
// its gradient stay while the output gradient passes by.

// Sums and own values of a tile fill sixteen registers. With no more than those some are spilled; smaller tiles are
// slower still.
constexpr int MAX_TILE = 8;

// Registers of a position that are summed at once.
template <class T>
constexpr int registers_at_once(int positions) {
  int count = LANES / Vec<T>::n;
  while (count > 1 && count * positions > MAX_TILE) count /= 2;
  return count;
}

template <class T, int TR, int TC>
SB_INLINE void copy_tile(const V<T> (&from)[TR][TC], V<T> (&to)[TR][TC]) {
  for (int i = 0; i < TR; ++i)
    for (int j = 0; j < TC; ++j) to[i][j] = from[i][j];
}

// A tile of the destination's own values, of channel r0: what is gathered is multiplied with it.
template <class T>
struct OwnTile {
  const T* data;
  ptrdiff_t channel, row, col;
  const T* scale;  // of channel r0: a norm that the values go through first; null: none
  const T* shift;
  bool relu;
  int images;                // the lanes that exist; the others count as zero
  int skip_rows, skip_cols;  // so many of the tile's first rows and columns count as zero
};

template <class T, int TR, int TC>
SB_INLINE void load_own(const OwnTile<T>& t, int64_t r, int part, V<T> (&own)[TR][TC]) {
  const T* p = t.data + r * t.channel + part;
  for (int i = 0; i < TR; ++i)
    for (int j = 0; j < TC; ++j) own[i][j] = load(p + i * t.row + j * t.col);
  if (t.scale) {
    const V<T> scale = splat<T>(t.scale[r]), shift = splat<T>(t.shift[r]);
    for (int i = 0; i < TR; ++i)
      for (int j = 0; j < TC; ++j) {
        own[i][j] = normed<T>(own[i][j], scale, shift);
        if (t.relu) own[i][j] = rectified<T>(own[i][j]);
      }
  }
  if (t.images < LANES) {
    const typename Vec<T>::index exists = lane_mask<T>(t.images, part);
    for (int i = 0; i < TR; ++i)
      for (int j = 0; j < TC; ++j) own[i][j] = exists ? own[i][j] : zero<T>();
  }
  if (t.skip_rows || t.skip_cols) {
    for (int i = 0; i < TR; ++i)
      for (int j = 0; j < TC; ++j)
        if (i < t.skip_rows || j < t.skip_cols) own[i][j] = zero<T>();
  }
}
