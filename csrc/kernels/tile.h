// The two inner loops of the package. Included inside an instruction set's namespace; no include guard on purpose.
//
// A tile is TR x TC positions of LANES samples each. Its positions lie in `src` at row pitch `src_row` and column pitch
// LANES; a nonzero shifts the whole tile by its offset. Forward and input gradient *gather* (the tile's sums stay in
// registers while the nonzeros of one destination channel pass by), the value gradient *correlates* (the tile of the
// output gradient stays in registers, every nonzero yields one sum).

constexpr int PARTS_F32 = LANES / Vec<float>::n;
constexpr int PARTS_F64 = LANES / Vec<double>::n;

// What a batch norm makes of x; one expression everywhere, so that a sign does not depend on who computes it.
template <class T>
SB_INLINE V<T> normed(V<T> x, V<T> scale, V<T> shift) {
  return x * scale + shift;
}

// K registers more to the mean and the sum of squared deviations of the `count` before them, lane by lane. They are
// taken by their own mean first: nothing is read twice, and nothing cancels.
template <class T, int K>
SB_INLINE void add_moments(const V<T>* v, V<T>& mean, V<T>& squares, T count) {
  V<T> own = zero<T>(), more = zero<T>();
  for (int k = 0; k < K; ++k) own += v[k];
  own *= splat<T>(T(1) / T(K));
  for (int k = 0; k < K; ++k) more += (v[k] - own) * (v[k] - own);
  const V<T> d = own - mean;
  const T all = count + T(K);
  mean += d * splat<T>(T(K) / all);
  squares += more + d * d * splat<T>(count * T(K) / all);
}

template <class T>
struct GatherTile {
  const T* src;
  ptrdiff_t src_row;
  const int32_t* offset;  // per nonzero, in units of `scale` elements of src
  ptrdiff_t scale = 1;
  const T* value;  // per nonzero, same order; or, with `order`, nonzero k has value[order[k]]
  const int32_t* order = nullptr;
  const int32_t* begin;  // first nonzero of destination channel r: begin[r * ptr_step]; its end: end[r * ptr_step]
  const int32_t* end;
  ptrdiff_t ptr_step;
  int64_t r0, r1;
  T* dst;  // of channel r0
  ptrdiff_t dst_channel, dst_row, dst_col;
  const T* bias;                 // of channel r0; null: none
  bool first, last;              // of the chunks that a sum is made in
  T* sums;                       // between chunks: [r1 - r0][TR * TC][LANES]
  bool past_the_caches = false;  // how dst is written
  // Not null: mean and sum of squared deviations [r1 - r0][2][LANES] of what was written, `count` in each lane so far.
  T* moments = nullptr;
  T count = 0;
  // Not null: where dst is the gradient of what a norm with a ReLU makes of x: the sums that norm_reduce takes of what
  // the ReLU lets pass, [r1 - r0][2][LANES]. x lies as dst does; the others are of channel r0.
  T* reduced = nullptr;
  const T* x = nullptr;
  const T* x_scale = nullptr;
  const T* x_shift = nullptr;
  const T* x_mean = nullptr;
};

// dst[r][i][j][:] = bias[r] + sum_k value[k] * src[offset[k] + i*src_row + j*LANES + :].   Cost: nnz * TR * TC FMAs.
template <class T, int TR, int TC, bool ORDERED>
void gather_tile_as(const GatherTile<T>& t) {
  constexpr int n = Vec<T>::n;
  for (int64_t r = t.r0; r < t.r1; ++r) {
    T* dst = t.dst + (r - t.r0) * t.dst_channel;
    T* sums = t.first && t.last ? nullptr : t.sums + (r - t.r0) * TR * TC * LANES;
    const int32_t k0 = t.begin[r * t.ptr_step], k1 = t.end[r * t.ptr_step];
    if (k0 == k1 && !t.first && !t.last) continue;
    for (int part = 0; part < LANES; part += n) {
      V<T> acc[TR][TC];
      if (t.first) {
        const V<T> b = splat<T>(t.bias ? t.bias[r - t.r0] : T(0));
        for (int i = 0; i < TR; ++i)
          for (int j = 0; j < TC; ++j) acc[i][j] = b;
      } else {
        for (int i = 0; i < TR; ++i)
          for (int j = 0; j < TC; ++j) acc[i][j] = load(sums + (i * TC + j) * LANES + part);
      }
      const T* src = t.src + part;
      for (int32_t k = k0; k < k1; ++k) {
        const T* p = src + t.offset[k] * t.scale;
        const V<T> v = splat<T>(t.value[ORDERED ? t.order[k] : k]);
        for (int i = 0; i < TR; ++i)
          for (int j = 0; j < TC; ++j) acc[i][j] += v * load(p + i * t.src_row + j * LANES);
      }
      if (t.last && t.reduced) {
        T* at = t.reduced + (r - t.r0) * 2 * LANES + part;
        const T* x = t.x + (dst - t.dst) + part;
        const V<T> scale = splat<T>(t.x_scale[r - t.r0]), shift = splat<T>(t.x_shift[r - t.r0]),
                   mean = splat<T>(t.x_mean[r - t.r0]);
        V<T> g = load(at), gx = load(at + LANES);
        for (int i = 0; i < TR; ++i)
          for (int j = 0; j < TC; ++j) {
            const V<T> own = load(x + i * t.dst_row + j * t.dst_col);
            const V<T> passed = normed<T>(own, scale, shift) <= zero<T>() ? zero<T>() : acc[i][j];
            g += passed;
            gx += passed * (own - mean);
          }
        store(at, g);
        store(at + LANES, gx);
      }
      if (t.last && t.moments) {
        T* at = t.moments + (r - t.r0) * 2 * LANES + part;
        V<T> mean = load(at), squares = load(at + LANES);
        add_moments<T, TR * TC>(&acc[0][0], mean, squares, t.count);
        store(at, mean);
        store(at + LANES, squares);
      }
      if (!t.last) {
        for (int i = 0; i < TR; ++i)
          for (int j = 0; j < TC; ++j) store(sums + (i * TC + j) * LANES + part, acc[i][j]);
      } else if (CAN_STREAM && t.past_the_caches) {
        for (int i = 0; i < TR; ++i)
          for (int j = 0; j < TC; ++j) stream(dst + i * t.dst_row + j * t.dst_col + part, acc[i][j]);
      } else {
        for (int i = 0; i < TR; ++i)
          for (int j = 0; j < TC; ++j) store(dst + i * t.dst_row + j * t.dst_col + part, acc[i][j]);
      }
    }
  }
}

