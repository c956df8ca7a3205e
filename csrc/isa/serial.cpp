// Baseline of the target: SSE2 on x86-64.
#include "isa/common.h"

#define SB_VECTOR_BYTES 16

namespace sparsebreg {
namespace serial {
#include "isa/kernels.inc"
}  // namespace serial
extern const Table serial_table;
const Table serial_table{"serial", serial::kernels<float>(), serial::kernels<double>(), serial::mark_nonzeros<uint8_t>};
}  // namespace sparsebreg
