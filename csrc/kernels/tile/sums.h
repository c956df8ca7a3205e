// Gradients of values: one sum over all lanes for each nonzero. No include guard: see isa/kernels.inc.

// Destination of the gradients of values: that of nonzero k goes to at[k].
template <class T>
struct GradValues {
  T* at;
  bool add;                      // else overwrite
  bool past_the_caches = false;  // overwrite with non-temporal stores
};

// Adds up the lanes of sum[0], ..., sum[m - 1]: the gradients of nonzeros k, ..., k + m - 1. `sum` has n vectors.
template <class T>
SB_INLINE void pass_sums(const V<T>* sum, int m, const GradValues<T>& to, int32_t k) {
  constexpr int n = Vec<T>::n;
  V<T> lanes[n];
  for (int q = 0; q < n; ++q) lanes[q] = sum[q];
  const V<T> totals = sum_each<T>(lanes);
  if (m == n && CAN_STREAM && to.past_the_caches) return stream(to.at + k, totals);
  if (m == n) return store(to.at + k, to.add ? load(to.at + k) + totals : totals);
  alignas(64) T out[n];
  store(out, totals);
  for (int q = 0; q < m; ++q) {
    T& place = to.at[k + q];
    place = to.add ? place + out[q] : out[q];
  }
}

// pass_sums where m may be below n. Not inlined: it is rare.
template <class T>
__attribute__((noinline)) void pass_fewer_sums(V<T>* sum, int m, const GradValues<T>& to, int32_t k) {
  for (int q = m; q < Vec<T>::n; ++q) sum[q] = zero<T>();
  pass_sums<T>(sum, m, to, k);
}

// Where LANES are several vectors, they are taken one after the other for at most this many nonzeros at once.
constexpr int HELD = 256;

// A queue of vectors whose lanes are still to be added up, one for each of several consecutive nonzeros. n of them are
// reduced together, across rows too: rows of a chunk are short. Where stores are non-temporal, the first batch is
// smaller, so that the others are aligned. The vectors lie outside of this struct: its pointers can be in registers.
template <class T>
struct SumQueue {
  static constexpr int n = Vec<T>::n, ROOM = n < LANES ? n + HELD : n;

  V<T>* const begin;  // has ROOM vectors
  V<T>* end;
  V<T>* full;  // the queue is reduced when `end` gets here
  int32_t k;   // the nonzero of *begin; below 0: none yet

  SB_INLINE explicit SumQueue(V<T>* room) : begin(room), end(room), full(room + n), k(-1) {}
  SB_INLINE void put(V<T> v, const GradValues<T>& to) {
    *end++ = v;
    if (end != full) return;
    const int m = int(end - begin);
    if (m == n)
      pass_sums<T>(begin, n, to, k);
    else
      pass_fewer_sums<T>(begin, m, to, k);
    k += m;
    end = begin;
    full = begin + n;
  }
  SB_INLINE void flush(const GradValues<T>& to) {
    if (end != begin) pass_fewer_sums<T>(begin, int(end - begin), to, k);
    end = begin;
  }
  // What is put from here on belongs to the nonzeros from `next` on.
  SB_INLINE void seek(int32_t next, const GradValues<T>& to) {
    if (k + (end - begin) == next) return;
    flush(to);
    k = next;
    full = begin + n;
    if (CAN_STREAM && to.past_the_caches) full -= reinterpret_cast<uintptr_t>(to.at + k) / sizeof(T) % n;
  }
  // Puts the sums over all lanes of nonzeros [k0, k1), see piece_end. To be called for part = 0, n, 2 * n, ...:
  // product(k, sum) adds the lanes from `part` on to `sum`, which has those before them; the last call fills the queue.
  template <class F>
  SB_INLINE void put_part(int part, int32_t k0, int32_t k1, const GradValues<T>& to, F product) {
    if constexpr (n == LANES) {
      seek(k0, to);
      for (int32_t k = k0; k < k1; ++k) put(product(k, zero<T>()), to);
    } else {
      const V<T> none = zero<T>();
      const ptrdiff_t step = part > 0;
      V<T>* held = begin + n;
      const V<T>* from = step ? held : &none;
      if (part + n < LANES) {
        for (int32_t k = k0; k < k1; ++k, ++held, from += step) *held = product(k, *from);
      } else {
        seek(k0, to);
        for (int32_t k = k0; k < k1; ++k, from += step) put(product(k, *from), to);
      }
    }
  }
};

// Where the nonzeros that one round of put_part takes from [k, k1) end.
template <class T>
SB_INLINE int32_t piece_end(int32_t k, int32_t k1) {
  return Vec<T>::n == LANES || k1 - k < HELD ? k1 : k + HELD;
}
