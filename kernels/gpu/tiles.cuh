// The parts of the attention kernels. A tile is some rows of E bfloat16 in shared memory, as 32-bit words of two.
//
//   load_tile_async   global memory -> a tile, without registers, zeros after the last position
//   gemm_qk           S = X Y^T of two tiles: scores, or the gradient of weights
//   online_softmax    scores -> weights of a softmax whose maximum is not known yet
//   gemm_pv           O += S Y, S as gemm_qk left it: weights times values, and all gradients
//   store_tile        a warp's rows of O -> global memory
//
// A warp has 16 rows of S and O, as fragments C of ptx.cuh: a lane has rows group and group + 8, and of each 8 columns
// 2 member and 2 member + 1.

#include "bf16.cuh"

#define THREADS 128  // of a block: four warps, 16 rows each

template <int E>
struct TileRow {
  static const int words = E / 2 + 4;  // 16 bytes more than a row: the 8 rows of a matrix start in different banks
};

// ROWS positions from `from` on, `stride` words apart -> tile; zeros from position t on
template <int E, int ROWS>
INLINE void load_tile_async(u32* tile, const u32* x, long long stride, int from, int t) {
  for (int i = threadIdx.x; i < ROWS * (E / 8); i += THREADS) {  // 16 bytes each
    int row = i / (E / 8), column = i % (E / 8) * 4;
    bool in = from + row < t;
    cp_async(tile + row * TileRow<E>::words + column, x + (in ? from + row : 0) * stride + column, in ? 16 : 0);
  }
}

// The row whose address this lane gives to ldmatrix, to load the 16 x 16 block at a tile's row and word.
template <int E>
INLINE const u32* ldmatrix_row(const u32* tile, int row, int word) {
  int lane = threadIdx.x % 32;
  return tile + (row + lane % 16) * TileRow<E>::words + word + lane / 16 * 4;
}

// s (16 x N) = x y^T, this warp's 16 rows of x and the N rows of y
template <int E, int N>
INLINE void gemm_qk(float (&s)[N / 8][4], const u32* x, const u32* y) {
#pragma unroll
  for (int n = 0; n < N / 8; n++) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.f;
#pragma unroll
  for (int c = 0; c < E / 16; c++) {
    u32 a[4], b[4];  // of b: matrices 0 and 2 are the halves of 8 rows, 1 and 3 of the next 8
    ldmatrix(a, ldmatrix_row<E>(x, threadIdx.x / 32 * 16, 8 * c));
#pragma unroll
    for (int n = 0; n < N / 16; n++) {
      ldmatrix(b, ldmatrix_row<E>(y, 16 * n, 8 * c));
      mma(s[2 * n], a, b[0], b[2]);
      mma(s[2 * n + 1], a, b[1], b[3]);
    }
  }
}

// o (16 x E) += s (16 x N) y (N x E)
template <int E, int N>
INLINE void gemm_pv(float (&o)[E / 8][4], const float (&s)[N / 8][4], const u32* y) {
#pragma unroll
  for (int n = 0; n < N / 16; n++) {  // two neighbouring C, packed, are one A
    u32 b[4], a[4] = {pack_bf16(s[2 * n][0], s[2 * n][1]), pack_bf16(s[2 * n][2], s[2 * n][3]),
                      pack_bf16(s[2 * n + 1][0], s[2 * n + 1][1]), pack_bf16(s[2 * n + 1][2], s[2 * n + 1][3])};
#pragma unroll
    for (int c = 0; c < E / 16; c++) {
      ldmatrix_trans(b, ldmatrix_row<E>(y, 16 * n, 8 * c));
      mma(o[2 * c], a, b[0], b[1]);
      mma(o[2 * c + 1], a, b[2], b[3]);
    }
  }
}

// Scores -> unnormalised weights 2^(s - row_max). row_max and row_sum are brought up to date; whatever was summed with
// the old weights, the caller multiplies by `rescale`.
template <int N>
INLINE void online_softmax(float (&s)[N / 8][4], float (&row_max)[2], float (&row_sum)[2], float (&rescale)[2]) {
  float new_max[2] = {row_max[0], row_max[1]};
#pragma unroll
  for (int n = 0; n < N / 8; n++)
#pragma unroll
    for (int x = 0; x < 4; x++) new_max[x / 2] = fmaxf(new_max[x / 2], s[n][x]);
#pragma unroll
  for (int r = 0; r < 2; r++) {
    new_max[r] = fmaxf(new_max[r], __shfl_xor_sync(~0u, new_max[r], 1));  // the 4 lanes of a group share a row
    new_max[r] = fmaxf(new_max[r], __shfl_xor_sync(~0u, new_max[r], 2));
    rescale[r] = exp2_approx(row_max[r] - new_max[r]);
    row_max[r] = new_max[r];
    row_sum[r] *= rescale[r];
  }
#pragma unroll
  for (int n = 0; n < N / 8; n++)
#pragma unroll
    for (int x = 0; x < 4; x++) {  // a row that has seen nothing yet has row_max = NEG_INF, and 2^0 must not count
      s[n][x] = s[n][x] == NEG_INF ? 0.f : exp2_approx(s[n][x] - row_max[x / 2]);
      row_sum[x / 2] += s[n][x];
    }
}

// This warp's rows of o from `row` on, each times its factor -> out; rows from position t on are left out
template <int E>
INLINE void store_tile(u32* out, long long stride, int row, int t, const float (&o)[E / 8][4],
                       const float (&factor)[2]) {
  int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    if (row + group + 8 * r >= t) continue;
    u32* p = out + (row + group + 8 * r) * stride + member;
#pragma unroll
    for (int c = 0; c < E / 8; c++) p[4 * c] = pack_bf16(o[c][2 * r] * factor[r], o[c][2 * r + 1] * factor[r]);
  }
}
