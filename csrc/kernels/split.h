// Integer helpers: rounding up, bounds, a search, equal shares of work. No include guard: see isa/kernels.inc.

SB_INLINE int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
template <class I>
SB_INLINE I least(I a, I b) {
  return b < a ? b : a;
}
template <class I>
SB_INLINE I most(I a, I b) {
  return a < b ? b : a;
}

// The first position in [k, end) at which the ascending `col` reaches `bound`, or `end`.
SB_INLINE int32_t first_from(const int32_t* col, int32_t k, int32_t end, int64_t bound) {
  while (k < end) {
    const int32_t mid = k + (end - k) / 2;
    if (col[mid] < bound)
      k = mid + 1;
    else
      end = mid;
  }
  return k;
}

// First row of part p, where `rows` are split into `parts` of about equal work: nonzeros, and one for each row.
// ptr[r * step]: nonzeros before row r.
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
