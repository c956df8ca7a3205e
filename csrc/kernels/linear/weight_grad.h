// The gradient of all weights of a linear layer, where many entries of grad_y are zero, as they are behind a ReLU. No
// include guard: see isa/kernels.inc.
//
// A row of the gradient is a weighted sum of samples of x, namely of those where the row's entry of grad_y is not zero.
// The sums of a row and a strip of columns stay in registers during the loop over these samples, and the strip of x
// stays in the L1 cache during the loop over some rows. A nonzero takes about as long as an entry of a dense product.
// Samples whose entry is zero are not read: NaN and infinities in them do not count.
//
// Optimizer steps call product_rows for a few rows at a time and use these while they are in the L2 cache, so that the
// gradient is never written to memory.

template <class T>
int64_t count_nonzeros(const T* x, int64_t n, int threads) {
  const int64_t piece = 8192;
  int64_t count = 0;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static) reduction(+ : count)
  for (int64_t begin = 0; begin < n; begin += piece) {
    int32_t own = 0;
    for (int64_t i = begin; i < least(n, begin + piece); ++i) own += x[i] != T(0);
    count += own;
  }
  return count;
}

// Lists the nonzeros of grad_y in rows [r0, r1), at most LANES, and samples [n0, n1), at most GRAD_SAMPLES.
template <class T>
void list_samples(const FactorArgs<T>& a, int64_t n0, int64_t n1, int64_t r0, int64_t r1) {
  alignas(64) T turned[LANES * GRAD_SAMPLES];
  const int64_t rows = a.rows, block = n0 / GRAD_SAMPLES;
  for (int l = 0; l < GRAD_SAMPLES; l += LANES) {
    const int64_t n = n0 + l;
    const int images = int(most<int64_t>(0, least<int64_t>(LANES, n1 - n)));
    pack_rows(images ? a.grad_y + n * rows + r0 : a.grad_y, rows, images, r1 - r0, turned + l, GRAD_SAMPLES);
  }
  for (int64_t r = r0; r < r1; ++r) {
    const int64_t list = block * rows + r;
    const T* g = turned + (r - r0) * GRAD_SAMPLES;
    uint16_t* place = a.place + list * GRAD_SAMPLES;
    T* value = a.value + list * GRAD_SAMPLES;
    uint64_t left = nonzero_word<T>(g);
    a.count[list] = __builtin_popcountll(left);
    for (; left; left &= left - 1) {
      const int n = __builtin_ctzll(left);
      *place++ = uint16_t(n * GRAD_STRIP);
      *value++ = g[n];
    }
  }
}

// Copies a strip of columns of x, with zeros beyond the last column.
template <class T>
void pack_strip(const FactorArgs<T>& a, int64_t strip) {
  const int64_t c0 = strip * GRAD_STRIP, wide = least<int64_t>(GRAD_STRIP, a.cols - c0);
  T* dst = a.strips + strip * a.N * GRAD_STRIP;
  for (int64_t n = 0; n < a.N; ++n, dst += GRAD_STRIP) {
    const T* src = a.x + n * a.cols + c0;
    for (int64_t i = 0; i < wide; ++i) dst[i] = src[i];
    for (int64_t i = wide; i < GRAD_STRIP; ++i) dst[i] = T(0);
  }
}

