// The words of CUDA C that need no thread: qualifiers, vectors, functions of numbers.

#define __global__ __attribute__((used))
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static __attribute__((section("block_memory")))

struct uint3 { unsigned x, y, z; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

template <class T> T min(T a, T b) { return a < b ? a : b; }
template <class T> T max(T a, T b) { return a > b ? a : b; }
template <class To, class From> To same_bits(From x) { To y; memcpy(&y, &x, sizeof y); return y; }
UNSEEN float __uint_as_float(unsigned x) { return same_bits<float>(x); }
UNSEEN unsigned __float_as_uint(float x) { return same_bits<unsigned>(x); }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline float __fdividef(float x, float y) { return x / y; }
#define __log2f log2f
#define __logf logf
#define __expf expf
template <class T> T __ldg(const T* p) { return *p; }
template <class T> void __stcs(T* p, T x) { *p = x; }
inline void __threadfence() {}
inline void __threadfence_block() {}
