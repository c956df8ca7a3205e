#if defined(__aarch64__)
#include "isa/common.h"

#define SB_VECTOR_BYTES 16
namespace sparsebreg {
namespace neon {
#include "isa/kernels.inc"
}  // namespace neon
extern const Table neon_table;
const Table neon_table{"neon", neon::kernels<float>(), neon::kernels<double>(), neon::mark_nonzeros<uint8_t>};
}  // namespace sparsebreg
#endif
