// Small functions of one vector. Included inside an instruction set's namespace; no include guard.

// What a batch norm makes of x; one expression everywhere, so that a sign does not depend on who computes it.
template <class T>
SB_INLINE V<T> normed(V<T> x, V<T> scale, V<T> shift) {
  return x * scale + shift;
}

template <class T>
SB_INLINE V<T> rectified(V<T> v) {
  return v < zero<T>() ? zero<T>() : v;  // NaN stays
}

// All ones in the lanes of `part` that hold one of the first `images` samples.
template <class T>
SB_INLINE typename Vec<T>::index lane_mask(int images, int part) {
  typename Vec<T>::index m{};
  for (int i = 0; i < Vec<T>::n; ++i) m[i] = part + i < images ? -1 : 0;
  return m;
}

// K registers more to the mean and the sum of squared deviations of the `count` before them, lane by lane. They are
// taken by their own mean first: nothing is read twice, and nothing cancels.
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
