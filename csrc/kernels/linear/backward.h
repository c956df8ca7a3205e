// The backward pass of a linear layer. No include guard: see isa/kernels.inc.

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

// Where the tasks of a backward pass put gradients of values. Units have different samples, so their sums go to copies:
// one per unit or one per thread, whichever are fewer.
template <class T>
struct ValueSums {
  int copies;
  bool by_unit;
  T* sums;         // [copies][nnz]; null: straight to grad_values
  bool from_zero;  // copies start as zeros and all tasks add to them
  bool few;        // all copies fit in half of an L2 cache

  ValueSums(const Share& s, const LinearArgs<T>& a, bool apart)
      : copies(int(least<int64_t>(s.units(), a.threads))),
        by_unit(s.units() <= a.threads),
        sums(apart || copies > 1 ? scratch<T>(slot_sums, a.index.nnz * copies) : nullptr),
        from_zero(copies > 1 && !by_unit),
        few(a.index.nnz * copies * int64_t(sizeof(T)) <= (int64_t(512) << 10)) {}

  // Threads write columns here and read rows in the end, so nearly every cache line of sums moves to another core.
  // Writing to lines that other caches still hold takes as long as the products; non-temporal stores do not wait.
  GradValues<T> of(int64_t unit, const LinearArgs<T>& a) const {
    T* at = sums ? sums + a.index.nnz * (by_unit ? unit : team_member()) : a.grad_values;
    const bool add = from_zero || (!by_unit && unit > 0);
    return {at, add, sums && !add && few && a.threads > 1};
  }

  // To be called in a parallel region, before and after the tasks. from: the place of each gradient in a copy, or null:
  // they are in order.
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

// grad_x = grad_y W over the active weights, by columns of W, and grad_values[k] = sum_n grad_y[n][row] x[n][col] in
// the same loop. These are in CSC order until the end: stores in CSR order would be scattered, and threads, which have
// different columns, would write to the same cache lines.
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
