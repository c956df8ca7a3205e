// The gradient of a linear layer's weight in factors, as Python holds it.
#pragma once

#include "bindings/checks.h"
#include "pool.h"

namespace sparsebreg {

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

}  // namespace sparsebreg
