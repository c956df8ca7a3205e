// The gradient of all weights of a convolution, active or not. No include guard: see isa/kernels.inc.
//
// A weight's gradient is a sum over samples and positions. The sums of some output channels times some taps stay in
// registers, one per lane, while the loop runs over a block of positions: every load serves several sums, all loads are
// contiguous, and lanes are added up once a block. x is copied into bands (see band.h), a few input channels at once,
// so that they stay in the L2 cache; grad_y is read in place where its layout allows.

// Output channels and taps that are summed at once: as many as registers allow and as keep the multipliers busy. With
// more of them a block of positions would have to be smaller, and lanes would be added up more often.
constexpr int MANY_CHANNELS = 4;
#if SB_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int TAPS = 4;  // of thirty-two registers
#else
constexpr int TAPS = 3;
#endif

// A block of positions: `blocks` blocks of samples, `rows` rows, and row_length elements of every row.
template <class T>
struct OuterTile {
  const T* grad;  // of the first channel
  ptrdiff_t grad_block, grad_channel, grad_row;
  const T* src;
  ptrdiff_t src_block, src_row;
  const int32_t* offset;  // of the first tap in src
  int blocks, rows;
  ptrdiff_t row_length;
  T* to;  // of the first channel and tap; taps are neighbours
  ptrdiff_t to_channel;
  bool add;  // else overwrite
};

template <class T, int OT, int KT>
void outer_tile(const OuterTile<T>& t) {
  constexpr int n = Vec<T>::n, M = OT * KT;
  V<T> acc[OT][KT] = {};
  for (int b = 0; b < t.blocks; ++b)
    for (int y = 0; y < t.rows; ++y) {
      const T* g = t.grad + b * t.grad_block + y * t.grad_row;
      const T* x[KT];
      for (int j = 0; j < KT; ++j) x[j] = t.src + b * t.src_block + y * t.src_row + t.offset[j];
      for (ptrdiff_t i = 0; i < t.row_length; i += n) {
        V<T> own[KT];
        for (int j = 0; j < KT; ++j) own[j] = load(x[j] + i);
        for (int o = 0; o < OT; ++o) {
          V<T> v = load(g + o * t.grad_channel + i);
          in_register<T>(v);
          for (int j = 0; j < KT; ++j) acc[o][j] += v * own[j];
        }
      }
    }
  alignas(64) T sums[(M + n - 1) / n * n];
  for (int m = 0; m < M; m += n) {
    V<T> lanes[n];
    for (int q = 0; q < n; ++q) lanes[q] = m + q < M ? acc[(m + q) / KT % OT][(m + q) % KT] : zero<T>();
    store(sums + m, sum_each<T>(lanes));
  }
  for (int o = 0; o < OT; ++o)
    for (int j = 0; j < KT; ++j) {
      T& place = t.to[o * t.to_channel + j];
      place = t.add ? place + sums[o * KT + j] : sums[o * KT + j];
    }
}

// The sum over positions and lanes of one channel.
template <class T>
SB_INLINE T sum_positions(const OuterTile<T>& t, const T* grad) {
  V<T> sum = zero<T>();
  for (int b = 0; b < t.blocks; ++b)
    for (int y = 0; y < t.rows; ++y) {
      const T* g = grad + b * t.grad_block + y * t.grad_row;
      for (ptrdiff_t i = 0; i < t.row_length; i += Vec<T>::n) sum += load(g + i);
    }
  return sum_lanes<T>(sum);
}

template <class T>
using OuterFn = void (*)(const OuterTile<T>&);

template <class T, int OT>
OuterFn<T> pick_outer(int taps) {
  static constexpr OuterFn<T> fns[] = {outer_tile<T, OT, 1>, outer_tile<T, OT, 2>, outer_tile<T, OT, 3>,
                                       outer_tile<T, OT, TAPS>};
  static_assert(TAPS == 3 || TAPS == 4, "one for every number of taps");
  return fns[taps - 1];
}

// For 1, 2 or MANY_CHANNELS.
template <class T>
OuterFn<T> outer_fn(int channels, int taps) {
  if (channels == MANY_CHANNELS) return pick_outer<T, MANY_CHANNELS>(taps);
  return channels == 2 ? pick_outer<T, 2>(taps) : pick_outer<T, 1>(taps);
}

