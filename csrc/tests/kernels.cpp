// Every kernel of every instruction set that this CPU has, against plain loops in double. Needs a C++ compiler alone:
// `make test-kernels` runs it on this machine, `make test-neon` cross-compiled and emulated.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "dispatch.h"
#include "pattern.h"

using namespace sparsebreg;

namespace {

using Doubles = std::vector<double>;

int compared = 0, failed = 0;
std::string where;  // the case at hand

void fail(const std::string& what) {
  std::printf("FAILED %s: %s\n", where.c_str(), what.c_str());
  if (++failed == 10) std::exit(1);
}

// One line a family of cases, with what was compared since the last one.
void family(const char* name) {
  std::string isas;
  for (const std::string& isa : available_isas()) isas += " " + isa;
  std::printf("%-12s %6d results compared on%s\n", name, compared, isas.c_str());
  if (compared == 0 || failed) std::exit(1);
  compared = 0;
}

std::string text(std::initializer_list<int64_t> numbers) {
  std::string s;
  for (int64_t n : numbers) s += (s.empty() ? "" : " ") + std::to_string(n);
  return s;
}

// A float between -1 and 1: float and double kernels share one result.
double uniform() {
  static std::mt19937 bits(7);
  return std::uniform_real_distribution<float>(-1, 1)(bits);
}

Doubles random_doubles(int64_t count) {
  Doubles x(size_t(count), 0.0);
  for (double& v : x) v = uniform();
  return x;
}

// A tensor (N, C, P) in one of the layouts.
struct Shape {
  int64_t N, C, P;
  Layout layout;
  int64_t size() const { return (layout == Layout::lanes ? (N + LANES - 1) / LANES * LANES : N) * C * P; }
  int64_t at(int64_t n, int64_t c, int64_t p) const {
    if (layout == Layout::lanes) return ((n / LANES * C + c) * P + p) * LANES + n % LANES;
    return layout == Layout::plain ? (n * C + c) * P + p : (n * P + p) * C + c;
  }
};

// Elements on a cache line's border, NaN at first: what a kernel reads but should not, or fails to write, is seen.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data(static_cast<T*>(std::aligned_alloc(64, (size_t(count) * sizeof(T) + 127) / 64 * 64))) {
    for (int64_t i = 0; i < count; ++i) data[i] = std::numeric_limits<T>::quiet_NaN();
  }
  Buffer(const Shape& s, const Doubles& x) : Buffer(s.size()) {
    size_t i = 0;
    for (int64_t n = 0; n < s.N; ++n)
      for (int64_t c = 0; c < s.C; ++c)
        for (int64_t p = 0; p < s.P; ++p) data[s.at(n, c, p)] = T(x[i++]);
  }
  explicit Buffer(const Doubles& x) : Buffer(Shape{1, 1, int64_t(x.size()), Layout::plain}, x) {}
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(data); }
  operator T*() { return data; }

  T* data;
};

template <class T>
void compare(const char* what, const Buffer<T>& got, const Shape& s, const Doubles& wanted) {
  ++compared;
  double size = 1;
  for (double w : wanted)
    if (std::isfinite(w)) size = std::max(size, std::abs(w));
  const double limit = size * (sizeof(T) == 4 ? 2e-5 : 1e-12);
  size_t i = 0;
  for (int64_t n = 0; n < s.N; ++n)
    for (int64_t c = 0; c < s.C; ++c)
      for (int64_t p = 0; p < s.P; ++p, ++i) {
        const double g = double(got.data[s.at(n, c, p)]), w = wanted[i];
        if (std::isnan(w) ? std::isnan(g) : g == w || std::abs(g - w) <= limit) continue;
        return fail(std::string(what) + "[" + text({n, c, p}) + "]: expected " + std::to_string(w) + ", got " +
                    std::to_string(g));
      }
}

template <class T>
void compare(const char* what, const Buffer<T>& got, const Doubles& wanted) {
  compare(what, got, Shape{1, 1, int64_t(wanted.size()), Layout::plain}, wanted);
}

template <class I>
void same(const char* what, const std::vector<I>& got, const std::vector<I>& wanted) {
  ++compared;
  if (got != wanted) fail(std::string(what) + " differs");
}

// A matrix with nonzeros at random places, its index made by plain loops. A row in five is empty, but for density 1.
struct Pattern {
  Pattern(int64_t rows, int64_t cols, double density) : at(size_t(rows * cols), -1), rowptr{0}, colptr{0} {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < cols; ++c)
        if (density == 1 || (r % 5 != 2 && uniform() < 2 * density - 1)) {
          at[size_t(r * cols + c)] = int32_t(col.size());
          col.push_back(int32_t(c));
        }
      rowptr.push_back(int32_t(col.size()));
    }
    for (int64_t c = 0; c < cols; ++c) {
      for (int64_t r = 0; r < rows; ++r)
        if (const int32_t k = at[size_t(r * cols + c)]; k >= 0) row.push_back(int32_t(r)), csc_to_csr.push_back(k);
      colptr.push_back(int32_t(row.size()));
    }
    csr_to_csc.resize(col.size());
    for (size_t i = 0; i < csc_to_csr.size(); ++i) csr_to_csc[size_t(csc_to_csr[i])] = int32_t(i);
    values = random_doubles(int64_t(col.size()));
    index = Index{rows,          cols,       int64_t(col.size()), rowptr.data(),     col.data(),
                  colptr.data(), row.data(), csc_to_csr.data(),   csr_to_csc.data(), &row_chunks,
                  &col_chunks};
  }
  Pattern(const Pattern&) = delete;

  std::vector<int32_t> at;  // number of a place's nonzero, or -1
  std::vector<int32_t> rowptr, col, colptr, row, csc_to_csr, csr_to_csc;
  Doubles values;
  ChunkStarts row_chunks, col_chunks;
  Index index;
};

template <class T>
const Kernels<T>& kernels();
template <>
const Kernels<float>& kernels<float>() {
  return active_table().f32;
}
template <>
const Kernels<double>& kernels<double>() {
  return active_table().f64;
}

// f(T(), threads) for every instruction set, type and number of threads.
template <class F>
void everywhere(const std::string& name, F f) {
  for (const std::string& isa : available_isas()) {
    select_isa(isa);
    for (int threads : {1, 2}) {
      where = name + ", " + isa + ", float, threads " + std::to_string(threads);
      f(float(0), threads);
      where = name + ", " + isa + ", double, threads " + std::to_string(threads);
      f(double(0), threads);
    }
  }
}

constexpr int BATCHES[] = {1, 7, 16, 29, 37};

