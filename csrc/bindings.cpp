// The only file that sees pybind11: checks every argument, drops the GIL, calls. Tensors cross as NumPy arrays that
// share their memory; nothing is ever converted, since an output taken with a conversion would be written to a copy.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "array.h"
#include "dispatch.h"
#include "memory.h"
#include "pattern.h"
#include "pool.h"

namespace py = pybind11;

namespace sparsebreg {
namespace {

[[noreturn]] void refuse(const char* name, const std::string& wanted, const std::string& got) {
  throw py::value_error(std::string(name) + ": expected " + wanted + ", got " + got);
}

template <class T>
void check(const char* name, const Array& a, int64_t size, bool writable) {
  if (!a.is<T>())
    throw py::type_error(std::string(name) + ": expected dtype " +
                         std::string(py::str(static_cast<py::handle>(py::dtype::of<T>()))) + ", got " + a.dtype_name());
  if (!a.contiguous) refuse(name, "a C-contiguous array", "a strided one");
  if (a.size != size) refuse(name, std::to_string(size) + " elements", std::to_string(a.size));
  if (writable && !a.writable) refuse(name, "a writable array", "a read-only one");
}

template <class T>
T* out(const char* name, const Array& a, int64_t size) {
  check<T>(name, a, size, true);
  return static_cast<T*>(const_cast<void*>(a.data));
}

template <class T>
const T* in(const char* name, const Array& a, int64_t size) {
  check<T>(name, a, size, false);
  return static_cast<const T*>(a.data);
}

using Maybe = std::optional<Array>;

template <class T>
T* maybe_out(const char* name, const Maybe& a, int64_t size) {
  return a ? out<T>(name, *a, size) : nullptr;
}

template <class T>
const T* maybe_in(const char* name, const Maybe& a, int64_t size) {
  return a ? in<T>(name, *a, size) : nullptr;
}

int check_threads(int threads) {
  if (threads < 1) refuse("threads", "at least 1", std::to_string(threads));
  return threads;
}

void check_shape(const char* name, int64_t rows, int64_t cols) {
  if (rows < 0 || cols < 0 || rows > INT32_MAX || cols > INT32_MAX)
    refuse(name, "sizes from 0 to 2147483647", std::to_string(rows) + " x " + std::to_string(cols));
}

// A valid index, checked or made here. Arrays are copied, so that nothing a caller does to them reaches a kernel.
class NativeIndex {
 public:
  // Of marked places; see kernels/marks.h.
  NativeIndex(int64_t rows, int64_t cols, int64_t nnz, PoolArray<uint64_t> marks, const std::vector<int32_t>& rowptr,
              int threads)
      : index{rows, cols, nnz}, storage_(size_t(rows + 1 + nnz)), marks_(std::move(marks)) {
    int32_t* col = std::copy(rowptr.begin(), rowptr.end(), storage_.data());
    fill_columns(marks_.data(), rows, cols, rowptr.data(), col, threads);
    index.rowptr = storage_.data(), index.col = col;
    index.row_chunks = &row_chunks_;
  }

  NativeIndex(int64_t rows, int64_t cols, const Array& rowptr, const Array& col) {
    check_shape("shape", rows, cols);
    const int64_t nnz = col.size;
    if (nnz > INT32_MAX) refuse("col", "at most 2147483647 nonzeros", std::to_string(nnz));
    const int32_t* const from[] = {in<int32_t>("rowptr", rowptr, rows + 1), in<int32_t>("col", col, nnz)};
    storage_ = PoolArray<int32_t>(size_t(rows + 1 + nnz));
    int32_t* own_col = std::copy(from[0], from[0] + rows + 1, storage_.data());
    std::copy(from[1], from[1] + nnz, own_col);
    index = Index{rows, cols, nnz, storage_.data(), own_col};
    index.row_chunks = &row_chunks_;
    if (const char* wrong = check_index(rows, cols, nnz, index.rowptr, index.col)) throw py::value_error(wrong);
  }

  // The index with its transpose, which is made when it is first asked for: convolutions and first layers need none.
  Index transposed(int threads) const {
    std::call_once(once_, [&] {
      const int64_t nnz = index.nnz;
      PoolArray<int32_t> made(size_t(index.cols + 1 + 3 * nnz));
      int32_t* row = made.data() + index.cols + 1;
      transpose_index(index.rows, index.cols, index.rowptr, index.col, made.data(), row, row + nnz, row + 2 * nnz,
                      threads);
      transpose_ = std::move(made);
    });
    Index both = index;
    both.col_chunks = &col_chunks_;
    both.colptr = transpose_.data();
    both.row = both.colptr + index.cols + 1;
    both.csc_to_csr = both.row + index.nnz;
    both.csr_to_csc = both.csc_to_csr + index.nnz;
    return both;
  }

  // One bit a place, rows x row_words(cols).
  const uint64_t* marks(int threads) const {
    std::call_once(marked_, [&] {
      if (marks_.data()) return;
      PoolArray<uint64_t> made(size_t(index.rows * row_words(index.cols)));
      mark_columns(index.rows, index.cols, index.rowptr, index.col, made.data(), threads);
      marks_ = std::move(made);
    });
    return marks_.data();
  }

  Index index;  // without its transpose

