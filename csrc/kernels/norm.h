// Batch norm over the lane layout [blocks][C][P][16]. No include guard: see isa/kernels.inc.
//
// Moments are taken plane by plane and combined in double in a fixed order: as exact as a two-pass sum, the same with
// any number of threads, and the data comes from memory once.

template <class T>
SB_INLINE double total(V<T> v) {
  double s = 0;
  for (int i = 0; i < Vec<T>::n; ++i) s += double(v[i]);
  return s;
}

// mean[c] and var[c] from `groups` groups of samples of known moments, [group][C]; inside a parallel region.
template <class T, class F>
SB_INLINE void total_moments(const double* part_mean, const double* part_m2, int64_t groups, int64_t C, T* mean_of,
                             T* var_of, const F& count_of) {
#pragma omp for schedule(static)
  for (int64_t c = 0; c < C; ++c) {
    double count = 0, mean = 0, m2 = 0;
    for (int64_t g = 0; g < groups; ++g) {
      const double more = count_of(g), d = part_mean[g * C + c] - mean, all = count + more;
      mean += d * more / all;
      m2 += part_m2[g * C + c] + d * d * count * more / all;
      count = all;
    }
    mean_of[c] = T(mean);
    var_of[c] = T(most(0.0, m2 / count));
  }
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
      double s = 0, m2 = 0, mean;
      if (images == LANES) {
        constexpr int K = 8;
        V<T> v[K], own = zero<T>(), squares = zero<T>();
        T count = 0;
        int64_t i = 0;
        for (; i + K * n <= length; i += K * n) {
          for (int k = 0; k < K; ++k) v[k] = load(x + i + k * n);
          add_moments<T, K>(v, own, squares, count);
          count += T(K);
        }
        for (; i < length; i += n) {
          v[0] = load(x + i);
          add_moments<T, 1>(v, own, squares, count);
          count += T(1);
        }
        mean = total<T>(own) / n;
        for (int k = 0; k < n; ++k)
          m2 += double(squares[k]) + double(count) * (double(own[k]) - mean) * (double(own[k]) - mean);
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
    total_moments(part_mean, part_m2, blocks, a.C, a.mean, a.var,
                  [&](int64_t b) { return double(a.P) * double(least<int64_t>(LANES, a.N - b * LANES)); });
  }
}

// What is added to a norm's result: nothing, a tensor, or a tensor's own norm.
enum class Residual { none, plain, normed };

// y = scale[c] * x + shift[c] (+ residual) (then ReLU).
template <class T, Residual RESIDUAL, bool RELU>
void norm_apply_as(const NormArgs<T>& a) {
  constexpr int n = Vec<T>::n;
  constexpr bool own = RESIDUAL == Residual::normed;
  const int64_t planes = div_up(a.N, LANES) * a.C, length = a.P * LANES;
  const bool past_the_caches = should_stream(a.y, planes * length * int64_t(sizeof(T)));
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < planes; ++t) {
      const int64_t c = t % a.C;
      const V<T> scale = splat<T>(a.scale[c]), shift = splat<T>(a.shift[c]);
      const V<T> own_scale = splat<T>(own ? a.residual_scale[c] : T(1));
      const V<T> own_shift = splat<T>(own ? a.residual_shift[c] : T(0));
      const T* x = a.x + t * length;
      const T* residual = RESIDUAL == Residual::none ? nullptr : a.residual + t * length;
      T* y = a.y + t * length;
      for (int64_t i = 0; i < length; i += n) {
        V<T> v = normed<T>(load(x + i), scale, shift);
        if (RESIDUAL == Residual::plain) v += load(residual + i);
        if (own) v += normed<T>(load(residual + i), own_scale, own_shift);
        store_or_stream(y + i, RELU ? rectified<T>(v) : v, past_the_caches);
      }
    }
    stream_fence();
  }
}

template <class T, Residual RESIDUAL>
void norm_apply_with(const NormArgs<T>& a) {
  a.relu ? norm_apply_as<T, RESIDUAL, true>(a) : norm_apply_as<T, RESIDUAL, false>(a);
}