// All tiles of a block of positions, of which t is the first: `channels` x `taps` weights, and sums of channels for
// `bias` if it is not null. fetch: prefetch the next channels, a part with every tile.
template <class T>
void outer_products(OuterTile<T> t, int channels, int taps, T* bias, bool fetch) {
  const ptrdiff_t line = LINE / sizeof(T), length = t.rows * t.row_length;
  const ptrdiff_t part = div_up(div_up(length, line), div_up(taps, TAPS)) * line;
  const int32_t* const offset = t.offset;
  T* const to = t.to;
  for (int r = 0, count; r < channels; r += count, t.grad += count * t.grad_channel) {
    count = MANY_CHANNELS;
    while (count > channels - r) count /= 2;
    for (int i = 0; bias && i < count; ++i) {
      const T sum = sum_positions(t, t.grad + i * t.grad_channel);
      bias[r + i] = t.add ? bias[r + i] + sum : sum;
    }
    const T* next = t.grad + count * t.grad_channel;
    const int waiting = fetch ? least(MANY_CHANNELS, channels - r - count) : 0;
    ptrdiff_t fetched = 0;
    for (int k = 0; k < taps; k += TAPS) {
      for (const ptrdiff_t end = least(length, fetched + part); fetched < end; fetched += line)
        for (int o = 0; o < waiting; ++o) __builtin_prefetch(next + o * t.grad_channel + fetched);
      t.offset = offset + k;
      t.to = to + r * t.to_channel + k;
      outer_fn<T>(count, least(TAPS, taps - k))(t);
    }
  }
}

// How the work is divided into jobs (group, unit, share). A unit is a part of a group's input channels, whose bands one
// thread fills. Where there are fewer units than threads, several threads share a unit, each with sums of its own.
struct GradPlan {
  int high, wide, deep;  // rows and columns of positions and blocks of samples at once
  int width;             // input channels of a unit, at most
  int units;             // of a group
  int shares;
};

// band: that of x, whose rows are not set yet.
template <class T>
GradPlan plan_grad(const ConvArgs<T>& a, const Band& band, int reach_y, int64_t blocks) {
  const int64_t vector = LANES * int64_t(sizeof(T)), KK = int64_t(a.KH) * a.KW;
  const int64_t L1 = 26 << 10, L2 = 256 << 10;
  const int64_t channels = div_up(TAPS, KK), phases = int64_t(band.NY) * band.NX;
  // Whether a tile's positions of x and grad_y stay in the L1 cache: the next taps read them again.
  const auto fits = [&](int rows, int columns, int64_t images) {
    const int64_t of_x = phases * (rows + reach_y) * (columns + band.CB - a.OW), of_grad = int64_t(rows) * columns;
    return images * vector * (channels * of_x + MANY_CHANNELS * of_grad) <= L1;
  };
  GradPlan p{1, a.OW, 1, 1, 1, 1};
  while (p.wide > 8 && !fits(1, p.wide, 1)) p.wide = int(div_up(p.wide, 2));
  p.wide = int(div_up(a.OW, div_up(a.OW, p.wide)));
  while (p.high < a.OH && p.wide == a.OW && fits(p.high + 1, p.wide, 1)) ++p.high;
  p.high = even_rows(p.high, 1, a.OH);
  while (p.high == a.OH && p.wide == a.OW && p.deep < blocks && fits(p.high, p.wide, p.deep + 1)) ++p.deep;
  const int ICg = a.IC / a.G, threads = int(div_up(a.threads, a.G));
  const int64_t held = L2 / (phases * (p.high + reach_y) * band.CB * vector * p.deep);
  p.units = int(div_up(ICg, most<int64_t>(1, least<int64_t>(held, ICg))));
  // For equal work, the number of units divides that of threads or is a multiple of it.
  while (p.units < least(threads, ICg) && threads % p.units) ++p.units;
  if (p.units > threads) p.units = least(ICg, int(div_up(p.units, threads)) * threads);
  p.width = int(div_up(ICg, p.units));
  p.units = int(div_up(ICg, p.width));
  const int64_t tasks = div_up(blocks, p.deep) * div_up(a.OH, p.high);
  p.shares = int(least<int64_t>(tasks, most(1, threads / p.units)));
  return p;
}

