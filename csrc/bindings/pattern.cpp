// Sparsity patterns, and copies between dense and sparse.
#include <memory>
#include <type_traits>

#include "bindings/native_index.h"

namespace sparsebreg {
namespace {

py::array copy_of(const int32_t* from, int64_t count) {
  if (count < 1 << 14) return py::array_t<int32_t>(count, from);
  py::array copy = pool_empty({py::ssize_t(count)}, py::dtype::of<int32_t>(), false);
  std::copy(from, from + count, static_cast<int32_t*>(copy.mutable_data()));
  return copy;
}

// Returns rowptr, col.
py::tuple index_arrays(const NativeIndex& pattern) {
  const Index& ix = pattern.index;
  return py::make_tuple(copy_of(ix.rowptr, ix.rows + 1), copy_of(ix.col, ix.nnz));
}

// Returns how many rows, and how many channels of `kernel` columns each, have no nonzero.
py::tuple count_empty(const NativeIndex& pattern, int64_t kernel, int threads) {
  const Index& ix = pattern.index;
  if (kernel < 1 || ix.cols % kernel != 0)
    refuse("kernel", "a divisor of " + std::to_string(ix.cols), std::to_string(kernel));
  int64_t rows = 0;
  for (int64_t r = 0; r < ix.rows; ++r) rows += ix.rowptr[r] == ix.rowptr[r + 1];
  return py::make_tuple(rows, count_unmarked(pattern.marks(check_threads(threads)), ix.rows, ix.cols, kernel));
}

// Returns colptr, row, csc_to_csr.
py::tuple transposed_arrays(const NativeIndex& pattern, int threads) {
  const Index ix = pattern.transposed(check_threads(threads));
  return py::make_tuple(copy_of(ix.colptr, ix.cols + 1), copy_of(ix.row, ix.nnz), copy_of(ix.csc_to_csr, ix.nnz));
}

// The index of the places that mark(bits, rowptr, threads) marks; None where they are more than `most`.
template <class Mark>
py::object index_of(int64_t rows, int64_t cols, int64_t most, int threads, Mark mark) {
  const int t = team(threads, double(rows) * double(cols));
  std::unique_ptr<NativeIndex> made;
  {
    py::gil_scoped_release nogil;
    std::vector<int32_t> rowptr(size_t(rows + 1));
    PoolArray<uint64_t> marks(size_t(rows * row_words(cols)));
    const int64_t nnz = mark(marks.data(), rowptr.data(), t);
    if (nnz < 0 && most > INT32_MAX) refuse("mask", "at most 2147483647 nonzeros", "more");
    if (nnz >= 0 && nnz <= most) made = std::make_unique<NativeIndex>(rows, cols, nnz, std::move(marks), rowptr, t);
  }
  return made ? py::cast(std::move(made)) : py::none();
}

// The index of the elements of a float32 or float64 matrix whose magnitude is above `bound`, or of the true ones of a
// boolean matrix; None where they are more than `most`.
py::object index_beyond(const Array& dense, double bound, int64_t most, int threads) {
  if (dense.ndim != 2) refuse("dense", "two dimensions", std::to_string(dense.ndim));
  if (most < 0) refuse("most", "at least 0", std::to_string(most));
  const int64_t rows = dense.shape[0], cols = dense.shape[1], size = dense.size;
  check_shape("dense", rows, cols);
  if (!(bound >= 0)) refuse("bound", "at least 0", std::to_string(bound));
  const auto numbers = [&](const auto* data) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(data)>>;
    const auto& k = kernels_of<T>();
    return index_of(rows, cols, most, threads, [&](uint64_t* bits, int32_t* rowptr, int t) {
      if (bound == 0) return k.mark_nonzeros(data, rows, cols, bits, rowptr, t);
      return k.mark_beyond(data, rows, cols, T(bound), bits, rowptr, t);
    });
  };
  if (dense.is<float>()) return numbers(in<float>("dense", dense, size));
  if (dense.is<double>()) return numbers(in<double>("dense", dense, size));
  const auto* mask = reinterpret_cast<const uint8_t*>(in<bool>("dense", dense, size));
  return index_of(rows, cols, most, threads, [&](uint64_t* bits, int32_t* rowptr, int t) {
    return active_table().mark_mask(mask, rows, cols, bits, rowptr, t);
  });
}

void gather_values(const NativeIndex& pattern, const Array& dense, const Array& values, int threads) {
  for_dtype(dense, [&](auto zero) {
    using T = decltype(zero);
    const Index& ix = pattern.index;
    const T* d = in<T>("dense", dense, ix.rows * ix.cols);
    T* v = out<T>("values", values, ix.nnz);
    run(gather<T>, d, ix.rows, ix.cols, ix.rowptr, ix.col, v, team(threads, double(ix.nnz)));
  });
}

// Returns whether all nonzeros are inside the pattern; values are undefined if not.
bool gather_all_values(const NativeIndex& pattern, const Array& dense, const Array& values, int threads) {
  return for_dtype(dense, [&](auto zero) {
    using T = decltype(zero);
    const Index& ix = pattern.index;
    const T* d = in<T>("dense", dense, ix.rows * ix.cols);
    T* v = out<T>("values", values, ix.nnz);
    const int t = team(threads, double(ix.rows) * double(ix.cols));
    py::gil_scoped_release nogil;
    return kernels_of<T>().gather_all(d, ix, pattern.marks(t), v, t);
  });
}

void scatter_values(const NativeIndex& pattern, const Array& values, const Array& dense, bool zero_others,
                    int threads) {
  for_dtype(values, [&](auto zero) {
    using T = decltype(zero);
    const Index& ix = pattern.index;
    const T* v = in<T>("values", values, ix.nnz);
    T* d = out<T>("dense", dense, ix.rows * ix.cols);
    const int t = team(threads, double(ix.nnz) + (zero_others ? double(ix.rows) * double(ix.cols) / 8 : 0));
    run(scatter<T>, v, ix.rows, ix.cols, ix.rowptr, ix.col, d, zero_others, t);
  });
}

}  // namespace

void register_pattern(py::module_& m) {
  py::class_<NativeIndex>(m, "Index")
      .def(py::init<int64_t, int64_t, const Array&, const Array&>())
      .def_static("beyond", &index_beyond)
      .def("arrays", &index_arrays)
      .def("empty", &count_empty)
      .def("transposed", &transposed_arrays);
  m.def("gather", &gather_values);
  m.def("gather_all", &gather_all_values);
  m.def("scatter", &scatter_values);
}

}  // namespace sparsebreg
