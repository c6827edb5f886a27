// What the attention kernels are made of. A tile is some rows of E bfloat16 in shared memory, as words of two.
//
//   fetch_rows          memory -> a tile, past the registers, zeros behind the last position
//   multiply_rows       S = X Y^T of two tiles: scores, or the gradient of weights
//   soften              scores -> weights of a softmax whose maximum is not known yet
//   multiply_columns    O += S Y, S as it left multiply_rows: weights times values, and all gradients
//
// A warp has 16 rows of S and O: fragments C of ptx.cuh, so a lane has rows group and group + 8 and columns 2 member
// and 2 member + 1 of each 8.

#include "bf16.cuh"

#define THREADS 128  // of a block: four warps, 16 rows each

template <int E>
struct Line {
  static const int words = E / 2 + 4;  // 16 bytes more than a row: the 8 rows of a matrix start in different banks
};

// ROWS positions from `from` on, `stride` words apart -> tile. Behind position t come zeros.
template <int E, int ROWS>
INLINE void fetch_rows(u32* tile, const u32* x, long long stride, int from, int t) {
  for (int i = threadIdx.x; i < ROWS * (E / 8); i += THREADS) {  // 16 bytes each
    int row = i / (E / 8), column = i % (E / 8) * 4;
    bool in = from + row < t;
    copy_async(tile + row * Line<E>::words + column, x + (in ? from + row : 0) * stride + column, in ? 16 : 0);
  }
}

// The 16 x 16 numbers at a tile's row and word, as four matrices: which row this lane names.
template <int E>
INLINE const u32* corner(const u32* tile, int row, int word) {
  int lane = threadIdx.x % 32;
  return tile + (row + lane % 16) * Line<E>::words + word + lane / 16 * 4;
}

// s (16 x N) = this warp's 16 rows of x times the N rows of y, transposed
template <int E, int N>
INLINE void multiply_rows(float (&s)[N / 8][4], const u32* x, const u32* y) {
#pragma unroll
  for (int n = 0; n < N / 8; n++) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.f;
#pragma unroll
  for (int c = 0; c < E / 16; c++) {
    u32 a[4], b[4];  // of b: matrices 0 and 2 are one 8 rows' halves, 1 and 3 the other's
    load_matrices(a, corner<E>(x, threadIdx.x / 32 * 16, 8 * c));
#pragma unroll
    for (int n = 0; n < N / 16; n++) {
      load_matrices(b, corner<E>(y, 16 * n, 8 * c));
      mma(s[2 * n], a, b[0], b[2]);
      mma(s[2 * n + 1], a, b[1], b[3]);
    }
  }
}

// o (16 x E) += s (16 x N) y (N x E)
template <int E, int N>
INLINE void multiply_columns(float (&o)[E / 8][4], const float (&s)[N / 8][4], const u32* y) {
#pragma unroll
  for (int n = 0; n < N / 16; n++) {
    u32 b[4], a[4] = {pack(s[2 * n][0], s[2 * n][1]), pack(s[2 * n][2], s[2 * n][3]),
                      pack(s[2 * n + 1][0], s[2 * n + 1][1]), pack(s[2 * n + 1][2], s[2 * n + 1][3])};
#pragma unroll
    for (int c = 0; c < E / 16; c++) {
      load_matrices_transposed(b, corner<E>(y, 16 * n, 8 * c));
      mma(o[2 * c], a, b[0], b[1]);
      mma(o[2 * c + 1], a, b[2], b[3]);
    }
  }
}

// Scores -> weights, unnormalised. The sums so far are brought to the new maximum; what was added up with the old
// weights is the caller's to multiply by `grown`. A row's numbers lie in 4 lanes.
template <int N>
INLINE void soften(float (&s)[N / 8][4], float (&largest)[2], float (&sum)[2], float (&grown)[2]) {
  float most[2] = {largest[0], largest[1]};
#pragma unroll
  for (int n = 0; n < N / 8; n++)
#pragma unroll
    for (int x = 0; x < 4; x++) most[x / 2] = fmaxf(most[x / 2], s[n][x]);
#pragma unroll
  for (int r = 0; r < 2; r++) {
    most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 1));
    most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 2));
    grown[r] = power(largest[r] - most[r]);
    largest[r] = most[r];
    sum[r] *= grown[r];
  }
#pragma unroll
  for (int n = 0; n < N / 8; n++)
#pragma unroll
    for (int x = 0; x < 4; x++) {  // a row that has seen nothing yet has largest = LEAST, and 2^0 must not count
      s[n][x] = s[n][x] == LEAST ? 0.f : power(s[n][x] - largest[x / 2]);
      sum[x / 2] += s[n][x];
    }
}

// This warp's rows from `row` on of o, each times its factor -> out, as far as there are positions
template <int E>
INLINE void store_rows(u32* out, long long stride, int row, int t, const float (&o)[E / 8][4],
                       const float (&factor)[2]) {
  int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    if (row + group + 8 * r >= t) continue;
    u32* p = out + (row + group + 8 * r) * stride + member;
#pragma unroll
    for (int c = 0; c < E / 8; c++) p[4 * c] = pack(o[c][2 * r] * factor[r], o[c][2 * r + 1] * factor[r]);
  }
}
