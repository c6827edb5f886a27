// The loss and its gradient on a GPU in four rungs, float32. Rungs 1 to 3 are here; rung 4 is `overwrite` in zloss.cu.
//
//   loss = log Z - x[y],  log Z = log sum exp x;   gradient dx = scale ((1 + 2 z_loss log Z) exp(x - log Z) - [v = y])
//
// All kernels take n rows of v logits, write loss and log Z of each row, and overwrite the logits with the gradient. A
// target below 0 is ignored: zeros. This file includes nothing, so cupy.RawKernel compiles it as it is:
//
//   kernel = cupy.RawKernel(open("kernels/zloss/steps.cu").read(), "zloss_block_a_row")
//   kernel((n,), (256,), (x, y, loss, log_z, numpy.int32(n), numpy.int32(v), numpy.float32(1e-5), numpy.float32(1 / n)))
//
// Not here: bfloat16, targets out of range, logits of infinity.

#define LOWEST -3.4028235e38f  // the least float: e^(LOWEST - x) is 0 for every logit

// Take x into (m, s), the largest logit so far and the sum of e^(logit - m): the online softmax.
__device__ void accumulate(float& m, float& s, float x) {
  float new_max = fmaxf(m, x);
  s = s * expf(m - new_max) + expf(x - new_max);
  m = new_max;
}

// Merge the (maximum, sum) of two parts of a row into (m, s).
__device__ void merge(float& m, float& s, float m2, float s2) {
  float new_max = fmaxf(m, m2);
  s = s * expf(m - new_max) + s2 * expf(m2 - new_max);
  m = new_max;
}

// ---------------------------------------------------------------------------------------------------------------------
// 1. A thread a row. The loops of a CPU. Neighbouring threads read addresses v floats apart, so each of them uses 4 of
//    the 32 bytes that every access brings, and most of the GPU has no row to work on.

extern "C" __global__ void zloss_thread_a_row(float* logits, const long long* targets, float* loss, float* log_z, int n,
                                              int v, float z_loss, float scale) {
  int row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= n) return;  // the last block may have more threads than rows
  float* x = logits + (long long)row * v;
  long long y = targets[row];
  // log Z in one pass
  float m = LOWEST, s = 0.f;
  for (int i = 0; i < v; i++) accumulate(m, s, x[i]);
  float z = m + logf(s), factor = scale * (1.f + 2.f * z_loss * z);
  loss[row] = y < 0 ? 0.f : z - x[y];
  log_z[row] = y < 0 ? 0.f : z;
  // the gradient in another
  for (int i = 0; i < v; i++) x[i] = y < 0 ? 0.f : factor * expf(x[i] - z) - (i == y ? scale : 0.f);
}

// ---------------------------------------------------------------------------------------------------------------------
// 2. A block a row. 256 threads take every 256th logit, so neighbours read neighbouring addresses. A tree merges their
//    parts in shared memory: 128 threads take one part more each, then 64, and so on. A barrier separates its steps.

extern "C" __global__ void zloss_block_a_row(float* logits, const long long* targets, float* loss, float* log_z, int n,
                                             int v, float z_loss, float scale) {
  __shared__ float maxima[256], sums[256];
  int row = blockIdx.x, t = threadIdx.x;
  float* x = logits + (long long)row * v;
  long long y = targets[row];
  float m = LOWEST, s = 0.f;
  for (int i = t; i < v; i += blockDim.x) accumulate(m, s, x[i]);
  maxima[t] = m;
  sums[t] = s;
  for (int half = blockDim.x / 2; half; half /= 2) {
    __syncthreads();  // the parts of the step before are written
    if (t < half) merge(maxima[t], sums[t], maxima[t + half], sums[t + half]);
  }
  __syncthreads();
  float z = maxima[0] + logf(sums[0]), factor = scale * (1.f + 2.f * z_loss * z);
  if (t == 0) {
    log_z[row] = y < 0 ? 0.f : z;
    if (y < 0) loss[row] = 0.f;
  }
  for (int i = t; i < v; i += blockDim.x) {
    if (i == y) loss[row] = z - x[i];  // by the thread that overwrites it
    x[i] = y < 0 ? 0.f : factor * expf(x[i] - z) - (i == y ? scale : 0.f);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// 3. Warps. The 32 threads of a warp merge their parts by shuffles, register to register, without shared memory or
//    barriers. One part a warp is left, so there are two barriers' worth of work less. A load brings 16 bytes.

__device__ void merge_warp(float& m, float& s) {  // every lane gets the result
  for (int o = 16; o; o /= 2) merge(m, s, __shfl_xor_sync(~0u, m, o), __shfl_xor_sync(~0u, s, o));
}

extern "C" __global__ void zloss_warps(float* logits, const long long* targets, float* loss, float* log_z, int n, int v,
                                       float z_loss, float scale) {
  __shared__ float maxima[32], sums[32];
  int row = blockIdx.x, t = threadIdx.x, warp = t / 32, lane = t % 32, warps = blockDim.x / 32;
  float* x = logits + (long long)row * v;
  long long y = targets[row];
  int n4 = v % 4 || (unsigned long long)x % 16 ? 0 : v / 4;  // rows that start anywhere are read one by one
  float m = LOWEST, s = 0.f;
  for (int i = t; i < n4; i += blockDim.x) {
    float4 p = ((float4*)x)[i];
    float new_max = fmaxf(fmaxf(m, fmaxf(p.x, p.y)), fmaxf(p.z, p.w));
    s = s * expf(m - new_max) + expf(p.x - new_max) + expf(p.y - new_max) + expf(p.z - new_max) + expf(p.w - new_max);
    m = new_max;
  }
  for (int i = 4 * n4 + t; i < v; i += blockDim.x) accumulate(m, s, x[i]);
  // the parts of a warp's lanes, then those of the warps: each warp does the latter for itself
  merge_warp(m, s);
  if (lane == 0) {
    maxima[warp] = m;
    sums[warp] = s;
  }
  __syncthreads();
  m = lane < warps ? maxima[lane] : LOWEST;
  s = lane < warps ? sums[lane] : 0.f;
  merge_warp(m, s);
  float z = m + logf(s), factor = scale * (1.f + 2.f * z_loss * z);
  if (t == 0) {
    log_z[row] = y < 0 ? 0.f : z;
    if (y < 0) loss[row] = 0.f;
  }
  for (int i = t; i < n4; i += blockDim.x) {
    float4 p = ((float4*)x)[i];
    float* each = &p.x;
    for (int j = 0; j < 4; j++) {
      if (4 * i + j == y) loss[row] = z - each[j];
      each[j] = y < 0 ? 0.f : factor * expf(each[j] - z) - (4 * i + j == y ? scale : 0.f);
    }
    ((float4*)x)[i] = p;
  }
  for (int i = 4 * n4 + t; i < v; i += blockDim.x) {
    if (i == y) loss[row] = z - x[i];
    x[i] = y < 0 ? 0.f : factor * expf(x[i] - z) - (i == y ? scale : 0.f);
  }
}
