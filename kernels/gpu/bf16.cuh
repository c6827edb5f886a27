// bfloat16 is the upper half of a float32; two are a word, the left one in its low half. And a warp's sum.

#include "ptx.cuh"

#define LOG2E 1.4426950408889634f
#define LEAST -1e30f

INLINE float low(u32 x) { return __uint_as_float(x << 16); }
INLINE float high(u32 x) { return __uint_as_float(x & 0xffff0000u); }

INLINE float warp_sum(float x) {
  for (int o = 16; o; o >>= 1) x += __shfl_xor_sync(~0u, x, o);
  return x;
}
