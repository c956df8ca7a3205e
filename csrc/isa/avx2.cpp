#if defined(__x86_64__)
#include "isa/common.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define SB_VECTOR_BYTES 32

namespace sparsebreg {
namespace avx2 {
#include "isa/kernels.inc"
}  // namespace avx2
extern const Table avx2_table;
const Table avx2_table{"avx2", avx2::kernels<float>(), avx2::kernels<double>(), avx2::mark_nonzeros<uint8_t>};
}  // namespace sparsebreg
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
