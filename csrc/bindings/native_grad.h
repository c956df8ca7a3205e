// The gradient of a linear layer's weight in factors, as Python holds it.
#pragma once

#include <variant>

#include "bindings/checks.h"
#include "pool.h"

namespace sparsebreg {

// See GradFactors. It owns what the factors point to.
class NativeGrad {
 public:
  // None where grad_y or the gradient has no elements, or where more than the fraction `most` of grad_y is not zero,
  // which is estimated from every eighth sample if there are many.
  static py::object of(int64_t N, int64_t rows, int64_t cols, const Array& grad_y, const Array& x, double most,
                       int threads);

  // Raises unless it is of type T and has `size` elements.
  template <class T>
  const GradFactors<T>& factors(int64_t size) const {
    const auto* f = std::get_if<GradFactors<T>>(&factors_);
    const std::string names[] = {"float32", "float64"};
    if (!f) throw py::type_error("g: expected dtype " + names[sizeof(T) == 8] + ", got " + names[sizeof(T) != 8]);
    if (f->rows * f->cols != size) refuse("g", std::to_string(size) + " elements", std::to_string(f->rows * f->cols));
    return *f;
  }

 private:
  PoolArray<int32_t> counts_;
  PoolArray<uint16_t> places_;
  PoolArray<char> numbers_;
  std::variant<GradFactors<float>, GradFactors<double>> factors_;
};

}  // namespace sparsebreg
