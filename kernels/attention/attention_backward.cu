// Attention's gradient on a GPU, bfloat16 in and out, float32 inside; shapes and documents as in attention.cu.
//
// With weights P = 2^(s - lse2), s the scores in units of log 2, and dO the gradient of out:
//     dv = P^T dO,   dP = dO v^T,   dS = P * (dP - delta),   delta_i = dO_i . out_i,   dq = dS k / sqrt(E),
//     dk = dS^T q / sqrt(E)
//
// 1. attention_delta: delta of every row.
// 2. attention_backward_q_E, attention_backward_kv_E: FlashAttention-2's backward pass on tensor cores. P is recomputed
//    from lse2, tile by tile, and never stored. A block of the first has 64 queries and walks over keys with dq in
//    registers. A block of the second has 64 keys and walks over the queries of all heads that read them, with dk and
//    dv in registers and all matmuls transposed, so that the weights are again an operand as they are.
//    FlashAttention-2 sums dq in the second kernel with atomics: 5 matmuls where this takes 7. But then the order of
//    the sums, and with it the last bits, differ from run to run. Here a resumed run equals an uninterrupted one bit
//    for bit.
//
// doc_end (B, T) is the last position of j's document: later queries are never loaded.

#include "tiles.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// 1. d_out, out (B, T, H, E) -> delta (B, H, T); one warp per row, grid (ceil(B T H / 8)), 256 threads

extern "C" __global__ void __launch_bounds__(256)
    attention_delta(const u32* d_out, const u32* out, float* delta, int b, int t, int heads, int words) {
  long long at = blockIdx.x * 8ll + threadIdx.x / 32, rows = (long long)b * t * heads;
  if (at >= rows) return;
  float sum = 0.f;
  for (int i = threadIdx.x % 32; i < words; i += 32) {
    u32 g = d_out[at * words + i], o = out[at * words + i];
    sum += bf16_low(g) * bf16_low(o) + bf16_high(g) * bf16_high(o);
  }
  sum = warp_sum(sum);
  long long position = at / heads;
  if (threadIdx.x % 32 == 0) delta[(position / t * heads + at % heads) * t + position % t] = sum;
}

// ---------------------------------------------------------------------------------------------------------------------
// 2. On tensor cores, 128 threads. A block keeps 64 positions of its own side; the other side comes in tiles of
//    OtherSide<E>::rows positions, and the next tile loads while the current one is computed.

template <int E>
struct OtherSide {
  static const int rows = 4096 / E;  // 64 or 32: what registers allow
};

