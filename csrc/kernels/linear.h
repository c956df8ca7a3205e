// Sparse linear layer. Included inside an instruction set's namespace; no include guard.
//
// Samples lie in the lanes and TL lane blocks side by side, [features][TL][16]: a linear layer is the stencil of tile.h
// over one row of TL columns, and one nonzero serves up to TL*16 samples.

constexpr int GROUP = 16;  // destination features computed between two transposes back to row-major

SB_INLINE int lane_blocks(int64_t N) {
  const int64_t blocks = div_up(N, LANES);
  return int(div_up(blocks, div_up(blocks, MAX_TILE)));
}

// Features a pass covers, so that the packed source of a pass stays in half of a typical second-level cache.
SB_INLINE int linear_chunks(const Index& ix, int64_t features, int64_t rows, int64_t bytes_per_feature) {
  const double L2 = 640 << 10, FEW = 12;
  int chunks = int(double(features * bytes_per_feature) / L2 + 0.999);
  const int bound = int(double(ix.nnz) / double(most<int64_t>(1, rows)) / FEW);
  return most(1, least(chunks, bound));
}

// out[k] = sum of sums[from[k]], or sums[k], over the copies, for k in [k0, k1).
template <class T>
void sum_copies(const T* sums, int64_t stride, int copies, const int32_t* from, int64_t k0, int64_t k1, T* out) {
  int64_t k = k0;
  for (; k + Vec<T>::n <= k1; k += Vec<T>::n) {
    V<T> sum = zero<T>();
    for (int c = 0; c < copies; ++c)
      sum += from ? gather_lanes(sums + c * stride, from + k) : load(sums + c * stride + k);
    store(out + k, sum);
  }
  for (; k < k1; ++k) {
    out[k] = T(0);
    for (int c = 0; c < copies; ++c) out[k] += sums[c * stride + (from ? from[k] : k)];
  }
}

// One direction: dst[n][d] = bias[d] + sum of value * src[n][s] over the nonzeros (d, s). `ptr` and `index` are CSR
// (forward) or CSC (input gradient).
template <class T>
struct LinearPass {
  int64_t N, dst_features, src_features;
  const int32_t* ptr;
  const int32_t* index;   // source feature of each nonzero
  const int32_t* order;   // place of each nonzero's value, or null: they stand in order
  const int32_t* starts;  // dst_features x chunks + 1; with one chunk, ptr
  const T* value;
  T* sorted;  // not null: where sort_values is to bring the values into order
  const T* bias;
  T* dst;
  Layout dst_layout;
  int TL, chunks;

  // At the beginning of a parallel region. The values are read from all over the array: here many loads are on their
  // way at once, among the products only a few.
  void sort_values() const {
    if (!sorted) return;
    const int64_t nnz = ptr[dst_features], piece = 1024;
#pragma omp for schedule(static)
    for (int64_t k = 0; k < nnz; k += piece) sum_copies(value, 0, 1, order, k, least(nnz, k + piece), sorted);
  }
};

// How the work is shared out: tasks (unit, part). A unit is a tile, or some lane blocks of one; a part is a share of
// the destination features. A thread packs for itself what its tasks read: copies that threads share would have to
// cross between their caches, which takes longer.
struct Share {
  int64_t tiles;
  int subs, width;  // units a tile, lane blocks a unit
  int parts;
  int64_t units() const { return tiles * subs; }
  int64_t tasks() const { return units() * parts; }
};

// Lane blocks go to different threads, if they may, and then as many parts as it takes for all to have about the same.
SB_INLINE Share share_out(int64_t N, int TL, int threads, int64_t features, bool by_lanes) {
  Share s;
  s.tiles = div_up(div_up(N, LANES), TL);
  const int want = by_lanes ? int(most<int64_t>(1, div_up(threads, s.tiles))) : 1;
  s.width = int(div_up(TL, least(want, int(div_up(TL, 2)))));  // under two lane blocks the index dominates
  s.subs = int(div_up(TL, s.width));
  const int most_parts = int(most<int64_t>(1, least<int64_t>(2 * threads, features / GROUP)));
  s.parts = 1;
  while (s.parts < most_parts && 5 * s.tasks() < 4 * div_up(s.tasks(), threads) * threads) ++s.parts;
  return s;
}

