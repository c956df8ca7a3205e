// Batch norm over the lane layout [blocks][C][P][16]. Included inside an instruction set's namespace; no include guard.
//
// Sums are taken plane by plane, centred on the plane's own mean, and combined in double in a fixed order: as exact as
// a two-pass sum, the same with any number of threads, and the data comes from memory once.

// All ones in the lanes of `part` that hold one of the first `images` samples.
template <class T>
SB_INLINE typename Vec<T>::index lane_mask(int images, int part) {
  typename Vec<T>::index m{};
  for (int i = 0; i < Vec<T>::n; ++i) m[i] = part + i < images ? -1 : 0;
  return m;
}

template <class T>
SB_INLINE double total(V<T> v) {
  double s = 0;
  for (int i = 0; i < Vec<T>::n; ++i) s += double(v[i]);
  return s;
}

// mean[c] and biased variance var[c] over samples and positions. scratch: 2 * blocks * C doubles.
template <class T>
void norm_stats(const NormArgs<T>& a) {
  constexpr int n = Vec<T>::n;
  const int64_t blocks = div_up(a.N, LANES), planes = blocks * a.C, length = a.P * LANES;
  double* part_mean = scratch<double>(slot_sums, 2 * planes);
  double* part_m2 = part_mean + planes;
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < planes; ++t) {
      const int images = int(least<int64_t>(LANES, a.N - t / a.C * LANES));
      const T* x = a.x + t * length;
      V<T> sum[4] = {zero<T>(), zero<T>(), zero<T>(), zero<T>()};
      double s = 0, m2 = 0, mean;
      if (images == LANES) {
        int64_t i = 0;
        for (; i + 4 * n <= length; i += 4 * n)
          for (int u = 0; u < 4; ++u) sum[u] += load(x + i + u * n);
        for (; i < length; i += n) sum[0] += load(x + i);
        s = total<T>(sum[0] + sum[1]) + total<T>(sum[2] + sum[3]);
        mean = s / double(length);
        const V<T> m = splat<T>(T(mean));
        V<T> sq[4] = {zero<T>(), zero<T>(), zero<T>(), zero<T>()};
        for (i = 0; i + 4 * n <= length; i += 4 * n)
          for (int u = 0; u < 4; ++u) {
            const V<T> d = load(x + i + u * n) - m;
            sq[u] += d * d;
          }
        for (; i < length; i += n) {
          const V<T> d = load(x + i) - m;
          sq[0] += d * d;
        }
        m2 = total<T>(sq[0] + sq[1]) + total<T>(sq[2] + sq[3]);
        const double shift = mean - double(T(mean));
        m2 -= shift * shift * double(length);
      } else {
        for (int64_t i = 0; i < a.P; ++i)
          for (int l = 0; l < images; ++l) s += double(x[i * LANES + l]);
        mean = s / double(a.P * images);
        for (int64_t i = 0; i < a.P; ++i)
          for (int l = 0; l < images; ++l) {
            const double d = double(x[i * LANES + l]) - mean;
            m2 += d * d;
          }
      }
      part_mean[t] = mean;
      part_m2[t] = m2;
    }
#pragma omp for schedule(static)
    for (int64_t c = 0; c < a.C; ++c) {
      double count = 0, mean = 0, m2 = 0;
      for (int64_t b = 0; b < blocks; ++b) {
        const double more = double(a.P) * double(least<int64_t>(LANES, a.N - b * LANES));
        const double d = part_mean[b * a.C + c] - mean, all = count + more;
        mean += d * more / all;
        m2 += part_m2[b * a.C + c] + d * d * count * more / all;
        count = all;
      }
      a.mean[c] = T(mean);
      a.var[c] = T(most(0.0, m2 / count));
    }
  }
}

// y = scale[c] * x + shift[c] (+ residual) (then ReLU).
template <class T, bool RESIDUAL, bool RELU>
void norm_apply_as(const NormArgs<T>& a) {
  constexpr int n = Vec<T>::n;
  const int64_t planes = div_up(a.N, LANES) * a.C, length = a.P * LANES;
#pragma omp parallel for num_threads(a.threads) if (a.threads > 1) schedule(static)
  for (int64_t t = 0; t < planes; ++t) {
    const int64_t c = t % a.C;
    const V<T> scale = splat<T>(a.scale[c]), shift = splat<T>(a.shift[c]);
    const T* x = a.x + t * length;
    const T* residual = RESIDUAL ? a.residual + t * length : nullptr;
    T* y = a.y + t * length;
    for (int64_t i = 0; i < length; i += n) {
      V<T> v = load(x + i) * scale + shift;
      if (RESIDUAL) v += load(residual + i);
      if (RELU) v = v < zero<T>() ? zero<T>() : v;  // NaN stays
      store(y + i, v);
    }
  }
}

