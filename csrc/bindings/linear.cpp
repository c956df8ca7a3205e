// Linear layers, and the gradients of all their weights.
#include <memory>

#include "bindings/native_grad.h"
#include "bindings/native_index.h"

namespace sparsebreg {
namespace {

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

// A new array of floats for Python; *data: its memory.
template <class T>
py::object make(T** data, std::initializer_list<int64_t> shape) {
  Made made = make_floats(sizeof(T), shape);
  *data = static_cast<T*>(made.data);
  return std::move(made.object);
}

// Whether linear_forward takes these arguments: ordinary tensors of matching sizes and one dtype, bias or None. For
// callers that would otherwise check each of them, and then do so if the answer is no.
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

// Returns y (N, rows).
py::object linear_forward(const NativeIndex& pattern, int64_t N, const Array& x, int x_layout, const Array& values,
                          const Maybe& bias, int threads) {
  return for_dtype(values, [&](auto zero) {
    using T = decltype(zero);
    LinearArgs<T> a = linear_args<T>(pattern, N, x_layout, int(Layout::plain), values, threads);
    a.bias = maybe_in<T>("bias", bias, a.index.rows);
    a.x = in<T>("x", x, elements("x", N, a.x_layout, {a.index.cols}));
    py::object y = make(&a.y, {N, a.index.rows});
    run(kernels_of<T>().linear_forward, a);
    return y;
  });
}

// Returns grad_x (in the layout of x), grad_values and grad_bias; None for those that are not wanted.
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

int64_t count_nonzeros(const Array& x, int threads) {
  return for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const T* data = in<T>("x", x, x.size);
    return run(kernels_of<T>().count_nonzeros, data, x.size, team(threads, double(x.size)));
  });
}

void weight_grad(const NativeGrad& grad, const Array& grad_weight, int threads) {
  for_dtype(grad_weight, [&](auto zero) {
    using T = decltype(zero);
    const GradFactors<T>& f = grad.factors<T>(grad_weight.size);
    T* to = out<T>("grad_weight", grad_weight, grad_weight.size);
    run(kernels_of<T>().weight_grad, f, to, team(threads, double(f.N) * double(grad_weight.size)));
  });
}

}  // namespace

py::object NativeGrad::of(int64_t N, int64_t rows, int64_t cols, const Array& grad_y, const Array& x, double most,
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
    int64_t nonzeros = 0, counted = 0;
    for (int64_t n = 0; n < N; n += every, counted += rows)
      nonzeros += kernels_of<T>().count_nonzeros(g + n * rows, rows, 1);
    if (double(nonzeros) > most * double(counted)) return;
    made.reset(new NativeGrad);
    const int64_t blocks = (N + GRAD_SAMPLES - 1) / GRAD_SAMPLES, lists = blocks * rows;
    const int64_t strips = (cols + GRAD_STRIP - 1) / GRAD_STRIP;
    made->counts_ = PoolArray<int32_t>(size_t(lists));
    made->places_ = PoolArray<uint16_t>(size_t(lists * GRAD_SAMPLES));
    made->numbers_ = PoolArray<char>(size_t(lists * GRAD_SAMPLES + strips * N * GRAD_STRIP) * sizeof(T));
    T* value = reinterpret_cast<T*>(made->numbers_.data());
    const FactorArgs<T> a{
        N, rows, cols, g, from, value + lists * GRAD_SAMPLES, made->counts_.data(), made->places_.data(), value, t};
    kernels_of<T>().factor_grad(a);
    made->factors_ = GradFactors<T>{N, rows, cols, a.strips, a.count, a.place, a.value};
  });
  return made ? py::cast(std::move(made)) : py::none();
}

void register_linear(py::module_& m) {
  m.def("linear_takes", &linear_takes);
  m.def("linear_forward", &linear_forward);
  m.def("linear_backward", &linear_backward);
  py::class_<NativeGrad>(m, "Gradient").def_static("of", &NativeGrad::of);
  m.def("count_nonzeros", &count_nonzeros);
  m.def("weight_grad", &weight_grad);
}

}  // namespace sparsebreg