// dq: grid (ceil(T / 64), H, B); shared: tiles of 64 of q and dO, and OtherSide<E>::rows of k and v twice
template <int E>
__device__ void attention_backward_q(const u32* d_out, const u32* q, const u32* k, const u32* v, const float* lse2,
                                     const float* delta, const int* doc_start, u32* d_q, int t, int heads,
                                     int kv_heads) {
  const int N = OtherSide<E>::rows, OWN_WORDS = 64 * TileRow<E>::words, WORDS = N * TileRow<E>::words;
  u32 *q_tile = (u32*)dynamic_shared(), *do_tile = q_tile + OWN_WORDS;
  u32 *k_tiles = do_tile + OWN_WORDS, *v_tiles = k_tiles + 2 * WORDS;
  __shared__ int k_doc[2][N];
  const int h = blockIdx.y, b = blockIdx.z, g = h / (heads / kv_heads);
  const int q_begin = (gridDim.x - 1 - blockIdx.x) * 64, q_end = min(q_begin + 64, t);  // the longest first
  const long long q_stride = (long long)heads * (E / 2), kv_stride = (long long)kv_heads * (E / 2);
  const long long head = ((long long)b * t * heads + h) * (E / 2);
  const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
  const float inv_sqrt_d = rsqrtf((float)E);
  doc_start += (long long)b * t;
  k += ((long long)b * t * kv_heads + g) * (E / 2);
  v += ((long long)b * t * kv_heads + g) * (E / 2);

  int q_pos[2], q_doc[2], k_begin = t;  // k_begin: the first key that any query of the block attends to
  float row_lse[2], row_delta[2];
  for (int i = q_begin; i < q_end; i++) k_begin = min(k_begin, doc_start[i]);
  k_begin = k_begin / N * N;
#pragma unroll
  for (int r = 0; r < 2; r++) {  // the two rows of this lane
    q_pos[r] = q_begin + warp * 16 + group + 8 * r;
    bool in = q_pos[r] < t;
    long long at = ((long long)b * heads + h) * t + q_pos[r];
    q_doc[r] = in ? doc_start[q_pos[r]] : -1;
    row_lse[r] = in ? lse2[at] : 0.f;
    row_delta[r] = in ? delta[at] : 0.f;
  }
  auto load_kv = [&](int stage, int j) {
    load_tile_async<E, N>(k_tiles + stage * WORDS, k, kv_stride, j, t);
    load_tile_async<E, N>(v_tiles + stage * WORDS, v, kv_stride, j, t);
    if (threadIdx.x < N) k_doc[stage][threadIdx.x] = j + threadIdx.x < t ? doc_start[j + threadIdx.x] : -2;
  };
  load_tile_async<E, 64>(q_tile, q + head, q_stride, q_begin, t);
  load_tile_async<E, 64>(do_tile, d_out + head, q_stride, q_begin, t);
  load_kv(0, k_begin);
  cp_async_commit();
  float dq[E / 8][4], s[N / 8][4], dp[N / 8][4];
#pragma unroll
  for (int c = 0; c < E / 8; c++) dq[c][0] = dq[c][1] = dq[c][2] = dq[c][3] = 0.f;

  for (int j = k_begin, stage = 0; j < q_end; j += N, stage ^= 1) {
    // 1. ask for the next tile, and wait for this one
    if (j + N < q_end) load_kv(stage ^ 1, j + N);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    // 2. dS = P * (dP - delta)
    gemm_qk<E, N>(s, q_tile, k_tiles + stage * WORDS);
    gemm_qk<E, N>(dp, do_tile, v_tiles + stage * WORDS);
#pragma unroll
    for (int n = 0; n < N / 8; n++)
#pragma unroll
      for (int x = 0; x < 4; x++) {
        int column = 8 * n + 2 * member + (x & 1), r = x / 2;
        bool seen = j + column <= q_pos[r] && k_doc[stage][column] == q_doc[r];
        s[n][x] = seen ? exp2_approx(s[n][x] * (inv_sqrt_d * LOG2E) - row_lse[r]) * (dp[n][x] - row_delta[r]) : 0.f;
      }
    // 3. dq += dS k
    gemm_pv<E, N>(dq, s, k_tiles + stage * WORDS);
    __syncthreads();
  }
  const float factor[2] = {inv_sqrt_d, inv_sqrt_d};
  store_tile<E>(d_q + head, q_stride, q_begin + warp * 16, t, dq, factor);
}

