// Attention's parts on a GPU, bfloat16 in and out, float32 inside. B rows, T positions, H heads, E numbers a head.
//
// 1. norm_rotary: QK-norm and rotary turn of every head's row in one pass, a warp a row: what reads and writes each
//    number once. In front of a vendor's attention this is all that is needed.
//       out = turn(n * weight + bias),  n = (x - mean) / deviation,  pairs (x[2i], x[2i+1]) as complex numbers
// 2. norm_rotary_backward: with g = the upstream gradient turned back and u = g * weight
//       dx = (u - mean(u) - n mean(u n)) / deviation,  dweight += g n,  dbias += g
//    A warp walks over rows of one head with its share of dweight and dbias in registers; shares are summed outside.
// 3. attention_simple_E: a thread a query, scores one by one, the running maximum and sum of the softmax: 20 lines to
//    read before 4. No tensor cores.
// 4. attention_E: FlashAttention-2's forward pass (arXiv 2307.08691) on tensor cores (mma.sync, sm_80 and later): 4
//    warps of 16 queries each on tiles of 64 keys. Scores become weights in registers, and the registers of weights are
//    at once an operand of the product with v. Keys before the block's first document are never fetched.
//
// Documents: query i sees keys j <= i with doc[j] == doc[i]; `first` (B, T) is the first position of i's document.
// No header is included, so NVRTC alone compiles it. Only 1 and 2 for E up to 128, 3 and 4 for 64 and 128.

typedef unsigned short u16;
typedef unsigned int u32;

#define LOG2E 1.4426950408889634f
#define LEAST -1e30f

__device__ __forceinline__ float low(u32 x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float high(u32 x) { return __uint_as_float(x & 0xffff0000u); }

__device__ __forceinline__ u32 pack(float low, float high) {  // two bfloat16
  u32 y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

__device__ __forceinline__ float power(float x) {  // 2^x
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float warp_sum(float x) {
  for (int o = 16; o; o >>= 1) x += __shfl_xor_sync(~0u, x, o);
  return x;
}

// ---------------------------------------------------------------------------------------------------------------------
// 1, 2. Norm and turn. Lane l of a warp holds the pairs l and l + 32 of a row; E <= 128.

struct Row {
  float2 x[2];
};

__device__ __forceinline__ Row read_row(const u32* p, int pairs, int lane) {
  Row r;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    int at = lane + 32 * i;
    u32 both = at < pairs ? p[at] : 0;
    r.x[i] = make_float2(low(both), high(both));
  }
  return r;
}

__device__ __forceinline__ float total(const Row& r) { return warp_sum(r.x[0].x + r.x[0].y + r.x[1].x + r.x[1].y); }

// mean 0, variance 1, in place; pairs beyond the row stay 0. Returns 1 / deviation.
__device__ __forceinline__ float standardise(Row& r, int pairs, int lane, float eps) {
  float mean = total(r) / (2 * pairs), square = 0.f;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    bool in = lane + 32 * i < pairs;
    r.x[i].x = in ? r.x[i].x - mean : 0.f;
    r.x[i].y = in ? r.x[i].y - mean : 0.f;
    square += r.x[i].x * r.x[i].x + r.x[i].y * r.x[i].y;
  }
  float inverse = rsqrtf(warp_sum(square) / (2 * pairs) + eps);
#pragma unroll
  for (int i = 0; i < 2; i++) r.x[i] = make_float2(r.x[i].x * inverse, r.x[i].y * inverse);
  return inverse;
}

// x, out (rows, heads, E); weight, bias (heads, E) or null; turns (rows, E/2) cos and sin
extern "C" __global__ void __launch_bounds__(256)
    norm_rotary(const u32* x, const float2* weight, const float2* bias, const float2* turns, u32* out,
                long long rows, int heads, int pairs, float eps) {
  long long at = blockIdx.x * 8ll + threadIdx.x / 32;
  int lane = threadIdx.x % 32, head = at % heads;
  if (at >= rows * heads) return;
  Row r = read_row(x + at * pairs, pairs, lane);
  if (weight) standardise(r, pairs, lane, eps);
#pragma unroll
  for (int i = 0; i < 2; i++) {
    int p = lane + 32 * i;
    if (p >= pairs) continue;
    float2 y = r.x[i], t = turns[at / heads * pairs + p];
    if (weight) {
      float2 w = weight[head * pairs + p], b = bias[head * pairs + p];
      y = make_float2(y.x * w.x + b.x, y.y * w.y + b.y);
    }
    out[at * pairs + p] = pack(y.x * t.x - y.y * t.y, y.y * t.x + y.x * t.y);
  }
}

// Grid (shares, heads), one warp a block; d_weight, d_bias (shares, heads, E) float32
extern "C" __global__ void __launch_bounds__(32)
    norm_rotary_backward(const u32* d_out, const u32* x, const float2* weight, const float2* turns, u32* d_x,
                         float2* d_weight, float2* d_bias, long long rows, int heads, int pairs, float eps) {
  int lane = threadIdx.x, head = blockIdx.y;
  float2 w[2], dw[2], db[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    int p = lane + 32 * i;
    w[i] = weight && p < pairs ? weight[head * pairs + p] : make_float2(0.f, 0.f);
    dw[i] = db[i] = make_float2(0.f, 0.f);
  }
  for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
    long long at = (row * heads + head) * pairs;
    Row g = read_row(d_out + at, pairs, lane);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      int p = lane + 32 * i;
      float2 t = p < pairs ? turns[row * pairs + p] : make_float2(0.f, 0.f), y = g.x[i];
      g.x[i] = make_float2(y.x * t.x + y.y * t.y, y.y * t.x - y.x * t.y);
    }
    if (weight) {
      Row n = read_row(x + at, pairs, lane), un;
      float inverse = standardise(n, pairs, lane, eps);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        dw[i] = make_float2(dw[i].x + g.x[i].x * n.x[i].x, dw[i].y + g.x[i].y * n.x[i].y);
        db[i] = make_float2(db[i].x + g.x[i].x, db[i].y + g.x[i].y);
        g.x[i] = make_float2(g.x[i].x * w[i].x, g.x[i].y * w[i].y);
        un.x[i] = make_float2(g.x[i].x * n.x[i].x, g.x[i].y * n.x[i].y);
      }
      float mean = total(g) / (2 * pairs), mean_n = total(un) / (2 * pairs);
#pragma unroll
      for (int i = 0; i < 2; i++)
        g.x[i] = make_float2((g.x[i].x - mean - n.x[i].x * mean_n) * inverse,
                             (g.x[i].y - mean - n.x[i].y * mean_n) * inverse);
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
      if (lane + 32 * i < pairs) d_x[at + lane + 32 * i] = pack(g.x[i].x, g.x[i].y);
  }
  if (!weight) return;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    int p = lane + 32 * i;
    if (p >= pairs) continue;
    long long share = ((long long)blockIdx.x * heads + head) * pairs + p;
    d_weight[share] = dw[i];
    d_bias[share] = db[i];
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// 3. Attention, a thread a query. q, out (B, T, H, E); k, v (B, T, G, E); grid (ceil(T / 64), H, B), 64 threads.

