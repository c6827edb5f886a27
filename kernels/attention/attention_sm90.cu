// Attention's forward pass for Hopper alone; the algorithm, shapes and documents of attention.cu, version 2.
//
// What differs is who multiplies. wgmma lets four warps multiply 64 rows at once and reads its operands from shared
// memory itself, so nothing is carried through registers but the weights, which are an operand as they lie. Two
// warpgroups, 64 queries each, share every tile of keys and values. For wgmma a tile lies in parts of 64 columns, rows
// of 128 bytes whose 16-byte pieces are permuted so that 8 rows meet all banks: cp.async puts each piece where it
// belongs. Not here yet, of FlashAttention-3 (arXiv 2407.08608): tiles brought by TMA and a warp of its own, and the
// products of one tile behind the softmax of another.

#include "tiles.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

const int QUERIES = 128, KEYS = 64, GROUP = 64;  // positions of a block, a tile, a warpgroup
const int ROW = 32;                              // words of a part's row: 128 bytes

// ROWS positions from `from` on -> E / 64 parts of ROWS rows each. Behind position t come zeros.
template <int E, int ROWS>
INLINE void fetch_parts(u32* tile, const u32* x, long long stride, int from, int t) {
  for (int i = threadIdx.x; i < ROWS * (E / 8); i += 2 * THREADS) {
    int row = i / (E / 8), piece = i % (E / 8), part = piece / 8;
    bool in = from + row < t;
    u32* target = tile + (part * ROWS + row) * ROW + (piece % 8 ^ row % 8) * 4;
    copy_async(target, x + (in ? from + row : 0) * stride + piece * 4, in ? 16 : 0);
  }
}

// s = this warpgroup's 64 queries times the tile's keys, transposed
template <int E>
INLINE void multiply_keys(float (&s)[8][4], const u32* queries, const u32* keys, int group) {
  pin(s);
  wgmma_begin();
#pragma unroll
  for (int c = 0; c < E / 16; c++) {  // 16 columns are 8 words of a row
    const u32* mine = queries + (c / 4 * QUERIES + group * GROUP) * ROW + c % 4 * 8;
    wgmma_rows(s, descriptor(mine), descriptor(keys + c / 4 * KEYS * ROW + c % 4 * 8), c > 0);
  }
  wgmma_end();
  pin(s);
}

// o (64 x E, in parts) += s times the tile's values
template <int E>
INLINE void multiply_values(float (&o)[E / 64][8][4], const float (&s)[8][4], const u32* values) {
  u32 a[KEYS / 16][4];
#pragma unroll
  for (int n = 0; n < KEYS / 16; n++)
#pragma unroll
    for (int x = 0; x < 4; x++) a[n][x] = pack(s[2 * n + x / 2][x % 2 * 2], s[2 * n + x / 2][x % 2 * 2 + 1]);
#pragma unroll
  for (int p = 0; p < E / 64; p++) pin(o[p]);
  wgmma_begin();
#pragma unroll
  for (int n = 0; n < KEYS / 16; n++)
#pragma unroll
    for (int p = 0; p < E / 64; p++) wgmma_columns(o[p], a[n], descriptor(values + (p * KEYS + n * 16) * ROW));
  wgmma_end();
#pragma unroll
  for (int p = 0; p < E / 64; p++) pin(o[p]);
}

// Grid (ceil(T / 128), H, B), 256 threads; shared: 128 rows of q, twice 64 of k and v, and twice the keys' documents
template <int E>
__device__ void attention_sm90(const u32* q, const u32* k, const u32* v, const int* first, u32* out, float* lse, int t,
                               int heads, int key_heads) {
  const int SIZE = KEYS * E / 2;
  u32 *queries = (u32*)dynamic_shared(), *keys = queries + QUERIES * E / 2, *values = keys + 2 * SIZE;
  int* key_first = (int*)(values + 2 * SIZE);
  const int h = blockIdx.y, b = blockIdx.z, g = h / (heads / key_heads);
  const int start = (gridDim.x - 1 - blockIdx.x) * QUERIES, end = min(start + QUERIES, t);  // the longest first
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
    fetch_parts<E, KEYS>(keys + stage * SIZE, k, key_row, j, t);
    fetch_parts<E, KEYS>(values + stage * SIZE, v, key_row, j, t);
    int i = threadIdx.x;
    if (i < KEYS) key_first[stage * KEYS + i] = j + i < t ? first[j + i] : -2;
  };
  fetch_parts<E, QUERIES>(queries, q + ((long long)b * t * heads + h) * (E / 2), row, start, t);
  fetch(0, from);
  copies_commit();
  float o[E / 64][8][4], s[8][4], grown[2], largest[2] = {LEAST, LEAST}, sum[2] = {0.f, 0.f};
#pragma unroll
  for (int c = 0; c < E / 8; c++)
#pragma unroll
    for (int x = 0; x < 4; x++) o[c / 8][c % 8][x] = s[c % 8][x] = 0.f;

  for (int j = from, stage = 0; j < end; j += KEYS, stage ^= 1) {
    if (j + KEYS < end) fetch(stage ^ 1, j + KEYS);
    copies_commit();
    copies_wait<1>();
    shared_is_written();
    __syncthreads();
    multiply_keys<E>(s, queries, keys + stage * SIZE, threadIdx.x / THREADS);
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
      for (int x = 0; x < 4; x++) {
        int column = 8 * n + 2 * member + (x & 1);
        bool seen = j + column <= rows[x / 2] && key_first[stage * KEYS + column] == mine[x / 2];
        s[n][x] = seen ? s[n][x] * scale : LEAST;
      }
    soften<KEYS>(s, largest, sum, grown);
#pragma unroll
    for (int c = 0; c < E / 8; c++)
#pragma unroll
      for (int x = 0; x < 4; x++) o[c / 8][c % 8][x] *= grown[x / 2];
    multiply_values<E>(o, s, values + stage * SIZE);
    __syncthreads();
  }
  float factor[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
    sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
    factor[r] = 1.f / sum[r];
    if (member == 0 && rows[r] < t) lse[((long long)b * heads + h) * t + rows[r]] = largest[r] + __log2f(sum[r]);
  }
#pragma unroll
  for (int p = 0; p < E / 64; p++)
    store_rows<64>(out + ((long long)b * t * heads + h) * (E / 2) + p * ROW, row, start + warp * 16, t, o[p], factor);
}

#define EXPORT(E)                                                                                                   \
  extern "C" __global__ void __launch_bounds__(2 * THREADS)                                                         \
      attention_sm90_##E(const u32* q, const u32* k, const u32* v, const int* first, u32* out, float* lse, int t,   \
                         int heads, int key_heads) {                                                                \
    attention_sm90<E>(q, k, v, first, out, lse, t, heads, key_heads);                                               \
  }

EXPORT(64)
EXPORT(128)

#endif
