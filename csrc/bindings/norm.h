// Arguments of norms, of the normalization kernels and of convolutions next to one.
#pragma once

#include <tuple>
#include <utility>
#include <variant>

#include "bindings/checks.h"

namespace sparsebreg {

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

}  // namespace sparsebreg