template <class T>
void norm_apply(const NormArgs<T>& a) {
  if (!a.residual) return norm_apply_with<T, Residual::none>(a);
  a.residual_scale ? norm_apply_with<T, Residual::normed>(a) : norm_apply_with<T, Residual::plain>(a);
}

// What tells where a ReLU behind the norm lets a gradient pass.
enum class Gate { open, result, input };

template <class T>
Gate gate_of(const NormArgs<T>& a) {
  return a.result ? Gate::result : a.relu_scale ? Gate::input : Gate::open;
}

// The gradient that reaches the norm's output in channel c of plane t.
template <class T, Gate GATE, bool MORE>
struct PassedGrad {
  const T* x;
  const T* grad;
  const T* more;
  const T* result;
  V<T> scale, shift;

  SB_INLINE PassedGrad(const NormArgs<T>& a, int64_t t) {
    const int64_t at = t * a.P * LANES;
    x = a.x + at;
    grad = a.grad_y + at;
    more = MORE ? a.grad_more + at : nullptr;
    result = GATE == Gate::result ? a.result + at : nullptr;
    scale = splat<T>(GATE == Gate::input ? a.relu_scale[t % a.C] : T(0));
    shift = splat<T>(GATE == Gate::input ? a.relu_shift[t % a.C] : T(0));
  }

  SB_INLINE V<T> operator()(int64_t i) const {
    V<T> g = load(grad + i);
    if (MORE) g += load(more + i);
    // The gradient at NaN passes, as torch has it.
    if (GATE == Gate::result) return load(result + i) <= zero<T>() ? zero<T>() : g;
    if (GATE == Gate::input) return normed<T>(load(x + i), scale, shift) <= zero<T>() ? zero<T>() : g;
    return g;
  }
};

// Sums over groups [group][C]; inside a parallel region.
template <class T>
SB_INLINE void total_sums(const double* part_g, const double* part_gx, int64_t groups, int64_t C, T* sum_g, T* sum_gx) {
#pragma omp for schedule(static)
  for (int64_t c = 0; c < C; ++c) {
    double s = 0, sx = 0;
    for (int64_t g = 0; g < groups; ++g) s += part_g[g * C + c], sx += part_gx[g * C + c];
    sum_g[c] = T(s);
    sum_gx[c] = T(sx);
  }
}

// sum_g[c] = sum of g, sum_gx[c] = sum of g * (x - mean[c]), over samples and positions; g is written to `grad`.
template <class T, Gate GATE, bool MORE, bool KEEP>
void norm_reduce_as(const NormArgs<T>& a) {
  constexpr int n = Vec<T>::n;
  const int64_t blocks = div_up(a.N, LANES), planes = blocks * a.C, length = a.P * LANES;
  const bool past_the_caches = KEEP && should_stream(a.grad, planes * length * int64_t(sizeof(T)));
  double* part_g = scratch<double>(slot_sums, 2 * planes);
  double* part_gx = part_g + planes;
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < planes; ++t) {
      const int images = int(least<int64_t>(LANES, a.N - t / a.C * LANES));
      const PassedGrad<T, GATE, MORE> passed(a, t);
      const T* x = a.x + t * length;
      T* kept = KEEP ? a.grad + t * length : nullptr;
      const V<T> mean = splat<T>(a.mean[t % a.C]);
      V<T> g[2] = {zero<T>(), zero<T>()}, gx[2] = {zero<T>(), zero<T>()};
      if (images == LANES) {
        int64_t i = 0;
        for (; i + 2 * n <= length; i += 2 * n)
          for (int u = 0; u < 2; ++u) {
            const V<T> v = passed(i + u * n);
            if (KEEP) store_or_stream(kept + i + u * n, v, past_the_caches);
            g[u] += v;
            gx[u] += v * (load(x + i + u * n) - mean);
          }
        for (; i < length; i += n) {
          const V<T> v = passed(i);
          if (KEEP) store(kept + i, v);
          g[0] += v;
          gx[0] += v * (load(x + i) - mean);
        }
      } else {
        for (int part = 0; part < LANES; part += n) {
          const typename Vec<T>::index exists = lane_mask<T>(images, part);
          for (int64_t i = part; i < length; i += LANES) {
            const V<T> v = exists ? passed(i) : zero<T>(), d = exists ? load(x + i) - mean : zero<T>();
            if (KEEP) store(kept + i, v);
            g[0] += v;
            gx[0] += v * d;
          }
        }
      }
      part_g[t] = total<T>(g[0] + g[1]);
      part_gx[t] = total<T>(gx[0] + gx[1]);
    }
    stream_fence();
    total_sums(part_g, part_gx, blocks, a.C, a.sum_g, a.sum_gx);
  }
}