 private:
  mutable ChunkStarts row_chunks_, col_chunks_;
  PoolArray<int32_t> storage_;
  mutable PoolArray<int32_t> transpose_;
  mutable std::once_flag once_;
  mutable PoolArray<uint64_t> marks_;
  mutable std::once_flag marked_;
};

Layout layout_of(const char* name, int layout, int last) {
  if (layout < 0 || layout > last) refuse(name, "0 to " + std::to_string(last), std::to_string(layout));
  return Layout(layout);
}

// Elements of N samples (in the lane layout: of whole blocks) of `sizes`.
int64_t elements(const char* name, int64_t N, Layout layout, std::initializer_list<int64_t> sizes) {
  const bool fits = N >= 0 && N <= INT64_MAX - LANES;
  if (fits && layout == Layout::lanes) N = (N + LANES - 1) / LANES * LANES;
  for (int64_t size : sizes)
    if (!fits || size < 0 || __builtin_mul_overflow(N, size, &N))
      refuse(name, "sizes from 0 on with a product below 2**63", "others");
  return N;
}

// Tiny work runs on the calling thread: a parallel region costs a few microseconds.
int team(int threads, double multiply_adds) {
  return check_threads(threads) > 1 && multiply_adds < 40000 ? 1 : threads;
}

template <class F>
void for_dtype(const Array& values, F f) {
  if (values.is<float>()) return f(float(0));
  if (values.is<double>()) return f(double(0));
  throw py::type_error("values: expected dtype float32 or float64, got " + values.dtype_name());
}

template <class T>
const Kernels<T>& kernels_of();
template <>
const Kernels<float>& kernels_of<float>() {
  return active_table().f32;
}
template <>
const Kernels<double>& kernels_of<double>() {
  return active_table().f64;
}

void check_batch(int64_t N) {
  if (N < 0) refuse("N", "at least 0", std::to_string(N));
}

template <class T>
LinearArgs<T> linear_args(const NativeIndex& pattern, int64_t N, int x_layout, int y_layout, const Array& values,
                          int threads) {
  check_batch(N);
  const Index& ix = pattern.index;
  LinearArgs<T> a{};
  a.index = ix;
  a.N = N;
  a.x_layout = layout_of("x_layout", x_layout, 1);
  a.y_layout = layout_of("y_layout", y_layout, 1);
  a.values = in<T>("values", values, ix.nnz);
  a.threads = team(threads, double(N) * double(ix.nnz + ix.rows + ix.cols));
  return a;
}

// A new array of floats for Python, whose memory is put to *data.
template <class T>
py::object make(T** data, std::initializer_list<int64_t> shape) {
  Made made = make_floats(sizeof(T), shape);
  *data = static_cast<T*>(made.data);
  return std::move(made.object);
}

// y (N, rows).
py::object linear_forward(const NativeIndex& pattern, int64_t N, const Array& x, int x_layout, const Array& values,
                          const Maybe& bias, int threads) {
  py::object y;
  for_dtype(values, [&](auto zero) {
    using T = decltype(zero);
    LinearArgs<T> a = linear_args<T>(pattern, N, x_layout, int(Layout::plain), values, threads);
    a.bias = maybe_in<T>("bias", bias, a.index.rows);
    a.x = in<T>("x", x, elements("x", N, a.x_layout, {a.index.cols}));
    y = make(&a.y, {N, a.index.rows});
    py::gil_scoped_release nogil;
    kernels_of<T>().linear_forward(a);
  });
  return y;
}

// Whether the forward pass takes these as they are: ordinary tensors of two sizes, one and one (bias: or None) that
// fit. Whoever is told no has to ask them one by one.
bool linear_takes(const NativeIndex& pattern, py::handle x, py::handle values, py::handle bias) {
  Array a, v, b;
  const Index& ix = pattern.index;
  const auto fits = [&](const Array& t, int64_t size) {
    return t.contiguous && t.ndim == 1 && t.size == size && t.kind == v.kind && t.itemsize == v.itemsize;
  };
  return view_ordinary(values, v) && (v.is<float>() || v.is<double>()) && fits(v, ix.nnz) && view_ordinary(x, a) &&
         a.contiguous && a.ndim == 2 && a.shape[1] == ix.cols && a.kind == v.kind && a.itemsize == v.itemsize &&
         (bias.is_none() || (view_ordinary(bias, b) && fits(b, ix.rows)));
}

// The gradient of a linear layer's weight in factors; see kernels/weight_grad.h. It has copies of all it needs.
class NativeGrad {
 public:
  // None where the gradient or grad_y has no entries, or more than the part `most` of grad_y's are not zero; of many
  // samples every eighth is asked.
  static py::object of(int64_t N, int64_t rows, int64_t cols, const Array& grad_y, const Array& x, double most,
                       int threads) {
    check_batch(N);
    std::unique_ptr<NativeGrad> made;
    for_dtype(grad_y, [&](auto zero) {
      using T = decltype(zero);
      const int64_t size = elements("grad_y", N, Layout::plain, {rows});
      const T* g = in<T>("grad_y", grad_y, size);
      const T* from = in<T>("x", x, elements("x", N, Layout::plain, {cols}));
      const int t = team(threads, double(size) * double(cols));
      py::gil_scoped_release nogil;
      if (size == 0 || cols == 0) return;
      const int64_t every = N < 64 ? 1 : 8;
      int64_t nonzeros = 0, asked = 0;
      for (int64_t n = 0; n < N; n += every, asked += rows)
        nonzeros += kernels_of<T>().count_nonzeros(g + n * rows, rows, 1);
      if (double(nonzeros) > most * double(asked)) return;
      made.reset(new NativeGrad);
      const int64_t blocks = (N + GRAD_SAMPLES - 1) / GRAD_SAMPLES, lists = blocks * rows;
      const int64_t strips = (cols + GRAD_STRIP - 1) / GRAD_STRIP;
      made->counts_ = PoolArray<int32_t>(size_t(lists));
      made->places_ = PoolArray<uint16_t>(size_t(lists * GRAD_SAMPLES));
      made->numbers_ = PoolArray<char>(size_t(lists * GRAD_SAMPLES + strips * N * GRAD_STRIP) * sizeof(T));
      made->itemsize_ = sizeof(T);
      T* value = reinterpret_cast<T*>(made->numbers_.data());
      const FactorArgs<T> a{
          N, rows, cols, g, from, value + lists * GRAD_SAMPLES, made->counts_.data(), made->places_.data(), value, t};
      kernels_of<T>().factor_grad(a);
      made->factors_ = GradFactors<char>{N,
                                         rows,
                                         cols,
                                         reinterpret_cast<const char*>(a.strips),
                                         a.count,
                                         a.place,
                                         reinterpret_cast<const char*>(a.value)};
    });
    return made ? py::cast(std::move(made)) : py::none();
  }

