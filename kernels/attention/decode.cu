// Attention of new tokens to a KV cache on a GPU, bfloat16 in and out, float32 inside: a decode step's work in each
// layer. N slots of a batch, T new tokens in each (one, or few), H heads, G KV heads, E numbers a head, S positions
// in the cache.
//
// 1. decode_append: reads the heads (N, T, H + 2 G, E) as the projections leave them. Queries are normed and rotated;
//    keys too, and then written to the cache; values are written as they are. One warp per head's row.
// 2. decode_split_E: reading the cache is all the work, and the heads of one slot would keep few processors busy. So
//    the cache is cut into splits of 256 positions, a block each (FlashDecoding). A block computes scores, their
//    softmax and the weighted sum of values, and its threads divide each of the three in another way. Up to 4 queries
//    that read one KV head share what is read. decode_split_E_1 is for one query a KV head: it does not compute four.
// 3. decode_combine: splits -> one row, by their maxima and sums.
//
// thread_a_query of steps.cu is the version to read first. Query (n, t) attends to positions up to
// positions[n, t].

#include "rows.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// 1. queries (N, T, H, E); keys, values (N, G, S, E); weight, bias (H + G, E) or null; cos_sin (N, T, E/2); 256 threads

extern "C" __global__ void __launch_bounds__(256)
    decode_append(const u32* heads, const float2* weight, const float2* bias, const float2* cos_sin,
                  const long long* positions, u32* queries, u32* keys, u32* values, long long rows, int t, int n_heads,
                  int kv_heads, int pairs, int cache_len, float eps) {
  const int all = n_heads + 2 * kv_heads, lane = threadIdx.x % 32;
  const long long at = blockIdx.x * 8ll + threadIdx.x / 32, row = at / all;
  if (row >= rows) return;
  const int head = at % all, g = (head - n_heads) % kv_heads;
  const long long cache_at = ((row / t * kv_heads + g) * cache_len + positions[row]) * pairs;
  Row r = read_row(heads + at * pairs, pairs, lane);
  if (head >= n_heads + kv_heads) {
#pragma unroll
    for (int i = 0; i < 2; i++)
      if (lane + 32 * i < pairs) values[cache_at + lane + 32 * i] = pack_bf16(r.x[i].x, r.x[i].y);
    return;
  }
  if (weight) {
    normalize(r, pairs, lane, eps);
    weight += head * pairs;
    bias += head * pairs;
  }
  u32* out = head < n_heads ? queries + (row * n_heads + head) * pairs : keys + cache_at;
  write_rotated(out, r, weight, bias, cos_sin + row * pairs, pairs, lane);
}

// ---------------------------------------------------------------------------------------------------------------------
// 2. Grid (splits, G * ceil(H / G * T / Q), N), 128 threads. Q: queries of a block, 1 or 4.
//    partial_out (splits, N, T, H, E) float32: weighted sums of values, not divided
//    stats (splits, N, T, H): the largest score in units of log 2, and the sum of weights

const int SPLIT = 256, WARPS = 4;

// Loads of 16 bytes that a thread waits for together: fewer would leave the memory idle, and with more queries each
// needs registers.
template <int Q>
struct Loads {
  static const int n = Q == 1 ? 8 : 2;  // powers of two: SPLIT is a multiple of what all threads load
};

struct Vec8 {
  float x[8];
};

INLINE Vec8 to_vec8(const uint4& words) {
  return {bf16_low(words.x), bf16_high(words.x), bf16_low(words.y), bf16_high(words.y),
          bf16_low(words.z), bf16_high(words.z), bf16_low(words.w), bf16_high(words.w)};
}

// Rows first, first + step, ... of E numbers, of which the thread has 8; zeros from row `count` on
template <int E, int N>
INLINE void load_rows(uint4 (&words)[N], const u32* rows, int first, int step, int count) {
#pragma unroll
  for (int k = 0; k < N; k++) {
    const int j = first + k * step;
    words[k] = {};
    if (j < count) words[k] = *(const uint4*)(rows + j * (E / 2) + threadIdx.x % (E / 8) * 4);
  }
}

