// Attention of new ids to a cache on a GPU, bfloat16 in and out, float32 inside: what a decode step does in each layer.
// N rows of a batch, T new ids each (one, or few), H heads, G key heads, E numbers a head, S places in the cache.
//
// 1. decode_append: the heads (N, T, H + 2 G, E) as the projections leave them; queries are normed and turned, keys too
//    and then put into the cache, values put there as they are. A warp a head's row.
// 2. decode_split_E: reading the cache is all the work, and one row's heads alone would keep few processors busy. So
//    the cache is cut into pieces of 256 places, a block each: scores, their softmax, the weighted sum of values, each
//    phase with its own share of work. Up to 4 queries that read one key head share what is read.
// 3. decode_join: pieces -> one row, by their largest scores and sums.
//
// attention_simple of attention.cu is the version to read first. Query (n, t) sees places up to positions[n, t].

#include "rows.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// 1. queries (N, T, H, E); keys, values (N, G, S, E); weight, bias (H + G, E) or null; turns (N, T, E/2); 256 threads

extern "C" __global__ void __launch_bounds__(256)
    decode_append(const u32* heads, const float2* weight, const float2* bias, const float2* turns,
                  const long long* positions, u32* queries, u32* keys, u32* values, long long rows, int t, int n_heads,
                  int key_heads, int pairs, int places, float eps) {
  const int all = n_heads + 2 * key_heads, lane = threadIdx.x % 32;
  const long long at = blockIdx.x * 8ll + threadIdx.x / 32, row = at / all;
  if (row >= rows) return;
  const int head = at % all, g = (head - n_heads) % key_heads;
  const long long place = ((row / t * key_heads + g) * places + positions[row]) * pairs;
  Row r = read_row(heads + at * pairs, pairs, lane);
  if (head >= n_heads + key_heads) {
#pragma unroll
    for (int i = 0; i < 2; i++)
      if (lane + 32 * i < pairs) values[place + lane + 32 * i] = pack(r.x[i].x, r.x[i].y);
    return;
  }
  if (weight) {
    standardise(r, pairs, lane, eps);
    weight += head * pairs;
    bias += head * pairs;
  }
  u32* target = head < n_heads ? queries + (row * n_heads + head) * pairs : keys + place;
  write_turned(target, r, weight, bias, turns + row * pairs, pairs, lane);
}

// ---------------------------------------------------------------------------------------------------------------------
// 2. Grid (pieces, G * ceil(H / G * T / 4), N), 128 threads. parts (pieces, N, T, H, E) float32: weighted sums of
//    values,
// not divided; scales (pieces, N, T, H): largest score in units of log 2, sum of weights

const int PIECE = 256, QUERIES = 4, WARPS = 4;

struct Eight {
  float x[8];
};

INLINE Eight read_eight(const u32* p) {
  uint4 words = *(const uint4*)p;
  return {low(words.x), high(words.x), low(words.y), high(words.y),
          low(words.z), high(words.z), low(words.w), high(words.w)};
}

// scores[q][j] of count places; E / 8 neighbouring threads share a key
template <int E>
INLINE void score(float (&scores)[QUERIES][PIECE], const Eight (&q)[QUERIES], const u32* keys, int count) {
  const int TOGETHER = E / 8, AT_ONCE = 128 / TOGETHER;
  const int part = threadIdx.x % TOGETHER;
#pragma unroll 4
  for (int i = 0; i < PIECE / AT_ONCE; i++) {
    int j = i * AT_ONCE + threadIdx.x / TOGETHER;
    Eight key = {};
    if (j < count) key = read_eight(keys + j * (E / 2) + part * 4);
#pragma unroll
    for (int n = 0; n < QUERIES; n++) {
      float s = 0.f;
#pragma unroll
      for (int d = 0; d < 8; d++) s += q[n].x[d] * key.x[d];
#pragma unroll
      for (int o = TOGETHER / 2; o; o >>= 1) s += __shfl_xor_sync(~0u, s, o);
      if (part == 0) scores[n][j] = s * (LOG2E * rsqrtf((float)E));
    }
  }
}

// A warp a query: scores of the first `count` places -> weights, the others 0. Returns largest score and sum.
INLINE float2 soften(float (&scores)[PIECE], int count) {
  const int lane = threadIdx.x % 32;
  float most = LEAST, sum = 0.f;
  for (int j = lane; j < count; j += 32) most = fmaxf(most, scores[j]);
  for (int o = 16; o; o >>= 1) most = fmaxf(most, __shfl_xor_sync(~0u, most, o));
  for (int j = lane; j < PIECE; j += 32) {
    scores[j] = j < count ? power(scores[j] - most) : 0.f;
    sum += scores[j];
  }
  return make_float2(most, warp_sum(sum));
}

