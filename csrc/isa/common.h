// Everything the kernels need from outside, included before an instruction set's target pragma: what is declared after
// the pragma would be compiled for that set, and an inline function shared with the baseline must never be.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels/table.h"
#include "memory.h"
#include "pattern.h"
