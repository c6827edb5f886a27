// Cross-entropy with log Z on a GPU: one block per row, bfloat16 or float32 logits, any vocabulary size.
//
//   loss = log Z - x[y],  log Z = log sum exp x;   gradient dx = (g + h) exp(x - log Z) - g [v = y]
//
//   forward, backward   read the row twice and write its gradient over it. (maximum, sum) travel together, so that one
//                       pass over the row gives log Z. Any size, any alignment.
//   overwrite           loads the whole row into shared memory once and writes its gradient over it: one read and one
//                       write of memory, which is what a copy costs. For rows that fit (227 KB on an H100). On sm_90
//                       and later one thread asks for the row by bulk copies and all wait at a barrier; on sm_80 each
//                       thread loads 16 bytes at a time.
//
// Reads and writes are 16 bytes a thread where rows are multiples of 16 bytes and start at one. A target below 0 is
// ignored: loss, log Z and gradient are zeros. A target from V on would read from another row: its loss is NaN, and so
// is the gradient from `overwrite`. `backward` alone takes such a target for one in another part of the vocabulary.

#include "bf16.cuh"

#define LN2 0.6931471805599453f
#define NOT_A_NUMBER __uint_as_float(0x7fc00000)

INLINE float to_float(u16 x) { return __uint_as_float((u32)x << 16); }
INLINE float to_float(float x) { return x; }

INLINE void to_bf16(float x, float& y) { y = x; }
INLINE void to_bf16(float x, u16& y) { y = to_bf16(x); }

template <typename T>
struct Vec16 {  // 16 bytes
  static const int n = 16 / sizeof(T);
  union {
    uint4 all;
    T each[16 / sizeof(T)];
  };
};

// Merge (maximum, sum of 2^(x - maximum)) of two parts of a row into (m, s).
INLINE void merge_lse(float& m, float& s, float m2, float s2) {
  float new_max = fmaxf(m, m2);
  s = s * exp2_approx(m - new_max) + s2 * exp2_approx(m2 - new_max);
  m = new_max;
}

// The same over all threads of the block; every thread gets the result.
__device__ void merge_lse_block(float& m, float& s) {
  __shared__ float parts[64];
  for (int o = 16; o; o >>= 1) merge_lse(m, s, __shfl_xor_sync(~0u, m, o), __shfl_xor_sync(~0u, s, o));
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  if (lane == 0) {
    parts[warp] = m;
    parts[32 + warp] = s;
  }
  __syncthreads();
  m = lane < warps ? parts[lane] : NEG_INF;
  s = lane < warps ? parts[32 + lane] : 0.f;
  for (int o = 16; o; o >>= 1) merge_lse(m, s, __shfl_xor_sync(~0u, m, o), __shfl_xor_sync(~0u, s, o));
}

// Take 16 bytes of a row into (m, s).
template <typename T>
INLINE void accumulate(const Vec16<T>& p, float& m, float& s) {
  float new_max = m;
#pragma unroll
  for (int j = 0; j < Vec16<T>::n; j++) new_max = fmaxf(new_max, to_float(p.each[j]) * LOG2E);
  s *= exp2_approx(m - new_max);
  m = new_max;
#pragma unroll
  for (int j = 0; j < Vec16<T>::n; j++) s += exp2_approx(to_float(p.each[j]) * LOG2E - m);
}

template <typename T>
__device__ void forward(const T* logits, const long long* targets, float* loss, float* log_z, int v) {
  const long long row = blockIdx.x;
  const T* x = logits + row * v;
  const int n = Vec16<T>::n, n_vec = v % n || (u64)x % 16 ? 0 : v / n;  // what can be read 16 bytes at a time
  float m = NEG_INF, s = 0.f;
  for (int i = threadIdx.x; i < n_vec; i += blockDim.x) {
    Vec16<T> p;
    p.all = ((const uint4*)x)[i];
    accumulate(p, m, s);
  }
  for (int i = n_vec * n + threadIdx.x; i < v; i += blockDim.x) merge_lse(m, s, to_float(x[i]) * LOG2E, 1.f);
  merge_lse_block(m, s);
  if (threadIdx.x == 0) {
    const long long y = targets[row];
    const float z = (m + __log2f(s)) * LN2;
    loss[row] = y < 0 ? 0.f : y < v ? z - to_float(x[y]) : NOT_A_NUMBER;
    log_z[row] = y < 0 ? 0.f : z;
  }
}