template <class T, int TR, int TC>
void gather_tile(const GatherTile<T>& t) {
  if (t.order)
    gather_tile_as<T, TR, TC, true>(t);
  else
    gather_tile_as<T, TR, TC, false>(t);
}

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
  int rows, cols;  // how many of the tile's positions exist; the others count as zero
  T* grad_values;  // per nonzero; added to
};

// Adds the lane sums of sum[0..m) to grad_values at `at`.
template <class T>
SB_INLINE void add_sums(V<T>* sum, const int32_t* at, int m, T* grad_values) {
  constexpr int n = Vec<T>::n;
  for (int q = m; q < n; ++q) sum[q] = zero<T>();
  const V<T> totals = sum_each<T>(sum);
  if (m == n && at[n - 1] - at[0] == n - 1) {
    store(grad_values + at[0], load(grad_values + at[0]) + totals);
  } else {
    alignas(64) T out[n];
    store(out, totals);
    for (int q = 0; q < m; ++q) grad_values[at[q]] += out[q];
  }
}

// grad_values[k] += sum_{i,j,lane} grad[r][i][j][lane] * src[offset[k] + i*src_row + j*LANES + lane].
// A register of sums is reduced together with its neighbours, across rows too: rows of a chunk are short.
template <class T, int TR, int TC>
void correlate_tile(const CorrelateTile<T>& t) {
  constexpr int n = Vec<T>::n;
  for (int part = 0; part < LANES; part += n) {
    const T* src = t.src + part;
    V<T> sum[n];
    int32_t at[n];
    int m = 0;
    for (int64_t r = t.r0; r < t.r1; ++r) {
      const int32_t k0 = t.begin[r * t.ptr_step], k1 = t.end[r * t.ptr_step];
      if (k0 == k1) continue;
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
      for (int32_t k = k0; k < k1; ++k) {
        const T* p = src + t.offset[k] * t.scale;
        V<T> s[2] = {zero<T>(), zero<T>()};  // two chains: the out-of-order window overlaps neighbouring nonzeros
        for (int i = 0; i < TR; ++i)
          for (int j = 0; j < TC; ++j) s[j & 1] += g[i][j] * load(p + i * t.src_row + j * LANES);
        sum[m] = s[0] + s[1];
        at[m] = k;
        if (++m == n) {
          add_sums<T>(sum, at, n, t.grad_values);
          m = 0;
        }
      }
    }
    if (m) add_sums<T>(sum, at, m, t.grad_values);
  }
}

#if defined(SB_WIDE_FILE)  // 32 vector registers
constexpr int MAX_TILE = 16;
#else
constexpr int MAX_TILE = 12;
#endif

template <class T>
using GatherFn = void (*)(const GatherTile<T>&);
template <class T>
using CorrelateFn = void (*)(const CorrelateTile<T>&);

template <class T, int TR, size_t... C>
GatherFn<T> pick_gather(int tc, std::index_sequence<C...>) {
  static constexpr GatherFn<T> fns[] = {gather_tile<T, TR, int(C) + 1>...};
  return fns[tc - 1];
}

template <class T, int TR, size_t... C>
CorrelateFn<T> pick_correlate(int tc, std::index_sequence<C...>) {
  static constexpr CorrelateFn<T> fns[] = {correlate_tile<T, TR, int(C) + 1>...};
  return fns[tc - 1];
}

template <class T>
GatherFn<T> gather_fn(int tr, int tc) {
  if (tr == 4) return pick_gather<T, 4>(tc, std::make_index_sequence<MAX_TILE / 4>{});
  if (tr == 2) return pick_gather<T, 2>(tc, std::make_index_sequence<MAX_TILE / 2>{});
  return pick_gather<T, 1>(tc, std::make_index_sequence<MAX_TILE>{});
}

template <class T>
CorrelateFn<T> correlate_fn(int tr, int tc) {
  if (tr == 4) return pick_correlate<T, 4>(tc, std::make_index_sequence<MAX_TILE / 4>{});
  if (tr == 2) return pick_correlate<T, 2>(tc, std::make_index_sequence<MAX_TILE / 2>{});
  return pick_correlate<T, 1>(tc, std::make_index_sequence<MAX_TILE>{});
}
