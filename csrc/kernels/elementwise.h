// Helpers on single vectors, shared by several kernels. No include guard: see isa/kernels.inc.

// Batch norm. Every kernel uses this one expression: the sign of the result decides what a ReLU passes on, and kernels
// that rounded differently would disagree on it.
template <class T>
SB_INLINE V<T> normed(V<T> x, V<T> scale, V<T> shift) {
  return x * scale + shift;
}

template <class T>
SB_INLINE V<T> rectified(V<T> v) {
  return v < zero<T>() ? zero<T>() : v;  // keeps NaN
}

// A mask for the lanes part .. part + n - 1: all bits set in those below `images`.
template <class T>
SB_INLINE typename Vec<T>::index lane_mask(int images, int part) {
  typename Vec<T>::index m{};
  for (int i = 0; i < Vec<T>::n; ++i) m[i] = part + i < images ? -1 : 0;
  return m;
}

// Adds K vectors to the running mean and sum of squared deviations, which are of `count` values in every lane. The K
// vectors get moments of their own first, which are then merged: the data is read once, and no digits cancel.
template <class T, int K>
SB_INLINE void add_moments(const V<T>* v, V<T>& mean, V<T>& squares, T count) {
  V<T> own = zero<T>(), more = zero<T>();
  for (int k = 0; k < K; ++k) own += v[k];
  own *= splat<T>(T(1) / T(K));
  for (int k = 0; k < K; ++k) more += (v[k] - own) * (v[k] - own);
  const V<T> d = own - mean;
  const T all = count + T(K);
  mean += d * splat<T>(T(K) / all);
  squares += more + d * d * splat<T>(count * T(K) / all);
}
