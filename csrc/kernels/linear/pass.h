// A sparse linear layer: arguments of a pass, and how its work is divided. No include guard: see isa/kernels.inc.
//
// Samples are packed as [features][TL][16], TL blocks of lanes side by side. A linear layer then works on tiles of one
// row and TL columns (see tile/), and one nonzero serves up to TL * 16 samples.

constexpr int GROUP = 16;  // features are split at multiples of this

// TL: at most MAX_TILE lane blocks, so that tiles have about the same size.
SB_INLINE int lane_blocks(int64_t N) {
  const int64_t blocks = div_up(N, LANES);
  return int(div_up(blocks, div_up(blocks, MAX_TILE)));
}

// Into how many chunks the source features are split, so that the packed source of a chunk stays in half of a typical
// L2 cache, as long as a chunk still has a few nonzeros per row.
SB_INLINE int linear_chunks(const Index& ix, int64_t features, int64_t rows, int64_t bytes_per_feature) {
  const double L2 = 640 << 10, FEW = 12;
  int chunks = int(double(features * bytes_per_feature) / L2 + 0.999);
  const int bound = int(double(ix.nnz) / double(most<int64_t>(1, rows)) / FEW);
  return most(1, least(chunks, bound));
}

// out[k] = the sum over the copies of sums[from[k]] (without `from`: sums[k]), for k in [k0, k1). Copies are `stride`
// elements apart.
template <class T>
void sum_copies(const T* sums, int64_t stride, int copies, const int32_t* from, int64_t k0, int64_t k1, T* out) {
  int64_t k = k0;
  for (; k + Vec<T>::n <= k1; k += Vec<T>::n) {
    V<T> sum = zero<T>();
    for (int c = 0; c < copies; ++c)
      sum += from ? gather_lanes(sums + c * stride, from + k) : load(sums + c * stride + k);
    store(out + k, sum);
  }
  for (; k < k1; ++k) {
    out[k] = T(0);
    for (int c = 0; c < copies; ++c) out[k] += sums[c * stride + (from ? from[k] : k)];
  }
}

// One product: dst[n][d] = bias[d] + sum of value * src[n][s] over the nonzeros (d, s). `ptr` and `index` are in CSR
// order (forward) or CSC order (input gradient).
template <class T>
struct LinearPass {
  int64_t N, dst_features, src_features;
  const int32_t* ptr;
  const int32_t* index;   // source feature of each nonzero
  const int32_t* order;   // value[order[k]] belongs to nonzero k; null: value[k] does
  const int32_t* starts;  // where each chunk of each row begins, dst_features x chunks + 1; with one chunk, ptr
  const T* value;
  T* sorted;  // not null: sort_values puts the values here, in the order of the nonzeros
  const T* bias;
  T* dst;
  Layout dst_layout;
  int TL, chunks;

  // To be called at the start of a parallel region. These loads are scattered: in a loop of their own many of them are
  // in flight at once, between the multiply-adds only a few.
  void sort_values() const {
    if (!sorted) return;
    const int64_t nnz = ptr[dst_features], piece = 1024;
#pragma omp for schedule(static)
    for (int64_t k = 0; k < nnz; k += piece) sum_copies(value, 0, 1, order, k, least(nnz, k + piece), sorted);
  }
};

// How the work is divided into tasks (unit, part). A unit is a tile, or some lane blocks of one; a part is a share of
// the destination features. Every thread packs what its own tasks read: packed data shared between threads would have
// to move between their caches, which takes longer.
struct Share {
  int64_t tiles;
  int subs, width;  // units a tile, lane blocks a unit
  int parts;
  int64_t units() const { return tiles * subs; }
  int64_t tasks() const { return units() * parts; }
};

// by_lanes: the lane blocks of a tile may go to different threads. Then features are split into more parts until all
// threads have about the same number of tasks.
SB_INLINE Share share_out(int64_t N, int TL, int threads, int64_t features, bool by_lanes) {
  Share s;
  s.tiles = div_up(div_up(N, LANES), TL);
  const int want = by_lanes ? int(most<int64_t>(1, div_up(threads, s.tiles))) : 1;
  s.width =
      int(div_up(TL, least(want, int(div_up(TL, 2)))));  // with fewer than two lane blocks, reading the index dominates
  s.subs = int(div_up(TL, s.width));
  const int most_parts = int(most<int64_t>(1, least<int64_t>(2 * threads, features / GROUP)));
  s.parts = 1;
  while (s.parts < most_parts && 5 * s.tasks() < 4 * div_up(s.tasks(), threads) * threads) ++s.parts;
  return s;
}

SB_INLINE int linear_parts(int threads, int64_t features) {
  if (threads == 1) return 1;
  return int(most<int64_t>(1, least<int64_t>(4 * int64_t(threads), features / GROUP)));
}

// First feature of part p, a multiple of GROUP: parts have about equal nonzeros.
SB_INLINE int64_t linear_part(const int32_t* ptr, int64_t features, int parts, int p) {
  const int64_t at = part_start(ptr, 1, features, parts, p);
  return p >= parts ? features : at / GROUP * GROUP;
}

// The arguments of the forward pass or of the input gradient. kept: where the starts of chunks are cached; null: one
// chunk, and values are not sorted.
template <class T>
LinearPass<T> linear_pass(const LinearArgs<T>& a, bool forward, ChunkStarts* kept) {
  LinearPass<T> p;
  const Index& ix = a.index;
  p.N = a.N;
  p.dst_features = forward ? ix.rows : ix.cols;
  p.src_features = forward ? ix.cols : ix.rows;
  p.ptr = forward ? ix.rowptr : ix.colptr;
  p.TL = lane_blocks(a.N);
  p.chunks = !kept ? 1 : linear_chunks(ix, p.src_features, p.dst_features, int64_t(p.TL) * LANES * sizeof(T));
  p.index = forward ? ix.col : ix.row;
  p.order = forward ? nullptr : ix.csc_to_csr;
  p.starts = p.chunks == 1 ? p.ptr : kept->of(p.dst_features, p.src_features, p.ptr, p.index, p.chunks, a.threads);
  p.value = a.values;
  p.sorted = p.order && kept ? scratch<T>(slot_plan, ix.nnz) : nullptr;
  p.bias = forward ? a.bias : nullptr;
  p.dst = forward ? a.y : a.grad_x;
  p.dst_layout = forward ? a.y_layout : a.x_layout;
  return p;
}
