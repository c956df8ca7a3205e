// Sparse linear layer. Included inside an instruction set's namespace; no include guard.
//
// Samples lie in the lanes and TL lane blocks side by side, [features][TL][16]: a linear layer is the stencil of tile.h
// over one row of TL columns, and one nonzero serves up to TL*16 samples.

constexpr int GROUP = 16;  // destination features computed between two transposes back to row-major

SB_INLINE int lane_blocks(int64_t N) {
  const int64_t blocks = div_up(N, LANES);
  const int most_tl = MAX_TILE < 8 ? MAX_TILE : 8;
  return int(div_up(blocks, div_up(blocks, most_tl)));
}

// Features a pass covers, so that the packed source of a pass stays in half of a typical second-level cache.
SB_INLINE int linear_chunks(const Index& ix, int64_t features, int64_t rows, int64_t bytes_per_feature) {
  const double L2 = 640 << 10, FEW = 12;
  int chunks = int(double(features * bytes_per_feature) / L2 + 0.999);
  const int bound = int(double(ix.nnz) / double(most<int64_t>(1, rows)) / FEW);
  return most(1, least(chunks, bound));
}

// One direction: dst[n][d] = bias[d] + sum of value * src[n][s] over the nonzeros (d, s). `ptr` and `index` are CSR
// (forward) or CSC (input gradient). Called by every thread of a team, after the source is packed.
template <class T>
struct LinearPass {
  int64_t N, dst_features, src_features;
  const int32_t* ptr;
  const int32_t* index;  // source feature of each nonzero
  const int32_t* order;  // place of each nonzero's value, or null: they stand in order
  int32_t* split;        // with several chunks: dst_features x chunks + 1 starts
  const T* value;
  const T* bias;
  const T* packed;
  T* dst;
  Layout dst_layout;
  int TL, chunks;
};

// How a pass is shared out: tiles x subs units of lane blocks, each the same thread's to pack and to compute, so that
// nothing crosses between cores; with more threads than units, each unit's features in `parts` as well.
struct Share {
  int64_t tiles;
  int subs, width;  // lane blocks per sub
  int parts;
  int64_t units() const { return tiles * subs; }
};

SB_INLINE Share share_out(int64_t N, int TL, int threads, int64_t features) {
  Share s;
  s.tiles = div_up(div_up(N, LANES), TL);
  const int want = int(most<int64_t>(1, div_up(threads, s.tiles)));
  s.width = int(div_up(TL, least(want, int(div_up(TL, 2)))));  // under two lane blocks the index dominates
  s.subs = int(div_up(TL, s.width));
  s.parts = s.units() >= threads
                ? 1
                : int(most<int64_t>(1, least<int64_t>(div_up(2 * threads, s.units()), features / GROUP)));
  return s;
}

// Lane blocks [l0, l1) of a packed tile, features [f0, f1), from a plain or a lane tensor.
template <class T>
void pack_features(const T* data, Layout layout, int64_t N, int64_t F, int TL, int64_t tile, int l0, int l1, int64_t f0,
                   int64_t f1, T* packed) {
  for (int l = l0; l < l1; ++l) {
    const int64_t b = tile * TL + l;
    const int images = int(most<int64_t>(0, least<int64_t>(LANES, N - b * LANES)));
    T* dst = packed + (f0 * TL + l) * LANES;
    if (layout == Layout::plain || images == 0) {
      pack_rows(images ? data + b * LANES * F + f0 : data, F, images, f1 - f0, dst, ptrdiff_t(TL) * LANES);
    } else {
      for (int64_t f = f0; f < f1; ++f)
        copy_lanes(data + (b * F + f) * LANES, LANES, images, 1, packed + (f * TL + l) * LANES);
    }
  }
}