  // Raises unless it is of type T and has `size` entries.
  template <class T>
  GradFactors<T> factors(int64_t size) const {
    if (itemsize_ != sizeof(T)) {
      const std::string names[] = {"float32", "float64"};
      throw py::type_error("g: expected dtype " + names[sizeof(T) == 8] + ", got " + names[itemsize_ == 8]);
    }
    const auto& f = factors_;
    if (f.rows * f.cols != size) refuse("g", std::to_string(size) + " elements", std::to_string(f.rows * f.cols));
    return {f.N,
            f.rows,
            f.cols,
            reinterpret_cast<const T*>(f.strips),
            f.count,
            f.place,
            reinterpret_cast<const T*>(f.value)};
  }

 private:
  PoolArray<int32_t> counts_;
  PoolArray<uint16_t> places_;
  PoolArray<char> numbers_;
  size_t itemsize_ = 0;
  GradFactors<char> factors_{};  // of numbers of itemsize_ bytes
};

int64_t count_nonzeros(const Array& x, int threads) {
  int64_t count = 0;
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const T* data = in<T>("x", x, x.size);
    const int t = team(threads, double(x.size));
    py::gil_scoped_release nogil;
    count = kernels_of<T>().count_nonzeros(data, x.size, t);
  });
  return count;
}

void weight_grad(const NativeGrad& grad, const Array& grad_weight, int threads) {
  for_dtype(grad_weight, [&](auto zero) {
    using T = decltype(zero);
    const GradFactors<T> f = grad.factors<T>(grad_weight.size);
    T* to = out<T>("grad_weight", grad_weight, grad_weight.size);
    const int t = team(threads, double(f.N) * double(grad_weight.size));
    py::gil_scoped_release nogil;
    kernels_of<T>().weight_grad(f, to, t);
  });
}

// What backward passes of linear and convolution layers read.
template <class T, class Args>
void take_sources(Args& a, const Array& grad_y, int64_t y_size, const Maybe& x, int64_t x_size, bool wants_values) {
  a.grad_y = in<T>("grad_y", grad_y, y_size);
  a.x = maybe_in<T>("x", x, x_size);
  if (wants_values && !a.x) refuse("x", "the input of the layer, for grad_values", "None");
}

// grad_x (in the layout of x), grad_values, grad_bias; None for those that are not wanted.
py::tuple linear_backward(const NativeIndex& pattern, int64_t N, const Array& grad_y, int y_layout, const Maybe& x,
                          int x_layout, const Array& values, bool wants_x, bool wants_values, bool wants_bias,
                          int threads) {
  py::object grad_x = py::none(), grad_values = py::none(), grad_bias = py::none();
  for_dtype(values, [&](auto zero) {
    using T = decltype(zero);
    LinearArgs<T> a = linear_args<T>(pattern, N, x_layout, y_layout, values, threads);
    const int64_t x_size = elements("x", N, a.x_layout, {a.index.cols});
    take_sources<T>(a, grad_y, elements("grad_y", N, a.y_layout, {a.index.rows}), x, x_size, wants_values);
    if (wants_x && a.x_layout == Layout::plain) grad_x = make(&a.grad_x, {N, a.index.cols});
    if (wants_x && a.x_layout == Layout::lanes)
      grad_x = make(&a.grad_x, {(N + LANES - 1) / LANES, a.index.cols, LANES});
    if (wants_values) grad_values = make(&a.grad_values, {a.index.nnz});
    if (wants_bias) grad_bias = make(&a.grad_bias, {a.index.rows});
    py::gil_scoped_release nogil;
    if (a.grad_x) a.index = pattern.transposed(a.threads);
    kernels_of<T>().linear_backward(a);
  });
  return py::make_tuple(grad_x, grad_values, grad_bias);
}

// Arguments with x in place; `size` is its number of elements.
template <class T>
NormArgs<T> norm_args(int64_t N, int64_t C, int64_t P, const Array& x, int64_t* size, int threads) {
  if (N < 1 || C < 1 || P < 1) refuse("x", "at least one sample, channel and position", "none");
  NormArgs<T> a{};
  a.N = N, a.C = C, a.P = P;
  *size = elements("x", N, Layout::lanes, {C, P});
  a.x = in<T>("x", x, *size);
  a.threads = team(threads, double(N) * double(C) * double(P));
  return a;
}

// What tells where a ReLU behind a norm lets a gradient pass: its result, or (scale, shift) that x became it with.
using Gate = std::variant<std::monostate, Array, std::pair<Array, Array>>;

// What both passes of the gradient take.
template <class T>
NormArgs<T> norm_grad_args(int64_t N, int64_t C, int64_t P, const Array& x, const Array& grad_y, const Gate& gate,
                           const Array& mean, int64_t* size, int threads) {
  NormArgs<T> a = norm_args<T>(N, C, P, x, size, threads);
  a.grad_y = in<T>("grad_y", grad_y, *size);
  if (auto* result = std::get_if<1>(&gate)) a.result = in<T>("result", *result, *size);
  if (auto* relu = std::get_if<2>(&gate)) {
    a.relu_scale = in<T>("relu_scale", relu->first, C);
    a.relu_shift = in<T>("relu_shift", relu->second, C);
  }
  a.mean = const_cast<T*>(in<T>("mean", mean, C));  // read here; norm_stats writes it
  return a;
}

// A norm that a gradient is still to go through: x, the gate, mean, scale, slope, shift.
using BackNorm = std::tuple<Array, Gate, Array, Array, Array, Array>;

template <class T>
NormArgs<T> back_norm_args(int64_t N, int64_t C, int64_t P, const BackNorm& norm, const Array& grad_y, int64_t* size,
                           int threads) {
  const auto& [x, gate, mean, scale, slope, shift] = norm;
  NormArgs<T> a = norm_grad_args<T>(N, C, P, x, grad_y, gate, mean, size, threads);
  a.scale = in<T>("scale", scale, C);
  a.slope = in<T>("slope", slope, C);
  a.shift = in<T>("shift", shift, C);
  return a;
}

