#include "bindings/array.h"

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "pool.h"

namespace sparsebreg {
namespace {

// The part of DLPack 1.x that is used here: https://dmlc.github.io/dlpack/latest/c_api.html
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct ManagedTensor {
  uint32_t major, minor;
  void* context;
  void (*deleter)(ManagedTensor*);
  uint64_t flags;
  DLTensor tensor;
};

struct ExchangeApi {
  uint32_t major, minor;
  void* previous;
  void* allocate;
  void* managed_from_object;
  int (*managed_to_object)(ManagedTensor* tensor, void** object);  // 0, or -1 with an exception set
  int (*view_of_object)(void* object, DLTensor* out);              // 0, or -1 with an exception set
  void* current_stream;
};

constexpr int32_t CPU = 1;
constexpr uint8_t INT = 0, UNSIGNED = 1, FLOAT = 2, BOOL = 6;  // codes of types

PyTypeObject *tensor_type = nullptr, *parameter_type = nullptr;  // references are never dropped
const ExchangeApi* tensor_api = nullptr;

alignas(64) char nothing[64];  // data of arrays without elements

// A block of the pool that holds a tensor or an array.
struct Block {
  ManagedTensor managed{};
  int64_t sizes[4], strides[4];
  void* data = nullptr;
  size_t held = 0;
  explicit Block(size_t bytes) { data = pool_take(bytes, &held); }
  ~Block() { pool_give(data, held); }
};

char kind_of(uint8_t code, uint8_t bits) {
  if (code == INT) return 'i';
  if (code == UNSIGNED) return 'u';
  if (code == FLOAT) return 'f';
  return code == BOOL && bits == 8 ? 'b' : 0;
}

py::capsule owned(std::unique_ptr<Block> block) {
  py::capsule owner(block.get(), [](void* b) { delete static_cast<Block*>(b); });
  block.release();
  return owner;
}

bool view_tensor(py::handle object, Array& a) {
  DLTensor t{};
  if (tensor_api->view_of_object(object.ptr(), &t) != 0) throw py::error_already_set();
  if (t.device_type != CPU || (t.ndim > 0 && !t.shape)) return false;
  a.kind = t.lanes == 1 ? kind_of(t.code, t.bits) : 0;
  a.itemsize = t.bits / 8;
  if (t.data) a.data = static_cast<const char*>(t.data) + t.byte_offset;
  a.ndim = t.ndim;
  a.size = 1;
  a.contiguous = true;
  for (int i = t.ndim - 1; i >= 0; --i) {
    if (t.strides && t.shape[i] != 1 && t.strides[i] != a.size) a.contiguous = false;
    a.size *= t.shape[i];
    if (i < 2) a.shape[i] = t.shape[i];
  }
  a.writable = true;
  return t.data || a.size == 0;  // some subclasses of tensors have no memory of their own
}

bool view_array(const py::array& array, Array& a) {
  const py::dtype dtype = array.dtype();
  const bool native_order = dtype.byteorder() == '=' || dtype.byteorder() == '|';
  a.kind = native_order ? dtype.kind() : 0;
  a.itemsize = int(dtype.itemsize());
  a.data = array.data();
  a.ndim = int(array.ndim());
  a.size = array.size();
  for (int i = 0; i < 2 && i < a.ndim; ++i) a.shape[i] = array.shape(i);
  a.contiguous = (array.flags() & py::array::c_style) != 0;
  a.writable = array.writeable();
  return true;
}

}  // namespace

std::string Array::dtype_name() const { return py::str(object.attr("dtype")); }

bool accept_tensors(py::handle type, py::handle parameter) {
  if (!PyType_Check(type.ptr())) throw py::type_error("type: expected a type");
  if (!PyType_Check(parameter.ptr())) throw py::type_error("parameter: expected a type");
  const py::object capsule = py::getattr(type, "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return false;
  const auto* api = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api->major != 1 || !api->view_of_object || !api->managed_to_object) return false;
  tensor_type = reinterpret_cast<PyTypeObject*>(type.inc_ref().ptr());
  parameter_type = reinterpret_cast<PyTypeObject*>(parameter.inc_ref().ptr());
  tensor_api = api;
  return true;
}

bool view(py::handle object, Array& a) {
  a.object = object;
  const bool known =
      tensor_type && PyObject_TypeCheck(object.ptr(), tensor_type)
          ? view_tensor(object, a)
          : py::isinstance<py::array>(object) && view_array(py::reinterpret_borrow<py::array>(object), a);
  if (known && a.size == 0) a.data = nothing, a.contiguous = true;
  return known;
}

bool view_ordinary(py::handle object, Array& a) noexcept {
  const PyTypeObject* type = Py_TYPE(object.ptr());
  if (!tensor_type || (type != tensor_type && type != parameter_type)) return false;
  a.object = object;
  try {
    return view_tensor(object, a);
  } catch (const py::error_already_set&) {
    return false;
  }
}

py::array pool_empty(const std::vector<py::ssize_t>& shape, const py::dtype& dtype, bool channels_last) {
  if (channels_last && shape.size() != 4)
    throw py::value_error("shape: expected four sizes, got " + std::to_string(shape.size()));
  const int order[] = {1, 3, 2, 0};  // from the innermost size outwards
  std::vector<py::ssize_t> strides(shape.size());
  py::ssize_t bytes = dtype.itemsize(), step = bytes;
  for (size_t i = 0; i < shape.size(); ++i) {
    const size_t d = channels_last ? size_t(order[i]) : shape.size() - 1 - i;
    strides[d] = step;
    if (shape[d] < 0 || __builtin_mul_overflow(bytes, shape[d], &bytes) ||
        __builtin_mul_overflow(step, std::max<py::ssize_t>(1, shape[d]), &step))
      throw py::value_error("shape: expected sizes from 0 that fit into memory, got " + std::to_string(shape[d]));
  }
  auto block = std::make_unique<Block>(size_t(bytes));
  void* data = block->data;
  return py::array(dtype, shape, strides, data, owned(std::move(block)));
}

Made make_floats(int itemsize, std::initializer_list<int64_t> shape) {
  size_t bytes = size_t(itemsize);
  for (int64_t n : shape)
    if (__builtin_mul_overflow(bytes, size_t(n), &bytes)) throw std::bad_alloc();
  auto block = std::make_unique<Block>(bytes);
  DLTensor& t = block->managed.tensor;
  int64_t step = 1;
  for (int i = int(shape.size()) - 1; i >= 0; --i) {
    block->sizes[i] = shape.begin()[i];
    block->strides[i] = step;
    step *= std::max<int64_t>(1, block->sizes[i]);
  }
  Made made{py::object(), block->data};
  if (tensor_api) {
    t = {block->data, CPU, 0, int32_t(shape.size()), FLOAT, uint8_t(8 * itemsize), 1, block->sizes, block->strides, 0};
    block->managed.major = tensor_api->major, block->managed.minor = tensor_api->minor;
    block->managed.context = block.get();
    block->managed.deleter = [](ManagedTensor* m) { delete static_cast<Block*>(m->context); };
    void* object = nullptr;
    if (tensor_api->managed_to_object(&block->managed, &object) != 0) throw py::error_already_set();
    block.release();  // owned by the tensor
    made.object = py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
  } else {
    const py::dtype dtype("f" + std::to_string(itemsize));
    made.object = py::array(dtype, std::vector<py::ssize_t>(shape), made.data, owned(std::move(block)));
  }
  return made;
}

}  // namespace sparsebreg
