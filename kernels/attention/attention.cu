// Attention on a GPU, bfloat16 in and out, float32 inside. B sequences, T positions, H query heads, G KV heads,
// E numbers a head (64 or 128).
//
// attention_E is FlashAttention-2's forward pass (arXiv 2307.08691) on tensor cores (mma.sync, sm_80 and later). A
// block is 4 warps of 16 queries and walks over tiles of 64 keys. Scores become weights in registers, where they are at
// once an operand of P V. The next tile loads while the current one is computed. steps.cu leads here step by step.
//
// Documents: doc_start (B, T) is the first position of i's document, so query i attends to keys j <= i with
// doc_start[j] == doc_start[i]. Keys before the first document of a block are never loaded.
// lse2 (B, H, T), for the gradient: log2 of the sum of 2^score, scores in units of log 2.

#include "tiles.cuh"

// Grid (ceil(T / 64), H, B), 128 threads, 5 tiles of dynamic shared memory: q, and k and v twice.

template <int E>
__device__ void attention(const u32* q, const u32* k, const u32* v, const int* doc_start, u32* out, float* lse2, int t,
                          int heads, int kv_heads) {
  const int KEYS = 64, WORDS = KEYS * TileRow<E>::words;  // of a tile
  u32 *q_tile = (u32*)dynamic_shared(), *k_tiles = q_tile + WORDS, *v_tiles = k_tiles + 2 * WORDS;
  __shared__ int k_doc[2][KEYS];
  const int h = blockIdx.y, b = blockIdx.z, g = h / (heads / kv_heads);
  const int q_begin = (gridDim.x - 1 - blockIdx.x) * 64, q_end = min(q_begin + 64, t);  // the longest first
  const long long q_stride = (long long)heads * (E / 2), kv_stride = (long long)kv_heads * (E / 2);
  const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
  const float scale = LOG2E * rsqrtf((float)E);
  doc_start += (long long)b * t;
  k += ((long long)b * t * kv_heads + g) * (E / 2);
  v += ((long long)b * t * kv_heads + g) * (E / 2);

  int q_pos[2], q_doc[2], k_begin = t;  // k_begin: the first key that any query of the block attends to
  for (int i = q_begin; i < q_end; i++) k_begin = min(k_begin, doc_start[i]);
  k_begin = k_begin / KEYS * KEYS;
#pragma unroll
  for (int r = 0; r < 2; r++) {  // the two rows of this lane
    q_pos[r] = q_begin + warp * 16 + group + 8 * r;
    q_doc[r] = q_pos[r] < t ? doc_start[q_pos[r]] : -1;
  }
  auto load_kv = [&](int stage, int j) {
    load_tile_async<E, KEYS>(k_tiles + stage * WORDS, k, kv_stride, j, t);
    load_tile_async<E, KEYS>(v_tiles + stage * WORDS, v, kv_stride, j, t);
    if (threadIdx.x < KEYS) k_doc[stage][threadIdx.x] = j + threadIdx.x < t ? doc_start[j + threadIdx.x] : -2;
  };
  load_tile_async<E, 64>(q_tile, q + ((long long)b * t * heads + h) * (E / 2), q_stride, q_begin, t);
  load_kv(0, k_begin);
  cp_async_commit();
  float o[E / 8][4], s[KEYS / 8][4], rescale[2], row_max[2] = {NEG_INF, NEG_INF}, row_sum[2] = {0.f, 0.f};
#pragma unroll
  for (int c = 0; c < E / 8; c++) o[c][0] = o[c][1] = o[c][2] = o[c][3] = 0.f;

  for (int j = k_begin, stage = 0; j < q_end; j += KEYS, stage ^= 1) {
    // 1. ask for the next tile, and wait for this one
    if (j + KEYS < q_end) load_kv(stage ^ 1, j + KEYS);
    cp_async_commit();
    cp_async_wait<1>();  // all but what was just asked for
    __syncthreads();
    // 2. scores, masked to the past of the same document
    gemm_qk<E, KEYS>(s, q_tile, k_tiles + stage * WORDS);
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
      for (int x = 0; x < 4; x++) {
        int column = 8 * n + 2 * member + (x & 1);
        bool seen = j + column <= q_pos[x / 2] && k_doc[stage][column] == q_doc[x / 2];
        s[n][x] = seen ? s[n][x] * scale : NEG_INF;
      }
    // 3. weights, and the output so far brought to the new maximum
    online_softmax<KEYS>(s, row_max, row_sum, rescale);
#pragma unroll
    for (int c = 0; c < E / 8; c++)
#pragma unroll
      for (int x = 0; x < 4; x++) o[c][x] *= rescale[x / 2];
    // 4. weights times values
    gemm_pv<E, KEYS>(o, s, v_tiles + stage * WORDS);
    __syncthreads();  // the stage is no longer read
  }
  float factor[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {  // row_sum holds one lane's columns until here
    row_sum[r] += __shfl_xor_sync(~0u, row_sum[r], 1);
    row_sum[r] += __shfl_xor_sync(~0u, row_sum[r], 2);
    factor[r] = 1.f / row_sum[r];
    if (member == 0 && q_pos[r] < t) lse2[((long long)b * heads + h) * t + q_pos[r]] = row_max[r] + __log2f(row_sum[r]);
  }
  store_tile<E>(out + ((long long)b * t * heads + h) * (E / 2), q_stride, q_begin + warp * 16, t, o, factor);
}

#define EXPORT(E)                                                                                                      \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                                \
      attention_##E(const u32* q, const u32* k, const u32* v, const int* doc_start, u32* out, float* lse2, int t,      \
                    int heads, int kv_heads) {                                                                         \
    attention<E>(q, k, v, doc_start, out, lse2, t, heads, kv_heads);                                                   \
  }

EXPORT(64)
EXPORT(128)
