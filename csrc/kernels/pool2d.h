// Max pooling over the lane layout. No include guard: see isa/kernels.inc.

// Which tap won is kept as one byte a sample, ky * KW + kx: an eighth of the 64-bit positions that torch keeps.
template <class T>
struct Codes {
  static constexpr int n = Vec<T>::n;
  typedef uint8_t type __attribute__((vector_size(n), aligned(1), may_alias));
};

// The maximum over taps [ky0, ky1) x [kx0, kx1) of the window whose tap (0, 0) is at `window`. With the sizes known to
// the compiler (KH, KW above 0) all taps are taken.
template <class T, int KH, int KW>
SB_INLINE void max_window(const PoolArgs<T>& a, const T* window, int ky0, int ky1, int kx0, int kx1, T* y,
                          uint8_t* codes) {
  constexpr int n = Vec<T>::n;
  using I = typename Vec<T>::index;
  const int kw = KW ? KW : a.KW;
  if (KH) ky0 = kx0 = 0, ky1 = KH, kx1 = KW;
  const ptrdiff_t row_step = ptrdiff_t(KH ? 1 : a.DH) * a.W * LANES, col_step = ptrdiff_t(KW ? 1 : a.DW) * LANES;
  for (int part = 0; part < LANES; part += n) {
    const T* from = window + part;
    V<T> best = load(from + ky0 * row_step + kx0 * col_step);
    I code = I{} + (ky0 * kw + kx0);
    for (int ky = ky0; ky < ky1; ++ky)
      for (int kx = kx0; kx < kx1; ++kx) {
        if (ky == ky0 && kx == kx0) continue;
        const V<T> v = load(from + ky * row_step + kx * col_step);
        const I wins = I(v > best) | I(v != v);
        best = wins ? v : best;
        code = wins ? I{} + (ky * kw + kx) : code;
      }
    store(y + part, best);
    *reinterpret_cast<typename Codes<T>::type*>(codes + part) = __builtin_convertvector(code, typename Codes<T>::type);
  }
}

// y[p][oy][ox] = max over the window's taps inside of the image, codes the first tap that has it; NaN wins.
template <class T>
void max_pool_forward(const PoolArgs<T>& a) {
  const bool two = a.KH == 2 && a.KW == 2 && a.DH == 1 && a.DW == 1;
#pragma omp parallel for num_threads(a.threads) if (a.threads > 1) schedule(static)
  for (int64_t p = 0; p < a.planes; ++p) {
    const T* x = a.x + p * a.H * a.W * LANES;
    T* y = a.y + p * a.OH * a.OW * LANES;
    uint8_t* codes = a.codes + p * a.OH * a.OW * LANES;
    for (int oy = 0; oy < a.OH; ++oy) {
      const int iy0 = oy * a.SH - a.PH;
      const int ky0 = iy0 >= 0 ? 0 : int(div_up(-iy0, a.DH)), ky1 = least(a.KH, int(div_up(a.H - iy0, a.DH)));
      for (int ox = 0; ox < a.OW; ++ox, y += LANES, codes += LANES) {
        const int ix0 = ox * a.SW - a.PW;
        const int kx0 = ix0 >= 0 ? 0 : int(div_up(-ix0, a.DW)), kx1 = least(a.KW, int(div_up(a.W - ix0, a.DW)));
        const T* window = x + (int64_t(iy0) * a.W + ix0) * LANES;
        if (two && ky0 == 0 && ky1 == 2 && kx0 == 0 && kx1 == 2)
          max_window<T, 2, 2>(a, window, 0, 2, 0, 2, y, codes);
        else
          max_window<T, 0, 0>(a, window, ky0, ky1, kx0, kx1, y, codes);
      }
    }
  }
}

// grad_x[p][iy][ix] = sum of grad_y over the windows that this position won.
template <class T>
void max_pool_backward(const PoolArgs<T>& a) {
  constexpr int n = Vec<T>::n;
  using I = typename Vec<T>::index;
  // Windows side by side: every position belongs to one of them, and nothing needs to be read back.
  const bool tiled = a.SH == a.KH && a.SW == a.KW && a.DH == 1 && a.DW == 1 && a.PH == 0 && a.PW == 0;
#pragma omp parallel for num_threads(a.threads) if (a.threads > 1) schedule(static)
  for (int64_t p = 0; p < a.planes; ++p) {
    const T* grad_y = a.grad_y + p * a.OH * a.OW * LANES;
    const uint8_t* codes = a.codes + p * a.OH * a.OW * LANES;
    T* grad_x = a.grad_x + p * a.H * a.W * LANES;
    if (!tiled || a.OH * a.SH < a.H || a.OW * a.SW < a.W) clear(grad_x, int64_t(a.H) * a.W * LANES);
    for (int oy = 0; oy < a.OH; ++oy)
      for (int ox = 0; ox < a.OW; ++ox)
        for (int part = 0; part < LANES; part += n) {
          const int64_t at = (int64_t(oy) * a.OW + ox) * LANES + part;
          const V<T> g = load(grad_y + at);
          const I code = __builtin_convertvector(*reinterpret_cast<const typename Codes<T>::type*>(codes + at), I);
          for (int ky = 0; ky < a.KH; ++ky) {
            const int iy = oy * a.SH - a.PH + ky * a.DH;
            if (iy < 0 || iy >= a.H) continue;
            for (int kx = 0; kx < a.KW; ++kx) {
              const int ix = ox * a.SW - a.PW + kx * a.DW;
              if (ix < 0 || ix >= a.W) continue;
              T* dst = grad_x + (int64_t(iy) * a.W + ix) * LANES + part;
              const V<T> share = code == I{} + (ky * a.KW + kx) ? g : zero<T>();
              store(dst, tiled ? share : load(dst) + share);
            }
          }
        }
  }
}