template <class T>
void linear_rows(const LinearPass<T>& p, int64_t tile, int l0, int l1, int64_t d0, int64_t d1, T* group) {
  const int width = l1 - l0;
  const GatherFn<T> fn = gather_fn<T>(1, width);
  GatherTile<T> t;
  t.src = p.packed + (tile * p.src_features * p.TL + l0) * LANES;
  t.src_row = 0;
  t.offset = p.index;
  t.scale = ptrdiff_t(p.TL) * LANES;
  t.value = p.value;
  t.order = p.order;
  t.ptr_step = p.chunks;
  t.dst_row = 0;
  t.dst_col = LANES;
  t.dst_channel = int64_t(width) * LANES;
  // A run of features ends in some neighbouring cache lines of each image; with several chunks it is longer, so that a
  // chunk is read from cache.
  const int64_t run = (p.chunks > 1 ? 16 : 4) * GROUP;
  for (int64_t d = d0; d < d1; d += run) {
    t.r0 = d;
    t.r1 = least(d1, d + run);
    t.dst = t.sums = group;
    t.bias = p.bias ? p.bias + d : nullptr;
    for (int h = 0; h < p.chunks; ++h) {
      t.begin = (p.chunks > 1 ? p.split : p.ptr) + h;
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

// Starts of every (destination, chunk) of destinations d0..d1.
template <class T>
void split_rows(const LinearPass<T>& p, int64_t d0, int64_t d1) {
  const int64_t per_chunk = div_up(p.src_features, p.chunks);
  for (int64_t d = d0; d < d1; ++d) {
    int32_t k = p.ptr[d];
    const int32_t end = p.ptr[d + 1];
    for (int h = 0; h < p.chunks; ++h) {
      p.split[d * p.chunks + h] = k;
      while (k < end && p.index[k] < (h + 1) * per_chunk) ++k;
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

template <class T>
LinearPass<T> linear_pass(const LinearArgs<T>& a, bool forward) {
  LinearPass<T> p;
  const Index& ix = a.index;
  p.N = a.N;
  p.dst_features = forward ? ix.rows : ix.cols;
  p.src_features = forward ? ix.cols : ix.rows;
  p.ptr = forward ? ix.rowptr : ix.colptr;
  p.TL = lane_blocks(a.N);
  p.chunks = linear_chunks(ix, p.src_features, p.dst_features, int64_t(p.TL) * LANES * sizeof(T));
  p.index = forward ? ix.col : ix.row;
  p.order = forward ? nullptr : ix.csc_to_csr;
  p.split = nullptr;
  if (p.chunks > 1) {
    p.split = scratch<int32_t>(slot_plan, p.dst_features * p.chunks + 1);
    p.split[p.dst_features * p.chunks] = int32_t(ix.nnz);
  }
  p.value = a.values;
  p.bias = forward ? a.bias : nullptr;
  p.dst = forward ? a.y : a.grad_x;
  p.dst_layout = forward ? a.y_layout : a.x_layout;
  return p;
}

// Packs a share of the source: unit u of Share, piece q of its features.
template <class T>
void pack_unit(const T* data, Layout layout, int64_t N, int64_t F, int TL, const Share& s, int64_t u, int q,
               T* packed) {
  const int64_t tile = u / s.subs;
  const int l0 = int(u % s.subs) * s.width, l1 = least(TL, l0 + s.width);
  const int64_t step = div_up(div_up(F, s.parts), GROUP) * GROUP;
  const int64_t f0 = least(F, q * step), f1 = least(F, f0 + step);
  pack_features(data, layout, N, F, TL, tile, l0, l1, f0, f1, packed + tile * F * TL * LANES);
}

template <class T>
void compute_unit(const LinearPass<T>& p, const Share& s, int64_t u, int q, T* group) {
  const int l0 = int(u % s.subs) * s.width, l1 = least(p.TL, l0 + s.width);
  linear_rows(p, u / s.subs, l0, l1, linear_part(p.ptr, p.dst_features, s.parts, q),
              linear_part(p.ptr, p.dst_features, s.parts, q + 1), group);
}

// One or two samples would leave most lanes empty: there a sum runs over the nonzeros of a row instead. From three on
// that is slower.
constexpr int NARROW = 2;

template <class T>
SB_INLINE bool is_narrow(const LinearArgs<T>& a) {
  return a.N <= NARROW && a.x_layout == Layout::plain && a.y_layout == Layout::plain;
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
  p.N == 1 ? narrow_rows<T, 1, ORDERED>(p, src, d0, d1) : narrow_rows<T, 2, ORDERED>(p, src, d0, d1);
}

template <class T>
void narrow_forward(const LinearArgs<T>& a) {
  const LinearPass<T> p = linear_pass(a, true);
  const int parts = linear_parts(a.threads, a.index.rows);
#pragma omp parallel for num_threads(a.threads) if (a.threads > 1) schedule(static)
  for (int part = 0; part < parts; ++part)
    narrow_rows_any<T, false>(p, a.x, linear_part(p.ptr, p.dst_features, parts, part),
                              linear_part(p.ptr, p.dst_features, parts, part + 1));
}

template <class T>
void narrow_backward(const LinearArgs<T>& a) {
  const Index& ix = a.index;
  const LinearPass<T> back = linear_pass(a, false);
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

template <class T>
void linear_forward(const LinearArgs<T>& a) {
  if (a.N == 0) return;
  if (is_narrow(a)) return narrow_forward(a);
  LinearPass<T> p = linear_pass(a, true);
  const Index& ix = a.index;
  const Share s = share_out(a.N, p.TL, a.threads, ix.rows);
  T* packed = scratch<T>(slot_source, s.tiles * p.TL * LANES * ix.cols);
  p.packed = packed;
  const int64_t plans = p.split ? div_up(ix.rows, 64) : 0, tasks = s.units() * s.parts;
  const TeamScratch<T> groups(slot_dest, a.threads, 16 * GROUP * int64_t(p.TL) * LANES);
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
    T* group = groups.mine();
    // Both loops hand the same tasks to the same threads: with one part per unit no thread needs another's packing.
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < tasks; ++i)
      pack_unit(a.x, a.x_layout, a.N, ix.cols, p.TL, s, i / s.parts, int(i % s.parts), packed);
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < plans; ++i) split_rows(p, i * 64, least<int64_t>(ix.rows, i * 64 + 64));
    if (s.parts > 1 || plans) {
#pragma omp barrier
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < tasks; ++i) compute_unit(p, s, i / s.parts, int(i % s.parts), group);
  }
}

// grad_x = grad_y W over the active weights, by columns of W; grad_values[k] = sum_n grad_y[n][row] x[n][col];
// grad_bias = sum_n grad_y[n].
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
  if (is_narrow(a)) return narrow_backward(a);
  LinearPass<T> back = linear_pass(a, false);
  const int TL = back.TL;
  const Share s = share_out(a.N, TL, a.threads, ix.cols);
  T* packed_grad = scratch<T>(slot_grad, s.tiles * TL * LANES * ix.rows);
  T* packed_x = a.grad_values ? scratch<T>(slot_source, s.tiles * TL * LANES * ix.cols) : nullptr;
  back.packed = packed_grad;
  const int parts = linear_parts(a.threads, ix.rows);
  const int64_t plans = a.grad_x && back.split ? div_up(ix.cols, 64) : 0, tasks = s.units() * s.parts;
  const CorrelateFn<T> fn = correlate_fn<T>(1, TL);
  const TeamScratch<T> groups(slot_dest, a.threads, a.grad_x ? 16 * GROUP * int64_t(TL) * LANES : 0);
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < tasks; ++i) {
      pack_unit(a.grad_y, a.y_layout, a.N, ix.rows, TL, s, i / s.parts, int(i % s.parts), packed_grad);
      if (a.grad_values) pack_unit(a.x, a.x_layout, a.N, ix.cols, TL, s, i / s.parts, int(i % s.parts), packed_x);
    }
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < plans; ++i) split_rows(back, i * 64, least<int64_t>(ix.cols, i * 64 + 64));
    if (s.parts > 1 || plans) {
#pragma omp barrier
    }
    if (a.grad_x) {
      T* group = groups.mine();
#pragma omp for schedule(static) nowait
      for (int64_t i = 0; i < tasks; ++i) compute_unit(back, s, i / s.parts, int(i % s.parts), group);
    }
    if (a.grad_values || a.grad_bias) {
      // A thread owns its rows: no copies of the sums. What it reads, others may have packed.
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
      for (int part = 0; part < parts; ++part) {
        const int64_t r0 = linear_part(ix.rowptr, ix.rows, parts, part);
        const int64_t r1 = linear_part(ix.rowptr, ix.rows, parts, part + 1);
        if (r0 == r1) continue;
        if (a.grad_bias) {
          for (int64_t r = r0; r < r1; ++r) {
            V<T> sum[Vec<T>::n];
            for (int i = 0; i < Vec<T>::n; ++i) sum[i] = zero<T>();
            for (int64_t tile = 0; tile < s.tiles; ++tile)
              for (int i = 0; i < TL * LANES; i += Vec<T>::n)
                sum[0] += load(packed_grad + (tile * ix.rows + r) * TL * LANES + i);
            a.grad_bias[r] = sum_each<T>(sum)[0];
          }
        }
        if (!a.grad_values) continue;
        for (int32_t k = ix.rowptr[r0]; k < ix.rowptr[r1]; ++k) a.grad_values[k] = T(0);
        CorrelateTile<T> t;
        t.src_row = 0;
        t.ptr_step = 1;
        t.begin = ix.rowptr;
        t.end = ix.rowptr + 1;
        t.r0 = r0, t.r1 = r1;
        t.grad_channel = int64_t(TL) * LANES;
        t.grad_row = 0;
        t.rows = 1, t.cols = TL;
        t.grad_values = a.grad_values;
        t.offset = ix.col;
        t.scale = ptrdiff_t(TL) * LANES;
        for (int64_t tile = 0; tile < s.tiles; ++tile) {
          t.src = packed_x + tile * ix.cols * TL * LANES;
          t.grad = packed_grad + (tile * ix.rows + r0) * TL * LANES;
          fn(t);
        }
      }
    }
  }
}