// sums[0..S vectors) = (ADD: +=) sum of value[k] * x[place[k]] over the listed samples.
template <class T, int S, bool ADD>
SB_INLINE void sum_samples(const T* x, const uint16_t* place, const T* value, int32_t count, T* sums) {
  constexpr int n = Vec<T>::n, CHAINS = S < 8 ? 2 : 1;  // enough independent sums to hide latency
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

// One row of the gradient in a strip, over a block of samples; as many columns at once as registers allow.
template <class T, bool ADD>
SB_INLINE void sum_row(const GradFactors<T>& f, int64_t strip, int64_t block, int64_t r, T* sums) {
  constexpr int all = GRAD_STRIP / Vec<T>::n, S = all < 8 ? all : 8;
  const T* x = f.strips + (strip * f.N + block * GRAD_SAMPLES) * GRAD_STRIP;
  const int64_t list = block * f.rows + r;
  for (int i = 0; i < GRAD_STRIP; i += S * Vec<T>::n)
    sum_samples<T, S, ADD>(x + i, f.place + list * GRAD_SAMPLES, f.value + list * GRAD_SAMPLES, f.count[list],
                           sums + i);
}

// Fills the arrays of GradFactors.
template <class T>
void factor_grad(const FactorArgs<T>& a) {
  const int64_t blocks = div_up(a.N, GRAD_SAMPLES), strips = div_up(a.cols, GRAD_STRIP), parts = div_up(a.rows, LANES);
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
#pragma omp for schedule(static) nowait
    for (int64_t s = 0; s < strips; ++s) pack_strip(a, s);
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < blocks * parts; ++i) {
      const int64_t n0 = i / parts * GRAD_SAMPLES, r0 = i % parts * LANES;
      list_samples(a, n0, least(a.N, n0 + GRAD_SAMPLES), r0, least(a.rows, r0 + LANES));
    }
  }
}

// dst (r1 - r0, cols) = rows [r0, r1) of the gradient.
template <class T>
void product_rows(const GradFactors<T>& f, int64_t r0, int64_t r1, T* dst) {
  const int64_t blocks = div_up(f.N, GRAD_SAMPLES), whole = f.cols / GRAD_STRIP, rest = f.cols % GRAD_STRIP;
  // While a block of a strip is in use, the next one is prefetched, a part with every row.
  constexpr int64_t line = 64 / sizeof(T);
  const int64_t lines = least<int64_t>(GRAD_SAMPLES, f.N) * GRAD_STRIP / line, part = div_up(lines, r1 - r0) * line;
  for (int64_t s = 0; s < whole; ++s) {
    T* to = dst + s * GRAD_STRIP;
    for (int64_t block = 0; block < blocks; ++block) {
      const T* next = f.strips + (s * f.N + least(f.N, (block + 1) * GRAD_SAMPLES)) * GRAD_STRIP;
      for (int64_t r = r0; r < r1; ++r) {
        for (int64_t i = 0; i < part; i += line) __builtin_prefetch(next + (r - r0) * part + i);
        if (block == 0)
          sum_row<T, false>(f, s, 0, r, to + (r - r0) * f.cols);
        else
          sum_row<T, true>(f, s, block, r, to + (r - r0) * f.cols);
      }
    }
  }
  for (int64_t r = r0; rest && r < r1; ++r) {
    alignas(64) T sums[GRAD_STRIP];
    sum_row<T, false>(f, whole, 0, r, sums);
    for (int64_t block = 1; block < blocks; ++block) sum_row<T, true>(f, whole, block, r, sums);
    for (int64_t c = 0; c < rest; ++c) dst[(r - r0) * f.cols + whole * GRAD_STRIP + c] = sums[c];
  }
}

// Rows per call of product_rows: enough to reuse a strip in the cache, few enough to stay there, some for each thread.
template <class T>
SB_INLINE int64_t rows_at_once(const GradFactors<T>& f, int threads) {
  const int64_t fitting = (int64_t(256) << 10) / (most<int64_t>(1, f.cols) * int64_t(sizeof(T)));
  return most<int64_t>(1, least(least(most<int64_t>(fitting, 16), int64_t(64)), f.rows / (4 * threads)));
}

// grad_weight (rows x cols), whole.
template <class T>
void weight_grad(const GradFactors<T>& f, T* grad_weight, int threads) {
  const int64_t step = rows_at_once(f, threads);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t r = 0; r < f.rows; r += step) product_rows(f, r, least(f.rows, r + step), grad_weight + r * f.cols);
}
