// The gradient of all weights of a linear layer, where many entries of grad_y are zero, as they are behind a ReLU.
// Included inside an instruction set's namespace; no include guard.
//
// A row of the gradient is a sum of samples of x, and only of those that the row's output passed a gradient to. The
// sums of a row and a strip of columns stay in registers while these samples pass by; the strip of x stays in the
// first-level cache while some rows do. A nonzero costs as much as an entry costs a dense product, or little more.

constexpr int STRIP = 64;         // columns
constexpr int SAMPLES = 64;       // of which nonzeros are listed, and summed, at a time: a strip of them has 16 KB
constexpr int ROWS_AT_ONCE = 32;  // that a strip is used for
// Of grad_y, above which a dense product is as fast: the lists have to be made, and x to be copied.
constexpr double MOST_NONZEROS = 0.6;

// The nonzeros of a block of samples, by rows: that of row r number k < count[r] is value[r * SAMPLES + k], of sample
// place[r * SAMPLES + k] / STRIP.
template <class T>
struct SampleLists {
  int32_t* count;
  int32_t* place;
  T* value;
};

// Rows [r0, r1), at most LANES, of the lists; from grad_y (N, rows) for samples [n0, n1).
template <class T>
void list_samples(const T* grad_y, int64_t rows, int64_t n0, int64_t n1, int64_t r0, int64_t r1,
                  const SampleLists<T>& to) {
  alignas(64) T turned[LANES * SAMPLES];
  for (int l = 0; l < SAMPLES; l += LANES) {
    const int64_t n = n0 + l;
    const int images = int(most<int64_t>(0, least<int64_t>(LANES, n1 - n)));
    pack_rows(images ? grad_y + n * rows + r0 : grad_y, rows, images, r1 - r0, turned + l, SAMPLES);
  }
  for (int64_t r = r0; r < r1; ++r) {
    const T* g = turned + (r - r0) * SAMPLES;
    int32_t* place = to.place + r * SAMPLES;
    T* value = to.value + r * SAMPLES;
    uint64_t left = nonzero_word<T>(g);
    to.count[r] = __builtin_popcountll(left);
    for (; left; left &= left - 1) {
      const int n = __builtin_ctzll(left);
      *place++ = n * STRIP;
      *value++ = g[n];
    }
  }
}

// x (N, cols) to [strips][N][STRIP], zero beyond cols.
template <class T>
void pack_strip(const T* x, int64_t N, int64_t cols, int64_t strip, T* strips) {
  const int64_t c0 = strip * STRIP, wide = least<int64_t>(STRIP, cols - c0);
  T* dst = strips + strip * N * STRIP;
  for (int64_t n = 0; n < N; ++n, dst += STRIP) {
    const T* src = x + n * cols + c0;
    for (int64_t i = 0; i < wide; ++i) dst[i] = src[i];
    for (int64_t i = wide; i < STRIP; ++i) dst[i] = T(0);
  }
}

// sums[0..S registers) = (ADD: +=) sum of value[k] * x[place[k]] over the listed samples.
template <class T, int S, bool ADD>
SB_INLINE void sum_samples(const T* x, const int32_t* place, const T* value, int32_t count, T* sums) {
  constexpr int n = Vec<T>::n, CHAINS = S < 8 ? 2 : 1;  // enough sums to keep the multipliers busy
  V<T> acc[CHAINS][S];
  for (int u = 0; u < CHAINS; ++u)
    for (int s = 0; s < S; ++s) acc[u][s] = ADD && u == 0 ? load(sums + s * n) : zero<T>();
  int32_t k = 0;
  for (; k + CHAINS <= count; k += CHAINS)
    for (int u = 0; u < CHAINS; ++u) {
      const T* p = x + place[k + u];
      const V<T> v = splat<T>(value[k + u]);
      for (int s = 0; s < S; ++s) acc[u][s] += v * load(p + s * n);
    }
  for (; k < count; ++k) {
    const V<T> v = splat<T>(value[k]);
    for (int s = 0; s < S; ++s) acc[0][s] += v * load(x + place[k] + s * n);
  }
  for (int s = 0; s < S; ++s) {
    for (int u = 1; u < CHAINS; ++u) acc[0][s] += acc[u][s];
    store(sums + s * n, acc[0][s]);
  }
}

