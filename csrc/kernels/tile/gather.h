// The inner loop of forward passes and input gradients. No include guard: see isa/kernels.inc.

constexpr int64_t MANY = 16384;  // from this many nonzeros on, they do not stay in the L1 cache
constexpr int AHEAD = 2;         // how many channels ahead data is prefetched

template <class T>
struct GatherTile {
  const T* src;
  ptrdiff_t src_row;
  const int32_t* offset;  // per nonzero, in units of `scale` elements of src
  ptrdiff_t scale = 1;
  const T* value;        // per nonzero, same order
  const int32_t* begin;  // nonzeros of destination channel r: [begin[r * ptr_step], end[r * ptr_step])
  const int32_t* end;
  ptrdiff_t ptr_step;
  bool prefetch = false;  // of the nonzeros of later channels
  int64_t r0, r1;
  T* dst;  // of channel r0
  ptrdiff_t dst_channel, dst_row, dst_col;
  const T* bias;                 // from channel r0 on; null: none
  bool first, last;              // whether this is the first, the last chunk of source channels
  T* sums;                       // kept between chunks: [r1 - r0][TR * TC][LANES]
  bool past_the_caches = false;  // write dst with non-temporal stores
  // Not null: running moments of dst, mean and sum of squared deviations: [r1 - r0][2][LANES], of `count` values a
  // lane.
  T* moments = nullptr;
  T count = 0;
  // Not null: dst is the gradient of relu(norm(x)), and the sums of norm_reduce are added up here, per lane:
  // [r1 - r0][2][LANES]. x has the layout of dst; scale, shift and mean of the norm begin with channel r0.
  T* reduced = nullptr;
  const T* x = nullptr;
  const T* x_scale = nullptr;
  const T* x_shift = nullptr;
  const T* x_mean = nullptr;
  // Where .at is not null: the gradients of values, too; see gather_both.h.
  GradValues<T> grad_values{};
  OwnTile<T> own{};
};

// Initial sums of channel r: its bias, or what the chunks before have added up.
template <class T, int TR, int TC>
SB_INLINE void begin_tile(const GatherTile<T>& t, int64_t r, int part, const T* sums, V<T> (&acc)[TR][TC]) {
  const V<T> b = splat<T>(t.first && t.bias ? t.bias[r - t.r0] : T(0));
  for (int i = 0; i < TR; ++i)
    for (int j = 0; j < TC; ++j) acc[i][j] = t.first ? b : load(sums + (i * TC + j) * LANES + part);
}

// Stores the sums of channel r and updates `moments` and `reduced`. half: where a cache line takes two vectors, the
// first one is kept here, and both are written together with the next part.
template <class T, int TR, int TC>
SB_INLINE void finish_tile(const GatherTile<T>& t, int64_t r, int part, const V<T> (&acc)[TR][TC], T* dst, T* sums,
                           V<T> (&half)[TR][TC]) {
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
    if (part / Vec<T>::n % LINE_PARTS + 1 < LINE_PARTS) return copy_tile<T, TR, TC>(acc, half);
    for (int i = 0; i < TR; ++i)
      for (int j = 0; j < TC; ++j) {
        T* p = dst + i * t.dst_row + j * t.dst_col + part;
        if (LINE_PARTS == 2) stream(p - Vec<T>::n, half[i][j]);
        stream(p, acc[i][j]);
      }
  } else {
    for (int i = 0; i < TR; ++i)
      for (int j = 0; j < TC; ++j) store(dst + i * t.dst_row + j * t.dst_col + part, acc[i][j]);
  }
}

// Prefetches the nonzeros of channel r, if there is such a channel.
template <class T>
SB_INLINE void prefetch_nonzeros(const GatherTile<T>& t, int64_t r) {
  if (r >= t.r1) return;
  const int32_t end = t.end[r * t.ptr_step], line = LINE / int(sizeof(int32_t));
  for (int32_t k = t.begin[r * t.ptr_step]; k < end; k += line) {
    __builtin_prefetch(t.offset + k);
    __builtin_prefetch(t.value + k);
  }
}

// dst[r][i][j][:] = bias[r] + sum_k value[k] * src[offset[k] + i*src_row + j*LANES + :].   Cost: nnz * TR * TC FMAs.
template <class T, int TR, int TC>
void gather_tile_only(const GatherTile<T>& t) {
  // Enough independent sums to hide the latency of multiply-adds: several vectors of a position, and for small tiles
  // even and odd nonzeros apart.
  constexpr int n = Vec<T>::n, P = registers_at_once<T>(TR * TC), CHAINS = P * TR * TC <= MAX_TILE / 2 ? 2 : 1;
  const int32_t* const offset = t.offset;
  const T* const value = t.value;
  const ptrdiff_t scale = t.scale;
  for (int64_t r = t.r0; r < t.r1; ++r) {
    T* dst = t.dst + (r - t.r0) * t.dst_channel;
    T* sums = t.first && t.last ? nullptr : t.sums + (r - t.r0) * TR * TC * LANES;
    const int32_t k0 = t.begin[r * t.ptr_step], k1 = t.end[r * t.ptr_step];
    if (k0 == k1 && !t.first && !t.last) continue;
    if (t.prefetch) prefetch_nonzeros(t, r + AHEAD);
    V<T> half[TR][TC];
    for (int part = 0; part < LANES; part += P * n) {
      V<T> acc[CHAINS][P][TR][TC] = {};
      for (int h = 0; h < P; ++h) begin_tile<T, TR, TC>(t, r, part + h * n, sums, acc[0][h]);
      const T* src[TR];
      for (int i = 0; i < TR; ++i) src[i] = t.src + part + i * t.src_row;
      const auto add = [&](int32_t k, int chain) {
        const ptrdiff_t at = TR == 1 ? offset[k] * scale : offset[k];
        const V<T> v = splat<T>(value[k]);
        for (int h = 0; h < P; ++h)
          for (int i = 0; i < TR; ++i)
            for (int j = 0; j < TC; ++j) acc[chain][h][i][j] += v * load(src[i] + at + j * LANES + h * n);
      };
      int32_t k = k0;
      for (; CHAINS > 1 && k1 - k >= CHAINS; k += CHAINS)
        for (int u = 0; u < CHAINS; ++u) add(k + u, u);
      for (; k < k1; ++k) add(k, 0);
      for (int h = 0; h < P; ++h) {
        for (int u = 1; u < CHAINS; ++u)
          for (int i = 0; i < TR; ++i)
            for (int j = 0; j < TC; ++j) acc[0][h][i][j] += acc[u][h][i][j];
        finish_tile<T, TR, TC>(t, r, part + h * n, acc[0][h], dst, sums, half);
      }
    }
  }
}
