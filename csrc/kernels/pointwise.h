// Activations over packed tensors of n elements, a multiple of LANES. No include guard: see isa/kernels.inc.

// out[i] = f(i) for vectors at i, shared out over the threads.
template <class T, class F>
SB_INLINE void each_vector(const PointwiseArgs<T>& a, F f) {
  const bool past_the_caches = should_stream(a.out, a.n * int64_t(sizeof(T)));
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < a.n; i += LANES)
      for (int64_t k = i; k < i + LANES; k += Vec<T>::n) store_or_stream(a.out + k, f(k), past_the_caches);
    stream_fence();
  }
}

// out = x * min(max(x + 3, 0), 6) / 6.
template <class T>
void hardswish_forward(const PointwiseArgs<T>& a) {
  const V<T> three = splat<T>(3), six = splat<T>(6), sixth = splat<T>(T(1) / T(6));
  each_vector(a, [&](int64_t i) {
    const V<T> x = load(a.x + i), above = rectified<T>(x + three);
    return x * (above > six ? six : above) * sixth;
  });
}

// out = grad_y * (0 up to x = -3, 1 from x = 3 on, x / 3 + 1 / 2 between).
template <class T>
void hardswish_backward(const PointwiseArgs<T>& a) {
  const V<T> three = splat<T>(3), third = splat<T>(T(1) / T(3)), half = splat<T>(T(0.5));
  each_vector(a, [&](int64_t i) {
    const V<T> x = load(a.x + i), g = load(a.grad_y + i), between = g * (x * third + half);
    return x <= -three ? zero<T>() : x < three ? between : g;  // at NaN it passes, as torch has it
  });
}
