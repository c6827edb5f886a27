// Attention on a GPU, bfloat16 in and out, float32 inside. B rows, T positions, H heads, E numbers a head (64 or 128).
//
// 1. attention_simple_E: a thread a query, scores one by one, the running maximum and sum of the softmax: 20 lines to
//    read before 2. No tensor cores.
// 2. attention_E: FlashAttention-2's forward pass (arXiv 2307.08691) on tensor cores (mma.sync, sm_80 and later): 4
//    warps of 16 queries each on tiles of 64 keys. Scores become weights in registers, and the registers of weights are
//    at once an operand of the product with v. The next tile is on its way while one is computed with. Keys before the
//    block's first document are never fetched.
//
// Documents: `first` (B, T) is the first position of i's document, so query i sees keys j <= i with first[j] ==
// first[i]. lse (B, H, T), for the gradient: log2 of the sum of 2^score, scores in units of log 2.

#include "tiles.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// 1. A thread a query. q, out (B, T, H, E); k, v (B, T, G, E); grid (ceil(T / 64), H, B), 64 threads.

template <int E>
__device__ void attention_simple(const u32* q, const u32* k, const u32* v, const int* first, u32* out, float* lse,
                                 int t, int heads, int key_heads) {
  int i = blockIdx.x * 64 + threadIdx.x, h = blockIdx.y, b = blockIdx.z, g = h / (heads / key_heads);
  if (i >= t) return;
  const u32* mine = q + (((long long)b * t + i) * heads + h) * (E / 2);
  float sum = 0.f, largest = LEAST, o[E];
  for (int d = 0; d < E; d++) o[d] = 0.f;
  for (int j = first[b * t + i]; j <= i; j++) {
    if (first[b * t + j] != first[b * t + i]) continue;
    const u32* key = k + (((long long)b * t + j) * key_heads + g) * (E / 2);
    const u32* value = v + (((long long)b * t + j) * key_heads + g) * (E / 2);
    float s = 0.f;
    for (int d = 0; d < E / 2; d++) s += low(mine[d]) * low(key[d]) + high(mine[d]) * high(key[d]);
    s *= LOG2E * rsqrtf((float)E);
    float most = fmaxf(largest, s), grown = power(largest - most), w = power(s - most);
    largest = most;
    sum = sum * grown + w;
    for (int d = 0; d < E / 2; d++) {
      o[2 * d] = o[2 * d] * grown + w * low(value[d]);
      o[2 * d + 1] = o[2 * d + 1] * grown + w * high(value[d]);
    }
  }
  u32* target = out + (((long long)b * t + i) * heads + h) * (E / 2);
  for (int d = 0; d < E / 2; d++) target[d] = pack(o[2 * d] / sum, o[2 * d + 1] / sum);
  lse[((long long)b * heads + h) * t + i] = largest + __log2f(sum);
}

// ---------------------------------------------------------------------------------------------------------------------
// 2. On tensor cores: grid (ceil(T / 64), H, B), 128 threads, 5 tiles of dynamic shared memory: q, twice k and v.

template <int E>
__device__ void attention(const u32* q, const u32* k, const u32* v, const int* first, u32* out, float* lse, int t,
                          int heads, int key_heads) {
  const int KEYS = 64, SIZE = KEYS * Line<E>::words;
  u32 *queries = (u32*)dynamic_shared(), *keys = queries + SIZE, *values = keys + 2 * SIZE;
  __shared__ int key_first[2][KEYS];
  const int h = blockIdx.y, b = blockIdx.z, g = h / (heads / key_heads);
  const int start = (gridDim.x - 1 - blockIdx.x) * 64, end = min(start + 64, t);  // the longest first
  const long long row = (long long)heads * (E / 2), key_row = (long long)key_heads * (E / 2);
  const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
  const float scale = LOG2E * rsqrtf((float)E);
  first += (long long)b * t;
  k += ((long long)b * t * key_heads + g) * (E / 2);
  v += ((long long)b * t * key_heads + g) * (E / 2);

  int rows[2], mine[2], from = t;  // from: the first key that any query of the block sees
  for (int i = start; i < end; i++) from = min(from, first[i]);
  from = from / KEYS * KEYS;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    rows[r] = start + warp * 16 + group + 8 * r;
    mine[r] = rows[r] < t ? first[rows[r]] : -1;
  }
  auto fetch = [&](int stage, int j) {
    fetch_rows<E, KEYS>(keys + stage * SIZE, k, key_row, j, t);
    fetch_rows<E, KEYS>(values + stage * SIZE, v, key_row, j, t);
    if (threadIdx.x < KEYS) key_first[stage][threadIdx.x] = j + threadIdx.x < t ? first[j + threadIdx.x] : -2;
  };
  fetch_rows<E, 64>(queries, q + ((long long)b * t * heads + h) * (E / 2), row, start, t);
  fetch(0, from);
  copies_commit();
  float o[E / 8][4], s[KEYS / 8][4], grown[2], largest[2] = {LEAST, LEAST}, sum[2] = {0.f, 0.f};
#pragma unroll
  for (int c = 0; c < E / 8; c++) o[c][0] = o[c][1] = o[c][2] = o[c][3] = 0.f;

  for (int j = from, stage = 0; j < end; j += KEYS, stage ^= 1) {
    if (j + KEYS < end) fetch(stage ^ 1, j + KEYS);
    copies_commit();
    copies_wait<1>();  // all but what was just asked for
    __syncthreads();
    multiply_rows<E, KEYS>(s, queries, keys + stage * SIZE);
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
      for (int x = 0; x < 4; x++) {
        int column = 8 * n + 2 * member + (x & 1);
        bool seen = j + column <= rows[x / 2] && key_first[stage][column] == mine[x / 2];
        s[n][x] = seen ? s[n][x] * scale : LEAST;
      }
    soften<KEYS>(s, largest, sum, grown);
#pragma unroll
    for (int c = 0; c < E / 8; c++)
#pragma unroll
      for (int x = 0; x < 4; x++) o[c][x] *= grown[x / 2];
    multiply_columns<E, KEYS>(o, s, values + stage * SIZE);
    __syncthreads();  // the stage is no longer read
  }
  float factor[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
    sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
    factor[r] = 1.f / sum[r];
    if (member == 0 && rows[r] < t) lse[((long long)b * heads + h) * t + rows[r]] = largest[r] + __log2f(sum[r]);
  }
  store_rows<E>(out + ((long long)b * t * heads + h) * (E / 2), row, start + warp * 16, t, o, factor);
}

#define EXPORT(E)                                                                                                    \
  extern "C" __global__ void __launch_bounds__(64)                                                                   \
      attention_simple_##E(const u32* q, const u32* k, const u32* v, const int* first, u32* out, float* lse, int t,  \
                           int heads, int key_heads) {                                                               \
    attention_simple<E>(q, k, v, first, out, lse, t, heads, key_heads);                                              \
  }                                                                                                                  \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
      attention_##E(const u32* q, const u32* k, const u32* v, const int* first, u32* out, float* lse, int t,         \
                    int heads, int key_heads) {                                                                      \
    attention<E>(q, k, v, first, out, lse, t, heads, key_heads);                                                     \
  }

EXPORT(64)
EXPORT(128)