// a.grad_values (OC, IC / G, KH, KW), of all weights: sum of grad_y[n][oc][oy][ox] * x[n][ic][oy*SH + ky*DH - PH][ox*SW
// + kx*DW - PW]; a.grad_bias, where not null: sum of grad_y[n][oc][oy][ox]. a.index and a.values are not used.
template <class T>
void conv2d_weight_grad(const ConvArgs<T>& a) {
  const int KK = a.KH * a.KW, ICg = a.IC / a.G, OCg = a.OC / a.G;
  const int64_t cols = int64_t(ICg) * KK, size = a.OC * cols, width = size + a.OC, plane = int64_t(a.OH) * a.OW;
  const int64_t blocks = div_up(a.N, LANES);
  if (a.N == 0 || plane == 0) {
    for (int64_t k = 0; k < size; ++k) a.grad_values[k] = T(0);
    for (int64_t r = 0; a.grad_bias && r < a.OC; ++r) a.grad_bias[r] = T(0);
    return;
  }
  int32_t* mem = scratch<int32_t>(slot_plan, taps_room(a.KH, a.KW) + cols);
  int32_t* offset = mem + taps_room(a.KH, a.KW);
  Band b;
  const Taps taps = taps_of(a, mem, &b);
  b.CB = a.OW + taps.reach_x;
  const GradPlan plan = plan_grad(a, b, taps.reach_y, blocks);
  set_rows(&b, taps, plan.high);
  tap_offsets(a, b, taps, plan.width, offset);
  const int64_t bands = div_up(a.OH, plan.high), tasks = div_up(blocks, plan.deep) * bands;
  // For grad_y where it cannot be read in place.
  const Band of_grad{a.OC,      a.OH,      a.OW,      1,    1,
                     0,         0,         1,         1,    NO_PHASES,
                     NO_PHASES, plan.high, plan.high, a.OW, int64_t(plan.high) * a.OW * LANES};
  const bool in_place = a.y_layout == Layout::lanes && !a.y_norm, copied = !in_place || a.N % LANES;
  const int64_t x_size = plan.width * b.channel, x_line = int64_t(b.RB * b.SY + b.SY) * a.W * LANES;
  const int64_t grad_size = OCg * of_grad.channel, grad_line = int64_t(plan.high + 1) * a.OW * LANES;
  const TeamScratch<T> sources(slot_source, a.threads, plan.deep * x_size + x_line);
  const TeamScratch<T> grads(slot_grad, a.threads, copied ? plan.deep * grad_size + grad_line : 0);
  T* sums = plan.shares > 1 ? scratch<T>(slot_sums, plan.shares * width) : nullptr;  // of weights and bias, by share
  const int64_t jobs = int64_t(a.G) * plan.units * plan.shares;
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
    T* source = sources.mine();
    T* grad = grads.mine();
#pragma omp for schedule(static)
    for (int64_t job = 0; job < jobs; ++job) {
      const int share = int(job % plan.shares), unit = int(job / plan.shares % plan.units);
      const int group = int(job / plan.shares / plan.units);
      const int c0 = group * ICg + unit * plan.width, c1 = least(c0 + plan.width, (group + 1) * ICg);
      const int r0 = group * OCg, r1 = r0 + OCg;
      const int64_t first = tasks * share / plan.shares, last = tasks * (share + 1) / plan.shares;
      T* const to = (sums ? sums + share * width : a.grad_values) + r0 * cols + int64_t(unit) * plan.width * KK;
      T* const bias = !a.grad_bias || unit ? nullptr : (sums ? sums + share * width + size : a.grad_bias) + r0;
      for (int64_t task = first; task < last; ++task) {
        const int64_t nb = task / bands * plan.deep;
        const int row0 = int(task % bands) * plan.high;
        OuterTile<T> t;
        t.blocks = int(least<int64_t>(plan.deep, blocks - nb));
        t.rows = least(plan.high, a.OH - row0);
        const bool here = in_place && (nb + t.blocks) * LANES <= a.N;
        for (int i = 0; i < t.blocks; ++i) {
          fill_band(b, a.x, a.x_layout, a.N, nb + i, row0, c0, c1, source + i * x_size - c0 * b.channel,
                    source + plan.deep * x_size, Passage<T>{a.x_scale, a.x_shift, a.x_relu});
          if (here) continue;
          Passage<T> pass;
          pass.back = a.y_norm;
          fill_band(of_grad, a.grad_y, a.y_layout, a.N, nb + i, row0, r0, r1,
                    grad + i * grad_size - r0 * of_grad.channel, grad + plan.deep * grad_size, pass);
        }
        t.src_block = x_size;
        t.src_row = int64_t(b.CB) * LANES;
        t.grad_block = here ? a.OC * plane * LANES : grad_size;
        t.grad_channel = here ? plane * LANES : of_grad.channel;
        t.grad_row = ptrdiff_t(a.OW) * LANES;
        t.offset = offset;
        t.to = to;
        t.to_channel = cols;
        const T* from = here ? a.grad_y + ((nb * a.OC + r0) * plane + int64_t(row0) * a.OW) * LANES : grad;
        for (int x = 0; x < a.OW; x += plan.wide) {
          t.row_length = ptrdiff_t(least(plan.wide, a.OW - x)) * LANES;
          t.grad = from + x * LANES;
          t.src = source + x * LANES;
          t.add = task > first || x > 0;
          outer_products(t, OCg, (c1 - c0) * KK, bias, here);
        }
      }
    }
    if (sums) {
#pragma omp for schedule(static)
      for (int64_t k = 0; k < (a.grad_bias ? width : size); ++k) {
        T total = sums[k];
        for (int m = 1; m < plan.shares; ++m) total += sums[m * width + k];
        (k < size ? a.grad_values[k] : a.grad_bias[k - size]) = total;
      }
    }
  }
}
