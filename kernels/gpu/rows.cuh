// One head's row of E <= 128 numbers in a warp: lane l holds the pairs l and l + 32.

#include "bf16.cuh"

struct Row {
  float2 x[2];
};

INLINE Row read_row(const u32* p, int pairs, int lane) {
  Row r;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    int at = lane + 32 * i;
    u32 both = at < pairs ? p[at] : 0;
    r.x[i] = make_float2(bf16_low(both), bf16_high(both));
  }
  return r;
}

INLINE float row_sum(const Row& r) { return warp_sum(r.x[0].x + r.x[0].y + r.x[1].x + r.x[1].y); }

// Normalize to mean 0 and variance 1, in place; pairs beyond the row stay 0. Returns 1 / standard deviation.
INLINE float normalize(Row& r, int pairs, int lane, float eps) {
  float mean = row_sum(r) / (2 * pairs), square = 0.f;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    bool in = lane + 32 * i < pairs;
    r.x[i].x = in ? r.x[i].x - mean : 0.f;
    r.x[i].y = in ? r.x[i].y - mean : 0.f;
    square += r.x[i].x * r.x[i].x + r.x[i].y * r.x[i].y;
  }
  float inv_std = rsqrtf(warp_sum(square) / (2 * pairs) + eps);
#pragma unroll
  for (int i = 0; i < 2; i++) r.x[i] = make_float2(r.x[i].x * inv_std, r.x[i].y * inv_std);
  return inv_std;
}

// out = rotate(n * weight + bias). weight, bias and cos_sin are those of this row, in pairs; weight is null where there
// is no norm.
INLINE void write_rotated(u32* out, const Row& n, const float2* weight, const float2* bias, const float2* cos_sin,
                          int pairs, int lane) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    int p = lane + 32 * i;
    if (p >= pairs) continue;
    float2 y = n.x[i], t = cos_sin[p];
    if (weight) y = make_float2(y.x * weight[p].x + bias[p].x, y.y * weight[p].y + bias[p].y);
    out[p] = pack_bf16(y.x * t.x - y.y * t.y, y.y * t.x + y.x * t.y);
  }
}
