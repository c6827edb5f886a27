// Attention on a GPU in five rungs, from a thread for each query to tensor cores. Rung 5 is attention.cu.
//
// rung                  who works on what                                what that buys
// 1. thread_a_query     a thread has one query and walks over its keys   the formula in 20 lines
// 2. warp_a_query       32 lanes share a query: each has E / 32 numbers  32 times as many threads; a load brings a row
// 3. shared_tiles       16 warps share tiles of 32 keys; a lane scores   16 times fewer reads of global memory, and a
//                       a whole key, then sums its columns of values     sum across lanes for 32 keys, not for each
// 4. tensor_cores       a warp has 16 queries, and tiles of 64 keys      matmuls of 16 x 16 by 16 x 8 an instruction
// 5. attention.cu       the same                                         the next tile loads during the arithmetic
//
// And the gradient: gradient_warp, a warp for each position, before attention_backward.cu.
//
// Numbers are bfloat16 in and out, two in a 32-bit word, and float32 inside. Shapes: q, out (B, T, H, E); k, v
// (B, T, G, E), head h reading key head h / (H / G); E is 64 or 128. doc_start (B, T) is the first position of a
// position's document, so query i sees the keys doc_start[i] to i. lse2 (B, H, T), for the gradient: log2 of the sum of
// 2^score. Scores are in units of log 2, since a GPU has an instruction for 2^x and none for e^x.
//
// steps.py launches, checks and times these kernels: python kernels/attention/steps.py --cuda

#include "tiles.cuh"

// The first word of the row of position i and head h in a tensor (B, T, heads, E)
template <int E>
INLINE long long row_at(int b, int t, int heads, int i, int h) {
  return (((long long)b * t + i) * heads + h) * (E / 2);
}

// ---------------------------------------------------------------------------------------------------------------------
// 1. A thread a query: grid (ceil(T / 64), H, B), 64 threads.

template <int E>
__device__ void thread_a_query(const u32* q, const u32* k, const u32* v, const int* doc_start, u32* out, float* lse2,
                               int t, int heads, int kv_heads) {
  int i = blockIdx.x * 64 + threadIdx.x, h = blockIdx.y, b = blockIdx.z, g = h / (heads / kv_heads);
  if (i >= t) return;
  const float scale = LOG2E * rsqrtf((float)E);
  const u32* q_row = q + row_at<E>(b, t, heads, i, h);
  float row_max = NEG_INF, row_sum = 0.f, o[E];  // o: the sum of weights times values so far
  for (int d = 0; d < E; d++) o[d] = 0.f;
  for (int j = doc_start[b * t + i]; j <= i; j++) {
    const u32 *k_row = k + row_at<E>(b, t, kv_heads, j, g), *v_row = v + row_at<E>(b, t, kv_heads, j, g);
    // 1. The score.
    float s = 0.f;
    for (int d = 0; d < E / 2; d++)
      s += bf16_low(q_row[d]) * bf16_low(k_row[d]) + bf16_high(q_row[d]) * bf16_high(k_row[d]);
    s *= scale;
    // 2. The new maximum. What was summed with the old one is rescaled.
    float new_max = fmaxf(row_max, s), rescale = exp2_approx(row_max - new_max), p = exp2_approx(s - new_max);
    row_max = new_max;
    row_sum = row_sum * rescale + p;
    // 3. The weighted value.
    for (int d = 0; d < E / 2; d++) {
      o[2 * d] = o[2 * d] * rescale + p * bf16_low(v_row[d]);
      o[2 * d + 1] = o[2 * d + 1] * rescale + p * bf16_high(v_row[d]);
    }
  }
  u32* out_row = out + row_at<E>(b, t, heads, i, h);
  for (int d = 0; d < E / 2; d++) out_row[d] = pack_bf16(o[2 * d] / row_sum, o[2 * d + 1] / row_sum);
  lse2[((long long)b * heads + h) * t + i] = row_max + __log2f(row_sum);
}

// ---------------------------------------------------------------------------------------------------------------------
// 2. A warp a query: grid (ceil(T / 4), H, B), 128 threads. Lane l has word l of each row and, for E = 128, l + 32.
//    That makes 32 times as many threads: while some wait for memory, a processor runs others. A load brings 32
//    neighbouring words in one piece. In rung 1 it brings one word of a key to all lanes, or a word of 32 rows of q.

template <int E>
struct LanePart {
  float x[E / 32];
};

template <int E>
INLINE LanePart<E> read_part(const u32* row) {
  LanePart<E> p;
  for (int n = 0; n < E / 64; n++) {
    u32 both = row[threadIdx.x % 32 + 32 * n];
    p.x[2 * n] = bf16_low(both);
    p.x[2 * n + 1] = bf16_high(both);
  }
  return p;
}

