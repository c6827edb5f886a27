// Cross-entropy with log Z on a GPU: one block a row, 16-bit (bfloat16) or 32-bit logits, any vocabulary size.
//
//   loss = log Z - x[y],  log Z = log sum exp x;   gradient dx = (g + h) exp(x - log Z) - g [v = y]
//
// Three steps, each a kernel that stays and is timed:
//   forward, backward   the row is read twice and written once; (largest, sum) are carried along, so that one pass
//                       over the row gives log Z. Any size, any alignment.
//   overwrite           the row is fetched once, whole, into shared memory, and its gradient written over it: one read
//                       and one write of memory, which is what a copy costs. For rows that fit (227 KB on an H100).
//                       On sm_90 and later one thread asks for the row by bulk copies and all wait at a barrier; on
//                       sm_80 each thread fetches its 16 bytes at a time past the registers.
//
// Reads and writes are 16 bytes a thread where rows are multiples of 16 bytes and start at one. A target below 0 is
// ignored: zeros. One from V on would be read from another row: its loss is NaN.

#include "bf16.cuh"

#define LN2 0.6931471805599453f
#define NOT_A_NUMBER __uint_as_float(0x7fc00000)

INLINE float wide(u16 x) { return __uint_as_float((u32)x << 16); }
INLINE float wide(float x) { return x; }

INLINE void narrow(float x, float& y) { y = x; }
INLINE void narrow(float x, u16& y) { y = narrow(x); }

template <typename T>
struct Pack {  // 16 bytes
  static const int n = 16 / sizeof(T);
  union {
    uint4 all;
    T each[16 / sizeof(T)];
  };
};

// (largest, sum of 2^(x - largest)) of two parts of a row -> of both
INLINE void join(float& m, float& s, float m2, float s2) {
  float most = fmaxf(m, m2);
  s = s * power(m - most) + s2 * power(m2 - most);
  m = most;
}

// the same over all threads of the block; every thread gets the result
__device__ void join_block(float& m, float& s) {
  __shared__ float parts[64];
  for (int o = 16; o; o >>= 1) join(m, s, __shfl_xor_sync(~0u, m, o), __shfl_xor_sync(~0u, s, o));
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  if (lane == 0) {
    parts[warp] = m;
    parts[32 + warp] = s;
  }
  __syncthreads();
  m = lane < warps ? parts[lane] : LEAST;
  s = lane < warps ? parts[32 + lane] : 0.f;
  for (int o = 16; o; o >>= 1) join(m, s, __shfl_xor_sync(~0u, m, o), __shfl_xor_sync(~0u, s, o));
}

template <typename T>
INLINE void take_in(const Pack<T>& p, float& m, float& s) {
  float most = m;
#pragma unroll
  for (int j = 0; j < Pack<T>::n; j++) most = fmaxf(most, wide(p.each[j]) * LOG2E);
  s *= power(m - most);
  m = most;
#pragma unroll
  for (int j = 0; j < Pack<T>::n; j++) s += power(wide(p.each[j]) * LOG2E - m);
}

template <typename T>
__device__ void forward(const T* logits, const long long* targets, float* loss, float* log_z, int v) {
  const long long row = blockIdx.x;
  const T* x = logits + row * v;
  const int n = Pack<T>::n, whole = v % n || (u64)x % 16 ? 0 : v / n;
  float m = LEAST, s = 0.f;
  for (int i = threadIdx.x; i < whole; i += blockDim.x) {
    Pack<T> p;
    p.all = ((const uint4*)x)[i];
    take_in(p, m, s);
  }
  for (int i = whole * n + threadIdx.x; i < v; i += blockDim.x) join(m, s, wide(x[i]) * LOG2E, 1.f);
  join_block(m, s);
  if (threadIdx.x == 0) {
    const long long y = targets[row];
    const float z = (m + __log2f(s)) * LN2;
    loss[row] = y < 0 ? 0.f : y < v ? z - wide(x[y]) : NOT_A_NUMBER;
    log_z[row] = y < 0 ? 0.f : z;
  }
}