void test_linear() {
  constexpr int batches[] = {1, 2, 3, 4, 5, 16, 29, 37, 150, 290};  // few by a kernel of their own; several tiles
  struct {
    int64_t rows, cols;
    double density;
  } const cases[] = {{5, 7, .5},    {33, 40, .2},  {40, 33, .1},    {1, 50, .5},     {50, 1, .5},
                     {6, 5, 1},     {6, 5, 0},     {24, 4000, .02}, {4000, 24, .02},  // the last two in several passes
                     {130, 90, .1}, {20, 500, .4},  // rows of several cache lines for each of two threads
                     {400, 5, .9},  {5, 400, .9}};  // more nonzeros than are taken through the lanes at once
  for (const auto& c : cases) {
    const Pattern p(c.rows, c.cols, c.density);
    for (int64_t N : batches) {
      const Doubles x = random_doubles(N * c.cols), bias = random_doubles(c.rows), grad_y = random_doubles(N * c.rows);
      Doubles y(size_t(N * c.rows)), grad_x(x.size()), grad_values(p.values.size()), grad_bias(bias.size());
      for (int64_t n = 0; n < N; ++n)
        for (int64_t r = 0; r < c.rows; ++r) {
          const size_t o = size_t(n * c.rows + r);
          y[o] = bias[size_t(r)];
          grad_bias[size_t(r)] += grad_y[o];
          for (int64_t s = 0; s < c.cols; ++s) {
            const int32_t k = p.at[size_t(r * c.cols + s)];
            if (k < 0) continue;
            const size_t i = size_t(n * c.cols + s);
            y[o] += p.values[size_t(k)] * x[i];
            grad_x[i] += p.values[size_t(k)] * grad_y[o];
            grad_values[size_t(k)] += grad_y[o] * x[i];
          }
        }
      for (Layout xl : {Layout::plain, Layout::lanes})
        for (Layout yl : {Layout::plain, Layout::lanes})
          everywhere("linear " + text({c.rows, c.cols}) + " nnz " + text({p.index.nnz}) + " N " + text({N}) +
                         " layouts " + text({int(xl), int(yl)}),
                     [&](auto zero, int threads) {
                       using T = decltype(zero);
                       const Shape xs{N, c.cols, 1, xl}, ys{N, c.rows, 1, yl};
                       Buffer<T> v(p.values), b(bias), in(xs, x), out(ys.size()), gy(ys, grad_y), gx(xs.size()),
                           gv(p.index.nnz), gb(c.rows);
                       LinearArgs<T> a{p.index, N, v, b, in, out, gy, gx, gv, gb, xl, yl, threads};
                       kernels<T>().linear_forward(a);
                       kernels<T>().linear_backward(a);
                       compare("y", out, ys, y);
                       compare("grad_x", gx, xs, grad_x);
                       compare("grad_values", gv, grad_values);
                       compare("grad_bias", gb, grad_bias);
                       for (int only = 0; only < 3; ++only) {  // one gradient alone
                         Buffer<T> x1(xs.size()), v1(p.index.nnz), b1(c.rows);
                         a.grad_x = only == 0 ? x1.data : nullptr;
                         a.grad_values = only == 1 ? v1.data : nullptr;
                         a.grad_bias = only == 2 ? b1.data : nullptr;
                         if (only) a.index.colptr = a.index.row = a.index.csc_to_csr = a.index.csr_to_csc = nullptr;
                         kernels<T>().linear_backward(a);
                         if (only == 0) compare("grad_x alone", x1, xs, grad_x);
                         if (only == 1) compare("grad_values alone", v1, grad_values);
                         if (only == 2) compare("grad_bias alone", b1, grad_bias);
                       }
                     });
    }
  }
  family("linear");
}

template <class T>
std::vector<T> floats(const Doubles& x) {
  return std::vector<T>(x.begin(), x.end());
}

// Steps that take their gradient from its factors, against those that are given it.
template <class T>
void test_steps_of(const GradFactors<T>& f, const T* grad, bool masked, int threads) {
  const int64_t n = f.rows * f.cols;
  std::vector<uint8_t> active(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) active[size_t(i)] = i % 3 != 1;
  const Doubles p0 = random_doubles(n), v0 = random_doubles(n), m0 = random_doubles(n);
  std::vector<T> p[2], v[2], m[2], s[2], gathered(static_cast<size_t>(n));
  const Pattern all(f.rows, f.cols, 1);
  std::vector<uint64_t> bits(size_t(f.rows * row_words(f.cols)));
  mark_columns(f.rows, f.cols, all.rowptr.data(), all.col.data(), bits.data(), threads);
  const GatherArgs<T> gather{&all.index, bits.data(), gathered.data()};
  const auto steps = [&](int from) {
    p[from] = floats<T>(p0), v[from] = floats<T>(v0), m[from] = floats<T>(m0), s[from].assign(size_t(n), T(1));
    StepArgs<T> a{n,
                  p[from].data(),
                  from ? nullptr : grad,
                  from ? &f : nullptr,
                  v[from].data(),
                  m[from].data(),
                  masked ? active.data() : nullptr,
                  0.125,
                  0.75,
                  1.5,
                  0.3,
                  0.0625,
                  1,
                  threads,
                  &gather};
    const auto check = [&](bool inside) {
      if (!inside) fail("a nonzero outside of all places");
      same("what a step gathers", gathered, p[from]);
    };
    check(kernels<T>().linbreg_step(a));
    check(kernels<T>().proxsgd_step(a));
    AdaStepArgs<T> ada{n,
                       p[from].data(),
                       from ? nullptr : grad,
                       from ? &f : nullptr,
                       v[from].data(),
                       m[from].data(),
                       s[from].data(),
                       masked ? active.data() : nullptr,
                       0.125,
                       0.75,
                       0.875,
                       0.25,
                       0.5,
                       0.25,
                       1.5,
                       0.3,
                       0.0625,
                       1,
                       false,
                       threads,
                       &gather};
    check(kernels<T>().adabreg_step(ada));
  };
  steps(0);
  steps(1);
  same("p of factors", p[1], p[0]);
  same("v of factors", v[1], v[0]);
  same("m of factors", m[1], m[0]);
  same("s of factors", s[1], s[0]);
}

void test_weight_grad() {
  struct {
    int64_t N, rows, cols;
    double density;
  } const cases[] = {{1, 1, 1, .5},    {7, 5, 3, .5},      {64, 33, 64, .4}, {65, 16, 65, .4},   {300, 70, 130, .3},
                     {16, 40, 200, 0}, {130, 2000, 9, .2}, {64, 20, 70, 1},  {20, 300, 500, .5}, {3, 9, 5000, .3}};
  for (const auto& c : cases) {
    const Doubles x = random_doubles(c.N * c.cols);
    Doubles grad_y = random_doubles(c.N * c.rows), wanted(size_t(c.rows * c.cols));
    int64_t nonzeros = 0;
    for (double& g : grad_y) nonzeros += (g = uniform() < 2 * c.density - 1 ? g : 0) != 0;
    for (int64_t n = 0; n < c.N; ++n)
      for (int64_t r = 0; r < c.rows; ++r)
        for (int64_t i = 0; i < c.cols; ++i)
          wanted[size_t(r * c.cols + i)] += grad_y[size_t(n * c.rows + r)] * x[size_t(n * c.cols + i)];
    const int64_t blocks = (c.N + GRAD_SAMPLES - 1) / GRAD_SAMPLES, strips = (c.cols + GRAD_STRIP - 1) / GRAD_STRIP;
    everywhere("weight_grad " + text({c.N, c.rows, c.cols, nonzeros}), [&](auto zero, int threads) {
      using T = decltype(zero);
      Buffer<T> gy(grad_y), in(x), out(int64_t(wanted.size())), packed(strips * c.N * GRAD_STRIP),
          value(blocks * c.rows * GRAD_SAMPLES);
      std::vector<int32_t> count(size_t(blocks * c.rows));
      std::vector<uint16_t> place(size_t(blocks * c.rows * GRAD_SAMPLES));
      if (kernels<T>().count_nonzeros(gy, c.N * c.rows, threads) != nonzeros) fail("count_nonzeros");
      kernels<T>().factor_grad({c.N, c.rows, c.cols, gy, in, packed, count.data(), place.data(), value, threads});
      const GradFactors<T> f{c.N, c.rows, c.cols, packed, count.data(), place.data(), value};
      kernels<T>().weight_grad(f, out, threads);
      compare("grad_weight", out, wanted);
      for (bool masked : {false, true}) test_steps_of<T>(f, out, masked, threads);
    });
  }
  family("weight_grad");
}