// scores[q][j] for the first `count` positions; E / 8 neighbouring threads share a key
template <int E, int Q>
INLINE void compute_scores(float (&scores)[Q][SPLIT], const Vec8 (&q)[Q], const u32* keys, int count) {
  const int LANES_A_KEY = E / 8, KEYS_AT_ONCE = 128 / LANES_A_KEY, LOADS = Loads<Q>::n;
#pragma unroll 1
  for (int first = threadIdx.x / LANES_A_KEY; first < SPLIT; first += LOADS * KEYS_AT_ONCE) {
    uint4 words[LOADS];
    load_rows<E>(words, keys, first, KEYS_AT_ONCE, count);
#pragma unroll
    for (int k = 0; k < LOADS; k++) {
      const Vec8 key = to_vec8(words[k]);
#pragma unroll
      for (int n = 0; n < Q; n++) {
        float s = 0.f;
#pragma unroll
        for (int d = 0; d < 8; d++) s += q[n].x[d] * key.x[d];
#pragma unroll
        for (int o = LANES_A_KEY / 2; o; o >>= 1) s += __shfl_xor_sync(~0u, s, o);
        if (threadIdx.x % LANES_A_KEY == 0) scores[n][first + k * KEYS_AT_ONCE] = s * (LOG2E * rsqrtf((float)E));
      }
    }
  }
}

// One warp per query: scores of the first `count` positions -> weights, 0 for the others. Returns maximum and sum.
INLINE float2 softmax_of_split(float (&scores)[SPLIT], int count) {
  const int lane = threadIdx.x % 32;
  float row_max = NEG_INF, sum = 0.f;
  for (int j = lane; j < count; j += 32) row_max = fmaxf(row_max, scores[j]);
  for (int o = 16; o; o >>= 1) row_max = fmaxf(row_max, __shfl_xor_sync(~0u, row_max, o));
  for (int j = lane; j < SPLIT; j += 32) {
    scores[j] = j < count ? exp2_approx(scores[j] - row_max) : 0.f;
    sum += scores[j];
  }
  return make_float2(row_max, warp_sum(sum));
}

// The thread's part of sum_j weights[q][j] values[j]: every KEYS_AT_ONCE-th position, 8 numbers of its value
template <int E, int Q>
INLINE void weighted_values(Vec8 (&o)[Q], const float (&weights)[Q][SPLIT], const u32* values, int count) {
  const int LANES_A_KEY = E / 8, KEYS_AT_ONCE = 128 / LANES_A_KEY, LOADS = Loads<Q>::n;
#pragma unroll 1
  for (int first = threadIdx.x / LANES_A_KEY; first < count; first += LOADS * KEYS_AT_ONCE) {
    uint4 words[LOADS];
    load_rows<E>(words, values, first, KEYS_AT_ONCE, count);
#pragma unroll
    for (int k = 0; k < LOADS; k++) {
      const Vec8 value = to_vec8(words[k]);
#pragma unroll
      for (int n = 0; n < Q; n++)
#pragma unroll
        for (int d = 0; d < 8; d++) o[n].x[d] += weights[n][first + k * KEYS_AT_ONCE] * value.x[d];
    }
  }
}