// Sizes and layouts.
template <class T>
ConvArgs<T> conv_sizes(int64_t N, const std::vector<int>& geometry, int x_layout, int y_layout) {
  check_batch(N);
  if (geometry.size() != 13)
    refuse("geometry", "(IC, H, W, OC, KH, KW, SH, SW, PH, PW, DH, DW, G)",
           std::to_string(geometry.size()) + " numbers");
  ConvArgs<T> a{};
  a.N = N;
  int* const fields[] = {&a.IC, &a.H, &a.W, &a.OC, &a.KH, &a.KW, &a.SH, &a.SW, &a.PH, &a.PW, &a.DH, &a.DW, &a.G};
  for (int i = 0; i < 13; ++i) *fields[i] = geometry[size_t(i)];
  const int lower[] = {1, 0, 0, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1};
  for (int i = 0; i < 13; ++i)
    if (geometry[size_t(i)] < lower[i])
      refuse("geometry", "sizes, strides and dilations of at least 1", std::to_string(geometry[size_t(i)]));
  if (a.IC % a.G || a.OC % a.G) refuse("geometry", "channels divisible by groups", std::to_string(a.G) + " groups");
  const int64_t reach_y = int64_t(a.DH) * (a.KH - 1), reach_x = int64_t(a.DW) * (a.KW - 1);
  const int64_t padded_h = a.H + 2 * int64_t(a.PH), padded_w = a.W + 2 * int64_t(a.PW);
  if (std::max(padded_h, padded_w) > INT32_MAX)
    refuse("geometry", "a padded image of at most 2147483647 rows and columns",
           std::to_string(padded_h) + " x " + std::to_string(padded_w));
  const int64_t oh = padded_h - reach_y - 1, ow = padded_w - reach_x - 1;
  if (oh < 0 || ow < 0)
    refuse("x", "an image at least as large as the kernel", std::to_string(a.H) + " x " + std::to_string(a.W));
  a.OH = int(oh / a.SH + 1);
  a.OW = int(ow / a.SW + 1);
  // Offsets inside a band are int32. A band is at least a tile high; bound it from above.
  const int64_t high = std::max(a.H, a.OH) + reach_y + 2 * int64_t(a.PH) + 8,
                wide = a.W + a.OW + 2 * int64_t(a.PW) + reach_x + 32, border = std::max<int64_t>(reach_y, a.PH);
  const int64_t band_rows = std::min<int64_t>(high, border + 8 + (int64_t(1) << 20) / (wide * LANES * 4) + 8);
  if (double(std::max(a.IC, a.OC)) * a.SH * a.SW * double(band_rows) * double(wide) * LANES > 2147483647.0)
    refuse("x", "a band of rows of less than 2**31 elements", "a larger image");
  a.x_layout = layout_of("x_layout", x_layout, 2);
  a.y_layout = layout_of("y_layout", y_layout, 2);
  return a;
}

template <class T>
ConvArgs<T> conv_args(const NativeIndex& pattern, int64_t N, const std::vector<int>& geometry, int x_layout,
                      int y_layout, const Array& values, int threads) {
  ConvArgs<T> a = conv_sizes<T>(N, geometry, x_layout, y_layout);
  a.index = pattern.index;
  if (a.index.rows != a.OC || a.index.cols != int64_t(a.IC / a.G) * a.KH * a.KW)
    refuse("geometry", "channels and kernel size of the pattern's shape", "others");
  a.values = in<T>("values", values, a.index.nnz);
  a.threads = team(threads, double(N) * a.OH * a.OW * double(a.index.nnz + a.OC + a.IC));
  return a;
}

// (scale, shift, relu) of a norm that x is still to go through.
using MaybeNorm = std::optional<std::tuple<Array, Array, bool>>;

template <class T>
void set_norm(ConvArgs<T>& a, const MaybeNorm& norm) {
  if (!norm) return;
  if (a.x_layout != Layout::lanes) refuse("x_layout", "the lane layout where x has a norm", "another");
  a.x_scale = in<T>("scale", std::get<0>(*norm), a.IC);
  a.x_shift = in<T>("shift", std::get<1>(*norm), a.IC);
  a.x_relu = std::get<2>(*norm);
}

// `behind` is for the arguments of the norm to lie in.
template <class T>
void set_back_norm(ConvArgs<T>& a, const std::optional<BackNorm>& y_norm, const Array& grad_y, NormArgs<T>* behind,
                   int threads) {
  if (!y_norm) return;
  if (a.y_layout != Layout::lanes) refuse("y_layout", "the lane layout where y has a norm", "another");
  int64_t size;
  *behind = back_norm_args<T>(a.N, a.OC, int64_t(a.OH) * a.OW, *y_norm, grad_y, &size, threads);
  a.y_norm = behind;
}

void conv2d_forward(const NativeIndex& pattern, int64_t N, const std::vector<int>& geometry, const Array& x,
                    int x_layout, const MaybeNorm& norm, const Array& values, const Maybe& bias, const Array& y,
                    int y_layout, std::optional<std::pair<Array, Array>> moments, int threads) {
  for_dtype(values, [&](auto zero) {
    using T = decltype(zero);
    ConvArgs<T> a = conv_args<T>(pattern, N, geometry, x_layout, y_layout, values, threads);
    set_norm(a, norm);
    a.bias = maybe_in<T>("bias", bias, a.OC);
    a.x = in<T>("x", x, elements("x", N, a.x_layout, {a.IC, a.H, a.W}));
    a.y = out<T>("y", y, elements("y", N, a.y_layout, {a.OC, a.OH, a.OW}));
    if (moments) {
      if (a.y_layout != Layout::lanes || N < 1) refuse("moments", "a sample or more in the lane layout", "others");
      a.mean = out<T>("mean", moments->first, a.OC);
      a.var = out<T>("var", moments->second, a.OC);
    }
    py::gil_scoped_release nogil;
    kernels_of<T>().conv2d_forward(a);
  });
}

