// The extension module: what has no arguments to check, and everything else from the other files of this folder.
#include <cstdlib>

#include "bindings/checks.h"
#include "memory.h"
#include "pool.h"

namespace sparsebreg {

void register_pattern(py::module_& m);
void register_linear(py::module_& m);
void register_conv2d(py::module_& m);
void register_norm_pool(py::module_& m);
void register_optim(py::module_& m);

}  // namespace sparsebreg

PYBIND11_MODULE(_C, m) {
  using namespace sparsebreg;
  m.doc() = "Native kernels of sparsebreg. Not a public interface: see sparsebreg.ops.";
  m.attr("LANES") = LANES;
  m.def("accept_tensors", &accept_tensors);
  m.def("environment", [](const char* name) { return static_cast<const char*>(std::getenv(name)); });
  m.def("isa", [] { return active_table().isa; });
  m.def("available_isas", &available_isas);
  m.def("select_isa", &select_isa);
  m.def("pool_empty", &pool_empty);
  m.def("pool_limit", &pool_limit);
  m.def("pool_held", &pool_held);
  m.def("pool_release", &pool_release);
  m.def("release_scratch", &release_scratch);
  register_pattern(m);
  register_linear(m);
  register_conv2d(m);
  register_norm_pool(m);
  register_optim(m);
}