template <typename T>
__device__ void backward(T* logits, const long long* targets, const float* log_z, const float* g, const float* h,
                         int v) {
  const long long row = blockIdx.x, y = targets[row];
  T* x = logits + row * v;
  const int n = Vec16<T>::n, n_vec = v % n || (u64)x % 16 ? 0 : v / n;
  const float shift = log_z[row] * LOG2E, target_grad = y < 0 ? 0.f : g[row], factor = y < 0 ? 0.f : g[row] + h[row];
  for (int i = threadIdx.x; i < n_vec; i += blockDim.x) {
    Vec16<T> p;
    p.all = ((const uint4*)x)[i];
#pragma unroll
    for (int j = 0; j < n; j++) {
      float e = y < 0 ? 0.f : factor * exp2_approx(to_float(p.each[j]) * LOG2E - shift);  // not 0 * infinity
      to_bf16(i * n + j == y ? e - target_grad : e, p.each[j]);
    }
    __stcs((uint4*)x + i, p.all);  // streaming store: nobody reads it soon
  }
  for (int i = n_vec * n + threadIdx.x; i < v; i += blockDim.x) {
    float e = y < 0 ? 0.f : factor * exp2_approx(to_float(x[i]) * LOG2E - shift);
    to_bf16(i == y ? e - target_grad : e, x[i]);
  }
}

// Load `bytes` (a multiple of 16) into shared memory and wait for them.
__device__ void load_row(void* shared, const void* global, u32 bytes) {
#if __CUDA_ARCH__ >= 900
  __shared__ u64 barrier;
  if (threadIdx.x == 0) mbarrier_init(&barrier, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_expect_tx(&barrier, bytes);
    for (u32 o = 0; o < bytes; o += 32768)
      cp_async_bulk((char*)shared + o, (const char*)global + o, min(32768u, bytes - o), &barrier);
  }
  mbarrier_wait(&barrier, 0);
#else
  for (u32 o = 16 * threadIdx.x; o < bytes; o += 16 * blockDim.x)
    cp_async((char*)shared + o, (const char*)global + o, 16);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
#endif
}

template <typename T>
__device__ void overwrite(T* logits, const long long* targets, float* loss, float* log_z, int v, float z_loss,
                          float scale) {
  uint4* stage = (uint4*)dynamic_shared();
  const long long row = blockIdx.x, y = targets[row];
  T* x = logits + row * v;
  const int n = Vec16<T>::n, n_vec = v / n;
  load_row(stage, x, v * (u32)sizeof(T));
  float m = NEG_INF, s = 0.f;
  for (int i = threadIdx.x; i < n_vec; i += blockDim.x) {
    Vec16<T> p;
    p.all = stage[i];
    accumulate(p, m, s);
  }
  merge_lse_block(m, s);
  const float shift = m + __log2f(s), z = shift * LN2;
  const float zloss_factor = 1.f + 2.f * z_loss * z;  // of loss + z_loss * log Z^2
  const float factor = y < v ? scale * zloss_factor : NOT_A_NUMBER;
  if (threadIdx.x == 0) {
    // from the stage: the row itself is being overwritten
    loss[row] = y < 0 ? 0.f : y < v ? z - to_float(((const T*)stage)[y]) : NOT_A_NUMBER;
    log_z[row] = y < 0 ? 0.f : z;
  }
  for (int i = threadIdx.x; i < n_vec; i += blockDim.x) {
    Vec16<T> p;
    p.all = stage[i];
#pragma unroll
    for (int j = 0; j < n; j++) {
      float e = factor * exp2_approx(to_float(p.each[j]) * LOG2E - shift);
      to_bf16(y < 0 ? 0.f : i * n + j == y ? e - scale : e, p.each[j]);
    }
    __stcs((uint4*)x + i, p.all);
  }
}

#define EXPORT(name, T)                                                                                                \
  extern "C" __global__ void __launch_bounds__(1024)                                                                   \
      forward_##name(const T* x, const long long* y, float* loss, float* log_z, int v) {                               \
    forward<T>(x, y, loss, log_z, v);                                                                                  \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(1024)                                                                   \
      backward_##name(T* x, const long long* y, const float* log_z, const float* g, const float* h, int v) {           \
    backward<T>(x, y, log_z, g, h, v);                                                                                 \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(1024)                                                                   \
      overwrite_##name(T* x, const long long* y, float* loss, float* log_z, int v, float z_loss, float scale) {        \
    overwrite<T>(x, y, loss, log_z, v, z_loss, scale);                                                                 \
  }

EXPORT(bf16, u16)
EXPORT(fp32, float)