void conv2d_backward(const NativeIndex& pattern, int64_t N, const std::vector<int>& geometry, const Array& grad_y,
                     int y_layout, const std::optional<BackNorm>& y_norm, const Maybe& x, int x_layout,
                     const MaybeNorm& norm, std::optional<std::tuple<Array, Array, Array>> sums, const Array& values,
                     const Maybe& grad_x, const Maybe& grad_values, const Maybe& grad_bias, int threads) {
  for_dtype(values, [&](auto zero) {
    using T = decltype(zero);
    ConvArgs<T> a = conv_args<T>(pattern, N, geometry, x_layout, y_layout, values, threads);
    set_norm(a, norm);
    const int64_t x_size = elements("x", N, a.x_layout, {a.IC, a.H, a.W});
    take_sources<T>(a, grad_y, elements("grad_y", N, a.y_layout, {a.OC, a.OH, a.OW}), x, x_size,
                    grad_values.has_value());
    a.grad_x = maybe_out<T>("grad_x", grad_x, x_size);
    a.grad_values = maybe_out<T>("grad_values", grad_values, a.index.nnz);
    a.grad_bias = maybe_out<T>("grad_bias", grad_bias, a.index.rows);
    NormArgs<T> behind;
    set_back_norm(a, y_norm, grad_y, &behind, threads);
    if (sums) {
      if (!a.x || !a.x_relu || !a.grad_x || N < 1) refuse("sums", "a norm of x with a ReLU, and grad_x", "others");
      a.x_mean = in<T>("mean", std::get<0>(*sums), a.IC);
      a.x_sum_g = out<T>("sum_g", std::get<1>(*sums), a.IC);
      a.x_sum_gx = out<T>("sum_gx", std::get<2>(*sums), a.IC);
    }
    py::gil_scoped_release nogil;
    kernels_of<T>().conv2d_backward(a);
  });
}

void conv2d_weight_grad(int64_t N, const std::vector<int>& geometry, const Array& grad_y, int y_layout,
                        const std::optional<BackNorm>& y_norm, const Array& x, int x_layout, const MaybeNorm& norm,
                        const Array& grad_weight, const Maybe& grad_bias, int threads) {
  for_dtype(grad_weight, [&](auto zero) {
    using T = decltype(zero);
    ConvArgs<T> a = conv_sizes<T>(N, geometry, x_layout, y_layout);
    set_norm(a, norm);
    a.x = in<T>("x", x, elements("x", N, a.x_layout, {a.IC, a.H, a.W}));
    a.grad_y = in<T>("grad_y", grad_y, elements("grad_y", N, a.y_layout, {a.OC, a.OH, a.OW}));
    NormArgs<T> behind;
    set_back_norm(a, y_norm, grad_y, &behind, threads);
    const int64_t size = int64_t(a.OC) * (a.IC / a.G) * a.KH * a.KW;
    a.grad_values = out<T>("grad_weight", grad_weight, size);
    a.grad_bias = maybe_out<T>("grad_bias", grad_bias, a.OC);
    a.threads = team(threads, double(N) * a.OH * a.OW * double(size));
    py::gil_scoped_release nogil;
    kernels_of<T>().conv2d_weight_grad(a);
  });
}

void repack(bool packing, int64_t N, int64_t C, int64_t P, const Array& src, const Array& dst, int threads) {
  check_batch(N);
  for_dtype(src, [&](auto zero) {
    using T = decltype(zero);
    const Layout from = packing ? Layout::plain : Layout::lanes, to = packing ? Layout::lanes : Layout::plain;
    PackArgs<T> a{N,
                  C,
                  P,
                  in<T>("src", src, elements("src", N, from, {C, P})),
                  out<T>("dst", dst, elements("dst", N, to, {C, P})),
                  team(threads, double(N) * double(C) * double(P))};
    py::gil_scoped_release nogil;
    (packing ? kernels_of<T>().pack : kernels_of<T>().unpack)(a);
  });
}

py::array copy_of(const int32_t* from, int64_t count) {
  if (count < 1 << 14) return py::array_t<int32_t>(count, from);
  py::array copy = pool_empty({py::ssize_t(count)}, py::dtype::of<int32_t>(), false);
  std::copy(from, from + count, static_cast<int32_t*>(copy.mutable_data()));
  return copy;
}

// rowptr, col.
py::tuple index_arrays(const NativeIndex& pattern) {
  const Index& ix = pattern.index;
  return py::make_tuple(copy_of(ix.rowptr, ix.rows + 1), copy_of(ix.col, ix.nnz));
}

// How many rows, and how many channels of `kernel` columns, have no nonzero.
py::tuple count_empty(const NativeIndex& pattern, int64_t kernel, int threads) {
  const Index& ix = pattern.index;
  if (kernel < 1 || ix.cols % kernel != 0)
    refuse("kernel", "a divisor of " + std::to_string(ix.cols), std::to_string(kernel));
  int64_t rows = 0;
  for (int64_t r = 0; r < ix.rows; ++r) rows += ix.rowptr[r] == ix.rowptr[r + 1];
  return py::make_tuple(rows, count_unmarked(pattern.marks(check_threads(threads)), ix.rows, ix.cols, kernel));
}

// colptr, row, csc_to_csr.
py::tuple transposed_arrays(const NativeIndex& pattern, int threads) {
  const Index ix = pattern.transposed(check_threads(threads));
  return py::make_tuple(copy_of(ix.colptr, ix.cols + 1), copy_of(ix.row, ix.nnz), copy_of(ix.csc_to_csr, ix.nnz));
}

// A gradient, or what it is to be made of.
using Gradient = std::variant<Array, const NativeGrad*>;

