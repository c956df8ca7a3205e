// Sums over the lanes of registers. Included inside an instruction set's namespace; no include guard.

// Where the gradients of values go: nonzero k's to at[k].
template <class T>
struct GradValues {
  T* at;
  bool add;                      // or set
  bool past_the_caches = false;  // how they are set
};

// The sums of the lanes of sum[0..m) become those of the nonzeros from k on.
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

template <class T>
__attribute__((noinline)) void pass_fewer_sums(V<T>* sum, int m, const GradValues<T>& to, int32_t k) {
  for (int q = m; q < Vec<T>::n; ++q) sum[q] = zero<T>();
  pass_sums<T>(sum, m, to, k);
}

// So many nonzeros are taken through all parts of the lanes before their sums are reduced.
constexpr int HELD = 256;

// Registers whose lanes are still to be summed, of nonzeros that follow one another. A register is reduced together
// with its neighbours, across rows too: rows of a chunk are short. What goes past the caches begins with fewer, so that
// all others go to a vector's border. They lie apart from what tells where they end, which is then a register's, too.
template <class T>
struct SumQueue {
  static constexpr int n = Vec<T>::n, ROOM = n < LANES ? n + HELD : n;

  V<T>* const begin;  // ROOM
  V<T>* end;
  V<T>* full;  // where *end is the last one
  int32_t k;   // the nonzero of *begin; below 0: nothing was put yet

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
  // What is put next is of the nonzeros from `next` on.
  SB_INLINE void seek(int32_t next, const GradValues<T>& to) {
    if (k + (end - begin) == next) return;
    flush(to);
    k = next;
    full = begin + n;
    if (CAN_STREAM && to.past_the_caches) full -= reinterpret_cast<uintptr_t>(to.at + k) / sizeof(T) % n;
  }
  // Puts product(k, sum), which is `sum` and more, for at most HELD nonzeros: of one part of the lanes after the other,
  // each on top of those before it.
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

// How many of a row's nonzeros are taken through all parts of the lanes at once.
template <class T>
SB_INLINE int32_t piece_end(int32_t k, int32_t k1) {
  return Vec<T>::n == LANES || k1 - k < HELD ? k1 : k + HELD;
}