template <int E>
__device__ void attention_simple(const u32* q, const u32* k, const u32* v, const long long* docs, const int* first,
                                 u32* out, int t, int heads, int key_heads) {
  int i = blockIdx.x * 64 + threadIdx.x, h = blockIdx.y, b = blockIdx.z, g = h / (heads / key_heads);
  if (i >= t) return;
  const u32* mine = q + (((long long)b * t + i) * heads + h) * (E / 2);
  float sum = 0.f, largest = LEAST, o[E];
  for (int d = 0; d < E; d++) o[d] = 0.f;
  for (int j = first[b * t + i]; j <= i; j++) {
    if (docs[b * t + j] != docs[b * t + i]) continue;
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
}

// ---------------------------------------------------------------------------------------------------------------------
// 4. Attention on tensor cores: grid (ceil(T / 64), H, B), 128 threads.
//
// mma.m16n8k16: lane = 4 * group + member. A (16 x 16): rows group and group + 8, columns 2 member and 2 member + 8, two
// numbers each. B (16 x 8): rows 2 member and 2 member + 8, column group. C (16 x 8): rows group and group + 8, columns
// 2 member: so two neighbouring C tiles, packed, are one A tile.

__device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <int E>
__device__ void attention(const u32* q, const u32* k, const u32* v, const long long* docs, const int* first, u32* out,
                          int t, int heads, int key_heads) {
  const int KEYS = 64, LINE = E / 2 + 4;  // 4 words more than a row: rows start in different banks
  __shared__ __align__(16) u32 keys[KEYS * LINE], values[KEYS * LINE];
  __shared__ long long key_docs[KEYS];
  const int h = blockIdx.y, b = blockIdx.z, g = h / (heads / key_heads);
  const int start = (gridDim.x - 1 - blockIdx.x) * 64;  // the longest first
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, member = lane % 4;
  const int rows[2] = {start + warp * 16 + group, start + warp * 16 + group + 8};
  const float scale = LOG2E * rsqrtf((float)E);

  u32 a[E / 16][4];  // the warp's 16 queries
  long long my_docs[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    bool in = rows[r] < t;
    my_docs[r] = in ? docs[(long long)b * t + rows[r]] : 0;
    const u32* p = q + (((long long)b * t + rows[r]) * heads + h) * (E / 2);
#pragma unroll
    for (int c = 0; c < E / 16; c++) {
      a[c][r] = in ? p[8 * c + member] : 0;
      a[c][r + 2] = in ? p[8 * c + member + 4] : 0;
    }
  }
  float o[E / 8][4], largest[2] = {LEAST, LEAST}, sum[2] = {0.f, 0.f};
#pragma unroll
  for (int c = 0; c < E / 8; c++) o[c][0] = o[c][1] = o[c][2] = o[c][3] = 0.f;

  int from = t;  // the first key that any query of the block sees
  for (int i = start; i < min(start + 64, t); i++) from = min(from, first[(long long)b * t + i]);
  for (int j = from / KEYS * KEYS; j < min(start + 64, t); j += KEYS) {
    __syncthreads();  // the tile before is no longer read
    for (int i = threadIdx.x; i < KEYS * (E / 8); i += 128) {  // 16 bytes each
      int row = i / (E / 8), column = i % (E / 8) * 4;
      long long at = (((long long)b * t + j + row) * key_heads + g) * (E / 2) + column;
      uint4 zero = make_uint4(0, 0, 0, 0);
      *(uint4*)(keys + row * LINE + column) = j + row < t ? *(const uint4*)(k + at) : zero;
      *(uint4*)(values + row * LINE + column) = j + row < t ? *(const uint4*)(v + at) : zero;
    }
    if (threadIdx.x < KEYS) key_docs[threadIdx.x] = j + threadIdx.x < t ? docs[(long long)b * t + j + threadIdx.x] : 0;
    __syncthreads();

    float s[KEYS / 8][4];
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++) {
      s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.f;
      const u32* key = keys + (8 * n + group) * LINE + member;
#pragma unroll
      for (int c = 0; c < E / 16; c++) multiply(s[n], a[c], key[8 * c], key[8 * c + 4]);
    }
    float most[2] = {largest[0], largest[1]};
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
      for (int x = 0; x < 4; x++) {
        int column = 8 * n + 2 * member + (x & 1), r = x / 2;
        bool seen = j + column <= rows[r] && key_docs[column] == my_docs[r];
        s[n][x] = seen ? s[n][x] * scale : LEAST;
        most[r] = fmaxf(most[r], s[n][x]);
      }
    float grown[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {  // the four lanes of a group hold one row
      most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 1));
      most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 2));
      grown[r] = power(largest[r] - most[r]);
      largest[r] = most[r];
      sum[r] *= grown[r];
    }
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
      for (int x = 0; x < 4; x++) {  // a row that has seen nothing yet has largest = LEAST, and 2^0 must not count
        s[n][x] = s[n][x] == LEAST ? 0.f : power(s[n][x] - largest[x / 2]);
        sum[x / 2] += s[n][x];
      }