// Sets a.g, or a.factors to `room`, and the threads; a.n is known.
template <class Args, class T>
void take_gradient(Args& a, const Gradient& g, GradFactors<T>& room, int threads) {
  if (const auto* given = std::get_if<Array>(&g)) {
    a.g = in<T>("g", *given, a.n);
    a.threads = team(threads, double(a.n));
  } else {
    const NativeGrad* factors = std::get<const NativeGrad*>(g);
    if (!factors) throw py::type_error("g: expected an array or a Gradient, got None");
    room = factors->factors<T>(a.n);
    a.factors = &room;
    a.threads = team(threads, double(a.n) * double(room.N));
  }
}

// Where a step gathers what it moves to: an index, and an array for its values.
using MaybeGather = std::optional<std::tuple<const NativeIndex*, Array>>;

// Sets a.gather to `room`; a.n and a.threads are known.
template <class Args, class T>
void set_gather(Args& a, const MaybeGather& gather, GatherArgs<T>& room) {
  if (!gather) return;
  const auto& [pattern, values] = *gather;
  if (!pattern) throw py::type_error("gather: expected an Index and an array, got None");
  const Index& ix = pattern->index;
  if (ix.rows * ix.cols != a.n)
    refuse("gather", "an index of " + std::to_string(a.n) + " places", std::to_string(ix.rows * ix.cols));
  room = {&ix, pattern->marks(a.threads), out<T>("values", values, ix.nnz)};
  a.gather = &room;
}

template <class T>
StepArgs<T> step_args(const Array& p, const Gradient& g, GradFactors<T>& factors, const Maybe& m, const Maybe& active,
                      double lr, double beta, double lam, double weight_decay, bool maximize, int threads) {
  const int64_t n = p.size;
  StepArgs<T> a{};
  a.n = n;
  a.p = out<T>("p", p, n);
  take_gradient(a, g, factors, threads);
  a.m = maybe_out<T>("m", m, n);
  a.active = reinterpret_cast<const uint8_t*>(maybe_in<bool>("active", active, n));
  a.lr = lr, a.beta = beta, a.lam = lam, a.weight_decay = weight_decay;
  a.sign = maximize ? -1.0 : 1.0;
  return a;
}

// Steps say whether every nonzero weight stands in the index of `gather`; without one, yes.

bool linbreg_step(const Array& p, const Gradient& g, const Array& v, const Maybe& m, const Maybe& active, double lr,
                  double beta, double delta, double lam, double weight_decay, bool maximize, const MaybeGather& gather,
                  int threads) {
  bool inside = true;
  for_dtype(p, [&](auto zero) {
    using T = decltype(zero);
    GradFactors<T> factors;
    GatherArgs<T> gathered;
    StepArgs<T> a = step_args<T>(p, g, factors, m, active, lr, beta, lam, weight_decay, maximize, threads);
    a.v = out<T>("v", v, a.n);
    a.delta = delta;
    set_gather(a, gather, gathered);
    py::gil_scoped_release nogil;
    inside = kernels_of<T>().linbreg_step(a);
  });
  return inside;
}

bool l1_shift(const Array& p, const Array& v, double delta, double lam, const MaybeGather& gather, int threads) {
  bool inside = true;
  for_dtype(p, [&](auto zero) {
    using T = decltype(zero);
    StepArgs<T> a{};
    a.n = p.size;
    a.p = out<T>("p", p, a.n);
    a.v = out<T>("v", v, a.n);
    a.delta = delta, a.lam = lam;
    a.threads = team(threads, double(a.n));
    GatherArgs<T> gathered;
    set_gather(a, gather, gathered);
    py::gil_scoped_release nogil;
    inside = kernels_of<T>().l1_shift(a);
  });
  return inside;
}

bool proxsgd_step(const Array& p, const Gradient& g, const Maybe& m, const Maybe& active, double lr, double beta,
                  double lam, double weight_decay, bool maximize, const MaybeGather& gather, int threads) {
  bool inside = true;
  for_dtype(p, [&](auto zero) {
    using T = decltype(zero);
    GradFactors<T> factors;
    GatherArgs<T> gathered;
    StepArgs<T> a = step_args<T>(p, g, factors, m, active, lr, beta, lam, weight_decay, maximize, threads);
    set_gather(a, gather, gathered);
    py::gil_scoped_release nogil;
    inside = kernels_of<T>().proxsgd_step(a);
  });
  return inside;
}

bool adabreg_step(const Array& p, const Gradient& g, const Array& v, const Array& m, const Array& s,
                  const Maybe& active, double lr, double beta1, double beta2, double eps, double correction1,
                  double correction2, double delta, double lam, double weight_decay, bool decoupled, bool maximize,
                  const MaybeGather& gather, int threads) {
  bool inside = true;
  for_dtype(p, [&](auto zero) {
    using T = decltype(zero);
    const int64_t n = p.size;
    AdaStepArgs<T> a{};
    a.n = n;
    a.p = out<T>("p", p, n);
    GradFactors<T> factors;
    take_gradient(a, g, factors, threads);
    a.v = out<T>("v", v, n);
    a.m = out<T>("m", m, n);
    a.s = out<T>("s", s, n);
    a.active = reinterpret_cast<const uint8_t*>(maybe_in<bool>("active", active, n));
    a.lr = lr, a.beta1 = beta1, a.beta2 = beta2, a.eps = eps;
    a.correction1 = correction1, a.correction2 = correction2;
    a.delta = delta, a.lam = lam, a.weight_decay = weight_decay;
    a.sign = maximize ? -1.0 : 1.0;
    a.decoupled = decoupled;
    GatherArgs<T> gathered;
    set_gather(a, gather, gathered);
    py::gil_scoped_release nogil;
    inside = kernels_of<T>().adabreg_step(a);
  });
  return inside;
}