void test_conv2d() {
  struct {
    int IC, H, W, OC, KH, KW, SH, SW, PH, PW, DH, DW, G;
    double density;
  } const cases[] = {
      {3, 7, 9, 4, 3, 3, 1, 1, 1, 1, 1, 1, 1, .3},    {4, 6, 40, 5, 3, 3, 1, 1, 1, 1, 1, 1, 1, .3},
      {8, 8, 8, 40, 3, 3, 2, 2, 1, 1, 1, 1, 1, .2},   {3, 9, 11, 5, 3, 3, 2, 2, 1, 1, 1, 1, 1, .4},
      {6, 5, 6, 10, 1, 1, 1, 1, 0, 0, 1, 1, 1, .4},   {6, 7, 8, 10, 1, 1, 2, 2, 0, 0, 1, 1, 1, .4},
      {2, 12, 12, 6, 5, 5, 1, 1, 0, 0, 1, 1, 1, .2},  {4, 11, 6, 6, 5, 3, 2, 1, 2, 0, 1, 2, 2, .5},
      {4, 9, 9, 6, 3, 3, 1, 1, 2, 2, 2, 2, 1, .5},    {4, 13, 12, 6, 3, 3, 2, 3, 2, 1, 3, 2, 1, .5},
      {6, 6, 6, 6, 3, 3, 1, 1, 1, 1, 1, 1, 6, .6},    {4, 8, 8, 4, 2, 2, 3, 3, 0, 0, 1, 1, 1, .5},
      {3, 4, 4, 4, 2, 2, 1, 1, 3, 3, 1, 1, 1, .5},    {4, 1, 1, 5, 3, 3, 1, 1, 1, 1, 1, 1, 1, .5},
      {3, 5, 5, 4, 3, 3, 1, 1, 1, 1, 1, 1, 1, 0},     {3, 5, 5, 4, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1},
      {64, 6, 6, 24, 3, 3, 1, 1, 1, 1, 1, 1, 1, .1},   // sums of a row in several passes
      {32, 4, 4, 48, 3, 3, 1, 1, 1, 1, 1, 1, 1, .4},   // nonzeros sorted by several threads
      {13, 5, 5, 13, 5, 5, 1, 1, 2, 2, 1, 1, 1, 1},    // more nonzeros than are taken through the lanes at once
      {2, 3, 150, 9, 3, 3, 1, 2, 1, 1, 1, 1, 1, .4},   // rows in several parts
      {16, 64, 64, 16, 3, 3, 1, 1, 1, 1, 1, 1, 1, .1}  // several bands; results written past the caches
  };
  for (const auto& c : cases) {
    const int OH = (c.H + 2 * c.PH - c.DH * (c.KH - 1) - 1) / c.SH + 1;
    const int OW = (c.W + 2 * c.PW - c.DW * (c.KW - 1) - 1) / c.SW + 1;
    const int ICg = c.IC / c.G, OCg = c.OC / c.G;
    const Pattern p(c.OC, int64_t(ICg) * c.KH * c.KW, c.density);
    for (int64_t N : BATCHES) {
      const bool large = c.H == 64;
      if (large && N != 16) continue;
      // x is what a norm makes of raw; the kernels get the one or, in the lane layout, the other with the norm.
      const bool relu = N % 2;
      const Doubles raw = random_doubles(N * c.IC * c.H * c.W), bias = random_doubles(c.OC),
                    scale = random_doubles(c.IC), shift = random_doubles(c.IC);
      // The gradient of y in the same way: what a norm behind it makes of the gradient of its result.
      const Doubles behind = random_doubles(N * c.OC * OH * OW), raw_grad = random_doubles(N * c.OC * OH * OW),
                    mean = random_doubles(c.OC), slope = random_doubles(c.OC), gate = random_doubles(c.OC);
      Doubles grad_y(behind.size());
      for (size_t i = 0; i < grad_y.size(); ++i) {
        const size_t oc = i / (size_t(OH) * size_t(OW)) % size_t(c.OC);
        const double passed = relu && !(gate[oc] * behind[i] + bias[oc] > 0) ? 0 : raw_grad[i];
        grad_y[i] = mean[oc] * passed + slope[oc] * (behind[i] - mean[oc]) + bias[oc];
      }
      Doubles x(raw.size());
      for (size_t i = 0; i < x.size(); ++i) {
        const size_t ic = i / (size_t(c.H) * size_t(c.W)) % size_t(c.IC);
        x[i] = scale[ic] * raw[i] + shift[ic];
        if (relu) x[i] = std::max(x[i], 0.0);
      }
      Doubles y(grad_y.size()), grad_x(x.size()), grad_values(p.values.size()), grad_bias(bias.size());
      Doubles grad_weight(p.at.size());
      for (int64_t n = 0; n < N; ++n)
        for (int oc = 0; oc < c.OC; ++oc)
          for (int oy = 0; oy < OH; ++oy)
            for (int ox = 0; ox < OW; ++ox) {
              const size_t o = size_t(((n * c.OC + oc) * OH + oy) * OW + ox);
              y[o] = bias[size_t(oc)];
              grad_bias[size_t(oc)] += grad_y[o];
              const int taps = ICg * c.KH * c.KW;
              for (int j = 0; j < taps; ++j) {
                const int ic = oc / OCg * ICg + j / (c.KH * c.KW);
                const int iy = oy * c.SH - c.PH + j / c.KW % c.KH * c.DH, ix = ox * c.SW - c.PW + j % c.KW * c.DW;
                if (iy < 0 || iy >= c.H || ix < 0 || ix >= c.W) continue;
                const size_t i = size_t(((n * c.IC + ic) * c.H + iy) * c.W + ix), w = size_t(oc * taps + j);
                grad_weight[w] += grad_y[o] * x[i];
                const int32_t k = p.at[w];
                if (k < 0) continue;
                y[o] += p.values[size_t(k)] * x[i];
                grad_x[i] += p.values[size_t(k)] * grad_y[o];
                grad_values[size_t(k)] += grad_y[o] * x[i];
              }
            }
      // What the ReLU lets pass of grad_x, and its product with raw, centred anywhere.
      const Doubles x_mean = random_doubles(c.IC);
      Doubles sum_g(x_mean.size()), sum_gx(x_mean.size());
      for (size_t i = 0; i < x.size(); ++i) {
        const size_t ic = i / (size_t(c.H) * size_t(c.W)) % size_t(c.IC);
        if (!(x[i] > 0)) continue;
        sum_g[ic] += grad_x[i];
        sum_gx[ic] += grad_x[i] * (raw[i] - x_mean[ic]);
      }
      Doubles y_mean(bias.size()), y_var(bias.size());
      const double each = double(N) * OH * OW;
      const auto channel = [&](size_t i) { return i / (size_t(OH) * size_t(OW)) % size_t(c.OC); };
      for (size_t i = 0; i < y.size(); ++i) y_mean[channel(i)] += y[i] / each;
      for (size_t i = 0; i < y.size(); ++i)
        y_var[channel(i)] += (y[i] - y_mean[channel(i)]) * (y[i] - y_mean[channel(i)]) / each;
      for (Layout xl : {Layout::plain, Layout::lanes, Layout::channels_last})
        for (Layout yl : {Layout::plain, Layout::lanes, Layout::channels_last}) {
          if (large && xl != Layout::lanes) continue;
          everywhere(
              "conv2d " +
                  text({c.IC, c.H, c.W, c.OC, c.KH, c.KW, c.SH, c.SW, c.PH, c.PW, c.DH, c.DW, c.G, p.index.nnz}) +
                  " N " + text({N}) + " layouts " + text({int(xl), int(yl)}),
              [&](auto zero, int threads) {
                using T = decltype(zero);
                const Shape xs{N, c.IC, int64_t(c.H) * c.W, xl}, ys{N, c.OC, int64_t(OH) * OW, yl};
                for (int norms = 0; norms < 4; ++norms) {
                  const bool norm = norms & 1, back = norms & 2;
                  if ((norm && xl != Layout::lanes) || (back && yl != Layout::lanes)) continue;
                  Buffer<T> v(p.values), b(bias), in(xs, norm ? raw : x), out(ys.size()),
                      gy(ys, back ? raw_grad : grad_y), gx(xs.size()), gv(p.index.nnz), gb(c.OC), sb(scale), hb(shift),
                      zb(ys, behind), mb(mean), lb(slope), tb(gate);
                  NormArgs<T> y_norm{};
                  y_norm.N = N, y_norm.C = c.OC, y_norm.P = int64_t(OH) * OW, y_norm.x = zb, y_norm.grad_y = gy;
                  y_norm.mean = mb, y_norm.scale = mb, y_norm.slope = lb, y_norm.shift = b;
                  if (relu) y_norm.relu_scale = tb, y_norm.relu_shift = b;
                  ConvArgs<T> a{};
                  a.index = p.index, a.index.colptr = a.index.row = a.index.csc_to_csr = a.index.csr_to_csc = nullptr;
                  a.N = N, a.IC = c.IC, a.H = c.H, a.W = c.W, a.OC = c.OC, a.OH = OH, a.OW = OW;
                  a.KH = c.KH, a.KW = c.KW, a.SH = c.SH, a.SW = c.SW, a.PH = c.PH, a.PW = c.PW, a.DH = c.DH;
                  a.DW = c.DW, a.G = c.G, a.values = v, a.bias = b, a.x = in, a.y = out, a.grad_y = gy, a.grad_x = gx;
                  a.grad_values = gv, a.grad_bias = gb, a.x_layout = xl, a.y_layout = yl, a.threads = threads;
                  if (norm) a.x_scale = sb, a.x_shift = hb, a.x_relu = relu;
                  if (back) a.y_norm = &y_norm;
                  Buffer<T> my(c.OC), vy(c.OC);
                  if (yl == Layout::lanes) a.mean = my, a.var = vy;
                  Buffer<T> mx(x_mean), sg(c.IC), sgx(c.IC);
                  if (norm && relu) a.x_mean = mx, a.x_sum_g = sg, a.x_sum_gx = sgx;
                  kernels<T>().conv2d_forward(a);
                  kernels<T>().conv2d_backward(a);
                  compare("y", out, ys, y);
                  if (a.mean) {
                    compare("mean", my, y_mean);
                    compare("var", vy, y_var);
                  }
                  compare("grad_x", gx, xs, grad_x);
                  if (a.x_sum_g) {
                    compare("sum_g", sg, sum_g);
                    compare("sum_gx", sgx, sum_gx);
                  }
                  compare("grad_values", gv, grad_values);
                  compare("grad_bias", gb, grad_bias);
                  Buffer<T> all(int64_t(grad_weight.size())), sum(c.OC);
                  ConvArgs<T> full = a;
                  full.index = Index{}, full.values = nullptr, full.grad_values = all, full.grad_bias = sum;
                  kernels<T>().conv2d_weight_grad(full);
                  compare("grad_weight", all, grad_weight);
                  compare("grad_bias of all", sum, grad_bias);
                  for (int only = 0; only < 3; ++only) {  // one gradient alone
                    Buffer<T> x1(xs.size()), v1(p.index.nnz), b1(c.OC);
                    a.grad_x = only == 0 ? x1.data : nullptr;
                    a.grad_values = only == 1 ? v1.data : nullptr;
                    a.grad_bias = only == 2 ? b1.data : nullptr;
                    if (only) a.x_sum_g = a.x_sum_gx = nullptr;
                    kernels<T>().conv2d_backward(a);
                    if (only == 0) compare("grad_x alone", x1, xs, grad_x);
                    if (only == 1) compare("grad_values alone", v1, grad_values);
                    if (only == 2) compare("grad_bias alone", b1, grad_bias);
                  }
                }
              });
        }
    }
  }
  family("conv2d");
}

