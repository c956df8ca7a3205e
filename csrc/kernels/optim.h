// The optimizers' inner loops. Included inside an instruction set's namespace; no include guard.

// One linearized Bregman step with the proximal map of threshold * |.|_1 (threshold 0: none), in one pass:
// g' = sign * g + decay * p;  m = beta * m + (1 - beta) * lr * g';  v -= m (without m: v -= lr * g');
// p = shrink(delta * v, delta * lam).
template <class T>
void linbreg_step(const StepArgs<T>& a) {
  const T lr = T(a.lr), beta = T(a.beta), gain = T((1 - a.beta) * a.lr), delta = T(a.delta);
  const T threshold = T(a.delta * a.lam), decay = T(a.weight_decay), sign = T(a.sign);
  const int64_t piece = 8192, pieces = div_up(a.n, piece);
#pragma omp parallel for num_threads(a.threads) if (a.threads > 1) schedule(static)
  for (int64_t i = 0; i < pieces; ++i) {
    T* __restrict p = a.p + i * piece;
    T* __restrict v = a.v + i * piece;
    const T* __restrict g = a.g + i * piece;
    const int64_t n = least(piece, a.n - i * piece);
    if (a.m) {
      T* __restrict m = a.m + i * piece;
      for (int64_t k = 0; k < n; ++k) {
        m[k] = beta * m[k] + gain * (sign * g[k] + decay * p[k]);
        v[k] -= m[k];
      }
    } else {
      for (int64_t k = 0; k < n; ++k) v[k] -= lr * (sign * g[k] + decay * p[k]);
    }
    for (int64_t k = 0; k < n; ++k) {
      const T z = delta * v[k], up = z - threshold, down = z + threshold;
      // NaN passes through: both comparisons are false only for |z| <= threshold.
      p[k] = up > T(0) ? up : down < T(0) ? down : z - z;
    }
  }
}