template <typename T>
__device__ void backward(const T* logits, const long long* targets, const float* log_z, const float* g, const float* h,
                         T* gradient, int v) {
  const long long row = blockIdx.x, y = targets[row];
  const T* x = logits + row * v;
  T* d = gradient + row * v;
  const int n = Pack<T>::n, whole = v % n || ((u64)x | (u64)d) % 16 ? 0 : v / n;
  const float shift = log_z[row] * LOG2E, take = y < 0 ? 0.f : g[row], factor = y < 0 ? 0.f : g[row] + h[row];
  for (int i = threadIdx.x; i < whole; i += blockDim.x) {
    Pack<T> p;
    p.all = ((const uint4*)x)[i];
#pragma unroll
    for (int j = 0; j < n; j++) {
      float e = y < 0 ? 0.f : factor * power(wide(p.each[j]) * LOG2E - shift);  // not 0 * infinity
      narrow(i * n + j == y ? e - take : e, p.each[j]);
    }
    __stcs((uint4*)d + i, p.all);  // nobody reads it soon
  }
  for (int i = whole * n + threadIdx.x; i < v; i += blockDim.x) {
    float e = y < 0 ? 0.f : factor * power(wide(x[i]) * LOG2E - shift);
    narrow(i == y ? e - take : e, d[i]);
  }
}

// Fetches `bytes` (a multiple of 16) into shared memory and waits for them.
__device__ void fetch(void* shared, const void* global, u32 bytes) {
#if __CUDA_ARCH__ >= 900
  __shared__ u64 barrier;
  if (threadIdx.x == 0) barrier_init(&barrier, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    barrier_expect(&barrier, bytes);
    for (u32 o = 0; o < bytes; o += 32768)
      bulk_copy((char*)shared + o, (const char*)global + o, min(32768u, bytes - o), &barrier);
  }
  barrier_wait(&barrier, 0);
#else
  for (u32 o = 16 * threadIdx.x; o < bytes; o += 16 * blockDim.x)
    copy_async((char*)shared + o, (const char*)global + o, 16);
  copies_commit();
  copies_wait<0>();
  __syncthreads();
#endif
}

template <typename T>
__device__ void overwrite(T* logits, const long long* targets, float* loss, float* log_z, int v, float z_loss,
                          float share) {
  uint4* stage = (uint4*)dynamic_shared();
  const long long row = blockIdx.x, y = targets[row];
  T* x = logits + row * v;
  const int n = Pack<T>::n, whole = v / n;
  fetch(stage, x, v * (u32)sizeof(T));
  float m = LEAST, s = 0.f;
  for (int i = threadIdx.x; i < whole; i += blockDim.x) {
    Pack<T> p;
    p.all = stage[i];
    take_in(p, m, s);
  }
  join_block(m, s);
  const float shift = m + __log2f(s), z = shift * LN2, made = 1.f + 2.f * z_loss * z;
  const float factor = share * (fabsf(made) > 1e-3f ? made : 1e-3f);  // zloss_numba.LEAST_FACTOR
  if (threadIdx.x == 0) {
    // from the stage: the row itself is being overwritten
    loss[row] = y < 0 ? 0.f : y < v ? z - wide(((const T*)stage)[y]) : NOT_A_NUMBER;
    log_z[row] = y < 0 ? 0.f : z;
  }
  for (int i = threadIdx.x; i < whole; i += blockDim.x) {
    Pack<T> p;
    p.all = stage[i];
#pragma unroll
    for (int j = 0; j < n; j++) {
      float e = factor * power(wide(p.each[j]) * LOG2E - shift);
      narrow(y < 0 ? 0.f : i * n + j == y ? e - share : e, p.each[j]);
    }
    __stcs((uint4*)x + i, p.all);
  }
}

#define EXPORT(name, T)                                                                                               \
  extern "C" __global__ void __launch_bounds__(1024) forward_##name(const T* x, const long long* y, float* loss,      \
                                                                    float* log_z, int v) {                           \
    forward<T>(x, y, loss, log_z, v);                                                                                 \
  }                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(1024)                                                                  \
      backward_##name(const T* x, const long long* y, const float* log_z, const float* g, const float* h, T* d,       \
                      int v) {                                                                                        \
    backward<T>(x, y, log_z, g, h, d, v);                                                                             \
  }                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(1024)                                                                  \
      overwrite_##name(T* x, const long long* y, float* loss, float* log_z, int v, float z_loss, float share) {       \
    overwrite<T>(x, y, loss, log_z, v, z_loss, share);                                                                \
  }

EXPORT(bf16, u16)
EXPORT(fp32, float)
