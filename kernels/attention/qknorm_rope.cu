// QK-norm and rotary embedding on a GPU, bfloat16 in and out, float32 inside: what runs between the projections
// and attention.
//
// 1. qknorm_rope: every head's row in one pass, one warp per row, each number read and written once. Before a vendor's
//    attention this is all that is needed.
//       out = rotate(n * weight + bias),  n = (x - mean) / std,  pairs (x[2i], x[2i+1]) as complex numbers
// 2. qknorm_rope_backward: with g = the upstream gradient rotated back and u = g * weight
//       dx = (u - mean(u) - n mean(u n)) / std,  dweight += g n,  dbias += g
//    A warp walks over rows of one head with its partial sums of dweight and dbias in registers; torch adds the parts.
//
// E even, up to 128.

#include "rows.cuh"

// x, out (rows, heads, E); weight, bias (heads, E) or null; cos_sin (rows, E/2)
extern "C" __global__ void __launch_bounds__(256)
    qknorm_rope(const u32* x, const float2* weight, const float2* bias, const float2* cos_sin, u32* out,
                long long rows, int heads, int pairs, float eps) {
  long long at = blockIdx.x * 8ll + threadIdx.x / 32;
  int lane = threadIdx.x % 32, head = at % heads;
  if (at >= rows * heads) return;
  Row r = read_row(x + at * pairs, pairs, lane);
  if (weight) {
    normalize(r, pairs, lane, eps);
    weight += head * pairs;
    bias += head * pairs;
  }
  write_rotated(out + at * pairs, r, weight, bias, cos_sin + at / heads * pairs, pairs, lane);
}

// Grid (parts, heads), one warp a block; d_weight, d_bias (parts, heads, E) float32
extern "C" __global__ void __launch_bounds__(32)
    qknorm_rope_backward(const u32* d_out, const u32* x, const float2* weight, const float2* cos_sin, u32* d_x,
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
    // 1. g: the upstream gradient, rotated back
    long long at = (row * heads + head) * pairs;
    Row g = read_row(d_out + at, pairs, lane);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      int p = lane + 32 * i;
      float2 t = p < pairs ? cos_sin[row * pairs + p] : make_float2(0.f, 0.f), y = g.x[i];
      g.x[i] = make_float2(y.x * t.x + y.y * t.y, y.y * t.x - y.x * t.y);
    }
    // 2. through the norm
    if (weight) {
      Row n = read_row(x + at, pairs, lane), un;
      float inv_std = normalize(n, pairs, lane, eps);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        dw[i] = make_float2(dw[i].x + g.x[i].x * n.x[i].x, dw[i].y + g.x[i].y * n.x[i].y);
        db[i] = make_float2(db[i].x + g.x[i].x, db[i].y + g.x[i].y);
        g.x[i] = make_float2(g.x[i].x * w[i].x, g.x[i].y * w[i].y);
        un.x[i] = make_float2(g.x[i].x * n.x[i].x, g.x[i].y * n.x[i].y);
      }
      float mean = row_sum(g) / (2 * pairs), mean_n = row_sum(un) / (2 * pairs);
#pragma unroll
      for (int i = 0; i < 2; i++)
        g.x[i] = make_float2((g.x[i].x - mean - n.x[i].x * mean_n) * inv_std,
                             (g.x[i].y - mean - n.x[i].y * mean_n) * inv_std);
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
      if (lane + 32 * i < pairs) d_x[at + lane + 32 * i] = pack_bf16(g.x[i].x, g.x[i].y);
  }
  if (!weight) return;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    int p = lane + 32 * i;
    if (p >= pairs) continue;
    long long part = ((long long)blockIdx.x * heads + head) * pairs + p;
    d_weight[part] = dw[i];
    d_bias[part] = db[i];
  }
}
