// Batch norm and max pooling in the lane layout, and packing into it.
#include "bindings/norm.h"

namespace sparsebreg {
namespace {

void norm_stats(int64_t N, int64_t C, int64_t P, const Array& x, const Array& mean, const Array& var, int threads) {
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    NormArgs<T> a = norm_args<T>(N, C, P, x, threads);
    a.mean = out<T>("mean", mean, C);
    a.var = out<T>("var", var, C);
    run(kernels_of<T>().norm_stats, a);
  });
}

void norm_apply(int64_t N, int64_t C, int64_t P, const Array& x, const Array& scale, const Array& shift,
                const Maybe& residual, const std::optional<std::pair<Array, Array>>& residual_norm, bool relu,
                const Array& y, int threads) {
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    NormArgs<T> a = norm_args<T>(N, C, P, x, threads);
    a.y = out<T>("y", y, x.size);
    a.scale = in<T>("scale", scale, C);
    a.shift = in<T>("shift", shift, C);
    a.residual = maybe_in<T>("residual", residual, x.size);
    if (residual_norm) {
      a.residual_scale = in<T>("residual_scale", residual_norm->first, C);
      a.residual_shift = in<T>("residual_shift", residual_norm->second, C);
    }
    a.relu = relu;
    run(kernels_of<T>().norm_apply, a);
  });
}

void norm_reduce(int64_t N, int64_t C, int64_t P, const Array& x, const Array& grad_y, const Maybe& grad_more,
                 const Gate& gate, const Array& mean, const Array& sum_g, const Array& sum_gx, const Maybe& grad,
                 int threads) {
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    NormArgs<T> a = norm_grad_args<T>(N, C, P, x, grad_y, gate, mean, threads);
    a.grad_more = maybe_in<T>("grad_more", grad_more, x.size);
    a.sum_g = out<T>("sum_g", sum_g, C);
    a.sum_gx = out<T>("sum_gx", sum_gx, C);
    a.grad = maybe_out<T>("grad", grad, x.size);
    run(kernels_of<T>().norm_reduce, a);
  });
}

// The gradient of a norm's x.
void norm_grad(int64_t N, int64_t C, int64_t P, const Array& grad_y, const BackNorm& norm, const Array& grad_x,
               int threads) {
  for_dtype(grad_y, [&](auto zero) {
    using T = decltype(zero);
    NormArgs<T> a = back_norm_args<T>(N, C, P, norm, grad_y, threads);
    a.y = out<T>("grad_x", grad_x, grad_y.size);
    run(kernels_of<T>().norm_grad, a);
  });
}

// Without grad_y: forward; else the gradient of x.
void hardswish(const Array& x, const Maybe& grad_y, const Array& result, int threads) {
  if (x.size % LANES) refuse("x", "whole blocks of lanes", std::to_string(x.size) + " elements");
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    PointwiseArgs<T> a{x.size, in<T>("x", x, x.size), maybe_in<T>("grad_y", grad_y, x.size),
                       out<T>("result", result, x.size), team(threads, double(x.size))};
    run(grad_y ? kernels_of<T>().hardswish_backward : kernels_of<T>().hardswish_forward, a);
  });
}

// geometry: H, W, OH, OW, KH, KW, SH, SW, PH, PW, DH, DW. With x: writes y and codes; else backward: writes grad_x.
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
    for (size_t i = 0; i < 12; ++i) {
      *fields[i] = geometry[i];
      if (geometry[i] < lower[i])
        refuse("geometry", "sizes, strides and dilations of at least 1", std::to_string(geometry[i]));
    }
    // Every window must begin before the end of the image and have at least one tap in it.
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
    // The backward pass only reads them.
    a.codes =
        forward ? out<uint8_t>("codes", codes, out_size) : const_cast<uint8_t*>(in<uint8_t>("codes", codes, out_size));
    a.grad_y = maybe_in<T>("grad_y", grad_y, out_size);
    a.grad_x = maybe_out<T>("grad_x", grad_x, in_size);
    a.threads = team(threads, double(out_size));
    run(forward ? kernels_of<T>().max_pool_forward : kernels_of<T>().max_pool_backward, a);
  });
}

// Plain (N, C, P) to lanes, or back.
void repack(bool packing, int64_t N, int64_t C, int64_t P, const Array& src, const Array& dst, int threads) {
  check_batch(N);
  for_dtype(src, [&](auto zero) {
    using T = decltype(zero);
    const Layout from = packing ? Layout::plain : Layout::lanes, to = packing ? Layout::lanes : Layout::plain;
    PackArgs<T> a{N, C, P};
    a.src = in<T>("src", src, elements("src", N, from, {C, P}));
    a.dst = out<T>("dst", dst, elements("dst", N, to, {C, P}));
    a.threads = team(threads, double(N) * double(C) * double(P));
    run(packing ? kernels_of<T>().pack : kernels_of<T>().unpack, a);
  });
}

}  // namespace

void register_norm_pool(py::module_& m) {
  m.def("norm_stats", &norm_stats);
  m.def("norm_apply", &norm_apply);
  m.def("norm_reduce", &norm_reduce);
  m.def("norm_grad", &norm_grad);
  m.def("hardswish", &hardswish);
  m.def("max_pool", &max_pool);
  m.def("repack", &repack);
}

}  // namespace sparsebreg
