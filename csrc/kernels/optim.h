// The optimizers' inner loops. No include guard: see isa/kernels.inc.

template <class A>
using Gradient = decltype(A::g);

// Calls masked or plain(a, gradient of the first weight, begin, count) piece by piece: a piece of all arrays fits into
// a first-level cache. Of a gradient in factors some rows are made first, in scratch. What is to be gathered of a row
// is gathered once it was moved; says whether all of it stood in the index.
template <class A>
bool in_pieces(const A& a, void (*masked)(const A&, Gradient<A>, int64_t, int64_t),
               void (*plain)(const A&, Gradient<A>, int64_t, int64_t)) {
  using T = std::decay_t<decltype(*a.p)>;
  const int64_t piece = 1024;
  const auto move = [&](Gradient<A> g, int64_t begin, int64_t n) {
    for (int64_t k = 0; k < n; k += piece)
      (a.active ? masked : plain)(a, g ? g + k : nullptr, begin + k, least(piece, n - k));
  };
  if (!a.factors && !a.gather) {
#pragma omp parallel for num_threads(a.threads) if (a.threads > 1) schedule(static)
    for (int64_t k = 0; k < a.n; k += piece) move(a.g ? a.g + k : nullptr, k, least(piece, a.n - k));
    return true;
  }
  const int64_t cols = a.factors ? a.factors->cols : a.gather->index->cols, rows = a.n / most<int64_t>(1, cols);
  const int64_t group = most<int64_t>(1, piece / most<int64_t>(1, cols));  // rows of about a piece
  const int64_t step = a.factors ? rows_at_once(*a.factors, a.threads) : group;
  const TeamScratch<T> gradients(slot_source, a.threads, a.factors ? size_t(step * cols) : 0);
  bool inside = true;
#pragma omp parallel for num_threads(a.threads) if (a.threads > 1) schedule(static) reduction(&& : inside)
  for (int64_t begin = 0; begin < rows; begin += step) {
    const int64_t end = least(rows, begin + step);
    Gradient<A> g = a.factors ? gradients.mine() : a.g;
    const int64_t first = a.factors ? begin : 0;
    if (a.factors) product_rows(*a.factors, begin, end, gradients.mine());
    for (int64_t r = begin; r < end; r += group) {
      const int64_t last = least(end, r + group);
      move(g ? g + (r - first) * cols : nullptr, r * cols, (last - r) * cols);
      for (int64_t i = r; a.gather && inside && i < last; ++i)
        inside = gather_row(a.p + i * cols, *a.gather->index, a.gather->marks, i, a.gather->values);
    }
  }
  return inside;
}

// yes or no, without a branch: as a conditional, compilers move what only one of them needs behind it, and what then is
// left is a loop over single weights, whose signs no processor can foresee.
template <class T>
SB_INLINE T either(bool condition, T yes, T no) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  Bits y, n;
  __builtin_memcpy(&y, &yes, sizeof(T));
  __builtin_memcpy(&n, &no, sizeof(T));
  const Bits mask = Bits(0) - Bits(condition), chosen = (y & mask) | (n & ~mask);
  T result;
  __builtin_memcpy(&result, &chosen, sizeof(T));
  return result;
}

// z shrunk by threshold. The comparisons are false for NaN, which so stays; they are a minimum and a maximum to every
// instruction set. What sleeps is exactly zero, also where z is a product that a compiler makes part of the difference,
// whose rounding would be left.
template <class T>
SB_INLINE T shrunk(T z, T threshold) {
  T part = threshold < z ? threshold : z;
  part = -threshold > part ? -threshold : part;
  return either(part == z, T(0), z - part);
}

// Zero for subnormal numbers, with which CPUs are a hundred times slower: where gradients stay away, as behind units
// that died, momentum decays into them within some hundred steps.
template <class T>
SB_INLINE T normal(T x) {
  constexpr T least_normal = std::numeric_limits<T>::min();
  return x < least_normal && x > -least_normal ? T(0) : x;
}

// One linearized Bregman step with the proximal map of threshold * |.|_1 (threshold 0: none), in one pass:
// g' = sign * g + decay * p;  m = beta * m + (1 - beta) * lr * g';  v -= m (without m: v -= lr * g');
// p = shrink(delta * v, delta * lam). What is not active stands still.
template <class T, bool MASKED>
void linbreg_piece(const StepArgs<T>& a, const T* __restrict g, int64_t begin, int64_t n) {
  const T lr = T(a.lr), beta = T(a.beta), gain = T((1 - a.beta) * a.lr), delta = T(a.delta);
  const T threshold = T(a.delta * a.lam), decay = T(a.weight_decay), sign = T(a.sign);
  T* __restrict p = a.p + begin;
  T* __restrict v = a.v + begin;
  const uint8_t* __restrict active = MASKED ? a.active + begin : nullptr;
  if (a.m) {
    T* __restrict m = a.m + begin;
    for (int64_t k = 0; k < n; ++k) {
      const T moved = normal(beta * m[k] + gain * (sign * g[k] + decay * p[k])), down = v[k] - moved,
              w = shrunk(delta * down, threshold);
      m[k] = MASKED ? either(active[k], moved, m[k]) : moved;
      v[k] = MASKED ? either(active[k], down, v[k]) : down;
      p[k] = MASKED ? either(active[k], w, p[k]) : w;
    }
  } else {
    for (int64_t k = 0; k < n; ++k) {
      const T down = v[k] - lr * (sign * g[k] + decay * p[k]), w = shrunk(delta * down, threshold);
      v[k] = MASKED ? either(active[k], down, v[k]) : down;
      p[k] = MASKED ? either(active[k], w, p[k]) : w;
    }
  }
}