void test_pack() {
  for (int64_t N : BATCHES)
    for (int64_t C : {1, 5, 40})
      for (int64_t P : {1, 4, 121, 1800}) {
        if (P == 1800 && (N != 37 || C != 40)) continue;  // written past the caches
        const Shape plain{N, C, P, Layout::plain}, lanes{N, C, P, Layout::lanes},
            whole{(N + 15) / 16 * 16, C, P, Layout::lanes};
        const Doubles x = random_doubles(N * C * P);
        Doubles padded = x;
        padded.resize(size_t(whole.size()), 0.0);
        everywhere("pack " + text({N, C, P}), [&](auto zero, int threads) {
          using T = decltype(zero);
          Buffer<T> src(plain, x), dst(lanes.size()), packed(lanes, x), back(plain.size());
          kernels<T>().pack(PackArgs<T>{N, C, P, src, dst, threads});
          kernels<T>().unpack(PackArgs<T>{N, C, P, packed, back, threads});
          compare("pack", dst, whole, padded);
          compare("unpack", back, plain, x);
        });
      }
  family("pack, unpack");
}

void test_linbreg_step() {
  for (int64_t n : {1, 5, 16, 8192, 20003})
    for (int variant : {0, 1, 2, 3})
      for (double lam : {0.0, 0.3}) {
        const bool momentum = variant & 1, masked = variant & 2;
        std::vector<uint8_t> active(n);
        for (int64_t i = 0; i < n; ++i) active[i] = i % 3 != 1;
        const Doubles p0 = random_doubles(n), g = random_doubles(n), v0 = random_doubles(n), m0 = random_doubles(n);
        const double lr = 0.125, beta = 0.75, delta = 1.5, decay = 0.0625, sign = momentum ? 1 : -1;
        Doubles p(p0), v(v0), m(m0);
        for (size_t i = 0; i < p.size(); ++i) {
          if (masked && !active[i]) continue;
          const double step = lr * (sign * g[i] + decay * p[i]);
          m[i] = beta * m[i] + (1 - beta) * step;
          v[i] -= momentum ? m[i] : step;
          const double z = delta * v[i], shrunk = std::max(std::abs(z) - delta * lam, 0.0);
          p[i] = std::copysign(shrunk, z);
        }
        everywhere("linbreg_step " + text({n, momentum, masked}) + " lam " + std::to_string(lam),
                   [&](auto zero, int threads) {
                     using T = decltype(zero);
                     Buffer<T> pb(p0), gb(g), vb(v0), mb(m0);
                     kernels<T>().linbreg_step(StepArgs<T>{n, pb, gb, nullptr, vb, momentum ? mb.data : nullptr,
                                                           masked ? active.data() : nullptr, lr, beta, delta, lam,
                                                           decay, sign, threads});
                     compare("p", pb, p);
                     compare("v", vb, v);
                     for (size_t i = 0; i < p.size(); ++i)
                       if (std::abs(v[i]) < 0.99 * lam && p[i] == 0 && pb.data[i] != T(0))
                         return fail("a sleeping weight is not exactly zero");
                     if (momentum) compare("m", mb, m);
                   });
      }
  family("linbreg_step");
}

