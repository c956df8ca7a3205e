// How a convolution is cut into tiles, bands and chunks, and the plan of a pass over x. No include guard: see
// isa/kernels.inc.

struct Tile {
  int TR, TC;
};

// The cheapest tile: few passes over the nonzeros count most, then squarer tiles, which read fewer cache lines.
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

// Into how many chunks the source channels are split, one pass over the nonzeros for each: what a pass reads should
// stay in the L1 cache. A pass needs a few nonzeros per row, though, since it loads and stores the sums.
SB_INLINE int choose_chunks(double nnz_per_row, int channels, double bytes_per_channel) {
  const double L1 = 36 << 10, FEW = 12;
  int chunks = int(bytes_per_channel * channels / L1 + 0.999);
  const int bound = int(nnz_per_row / FEW);
  if (chunks > bound) chunks = bound;
  return most(1, least(chunks, channels));
}

// Offsets of more nonzeros than this are computed by all threads, of fewer by one.
constexpr int64_t MANY_TO_PLACE = 4000;

// Where in a band the nonzeros read: those of destination channel d and source chunk h are entries
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

// Elements that a tile of all channels needs for its sums between chunks.
SB_INLINE int64_t tile_sums(int64_t channels, int chunks) { return chunks > 1 ? channels * MAX_TILE * LANES : 0; }

// Destination rows whose band (`reach` rows more) fits the L2 cache, each with `out_bytes` of its own.
SB_INLINE int64_t fitting_rows(int64_t bytes_per_row, int reach, int64_t out_bytes) {
  const int64_t budget = int64_t(1) << 20;
  return (budget - bytes_per_row * reach) / (bytes_per_row + out_bytes);
}

// Rows of a band, a multiple of TR and about `rows`. All bands of H rows get about the same height: none is left with a
// row or two.
SB_INLINE int even_rows(int64_t rows, int TR, int H) {
  rows = most<int64_t>(rows / TR * TR, TR);
  const int64_t count = div_up(H, rows);
  return int(div_up(div_up(H, count), TR) * TR);
}

// Phases of one axis for reading x: tap k reads source i*S + k*D - P = (i + q) * S + r - P, q = k*D / S, r = k*D % S.
// Returns how many different r there are; reach: the largest q.
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

// Where the taps of a kernel lie in a band of x: phase, and row or column q inside of it; reach: the largest q.
struct Taps {
  const int *phase_y, *q_y, *phase_x, *q_x;
  int reach_y, reach_x;
};

// How many integers taps_of needs room for.
SB_INLINE int64_t taps_room(int KH, int KW) { return 3 * (int64_t(KH) + KW); }

// The taps, and the band of x except for its own rows and columns. Both keep pointers to `mem`.
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

// The height of a band that serves `rows` destination rows.
SB_INLINE void set_rows(Band* b, const Taps& t, int rows) {
  b->rows = rows;
  b->RB = rows + t.reach_y;
  b->channel = int64_t(b->NY) * b->NX * b->RB * b->CB * LANES;
}

// offset[(c * KH + ky) * KW + kx] of the first `channels` channels: where in the band that tap reads.
template <class T>
void tap_offsets(const ConvArgs<T>& a, const Band& b, const Taps& t, int channels, int32_t* offset) {
  for (int c = 0; c < channels; ++c)
    for (int ky = 0; ky < a.KH; ++ky)
      for (int kx = 0; kx < a.KW; ++kx)
        *offset++ =
            int32_t(c * b.channel +
                    ((int64_t(t.phase_y[ky] * b.NX + t.phase_x[kx]) * b.RB + t.q_y[ky]) * b.CB + t.q_x[kx]) * LANES);
}

// The plan of a pass over x with the nonzeros in CSR order: forward, and the gradients of values alone.
//
// Args:
//   out_bytes: what a destination row needs in the cache besides the band.
//   overhang: whether tiles reach beyond the last column, so that the band needs more of them.
//   bound, TR, high: a band has at most `bound` rows, a multiple of TR, out of `high`.
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
  // One allocation: the taps, their offsets, then the stencil.
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

// Among how many tasks the channels of a band are shared, where there are too few bands for all threads.
SB_INLINE int split_channels(int64_t tasks, int threads, int64_t channels) {
  if (tasks >= 2 * int64_t(threads) || threads == 1) return 1;
  return int(least<int64_t>(div_up(2 * int64_t(threads), tasks), most<int64_t>(1, channels / 8)));
}
