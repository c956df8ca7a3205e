// Sparse 2-D convolution. Included inside an instruction set's namespace; no include guard.
//
// Every product is a stencil over a *band*: a few rows of the source, copied once into a thread's scratch in the lane
// layout with its zero border and, for strides above one, with rows and columns sorted by their phase. In the band a
// nonzero is a single offset and every load is aligned and contiguous; borders, strides and dilation cost no branch.

struct Band {
  int C, H, W;  // the source image
  int SY, SX;   // source stride between neighbouring destinations
  int OY, OX;   // source row = (row + q) * SY + ry[p] + OY
  int NY, NX;   // phases in use
  const int* ry;
  const int* rx;
  int rows, RB, CB;  // destination rows a band serves; rows and columns of the band for one phase
  int64_t channel;   // elements between channels
};

// What becomes of a source's elements on their way into a band: what a norm makes of them, or of a gradient; see
// ConvArgs.
template <class T>
struct Passage {
  const T* scale = nullptr;
  const T* shift = nullptr;
  bool relu = false;
  const NormArgs<T>* back = nullptr;
};

// copy_lanes, with the norm of one channel.
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

// Fills the band of channels [c0, c1) of image block `nb` whose first destination row is `row0`. `line` holds RB * SY +
// SY source rows of one channel.
template <class T>
void fill_band(const Band& b, const T* data, Layout layout, int64_t N, int64_t nb, int row0, int c0, int c1, T* band,
               T* line, const Passage<T>& pass = {}) {
  const int images = int(least<int64_t>(LANES, N - nb * LANES));
  const int64_t plane = int64_t(b.H) * b.W, image = int64_t(b.C) * plane;
  const T* src = data + nb * LANES * image;
  const bool direct = layout == Layout::plain && b.SX == 1 && b.W % Vec<T>::n == 0;
  // Source rows touched by this band; packed in one go per channel where the row pitch of the band does not allow
  // packing straight into place.
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
            // All channels of a position at once, from the first channel's turn.
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

struct Tile {
  int TR, TC;
};

// Fewest passes over the nonzeros first, then the squarer tile: its window holds fewer lines per channel.
SB_INLINE Tile choose_tile(int H, int W) {
  Tile best{1, 1};
  double least_cost = 1e30;
  const int heights[] = {1, 2, 4};
  for (int h : heights) {
    if (h > H && h > 1) continue;
    for (int w = 1; w <= MAX_TILE / h && w <= W; ++w) {
      const double tiles = double(div_up(H, h)) * double(div_up(W, w));
      const double cost = tiles * (h * w + 3 + 0.15 * (h + 2) * (w + 2));
      if (cost < least_cost) {
        least_cost = cost;
        best = Tile{h, w};
      }
    }
  }
  return best;
}

// How many channels a pass over the nonzeros covers, so that what it reads stays in the first-level cache, as long as
// a pass still has a few nonzeros per row: each pass reloads and stores the sums.
SB_INLINE int choose_chunks(double nnz_per_row, int channels, double bytes_per_channel) {
  const double L1 = 36 << 10, FEW = 12;
  int chunks = int(bytes_per_channel * channels / L1 + 0.999);
  const int bound = int(nnz_per_row / FEW);
  if (chunks > bound) chunks = bound;
  return most(1, least(chunks, channels));
}

// So many nonzeros are placed by all threads, fewer by one.
constexpr int64_t MANY_TO_PLACE = 4000;

// The nonzeros as a stencil: for destination channel d and source chunk h, entries
// [ptr[d*chunks + h], ptr[d*chunks + h + 1]) of offset.
struct Stencil {
  int chunks;
  int32_t* ptr;
  int32_t* offset;
};

template <class T>
struct ConvShape {
  Tile tile;
  Band band;
  Stencil stencil;
};

// Elements of the sums that a tile of all channels keeps between chunks.
SB_INLINE int64_t tile_sums(int64_t channels, int chunks) { return chunks > 1 ? channels * MAX_TILE * LANES : 0; }

// Destination rows whose band fits a second-level cache, with `out_bytes` more a row.
SB_INLINE int64_t fitting_rows(int64_t bytes_per_row, int reach, int64_t out_bytes) {
  const int64_t budget = int64_t(1) << 20;
  return (budget - bytes_per_row * reach) / (bytes_per_row + out_bytes);
}

// About so many rows a band, a multiple of TR. Bands of equal height: no band of a row or two at the end.
SB_INLINE int even_rows(int64_t rows, int TR, int H) {
  rows = most<int64_t>(rows / TR * TR, TR);
  const int64_t count = div_up(H, rows);
  return int(div_up(div_up(H, count), TR) * TR);
}

// Phases of one axis for reading x: tap k reads source i*S + k*D - P = (i + q) * S + r - P, q = k*D / S, r = k*D % S.
SB_INLINE int axis_phases(int K, int S, int D, int* r, int* phase_of, int* q_of, int* reach) {
  int used = 0;
  *reach = 0;
  for (int k = 0; k < K; ++k) {
    const int rest = k * D % S;
    int p = 0;
    while (p < used && r[p] != rest) ++p;
    if (p == used) r[used++] = rest;
    phase_of[k] = p;
    q_of[k] = k * D / S;
    *reach = most(*reach, q_of[k]);
  }
  return used;
}

// Where the taps of a kernel lie in a band of x: phases, and rows and columns inside of them.
struct Taps {
  const int *phase_y, *q_y, *phase_x, *q_x;
  int reach_y, reach_x;
};

SB_INLINE int64_t taps_room(int KH, int KW) { return 3 * (int64_t(KH) + KW); }

// The band of x but for its rows and columns; taps_room numbers at `mem` are what it and the taps refer to.
template <class T>
Taps taps_of(const ConvArgs<T>& a, int* mem, Band* b) {
  int *ry = mem, *phase_y = ry + a.KH, *q_y = phase_y + a.KH;
  int *rx = q_y + a.KH, *phase_x = rx + a.KW, *q_x = phase_x + a.KW;
  Taps t{phase_y, q_y, phase_x, q_x, 0, 0};
  b->NY = axis_phases(a.KH, a.SH, a.DH, ry, phase_y, q_y, &t.reach_y);
  b->NX = axis_phases(a.KW, a.SW, a.DW, rx, phase_x, q_x, &t.reach_x);
  b->ry = ry, b->rx = rx;
  b->C = a.IC, b->H = a.H, b->W = a.W, b->SY = a.SH, b->SX = a.SW, b->OY = -a.PH, b->OX = -a.PW;
  return t;
}

// `rows` destination rows a band.
SB_INLINE void set_rows(Band* b, const Taps& t, int rows) {
  b->rows = rows;
  b->RB = rows + t.reach_y;
  b->channel = int64_t(b->NY) * b->NX * b->RB * b->CB * LANES;
}

// Of the taps of so many channels, one after the other.
template <class T>
void tap_offsets(const ConvArgs<T>& a, const Band& b, const Taps& t, int channels, int32_t* offset) {
  for (int c = 0; c < channels; ++c)
    for (int ky = 0; ky < a.KH; ++ky)
      for (int kx = 0; kx < a.KW; ++kx)
        *offset++ =
            int32_t(c * b.channel +
                    ((int64_t(t.phase_y[ky] * b.NX + t.phase_x[kx]) * b.RB + t.q_y[ky]) * b.CB + t.q_x[kx]) * LANES);
}

// Forward-shaped problem: band of x, one destination phase, nonzeros in CSR order.
//
// Args:
//   out_bytes: what a destination row needs in the cache besides.
//   overhang: more columns, for tiles that stick out on the right and below.
//   bound, TR, high: at most so many rows a band, a multiple of TR, of so many rows in all.
template <class T>
ConvShape<T> forward_shape(const ConvArgs<T>& a, int64_t out_bytes, bool overhang, int64_t bound, int TR, int high) {
  ConvShape<T> s;
  s.tile = choose_tile(a.OH, a.OW);
  const Index& ix = a.index;
  const int KK = a.KH * a.KW, ICg = a.IC / a.G, OCg = a.OC / a.G;
  const int cols = ICg * KK;
  Band& b = s.band;
  const int64_t axis = taps_room(a.KH, a.KW);
  const int max_chunks = most(1, int(ix.nnz / most<int64_t>(1, ix.rows) / 2 + 1));
  // One block: axis tables, then the stencil.
  int32_t* mem = scratch<int32_t>(slot_plan, axis + cols + ix.nnz + ix.rows * int64_t(least(max_chunks, ICg)) + 1);
  int32_t* table = mem + axis;
  s.stencil.offset = table + cols;
  s.stencil.ptr = s.stencil.offset + ix.nnz;
  const Taps taps = taps_of(a, mem, &b);
  const int width = overhang ? int(div_up(a.OW, s.tile.TC)) * s.tile.TC : a.OW;
  b.CB = width + taps.reach_x;
  const int64_t row_bytes = int64_t(a.IC) * b.NY * b.NX * b.CB * LANES * sizeof(T);
  set_rows(&b, taps,
           even_rows(least(bound, fitting_rows(row_bytes, taps.reach_y, out_bytes)), most(TR, s.tile.TR), high));
  tap_offsets(a, b, taps, ICg, table);
  const double window =
      double(b.NY) * b.NX * (s.tile.TR + taps.reach_y) * (s.tile.TC + taps.reach_x) * LANES * sizeof(T);
  const int chunks = least(max_chunks, choose_chunks(double(ix.nnz) / double(most<int64_t>(1, ix.rows)), ICg, window));
  s.stencil.chunks = chunks;
  const int per_chunk = int(div_up(ICg, chunks)) * KK;
#pragma omp parallel for num_threads(a.threads) if (a.threads > 1 && ix.nnz > MANY_TO_PLACE) schedule(static)
  for (int64_t r = 0; r < ix.rows; ++r) {
    int32_t k = ix.rowptr[r];
    const int32_t end = ix.rowptr[r + 1];
    const int32_t base = int32_t(r / OCg * ICg * b.channel);
    for (int h = 0; h < chunks; ++h) {
      s.stencil.ptr[r * chunks + h] = k;
      const int32_t bound = h + 1 == chunks ? cols : (h + 1) * per_chunk;
      for (; k < end && ix.col[k] < bound; ++k) s.stencil.offset[k] = base + table[ix.col[k]];
    }
  }
  s.stencil.ptr[ix.rows * chunks] = int32_t(ix.nnz);
  return s;
}

// Splits `rows` into `parts` of about equal nonzeros; start of part p.
SB_INLINE int64_t part_start(const int32_t* ptr, int64_t step, int64_t rows, int parts, int p) {
  if (p <= 0) return 0;
  if (p >= parts) return rows;
  const double total = double(ptr[rows * step]) + rows;
  const double want = total * p / parts;
  int64_t lo = 0, hi = rows;
  while (lo < hi) {
    const int64_t mid = (lo + hi) / 2;
    if (double(ptr[mid * step]) + mid < want)
      lo = mid + 1;
    else
      hi = mid;
  }
  return lo;
}

SB_INLINE int split_channels(int64_t tasks, int threads, int64_t channels) {
  if (tasks >= 2 * int64_t(threads) || threads == 1) return 1;
  return int(least<int64_t>(div_up(2 * int64_t(threads), tasks), most<int64_t>(1, channels / 8)));
}

// Means and sums of squared deviations of channels [r0, r1) of a task, from those of its lanes [channel][2][LANES].
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
  const bool through = a.y_layout != Layout::lanes;  // the band's result is computed in scratch, then transposed
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
  // Moments of y are taken from the tiles where no two of them overlap.
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
    T* out = dests.mine();  // moments of the lanes, where they are wanted
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
      t.ask = st.chunks > 1 && a.index.nnz >= MANY;
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

// Tap k of an axis in the input gradient: source row oy = j + shift for destination row j * S + phase, with
// d = k * D - P, phase = d mod S, shift = (phase - d) / S.
struct Tap {
  int phase, shift;
};

SB_INLINE Tap tap_of(int k, int S, int D, int P) {
  const int d = k * D - P;
  const int phase = (d % S + S) % S;
  return {phase, (phase - d) / S};
}

constexpr int NO_PHASES[] = {0};  // of a source that is read without strides

// The plan of the backward pass for grad_y: a band of it serves destination rows of grad_x (of one of SH * SW phases; a
// nonzero belongs to exactly one) and the same rows of y. The nonzeros lie by phase, chunk of output channels and input
// channel.
template <class T>
struct BackShape {
  Tile tile;
  Band band;
  int phases, chunks;
  int up, left;          // rows and columns of the band before those of its destination
  int reach_y, reach_x;  // how many more it has than its destination
  int32_t* offset;       // per nonzero
  int32_t* ptr;          // list (phase * chunks + chunk) * IC + channel begins here
  int32_t* upto;         // nonzeros of the channels before, of all lists
  T* value;              // per nonzero
  int32_t* from;         // per nonzero: its place in CSR order

  int64_t list(const ConvArgs<T>& a, int phase, int chunk) const { return (int64_t(phase) * chunks + chunk) * a.IC; }
};

// All but the nonzeros; band.rows is still open.
template <class T>
BackShape<T> back_shape(const ConvArgs<T>& a) {
  BackShape<T> s;
  s.phases = a.SH * a.SW;
  s.chunks = 1;
  s.offset = s.ptr = s.upto = s.from = nullptr;
  s.value = nullptr;
  s.tile = choose_tile(most(1, a.H / a.SH), most(1, a.W / a.SW));
  int down = 0, right = 0;
  s.up = s.left = 0;
  for (int k = 0; a.grad_x && k < a.KH; ++k) {
    const int shift = tap_of(k, a.SH, a.DH, a.PH).shift;
    s.up = most(s.up, -shift), down = most(down, shift);
  }
  for (int k = 0; a.grad_x && k < a.KW; ++k) {
    const int shift = tap_of(k, a.SW, a.DW, a.PW).shift;
    s.left = most(s.left, -shift), right = most(right, shift);
  }
  Band& b = s.band;
  b.C = a.OC, b.H = a.OH, b.W = a.OW, b.SY = b.SX = 1, b.OY = -s.up, b.OX = -s.left, b.NY = b.NX = 1;
  b.ry = b.rx = NO_PHASES;
  s.reach_y = s.up + down, s.reach_x = s.left + right;
  b.CB = most(s.left + a.OW, int(div_up(a.W, a.SW)) + s.reach_x);
  return s;
}

// Bands of `rows` destination rows, and with them the nonzeros' places.
template <class T>
void place_nonzeros(const ConvArgs<T>& a, int rows, T* value, BackShape<T>& s) {
  const Index& ix = a.index;
  const int KK = a.KH * a.KW, ICg = a.IC / a.G, OCg = a.OC / a.G;
  Band& b = s.band;
  b.rows = rows;
  b.RB = rows + s.reach_y;
  b.channel = int64_t(b.RB) * b.CB * LANES;
  if (!a.grad_x) return;
  const int64_t lists = int64_t(a.IC) * s.phases;
  const double per_row = double(ix.nnz) / double(lists);
  const double window = double(s.tile.TR + s.reach_y) * (s.tile.TC + s.reach_x) * LANES * sizeof(T);
  s.chunks = least(int(per_row / 2) + 1, choose_chunks(per_row, OCg, window));
  const int per_chunk = int(div_up(OCg, s.chunks));
  const int64_t keys = lists * s.chunks, taps = int64_t(ICg) * KK;
  int32_t* key_of_col = scratch<int32_t>(slot_more_plan, 2 * taps + 2 * ix.nnz + 2 * keys + a.IC + 2);
  int32_t* shift_of_col = key_of_col + taps;
  s.offset = shift_of_col + taps;
  s.from = s.offset + ix.nnz;
  s.ptr = s.from + ix.nnz;
  int32_t* next = s.ptr + keys + 1;
  s.upto = next + keys;
  s.value = value;
  for (int c = 0, j = 0; c < ICg; ++c)
    for (int ky = 0; ky < a.KH; ++ky)
      for (int kx = 0; kx < a.KW; ++kx, ++j) {
        const Tap y = tap_of(ky, a.SH, a.DH, a.PH), x = tap_of(kx, a.SW, a.DW, a.PW);
        key_of_col[j] = int32_t(s.list(a, y.phase * a.SW + x.phase, 0) + c);
        shift_of_col[j] = int32_t((int64_t(y.shift + s.up) * b.CB + x.shift + s.left) * LANES);
      }
  const auto key_of_row = [&](int64_t r) {
    const int64_t g = r / OCg;
    return int32_t((r - g * OCg) / per_chunk * a.IC + g * ICg);
  };
  // A counting sort; inside a list, rows ascend. Parts of the input channels, which are parts of every row's nonzeros,
  // are counted and placed independently.
  const int parts = a.G == 1 && ix.nnz > MANY_TO_PLACE ? least(a.threads, a.IC) : 1;
  const auto each = [&](int part, auto&& place) {
    const int32_t col0 = int32_t(int64_t(ICg) * part / parts * KK),
                  col1 = int32_t(int64_t(ICg) * (part + 1) / parts * KK);
    for (int64_t r = 0; r < ix.rows; ++r) {
      const int32_t base = key_of_row(r), end = ix.rowptr[r + 1];
      for (int32_t k = first_from(ix.col, ix.rowptr[r], end, col0); k < end && ix.col[k] < col1; ++k)
        place(r, k, base + key_of_col[ix.col[k]]);
    }
  };
  for (int64_t i = 0; i < keys; ++i) next[i] = 0;
#pragma omp parallel num_threads(a.threads) if (parts > 1)
  {
#pragma omp for schedule(static)
    for (int part = 0; part < parts; ++part) each(part, [&](int64_t, int32_t, int32_t key) { ++next[key]; });
#pragma omp single
    {
      for (int64_t c = 0; c <= a.IC; ++c) s.upto[c] = 0;
      int32_t start = 0;
      for (int64_t i = 0; i < keys; ++i) {
        s.ptr[i] = start;
        s.upto[i % a.IC + 1] += next[i];
        start += next[i];
        next[i] = s.ptr[i];
      }
      s.ptr[keys] = start;
      for (int64_t c = 0; c < a.IC; ++c) s.upto[c + 1] += s.upto[c];
    }
#pragma omp for schedule(static)
    for (int part = 0; part < parts; ++part)
      each(part, [&](int64_t r, int32_t k, int32_t key) {
        const int32_t at = next[key]++;
        s.offset[at] = int32_t(r * b.channel) + shift_of_col[ix.col[k]];
        s.value[at] = a.values[k];
        s.from[at] = k;
      });
  }
}

// grad_x[n][ic][iy][ix] = sum over active (oc, ky, kx) with iy + PH - ky*DH = oy*SH, ... of value *
// grad_y[n][oc][oy][ox], for channels [r0, r1) and phase rows from j0 on; `out` where it goes through scratch;
// `reduced` as in GatherTile. With grad_values, in the order of the lists, what the band adds to them too; `packed_x`:
// x as lanes of these rows, [IC][rows][W][16], where a.x lies otherwise.
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
// x[n][ic][oy*SH + ky*DH - PH][ox*SW + kx*DW - PW]; `grad` is the band's first row and column of y, of channel r0.
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

// All gradients in one pass: a band of grad_y is read, and taken through the norm behind y, once for all of them. Every
// team sums gradients of values and bias (grad_bias[oc] = sum of grad_y[n][oc]) into its own copy; the copies are added
// in a fixed order.
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
  const bool both = a.grad_x && a.grad_values;  // gradients of values on the way, in the order of the lists
  const bool apart = a.grad_values && !both;
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
  // x for gradients of values: with its borders, or its rows alone where it has to be brought into the lane layout.
  Band own{a.IC, a.H, a.W, 1, 1, 0, 0, 1, 1, NO_PHASES, NO_PHASES, rows * a.SH, rows * a.SH, a.W, 0};
  own.channel = int64_t(own.RB) * own.CB * LANES;
  const Band& of_x = apart ? s.band : own;
  const bool copied = apart || (both && a.x_layout != Layout::lanes);
  const int64_t x_line = int64_t(of_x.RB * of_x.SY + of_x.SY) * a.W * LANES;
  const TeamScratch<T> sources(slot_source, a.threads, copied ? of_x.C * of_x.channel + x_line : 0);
  // Sums for the norm of x are taken from the tiles where no two of them overlap.
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
    // Team m works through a fixed share of the tasks, so that the result does not depend on timing. With more threads
    // than tasks, a team's threads share its channels.
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
      // Channels of grad_y to be read.
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
