#if defined(__x86_64__)
#include "isa/common.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma,prefer-vector-width=512")
#endif
#define SB_VECTOR_BYTES 64
namespace sparsebreg {
namespace avx512 {
#include "isa/kernels.inc"
}  // namespace avx512
extern const Table avx512_table;
const Table avx512_table{"avx512", avx512::kernels<float>(), avx512::kernels<double>(), avx512::mark_nonzeros<uint8_t>};
}  // namespace sparsebreg
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
