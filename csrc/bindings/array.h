// What crosses from Python: a NumPy array or, where torch hands its tensors to C, a tensor, seen through its memory. A
// tensor costs a tenth of what `.numpy()` does, which counts where a layer is small. Only for arguments of a call: a
// view keeps nothing alive. And what is made for Python here.
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

// Arguments of this type, or of one derived from it, are read through DLPack's table of C functions. False where the
// type has none that is understood here: then tensors cross as NumPy arrays. parameter: a type derived from it that
// adds nothing to it.
bool accept_tensors(py::handle type, py::handle parameter);

// False where `object` is neither an array nor a tensor over memory of the CPU.
bool view(py::handle object, Array& array);

// The same of a tensor without a type of its own; whatever is wrong with it, the answer is false.
bool view_ordinary(py::handle object, Array& array) noexcept;

// An uninitialised array from the pool, whose memory goes back to it when the last tensor or array over it dies.
// channels_last: of four sizes, the second is innermost in memory.
py::array pool_empty(const std::vector<py::ssize_t>& shape, const py::dtype& dtype, bool channels_last);

// The same of floats, contiguous, of at most four sizes: a tensor where tensors are accepted, else an array. Throws
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