// Lane blocks [l0, l1) of a tile, features [f0, f1), from a plain or a lane tensor to packed[feature - f0][l1 -
// l0][16].
template <class T>
void pack_features(const T* data, Layout layout, int64_t N, int64_t F, int TL, int64_t tile, int l0, int l1, int64_t f0,
                   int64_t f1, T* packed) {
  const int width = l1 - l0;
  for (int l = l0; l < l1; ++l) {
    const int64_t b = tile * TL + l;
    const int images = int(most<int64_t>(0, least<int64_t>(LANES, N - b * LANES)));
    T* dst = packed + (l - l0) * LANES;
    if (layout == Layout::plain || images == 0) {
      pack_rows(images ? data + b * LANES * F + f0 : data, F, images, f1 - f0, dst, ptrdiff_t(width) * LANES);
    } else {
      for (int64_t f = f0; f < f1; ++f)
        copy_lanes(data + (b * F + f) * LANES, LANES, images, 1, dst + (f - f0) * width * LANES);
    }
  }
}

// Destination features computed between two transposes back to row-major. They end in some neighbouring cache lines of
// each image; with several chunks there are more, so that a chunk is read from cache.
SB_INLINE int64_t run_length(int chunks) { return (chunks > 1 ? 16 : 4) * GROUP; }

// What the input gradient yields besides: gradients of values, from x.
template <class T>
struct Correlation {
  const T* x;
  Layout x_layout;
  GradValues<T> grad_values;  // in CSC order
};

// Destination features [d0, d1) of lane blocks [l0, l1) of a tile; `group` holds a run of them, with `both` two.
template <class T>
void linear_rows(const LinearPass<T>& p, const T* packed, int64_t tile, int l0, int l1, int64_t d0, int64_t d1,
                 T* group, const Correlation<T>* both = nullptr) {
  const int width = l1 - l0;
  const GatherFn<T> fn = gather_fn<T>(1, width);
  const int64_t run = run_length(p.chunks);
  T* own = group + run * width * LANES;
  GatherTile<T> t;
  t.src = packed;
  t.src_row = 0;
  t.offset = p.index;
  t.scale = ptrdiff_t(width) * LANES;
  t.value = p.sorted ? p.sorted : p.value;
  t.ptr_step = p.chunks;
  // With one chunk a row's nonzeros follow the last one's: to ask pays only where they are likely to come from memory.
  t.ask = p.ptr[p.dst_features] >= (p.chunks > 1 ? MANY : 2 * MANY);
  t.dst_row = 0;
  t.dst_col = LANES;
  t.dst_channel = int64_t(width) * LANES;
  if (both) {
    t.grad_values = both->grad_values;
    t.own = OwnTile<T>{own, t.dst_channel, 0, LANES, nullptr, nullptr, false, LANES, 0, 0};
  }
  for (int64_t d = d0; d < d1; d += run) {
    t.r0 = d;
    t.r1 = least(d1, d + run);
    t.dst = t.sums = group;
    t.bias = p.bias ? p.bias + d : nullptr;
    if (both) pack_features(both->x, both->x_layout, p.N, p.dst_features, p.TL, tile, l0, l1, t.r0, t.r1, own);
    for (int h = 0; h < p.chunks; ++h) {
      t.begin = p.starts + h;
      t.end = t.begin + 1;
      t.first = h == 0;
      t.last = h + 1 == p.chunks;
      fn(t);
    }
    for (int l = l0; l < l1; ++l) {
      const int64_t b = tile * p.TL + l;
      const int images = int(least<int64_t>(LANES, p.N - b * LANES));
      if (images <= 0) break;
      const T* src = group + (l - l0) * LANES;
      const ptrdiff_t step = ptrdiff_t(width) * LANES;
      if (p.dst_layout == Layout::lanes) {
        for (int64_t r = t.r0; r < t.r1; ++r)
          copy_lanes(src + (r - d) * step, LANES, LANES, 1, p.dst + (b * p.dst_features + r) * LANES);
      } else {
        // [features][16] -> [16][features]: the roles of position and image are swapped.
        unpack_rows(src, step, t.r1 - t.r0, p.dst + b * LANES * p.dst_features + d, p.dst_features, images);
      }
    }
  }
}