// geometry: H, W, OH, OW, KH, KW, SH, SW, PH, PW, DH, DW. Without grad_y: forward into y and codes; else into grad_x.
void max_pool(int64_t planes, const std::vector<int>& geometry, const Maybe& x, const Maybe& y, const Array& codes,
              const Maybe& grad_y, const Maybe& grad_x, int threads) {
  const bool forward = x.has_value();
  if (forward ? !y : !(grad_y && grad_x)) refuse("x", "x and y, or grad_y and grad_x", "others");
  if (planes < 0) refuse("planes", "at least 0", std::to_string(planes));
  for_dtype(forward ? *x : *grad_y, [&](auto zero) {
    using T = decltype(zero);
    if (geometry.size() != 12) refuse("geometry", "12 numbers", std::to_string(geometry.size()));
    PoolArgs<T> a{};
    int* const fields[] = {&a.H, &a.W, &a.OH, &a.OW, &a.KH, &a.KW, &a.SH, &a.SW, &a.PH, &a.PW, &a.DH, &a.DW};
    const int lower[] = {1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1};
    for (int i = 0; i < 12; ++i) {
      *fields[i] = geometry[size_t(i)];
      if (geometry[size_t(i)] < lower[i])
        refuse("geometry", "sizes, strides and dilations of at least 1", std::to_string(geometry[size_t(i)]));
    }
    // Every window must begin inside of the image (past the padding) and hold at least one tap of it.
    auto fits = [](int size, int out, int k, int s, int p, int d) {
      const int64_t reach = int64_t(k - 1) * d;
      return 2 * p <= k && d <= size && int64_t(out - 1) * s - p < size && reach >= p && size + reach <= INT32_MAX;
    };
    if (!fits(a.H, a.OH, a.KH, a.SH, a.PH, a.DH) || !fits(a.W, a.OW, a.KW, a.SW, a.PW, a.DW) ||
        int64_t(a.KH) * a.KW > 256)
      refuse("geometry", "windows of at most 256 taps that begin inside of the image", "others");
    a.planes = planes;
    const int64_t in_size = elements("x", planes, Layout::plain, {a.H, a.W, LANES});
    const int64_t out_size = elements("y", planes, Layout::plain, {a.OH, a.OW, LANES});
    a.x = maybe_in<T>("x", x, in_size);
    a.y = maybe_out<T>("y", y, out_size);
    // Backward only reads them.
    a.codes =
        forward ? out<uint8_t>("codes", codes, out_size) : const_cast<uint8_t*>(in<uint8_t>("codes", codes, out_size));
    a.grad_y = maybe_in<T>("grad_y", grad_y, out_size);
    a.grad_x = maybe_out<T>("grad_x", grad_x, in_size);
    a.threads = team(threads, double(out_size));
    py::gil_scoped_release nogil;
    (forward ? kernels_of<T>().max_pool_forward : kernels_of<T>().max_pool_backward)(a);
  });
}

void norm_stats(int64_t N, int64_t C, int64_t P, const Array& x, const Array& mean, const Array& var, int threads) {
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    int64_t size;
    NormArgs<T> a = norm_args<T>(N, C, P, x, &size, threads);
    a.mean = out<T>("mean", mean, C);
    a.var = out<T>("var", var, C);
    py::gil_scoped_release nogil;
    kernels_of<T>().norm_stats(a);
  });
}

void norm_apply(int64_t N, int64_t C, int64_t P, const Array& x, const Array& scale, const Array& shift,
                const Maybe& residual, const std::optional<std::pair<Array, Array>>& residual_norm, bool relu,
                const Array& y, int threads) {
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    int64_t size;
    NormArgs<T> a = norm_args<T>(N, C, P, x, &size, threads);
    a.y = out<T>("y", y, size);
    a.scale = in<T>("scale", scale, C);
    a.shift = in<T>("shift", shift, C);
    a.residual = maybe_in<T>("residual", residual, size);
    if (residual_norm) {
      a.residual_scale = in<T>("residual_scale", residual_norm->first, C);
      a.residual_shift = in<T>("residual_shift", residual_norm->second, C);
    }
    a.relu = relu;
    py::gil_scoped_release nogil;
    kernels_of<T>().norm_apply(a);
  });
}

void norm_reduce(int64_t N, int64_t C, int64_t P, const Array& x, const Array& grad_y, const Maybe& grad_more,
                 const Gate& gate, const Array& mean, const Array& sum_g, const Array& sum_gx, const Maybe& grad,
                 int threads) {
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    int64_t size;
    NormArgs<T> a = norm_grad_args<T>(N, C, P, x, grad_y, gate, mean, &size, threads);
    a.grad_more = maybe_in<T>("grad_more", grad_more, size);
    a.sum_g = out<T>("sum_g", sum_g, C);
    a.sum_gx = out<T>("sum_gx", sum_gx, C);
    a.grad = maybe_out<T>("grad", grad, size);
    py::gil_scoped_release nogil;
    kernels_of<T>().norm_reduce(a);
  });
}

// What a norm makes of the gradient of its result.
void norm_grad(int64_t N, int64_t C, int64_t P, const Array& grad_y, const BackNorm& norm, const Array& grad_x,
               int threads) {
  for_dtype(grad_y, [&](auto zero) {
    using T = decltype(zero);
    int64_t size;
    NormArgs<T> a = back_norm_args<T>(N, C, P, norm, grad_y, &size, threads);
    a.y = out<T>("grad_x", grad_x, size);
    py::gil_scoped_release nogil;
    kernels_of<T>().norm_grad(a);
  });
}

// The index of what mark(bits, rowptr, threads) marks; None where that is more than `most`.
template <class Mark>
py::object index_of(int64_t rows, int64_t cols, int64_t most, int threads, Mark mark) {
  const int t = team(threads, double(rows) * double(cols));
  std::unique_ptr<NativeIndex> made;
  {
    py::gil_scoped_release nogil;
    std::vector<int32_t> rowptr(size_t(rows + 1));
    PoolArray<uint64_t> marks(size_t(rows * row_words(cols)));
    const int64_t nnz = mark(marks.data(), rowptr.data(), t);
    if (nnz < 0 && most > INT32_MAX) refuse("mask", "at most 2147483647 nonzeros", "more");
    if (nnz >= 0 && nnz <= most) made = std::make_unique<NativeIndex>(rows, cols, nnz, std::move(marks), rowptr, t);
  }
  return made ? py::cast(std::move(made)) : py::none();
}