void test_l1_shift() {
  for (int64_t n : {1, 5, 16, 8192, 20003})
    for (double lam : {0.0, 0.25, 0.5, 2.0}) {
      const double before = 0.375, delta = 1.5;
      const Doubles v0 = random_doubles(n);
      Doubles p0(v0.size());
      for (size_t i = 0; i < p0.size(); ++i) {
        const double beyond = std::max(std::abs(v0[i]) - before, 0.0);
        p0[i] = i % 7 == 3 ? 0.0 : std::copysign(delta * beyond, v0[i]);  // some were set to zero by hand
      }
      Doubles p(p0), v(v0);
      for (size_t i = 0; i < p.size(); ++i) {
        if (std::abs(v0[i]) <= lam) {
          p[i] = 0;
        } else {
          v[i] = p0[i] / delta + std::copysign(lam, v0[i]);
        }
      }
      everywhere("l1_shift " + text({n}) + " lam " + std::to_string(lam), [&](auto zero, int threads) {
        using T = decltype(zero);
        Buffer<T> pb(p0), vb(v0);
        StepArgs<T> a{};
        a.n = n, a.p = pb, a.v = vb, a.delta = delta, a.lam = lam, a.threads = threads;
        kernels<T>().l1_shift(a);
        compare("p", pb, p);
        compare("v", vb, v);
      });
    }
  family("l1_shift");
}

void test_proxsgd_step() {
  for (int64_t n : {1, 5, 16, 8192, 20003})
    for (int variant : {0, 1, 2, 3})
      for (double lam : {0.0, 0.3}) {
        const bool momentum = variant & 1, masked = variant & 2;
        std::vector<uint8_t> active(n);
        for (int64_t i = 0; i < n; ++i) active[i] = i % 3 != 1;
        const Doubles p0 = random_doubles(n), g = random_doubles(n), m0 = random_doubles(n);
        const double lr = 0.25, beta = 0.75, decay = 0.0625, sign = momentum ? 1 : -1;
        Doubles p(p0), m(m0);
        for (size_t i = 0; i < p.size(); ++i) {
          if (masked && !active[i]) continue;
          const double grad = sign * g[i] + decay * p[i];
          m[i] = beta * m[i] + grad;
          const double z = p[i] - lr * (momentum ? m[i] : grad);
          p[i] = std::copysign(std::max(std::abs(z) - lr * lam, 0.0), z);
        }
        everywhere("proxsgd_step " + text({n, momentum, masked}) + " lam " + std::to_string(lam),
                   [&](auto zero, int threads) {
                     using T = decltype(zero);
                     Buffer<T> pb(p0), gb(g), mb(m0);
                     StepArgs<T> a{};
                     a.n = n, a.p = pb, a.g = gb, a.m = momentum ? mb.data : nullptr;
                     a.active = masked ? active.data() : nullptr;
                     a.lr = lr, a.beta = beta, a.lam = lam, a.weight_decay = decay, a.sign = sign, a.threads = threads;
                     kernels<T>().proxsgd_step(a);
                     compare("p", pb, p);
                     if (momentum) compare("m", mb, m);
                   });
      }
  family("proxsgd_step");
}

void test_adabreg_step() {
  for (int64_t n : {1, 5, 16, 8192, 20003})
    for (int variant : {0, 1, 2, 3}) {
      const bool decoupled = variant & 1, masked = variant & 2;
      std::vector<uint8_t> active(n);
      for (int64_t i = 0; i < n; ++i) active[i] = i % 3 != 1;
      const Doubles p0 = random_doubles(n), g = random_doubles(n), v0 = random_doubles(n), m0 = random_doubles(n);
      Doubles s0 = random_doubles(n);
      for (double& s : s0) s = 0.5 + s * s;
      const double lr = 0.125, beta1 = 0.75, beta2 = 0.875, eps = 0.25, c1 = 0.5, c2 = 0.25, delta = 1.5, lam = 0.3;
      const double decay = 0.0625, sign = decoupled ? 1 : -1;
      Doubles p(p0), v(v0), m(m0), s(s0);
      for (size_t i = 0; i < p.size(); ++i) {
        if (masked && !active[i]) continue;
        const double grad = sign * g[i] + (decoupled ? 0 : decay * p[i]);
        if (decoupled) v[i] -= lr * decay * p[i];
        m[i] = beta1 * m[i] + (1 - beta1) * grad;
        s[i] = beta2 * s[i] + (1 - beta2) * grad * grad;
        v[i] -= lr * (m[i] / c1) / (std::sqrt(s[i] / c2) + eps);
        p[i] = std::copysign(std::max(std::abs(delta * v[i]) - delta * lam, 0.0), v[i]);
      }
      everywhere("adabreg_step " + text({n, decoupled, masked}), [&](auto zero, int threads) {
        using T = decltype(zero);
        Buffer<T> pb(p0), gb(g), vb(v0), mb(m0), sb(s0);
        kernels<T>().adabreg_step(
            AdaStepArgs<T>{n,     pb,    gb,        nullptr, vb, mb, sb,    masked ? active.data() : nullptr,
                           lr,    beta1, beta2,     eps,     c1, c2, delta, lam,
                           decay, sign,  decoupled, threads});
        compare("p", pb, p);
        compare("v", vb, v);
        compare("m", mb, m);
        compare("s", sb, s);
      });
    }
  family("adabreg_step");
}

