// Vector types of one instruction set. Included inside that set's namespace (see isa/), after its target pragma,
// with SB_VECTOR_BYTES set to the register width. GCC and Clang vector extensions keep one source for all sets.
// No include guard on purpose: every instruction set gets its own copy.

template <class T>
struct Vec;

template <>
struct Vec<float> {
  static constexpr int n = SB_VECTOR_BYTES / 4;
  typedef float type __attribute__((vector_size(SB_VECTOR_BYTES)));
  typedef float loose __attribute__((vector_size(SB_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t index __attribute__((vector_size(SB_VECTOR_BYTES)));
};

template <>
struct Vec<double> {
  static constexpr int n = SB_VECTOR_BYTES / 8;
  typedef double type __attribute__((vector_size(SB_VECTOR_BYTES)));
  typedef double loose __attribute__((vector_size(SB_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t index __attribute__((vector_size(SB_VECTOR_BYTES)));
};

template <class T>
using V = typename Vec<T>::type;

// Loads and stores ask only for the element's alignment: on current CPUs an unaligned access to an aligned address
// costs nothing.
template <class T>
SB_INLINE V<T> load(const T* p) {
  return *reinterpret_cast<const typename Vec<T>::loose*>(p);
}

template <class T>
SB_INLINE void store(T* p, V<T> v) {
  *reinterpret_cast<typename Vec<T>::loose*>(p) = v;
}

// The first `count` elements, between 1 and n; the other lanes are zero, and the memory behind is not touched.
#if defined(__x86_64__) && SB_VECTOR_BYTES == 64
constexpr bool CAN_MASK = true;
SB_INLINE V<float> load_first(const float* p, int count) {
  return _mm512_maskz_loadu_ps(uint16_t(0xffff >> (16 - count)), p);
}
SB_INLINE V<double> load_first(const double* p, int count) {
  return _mm512_maskz_loadu_pd(uint8_t(0xff >> (8 - count)), p);
}
SB_INLINE void store_first(float* p, V<float> v, int count) {
  _mm512_mask_storeu_ps(p, uint16_t(0xffff >> (16 - count)), v);
}
SB_INLINE void store_first(double* p, V<double> v, int count) {
  _mm512_mask_storeu_pd(p, uint8_t(0xff >> (8 - count)), v);
}
#elif defined(__x86_64__) && SB_VECTOR_BYTES == 32
constexpr bool CAN_MASK = true;
SB_INLINE __m256i first_lanes(const float*, int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
SB_INLINE __m256i first_lanes(const double*, int count) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
}
SB_INLINE V<float> load_first(const float* p, int count) { return _mm256_maskload_ps(p, first_lanes(p, count)); }
SB_INLINE V<double> load_first(const double* p, int count) { return _mm256_maskload_pd(p, first_lanes(p, count)); }
SB_INLINE void store_first(float* p, V<float> v, int count) { _mm256_maskstore_ps(p, first_lanes(p, count), v); }
SB_INLINE void store_first(double* p, V<double> v, int count) { _mm256_maskstore_pd(p, first_lanes(p, count), v); }
#else
constexpr bool CAN_MASK = false;
template <class T>
SB_INLINE V<T> load_first(const T* p, int count) {
  V<T> v{};
  for (int i = 0; i < count; ++i) v[i] = p[i];
  return v;
}
template <class T>
SB_INLINE void store_first(T* p, V<T> v, int count) {
  for (int i = 0; i < count; ++i) p[i] = v[i];
}
#endif

// Stores past the caches: what is not read again soon needs neither to be fetched before it is overwritten nor a place
// in the cache. A line that is two registers is to be written in two stores, one right after the other: half a line on
// its way to memory is slower than no such store. p is aligned to the register.
constexpr int LINE = 64, LINE_PARTS = LINE / SB_VECTOR_BYTES;  // bytes of a cache line; its registers
// GCC takes what only the second half of a line's stores reads for uninitialised.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#if defined(__x86_64__) && SB_VECTOR_BYTES == 64
constexpr bool CAN_STREAM = true;
SB_INLINE void stream(float* p, V<float> v) { __builtin_ia32_movntps512(p, v); }
SB_INLINE void stream(double* p, V<double> v) { __builtin_ia32_movntpd512(p, v); }
SB_INLINE void stream_fence() { __builtin_ia32_sfence(); }
#elif defined(__x86_64__) && SB_VECTOR_BYTES == 32
constexpr bool CAN_STREAM = true;
SB_INLINE void stream(float* p, V<float> v) { __builtin_ia32_movntps256(p, v); }
SB_INLINE void stream(double* p, V<double> v) { __builtin_ia32_movntpd256(p, v); }
SB_INLINE void stream_fence() { __builtin_ia32_sfence(); }
#else
constexpr bool CAN_STREAM = false;
template <class T>
SB_INLINE void stream(T* p, V<T> v) {
  store(p, v);
}
SB_INLINE void stream_fence() {}
#endif
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

// Whether `bytes` written to p should go past the caches: more than the second-level caches hold.
SB_INLINE bool should_stream(const void* p, int64_t bytes) {
  return CAN_STREAM && bytes >= (int64_t(4) << 20) && reinterpret_cast<uintptr_t>(p) % LINE == 0;
}

// Lane i is p[index[i]]. Only where it is faster than one load after the other.
#if defined(__x86_64__) && SB_VECTOR_BYTES == 64
constexpr bool CAN_GATHER = true;
SB_INLINE V<float> gather_lanes(const float* p, const int32_t* index) {
  return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), __mmask16(-1), _mm512_loadu_si512(index), p, 4);
}
SB_INLINE V<double> gather_lanes(const double* p, const int32_t* index) {
  return _mm512_mask_i32gather_pd(_mm512_setzero_pd(), __mmask8(-1),
                                  _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index)), p, 8);
}
#else
constexpr bool CAN_GATHER = false;
template <class T>
SB_INLINE V<T> gather_lanes(const T* p, const int32_t* index) {
  V<T> v{};
  for (int i = 0; i < Vec<T>::n; ++i) v[i] = p[index[i]];
  return v;
}
#endif

// Bit i: lane i is not zero. NaN counts as nonzero.
#if defined(__x86_64__) && SB_VECTOR_BYTES == 64
template <class T>
SB_INLINE uint32_t nonzero_lanes(V<T> v) {
  if constexpr (sizeof(T) == 4)
    return _mm512_cmp_ps_mask(v, V<T>{}, _CMP_NEQ_UQ);
  else
    return _mm512_cmp_pd_mask(v, V<T>{}, _CMP_NEQ_UQ);
}
#elif defined(__x86_64__) && SB_VECTOR_BYTES == 32
template <class T>
SB_INLINE uint32_t nonzero_lanes(V<T> v) {
  if constexpr (sizeof(T) == 4)
    return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(v, V<T>{}, _CMP_NEQ_UQ)));
  else
    return uint32_t(_mm256_movemask_pd(_mm256_cmp_pd(v, V<T>{}, _CMP_NEQ_UQ)));
}
#elif defined(__x86_64__)
template <class T>
SB_INLINE uint32_t nonzero_lanes(V<T> v) {
  if constexpr (sizeof(T) == 4)
    return uint32_t(_mm_movemask_ps(_mm_cmpneq_ps(v, V<T>{})));
  else
    return uint32_t(_mm_movemask_pd(_mm_cmpneq_pd(v, V<T>{})));
}
#else
template <class T>
SB_INLINE uint32_t nonzero_lanes(V<T> v) {
  uint32_t bits = 0;
  for (int i = 0; i < Vec<T>::n; ++i) bits |= uint32_t(v[i] != T(0)) << i;
  return bits;
}
#endif

