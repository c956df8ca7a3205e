// The two inner loops of the package. Included inside an instruction set's namespace; no include guard on purpose.
//
// A tile is TR x TC positions of LANES samples each. Its positions lie in `src` at row pitch `src_row` and column pitch
// LANES; a nonzero shifts the whole tile by its offset. Forward and input gradient *gather* (the tile's sums stay in
// registers while the nonzeros of one destination channel pass by), the value gradient *correlates* (a tile stays in
// registers, every nonzero yields one sum). Both gradients together do both with one load: a tile of x and the sums of
// its gradient stay while the output gradient passes by.

// What a batch norm makes of x; one expression everywhere, so that a sign does not depend on who computes it.
template <class T>
SB_INLINE V<T> normed(V<T> x, V<T> scale, V<T> shift) {
  return x * scale + shift;
}

template <class T>
SB_INLINE V<T> rectified(V<T> v) {
  return v < zero<T>() ? zero<T>() : v;  // NaN stays
}

// All ones in the lanes of `part` that hold one of the first `images` samples.
template <class T>
SB_INLINE typename Vec<T>::index lane_mask(int images, int part) {
  typename Vec<T>::index m{};
  for (int i = 0; i < Vec<T>::n; ++i) m[i] = part + i < images ? -1 : 0;
  return m;
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

// Where the gradients of values go: nonzero k's to at[k].
template <class T>
struct GradValues {
  T* at;
  bool add;                      // or set
  bool past_the_caches = false;  // how they are set
};

// The sums of the lanes of sum[0..m) become those of the nonzeros from k on.
template <class T>
SB_INLINE void pass_sums(const V<T>* sum, int m, const GradValues<T>& to, int32_t k) {
  constexpr int n = Vec<T>::n;
  V<T> lanes[n];
  for (int q = 0; q < n; ++q) lanes[q] = sum[q];
  const V<T> totals = sum_each<T>(lanes);
  if (m == n && CAN_STREAM && to.past_the_caches) return stream(to.at + k, totals);
  if (m == n) return store(to.at + k, to.add ? load(to.at + k) + totals : totals);
  alignas(64) T out[n];
  store(out, totals);
  for (int q = 0; q < m; ++q) {
    T& place = to.at[k + q];
    place = to.add ? place + out[q] : out[q];
  }
}

template <class T>
__attribute__((noinline)) void pass_fewer_sums(V<T>* sum, int m, const GradValues<T>& to, int32_t k) {
  for (int q = m; q < Vec<T>::n; ++q) sum[q] = zero<T>();
  pass_sums<T>(sum, m, to, k);
}

// So many nonzeros are taken through all parts of the lanes before their sums are reduced.
constexpr int HELD = 256;

// Registers whose lanes are still to be summed, of nonzeros that follow one another. A register is reduced together
// with its neighbours, across rows too: rows of a chunk are short. What goes past the caches begins with fewer, so that
// all others go to a vector's border. They lie apart from what tells where they end, which is then a register's, too.
template <class T>
struct SumQueue {
  static constexpr int n = Vec<T>::n, ROOM = n < LANES ? n + HELD : n;

  V<T>* const begin;  // ROOM
  V<T>* end;
  V<T>* full;  // where *end is the last one
  int32_t k;   // the nonzero of *begin; below 0: nothing was put yet

  SB_INLINE explicit SumQueue(V<T>* room) : begin(room), end(room), full(room + n), k(-1) {}
  SB_INLINE void put(V<T> v, const GradValues<T>& to) {
    *end++ = v;
    if (end != full) return;
    const int m = int(end - begin);
    if (m == n)
      pass_sums<T>(begin, n, to, k);
    else
      pass_fewer_sums<T>(begin, m, to, k);
    k += m;
    end = begin;
    full = begin + n;
  }
  SB_INLINE void flush(const GradValues<T>& to) {
    if (end != begin) pass_fewer_sums<T>(begin, int(end - begin), to, k);
    end = begin;
  }
  // What is put next is of the nonzeros from `next` on.
  SB_INLINE void seek(int32_t next, const GradValues<T>& to) {
    if (k + (end - begin) == next) return;
    flush(to);
    k = next;
    full = begin + n;
    if (CAN_STREAM && to.past_the_caches) full -= reinterpret_cast<uintptr_t>(to.at + k) / sizeof(T) % n;
  }
  // Puts product(k, sum), which is `sum` and more, for at most HELD nonzeros: of one part of the lanes after the other,
  // each on top of those before it.
  template <class F>
  SB_INLINE void put_part(int part, int32_t k0, int32_t k1, const GradValues<T>& to, F product) {
    if constexpr (n == LANES) {
      seek(k0, to);
      for (int32_t k = k0; k < k1; ++k) put(product(k, zero<T>()), to);
    } else {
      const V<T> none = zero<T>();
      const ptrdiff_t step = part > 0;
      V<T>* held = begin + n;
      const V<T>* from = step ? held : &none;
      if (part + n < LANES) {
        for (int32_t k = k0; k < k1; ++k, ++held, from += step) *held = product(k, *from);
      } else {
        seek(k0, to);
        for (int32_t k = k0; k < k1; ++k, from += step) put(product(k, *from), to);
      }
    }
  }
};

// How many of a row's nonzeros are taken through all parts of the lanes at once.
template <class T>
SB_INLINE int32_t piece_end(int32_t k, int32_t k1) {
  return Vec<T>::n == LANES || k1 - k < HELD ? k1 : k + HELD;
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

constexpr int64_t MANY = 16384;  // nonzeros that do not stay in the first-level cache
constexpr int AHEAD = 2;         // so many channels before its turn, what belongs to a channel is fetched

template <class T>
struct GatherTile {
  const T* src;
  ptrdiff_t src_row;
  const int32_t* offset;  // per nonzero, in units of `scale` elements of src
  ptrdiff_t scale = 1;
  const T* value;        // per nonzero, same order
  const int32_t* begin;  // first nonzero of destination channel r: begin[r * ptr_step]; its end: end[r * ptr_step]
  const int32_t* end;
  ptrdiff_t ptr_step;
  bool ask = false;  // for the nonzeros of later rows in advance
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
  // Where .at is not null: what correlate_tile sums for `own`, so that src is loaded once for both.
  GradValues<T> grad_values{};
  OwnTile<T> own{};
};

template <class T, int TR, int TC>
SB_INLINE void copy_tile(const V<T> (&from)[TR][TC], V<T> (&to)[TR][TC]) {
  for (int i = 0; i < TR; ++i)
    for (int j = 0; j < TC; ++j) to[i][j] = from[i][j];
}

// What the sums of channel r begin with.
template <class T, int TR, int TC>
SB_INLINE void begin_tile(const GatherTile<T>& t, int64_t r, int part, const T* sums, V<T> (&acc)[TR][TC]) {
  const V<T> b = splat<T>(t.first && t.bias ? t.bias[r - t.r0] : T(0));
  for (int i = 0; i < TR; ++i)
    for (int j = 0; j < TC; ++j) acc[i][j] = t.first ? b : load(sums + (i * TC + j) * LANES + part);
}

// What becomes of them: they are stored, and what else is wanted is taken of them. half: where the first halves of
// lines wait for the second ones, which are the next part's.
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

// Fetches the nonzeros of channel r, if there is one.
template <class T>
SB_INLINE void ask_for(const GatherTile<T>& t, int64_t r) {
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
  // Enough sums at once to keep the multipliers busy: of all lanes of a position, if they fit into the registers, and
  // of even and odd nonzeros apart.
  constexpr int n = Vec<T>::n, P = registers_at_once<T>(TR * TC), CHAINS = P * TR * TC <= MAX_TILE / 2 ? 2 : 1;
  const int32_t* const offset = t.offset;
  const T* const value = t.value;
  const ptrdiff_t scale = t.scale;
  for (int64_t r = t.r0; r < t.r1; ++r) {
    T* dst = t.dst + (r - t.r0) * t.dst_channel;
    T* sums = t.first && t.last ? nullptr : t.sums + (r - t.r0) * TR * TC * LANES;
    const int32_t k0 = t.begin[r * t.ptr_step], k1 = t.end[r * t.ptr_step];
    if (k0 == k1 && !t.first && !t.last) continue;
    if (t.ask) ask_for(t, r + AHEAD);
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

// The same, and the gradients of values: what correlate_tile does for t.own.
template <class T, int TR, int TC>
void gather_tile_both(const GatherTile<T>& t) {
  constexpr int n = Vec<T>::n;
  V<T> room[SumQueue<T>::ROOM];
  SumQueue<T> queue(room);
  // Copies, since what is stored could lie over t, for all the compiler knows: it would read them for every nonzero.
  const GradValues<T> grad_values = t.grad_values;
  const int32_t* const offset = t.offset;
  const T* const value = t.value;
  const ptrdiff_t scale = t.scale, src_row = t.src_row;
  for (int64_t r = t.r0; r < t.r1; ++r) {
    T* dst = t.dst + (r - t.r0) * t.dst_channel;
    T* sums = t.first && t.last ? nullptr : t.sums + (r - t.r0) * TR * TC * LANES;
    const int32_t k0 = t.begin[r * t.ptr_step], k1 = t.end[r * t.ptr_step];
    V<T> half[TR][TC];
    if (k0 == k1) {  // as in most phases of a strided 1x1 convolution
      for (int part = 0; (t.first || t.last) && part < LANES; part += n) {
        V<T> acc[TR][TC];
        begin_tile<T, TR, TC>(t, r, part, sums, acc);
        finish_tile<T, TR, TC>(t, r, part, acc, dst, sums, half);
      }
      continue;
    }
    if (t.ask) ask_for(t, r + AHEAD);
    if (t.first) {
      const T* next = t.own.data + (r - t.r0 + AHEAD) * t.own.channel;
      for (int i = 0; i < TR; ++i)
        for (int j = 0; j < TC; ++j) __builtin_prefetch(next + i * t.own.row + j * t.own.col);
    }
    V<T> between[LANES / n][TR][TC];  // the sums between two pieces of the row
    for (int32_t k = k0, end; k < k1; k = end) {
      end = piece_end<T>(k, k1);
      for (int part = 0; part < LANES; part += n) {
        V<T> acc[TR][TC], own[TR][TC];
        if (k == k0)
          begin_tile<T, TR, TC>(t, r, part, sums, acc);
        else
          copy_tile<T, TR, TC>(between[part / n], acc);
        load_own<T, TR, TC>(t.own, r - t.r0, part, own);
        const T* src[TR];
        for (int i = 0; i < TR; ++i) src[i] = t.src + part + i * src_row;
        queue.put_part(part, k, end, grad_values, [&](int32_t k, V<T> sum) {
          const ptrdiff_t at = TR == 1 ? offset[k] * scale : offset[k];
          const V<T> v = splat<T>(value[k]);
          V<T> s[2] = {sum, zero<T>()};  // two chains: the out-of-order window overlaps neighbouring nonzeros
          for (int i = 0; i < TR; ++i)
            for (int j = 0; j < TC; ++j) {
              V<T> g = load(src[i] + at + j * LANES);
              in_register<T>(g);
              acc[i][j] += v * g;
              s[j & 1] += own[i][j] * g;
            }
          return s[0] + s[1];
        });
        if (end == k1)
          finish_tile<T, TR, TC>(t, r, part, acc, dst, sums, half);
        else
          copy_tile<T, TR, TC>(acc, between[part / n]);
      }
    }
  }
  queue.flush(grad_values);
}

template <class T, int TR, int TC>
void gather_tile(const GatherTile<T>& t) {
  t.grad_values.at ? gather_tile_both<T, TR, TC>(t) : gather_tile_only<T, TR, TC>(t);
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