// Without gradients momentum ends at zero: subnormal numbers would make every later step many times slower.
void test_subnormal_state() {
  everywhere("subnormal state", [&](auto zero, int threads) {
    using T = decltype(zero);
    const T tiny = std::numeric_limits<T>::min();
    const int64_t n = 37;
    for (T state : {tiny, -tiny, tiny / 4, 8 * tiny}) {
      std::vector<T> p(n, T(0)), g(n, T(0)), v(n, T(0)), m(n, state), s(n, tiny), more(m);
      const auto is = [&](const std::vector<T>& x, T value, const char* what) {
        ++compared;
        for (T one : x)
          if (one != value) return fail(what);
      };
      StepArgs<T> a{n, p.data(), g.data(), nullptr, v.data(), m.data(), nullptr, 0.1, 0.75, 1, 0.1, 0, 1, threads};
      const T next = std::abs(state) > tiny ? T(0.75) * state : T(0);
      kernels<T>().linbreg_step(a);
      is(m, next, "linbreg_step");
      m = more;
      kernels<T>().proxsgd_step(a);
      is(m, next, "proxsgd_step");
      m = more;
      kernels<T>().adabreg_step(AdaStepArgs<T>{n,       p.data(), g.data(), nullptr, v.data(), m.data(), s.data(),
                                               nullptr, 0.1,      0.75,     0.75,    1e-8,     1,        1,
                                               1,       0.1,      0,        1,       false,    threads});
      is(m, next, "adabreg_step, mean");
      is(s, tiny, "adabreg_step, square");
    }
  });
  family("subnormals");
}

void test_max_pool() {
  struct {
    int64_t planes;
    int H, W, KH, KW, SH, SW, PH, PW, DH, DW;
  } const cases[] = {{3, 8, 8, 2, 2, 2, 2, 0, 0, 1, 1}, {2, 9, 7, 2, 2, 2, 2, 0, 0, 1, 1},
                     {3, 9, 9, 3, 3, 2, 2, 1, 1, 1, 1}, {1, 8, 10, 3, 2, 1, 3, 1, 0, 2, 1},
                     {5, 6, 6, 6, 6, 1, 1, 0, 0, 1, 1}, {2, 5, 5, 1, 1, 2, 2, 0, 0, 1, 1}};
  for (const auto& c : cases) {
    const int OH = (c.H + 2 * c.PH - c.DH * (c.KH - 1) - 1) / c.SH + 1;
    const int OW = (c.W + 2 * c.PW - c.DW * (c.KW - 1) - 1) / c.SW + 1;
    const int64_t in_size = c.planes * c.H * c.W * LANES, out_size = c.planes * OH * OW * LANES;
    Doubles x = random_doubles(in_size), grad_y = random_doubles(out_size), y(grad_y.size()), grad_x(x.size());
    for (double& v : x) v = std::floor(8 * v);  // with ties: the first tap wins
    x[size_t(in_size / 2)] = NAN;
    std::vector<uint8_t> codes(y.size());
    for (int64_t i = 0; i < out_size; ++i) {
      const int64_t lane = i % LANES, ox = i / LANES % OW, oy = i / LANES / OW % OH, plane = i / LANES / OW / OH;
      double best = -INFINITY;
      size_t from = 0;
      for (int ky = 0; ky < c.KH; ++ky)
        for (int kx = 0; kx < c.KW; ++kx) {
          const int64_t iy = oy * c.SH - c.PH + ky * c.DH, ix = ox * c.SW - c.PW + kx * c.DW;
          if (iy < 0 || iy >= c.H || ix < 0 || ix >= c.W) continue;
          const size_t at = size_t(((plane * c.H + iy) * c.W + ix) * LANES + lane);
          if (x[at] > best || std::isnan(x[at])) best = x[at], from = at, codes[size_t(i)] = uint8_t(ky * c.KW + kx);
        }
      y[size_t(i)] = best;
      grad_x[from] += grad_y[size_t(i)];
    }
    everywhere("max_pool " + text({c.planes, c.H, c.W, c.KH, c.KW, c.SH, c.SW, c.PH, c.PW, c.DH, c.DW}),
               [&](auto zero, int threads) {
                 using T = decltype(zero);
                 Buffer<T> in(x), out(out_size), gy(grad_y), gx(in_size);
                 std::vector<uint8_t> got(codes.size());
                 const PoolArgs<T> a{c.planes, c.H,  c.W,  OH, OW,  c.KH,       c.KW, c.SH, c.SW,   c.PH,
                                     c.PW,     c.DH, c.DW, in, out, got.data(), gy,   gx,   threads};
                 kernels<T>().max_pool_forward(a);
                 kernels<T>().max_pool_backward(a);
                 compare("y", out, y);
                 same("codes", got, codes);
                 compare("grad_x", gx, grad_x);
               });
  }
  family("max_pool");
}

void test_hardswish() {
  const double inf = std::numeric_limits<double>::infinity(), nan = std::numeric_limits<double>::quiet_NaN();
  for (int64_t n : {LANES, 37 * LANES, 40000 * LANES}) {
    Doubles x = random_doubles(n), g = random_doubles(n), y, grad;
    const double corners[] = {-inf, -3.5, -3, -2.9, -0.0, 0, 2.9, 3, 3.5, inf, nan};
    for (size_t i = 0; i < x.size(); ++i) x[i] = i % 3 ? 5 * x[i] : corners[i / 3 % 11];
    for (size_t i = 0; i < x.size(); ++i) {
      const double v = x[i] = double(float(x[i]));
      y.push_back(std::isnan(v) ? nan : v * std::min(std::max(v + 3, 0.0), 6.0) / 6);
      grad.push_back(v <= -3 ? 0 : v < 3 ? g[i] * (v / 3 + 0.5) : g[i]);
    }
    everywhere("hardswish " + text({n}), [&](auto zero, int threads) {
      using T = decltype(zero);
      Buffer<T> from(x), by(g), to(n), back(n);
      const PointwiseArgs<T> forward{n, from, nullptr, to, threads}, backward{n, from, by, back, threads};
      kernels<T>().hardswish_forward(forward);
      kernels<T>().hardswish_backward(backward);
      compare("y", to, y);
      compare("grad_x", back, grad);
    });
  }
  family("hardswish");
}

