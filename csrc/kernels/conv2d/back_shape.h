// The plan of a backward pass over grad_y. No include guard: see isa/kernels.inc.

// Tap k of an axis in the input gradient: destination row j * S + phase reads source row oy = j + shift, where
// d = k * D - P, phase = d mod S, shift = (phase - d) / S.
struct Tap {
  int phase, shift;
};

SB_INLINE Tap tap_of(int k, int S, int D, int P) {
  const int d = k * D - P;
  const int phase = (d % S + S) % S;
  return {phase, (phase - d) / S};
}

constexpr int NO_PHASES[] = {0};  // `ry` and `rx` of a band that is read without strides

// A band of grad_y serves `rows` destination rows of every phase of grad_x, and the same rows of y. There are SH * SW
// phases, positions modulo the strides; a nonzero adds to exactly one of them. The nonzeros are sorted into lists, by
// phase, chunk of output channels and input channel.
template <class T>
struct BackShape {
  Tile tile;
  Band band;
  int phases, chunks;
  int up, left;          // rows and columns of the band before those of its destination
  int reach_y, reach_x;  // rows and columns that it has more than its destination
  int32_t* offset;       // per nonzero
  int32_t* ptr;          // where list (phase * chunks + chunk) * IC + channel begins
  int32_t* upto;         // nonzeros of all channels before this one, in all their lists
  T* value;              // per nonzero
  int32_t* from;         // per nonzero: its place in CSR order

  int64_t list(const ConvArgs<T>& a, int phase, int chunk) const { return (int64_t(phase) * chunks + chunk) * a.IC; }
};

// All but the nonzeros and the height of the band, which place_nonzeros sets.
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

// Sets the height of the band for `rows` destination rows, then sorts the nonzeros. value: room for their values.
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
  // A counting sort; inside a list, rows ascend. Threads take disjoint ranges of input channels, which are ranges of
  // columns of every row, so that no two of them add to one list.
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
