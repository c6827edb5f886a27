// Attention's gradient on a GPU, bfloat16 in and out, float32 inside; shapes and documents as in attention.cu.
//
// With weights P = 2^(s - lse), s the scores in units of log 2, and dO the gradient of out (qknorm_rope_attention.py):
//     dv = P^T dO,   dP = dO v^T,   dS = P * (dP - delta),   delta_i = dO_i . out_i,   dq = dS k / sqrt(E),
//     dk = dS^T q / sqrt(E)
//
// 1. attention_delta: delta of every row.
// 2. attention_backward_simple_E: a warp a position, first as a query and then as a key: the formulas, one pair at a
//    time.
// 3. attention_backward_q_E, attention_backward_kv_E: FlashAttention-2's backward pass on tensor cores. P is computed
//    anew from lse, tile by tile, and never stored. A block of the first has 64 queries and walks over keys with dq in
//    registers; one of the second has 64 keys and walks over the queries of all heads that read them with dk and dv in
//    registers, all products transposed, so that weights are again an operand as they lie.
//    FlashAttention-2 adds up dq in the second kernel with atomics: 5 products where this takes 7. But then the sums'
//    order, and with it the last bits, differ from run to run, while here a stopped run goes on bit for bit.
//
// `last` (B, T) is the last position of j's document: queries behind it are never fetched.

#include "tiles.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// 1. d_out, out (B, T, H, E) -> delta (B, H, T); a warp a row, grid (ceil(B T H / 8)), 256 threads

extern "C" __global__ void __launch_bounds__(256)
    attention_delta(const u32* d_out, const u32* out, float* delta, int b, int t, int heads, int words) {
  long long at = blockIdx.x * 8ll + threadIdx.x / 32, rows = (long long)b * t * heads;
  if (at >= rows) return;
  float sum = 0.f;
  for (int i = threadIdx.x % 32; i < words; i += 32) {
    u32 g = d_out[at * words + i], o = out[at * words + i];
    sum += low(g) * low(o) + high(g) * high(o);
  }
  sum = warp_sum(sum);
  long long position = at / heads;
  if (threadIdx.x % 32 == 0) delta[(position / t * heads + at % heads) * t + position % t] = sum;
}

// ---------------------------------------------------------------------------------------------------------------------
// 2. A warp a position and key head: grid (T, G, B), 32 threads. A lane has the words l, l + 32 of each row.

template <int E>
struct Part {
  float x[E / 32];
};

template <int E>
INLINE Part<E> read_part(const u32* row) {
  Part<E> p;
  for (int i = 0; i < E / 64; i++) {
    u32 both = row[threadIdx.x + 32 * i];
    p.x[2 * i] = low(both);
    p.x[2 * i + 1] = high(both);
  }
  return p;
}

template <int E>
INLINE void write_part(u32* row, const Part<E>& p, float factor) {
  for (int i = 0; i < E / 64; i++) row[threadIdx.x + 32 * i] = pack(p.x[2 * i] * factor, p.x[2 * i + 1] * factor);
}

template <int E>
INLINE float dot(const Part<E>& a, const Part<E>& b) {
  float sum = 0.f;
  for (int i = 0; i < E / 32; i++) sum += a.x[i] * b.x[i];
  return warp_sum(sum);
}

template <int E>
INLINE void add(Part<E>& sum, float factor, const Part<E>& x) {
  for (int i = 0; i < E / 32; i++) sum.x[i] += factor * x.x[i];
}

template <int E>
__device__ void attention_backward_simple(const u32* d_out, const u32* q, const u32* k, const u32* v, const float* lse,
                                          const float* delta, const int* first, const int* last, u32* d_q, u32* d_k,
                                          u32* d_v, int t, int heads, int key_heads) {
  const int here = blockIdx.x, g = blockIdx.y, b = blockIdx.z, shared_by = heads / key_heads;
  const float root = rsqrtf((float)E);
  first += (long long)b * t;
  auto query = [&](int i, int h) { return (((long long)b * t + i) * heads + h) * (E / 2); };
  auto key = [&](int j) { return (((long long)b * t + j) * key_heads + g) * (E / 2); };
  auto row = [&](int i, int h) { return ((long long)b * heads + h) * t + i; };

  for (int h = g * shared_by; h < (g + 1) * shared_by; h++) {
    Part<E> mine = read_part<E>(q + query(here, h)), gradient = read_part<E>(d_out + query(here, h)), sum = {};
    for (int j = first[here]; j <= here; j++) {
      if (first[j] != first[here]) continue;
      Part<E> other = read_part<E>(k + key(j));
      float p = power(dot(mine, other) * root * LOG2E - lse[row(here, h)]);
      add(sum, p * (dot(gradient, read_part<E>(v + key(j))) - delta[row(here, h)]), other);
    }
    write_part(d_q + query(here, h), sum, root);
  }
  Part<E> mine = read_part<E>(k + key(here)), value = read_part<E>(v + key(here)), sum_k = {}, sum_v = {};
  for (int h = g * shared_by; h < (g + 1) * shared_by; h++)
    for (int i = here; i <= last[(long long)b * t + here]; i++) {
      if (first[i] != first[here]) continue;
      Part<E> other = read_part<E>(q + query(i, h)), gradient = read_part<E>(d_out + query(i, h));
      float p = power(dot(mine, other) * root * LOG2E - lse[row(i, h)]);
      add(sum_v, p, gradient);
      add(sum_k, p * (dot(gradient, value) - delta[row(i, h)]), other);
    }
  write_part(d_k + key(here), sum_k, root);
  write_part(d_v + key(here), sum_v, 1.f);
}

