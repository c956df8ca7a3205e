// The forward pass of sparse convolution. No include guard: see isa/kernels.inc.

// Means and sums of squared deviations of channels [r0, r1) of a task, merged from those of its first `images` lanes,
// [channel][2][LANES], which are of `count` values each.
template <class T>
void sum_lanes(const T* lanes, double count, int images, int64_t r0, int64_t r1, double* mean, double* m2) {
  for (int64_t r = r0; r < r1; ++r, lanes += 2 * LANES) {
    double s = 0, squares = 0;
    for (int i = 0; i < images; ++i) s += double(lanes[i]);
    s /= images;
    for (int i = 0; i < images; ++i) {
      const double d = double(lanes[i]) - s;
      squares += double(lanes[LANES + i]) + count * d * d;
    }
    mean[r] = s;
    m2[r] = squares;
  }
}

// y[n][oc] = bias[oc] + sum over active (ic, ky, kx) of value * x[n][ic][oy*SH + ky*DH - PH][ox*SW + kx*DW - PW].
template <class T>
void conv2d_forward(const ConvArgs<T>& a) {
  if (a.N == 0 || a.OH == 0 || a.OW == 0) return;
  const bool through = a.y_layout != Layout::lanes;  // through scratch: a band's result is transposed afterwards
  const ConvShape<T> s =
      forward_shape(a, through ? int64_t(a.OC) * a.OW * LANES * int64_t(sizeof(T)) : 0, false, INT64_MAX, 1, a.OH);
  const Band& b = s.band;
  const Stencil& st = s.stencil;
  const GatherFn<T> fn = gather_fn<T>(s.tile.TR, s.tile.TC);
  const int64_t blocks = div_up(a.N, LANES), bands = div_up(a.OH, b.rows);
  const int parts = split_channels(blocks * bands, a.threads, a.OC);
  const int64_t plane = int64_t(a.OH) * a.OW;
  const bool past_the_caches = should_stream(a.y, blocks * LANES * a.OC * plane * int64_t(sizeof(T)));
  const int64_t line_size = int64_t(b.RB * b.SY + b.SY) * a.W * LANES;
  const TeamScratch<T> sources(slot_source, a.threads, b.C * b.channel + line_size + tile_sums(a.OC, st.chunks));
  // Moments of y are computed tile by tile, unless tiles overlap: norm_stats then computes them.
  const bool moments = a.mean && !through && a.OH % s.tile.TR == 0 && a.OW % s.tile.TC == 0;
  const TeamScratch<T> dests(slot_dest, a.threads,
                             through   ? int64_t(a.OC) * b.rows * a.OW * LANES
                             : moments ? 2 * int64_t(a.OC) * LANES
                                       : 0);
  double* part_mean = moments ? scratch<double>(slot_parts, 2 * blocks * bands * a.OC) : nullptr;
  double* part_m2 = part_mean + (moments ? blocks * bands * a.OC : 0);
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
    T* band = sources.mine();
    T* line = band + b.C * b.channel;
    T* sums = line + line_size;
    T* out = dests.mine();  // the band's result, or moments
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < blocks * bands * parts; ++task) {
      const int part = int(task % parts);
      const int row0 = int(task / parts % bands) * b.rows;
      const int64_t nb = task / parts / bands;
      const int rows = least(b.rows, a.OH - row0);
      const int64_t r0 = part_start(st.ptr, st.chunks, a.OC, parts, part);
      const int64_t r1 = part_start(st.ptr, st.chunks, a.OC, parts, part + 1);
      if (r0 == r1) continue;
      const int OCg = a.OC / a.G, ICg = a.IC / a.G;
      fill_band(b, a.x, a.x_layout, a.N, nb, row0, int(r0 / OCg) * ICg, int((r1 - 1) / OCg + 1) * ICg, band, line,
                Passage<T>{a.x_scale, a.x_shift, a.x_relu});
      GatherTile<T> t;
      t.src_row = int64_t(b.CB) * LANES;
      t.offset = st.offset;
      t.value = a.values;
      t.ptr_step = st.chunks;
      t.prefetch = st.chunks > 1 && a.index.nnz >= MANY;
      t.r0 = r0, t.r1 = r1;
      t.bias = a.bias ? a.bias + r0 : nullptr;
      t.sums = sums;
      t.past_the_caches = past_the_caches && !through;
      if (moments) {
        clear(out, 2 * (r1 - r0) * LANES);
        t.moments = out;
      }
      T* dst = through ? out : a.y + ((nb * a.OC + r0) * plane + int64_t(row0) * a.OW) * LANES;
      t.dst_channel = (through ? int64_t(rows) * a.OW : plane) * LANES;
      t.dst_row = int64_t(a.OW) * LANES;
      t.dst_col = LANES;
      const bool tall = rows >= s.tile.TR;
      const GatherFn<T> f = tall ? fn : gather_fn<T>(1, s.tile.TC);
      const int TR = tall ? s.tile.TR : 1;
      for (int y = 0; y < rows; y += TR) {
        const int yy = least(y, rows - TR);  // the last tile overlaps its neighbour instead of sticking out
        for (int x = 0; x < a.OW; x += s.tile.TC) {
          const int xx = least(x, a.OW - s.tile.TC);
          t.src = band + (int64_t(yy) * b.CB + xx) * LANES;
          t.dst = dst + (int64_t(yy) * a.OW + xx) * LANES;
          for (int h = 0; h < st.chunks; ++h) {
            t.begin = st.ptr + h;
            t.end = st.ptr + h + 1;
            t.first = h == 0;
            t.last = h + 1 == st.chunks;
            f(t);
          }
          t.count += T(TR * s.tile.TC);
        }
      }
      if (moments)
        sum_lanes(out, double(t.count), int(least<int64_t>(LANES, a.N - nb * LANES)), r0, r1,
                  part_mean + task / parts * a.OC, part_m2 + task / parts * a.OC);
      if (through)
        write_block(Walk{a.y_layout, a.OC, plane}, a.y, nb, int(least<int64_t>(LANES, a.N - nb * LANES)), r0, r1,
                    int64_t(row0) * a.OW, int64_t(rows) * a.OW, out, t.dst_channel, past_the_caches);
    }
    stream_fence();
    if (moments)
      total_moments(part_mean, part_m2, blocks * bands, a.OC, a.mean, a.var, [&](int64_t g) {
        const int64_t images = least<int64_t>(LANES, a.N - g / bands * LANES);
        return double(images) * double(least(b.rows, a.OH - int(g % bands) * b.rows)) * a.OW;
      });
  }
  if (a.mean && !moments) {
    NormArgs<T> norm{};
    norm.N = a.N, norm.C = a.OC, norm.P = plane, norm.x = a.y, norm.mean = a.mean, norm.var = a.var;
    norm.threads = a.threads;
    norm_stats(norm);
  }
}