SB_INLINE int linear_parts(int threads, int64_t features) {
  if (threads == 1) return 1;
  return int(most<int64_t>(1, least<int64_t>(4 * int64_t(threads), features / GROUP)));
}

// First feature of part p: about equal nonzeros, on a multiple of GROUP.
SB_INLINE int64_t linear_part(const int32_t* ptr, int64_t features, int parts, int p) {
  const int64_t at = part_start(ptr, 1, features, parts, p);
  return p >= parts ? features : at / GROUP * GROUP;
}

// The arguments of one direction; in chunks only where `kept` tells their starts.
template <class T>
LinearPass<T> linear_pass(const LinearArgs<T>& a, bool forward, ChunkStarts* kept) {
  LinearPass<T> p;
  const Index& ix = a.index;
  p.N = a.N;
  p.dst_features = forward ? ix.rows : ix.cols;
  p.src_features = forward ? ix.cols : ix.rows;
  p.ptr = forward ? ix.rowptr : ix.colptr;
  p.TL = lane_blocks(a.N);
  p.chunks = !kept ? 1 : linear_chunks(ix, p.src_features, p.dst_features, int64_t(p.TL) * LANES * sizeof(T));
  p.index = forward ? ix.col : ix.row;
  p.order = forward ? nullptr : ix.csc_to_csr;
  p.starts = p.chunks == 1 ? p.ptr : kept->of(p.dst_features, p.src_features, p.ptr, p.index, p.chunks, a.threads);
  p.value = a.values;
  p.sorted = p.order && kept ? scratch<T>(slot_plan, ix.nnz) : nullptr;
  p.bias = forward ? a.bias : nullptr;
  p.dst = forward ? a.y : a.grad_x;
  p.dst_layout = forward ? a.y_layout : a.x_layout;
  return p;
}

// A few samples would leave most lanes empty: there a sum runs over the nonzeros of a row instead. With more than
// these that is slower.
constexpr int NARROW = 2, NARROW_FORWARD = CAN_GATHER ? 3 : NARROW;

template <class T>
SB_INLINE bool is_narrow(const LinearArgs<T>& a, int most_samples) {
  return a.N <= most_samples && a.x_layout == Layout::plain && a.y_layout == Layout::plain;
}

// dst[n][d] = bias[d] + sum over the nonzeros (d, s) of value * src[n][s] for n < B; see LinearPass.
template <class T, int B, bool ORDERED>
void narrow_rows(const LinearPass<T>& p, const T* src, int64_t d0, int64_t d1) {
  constexpr int CHAINS = 4;  // sums that do not wait for each other
  const auto add = [&](T* sum, int32_t k) {
    const T v = p.value[ORDERED ? p.order[k] : k];
    const T* x = src + p.index[k];
    for (int n = 0; n < B; ++n) sum[n] += v * x[n * p.src_features];
  };
  for (int64_t d = d0; d < d1; ++d) {
    T sums[CHAINS][B] = {};
    int32_t k = p.ptr[d];
    const int32_t end = p.ptr[d + 1];
    if (CAN_GATHER && k + Vec<T>::n <= end) {
      V<T> wide[B] = {};
      for (; k + Vec<T>::n <= end; k += Vec<T>::n) {
        __builtin_prefetch(p.index + k + 256);  // further ahead than the hardware does
        if (!ORDERED) __builtin_prefetch(p.value + k + 256);
        const V<T> v = ORDERED ? gather_lanes(p.value, p.order + k) : load(p.value + k);
        for (int n = 0; n < B; ++n) wide[n] += v * gather_lanes(src + n * p.src_features, p.index + k);
      }
      for (int n = 0; n < B; ++n) sums[0][n] = sum_lanes<T>(wide[n]);
    }
    for (; k + CHAINS <= end; k += CHAINS)
      for (int u = 0; u < CHAINS; ++u) add(sums[u], k + u);
    for (; k < end; ++k) add(sums[0], k);
    for (int n = 0; n < B; ++n)
      p.dst[n * p.dst_features + d] =
          (sums[0][n] + sums[1][n]) + (sums[2][n] + sums[3][n]) + (p.bias ? p.bias[d] : T(0));
  }
}

