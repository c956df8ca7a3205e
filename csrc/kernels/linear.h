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
  int32_t* split;         // dst_features x chunks + 1 starts
  const int32_t* offset;
  const T* value;
  const T* bias;
  const T* packed;
  T* dst;
  Layout dst_layout;
  int TL, chunks;
};

// The packed tile of lane block b0.. of a plain or lane tensor; a share of the features per call.
template <class T>
void pack_features(const T* data, Layout layout, int64_t N, int64_t F, int TL, int64_t tile, int64_t f0, int64_t f1,
                   T* packed) {
  for (int l = 0; l < TL; ++l) {
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
void linear_rows(const LinearPass<T>& p, int64_t tile, int64_t d0, int64_t d1, T* group) {
  const GatherFn<T> fn = gather_fn<T>(1, p.TL);
  GatherTile<T> t;
  t.src = p.packed + tile * p.src_features * p.TL * LANES;
  t.src_row = 0;
  t.offset = p.offset;
  t.value = p.value;
  t.ptr_step = p.chunks;
  t.dst_row = 0;
  t.dst_col = LANES;
  t.dst_channel = int64_t(p.TL) * LANES;
  // Groups of GROUP features per transpose; with several chunks a longer run, so that a chunk is read from cache.
  const int64_t run = p.chunks > 1 ? 16 * GROUP : GROUP;
  for (int64_t d = d0; d < d1; d += run) {
    t.r0 = d;
    t.r1 = least(d1, d + run);
    t.dst = group;
    t.bias = p.bias ? p.bias + d : nullptr;
    for (int h = 0; h < p.chunks; ++h) {
      t.begin = p.split + h;
      t.end = t.begin + 1;
      t.accumulate = h > 0;
      fn(t);
    }
    for (int l = 0; l < p.TL; ++l) {
      const int64_t b = tile * p.TL + l;
      const int images = int(least<int64_t>(LANES, p.N - b * LANES));
      if (images <= 0) break;
      const T* src = group + l * LANES;
      const ptrdiff_t step = ptrdiff_t(p.TL) * LANES;
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

// Starts of every (destination, chunk) and the offsets of the nonzeros in the packed source.
template <class T>
void plan_pass(LinearPass<T>& p, const int32_t* index, int32_t* offset, int64_t d0, int64_t d1) {
  const int64_t per_chunk = div_up(p.src_features, p.chunks);
  for (int64_t d = d0; d < d1; ++d) {
    int32_t k = p.ptr[d];
    const int32_t end = p.ptr[d + 1];
    for (int h = 0; h < p.chunks; ++h) {
      p.split[d * p.chunks + h] = k;
      const int64_t bound = h + 1 == p.chunks ? p.src_features : (h + 1) * per_chunk;
      for (; k < end && index[k] < bound; ++k) offset[k] = index[k] * (p.TL * LANES);
    }
  }
}

SB_INLINE int linear_parts(int threads, int64_t tiles, int64_t features) {
  if (threads == 1) return 1;
  return int(most<int64_t>(1, least<int64_t>(div_up(4 * int64_t(threads), tiles), features / GROUP)));
}

// First feature of part p: about equal nonzeros, on a multiple of GROUP.
SB_INLINE int64_t linear_part(const int32_t* ptr, int64_t features, int parts, int p) {
  const int64_t at = part_start(ptr, 1, features, parts, p);
  return p >= parts ? features : at / GROUP * GROUP;
}

template <class T>
LinearPass<T> linear_pass(const LinearArgs<T>& a, bool forward, Slot slot) {
  LinearPass<T> p;
  const Index& ix = a.index;
  p.N = a.N;
  p.dst_features = forward ? ix.rows : ix.cols;
  p.src_features = forward ? ix.cols : ix.rows;
  p.ptr = forward ? ix.rowptr : ix.colptr;
  p.TL = lane_blocks(a.N);
  p.chunks = linear_chunks(ix, p.src_features, p.dst_features, int64_t(p.TL) * LANES * sizeof(T));
  int32_t* mem = scratch<int32_t>(slot, ix.nnz + p.dst_features * p.chunks + 1);
  p.offset = mem;
  p.split = mem + ix.nnz;
  p.split[p.dst_features * p.chunks] = int32_t(ix.nnz);
  p.value = a.values;
  p.bias = forward ? a.bias : nullptr;
  p.dst = forward ? a.y : a.grad_x;
  p.dst_layout = forward ? a.y_layout : a.x_layout;
  return p;
}

template <class T>
void linear_forward(const LinearArgs<T>& a) {
  if (a.N == 0) return;
  LinearPass<T> p = linear_pass(a, true, slot_plan);
  const Index& ix = a.index;
  const int64_t tiles = div_up(div_up(a.N, LANES), p.TL);
  T* packed = scratch<T>(slot_source, tiles * p.TL * LANES * ix.cols);
  p.packed = packed;
  const int parts = linear_parts(a.threads, tiles, ix.rows);
  const int64_t pieces = div_up(ix.cols, 64), plans = div_up(ix.rows, 64);
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < tiles * pieces; ++i)
      pack_features(a.x, a.x_layout, a.N, ix.cols, p.TL, i / pieces, i % pieces * 64,
                    least<int64_t>(ix.cols, i % pieces * 64 + 64), packed + i / pieces * ix.cols * p.TL * LANES);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < plans; ++i)
      plan_pass(p, ix.col, const_cast<int32_t*>(p.offset), i * 64, least<int64_t>(ix.rows, i * 64 + 64));
    T* group = scratch<T>(slot_dest, 16 * GROUP * int64_t(p.TL) * LANES);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < tiles * parts; ++i) {
      const int part = int(i % parts);
      linear_rows(p, i / parts, linear_part(ix.rowptr, ix.rows, parts, part),
                  linear_part(ix.rowptr, ix.rows, parts, part + 1), group);
    }
  }
}

// grad_x = grad_y W over the active weights, by columns of W; grad_values[k] = sum_n grad_y[n][row] x[n][col];
// grad_bias = sum_n grad_y[n].
template <class T>
void linear_backward(const LinearArgs<T>& a) {
  const Index& ix = a.index;
  if (a.N == 0) {
    if (a.grad_values) for (int64_t k = 0; k < ix.nnz; ++k) a.grad_values[k] = T(0);
    if (a.grad_bias) for (int64_t r = 0; r < ix.rows; ++r) a.grad_bias[r] = T(0);
    return;
  }
  LinearPass<T> back = linear_pass(a, false, slot_plan);
  const int TL = back.TL;
  const int64_t tiles = div_up(div_up(a.N, LANES), TL);
  T* packed_grad = scratch<T>(slot_grad, tiles * TL * LANES * ix.rows);
  T* packed_x = a.grad_values ? scratch<T>(slot_source, tiles * TL * LANES * ix.cols) : nullptr;
  T* value = scratch<T>(slot_sums, ix.nnz + 1);
  back.packed = packed_grad;
  back.value = value;
  const int parts = linear_parts(a.threads, 1, ix.rows), back_parts = linear_parts(a.threads, tiles, ix.cols);
  const int64_t grad_pieces = div_up(ix.rows, 64), x_pieces = a.grad_values ? div_up(ix.cols, 64) : 0;
  const int64_t plans = a.grad_x ? div_up(ix.cols, 64) : 0;
  const CorrelateFn<T> fn = correlate_fn<T>(1, TL);
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < tiles * grad_pieces; ++i)
      pack_features(a.grad_y, a.y_layout, a.N, ix.rows, TL, i / grad_pieces, i % grad_pieces * 64,
                    least<int64_t>(ix.rows, i % grad_pieces * 64 + 64),
                    packed_grad + i / grad_pieces * ix.rows * TL * LANES);
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < tiles * x_pieces; ++i)
      pack_features(a.x, a.x_layout, a.N, ix.cols, TL, i / x_pieces, i % x_pieces * 64,
                    least<int64_t>(ix.cols, i % x_pieces * 64 + 64), packed_x + i / x_pieces * ix.cols * TL * LANES);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < plans; ++i) {
      const int64_t d0 = i * 64, d1 = least<int64_t>(ix.cols, d0 + 64);
      plan_pass(back, ix.row, const_cast<int32_t*>(back.offset), d0, d1);
      for (int32_t k = ix.colptr[d0]; k < ix.colptr[d1]; ++k) value[k] = a.values[ix.csc_to_csr[k]];
    }
    if (a.grad_x) {
      T* group = scratch<T>(slot_dest, 16 * GROUP * int64_t(TL) * LANES);
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t i = 0; i < tiles * back_parts; ++i) {
        const int part = int(i % back_parts);
        linear_rows(back, i / back_parts, linear_part(ix.colptr, ix.cols, back_parts, part),
                    linear_part(ix.colptr, ix.cols, back_parts, part + 1), group);
      }
    }
    if (a.grad_values || a.grad_bias) {
      // A thread owns its rows: no copies of the sums.
#pragma omp for schedule(dynamic, 1)
      for (int part = 0; part < parts; ++part) {
        const int64_t r0 = linear_part(ix.rowptr, ix.rows, parts, part);
        const int64_t r1 = linear_part(ix.rowptr, ix.rows, parts, part + 1);
        if (r0 == r1) continue;
        if (a.grad_bias) {
          for (int64_t r = r0; r < r1; ++r) {
            V<T> sum[Vec<T>::n];
            for (int i = 0; i < Vec<T>::n; ++i) sum[i] = zero<T>();
            for (int64_t tile = 0; tile < tiles; ++tile)
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
        t.scale = TL * LANES;
        for (int64_t tile = 0; tile < tiles; ++tile) {
          t.src = packed_x + tile * ix.cols * TL * LANES;
          t.grad = packed_grad + (tile * ix.rows + r0) * TL * LANES;
          fn(t);
        }
      }
    }
  }
}
