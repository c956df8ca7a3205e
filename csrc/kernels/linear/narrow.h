// Linear layers of up to three samples, forward and backward. No include guard: see isa/kernels.inc.

// So few samples would leave most lanes empty: every sum runs along the nonzeros of a row instead. With more samples
// that is slower.
constexpr int NARROW = 2, NARROW_FORWARD = CAN_GATHER ? 3 : NARROW;

template <class T>
SB_INLINE bool is_narrow(const LinearArgs<T>& a, int most_samples) {
  return a.N <= most_samples && a.x_layout == Layout::plain && a.y_layout == Layout::plain;
}

// dst[n][d] = bias[d] + sum over the nonzeros (d, s) of value * src[n][s] for n < B; see LinearPass.
template <class T, int B, bool ORDERED>
void narrow_rows(const LinearPass<T>& p, const T* src, int64_t d0, int64_t d1) {
  constexpr int CHAINS = 4;  // independent sums, to hide latency
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