// The index of the entries of a float32 or float64 matrix whose magnitude is above `bound`, or of those of a boolean
// one that are true; None where there are more than `most`.
py::object index_beyond(const Array& dense, double bound, int64_t most, int threads) {
  if (dense.ndim != 2) refuse("dense", "two dimensions", std::to_string(dense.ndim));
  if (most < 0) refuse("most", "at least 0", std::to_string(most));
  const int64_t rows = dense.shape[0], cols = dense.shape[1], size = dense.size;
  check_shape("dense", rows, cols);
  if (!(bound >= 0)) refuse("bound", "at least 0", std::to_string(bound));
  const auto numbers = [&](const auto* data) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(data)>>;
    const auto& k = kernels_of<T>();
    return index_of(rows, cols, most, threads, [&](uint64_t* bits, int32_t* rowptr, int t) {
      if (bound == 0) return k.mark_nonzeros(data, rows, cols, bits, rowptr, t);
      return k.mark_beyond(data, rows, cols, T(bound), bits, rowptr, t);
    });
  };
  if (dense.is<float>()) return numbers(in<float>("dense", dense, size));
  if (dense.is<double>()) return numbers(in<double>("dense", dense, size));
  const auto* mask = reinterpret_cast<const uint8_t*>(in<bool>("dense", dense, size));
  return index_of(rows, cols, most, threads, [&](uint64_t* bits, int32_t* rowptr, int t) {
    return active_table().mark_mask(mask, rows, cols, bits, rowptr, t);
  });
}

void gather_values(const NativeIndex& pattern, const Array& dense, const Array& values, int threads) {
  for_dtype(dense, [&](auto zero) {
    using T = decltype(zero);
    const Index& ix = pattern.index;
    const T* d = in<T>("dense", dense, ix.rows * ix.cols);
    T* v = out<T>("values", values, ix.nnz);
    const int t = team(threads, double(ix.nnz));
    py::gil_scoped_release nogil;
    gather<T>(d, ix.rows, ix.cols, ix.rowptr, ix.col, v, t);
  });
}

// Whether all nonzeros are inside the pattern; values are undefined if not.
bool gather_all_values(const NativeIndex& pattern, const Array& dense, const Array& values, int threads) {
  bool all = false;
  for_dtype(dense, [&](auto zero) {
    using T = decltype(zero);
    const Index& ix = pattern.index;
    const T* d = in<T>("dense", dense, ix.rows * ix.cols);
    T* v = out<T>("values", values, ix.nnz);
    const int t = team(threads, double(ix.rows) * double(ix.cols));
    py::gil_scoped_release nogil;
    all = kernels_of<T>().gather_all(d, ix, pattern.marks(t), v, t);
  });
  return all;
}

void scatter_values(const NativeIndex& pattern, const Array& values, const Array& dense, bool zero_others,
                    int threads) {
  for_dtype(values, [&](auto zero) {
    using T = decltype(zero);
    const Index& ix = pattern.index;
    const T* v = in<T>("values", values, ix.nnz);
    T* d = out<T>("dense", dense, ix.rows * ix.cols);
    const int t = team(threads, double(ix.nnz) + (zero_others ? double(ix.rows) * double(ix.cols) / 8 : 0));
    py::gil_scoped_release nogil;
    scatter<T>(v, ix.rows, ix.cols, ix.rowptr, ix.col, d, zero_others, t);
  });
}

}  // namespace
}  // namespace sparsebreg

PYBIND11_MODULE(_C, m) {
  using namespace sparsebreg;
  m.doc() = "Native kernels of sparsebreg. Not a public interface: see sparsebreg.functional.";
  m.attr("LANES") = LANES;
  py::class_<NativeIndex>(m, "Index")
      .def(py::init<int64_t, int64_t, const Array&, const Array&>())
      .def_static("beyond", &index_beyond)
      .def("arrays", &index_arrays)
      .def("empty", &count_empty)
      .def("transposed", &transposed_arrays);
  m.def("accept_tensors", &accept_tensors);
  m.def("environment", [](const char* name) { return static_cast<const char*>(std::getenv(name)); });
  m.def("isa", [] { return active_table().isa; });
  m.def("available_isas", &available_isas);
  m.def("select_isa", &select_isa);
  m.def("linear_takes", &linear_takes);
  m.def("linear_forward", &linear_forward);
  m.def("linear_backward", &linear_backward);
  py::class_<NativeGrad>(m, "Gradient").def_static("of", &NativeGrad::of);
  m.def("count_nonzeros", &count_nonzeros);
  m.def("weight_grad", &weight_grad);
  m.def("conv2d_forward", &conv2d_forward);
  m.def("conv2d_backward", &conv2d_backward);
  m.def("conv2d_weight_grad", &conv2d_weight_grad);
  m.def("repack", &repack);
  m.def("linbreg_step", &linbreg_step);
  m.def("l1_shift", &l1_shift);
  m.def("adabreg_step", &adabreg_step);
  m.def("proxsgd_step", &proxsgd_step);
  m.def("max_pool", &max_pool);
  m.def("norm_stats", &norm_stats);
  m.def("norm_apply", &norm_apply);
  m.def("norm_reduce", &norm_reduce);
  m.def("norm_grad", &norm_grad);
  m.def("gather", &gather_values);
  m.def("gather_all", &gather_all_values);
  m.def("scatter", &scatter_values);
  m.def("pool_empty", &pool_empty);
  m.def("pool_limit", &pool_limit);
  m.def("pool_held", &pool_held);
  m.def("pool_release", &pool_release);
  m.def("release_scratch", &release_scratch);
}