template <class T, bool ORDERED>
void narrow_rows_any(const LinearPass<T>& p, const T* src, int64_t d0, int64_t d1) {
  constexpr void (*rows[])(const LinearPass<T>&, const T*, int64_t, int64_t) = {
      narrow_rows<T, 1, ORDERED>, narrow_rows<T, 2, ORDERED>, narrow_rows<T, 3, ORDERED>};
  rows[p.N - 1](p, src, d0, d1);
}

template <class T>
void narrow_forward(const LinearArgs<T>& a) {
  const LinearPass<T> p = linear_pass(a, true, nullptr);
  const int parts = linear_parts(a.threads, a.index.rows);
#pragma omp parallel for num_threads(a.threads) if (a.threads > 1) schedule(static)
  for (int part = 0; part < parts; ++part)
    narrow_rows_any<T, false>(p, a.x, linear_part(p.ptr, p.dst_features, parts, part),
                              linear_part(p.ptr, p.dst_features, parts, part + 1));
}

template <class T>
void narrow_backward(const LinearArgs<T>& a) {
  const Index& ix = a.index;
  const LinearPass<T> back = linear_pass(a, false, nullptr);
  const int parts = linear_parts(a.threads, ix.rows), back_parts = linear_parts(a.threads, ix.cols);
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
    if (a.grad_x) {
#pragma omp for schedule(static) nowait
      for (int part = 0; part < back_parts; ++part)
        narrow_rows_any<T, true>(back, a.grad_y, linear_part(back.ptr, back.dst_features, back_parts, part),
                                 linear_part(back.ptr, back.dst_features, back_parts, part + 1));
    }
    const int wanted = a.grad_values || a.grad_bias ? parts : 0;
#pragma omp for schedule(static)
    for (int part = 0; part < wanted; ++part) {
      const int64_t r1 = linear_part(ix.rowptr, ix.rows, parts, part + 1);
      for (int64_t r = linear_part(ix.rowptr, ix.rows, parts, part); r < r1; ++r) {
        T sum = 0;
        for (int64_t n = 0; n < a.N; ++n) sum += a.grad_y[n * ix.rows + r];
        if (a.grad_bias) a.grad_bias[r] = sum;
        if (!a.grad_values) continue;
        for (int32_t k = ix.rowptr[r]; k < ix.rowptr[r + 1]; ++k) {
          T g = 0;
          for (int64_t n = 0; n < a.N; ++n) g += a.grad_y[n * ix.rows + r] * a.x[n * ix.cols + ix.col[k]];
          a.grad_values[k] = g;
        }
      }
    }
  }
}

// One direction by itself; lane blocks are shared out, so that what a thread packs stays in its cache.
template <class T>
void linear_direction(const LinearPass<T>& p, const T* src, Layout src_layout, int threads) {
  const Share s = share_out(p.N, p.TL, threads, p.dst_features, true);
  const int64_t tasks = s.tasks();
  const TeamScratch<T> sources(slot_source, threads, p.src_features * int64_t(s.width) * LANES);
  const TeamScratch<T> groups(slot_dest, threads, run_length(p.chunks) * s.width * LANES);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    T* packed = sources.mine();
    int64_t have = -1;
    p.sort_values();
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < tasks; ++i) {
      const int64_t u = i / s.parts, tile = u / s.subs;
      const int q = int(i % s.parts), l0 = int(u % s.subs) * s.width, l1 = least(p.TL, l0 + s.width);
      if (have != u) pack_features(src, src_layout, p.N, p.src_features, p.TL, tile, l0, l1, 0, p.src_features, packed);
      have = u;
      linear_rows(p, packed, tile, l0, l1, linear_part(p.ptr, p.dst_features, s.parts, q),
                  linear_part(p.ptr, p.dst_features, s.parts, q + 1), groups.mine());
    }
  }
}

template <class T>
void linear_forward(const LinearArgs<T>& a) {
  if (a.N == 0) return;
  if (is_narrow(a, NARROW_FORWARD)) return narrow_forward(a);
  linear_direction(linear_pass(a, true, a.index.row_chunks), a.x, a.x_layout, a.threads);
}

