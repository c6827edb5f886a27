// A bfloat16 is the upper half of a float32; two make a 32-bit word, the left one in its low half. And a warp's sum.

#include "ptx.cuh"

#define LOG2E 1.4426950408889634f
#define NEG_INF -1e30f  // finite, so that NEG_INF - NEG_INF is 0 and not NaN

INLINE float bf16_low(u32 x) { return __uint_as_float(x << 16); }
INLINE float bf16_high(u32 x) { return __uint_as_float(x & 0xffff0000u); }

INLINE float warp_sum(float x) {
  for (int o = 16; o; o >>= 1) x += __shfl_xor_sync(~0u, x, o);
  return x;
}
