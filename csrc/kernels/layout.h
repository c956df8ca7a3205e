// Copies between plain tensors and the lane layout. No include guard: see isa/kernels.inc.

// A remainder of at least this many elements is copied with one masked vector, not element by element.
constexpr int64_t TAIL = CAN_MASK ? 3 : INT64_MAX;

// dst[p*dst_step + lane] = src[lane*image + p] for p < len, lane < images; the other lanes are zero.
template <class T>
void pack_rows(const T* src, ptrdiff_t image, int images, int64_t len, T* dst, ptrdiff_t dst_step) {
  constexpr int n = Vec<T>::n;
  for (int part = 0; part < LANES; part += n) {
    const int live = most(0, least(n, images - part));
    const T* s = src + part * image;
    int64_t p = 0;
    for (; p + n <= len; p += n) {
      V<T> a[n];
      if (live == n) {
        for (int i = 0; i < n; ++i) a[i] = load(s + i * image + p);
      } else {
        for (int i = 0; i < n; ++i) a[i] = i < live ? load(s + i * image + p) : zero<T>();
      }
      transpose<T>(a);
      for (int i = 0; i < n; ++i) store(dst + (p + i) * dst_step + part, a[i]);
    }
    if (len - p >= TAIL) {
      const int rest = int(len - p);
      V<T> a[n];
      for (int i = 0; i < n; ++i) a[i] = i < live ? load_first(s + i * image + p, rest) : zero<T>();
      transpose<T>(a);
      for (int i = 0; i < rest; ++i) store(dst + (p + i) * dst_step + part, a[i]);
      continue;
    }
    for (; p < len; ++p)
      for (int i = 0; i < n; ++i) dst[p * dst_step + part + i] = i < live ? s[i * image + p] : T(0);
  }
}

template <class T>
SB_INLINE void store_or_stream(T* p, V<T> v, bool past_the_caches) {
  if (CAN_STREAM && past_the_caches)
    stream(p, v);
  else
    store(p, v);
}

// dst[lane*image + p] = src[p*src_step + lane] for p < len, lane < images. past_the_caches: non-temporal stores, for
// whole cache lines.
template <class T>
void unpack_rows(const T* src, ptrdiff_t src_step, int64_t len, T* dst, ptrdiff_t image, int images,
                 bool past_the_caches = false) {
  constexpr int n = Vec<T>::n, line = LINE / int(sizeof(T));
  past_the_caches = CAN_STREAM && past_the_caches && image % line == 0 && reinterpret_cast<uintptr_t>(dst) % LINE == 0;
  for (int part = 0; part < images; part += n) {
    const int live = least(n, images - part);
    T* d = dst + part * image;
    int64_t p = 0;
    for (; past_the_caches && p + line <= len; p += line) {
      V<T> a[LINE_PARTS][n];
      for (int h = 0; h < LINE_PARTS; ++h) {
        for (int i = 0; i < n; ++i) a[h][i] = load(src + (p + h * n + i) * src_step + part);
        transpose<T>(a[h]);
      }
      for (int i = 0; i < live; ++i)
        for (int h = 0; h < LINE_PARTS; ++h) stream(d + i * image + p + h * n, a[h][i]);
    }
    for (; p + n <= len; p += n) {
      V<T> a[n];
      for (int i = 0; i < n; ++i) a[i] = load(src + (p + i) * src_step + part);
      transpose<T>(a);
      for (int i = 0; i < live; ++i) store(d + i * image + p, a[i]);
    }
    if (len - p >= TAIL) {
      const int rest = int(len - p);
      V<T> a[n];
      for (int i = 0; i < n; ++i) a[i] = i < rest ? load(src + (p + i) * src_step + part) : zero<T>();
      transpose<T>(a);
      for (int i = 0; i < live; ++i) store_first(d + i * image + p, a[i], rest);
      continue;
    }
    for (; p < len; ++p)
      for (int i = 0; i < live; ++i) d[i * image + p] = src[p * src_step + part + i];
  }
}

// Copies `len` positions of LANES, `step` elements apart in src; lanes from `images` on become zero.
template <class T>
void copy_lanes(const T* src, ptrdiff_t step, int images, int64_t len, T* dst) {
  constexpr int n = Vec<T>::n;
  for (int64_t p = 0; p < len; ++p)
    for (int part = 0; part < LANES; part += n) store(dst + p * LANES + part, load(src + p * step + part));
  if (images < LANES)
    for (int64_t p = 0; p < len; ++p)
      for (int i = images; i < LANES; ++i) dst[p * LANES + i] = T(0);
}

// Addresses in a tensor of C channels and `plane` positions: channel c, position p of image block nb begins at `at`.
struct Walk {
  Layout layout;
  int64_t C, plane;
  int64_t at(int64_t nb, int64_t c, int64_t p) const {
    if (layout == Layout::lanes) return ((nb * C + c) * plane + p) * LANES;
    return nb * LANES * C * plane + (layout == Layout::plain ? c * plane + p : p * C + c);
  }
  int64_t image() const { return C * plane; }
};

// Writes src[(c - c0) * src_channel + i * LANES + lane] to positions [p, p + len) of channels [c0, c1) of image block
// nb in a plain or channels_last tensor.
template <class T>
void write_block(const Walk& w, T* data, int64_t nb, int images, int64_t c0, int64_t c1, int64_t p, int64_t len,
                 const T* src, int64_t src_channel, bool past_the_caches) {
  if (w.layout == Layout::channels_last) {
    for (int64_t i = 0; i < len; ++i)
      unpack_rows(src + i * LANES, src_channel, c1 - c0, data + w.at(nb, c0, p + i), w.image(), images,
                  past_the_caches);
    return;
  }
  for (int64_t c = c0; c < c1; ++c, src += src_channel)
    unpack_rows(src, LANES, len, data + w.at(nb, c, p), w.image(), images, past_the_caches);
}

template <class T>
void clear(T* dst, int64_t count) {  // count is a multiple of LANES
  for (int64_t i = 0; i < count; i += Vec<T>::n) store(dst + i, zero<T>());
}

template <class T>
void pack(const PackArgs<T>& a) {
  const int64_t L = a.C * a.P, blocks = div_up(a.N, LANES);
  const int64_t step = most<int64_t>(LANES, 4096), pieces = div_up(L, step);
#pragma omp parallel for num_threads(a.threads) if (a.threads > 1) schedule(static)
  for (int64_t t = 0; t < blocks * pieces; ++t) {
    const int64_t b = t / pieces, p = t % pieces * step;
    pack_rows(a.src + b * LANES * L + p, L, int(least<int64_t>(LANES, a.N - b * LANES)), least(step, L - p),
              a.dst + (b * L + p) * LANES, LANES);
  }
}

template <class T>
void unpack(const PackArgs<T>& a) {
  const int64_t L = a.C * a.P, blocks = div_up(a.N, LANES);
  const int64_t step = most<int64_t>(LANES, 4096), pieces = div_up(L, step);
  const bool past_the_caches = should_stream(a.dst, a.N * L * int64_t(sizeof(T)));
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < blocks * pieces; ++t) {
      const int64_t b = t / pieces, p = t % pieces * step;
      unpack_rows(a.src + (b * L + p) * LANES, LANES, least(step, L - p), a.dst + b * LANES * L + p, L,
                  int(least<int64_t>(LANES, a.N - b * LANES)), past_the_caches);
    }
    stream_fence();
  }
}
