// The forward pass of a linear layer; the input gradient is the same product of the transpose. No include guard: see
// isa/kernels.inc.

// Packs lane blocks [l0, l1) of a tile, features [f0, f1), of a plain or a lane tensor into
// packed[feature - f0][l1 - l0][16].
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

// Destination features that are computed before they are transposed back to row-major. They fill a few neighbouring
// cache lines of each sample; with several chunks they are more, so that a chunk of the source is read from the cache.
SB_INLINE int64_t run_length(int chunks) { return (chunks > 1 ? 16 : 4) * GROUP; }

// What linear_rows needs to compute the gradients of values along with the input gradient.
template <class T>
struct Correlation {
  const T* x;
  Layout x_layout;
  GradValues<T> grad_values;  // in CSC order
};

// Computes destination features [d0, d1) of lane blocks [l0, l1) of a tile. group: room for a run of features, with
// `both` for two.
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
  // With one chunk the nonzeros are read in order, which the hardware prefetches well unless they come from memory.
  t.prefetch = p.ptr[p.dst_features] >= (p.chunks > 1 ? MANY : 2 * MANY);
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
        // [features][16] -> [16][features]
        unpack_rows(src, step, t.r1 - t.r0, p.dst + b * LANES * p.dst_features + d, p.dst_features, images);
      }
    }
  }
}

// One product without gradients of values. Threads get different lane blocks: each packs less, and it stays cached.
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
