#include "array.h"

namespace py = pybind11;

namespace sparsebreg {
namespace {

// DLPack 1.x as far as it is used here: https://dmlc.github.io/dlpack/latest/c_api.html
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

struct ExchangeApi {
  uint32_t major, minor;
  void* previous;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*view_of_object)(void* object, DLTensor* out);  // 0, or -1 with an exception set
  void* current_stream;
};

constexpr int32_t CPU = 1;

PyTypeObject* tensor_type = nullptr;  // kept for good
const ExchangeApi* tensor_api = nullptr;

alignas(64) char nothing[64];  // where arrays without an element lie

char kind_of(uint8_t code, uint8_t bits) {
  if (code == 0) return 'i';
  if (code == 1) return 'u';
  if (code == 2) return 'f';
  return code == 6 && bits == 8 ? 'b' : 0;
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
  return t.data || a.size == 0;  // subclasses of tensors may have no memory of their own
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

bool accept_tensors(py::handle type) {
  if (!PyType_Check(type.ptr())) throw py::type_error("type: expected a type");
  const py::object capsule = py::getattr(type, "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return false;
  const auto* api = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api->major != 1 || !api->view_of_object) return false;
  tensor_type = reinterpret_cast<PyTypeObject*>(type.inc_ref().ptr());
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

}  // namespace sparsebreg