// grad_bias = sum_n grad_y[n].
template <class T>
void bias_grad(const LinearArgs<T>& a) {
  const int64_t rows = a.index.rows;
  constexpr int64_t piece = 64, block = 64;  // sums of sums round less
  const bool plain = a.y_layout == Layout::plain;
#pragma omp parallel for num_threads(a.threads) if (a.threads > 1 && rows > piece) schedule(static)
  for (int64_t r0 = 0; r0 < rows; r0 += piece) {
    const int64_t n = least(piece, rows - r0);
    T total[piece] = {};
    for (int64_t i0 = 0; i0 < a.N; i0 += block) {
      T sums[piece] = {};
      for (int64_t i = i0; i < least(a.N, i0 + block); ++i) {
        const T* g = a.grad_y + (plain ? i * rows + r0 : (i / LANES * rows + r0) * LANES + i % LANES);
        if (plain) {
          for (int64_t r = 0; r < n; ++r) sums[r] += g[r];
        } else {
          for (int64_t r = 0; r < n; ++r) sums[r] += g[r * LANES];
        }
      }
      for (int64_t r = 0; r < n; ++r) total[r] += sums[r];
    }
    for (int64_t r = 0; r < n; ++r) a.grad_bias[r0 + r] = total[r];
  }
}

// Where the tasks of a backward pass put gradients of values: sums over the samples of several units are made apart,
// unit by unit or thread by thread, whichever are fewer.
template <class T>
struct ValueSums {
  int copies;
  bool by_unit;
  T* sums;         // [copies][nnz]; null: the gradients themselves
  bool from_zero;  // a copy begins as zeros, and all tasks add to it
  bool few;        // they fit in half of a second-level cache

  ValueSums(const Share& s, const LinearArgs<T>& a, bool apart)
      : copies(int(least<int64_t>(s.units(), a.threads))),
        by_unit(s.units() <= a.threads),
        sums(apart || copies > 1 ? scratch<T>(slot_sums, a.index.nnz * copies) : nullptr),
        from_zero(copies > 1 && !by_unit),
        few(a.index.nnz * copies * int64_t(sizeof(T)) <= (int64_t(512) << 10)) {}

  // Threads have columns of their own here, and rows of their own in the end: nearly every line of sums goes from one
  // to the others. Where these have caches of their own, too, writing to lines that they still hold takes as long as
  // the products; what goes past the caches does not wait for them.
  GradValues<T> of(int64_t unit, const LinearArgs<T>& a) const {
    T* at = sums ? sums + a.index.nnz * (by_unit ? unit : team_member()) : a.grad_values;
    const bool add = from_zero || (!by_unit && unit > 0);
    return {at, add, sums && !add && few && a.threads > 1};
  }

  // In a parallel region, before and after the tasks. from: where the gradient of a value stands in a copy, or null.
  void begin(const LinearArgs<T>& a) const {
    if (!from_zero) return;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < a.index.nnz * copies; ++i) sums[i] = T(0);
  }
  void end(const LinearArgs<T>& a, const int32_t* from) const {
    if (!sums) return;
    const int64_t nnz = a.index.nnz, piece = 1024;
    stream_fence();
#pragma omp barrier
    for (int64_t k = 0; few && from && k < nnz * copies; k += LINE / int64_t(sizeof(T))) __builtin_prefetch(sums + k);
#pragma omp for schedule(static) nowait
    for (int64_t k = 0; k < nnz; k += piece)
      sum_copies(sums, nnz, copies, from, k, least(nnz, k + piece), a.grad_values);
  }
};

