// What all bindings share: checks of arguments, and calls of kernels. Only the files of this folder see pybind11. A
// binding checks every argument, releases the GIL and calls a kernel. Tensors and arrays are read and written in place
// (see array.h) and never converted: an output that was converted would be a copy, and its caller would see nothing.
#pragma once

#include <pybind11/stl.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <type_traits>

#include "bindings/array.h"
#include "dispatch.h"

namespace sparsebreg {

[[noreturn]] inline void refuse(const char* name, const std::string& wanted, const std::string& got) {
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

inline int check_threads(int threads) {
  if (threads < 1) refuse("threads", "at least 1", std::to_string(threads));
  return threads;
}

inline void check_batch(int64_t N) {
  if (N < 0) refuse("N", "at least 0", std::to_string(N));
}

inline void check_shape(const char* name, int64_t rows, int64_t cols) {
  if (rows < 0 || cols < 0 || rows > INT32_MAX || cols > INT32_MAX)
    refuse(name, "sizes from 0 to 2147483647", std::to_string(rows) + " x " + std::to_string(cols));
}

inline Layout layout_of(const char* name, int layout, int last) {
  if (layout < 0 || layout > last) refuse(name, "0 to " + std::to_string(last), std::to_string(layout));
  return Layout(layout);
}

// The number of elements of N samples of the given sizes; in the lane layout the last block of samples counts whole.
inline int64_t elements(const char* name, int64_t N, Layout layout, std::initializer_list<int64_t> sizes) {
  const bool fits = N >= 0 && N <= INT64_MAX - LANES;
  if (fits && layout == Layout::lanes) N = (N + LANES - 1) / LANES * LANES;
  for (int64_t size : sizes)
    if (!fits || size < 0 || __builtin_mul_overflow(N, size, &N))
      refuse(name, "sizes from 0 on with a product below 2**63", "others");
  return N;
}

// How many threads to use. Little work stays on the calling thread: a parallel region costs a few microseconds.
inline int team(int threads, double multiply_adds) {
  return check_threads(threads) > 1 && multiply_adds < 40000 ? 1 : threads;
}

// Returns f(T(0)), where T is the type of `values`.
template <class F>
auto for_dtype(const Array& values, F f) {
  if (values.is<float>()) return f(float(0));
  if (values.is<double>()) return f(double(0));
  throw py::type_error("values: expected dtype float32 or float64, got " + values.dtype_name());
}

template <class T>
const Kernels<T>& kernels_of() {
  if constexpr (std::is_same_v<T, float>)
    return active_table().f32;
  else
    return active_table().f64;
}

// Calls a kernel without the GIL.
template <class Result, class... Params, class... Args>
Result run(Result (*kernel)(Params...), const Args&... args) {
  py::gil_scoped_release nogil;
  return kernel(args...);
}

// Sets what the backward passes of linear layers and convolutions read.
template <class T, class Args>
void take_sources(Args& a, const Array& grad_y, int64_t y_size, const Maybe& x, int64_t x_size, bool wants_values) {
  a.grad_y = in<T>("grad_y", grad_y, y_size);
  a.x = maybe_in<T>("x", x, x_size);
  if (wants_values && !a.x) refuse("x", "the input of the layer, for grad_values", "None");
}

}  // namespace sparsebreg