template <class T, Gate GATE>
void norm_reduce_behind(const NormArgs<T>& a) {
  if (a.grad_more)
    a.grad ? norm_reduce_as<T, GATE, true, true>(a) : norm_reduce_as<T, GATE, true, false>(a);
  else
    a.grad ? norm_reduce_as<T, GATE, false, true>(a) : norm_reduce_as<T, GATE, false, false>(a);
}

template <class T>
void norm_reduce(const NormArgs<T>& a) {
  switch (gate_of(a)) {
    case Gate::open:
      return norm_reduce_behind<T, Gate::open>(a);
    case Gate::result:
      return norm_reduce_behind<T, Gate::result>(a);
    case Gate::input:
      return norm_reduce_behind<T, Gate::input>(a);
  }
}

// What a norm makes of the gradient of its result: scale[c] * g + slope[c] * (x - mean[c]) + shift[c].
template <class T, Gate GATE>
struct NormGrad {
  PassedGrad<T, GATE, false> passed;
  V<T> scale, slope, shift, mean;

  SB_INLINE NormGrad(const NormArgs<T>& a, int64_t t) : passed(a, t) {
    const int64_t c = t % a.C;
    scale = splat<T>(a.scale[c]), slope = splat<T>(a.slope[c]), shift = splat<T>(a.shift[c]),
    mean = splat<T>(a.mean[c]);
  }

  SB_INLINE V<T> operator()(int64_t i) const { return scale * passed(i) + slope * (load(passed.x + i) - mean) + shift; }
};

template <class T, Gate GATE>
void norm_grad_as(const NormArgs<T>& a) {
  const int64_t planes = div_up(a.N, LANES) * a.C, length = a.P * LANES;
  const bool past_the_caches = should_stream(a.y, planes * length * int64_t(sizeof(T)));
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < planes; ++t) {
      const NormGrad<T, GATE> grad(a, t);
      T* y = a.y + t * length;
      for (int64_t i = 0; i < length; i += Vec<T>::n) store_or_stream(y + i, grad(i), past_the_caches);
    }
    stream_fence();
  }
}

template <class T>
void norm_grad(const NormArgs<T>& a) {
  switch (gate_of(a)) {
    case Gate::open:
      return norm_grad_as<T, Gate::open>(a);
    case Gate::result:
      return norm_grad_as<T, Gate::result>(a);
    case Gate::input:
      return norm_grad_as<T, Gate::input>(a);
  }
}

// The same for `len` positions of plane t from `at` on, to dst; lanes from `images` on become zero.
template <class T, Gate GATE>
void norm_grad_lanes_as(const NormArgs<T>& a, int64_t t, int64_t at, int images, int64_t len, T* dst) {
  const NormGrad<T, GATE> grad(a, t);
  if (images == LANES) {
    for (int64_t i = 0; i < len * LANES; i += Vec<T>::n) store(dst + i, grad(at * LANES + i));
    return;
  }
  for (int part = 0; part < LANES; part += Vec<T>::n) {
    const typename Vec<T>::index exists = lane_mask<T>(images, part);
    for (int64_t i = part; i < len * LANES; i += LANES) store(dst + i, exists ? grad(at * LANES + i) : zero<T>());
  }
}

template <class T>
void norm_grad_lanes(const NormArgs<T>& a, int64_t t, int64_t at, int images, int64_t len, T* dst) {
  switch (gate_of(a)) {
    case Gate::open:
      return norm_grad_lanes_as<T, Gate::open>(a, t, at, images, len, dst);
    case Gate::result:
      return norm_grad_lanes_as<T, Gate::result>(a, t, at, images, len, dst);
    case Gate::input:
      return norm_grad_lanes_as<T, Gate::input>(a, t, at, images, len, dst);
  }
}