#pragma unroll
    for (int c = 0; c < E / 8; c++)
#pragma unroll
      for (int x = 0; x < 4; x++) o[c][x] *= grown[x / 2];
#pragma unroll
    for (int n = 0; n < KEYS / 16; n++) {
      u32 w[4] = {pack(s[2 * n][0], s[2 * n][1]), pack(s[2 * n][2], s[2 * n][3]),
                  pack(s[2 * n + 1][0], s[2 * n + 1][1]), pack(s[2 * n + 1][2], s[2 * n + 1][3])};
#pragma unroll
      for (int c = 0; c < E / 8; c++) {  // ldmatrix.trans hands each lane two keys of one column
        u32 b0, b1, at = (u32)__cvta_generic_to_shared(values + (16 * n + lane % 16) * LINE + 4 * c);
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];" : "=r"(b0), "=r"(b1) : "r"(at));
        multiply(o[c], w, b0, b1);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
    sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
    if (rows[r] >= t) continue;
    u32* p = out + (((long long)b * t + rows[r]) * heads + h) * (E / 2);
#pragma unroll
    for (int c = 0; c < E / 8; c++) p[4 * c + member] = pack(o[c][2 * r] / sum[r], o[c][2 * r + 1] / sum[r]);
  }
}

#define EXPORT(E)                                                                                                    \
  extern "C" __global__ void __launch_bounds__(64)                                                                   \
      attention_simple_##E(const u32* q, const u32* k, const u32* v, const long long* docs, const int* first,        \
                           u32* out, int t, int heads, int key_heads) {                                              \
    attention_simple<E>(q, k, v, docs, first, out, t, heads, key_heads);                                             \
  }                                                                                                                  \
  extern "C" __global__ void __launch_bounds__(128)                                                                  \
      attention_##E(const u32* q, const u32* k, const u32* v, const long long* docs, const int* first, u32* out,     \
                    int t, int heads, int key_heads) {                                                               \
    attention<E>(q, k, v, docs, first, out, t, heads, key_heads);                                                    \
  }

EXPORT(64)
EXPORT(128)
