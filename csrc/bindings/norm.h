// Arguments of batch norms, for the norm kernels and for convolutions next to a norm.
#pragma once

#include <tuple>
#include <utility>
#include <variant>

#include "bindings/checks.h"

namespace sparsebreg {

template <class T>
NormArgs<T> norm_args(int64_t N, int64_t C, int64_t P, const Array& x, int threads) {
  if (N < 1 || C < 1 || P < 1) refuse("x", "at least one sample, channel and position", "none");
  NormArgs<T> a{};
  a.N = N, a.C = C, a.P = P;
  a.x = in<T>("x", x, elements("x", N, Layout::lanes, {C, P}));
  a.threads = team(threads, double(N) * double(C) * double(P));
  return a;
}

// Where a ReLU behind the norm passes a gradient on: everywhere (there is none), where its result is positive, or where
// scale * x + shift is, of a given (scale, shift).
using Gate = std::variant<std::monostate, Array, std::pair<Array, Array>>;

// For norm_reduce and norm_grad.
template <class T>
NormArgs<T> norm_grad_args(int64_t N, int64_t C, int64_t P, const Array& x, const Array& grad_y, const Gate& gate,
                           const Array& mean, int threads) {
  NormArgs<T> a = norm_args<T>(N, C, P, x, threads);
  a.grad_y = in<T>("grad_y", grad_y, x.size);
  if (auto* result = std::get_if<1>(&gate)) a.result = in<T>("result", *result, x.size);
  if (auto* relu = std::get_if<2>(&gate)) {
    a.relu_scale = in<T>("relu_scale", relu->first, C);
    a.relu_shift = in<T>("relu_shift", relu->second, C);
  }
  a.mean = const_cast<T*>(in<T>("mean", mean, C));  // read here; norm_stats writes it
  return a;
}

// What the gradient of a norm is computed from: its x, the gate, mean, scale, slope, shift.
using BackNorm = std::tuple<Array, Gate, Array, Array, Array, Array>;

template <class T>
NormArgs<T> back_norm_args(int64_t N, int64_t C, int64_t P, const BackNorm& norm, const Array& grad_y, int threads) {
  const auto& [x, gate, mean, scale, slope, shift] = norm;
  NormArgs<T> a = norm_grad_args<T>(N, C, P, x, grad_y, gate, mean, threads);
  a.scale = in<T>("scale", scale, C);
  a.slope = in<T>("slope", slope, C);
  a.shift = in<T>("shift", shift, C);
  return a;
}

}  // namespace sparsebreg