template <int E>
INLINE void write_part(u32* row, const LanePart<E>& p, float factor) {
  for (int n = 0; n < E / 64; n++)
    row[threadIdx.x % 32 + 32 * n] = pack_bf16(p.x[2 * n] * factor, p.x[2 * n + 1] * factor);
}

template <int E>
INLINE float dot(const LanePart<E>& a, const LanePart<E>& b) {  // the same in all lanes
  float sum = 0.f;
  for (int n = 0; n < E / 32; n++) sum += a.x[n] * b.x[n];
  return warp_sum(sum);  // five shuffles
}

template <int E>
INLINE void add(LanePart<E>& sum, float factor, const LanePart<E>& x) {
  for (int n = 0; n < E / 32; n++) sum.x[n] += factor * x.x[n];
}

template <int E>
__device__ void warp_a_query(const u32* q, const u32* k, const u32* v, const int* doc_start, u32* out, float* lse2,
                             int t, int heads, int kv_heads) {
  int i = blockIdx.x * 4 + threadIdx.x / 32, h = blockIdx.y, b = blockIdx.z, g = h / (heads / kv_heads);
  if (i >= t) return;  // a whole warp leaves, so no shuffle waits for it
  const float scale = LOG2E * rsqrtf((float)E);
  LanePart<E> q_row = read_part<E>(q + row_at<E>(b, t, heads, i, h)), o = {};
  float row_max = NEG_INF, row_sum = 0.f;
  for (int j = doc_start[b * t + i]; j <= i; j++) {
    long long key = row_at<E>(b, t, kv_heads, j, g);
    float s = dot(q_row, read_part<E>(k + key)) * scale;
    float new_max = fmaxf(row_max, s), rescale = exp2_approx(row_max - new_max), p = exp2_approx(s - new_max);
    row_max = new_max;
    row_sum = row_sum * rescale + p;
    for (int n = 0; n < E / 32; n++) o.x[n] *= rescale;
    add(o, p, read_part<E>(v + key));
  }
  write_part(out + row_at<E>(b, t, heads, i, h), o, 1.f / row_sum);
  if (threadIdx.x % 32 == 0) lse2[((long long)b * heads + h) * t + i] = row_max + __log2f(row_sum);
}

// ---------------------------------------------------------------------------------------------------------------------
// 3. Tiles in shared memory: grid (ceil(T / 16), H, B), 512 threads. All 16 warps of a block read each tile of 32 keys,
//    so it comes from global memory once and not 16 times.

INLINE float warp_max(float x) {
  for (int o = 16; o; o >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, o));
  return x;
}

template <int E>
__device__ void shared_tiles(const u32* q, const u32* k, const u32* v, const int* doc_start, u32* out, float* lse2,
                             int t, int heads, int kv_heads) {
  const int KEYS = 32, ROW = E / 2 + 1;  // a word more than a row, so that word w of 32 rows is in 32 different banks
  __shared__ u32 k_tile[KEYS * ROW], v_tile[KEYS * ROW], q_rows[16][E / 2];
  const int q_begin = blockIdx.x * 16, q_end = min(q_begin + 16, t), h = blockIdx.y, b = blockIdx.z;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = h / (heads / kv_heads);
  const int i = min(q_begin + warp, t - 1);  // warps after the last query do that one, too: all must reach the barriers
  const float scale = LOG2E * rsqrtf((float)E);
  const int* starts = doc_start + (long long)b * t;
  for (int w = lane; w < E / 2; w += 32) q_rows[warp][w] = q[row_at<E>(b, t, heads, i, h) + w];
  LanePart<E> o = {};
  float row_max = NEG_INF, row_sum = 0.f;
  for (int from = starts[q_begin]; from < q_end; from += KEYS) {
    // 1. All threads load the tile, and wait until it is whole.
    for (int n = threadIdx.x; n < KEYS * (E / 2); n += 512) {
      int row = n / (E / 2), word = n % (E / 2);
      long long key = row_at<E>(b, t, kv_heads, min(from + row, t - 1), g);
      k_tile[row * ROW + word] = k[key + word];
      v_tile[row * ROW + word] = v[key + word];
    }
    __syncthreads();
    // 2. A lane scores one key, alone. It reads a row of the tile; all lanes read the same word of q.
    float s = 0.f;
    for (int w = 0; w < E / 2; w++) {
      u32 x = q_rows[warp][w], y = k_tile[lane * ROW + w];
      s += bf16_low(x) * bf16_low(y) + bf16_high(x) * bf16_high(y);
    }
    bool seen = starts[i] <= from + lane && from + lane <= i;
    s = seen ? s * scale : NEG_INF;
    // 3. One maximum and one sum across lanes for 32 keys.
    float new_max = fmaxf(row_max, warp_max(s)), rescale = exp2_approx(row_max - new_max);
    float p = seen ? exp2_approx(s - new_max) : 0.f;
    row_max = new_max;
    row_sum = row_sum * rescale + warp_sum(p);
    // 4. A lane sums its columns of the values; the weights come from the other lanes one by one.
    for (int n = 0; n < E / 32; n++) o.x[n] *= rescale;
    for (int n = 0; n < KEYS; n++) add(o, __shfl_sync(~0u, p, n), read_part<E>(v_tile + n * ROW));
    __syncthreads();  // all have read the tile
  }
  if (q_begin + warp >= t) return;
  write_part(out + row_at<E>(b, t, heads, i, h), o, 1.f / row_sum);
  if (lane == 0) lse2[((long long)b * heads + h) * t + i] = row_max + __log2f(row_sum);
}