// The thread's share of sum_j weights[q][j] values[j]: every AT_ONCE-th place, 8 numbers of each
template <int E>
INLINE void gather(Eight (&o)[QUERIES], const float (&weights)[QUERIES][PIECE], const u32* values, int count) {
  const int TOGETHER = E / 8, AT_ONCE = 128 / TOGETHER;
#pragma unroll 4
  for (int j = threadIdx.x / TOGETHER; j < count; j += AT_ONCE) {
    Eight value = read_eight(values + j * (E / 2) + threadIdx.x % TOGETHER * 4);
#pragma unroll
    for (int n = 0; n < QUERIES; n++)
#pragma unroll
      for (int d = 0; d < 8; d++) o[n].x[d] += weights[n][j] * value.x[d];
  }
}

template <int E>
__device__ void decode_split(const u32* queries, const u32* keys, const u32* values, const long long* positions,
                             float* parts, float2* scales, int t, int heads, int key_heads, int places) {
  __shared__ float scores[QUERIES][PIECE], shares[WARPS][QUERIES][E];
  const int each = heads / key_heads, sets = (each * t + QUERIES - 1) / QUERIES;
  const int g = blockIdx.y / sets, set = blockIdx.y % sets * QUERIES, from = blockIdx.x * PIECE;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = threadIdx.x % (E / 8);
  const long long n = blockIdx.z, place = ((n * key_heads + g) * places + from) * (E / 2);
  Eight q[QUERIES], o[QUERIES];
  int seen[QUERIES], count = 0;  // of this piece, by each query and by any
  long long row[QUERIES];        // (n, t, h) as one number
#pragma unroll
  for (int i = 0; i < QUERIES; i++) {
    int number = min(set + i, each * t - 1), token = number / each;  // what is too many does the last one's work again
    row[i] = (n * t + token) * heads + g * each + number % each;
    seen[i] = max(0, min(PIECE, (int)positions[n * t + token] + 1 - from));
    count = max(count, seen[i]);
    q[i] = read_eight(queries + row[i] * (E / 2) + part * 4);
    o[i] = {};
  }
  score<E>(scores, q, keys + place, count);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < QUERIES; i++)
    if (warp == i) {
      float2 scale = soften(scores[i], seen[i]);
      if (lane == 0) scales[(long long)blockIdx.x * gridDim.z * t * heads + row[i]] = scale;
    }
  __syncthreads();
  gather<E>(o, scores, values + place, count);
#pragma unroll
  for (int i = 0; i < QUERIES; i++)
#pragma unroll
    for (int d = 0; d < 8; d++) {
      for (int step = E / 8; step < 32; step *= 2) o[i].x[d] += __shfl_xor_sync(~0u, o[i].x[d], step);
      if (lane < E / 8) shares[warp][i][8 * part + d] = o[i].x[d];
    }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < QUERIES; i++)
    if (threadIdx.x < E) {
      float sum = 0.f;
      for (int w = 0; w < WARPS; w++) sum += shares[w][i][threadIdx.x];
      parts[((long long)blockIdx.x * gridDim.z * t * heads + row[i]) * E + threadIdx.x] = sum;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 3. A warp a row, 256 threads; out (N, T, H, E)

extern "C" __global__ void __launch_bounds__(256)
    decode_join(const float2* parts, const float2* scales, u32* out, long long rows, int pieces, int pairs) {
  const long long row = blockIdx.x * 8ll + threadIdx.x / 32;
  if (row >= rows) return;
  float most = LEAST, sum = 0.f;
  for (int i = 0; i < pieces; i++) most = fmaxf(most, scales[i * rows + row].x);
  for (int i = 0; i < pieces; i++) sum += scales[i * rows + row].y * power(scales[i * rows + row].x - most);
  for (int p = threadIdx.x % 32; p < pairs; p += 32) {
    float2 o = make_float2(0.f, 0.f);
    for (int i = 0; i < pieces; i++) {
      float weight = power(scales[i * rows + row].x - most) / sum;
      float2 part = parts[(i * rows + row) * pairs + p];
      o = make_float2(o.x + weight * part.x, o.y + weight * part.y);
    }
    out[row * pairs + p] = pack(o.x, o.y);
  }
}

#define EXPORT(E)                                                                                                     \
  extern "C" __global__ void __launch_bounds__(128)                                                                   \
      decode_split_##E(const u32* queries, const u32* keys, const u32* values, const long long* positions,            \
                       float* parts, float2* scales, int t, int heads, int key_heads, int places) {                   \
    decode_split<E>(queries, keys, values, positions, parts, scales, t, heads, key_heads, places);                    \
  }

EXPORT(64)
EXPORT(128)
