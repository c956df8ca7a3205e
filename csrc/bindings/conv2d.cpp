// Convolutions, and the gradients of all their weights.
#include "bindings/native_index.h"
#include "bindings/norm.h"

namespace sparsebreg {
namespace {

// (scale, shift, relu) of a batch norm that x goes through first.
using MaybeNorm = std::optional<std::tuple<Array, Array, bool>>;

// Sizes and layouts, and the norm of x.
template <class T>
ConvArgs<T> conv_sizes(int64_t N, const std::vector<int>& geometry, int x_layout, int y_layout, const MaybeNorm& norm) {
  check_batch(N);
  if (geometry.size() != 13)
    refuse("geometry", "(IC, H, W, OC, KH, KW, SH, SW, PH, PW, DH, DW, G)",
           std::to_string(geometry.size()) + " numbers");
  ConvArgs<T> a{};
  a.N = N;
  int* const fields[] = {&a.IC, &a.H, &a.W, &a.OC, &a.KH, &a.KW, &a.SH, &a.SW, &a.PH, &a.PW, &a.DH, &a.DW, &a.G};
  const int lower[] = {1, 0, 0, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1};
  for (size_t i = 0; i < 13; ++i) {
    *fields[i] = geometry[i];
    if (geometry[i] < lower[i])
      refuse("geometry", "sizes, strides and dilations of at least 1", std::to_string(geometry[i]));
  }
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
  // Offsets inside a band are int32. This bounds the sizes of the bands of x and of grad_y from above: their rows and
  // columns are destinations, which lie a stride apart, a border, and what a tile may stick out.
  const int64_t border_y = (reach_y + a.PH) / a.SH + 1, border_x = (reach_x + a.PW) / a.SW + 1;
  const int64_t high = std::max(a.OH, a.H / a.SH + 1) + 2 * border_y + 8, wide = a.OW + a.W / a.SW + 2 * border_x + 32;
  const int64_t rows = std::min<int64_t>(high, 2 * border_y + 16 + (int64_t(1) << 20) / (wide * LANES * 4));
  const double planes = std::max<double>(double(a.IC) * std::min(a.SH, a.KH) * std::min(a.SW, a.KW), a.OC);
  if (planes * double(rows) * double(wide) * LANES > 2147483647.0)
    refuse("x", "a band of rows of less than 2**31 elements", "a larger image");
  a.x_layout = layout_of("x_layout", x_layout, 2);
  a.y_layout = layout_of("y_layout", y_layout, 2);
  if (norm) {
    if (a.x_layout != Layout::lanes) refuse("x_layout", "the lane layout where x has a norm", "another");
    a.x_scale = in<T>("scale", std::get<0>(*norm), a.IC);
    a.x_shift = in<T>("shift", std::get<1>(*norm), a.IC);
    a.x_relu = std::get<2>(*norm);
  }
  return a;
}

template <class T>
ConvArgs<T> conv_args(const NativeIndex& pattern, int64_t N, const std::vector<int>& geometry, int x_layout,
                      int y_layout, const MaybeNorm& norm, const Array& values, int threads) {
  ConvArgs<T> a = conv_sizes<T>(N, geometry, x_layout, y_layout, norm);
  a.index = pattern.index;
  if (a.index.rows != a.OC || a.index.cols != int64_t(a.IC / a.G) * a.KH * a.KW)
    refuse("geometry", "channels and kernel size of the pattern's shape", "others");
  a.values = in<T>("values", values, a.index.nnz);
  a.threads = team(threads, double(N) * a.OH * a.OW * double(a.index.nnz + a.OC + a.IC));
  return a;
}

// behind: room for the arguments of the norm.
template <class T>
void set_back_norm(ConvArgs<T>& a, const std::optional<BackNorm>& y_norm, const Array& grad_y, NormArgs<T>* behind,
                   int threads) {
  if (!y_norm) return;
  if (a.y_layout != Layout::lanes) refuse("y_layout", "the lane layout where y has a norm", "another");
  *behind = back_norm_args<T>(a.N, a.OC, int64_t(a.OH) * a.OW, *y_norm, grad_y, threads);
  a.y_norm = behind;
}

void conv2d_forward(const NativeIndex& pattern, int64_t N, const std::vector<int>& geometry, const Array& x,
                    int x_layout, const MaybeNorm& norm, const Array& values, const Maybe& bias, const Array& y,
                    int y_layout, std::optional<std::pair<Array, Array>> moments, int threads) {
  for_dtype(values, [&](auto zero) {
    using T = decltype(zero);
    ConvArgs<T> a = conv_args<T>(pattern, N, geometry, x_layout, y_layout, norm, values, threads);
    a.bias = maybe_in<T>("bias", bias, a.OC);
    a.x = in<T>("x", x, elements("x", N, a.x_layout, {a.IC, a.H, a.W}));
    a.y = out<T>("y", y, elements("y", N, a.y_layout, {a.OC, a.OH, a.OW}));
    if (moments) {
      if (a.y_layout != Layout::lanes || N < 1) refuse("moments", "a sample or more in the lane layout", "others");
      a.mean = out<T>("mean", moments->first, a.OC);
      a.var = out<T>("var", moments->second, a.OC);
    }
    run(kernels_of<T>().conv2d_forward, a);
  });
}

void conv2d_backward(const NativeIndex& pattern, int64_t N, const std::vector<int>& geometry, const Array& grad_y,
                     int y_layout, const std::optional<BackNorm>& y_norm, const Maybe& x, int x_layout,
                     const MaybeNorm& norm, std::optional<std::tuple<Array, Array, Array>> sums, const Array& values,
                     const Maybe& grad_x, const Maybe& grad_values, const Maybe& grad_bias, int threads) {
  for_dtype(values, [&](auto zero) {
    using T = decltype(zero);
    ConvArgs<T> a = conv_args<T>(pattern, N, geometry, x_layout, y_layout, norm, values, threads);
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
    run(kernels_of<T>().conv2d_backward, a);
  });
}

void conv2d_weight_grad(int64_t N, const std::vector<int>& geometry, const Array& grad_y, int y_layout,
                        const std::optional<BackNorm>& y_norm, const Array& x, int x_layout, const MaybeNorm& norm,
                        const Array& grad_weight, const Maybe& grad_bias, int threads) {
  for_dtype(grad_weight, [&](auto zero) {
    using T = decltype(zero);
    ConvArgs<T> a = conv_sizes<T>(N, geometry, x_layout, y_layout, norm);
    a.x = in<T>("x", x, elements("x", N, a.x_layout, {a.IC, a.H, a.W}));
    a.grad_y = in<T>("grad_y", grad_y, elements("grad_y", N, a.y_layout, {a.OC, a.OH, a.OW}));
    NormArgs<T> behind;
    set_back_norm(a, y_norm, grad_y, &behind, threads);
    const int64_t size = int64_t(a.OC) * (a.IC / a.G) * a.KH * a.KW;
    a.grad_values = out<T>("grad_weight", grad_weight, size);
    a.grad_bias = maybe_out<T>("grad_bias", grad_bias, a.OC);
    a.threads = team(threads, double(N) * a.OH * a.OW * double(size));
    run(kernels_of<T>().conv2d_weight_grad, a);
  });
}

}  // namespace

void register_conv2d(py::module_& m) {
  m.def("conv2d_forward", &conv2d_forward);
  m.def("conv2d_backward", &conv2d_backward);
  m.def("conv2d_weight_grad", &conv2d_weight_grad);
}

}  // namespace sparsebreg