// ---------------------------------------------------------------------------------------------------------------------
// 4. Tensor cores: grid (ceil(T / 64), H, B), 128 threads, 3 tiles of dynamic shared memory: q, k and v. A block is 4
//    warps of 16 queries. ptx.cuh draws which lane holds which number; tiles.cuh has the steps of the loop.

template <int E>
__device__ void tensor_cores(const u32* q, const u32* k, const u32* v, const int* doc_start, u32* out, float* lse2,
                             int t, int heads, int kv_heads) {
  const int KEYS = 64, WORDS = KEYS * TileRow<E>::words;  // of a tile
  u32 *q_tile = (u32*)dynamic_shared(), *k_tile = q_tile + WORDS, *v_tile = k_tile + WORDS;
  const int q_begin = blockIdx.x * 64, q_end = min(q_begin + 64, t), h = blockIdx.y, b = blockIdx.z;
  const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
  const float scale = LOG2E * rsqrtf((float)E);
  const int* starts = doc_start + (long long)b * t;
  const u32* keys = k + row_at<E>(b, t, kv_heads, 0, h / (heads / kv_heads));
  const u32* values = v + row_at<E>(b, t, kv_heads, 0, h / (heads / kv_heads));
  load_tile_async<E, 64>(q_tile, q + row_at<E>(b, t, heads, 0, h), heads * (E / 2), q_begin, t);

  int q_pos[2], q_start[2];  // the two queries that this lane holds, and the first keys that they see
  for (int r = 0; r < 2; r++) {
    q_pos[r] = q_begin + warp * 16 + group + 8 * r;
    q_start[r] = q_pos[r] < t ? starts[q_pos[r]] : t;  // a query after the last sees nothing
  }
  float s[KEYS / 8][4], o[E / 8][4] = {}, rescale[2], row_max[2] = {NEG_INF, NEG_INF}, row_sum[2] = {0.f, 0.f};
  for (int from = starts[q_begin] / KEYS * KEYS; from < q_end; from += KEYS) {
    // 1. Load a tile and wait for it.
    load_tile_async<E, KEYS>(k_tile, keys, kv_heads * (E / 2), from, t);
    load_tile_async<E, KEYS>(v_tile, values, kv_heads * (E / 2), from, t);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    // 2. A warp's 16 x 64 scores. A lane holds 32 of them: 2 queries, and of each 8 keys 2 member and 2 member + 1.
    gemm_qk<E, KEYS>(s, q_tile, k_tile);
    for (int n = 0; n < KEYS / 8; n++)
      for (int x = 0; x < 4; x++) {
        int key = from + 8 * n + 2 * member + x % 2, r = x / 2;
        bool seen = q_start[r] <= key && key <= q_pos[r];
        s[n][x] = seen ? s[n][x] * scale : NEG_INF;
      }
    // 3. Scores become weights where they are, in registers, and are at once an operand of the next matmul.
    online_softmax<KEYS>(s, row_max, row_sum, rescale);
    for (int c = 0; c < E / 8; c++)
      for (int x = 0; x < 4; x++) o[c][x] *= rescale[x / 2];
    gemm_pv<E, KEYS>(o, s, v_tile);
    __syncthreads();  // nobody reads the tile any more
  }
  float factor[2];
  for (int r = 0; r < 2; r++) {
    row_sum[r] += __shfl_xor_sync(~0u, row_sum[r], 1);  // each of 4 lanes summed its own keys
    row_sum[r] += __shfl_xor_sync(~0u, row_sum[r], 2);
    factor[r] = 1.f / row_sum[r];
    if (member == 0 && q_pos[r] < t) lse2[((long long)b * heads + h) * t + q_pos[r]] = row_max[r] + __log2f(row_sum[r]);
  }
  store_tile<E>(out + row_at<E>(b, t, heads, 0, h), heads * (E / 2), q_begin + warp * 16, t, o, factor);
}