// grad_x = grad_y W over the active weights, by columns of W; grad_values[k] = sum_n grad_y[n][row] x[n][col], made
// where a column's nonzeros pass by for grad_x, and sorted at the end: written in CSR order at once, they would go all
// over the array, and threads, which have columns of their own, would write to each other's cache lines.
template <class T>
void backward_both(const LinearArgs<T>& a) {
  const Index& ix = a.index;
  const LinearPass<T> back = linear_pass(a, false, ix.col_chunks);
  const int TL = back.TL;
  const Share s = share_out(a.N, TL, a.threads, least(ix.rows, ix.cols), false);
  const ValueSums<T> values(s, a, true);
  const int64_t tasks = s.tasks(), length = int64_t(TL) * LANES;
  const TeamScratch<T> grads(slot_grad, a.threads, ix.rows * length);
  const TeamScratch<T> groups(slot_dest, a.threads, 2 * run_length(back.chunks) * length);
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
    T* packed = grads.mine();
    int64_t have = -1;
    values.begin(a);
    back.sort_values();
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < tasks; ++i) {
      const int64_t u = i / s.parts;
      const int q = int(i % s.parts);
      if (have != u) pack_features(a.grad_y, a.y_layout, a.N, ix.rows, TL, u, 0, TL, 0, ix.rows, packed);
      have = u;
      const Correlation<T> both{a.x, a.x_layout, values.of(u, a)};
      linear_rows(back, packed, u, 0, TL, linear_part(ix.colptr, ix.cols, s.parts, q),
                  linear_part(ix.colptr, ix.cols, s.parts, q + 1), groups.mine(), &both);
    }
    values.end(a, ix.csr_to_csc);
  }
}

// grad_values alone.
template <class T>
void backward_values(const LinearArgs<T>& a) {
  const Index& ix = a.index;
  const LinearPass<T> p = linear_pass(a, true, ix.row_chunks);
  const Share s = share_out(a.N, p.TL, a.threads, least(ix.rows, ix.cols), false);
  const ValueSums<T> values(s, a, false);
  const int64_t tasks = s.tasks(), length = int64_t(p.TL) * LANES;
  const TeamScratch<T> sources(slot_source, a.threads, ix.cols * length);
  const TeamScratch<T> grads(slot_grad, a.threads, ix.rows * length);
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
    int64_t have = -1;
    values.begin(a);
    CorrelateTile<T> t;
    t.src = sources.mine();
    t.src_row = 0;
    t.offset = p.index;
    t.scale = ptrdiff_t(length);
    t.ptr_step = p.chunks;
    t.grad = grads.mine();
    t.grad_channel = length;
    t.grad_row = 0;
    t.rows = 1, t.cols = p.TL;
    const CorrelateFn<T> fn = correlate_fn<T>(1, p.TL);
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < tasks; ++i) {
      const int64_t u = i / s.parts;
      const int q = int(i % s.parts);
      t.r0 = linear_part(ix.rowptr, ix.rows, s.parts, q);
      t.r1 = linear_part(ix.rowptr, ix.rows, s.parts, q + 1);
      if (have != u) pack_features(a.x, a.x_layout, a.N, ix.cols, p.TL, u, 0, p.TL, 0, ix.cols, sources.mine());
      have = u;
      pack_features(a.grad_y, a.y_layout, a.N, ix.rows, p.TL, u, 0, p.TL, t.r0, t.r1, grads.mine());
      const GradValues<T> own = values.of(u, a);
      for (int32_t k = ix.rowptr[t.r0]; !own.add && k < ix.rowptr[t.r1]; ++k) own.at[k] = T(0);
      t.grad_values = {own.at, true};
      for (int h = 0; h < p.chunks; ++h) {
        t.begin = p.starts + h;
        t.end = t.begin + 1;
        fn(t);
      }
    }
    values.end(a, nullptr);
  }
}

template <class T>
void linear_backward(const LinearArgs<T>& a) {
  const Index& ix = a.index;
  if (a.N == 0) {
    if (a.grad_values)
      for (int64_t k = 0; k < ix.nnz; ++k) a.grad_values[k] = T(0);
    if (a.grad_bias)
      for (int64_t r = 0; r < ix.rows; ++r) a.grad_bias[r] = T(0);
    return;
  }
  if (is_narrow(a, NARROW)) return narrow_backward(a);
  if (a.grad_x && a.grad_values)
    backward_both(a);
  else if (a.grad_x)
    linear_direction(linear_pass(a, false, ix.col_chunks), a.grad_y, a.y_layout, a.threads);
  else if (a.grad_values)
    backward_values(a);
  if (a.grad_bias) bias_grad(a);
}