// ---------------------------------------------------------------------------------------------------------------------
// 3. On tensor cores, 128 threads. The other side comes in tiles of WALK positions, the next while one is computed
//    with.

template <int E>
struct Walk {
  static const int n = 4096 / E;  // 64 or 32: what registers allow
};

// Of queries: grid (ceil(T / 64), H, B); shared: tiles of 64 of q and dO, twice WALK of k and v
template <int E>
__device__ void attention_backward_q(const u32* d_out, const u32* q, const u32* k, const u32* v, const float* lse,
                                     const float* delta, const int* first, u32* d_q, int t, int heads, int key_heads) {
  const int N = Walk<E>::n, OWN = 64 * Line<E>::words, SIZE = N * Line<E>::words;
  u32 *queries = (u32*)dynamic_shared(), *gradients = queries + OWN, *keys = gradients + OWN, *values = keys + 2 * SIZE;
  __shared__ int key_first[2][N];
  const int h = blockIdx.y, b = blockIdx.z, g = h / (heads / key_heads);
  const int start = (gridDim.x - 1 - blockIdx.x) * 64, end = min(start + 64, t);  // the longest first
  const long long row = (long long)heads * (E / 2), key_row = (long long)key_heads * (E / 2);
  const long long head = ((long long)b * t * heads + h) * (E / 2);
  const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
  const float root = rsqrtf((float)E);
  first += (long long)b * t;
  k += ((long long)b * t * key_heads + g) * (E / 2);
  v += ((long long)b * t * key_heads + g) * (E / 2);

  int rows[2], mine[2], from = t;
  float sums[2], deltas[2];
  for (int i = start; i < end; i++) from = min(from, first[i]);
  from = from / N * N;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    rows[r] = start + warp * 16 + group + 8 * r;
    bool in = rows[r] < t;
    long long at = ((long long)b * heads + h) * t + rows[r];
    mine[r] = in ? first[rows[r]] : -1;
    sums[r] = in ? lse[at] : 0.f;
    deltas[r] = in ? delta[at] : 0.f;
  }
  auto fetch = [&](int stage, int j) {
    fetch_rows<E, N>(keys + stage * SIZE, k, key_row, j, t);
    fetch_rows<E, N>(values + stage * SIZE, v, key_row, j, t);
    if (threadIdx.x < N) key_first[stage][threadIdx.x] = j + threadIdx.x < t ? first[j + threadIdx.x] : -2;
  };
  fetch_rows<E, 64>(queries, q + head, row, start, t);
  fetch_rows<E, 64>(gradients, d_out + head, row, start, t);
  fetch(0, from);
  copies_commit();
  float dq[E / 8][4], s[N / 8][4], dp[N / 8][4];
#pragma unroll
  for (int c = 0; c < E / 8; c++) dq[c][0] = dq[c][1] = dq[c][2] = dq[c][3] = 0.f;

  for (int j = from, stage = 0; j < end; j += N, stage ^= 1) {
    if (j + N < end) fetch(stage ^ 1, j + N);
    copies_commit();
    copies_wait<1>();
    __syncthreads();
    multiply_rows<E, N>(s, queries, keys + stage * SIZE);
    multiply_rows<E, N>(dp, gradients, values + stage * SIZE);
#pragma unroll
    for (int n = 0; n < N / 8; n++)
#pragma unroll
      for (int x = 0; x < 4; x++) {
        int column = 8 * n + 2 * member + (x & 1), r = x / 2;
        bool seen = j + column <= rows[r] && key_first[stage][column] == mine[r];
        s[n][x] = seen ? power(s[n][x] * (root * LOG2E) - sums[r]) * (dp[n][x] - deltas[r]) : 0.f;
      }
    multiply_columns<E, N>(dq, s, keys + stage * SIZE);
    __syncthreads();
  }
  const float factor[2] = {root, root};
  store_rows<E>(d_q + head, row, start + warp * 16, t, dq, factor);
}