// ---------------------------------------------------------------------------------------------------------------------
// The gradient, a warp a position and KV head, first as a query and then as a key: grid (T, G, B), 32 threads. The
//    formulas are at the top of attention_backward.cu. doc_end (B, T): the last position of a position's document.

template <int E>
__device__ void gradient_warp(const u32* d_out, const u32* q, const u32* k, const u32* v, const float* lse2,
                              const float* delta, const int* doc_start, const int* doc_end, u32* d_q, u32* d_k,
                              u32* d_v, int t, int heads, int kv_heads) {
  const int here = blockIdx.x, g = blockIdx.y, b = blockIdx.z, group_size = heads / kv_heads;
  const float inv_sqrt_d = rsqrtf((float)E);
  auto query = [&](int i, int h) { return row_at<E>(b, t, heads, i, h); };
  auto key = [&](int j) { return row_at<E>(b, t, kv_heads, j, g); };
  auto row = [&](int i, int h) { return ((long long)b * heads + h) * t + i; };
  // 1. This position as a query: dq = sum of dS k over the keys that it sees.
  for (int h = g * group_size; h < (g + 1) * group_size; h++) {
    LanePart<E> q_row = read_part<E>(q + query(here, h)), do_row = read_part<E>(d_out + query(here, h)), dq = {};
    for (int j = doc_start[b * t + here]; j <= here; j++) {
      LanePart<E> k_row = read_part<E>(k + key(j));
      float p = exp2_approx(dot(q_row, k_row) * inv_sqrt_d * LOG2E - lse2[row(here, h)]);
      add(dq, p * (dot(do_row, read_part<E>(v + key(j))) - delta[row(here, h)]), k_row);
    }
    write_part(d_q + query(here, h), dq, inv_sqrt_d);
  }
  // 2. This position as a key: dk = sum of dS q and dv = sum of P dO over the queries that see it.
  LanePart<E> k_row = read_part<E>(k + key(here)), v_row = read_part<E>(v + key(here)), dk = {}, dv = {};
  for (int h = g * group_size; h < (g + 1) * group_size; h++)
    for (int i = here; i <= doc_end[b * t + here]; i++) {
      LanePart<E> q_row = read_part<E>(q + query(i, h)), do_row = read_part<E>(d_out + query(i, h));
      float p = exp2_approx(dot(k_row, q_row) * inv_sqrt_d * LOG2E - lse2[row(i, h)]);
      add(dv, p, do_row);
      add(dk, p * (dot(do_row, v_row) - delta[row(i, h)]), q_row);
    }
  write_part(d_k + key(here), dk, inv_sqrt_d);
  write_part(d_v + key(here), dv, 1.f);
}

// ---------------------------------------------------------------------------------------------------------------------
// The kernels: NAME_64 and NAME_128

#define FORWARD(NAME, E, THREADS_A_BLOCK)                                                                              \
  extern "C" __global__ void __launch_bounds__(THREADS_A_BLOCK)                                                        \
      NAME##_##E(const u32* q, const u32* k, const u32* v, const int* doc_start, u32* out, float* lse2, int t,         \
                 int heads, int kv_heads) {                                                                            \
    NAME<E>(q, k, v, doc_start, out, lse2, t, heads, kv_heads);                                                        \
  }
#define EXPORT(E)                                                                                                      \
  FORWARD(thread_a_query, E, 64)                                                                                       \
  FORWARD(warp_a_query, E, 128)                                                                                        \
  FORWARD(shared_tiles, E, 512)                                                                                        \
  FORWARD(tensor_cores, E, THREADS)                                                                                    \
  extern "C" __global__ void __launch_bounds__(32)                                                                     \
      gradient_warp_##E(const u32* d_out, const u32* q, const u32* k, const u32* v, const float* lse2,                 \
                        const float* delta, const int* doc_start, const int* doc_end, u32* d_q, u32* d_k, u32* d_v,    \
                        int t, int heads, int kv_heads) {                                                              \
    gradient_warp<E>(d_out, q, k, v, lse2, delta, doc_start, doc_end, d_q, d_k, d_v, t, heads, kv_heads);              \
  }

EXPORT(64)
EXPORT(128)
