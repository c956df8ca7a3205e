// Arrays from Python, which are read and written in place, and new arrays for Python. An argument is a NumPy array or,
// where torch exports DLPack's table of C functions, a tensor: that takes a tenth of the time of `.numpy()`, which
// matters for small layers.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <type_traits>
#include <vector>

namespace sparsebreg {

namespace py = pybind11;

// An argument of a call. It does not keep its memory alive.
struct Array {
  const void* data = nullptr;  // not null, even where size is 0
  int64_t size = 0;            // elements
  int ndim = 0;
  int64_t shape[2] = {0, 0};  // of the first two dimensions
  char kind = 0;              // as NumPy's dtype.kind; 0 where no kernel takes it
  int itemsize = 0;
  bool contiguous = false;  // in C order
  bool writable = false;
  py::handle object;

  template <class T>
  bool is() const {
    const char wanted = std::is_same_v<T, bool>       ? 'b'
                        : std::is_floating_point_v<T> ? 'f'
                        : std::is_signed_v<T>         ? 'i'
                                                      : 'u';
    return kind == wanted && itemsize == int(sizeof(T));
  }
  std::string dtype_name() const;
};

// From here on, arguments of this type or a derived one are read through DLPack. False where the type does not support
// the version used here: then tensors are passed as NumPy arrays. parameter: a derived type that adds no behaviour.
bool accept_tensors(py::handle type, py::handle parameter);

// Fills `array`; false where `object` is neither an array nor a tensor in CPU memory.
bool view(py::handle object, Array& array);

// The same for tensors of exactly the two types of accept_tensors; false for others and on any error.
bool view_ordinary(py::handle object, Array& array) noexcept;

// An uninitialised array from the pool. Its memory goes back to the pool when the last tensor or array over it dies.
// channels_last: the shape has four sizes, of which the second is innermost in memory.
py::array pool_empty(const std::vector<py::ssize_t>& shape, const py::dtype& dtype, bool channels_last);

// The same for floats, contiguous, with at most four sizes: a tensor where tensors are accepted, else an array. Throws
// std::bad_alloc.
struct Made {
  py::object object;
  void* data;
};
Made make_floats(int itemsize, std::initializer_list<int64_t> shape);

}  // namespace sparsebreg

template <>
struct pybind11::detail::type_caster<sparsebreg::Array> {
  PYBIND11_TYPE_CASTER(sparsebreg::Array, const_name("numpy.ndarray"));
  bool load(handle source, bool) { return sparsebreg::view(source, value); }
};
