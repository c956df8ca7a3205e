// The inner loop of the gradients of values alone. No include guard: see isa/kernels.inc.

// Fields as in GatherTile.
template <class T>
struct CorrelateTile {
  const T* src;
  ptrdiff_t src_row;
  const int32_t* offset;
  ptrdiff_t scale = 1;
  const int32_t* begin;
  const int32_t* end;
  ptrdiff_t ptr_step;
  int64_t r0, r1;
  const T* grad;  // tile of the output gradient, of channel r0
  ptrdiff_t grad_channel, grad_row;
  int rows, cols;  // the part of the tile that exists; the rest counts as zero
  GradValues<T> grad_values;
};

// grad_values[k] += sum_{i,j,lane} grad[r][i][j][lane] * src[offset[k] + i*src_row + j*LANES + lane].
template <class T, int TR, int TC>
void correlate_tile(const CorrelateTile<T>& t) {
  constexpr int n = Vec<T>::n;
  V<T> room[SumQueue<T>::ROOM];
  SumQueue<T> queue(room);
  const GradValues<T> grad_values = t.grad_values;
  const int32_t* const offset = t.offset;
  const ptrdiff_t scale = t.scale;
  for (int64_t r = t.r0; r < t.r1; ++r) {
    const int32_t k0 = t.begin[r * t.ptr_step], k1 = t.end[r * t.ptr_step];
    if (k0 == k1) continue;
    for (int32_t k = k0, end; k < k1; k = end) {
      end = piece_end<T>(k, k1);
      for (int part = 0; part < LANES; part += n) {
        const T* grad = t.grad + (r - t.r0) * t.grad_channel + part;
        V<T> g[TR][TC];
        if (t.rows == TR && t.cols == TC) {
          for (int i = 0; i < TR; ++i)
            for (int j = 0; j < TC; ++j) g[i][j] = load(grad + i * t.grad_row + j * LANES);
        } else {
          for (int i = 0; i < TR; ++i)
            for (int j = 0; j < TC; ++j)
              g[i][j] = i < t.rows && j < t.cols ? load(grad + i * t.grad_row + j * LANES) : zero<T>();
        }
        const T* src[TR];
        for (int i = 0; i < TR; ++i) src[i] = t.src + part + i * t.src_row;
        queue.put_part(part, k, end, grad_values, [&](int32_t k, V<T> sum) {
          const ptrdiff_t at = TR == 1 ? offset[k] * scale : offset[k];
          V<T> s[2] = {sum, zero<T>()};
          for (int i = 0; i < TR; ++i)
            for (int j = 0; j < TC; ++j) s[j & 1] += g[i][j] * load(src[i] + at + j * LANES);
          return s[0] + s[1];
        });
      }
    }
  }
  queue.flush(grad_values);
}

template <class T>
using CorrelateFn = void (*)(const CorrelateTile<T>&);

template <class T, int TR, size_t... C>
CorrelateFn<T> pick_correlate(int tc, std::index_sequence<C...>) {
  static constexpr CorrelateFn<T> fns[] = {correlate_tile<T, TR, int(C) + 1>...};
  return fns[tc - 1];
}

template <class T>
CorrelateFn<T> correlate_fn(int tr, int tc) {
  if (tr == 4) return pick_correlate<T, 4>(tc, std::make_index_sequence<MAX_TILE / 4>{});
  if (tr == 2) return pick_correlate<T, 2>(tc, std::make_index_sequence<MAX_TILE / 2>{});
  return pick_correlate<T, 1>(tc, std::make_index_sequence<MAX_TILE>{});
}