// Of keys and values: grid (ceil(T / 64), G, B); shared: tiles of 64 of k and v, twice WALK of q and dO
template <int E>
__device__ void attention_backward_kv(const u32* d_out, const u32* q, const u32* k, const u32* v, const float* lse,
                                      const float* delta, const int* first, const int* last, u32* d_k, u32* d_v, int t,
                                      int heads, int key_heads) {
  const int N = Walk<E>::n, OWN = 64 * Line<E>::words, SIZE = N * Line<E>::words;
  u32 *keys = (u32*)dynamic_shared(), *values = keys + OWN, *queries = values + OWN, *gradients = queries + 2 * SIZE;
  __shared__ int query_first[2][N];
  __shared__ float sums[2][N], deltas[2][N];
  const int g = blockIdx.y, b = blockIdx.z, shared_by = heads / key_heads;
  const int start = blockIdx.x * 64, behind = min(start + 64, t);
  const long long row = (long long)heads * (E / 2), key_row = (long long)key_heads * (E / 2);
  const long long head = ((long long)b * t * key_heads + g) * (E / 2);
  const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
  const float root = rsqrtf((float)E);
  first += (long long)b * t;

  int rows[2], mine[2], end = start;  // end: behind the last query that sees any key of the block
  for (int j = start; j < behind; j++) end = max(end, last[(long long)b * t + j] + 1);
#pragma unroll
  for (int r = 0; r < 2; r++) {
    rows[r] = start + warp * 16 + group + 8 * r;
    mine[r] = rows[r] < t ? first[rows[r]] : -1;
  }
  const int tiles = (end - start + N - 1) / N;  // of each head
  auto fetch = [&](int stage, int tile) {
    int h = g * shared_by + tile / tiles, from = start + tile % tiles * N, i = from + threadIdx.x;
    long long at = ((long long)b * t * heads + h) * (E / 2), number = ((long long)b * heads + h) * t + i;
    fetch_rows<E, N>(queries + stage * SIZE, q + at, row, from, t);
    fetch_rows<E, N>(gradients + stage * SIZE, d_out + at, row, from, t);
    if (threadIdx.x < N) {
      query_first[stage][threadIdx.x] = i < t ? first[i] : -2;
      sums[stage][threadIdx.x] = i < t ? lse[number] : 0.f;
      deltas[stage][threadIdx.x] = i < t ? delta[number] : 0.f;
    }
  };
  fetch_rows<E, 64>(keys, k + head, key_row, start, t);
  fetch_rows<E, 64>(values, v + head, key_row, start, t);
  fetch(0, 0);
  copies_commit();
  float dk[E / 8][4], dv[E / 8][4], s[N / 8][4], dp[N / 8][4];  // s, dp: a row is a key, a column a query
#pragma unroll
  for (int c = 0; c < E / 8; c++)
#pragma unroll
    for (int x = 0; x < 4; x++) dk[c][x] = dv[c][x] = 0.f;

  for (int tile = 0, stage = 0; tile < tiles * shared_by; tile++, stage ^= 1) {
    if (tile + 1 < tiles * shared_by) fetch(stage ^ 1, tile + 1);
    copies_commit();
    copies_wait<1>();
    __syncthreads();
    const int from = start + tile % tiles * N;
    multiply_rows<E, N>(s, keys, queries + stage * SIZE);
    multiply_rows<E, N>(dp, values, gradients + stage * SIZE);
#pragma unroll
    for (int n = 0; n < N / 8; n++)
#pragma unroll
      for (int x = 0; x < 4; x++) {
        int column = 8 * n + 2 * member + (x & 1), r = x / 2;
        bool seen = rows[r] <= from + column && query_first[stage][column] == mine[r];
        s[n][x] = seen ? power(s[n][x] * (root * LOG2E) - sums[stage][column]) : 0.f;
        dp[n][x] = s[n][x] * (dp[n][x] - deltas[stage][column]);
      }
    multiply_columns<E, N>(dv, s, gradients + stage * SIZE);
    multiply_columns<E, N>(dk, dp, queries + stage * SIZE);
    __syncthreads();
  }
  const float of_keys[2] = {root, root}, of_values[2] = {1.f, 1.f};
  store_rows<E>(d_k + head, key_row, start + warp * 16, t, dk, of_keys);
  store_rows<E>(d_v + head, key_row, start + warp * 16, t, dv, of_values);
}

#define INPUTS                                                                                                      \
  const u32 *d_out, const u32 *q, const u32 *k, const u32 *v, const float *lse, const float *delta, const int *first
#define EXPORT(E)                                                                                                   \
  extern "C" __global__ void __launch_bounds__(32)                                                                  \
      attention_backward_simple_##E(INPUTS, const int* last, u32* d_q, u32* d_k, u32* d_v, int t, int heads,        \
                                    int key_heads) {                                                                \
    attention_backward_simple<E>(d_out, q, k, v, lse, delta, first, last, d_q, d_k, d_v, t, heads, key_heads);      \
  }                                                                                                                 \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                             \
      attention_backward_q_##E(INPUTS, u32* d_q, int t, int heads, int key_heads) {                                 \
    attention_backward_q<E>(d_out, q, k, v, lse, delta, first, d_q, t, heads, key_heads);                           \
  }                                                                                                                 \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                             \
      attention_backward_kv_##E(INPUTS, const int* last, u32* d_k, u32* d_v, int t, int heads, int key_heads) {     \
    attention_backward_kv<E>(d_out, q, k, v, lse, delta, first, last, d_k, d_v, t, heads, key_heads);               \
  }

EXPORT(64)
EXPORT(128)