void test_norm() {
  for (int64_t N : BATCHES)
    for (int64_t C : {1, 6, 16})
      for (int64_t P : {1, 9, 64, 1800})
        for (int mode = 0; mode < 12; ++mode) {
          const bool large = P == 1800;  // written past the caches
          if (large != (C == 16) || (large && (N != 37 || mode % 4 != 3))) continue;
          const bool relu = mode & 1, residual = mode & 2, input = mode / 4 == 1, more = mode / 4 == 2, own = more;
          const Shape s{N, C, P, Layout::lanes};
          const Doubles x = random_doubles(N * C * P), r = random_doubles(N * C * P),
                        grad_y = random_doubles(N * C * P), other = random_doubles(N * C * P);
          const Doubles scale = random_doubles(C), shift = random_doubles(C), slope = random_doubles(C),
                        centre = random_doubles(C);  // the gradients take any mean
          Doubles mean(scale.size()), var(scale.size()), sum_g(scale.size()), sum_gx(scale.size());
          Doubles y(x.size()), g(x.size()), grad_x(x.size());
          const auto channel = [&](size_t i) { return i / size_t(P) % size_t(C); };
          for (size_t i = 0; i < x.size(); ++i) mean[channel(i)] += x[i] / double(N * P);
          for (size_t i = 0; i < x.size(); ++i) {
            const size_t c = channel(i);
            var[c] += (x[i] - mean[c]) * (x[i] - mean[c]) / double(N * P);
            y[i] = scale[c] * x[i] + shift[c] + (!residual ? 0 : own ? slope[c] * r[i] + centre[c] : r[i]);
            if (relu) y[i] = std::max(y[i], 0.0);
            // r stands for the result of the ReLU, or its input is what it was made of.
            const double gate = input ? scale[c] * x[i] + shift[c] : r[i];
            g[i] = relu && !(gate > 0) ? 0 : grad_y[i] + (more ? other[i] : 0);
            sum_g[c] += g[i];
            sum_gx[c] += g[i] * (x[i] - centre[c]);
            grad_x[i] = scale[c] * g[i] + slope[c] * (x[i] - centre[c]) + shift[c];
          }
          everywhere("norm " + text({N, C, P, mode}), [&](auto zero, int threads) {
            using T = decltype(zero);
            Buffer<T> in(s, x), rb(s, r), gy(s, grad_y), go(s, other), cb(centre), sb(scale), hb(shift), lb(slope);
            Buffer<T> m(C), v(C), out(s.size()), gx(s.size()), passed(s.size()), sg(C), sgx(C);
            NormArgs<T> a{};
            a.N = N, a.C = C, a.P = P, a.x = in, a.relu = relu, a.scale = sb, a.shift = hb, a.threads = threads;
            a.y = out, a.mean = m, a.var = v, a.residual = residual ? rb.data : nullptr;
            if (own) a.residual_scale = lb, a.residual_shift = cb;
            kernels<T>().norm_stats(a);
            kernels<T>().norm_apply(a);
            a.y = gx, a.mean = cb, a.grad_y = gy, a.slope = lb, a.sum_g = sg, a.sum_gx = sgx;
            a.grad_more = more ? go.data : nullptr, a.grad = residual || more ? passed.data : nullptr;
            if (relu && input) a.relu_scale = sb, a.relu_shift = hb;
            if (relu && !input) a.result = rb;
            kernels<T>().norm_reduce(a);
            if (a.grad) a.grad_y = a.grad, a.result = a.relu_scale = a.relu_shift = nullptr;
            kernels<T>().norm_grad(a);
            compare("mean", m, mean);
            compare("var", v, var);
            compare("y", out, s, y);
            compare("sum_g", sg, sum_g);
            compare("sum_gx", sgx, sum_gx);
            compare("grad_x", gx, s, grad_x);
            if (a.grad) compare("grad", passed, s, g);
          });
        }
  family("norm");
}

template <class T>
MarkNonzeros<T> mark_nonzeros() {
  if constexpr (sizeof(T) == 1)
    return active_table().mark_mask;
  else
    return kernels<T>().mark_nonzeros;
}

template <class T>
void test_marks(const Pattern& p, int threads) {
  const int64_t rows = p.index.rows, cols = p.index.cols, nnz = p.index.nnz;
  std::vector<T> dense(p.at.size());
  for (size_t i = 0; i < p.at.size(); ++i)  // minus zero counts as zero and NaN does not
    dense[i] = p.at[i] < 0 ? T(-0.0) : T(sizeof(T) == 1 || p.at[i] % 3 ? 1 + p.at[i] % 100 : NAN);
  std::vector<int32_t> rowptr(size_t(rows) + 1, -1), col(size_t(nnz), -1);
  std::vector<uint64_t> bits(size_t(rows * row_words(cols))), again(bits.size(), ~uint64_t(0));
  if (mark_nonzeros<T>()(dense.data(), rows, cols, bits.data(), rowptr.data(), threads) != nnz) fail("mark");
  same("rowptr", rowptr, p.rowptr);
  fill_columns(bits.data(), rows, cols, p.rowptr.data(), col.data(), threads);
  same("col", col, p.col);
  mark_columns(rows, cols, p.rowptr.data(), p.col.data(), again.data(), threads);
  same("mark_columns", again, bits);
}

template <class T>
void test_mark_beyond(const Pattern& p, int threads) {
  const int64_t rows = p.index.rows, cols = p.index.cols, words = row_words(cols);
  std::vector<T> dense(p.at.size());
  std::vector<int32_t> rowptr(size_t(rows) + 1, -1), starts { 0 };
  std::vector<uint64_t> bits(size_t(rows * words)), wanted(bits.size());
  const T bound = T(0.5);
  for (int64_t r = 0; r < rows; ++r) {
    int32_t count = starts.back();
    for (int64_t c = 0; c < cols; ++c) {
      T& d = dense[size_t(r * cols + c)];
      d = uniform() < 0.1 ? bound : uniform() < 0.1 ? -bound : uniform() < 0.1 ? T(NAN) : T(3 * uniform() - 1.5);
      if (std::abs(d) <= bound) continue;
      wanted[size_t(r * words + c / 64)] |= uint64_t(1) << (c & 63);
      ++count;
    }
    starts.push_back(count);
  }
  const int64_t marked = kernels<T>().mark_beyond(dense.data(), rows, cols, bound, bits.data(), rowptr.data(), threads);
  if (marked != starts.back()) fail("mark_beyond");
  same("mark_beyond, rowptr", rowptr, starts);
  same("mark_beyond, bits", bits, wanted);
}

// Of all nonzeros, of fewer, and of one more than the pattern has.
template <class T>
void test_gather_all(const Pattern& p, int threads) {
  const int64_t rows = p.index.rows, cols = p.index.cols;
  std::vector<uint64_t> bits(size_t(rows * row_words(cols)));
  mark_columns(rows, cols, p.rowptr.data(), p.col.data(), bits.data(), threads);
  std::vector<T> dense(p.at.size()), values(p.values.size());
  Doubles wanted(p.values);
  for (size_t i = 0; i < p.at.size(); ++i) dense[i] = p.at[i] < 0 ? T(-0.0) : T(p.values[size_t(p.at[i])]);
  const auto inside = [&] {
    return kernels<T>().gather_all(dense.data(), p.index, bits.data(), values.data(), threads);
  };
  if (!inside()) fail("gather_all, itself");
  same("gather_all", Doubles(values.begin(), values.end()), wanted);
  for (size_t i = 0; i < dense.size(); ++i) {
    if (i >= 3 && i + 3 < dense.size()) continue;
    const T old = dense[i];
    if (p.at[i] < 0) {
      for (const T one : {T(1), T(NAN)}) {
        dense[i] = one;
        if (inside()) fail("gather_all, a nonzero outside");
      }
    } else {
      dense[i] = T(0);
      wanted[size_t(p.at[i])] = 0;
      if (!inside()) fail("gather_all, fewer nonzeros");
      same("gather_all, fewer nonzeros", Doubles(values.begin(), values.end()), wanted);
      wanted[size_t(p.at[i])] = p.values[size_t(p.at[i])];
    }
    dense[i] = old;
  }
}

