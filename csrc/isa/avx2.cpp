#if defined(__x86_64__)
#include "isa/common.h"
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define SB_VECTOR_BYTES 32

namespace sparsebreg {
namespace avx2 {
#include "isa/kernels.inc"
}  // namespace avx2
extern const Table avx2_table;
const Table avx2_table{"avx2", avx2::kernels<float>(), avx2::kernels<double>()};
}  // namespace sparsebreg
#pragma GCC pop_options
#endif