// Keeps v in a register where it is used twice: compilers like to load it twice instead.
template <class T>
SB_INLINE void in_register(V<T>& v) {
#if defined(__x86_64__) && SB_VECTOR_BYTES == 64
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
}

template <class T>
SB_INLINE V<T> splat(T s) {
  return s - V<T>{};  // folds to one broadcast
}

template <class T>
SB_INLINE V<T> zero() {
  return V<T>{};
}

// Lane j of low<B> / high<B>: the block of B lanes that j belongs to comes from a where j & B is 0, else from b.
// They are the two halves of one butterfly stage, used by the transpose and by the grouped reduction.
template <int B, class T, size_t... J>
SB_INLINE V<T> low_stage(V<T> a, V<T> b, std::index_sequence<J...>) {
  constexpr int n = Vec<T>::n;
#if defined(__clang__)
  return __builtin_shufflevector(a, b, ((J & B) ? int(n + J - B) : int(J))...);
#else
  return __builtin_shuffle(a, b, (typename Vec<T>::index){((J & B) ? int(n + J - B) : int(J))...});
#endif
}

template <int B, class T, size_t... J>
SB_INLINE V<T> high_stage(V<T> a, V<T> b, std::index_sequence<J...>) {
  constexpr int n = Vec<T>::n;
#if defined(__clang__)
  return __builtin_shufflevector(a, b, ((J & B) ? int(n + J) : int(J + B))...);
#else
  return __builtin_shuffle(a, b, (typename Vec<T>::index){((J & B) ? int(n + J) : int(J + B))...});
#endif
}

template <int B, class T>
SB_INLINE V<T> low(V<T> a, V<T> b) {
  return low_stage<B, T>(a, b, std::make_index_sequence<Vec<T>::n>{});
}

template <int B, class T>
SB_INLINE V<T> high(V<T> a, V<T> b) {
  return high_stage<B, T>(a, b, std::make_index_sequence<Vec<T>::n>{});
}

// In-register transpose of an n x n block held as n vectors.
template <class T, int B = Vec<T>::n / 2>
SB_INLINE void transpose(V<T>* a) {
  if constexpr (B > 0) {
    for (int i = 0; i < Vec<T>::n; ++i) {
      if (i & B) continue;
      V<T> x = a[i], y = a[i + B];
      a[i] = low<B, T>(x, y);
      a[i + B] = high<B, T>(x, y);
    }
    transpose<T, B / 2>(a);
  }
}

// Lane i of the result is the sum of all lanes of a[i]; a is overwritten.
template <class T, int B = Vec<T>::n / 2>
SB_INLINE V<T> sum_each(V<T>* a) {
  if constexpr (B == 0) {
    return a[0];
  } else {
    for (int i = 0; i < B; ++i) a[i] = low<B, T>(a[i], a[i + B]) + high<B, T>(a[i], a[i + B]);
    return sum_each<T, B / 2>(a);
  }
}

template <class T>
SB_INLINE T sum_lanes(V<T> v) {
  T part[Vec<T>::n];
  store(part, v);
  for (int half = Vec<T>::n / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  return part[0];
}