// Steps that leave the pattern's values, fewer nonzeros, or one outside of it.
template <class T>
void test_step_gather(const Pattern& p, int threads) {
  const int64_t rows = p.index.rows, cols = p.index.cols, n = rows * cols;
  std::vector<uint64_t> bits(size_t(rows * row_words(cols)));
  mark_columns(rows, cols, p.rowptr.data(), p.col.data(), bits.data(), threads);
  std::vector<T> values(p.values.size());
  const GatherArgs<T> gather{&p.index, bits.data(), values.data()};
  const auto check = [&](const std::vector<T>& weights, bool wanted) {
    for (int kind = 0; kind < 4; ++kind) {
      const T lam = kind == 1 ? T(0) : T(0.25);  // ProxSGD has no v that would make up for it
      std::vector<T> w(weights), v(weights), m(weights.size()), s(weights.size(), T(1)), g(weights.size());
      for (T& x : v) x = x == T(0) ? T(0.125) : x + std::copysign(lam, x);
      StepArgs<T> a{n, w.data(), g.data(), nullptr, v.data(), nullptr, nullptr, 1, 0, 1, lam, 0, 1, threads, &gather};
      AdaStepArgs<T> ada{n,       w.data(), g.data(), nullptr, v.data(), m.data(), s.data(),
                         nullptr, 0.125,    0.75,     0.875,   0.25,     0.5,      0.25,
                         1,       lam,      0,        1,       false,    threads,  &gather};
      const bool inside = kind == 0   ? kernels<T>().linbreg_step(a)
                          : kind == 1 ? kernels<T>().proxsgd_step(a)
                          : kind == 2 ? kernels<T>().l1_shift(a)
                                      : kernels<T>().adabreg_step(ada);
      if (inside != wanted) fail("what a step says of nonzeros outside of the pattern");
      for (size_t i = 0; i < p.at.size() && inside; ++i)
        if (p.at[i] >= 0 && values[size_t(p.at[i])] != w[i]) return fail("what a step gathers");
    }
  };
  std::vector<T> weights(p.at.size());
  for (size_t i = 0; i < p.at.size(); ++i) weights[i] = p.at[i] < 0 ? T(0) : T(p.values[size_t(p.at[i])]);
  check(weights, true);
  for (size_t i = 0; i < weights.size(); ++i) {
    if (i >= 2 && i + 2 < weights.size()) continue;
    const T old = weights[i];
    weights[i] = p.at[i] < 0 ? T(1) : T(0);
    check(weights, p.at[i] >= 0);
    weights[i] = old;
  }
}

template <class T>
void test_crossings(const Pattern& p, int threads) {
  const int64_t rows = p.index.rows, cols = p.index.cols;
  const Doubles other = random_doubles(rows * cols);
  Doubles gathered(p.values.size()), scattered(other);
  std::vector<T> whole(other.begin(), other.end()), values(p.values.size()), given(p.values.begin(), p.values.end());
  for (size_t i = 0; i < p.at.size(); ++i)
    if (p.at[i] >= 0) gathered[size_t(p.at[i])] = other[i], scattered[i] = p.values[size_t(p.at[i])];
  gather(whole.data(), rows, cols, p.rowptr.data(), p.col.data(), values.data(), threads);
  same("gather", Doubles(values.begin(), values.end()), gathered);
  scatter(given.data(), rows, cols, p.rowptr.data(), p.col.data(), whole.data(), false, threads);
  same("scatter", Doubles(whole.begin(), whole.end()), scattered);
  for (size_t i = 0; i < p.at.size(); ++i)
    if (p.at[i] < 0) scattered[i] = 0;
  scatter(given.data(), rows, cols, p.rowptr.data(), p.col.data(), whole.data(), true, threads);
  same("scatter among zeros", Doubles(whole.begin(), whole.end()), scattered);
}

void test_pattern() {
  struct {
    int64_t rows, cols;
    double density;
  } const cases[] = {{0, 5, .5},      {5, 0, .5},  {1, 1, 1},  {7, 67, .1},   {2, 640, .9},
                     {70, 1000, .05}, {3, 256, 1}, {9, 64, 0}, {1000, 3, .3}, {300, 500, .4}};
  for (const auto& c : cases) {
    const Pattern p(c.rows, c.cols, c.density);
    std::vector<int32_t> colptr(p.colptr.size(), -1), row(p.row.size(), -1), order(p.row.size(), -1), back(order);
    for (int threads : {1, 2}) {
      where = "pattern " + text({c.rows, c.cols}) + " nnz " + text({p.index.nnz, threads});
      test_crossings<float>(p, threads);
      test_crossings<double>(p, threads);
    }
    everywhere("marks " + text({c.rows, c.cols}), [&](auto zero, int threads) {
      test_marks<decltype(zero)>(p, threads);
      test_mark_beyond<decltype(zero)>(p, threads);
      test_gather_all<decltype(zero)>(p, threads);
      test_step_gather<decltype(zero)>(p, threads);
      test_marks<uint8_t>(p, threads);
    });
    for (int threads : {1, 3}) {
      transpose_index(c.rows, c.cols, p.rowptr.data(), p.col.data(), colptr.data(), row.data(), order.data(),
                      back.data(), threads);
      same("colptr", colptr, p.colptr);
      same("row", row, p.row);
      same("csc_to_csr", order, p.csc_to_csr);
      same("csr_to_csc", back, p.csr_to_csc);
    }
    const Index& ix = p.index;
    if (check_index(ix.rows, ix.cols, ix.nnz, ix.rowptr, ix.col)) fail("check_index");
  }
  where = "pattern, counts beyond int32";
  std::vector<int32_t> counts{-1, INT32_MAX, 0}, sums{0, INT32_MAX, INT32_MAX};
  if (sum_counts(2, counts.data()) != INT32_MAX) fail("2**31 - 1 nonzeros refused");
  same("sum_counts", counts, sums);
  counts = {-1, INT32_MAX, 1};
  if (sum_counts(2, counts.data()) != -1) fail("2**31 nonzeros accepted");
  family("pattern");
}

}  // namespace

int main() {
  static_assert(sizeof(Kernels<float>) == 25 * sizeof(void (*)()), "a kernel of the table has no test here");
  test_pattern();
  test_pack();
  test_linear();
  test_weight_grad();
  test_conv2d();
  test_linbreg_step();
  test_l1_shift();
  test_proxsgd_step();
  test_adabreg_step();
  test_subnormal_state();
  test_max_pool();
  test_hardswish();
  test_norm();
}