template <class T>
void norm_apply(const NormArgs<T>& a) {
  if (a.residual)
    a.relu ? norm_apply_as<T, true, true>(a) : norm_apply_as<T, true, false>(a);
  else
    a.relu ? norm_apply_as<T, false, true>(a) : norm_apply_as<T, false, false>(a);
}

// g = grad_y, where `result` is given only at its positive values (the gradient of a ReLU that made it).
template <class T, bool MASKED>
SB_INLINE V<T> masked_grad(const T* grad, const T* result, int64_t i) {
  const V<T> g = load(grad + i);
  if (!MASKED) return g;
  return load(result + i) > zero<T>() ? g : zero<T>();
}

// sum_g[c] = sum of g, sum_gx[c] = sum of g * (x - mean[c]), over samples and positions.
template <class T, bool MASKED>
void norm_reduce_as(const NormArgs<T>& a) {
  constexpr int n = Vec<T>::n;
  const int64_t blocks = div_up(a.N, LANES), planes = blocks * a.C, length = a.P * LANES;
  double* part_g = scratch<double>(slot_sums, 2 * planes);
  double* part_gx = part_g + planes;
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < planes; ++t) {
      const int images = int(least<int64_t>(LANES, a.N - t / a.C * LANES));
      const T* x = a.x + t * length;
      const T* grad = a.grad_y + t * length;
      const T* result = MASKED ? a.result + t * length : nullptr;
      const V<T> mean = splat<T>(a.mean[t % a.C]);
      double s = 0, sx = 0;
      if (images == LANES) {
        V<T> g[2] = {zero<T>(), zero<T>()}, gx[2] = {zero<T>(), zero<T>()};
        int64_t i = 0;
        for (; i + 2 * n <= length; i += 2 * n)
          for (int u = 0; u < 2; ++u) {
            const V<T> v = masked_grad<T, MASKED>(grad, result, i + u * n);
            g[u] += v;
            gx[u] += v * (load(x + i + u * n) - mean);
          }
        for (; i < length; i += n) {
          const V<T> v = masked_grad<T, MASKED>(grad, result, i);
          g[0] += v;
          gx[0] += v * (load(x + i) - mean);
        }
        s = total<T>(g[0] + g[1]);
        sx = total<T>(gx[0] + gx[1]);
      } else {
        for (int64_t i = 0; i < a.P; ++i)
          for (int l = 0; l < images; ++l) {
            const int64_t k = i * LANES + l;
            if (MASKED && !(result[k] > T(0))) continue;
            s += double(grad[k]);
            sx += double(grad[k]) * (double(x[k]) - double(a.mean[t % a.C]));
          }
      }
      part_g[t] = s;
      part_gx[t] = sx;
    }
#pragma omp for schedule(static)
    for (int64_t c = 0; c < a.C; ++c) {
      double s = 0, sx = 0;
      for (int64_t b = 0; b < blocks; ++b) s += part_g[b * a.C + c], sx += part_gx[b * a.C + c];
      a.sum_g[c] = T(s);
      a.sum_gx[c] = T(sx);
    }
  }
}

template <class T>
void norm_reduce(const NormArgs<T>& a) {
  a.result ? norm_reduce_as<T, true>(a) : norm_reduce_as<T, false>(a);
}

// grad_x = scale[c] * g + slope[c] * (x - mean[c]) + shift[c]; with grad_residual, g is written there.
template <class T, bool MASKED>
void norm_grad_as(const NormArgs<T>& a) {
  constexpr int n = Vec<T>::n;
  const int64_t planes = div_up(a.N, LANES) * a.C, length = a.P * LANES;
#pragma omp parallel for num_threads(a.threads) if (a.threads > 1) schedule(static)
  for (int64_t t = 0; t < planes; ++t) {
    const int64_t c = t % a.C;
    const V<T> scale = splat<T>(a.scale[c]), shift = splat<T>(a.shift[c]), slope = splat<T>(a.slope[c]),
               mean = splat<T>(a.mean[c]);
    const T* x = a.x + t * length;
    const T* grad = a.grad_y + t * length;
    const T* result = MASKED ? a.result + t * length : nullptr;
    T* y = a.y + t * length;
    T* residual = a.grad_residual ? a.grad_residual + t * length : nullptr;
    for (int64_t i = 0; i < length; i += n) {
      const V<T> g = masked_grad<T, MASKED>(grad, result, i);
      store(y + i, scale * g + slope * (load(x + i) - mean) + shift);
      if (residual) store(residual + i, g);
    }
  }
}

template <class T>
void norm_grad(const NormArgs<T>& a) {
  a.result ? norm_grad_as<T, true>(a) : norm_grad_as<T, false>(a);
}
