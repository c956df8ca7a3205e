// The inner loop of both gradients in one pass, and the choice of the gathering loop. No include guard: see
// isa/kernels.inc.

// gather_tile_only, and for the gradients of values what correlate_tile does, with t.own for its `grad`.
template <class T, int TR, int TC>
void gather_tile_both(const GatherTile<T>& t) {
  constexpr int n = Vec<T>::n;
  V<T> room[SumQueue<T>::ROOM];
  SumQueue<T> queue(room);
  // Local copies: a store could overwrite t, as far as the compiler knows, and it would reload them for every nonzero.
  const GradValues<T> grad_values = t.grad_values;
  const int32_t* const offset = t.offset;
  const T* const value = t.value;
  const ptrdiff_t scale = t.scale, src_row = t.src_row;
  for (int64_t r = t.r0; r < t.r1; ++r) {
    T* dst = t.dst + (r - t.r0) * t.dst_channel;
    T* sums = t.first && t.last ? nullptr : t.sums + (r - t.r0) * TR * TC * LANES;
    const int32_t k0 = t.begin[r * t.ptr_step], k1 = t.end[r * t.ptr_step];
    V<T> half[TR][TC];
    if (k0 == k1) {  // as in most phases of a strided 1x1 convolution
      for (int part = 0; (t.first || t.last) && part < LANES; part += n) {
        V<T> acc[TR][TC];
        begin_tile<T, TR, TC>(t, r, part, sums, acc);
        finish_tile<T, TR, TC>(t, r, part, acc, dst, sums, half);
      }
      continue;
    }
    if (t.prefetch) prefetch_nonzeros(t, r + AHEAD);
    if (t.first) {
      const T* next = t.own.data + (r - t.r0 + AHEAD) * t.own.channel;
      for (int i = 0; i < TR; ++i)
        for (int j = 0; j < TC; ++j) __builtin_prefetch(next + i * t.own.row + j * t.own.col);
    }
    V<T> between[LANES / n][TR][TC];  // sums between two pieces of the row
    for (int32_t k = k0, end; k < k1; k = end) {
      end = piece_end<T>(k, k1);
      for (int part = 0; part < LANES; part += n) {
        V<T> acc[TR][TC], own[TR][TC];
        if (k == k0)
          begin_tile<T, TR, TC>(t, r, part, sums, acc);
        else
          copy_tile<T, TR, TC>(between[part / n], acc);
        load_own<T, TR, TC>(t.own, r - t.r0, part, own);
        const T* src[TR];
        for (int i = 0; i < TR; ++i) src[i] = t.src + part + i * src_row;
        queue.put_part(part, k, end, grad_values, [&](int32_t k, V<T> sum) {
          const ptrdiff_t at = TR == 1 ? offset[k] * scale : offset[k];
          const V<T> v = splat<T>(value[k]);
          V<T> s[2] = {sum, zero<T>()};  // two chains; out-of-order execution overlaps neighbouring nonzeros
          for (int i = 0; i < TR; ++i)
            for (int j = 0; j < TC; ++j) {
              V<T> g = load(src[i] + at + j * LANES);
              in_register<T>(g);
              acc[i][j] += v * g;
              s[j & 1] += own[i][j] * g;
            }
          return s[0] + s[1];
        });
        if (end == k1)
          finish_tile<T, TR, TC>(t, r, part, acc, dst, sums, half);
        else
          copy_tile<T, TR, TC>(acc, between[part / n]);
      }
    }
  }
  queue.flush(grad_values);
}

template <class T, int TR, int TC>
void gather_tile(const GatherTile<T>& t) {
  t.grad_values.at ? gather_tile_both<T, TR, TC>(t) : gather_tile_only<T, TR, TC>(t);
}

template <class T>
using GatherFn = void (*)(const GatherTile<T>&);

template <class T, int TR, size_t... C>
GatherFn<T> pick_gather(int tc, std::index_sequence<C...>) {
  static constexpr GatherFn<T> fns[] = {gather_tile<T, TR, int(C) + 1>...};
  return fns[tc - 1];
}

template <class T>
GatherFn<T> gather_fn(int tr, int tc) {
  if (tr == 4) return pick_gather<T, 4>(tc, std::make_index_sequence<MAX_TILE / 4>{});
  if (tr == 2) return pick_gather<T, 2>(tc, std::make_index_sequence<MAX_TILE / 2>{});
  return pick_gather<T, 1>(tc, std::make_index_sequence<MAX_TILE>{});
}