// A row of a strip; as much of it at once as there are registers for.
template <class T, bool ADD>
SB_INLINE void sum_row(const T* x, const SampleLists<T>& lists, int64_t r, T* sums) {
  constexpr int all = STRIP / Vec<T>::n, S = all < 8 ? all : 8;
  for (int i = 0; i < STRIP; i += S * Vec<T>::n)
    sum_samples<T, S, ADD>(x + i, lists.place + r * SAMPLES, lists.value + r * SAMPLES, lists.count[r], sums + i);
}

// grad_weight (rows x cols) = grad_yᵀ x. False, and nothing is written, where a dense product is as fast.
template <class T>
bool weight_grad(const WeightGradArgs<T>& a) {
  const int64_t size = a.N * a.rows;
  int64_t nonzeros = 0;
#pragma omp parallel for num_threads(a.threads) if (a.threads > 1) schedule(static) reduction(+ : nonzeros)
  for (int64_t n = 0; n < a.N; ++n) {
    int64_t own = 0;
    for (int64_t r = 0; r < a.rows; ++r) own += a.grad_y[n * a.rows + r] != T(0);
    nonzeros += own;
  }
  if (size == 0 || double(nonzeros) > MOST_NONZEROS * double(size)) return false;
  const int64_t blocks = div_up(a.N, SAMPLES), strips = div_up(a.cols, STRIP), parts = div_up(a.rows, LANES);
  const int64_t lists = blocks * a.rows;
  T* const packed = scratch<T>(slot_source, size_t(strips * a.N * STRIP));
  T* const values = scratch<T>(slot_grad, size_t(lists * SAMPLES));
  int32_t* const places = scratch<int32_t>(slot_plan, size_t(lists * (SAMPLES + 1)));
  const auto lists_of = [&](int64_t block) {
    return SampleLists<T>{places + lists * SAMPLES + block * a.rows, places + block * a.rows * SAMPLES,
                          values + block * a.rows * SAMPLES};
  };
  const int64_t groups = div_up(a.rows, ROWS_AT_ONCE);
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
#pragma omp for schedule(static) nowait
    for (int64_t s = 0; s < strips; ++s) pack_strip(a.x, a.N, a.cols, s, packed);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < blocks * parts; ++i) {
      const int64_t block = i / parts, n0 = block * SAMPLES, r0 = i % parts * LANES;
      list_samples(a.grad_y, a.rows, n0, least(a.N, n0 + SAMPLES), r0, least(a.rows, r0 + LANES), lists_of(block));
    }
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < groups * strips; ++i) {
      const int64_t g = i / strips, s = i % strips, r1 = least(a.rows, (g + 1) * ROWS_AT_ONCE);
      alignas(64) T sums[ROWS_AT_ONCE * STRIP];
      const int64_t c0 = s * STRIP, wide = least<int64_t>(STRIP, a.cols - c0);
      // Whole rows of strips are written where they belong at once.
      const bool direct = wide == STRIP;
      for (int64_t block = 0; block == 0 || block < blocks; ++block) {
        const T* x = packed + (s * a.N + block * SAMPLES) * STRIP;
        for (int64_t r = g * ROWS_AT_ONCE; r < r1; ++r) {
          T* to = direct ? a.grad_weight + r * a.cols + c0 : sums + (r - g * ROWS_AT_ONCE) * STRIP;
          block ? sum_row<T, true>(x, lists_of(block), r, to) : sum_row<T, false>(x, lists_of(block), r, to);
        }
      }
      for (int64_t r = g * ROWS_AT_ONCE; !direct && r < r1; ++r)
        for (int64_t c = 0; c < wide; ++c)
          a.grad_weight[r * a.cols + c0 + c] = sums[(r - g * ROWS_AT_ONCE) * STRIP + c];
    }
  }
  return true;
}
