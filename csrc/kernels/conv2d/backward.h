// The backward pass of sparse convolution. No include guard: see isa/kernels.inc.

// grad_x[n][ic][iy][ix] = sum over active (oc, ky, kx) with iy + PH - ky*DH = oy*SH, ... of value *
// grad_y[n][oc][oy][ox], for channels [r0, r1) and one band's rows, which begin with row j0 of every phase.
//
// Args:
//   sums: room for the sums between chunks.
//   out: scratch that the result goes through where grad_x is not in the lane layout, else null.
//   reduced: as in GatherTile.
//   grad_values: in the order of the lists, what the band contributes is added to them; null: not wanted.
//   packed_x: these rows of x in the lane layout, [IC][rows][W][16], where a.x is in another one.
template <class T>
void grad_x_of_band(const ConvArgs<T>& a, const BackShape<T>& s, const T* band, int64_t nb, int j0, int64_t r0,
                    int64_t r1, T* sums, T* out, T* reduced, T* grad_values, const T* packed_x, bool past_the_caches) {
  const Band& b = s.band;
  const int64_t plane = int64_t(a.H) * a.W;
  const int y0 = least(a.H, j0 * a.SH), y1 = least(a.H, (j0 + b.rows) * a.SH);
  GatherTile<T> t;
  t.src_row = int64_t(b.CB) * LANES;
  t.offset = s.offset;
  t.value = s.value;
  t.ptr_step = 1;
  t.r0 = r0, t.r1 = r1;
  t.bias = nullptr;
  t.sums = sums;
  t.past_the_caches = past_the_caches && !out;
  const int64_t start = ((nb * a.IC + r0) * plane + int64_t(y0) * a.W) * LANES;
  T* dst = out ? out : a.grad_x + start;
  if (reduced) {
    clear(reduced, 2 * (r1 - r0) * LANES);
    t.reduced = reduced;
    t.x_scale = a.x_scale + r0, t.x_shift = a.x_shift + r0, t.x_mean = a.x_mean + r0;
  }
  t.dst_channel = (out ? int64_t(y1 - y0) * a.W : plane) * LANES;
  t.dst_row = int64_t(a.SH) * a.W * LANES;
  t.dst_col = int64_t(a.SW) * LANES;
  const T* own = packed_x ? packed_x : a.x + start;
  t.grad_values = {grad_values, true};
  t.own.channel = packed_x ? int64_t(b.rows) * a.SH * a.W * LANES : plane * LANES;
  t.own.row = t.dst_row, t.own.col = t.dst_col;
  t.own.scale = a.x_scale ? a.x_scale + r0 : nullptr, t.own.shift = a.x_scale ? a.x_shift + r0 : nullptr;
  t.own.relu = a.x_relu;
  t.own.images = int(least<int64_t>(LANES, a.N - nb * LANES));
  for (int f = 0; f < s.phases; ++f) {
    const int py = f / a.SW, px = f % a.SW;
    const int rows = y1 - y0 > py ? int(div_up(y1 - y0 - py, a.SH)) : 0;
    const int cols = a.W > px ? int(div_up(a.W - px, a.SW)) : 0;
    if (rows == 0 || cols == 0) continue;
    const int TR = rows >= s.tile.TR ? s.tile.TR : 1, TC = least(s.tile.TC, cols);
    const GatherFn<T> fn = gather_fn<T>(TR, TC);
    for (int y = 0; y < rows; y += TR) {
      const int yy = least(y, rows - TR);  // the last tile overlaps its neighbour instead of sticking out
      for (int x = 0; x < cols; x += TC) {
        const int xx = least(x, cols - TC);
        t.src = band + (int64_t(yy) * b.CB + xx) * LANES;
        const int64_t at = (int64_t(yy * a.SH + py) * a.W + xx * a.SW + px) * LANES;
        t.dst = dst + at;
        if (reduced) t.x = a.x + start + at;
        if (grad_values) t.own.data = own + at;
        t.own.skip_rows = y - yy, t.own.skip_cols = x - xx;
        for (int h = 0; h < s.chunks; ++h) {
          t.begin = s.ptr + s.list(a, f, h);
          t.end = t.begin + 1;
          t.first = h == 0;
          t.last = h + 1 == s.chunks;
          fn(t);
        }
      }
    }
  }
  if (out)
    write_block(Walk{a.x_layout, a.IC, plane}, a.grad_x, nb, int(least<int64_t>(LANES, a.N - nb * LANES)), r0, r1,
                int64_t(y0) * a.W, int64_t(y1 - y0) * a.W, out, t.dst_channel, past_the_caches);
}

