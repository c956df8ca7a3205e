// Bands, the working copies of sparse 2-D convolution. No include guard: see isa/kernels.inc.
//
// Every product is a stencil over a *band*: a few rows of the source, copied once into a thread's scratch, in the lane
// layout, with the zero border. For strides above one, rows and columns are sorted by phase, their remainder modulo the
// stride. In the band a nonzero is a single offset and every load is aligned and contiguous; borders, strides and
// dilation cost no branch.

struct Band {
  int C, H, W;  // the source image
  int SY, SX;   // source stride between neighbouring destinations
  int OY, OX;   // band row q of phase p, first destination row `row`: source row (row + q) * SY + ry[p] + OY
  int NY, NX;   // phases in use
  const int* ry;
  const int* rx;
  int rows, RB, CB;  // destination rows a band serves; rows and columns of the band for one phase
  int64_t channel;   // elements between channels
};

// What is applied to the source while it is copied into a band: nothing, a batch norm (scale, shift, relu: x_scale,
// x_shift, x_relu of ConvArgs) or, for grad_y, the gradient of one (back: y_norm of ConvArgs).
template <class T>
struct Passage {
  const T* scale = nullptr;
  const T* shift = nullptr;
  bool relu = false;
  const NormArgs<T>* back = nullptr;
};

// copy_lanes with the batch norm of one channel.
template <class T>
void norm_lanes(const T* src, ptrdiff_t step, int images, int64_t len, T* dst, const Passage<T>& norm, int channel) {
  const V<T> scale = splat<T>(norm.scale[channel]), shift = splat<T>(norm.shift[channel]);
  for (int part = 0; part < LANES; part += Vec<T>::n) {
    const typename Vec<T>::index exists = lane_mask<T>(images, part);
    for (int64_t p = 0; p < len; ++p) {
      const V<T> v = normed<T>(load(src + p * step + part), scale, shift);
      store(dst + p * LANES + part, exists ? norm.relu ? rectified<T>(v) : v : zero<T>());
    }
  }
}

// Fills the band of channels [c0, c1) of image block `nb` whose first destination row is `row0`. line: room for
// RB * SY + SY source rows of one channel.
template <class T>
void fill_band(const Band& b, const T* data, Layout layout, int64_t N, int64_t nb, int row0, int c0, int c1, T* band,
               T* line, const Passage<T>& pass = {}) {
  const int images = int(least<int64_t>(LANES, N - nb * LANES));
  const int64_t plane = int64_t(b.H) * b.W, image = int64_t(b.C) * plane;
  const T* src = data + nb * LANES * image;
  const bool direct = layout == Layout::plain && b.SX == 1 && b.W % Vec<T>::n == 0;
  // Source rows [first, last) lie in this band. Where they cannot be packed straight into place (`direct`), all rows of
  // a channel are first packed into `line`.
  const int first = most(0, row0 * b.SY + b.OY);
  const int last = least(b.H, (row0 + b.RB - 1) * b.SY + b.OY + b.SY);
  const Walk walk{layout, b.C, plane};
  for (int c = c0; c < c1; ++c) {
    const T* from = line;
    ptrdiff_t origin = first;
    if (layout == Layout::lanes) {
      from = src + c * plane * LANES;
      origin = 0;
    } else if (layout == Layout::plain && !direct && last > first) {
      pack_rows(src + c * plane + int64_t(first) * b.W, image, images, int64_t(last - first) * b.W, line, LANES);
    }
    for (int py = 0; py < b.NY; ++py)
      for (int px = 0; px < b.NX; ++px) {
        T* plane_dst = band + c * b.channel + int64_t(py * b.NX + px) * b.RB * b.CB * LANES;
        // Columns [m0, m1) of the band lie inside the source.
        const int x0 = b.rx[px] + b.OX;
        const int m0 = x0 >= 0 ? 0 : least(b.CB, int(div_up(-x0, b.SX)));
        const int m1 = most(m0, least(b.CB, x0 >= b.W ? 0 : int(div_up(b.W - x0, b.SX))));
        for (int q = 0; q < b.RB; ++q) {
          T* dst = plane_dst + int64_t(q) * b.CB * LANES;
          const int iy = (row0 + q) * b.SY + b.ry[py] + b.OY;
          if (iy < 0 || iy >= b.H) {
            clear(dst, int64_t(b.CB) * LANES);
            continue;
          }
          clear(dst, int64_t(m0) * LANES);
          clear(dst + int64_t(m1) * LANES, int64_t(b.CB - m1) * LANES);
          const int ix = x0 + m0 * b.SX;
          if (layout == Layout::channels_last) {
            // All channels of a position at once, in the first channel's iteration.
            if (c != c0) continue;
            for (int m = m0; m < m1; ++m)
              pack_rows(data + walk.at(nb, c0, int64_t(iy) * b.W + x0 + m * b.SX), image, images, c1 - c0,
                        dst + m * LANES, b.channel);
          } else if (direct)
            pack_rows(src + c * plane + int64_t(iy) * b.W + ix, image, images, m1 - m0, dst + m0 * LANES, LANES);
          else if (pass.back)
            norm_grad_lanes(*pass.back, nb * b.C + c, int64_t(iy) * b.W + ix, images, m1 - m0, dst + m0 * LANES);
          else if (pass.scale)
            norm_lanes(from + (int64_t(iy) * b.W + ix) * LANES, ptrdiff_t(b.SX) * LANES, images, m1 - m0,
                       dst + m0 * LANES, pass, c);
          else
            copy_lanes(from + ((iy - origin) * b.W + ix) * LANES, ptrdiff_t(b.SX) * LANES,
                       layout == Layout::lanes ? images : LANES, m1 - m0, dst + m0 * LANES);
        }
      }
  }
}
