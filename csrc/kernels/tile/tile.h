// Tiles, the unit of work of the package's inner loops. No include guard: see isa/kernels.inc.
//
// A tile is TR x TC positions of LANES samples each, at row pitch `src_row` and column pitch LANES in `src`. A nonzero
// shifts the whole tile by its offset. There are three inner loops over the nonzeros of a channel:
//   gather.h (forward, input gradient): a tile of sums stays in registers, every nonzero adds a shifted source tile.
//   correlate.h (gradient of the values): a tile of the output gradient stays in registers, every nonzero yields one
//   sum. gather_both.h (both gradients): a tile of x and the sums of its gradient stay, and every load serves both.

// Most positions of a tile: its sums and its own values (see OwnTile) then take sixteen registers. Instruction sets
// that have no more than these spill some, but smaller tiles are slower still.
constexpr int MAX_TILE = 8;

// How many of a position's vectors are summed at the same time: as many as fit into MAX_TILE registers.
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

// A tile at the place of the destination (x, where dst is its gradient), from channel r0 on. Multiplied with what is
// gathered, it yields the gradients of the values.
template <class T>
struct OwnTile {
  const T* data;
  ptrdiff_t channel, row, col;
  const T* scale;  // from channel r0 on: a batch norm to apply first; null: none
  const T* shift;
  bool relu;
  int images;                // lanes from here on count as zero
  int skip_rows, skip_cols;  // this many first rows and columns count as zero: another tile has had them
};

// Loads one vector of lanes, from lane `part` on, of channel r0 + r.
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