// Adds to grad_values[k] the sum over a band's n, oy, ox of grad_y[n][oc][oy][ox] *
// x[n][ic][oy*SH + ky*DH - PH][ox*SW + kx*DW - PW]. grad: channel r0 of the band of grad_y (of_grad), past its border.
template <class T>
void grad_values_of_band(const ConvArgs<T>& a, const ConvShape<T>& s, const T* band, const T* grad, const Band& of_grad,
                         int rows, int64_t r0, int64_t r1, T* grad_values) {
  const Stencil& st = s.stencil;
  const CorrelateFn<T> fn = correlate_fn<T>(s.tile.TR, s.tile.TC);
  CorrelateTile<T> t;
  t.src_row = int64_t(s.band.CB) * LANES;
  t.offset = st.offset;
  t.ptr_step = st.chunks;
  t.r0 = r0, t.r1 = r1;
  t.grad_channel = of_grad.channel;
  t.grad_row = int64_t(of_grad.CB) * LANES;
  t.grad_values = {grad_values, true};
  for (int y = 0; y < rows; y += s.tile.TR)
    for (int x = 0; x < a.OW; x += s.tile.TC) {
      t.src = band + (int64_t(y) * s.band.CB + x) * LANES;
      t.grad = grad + (int64_t(y) * of_grad.CB + x) * LANES;
      t.rows = least(s.tile.TR, rows - y);
      t.cols = least(s.tile.TC, a.OW - x);
      for (int h = 0; h < st.chunks; ++h) {
        t.begin = st.ptr + h;
        t.end = t.begin + 1;
        fn(t);
      }
    }
}

