// Which instruction set the kernels run on, chosen once in linear.cpp, and how a loop is compiled for each of them.
#pragma once

enum class Isa { kPortable, kAvx2, kAvx512 };
Isa active_isa();

#if defined(__x86_64__)
#define TARGET_AVX2 __attribute__((target("avx2,fma")))
#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")))
#endif
// A body that is compiled again in each function that calls it, with that function's instructions.
#define INLINE_BODY inline __attribute__((always_inline))