// dk and dv: grid (ceil(T / 64), G, B); shared: tiles of 64 of k and v, and OtherSide<E>::rows of q and dO twice
template <int E>
__device__ void attention_backward_kv(const u32* d_out, const u32* q, const u32* k, const u32* v, const float* lse2,
                                      const float* delta, const int* doc_start, const int* doc_end, u32* d_k, u32* d_v,
                                      int t, int heads, int kv_heads) {
  const int N = OtherSide<E>::rows, OWN_WORDS = 64 * TileRow<E>::words, WORDS = N * TileRow<E>::words;
  u32 *k_tile = (u32*)dynamic_shared(), *v_tile = k_tile + OWN_WORDS;
  u32 *q_tiles = v_tile + OWN_WORDS, *do_tiles = q_tiles + 2 * WORDS;
  __shared__ int q_doc[2][N];
  __shared__ float row_lse[2][N], row_delta[2][N];
  const int g = blockIdx.y, b = blockIdx.z, group_size = heads / kv_heads;
  const int k_begin = blockIdx.x * 64, k_end = min(k_begin + 64, t);
  const long long q_stride = (long long)heads * (E / 2), kv_stride = (long long)kv_heads * (E / 2);
  const long long head = ((long long)b * t * kv_heads + g) * (E / 2);
  const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
  const float inv_sqrt_d = rsqrtf((float)E);
  doc_start += (long long)b * t;

  int k_pos[2], k_doc[2], q_end = k_begin;  // q_end: after the last query that attends to any key of the block
  for (int j = k_begin; j < k_end; j++) q_end = max(q_end, doc_end[(long long)b * t + j] + 1);
#pragma unroll
  for (int r = 0; r < 2; r++) {  // the two rows of this lane
    k_pos[r] = k_begin + warp * 16 + group + 8 * r;
    k_doc[r] = k_pos[r] < t ? doc_start[k_pos[r]] : -1;
  }
  const int tiles = (q_end - k_begin + N - 1) / N;  // of each head
  auto load_q = [&](int stage, int tile) {
    int h = g * group_size + tile / tiles, from = k_begin + tile % tiles * N, i = from + threadIdx.x;
    long long at = ((long long)b * t * heads + h) * (E / 2), row = ((long long)b * heads + h) * t + i;
    load_tile_async<E, N>(q_tiles + stage * WORDS, q + at, q_stride, from, t);
    load_tile_async<E, N>(do_tiles + stage * WORDS, d_out + at, q_stride, from, t);
    if (threadIdx.x < N) {
      q_doc[stage][threadIdx.x] = i < t ? doc_start[i] : -2;
      row_lse[stage][threadIdx.x] = i < t ? lse2[row] : 0.f;
      row_delta[stage][threadIdx.x] = i < t ? delta[row] : 0.f;
    }
  };
  load_tile_async<E, 64>(k_tile, k + head, kv_stride, k_begin, t);
  load_tile_async<E, 64>(v_tile, v + head, kv_stride, k_begin, t);
  load_q(0, 0);
  cp_async_commit();
  float dk[E / 8][4], dv[E / 8][4], s[N / 8][4], dp[N / 8][4];  // s, dp: a row is a key, a column a query
#pragma unroll
  for (int c = 0; c < E / 8; c++)
#pragma unroll
    for (int x = 0; x < 4; x++) dk[c][x] = dv[c][x] = 0.f;

  for (int tile = 0, stage = 0; tile < tiles * group_size; tile++, stage ^= 1) {
    // 1. ask for the next tile, and wait for this one
    if (tile + 1 < tiles * group_size) load_q(stage ^ 1, tile + 1);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    // 2. P^T in s and dS^T in dp
    const int from = k_begin + tile % tiles * N;
    gemm_qk<E, N>(s, k_tile, q_tiles + stage * WORDS);
    gemm_qk<E, N>(dp, v_tile, do_tiles + stage * WORDS);
#pragma unroll
    for (int n = 0; n < N / 8; n++)
#pragma unroll
      for (int x = 0; x < 4; x++) {
        int column = 8 * n + 2 * member + (x & 1), r = x / 2;
        bool seen = k_pos[r] <= from + column && q_doc[stage][column] == k_doc[r];
        s[n][x] = seen ? exp2_approx(s[n][x] * (inv_sqrt_d * LOG2E) - row_lse[stage][column]) : 0.f;
        dp[n][x] = s[n][x] * (dp[n][x] - row_delta[stage][column]);
      }
    // 3. dv += P^T dO, dk += dS^T q
    gemm_pv<E, N>(dv, s, do_tiles + stage * WORDS);
    gemm_pv<E, N>(dk, dp, q_tiles + stage * WORDS);
    __syncthreads();
  }
  const float k_factor[2] = {inv_sqrt_d, inv_sqrt_d}, v_factor[2] = {1.f, 1.f};
  store_tile<E>(d_k + head, kv_stride, k_begin + warp * 16, t, dk, k_factor);
  store_tile<E>(d_v + head, kv_stride, k_begin + warp * 16, t, dv, v_factor);
}

#define INPUTS                                                                                                         \
  const u32 *d_out, const u32 *q, const u32 *k, const u32 *v, const float *lse2, const float *delta,                   \
      const int *doc_start
#define EXPORT(E)                                                                                                      \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                                \
      attention_backward_q_##E(INPUTS, u32* d_q, int t, int heads, int kv_heads) {                                     \
    attention_backward_q<E>(d_out, q, k, v, lse2, delta, doc_start, d_q, t, heads, kv_heads);                          \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                                \
      attention_backward_kv_##E(INPUTS, const int* doc_end, u32* d_k, u32* d_v, int t, int heads, int kv_heads) {      \
    attention_backward_kv<E>(d_out, q, k, v, lse2, delta, doc_start, doc_end, d_k, d_v, t, heads, kv_heads);           \
  }

EXPORT(64)
EXPORT(128)