template <int E, int Q>
__device__ void decode_split(const u32* queries, const u32* keys, const u32* values, const long long* positions,
                             float* partial_out, float2* stats, int t, int heads, int kv_heads, int cache_len) {
  __shared__ float scores[Q][SPLIT], warp_sums[WARPS][Q][E];
  const int group_size = heads / kv_heads, sets = (group_size * t + Q - 1) / Q;  // sets of Q queries
  const int g = blockIdx.y / sets, set = blockIdx.y % sets * Q, from = blockIdx.x * SPLIT;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = threadIdx.x % (E / 8);
  const long long n = blockIdx.z, cache_at = ((n * kv_heads + g) * cache_len + from) * (E / 2);
  Vec8 q[Q], o[Q];
  int seen[Q], count = 0;  // positions of this split, by each query and by any
  long long row[Q];        // (n, t, h) as one number
#pragma unroll
  for (int i = 0; i < Q; i++) {
    int number = min(set + i, group_size * t - 1), token = number / group_size;  // surplus ones repeat the last query
    row[i] = (n * t + token) * heads + g * group_size + number % group_size;
    seen[i] = max(0, min(SPLIT, (int)positions[n * t + token] + 1 - from));
    count = max(count, seen[i]);
    q[i] = to_vec8(*(const uint4*)(queries + row[i] * (E / 2) + part * 4));
    o[i] = {};
  }
  // 1. scores
  compute_scores<E, Q>(scores, q, keys + cache_at, count);
  __syncthreads();
  // 2. weights, one warp per query
#pragma unroll
  for (int i = 0; i < Q; i++)
    if (warp == i) {
      float2 stat = softmax_of_split(scores[i], seen[i]);
      if (lane == 0 && set + i < group_size * t)  // once, where a surplus query repeats the last one
        stats[(long long)blockIdx.x * gridDim.z * t * heads + row[i]] = stat;
    }
  __syncthreads();
  // 3. weighted values: summed over the lanes of a warp, then over the warps
  weighted_values<E, Q>(o, scores, values + cache_at, count);
#pragma unroll
  for (int i = 0; i < Q; i++)
#pragma unroll
    for (int d = 0; d < 8; d++) {
      for (int step = E / 8; step < 32; step *= 2) o[i].x[d] += __shfl_xor_sync(~0u, o[i].x[d], step);
      if (lane < E / 8) warp_sums[warp][i][8 * part + d] = o[i].x[d];
    }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < Q; i++)
    if (threadIdx.x < E) {
      float sum = 0.f;
      for (int w = 0; w < WARPS; w++) sum += warp_sums[w][i][threadIdx.x];
      partial_out[((long long)blockIdx.x * gridDim.z * t * heads + row[i]) * E + threadIdx.x] = sum;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 3. One warp per row, 256 threads; out (N, T, H, E)

extern "C" __global__ void __launch_bounds__(256)
    decode_combine(const float2* partial_out, const float2* stats, u32* out, long long rows, int n_splits, int pairs) {
  const long long row = blockIdx.x * 8ll + threadIdx.x / 32;
  if (row >= rows) return;
  float row_max = NEG_INF, sum = 0.f;
  for (int i = 0; i < n_splits; i++) row_max = fmaxf(row_max, stats[i * rows + row].x);
  for (int i = 0; i < n_splits; i++) sum += stats[i * rows + row].y * exp2_approx(stats[i * rows + row].x - row_max);
  for (int p = threadIdx.x % 32; p < pairs; p += 32) {
    float2 o = make_float2(0.f, 0.f);
    for (int i = 0; i < n_splits; i++) {
      float weight = exp2_approx(stats[i * rows + row].x - row_max) / sum;
      float2 part = partial_out[(i * rows + row) * pairs + p];
      o = make_float2(o.x + weight * part.x, o.y + weight * part.y);
    }
    out[row * pairs + p] = pack_bf16(o.x, o.y);
  }
}

#define EXPORT(E, Q)                                                                                                   \
  extern "C" __global__ void __launch_bounds__(128)                                                                    \
      decode_split_##E##_##Q(const u32* queries, const u32* keys, const u32* values, const long long* positions,       \
                             float* partial_out, float2* stats, int t, int heads, int kv_heads, int cache_len) {       \
    decode_split<E, Q>(queries, keys, values, positions, partial_out, stats, t, heads, kv_heads, cache_len);           \
  }

EXPORT(64, 1)
EXPORT(64, 4)
EXPORT(128, 1)
EXPORT(128, 4)