template <class T>
bool linbreg_step(const StepArgs<T>& a) {
  return in_pieces(a, linbreg_piece<T, true>, linbreg_piece<T, false>);
}

// v and p after lam of the L1 norm has changed to a.lam. What stays active keeps its weight: v = p / delta +- lam. What
// does not falls asleep with its v, and what would wake by the change is held at the bound.
template <class T>
void l1_shift_piece(const StepArgs<T>& a, const T*, int64_t begin, int64_t n) {
  const T delta = T(a.delta), scale = T(1 / a.delta), lam = T(a.lam), threshold = T(a.delta * a.lam);
  T* __restrict p = a.p + begin;
  T* __restrict v = a.v + begin;
  for (int64_t k = 0; k < n; ++k) {
    const T weight = p[k], dual = v[k], beyond = shrunk(delta * dual, threshold);
    const T w = either(beyond != T(0), weight, T(0));
    v[k] = either(w != T(0), scale * w + either(w > T(0), lam, -lam), dual - scale * beyond);
    p[k] = w;
  }
}

template <class T>
bool l1_shift(const StepArgs<T>& a) {
  return in_pieces(a, l1_shift_piece<T>, l1_shift_piece<T>);
}

// One adaptive linearized Bregman step: g' = sign * g (+ decay * p, or decoupled: v -= lr * decay * p);
// m = lerp(m, g', 1 - beta1);  s = beta2 * s + (1 - beta2) * g'^2;  v -= lr * (m / correction1) /
// (sqrt(s / correction2) + eps);  then as above.
template <class T, bool MASKED>
void adabreg_piece(const AdaStepArgs<T>& a, const T* __restrict g, int64_t begin, int64_t n) {
  const T step = T(a.lr / a.correction1), root = T(1 / std::sqrt(a.correction2)), eps = T(a.eps), delta = T(a.delta);
  const T keep1 = T(1 - a.beta1), beta2 = T(a.beta2), keep2 = T(1 - a.beta2), sign = T(a.sign),
          threshold = T(a.delta * a.lam);
  constexpr T least_normal = std::numeric_limits<T>::min();
  const T coupled = T(a.decoupled ? 0 : a.weight_decay), apart = T(a.decoupled ? a.lr * a.weight_decay : 0);
  T* __restrict p = a.p + begin;
  T* __restrict v = a.v + begin;
  T* __restrict m = a.m + begin;
  T* __restrict s = a.s + begin;
  const uint8_t* __restrict active = MASKED ? a.active + begin : nullptr;
  for (int64_t k = 0; k < n; ++k) {
    const T grad = sign * g[k] + coupled * p[k];
    const T mean = normal(m[k] + keep1 * (grad - m[k])), decayed = beta2 * s[k] + keep2 * (grad * grad);
    const T square = decayed < least_normal ? least_normal : decayed;  // not zero, which eps = 0 would divide by
    const T moved = v[k] - apart * p[k] - step * mean / (std::sqrt(square) * root + eps);
    m[k] = MASKED ? either(active[k], mean, m[k]) : mean;
    s[k] = MASKED ? either(active[k], square, s[k]) : square;
    const T w = shrunk(delta * moved, threshold);
    v[k] = MASKED ? either(active[k], moved, v[k]) : moved;
    p[k] = MASKED ? either(active[k], w, p[k]) : w;
  }
}

template <class T>
bool adabreg_step(const AdaStepArgs<T>& a) {
  return in_pieces(a, adabreg_piece<T, true>, adabreg_piece<T, false>);
}

// One proximal gradient step: g' = sign * g + decay * p;  m = beta * m + g' (without m: m = g');
// p = p - lr * m shrunk by lr * lam. There is no v.
template <class T, bool MASKED>
void proxsgd_piece(const StepArgs<T>& a, const T* __restrict g, int64_t begin, int64_t n) {
  const T lr = T(a.lr), beta = T(a.beta), threshold = T(a.lr * a.lam), decay = T(a.weight_decay), sign = T(a.sign);
  T* __restrict p = a.p + begin;
  const uint8_t* __restrict active = MASKED ? a.active + begin : nullptr;
  if (a.m) {
    T* __restrict m = a.m + begin;
    for (int64_t k = 0; k < n; ++k) {
      const T moved = normal(beta * m[k] + (sign * g[k] + decay * p[k])), w = shrunk(p[k] - lr * moved, threshold);
      m[k] = MASKED ? either(active[k], moved, m[k]) : moved;
      p[k] = MASKED ? either(active[k], w, p[k]) : w;
    }
  } else {
    for (int64_t k = 0; k < n; ++k) {
      const T w = shrunk(p[k] - lr * (sign * g[k] + decay * p[k]), threshold);
      p[k] = MASKED ? either(active[k], w, p[k]) : w;
    }
  }
}

template <class T>
bool proxsgd_step(const StepArgs<T>& a) {
  return in_pieces(a, proxsgd_piece<T, true>, proxsgd_piece<T, false>);
}