// All gradients in one pass: a band of grad_y is read, and the gradient of the norm behind y computed, once for all of
// them. Every team adds up the gradients of values and bias (grad_bias[oc] = sum of grad_y[n][oc]) in a copy of its
// own; the copies are added in a fixed order.
template <class T>
void conv2d_backward(const ConvArgs<T>& a) {
  const int64_t nnz = a.index.nnz, width = nnz + a.OC;
  if (a.N == 0) {
    for (int64_t k = 0; a.grad_values && k < nnz; ++k) a.grad_values[k] = T(0);
    for (int64_t r = 0; a.grad_bias && r < a.OC; ++r) a.grad_bias[r] = T(0);
    return;
  }
  const bool through = a.grad_x && a.x_layout != Layout::lanes;
  const int OCg = a.OC / a.G, ICg = a.IC / a.G;
  const int64_t vector = LANES * int64_t(sizeof(T));
  const int high = most(a.OH, a.grad_x ? int(div_up(a.H, a.SH)) : 0);
  BackShape<T> back = back_shape(a);
  const int TR = a.grad_x ? back.tile.TR : 1;
  const int64_t bound = fitting_rows(int64_t(a.OC) * back.band.CB * vector, back.reach_y,
                                     through ? int64_t(a.IC) * a.SH * a.W * vector : 0);
  ConvShape<T> s{};
  const bool both = a.grad_x && a.grad_values;  // gradients of values along with grad_x, in the order of the lists
  const bool apart = a.grad_values && !both;    // gradients of values by themselves, in CSR order
  if (apart) s = forward_shape(a, 0, true, bound, TR, high);
  const int rows = apart ? s.band.rows : even_rows(bound, TR, high);
  const int64_t blocks = div_up(a.N, LANES), bands = div_up(high, rows), tasks = blocks * bands;
  const int parts = split_channels(tasks, a.threads, most(a.OC, a.IC));
  const int teams = int(least<int64_t>(a.threads, tasks));
  T* sums = scratch<T>(slot_sums, width * teams + nnz);
  place_nonzeros(a, rows, sums + width * teams, back);
  const Band& b = back.band;
  const bool past_the_caches = should_stream(a.grad_x, blocks * a.IC * int64_t(a.H) * a.W * vector);
  const int64_t grad_line = int64_t(b.RB + 1) * a.OW * LANES, chunk_sums = a.grad_x ? tile_sums(a.IC, back.chunks) : 0;
  const TeamScratch<T> grads(slot_grad, a.threads, b.C * b.channel + grad_line);
  // x for the gradients of values: a band with borders (apart), or rows alone if they are not in the lane layout
  // (both).
  Band own{a.IC, a.H, a.W, 1, 1, 0, 0, 1, 1, NO_PHASES, NO_PHASES, rows * a.SH, rows * a.SH, a.W, 0};
  own.channel = int64_t(own.RB) * own.CB * LANES;
  const Band& of_x = apart ? s.band : own;
  const bool copied = apart || (both && a.x_layout != Layout::lanes);
  const int64_t x_line = int64_t(of_x.RB * of_x.SY + of_x.SY) * a.W * LANES;
  const TeamScratch<T> sources(slot_source, a.threads, copied ? of_x.C * of_x.channel + x_line : 0);
  // Sums for the norm of x are computed tile by tile, unless tiles overlap: norm_reduce then computes them.
  const bool reducing = a.x_sum_g && !through && a.SH * a.SW == 1 && a.H % back.tile.TR == 0 && a.W % back.tile.TC == 0;
  const int64_t lane_sums = reducing ? 2 * int64_t(a.IC) * LANES : 0;
  const TeamScratch<T> dests(slot_dest, a.threads,
                             chunk_sums + lane_sums + (through ? int64_t(a.IC) * rows * a.SH * a.W * LANES : 0));
  double* part_g = reducing ? scratch<double>(slot_parts, 2 * tasks * a.IC) : nullptr;
  double* part_gx = part_g + (reducing ? tasks * a.IC : 0);
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
    T* grad = grads.mine();
    T* source = sources.mine();
    T* dest = dests.mine();
    // Every team has a fixed share of the tasks, so that the result does not depend on timing. With more threads than
    // tasks, the threads of a team share its channels.
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < int64_t(teams) * parts; ++unit) {
      const int64_t team = unit / parts;
      const int part = int(unit % parts);
      T* gv = sums + team * width;
      T* gb = gv + nnz;
      // Output channels whose values and bias, and input channels whose gradient, are this part's.
      const int64_t r0 = part_start(a.index.rowptr, 1, a.OC, parts, part);
      const int64_t r1 = part_start(a.index.rowptr, 1, a.OC, parts, part + 1);
      const int64_t x0 = a.grad_x ? part_start(back.upto, 1, a.IC, parts, part) : 0;
      const int64_t x1 = a.grad_x ? part_start(back.upto, 1, a.IC, parts, part + 1) : 0;
      if (both)
        for (int f = 0; f < back.phases * back.chunks; ++f) {
          const int32_t* ptr = back.ptr + int64_t(f) * a.IC;
          for (int32_t k = ptr[x0]; k < ptr[x1]; ++k) gv[k] = T(0);
        }
      else if (apart)
        for (int32_t k = a.index.rowptr[r0]; k < a.index.rowptr[r1]; ++k) gv[k] = T(0);
      for (int64_t r = r0; r < r1; ++r) gb[r] = T(0);
      // Channels [c0, c1) of grad_y are read.
      int64_t c0 = a.OC, c1 = 0;
      if (x0 < x1) c0 = x0 / ICg * OCg, c1 = ((x1 - 1) / ICg + 1) * OCg;
      if (r0 < r1 && (apart || a.grad_bias)) c0 = least(c0, r0), c1 = most(c1, r1);
      if (c0 >= c1) continue;
      for (int64_t task = tasks * team / teams; task < tasks * (team + 1) / teams; ++task) {
        const int64_t nb = task / bands;
        const int row0 = int(task % bands) * rows, live = most(0, least(rows, a.OH - row0));  // rows of y
        Passage<T> pass;
        pass.back = a.y_norm;
        fill_band(b, a.grad_y, a.y_layout, a.N, nb, row0, int(c0), int(c1), grad, grad + b.C * b.channel, pass);
        if (x0 < x1) {
          T* reduced = reducing ? dest + chunk_sums : nullptr;
          if (both && copied)
            fill_band(own, a.x, a.x_layout, a.N, nb, row0 * a.SH, int(x0), int(x1), source,
                      source + own.C * own.channel);
          grad_x_of_band(a, back, grad, nb, row0, x0, x1, dest, through ? dest + chunk_sums : nullptr, reduced,
                         both ? gv : nullptr, both && copied ? source + x0 * own.channel : nullptr, past_the_caches);
          if (reducing)
            for (int64_t r = x0; r < x1; ++r) {
              const T* lanes = reduced + (r - x0) * 2 * LANES;
              double total_g = 0, total_gx = 0;
              for (int i = 0; i < least<int64_t>(LANES, a.N - nb * LANES); ++i)
                total_g += double(lanes[i]), total_gx += double(lanes[LANES + i]);
              part_g[task * a.IC + r] = total_g;
              part_gx[task * a.IC + r] = total_gx;
            }
        }
        const T* g = grad + r0 * b.channel + (int64_t(back.up) * b.CB + back.left) * LANES;
        if (a.grad_bias) {
          for (int64_t r = r0; r < r1; ++r) {
            V<T> sum[Vec<T>::n];
            for (int i = 0; i < Vec<T>::n; ++i) sum[i] = zero<T>();
            for (int y = 0; y < live; ++y) {
              const T* p = g + (r - r0) * b.channel + int64_t(y) * b.CB * LANES;
              for (int64_t i = 0; i < int64_t(a.OW) * LANES; i += Vec<T>::n) sum[0] += load(p + i);
            }
            gb[r] += sum_each<T>(sum)[0];
          }
        }
        if (!apart || r0 == r1 || live == 0) continue;
        pass = Passage<T>{a.x_scale, a.x_shift, a.x_relu};
        fill_band(s.band, a.x, a.x_layout, a.N, nb, row0, int(r0 / OCg) * ICg, int((r1 - 1) / OCg + 1) * ICg, source,
                  source + s.band.C * s.band.channel, pass);
        grad_values_of_band(a, s, source, g, b, live, r0, r1, gv);
      }
    }
    stream_fence();
    if (reducing) total_sums(part_g, part_gx, tasks, a.IC, a.x_sum_g, a.x_sum_gx);
    if (a.grad_values) {
#pragma omp for schedule(static) nowait
      for (int64_t k = 0; k < nnz; ++k) {
        T total = sums[k];
        for (int m = 1; m < teams; ++m) total += sums[m * width + k];
        a.grad_values[both ? back.from[k] : k] = total;
      }
    }
    if (a.grad_bias) {
#pragma omp for schedule(static)
      for (int64_t r = 0; r < a.OC; ++r) {
        T total = sums[nnz + r];
        for (int m = 1; m < teams; ++m) total += sums[m * width + nnz + r];
        a.grad_bias[r] = total;
      }
    }
  }
  if (a.x_sum_g && !reducing) {
    NormArgs<T> norm{};
    norm.N = a.N, norm.C = a.IC, norm.P = int64_t(a.H) * a.W, norm.x = a.x, norm.grad_y = a.grad_x;
    norm.relu_scale = a.x_scale, norm.relu_shift = a.x_shift, norm.mean = const_cast<T*>(a.x_mean);
    norm.sum_g = a.x_sum_g, norm.sum_gx = a.x_sum_gx, norm.threads = a.threads;
    norm_reduce(norm);
  }
}
