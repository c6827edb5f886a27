// The functions of kernels/gpu/ptx.cuh for the emulator, each written after NVIDIA's "PTX ISA".

#define PTX_CUH
#define INLINE inline

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

UNSEEN u16 to_bf16(float x) {
  u32 bits = __float_as_uint(x);
  if (x != x) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline u32 pack_bf16(float low, float high) { return to_bf16(low) | (u32)to_bf16(high) << 16; }
inline float exp2_approx(float x) { return exp2f(x); }
UNSEEN float half_to_float(u32 word, int half) { return __uint_as_float(half ? word & 0xffff0000u : word << 16); }

inline void* dynamic_shared() { return dynamic_memory; }

inline void check_aligned(const void* p, unsigned n, const char* what) {
  if ((uintptr_t)p % n) fail("%s at an address that is not a multiple of %u", what, n);
}

// ---------------------------------------------------------------------------------------------------------------------
// Copies. `descending` lets them arrive as late as they may.

UNSEEN void arrive(const Copy& c) {
  memcpy(c.to, c.from, c.bytes);
  memset((char*)c.to + c.bytes, 0, c.of - c.bytes);
}

UNSEEN void cp_async(void* shared, const void* global, u32 bytes) {
  check_aligned(shared, 16, "cp.async to");
  check_aligned(global, 16, "cp.async from");
  READ_HERE(global, bytes);
  COPY_BEGINS(shared, 16);
  Copy copy = {shared, global, bytes, 16, nullptr};
  if (!descending) arrive(copy);
  if (me->groups.empty()) me->groups.emplace_back();
  me->groups.back().push_back(copy);
}

UNSEEN void cp_async_commit() {
  if (me->groups.empty()) me->groups.emplace_back();
  me->groups.emplace_back();
}

template <int N> UNSEEN void cp_async_wait() {
  while (me->groups.size() > N + 1) {  // the last group is not committed
    for (const Copy& copy : me->groups.front()) {
      if (descending) arrive(copy);
      COPY_ARRIVES(copy.to, 16);
    }
    me->groups.erase(me->groups.begin());
  }
}

UNSEEN u32 matrix_element(const void* const* rows, int matrix, int line, int column) {
  return ((const u16*)of_lane(rows, 8 * matrix + line))[column];
}

UNSEEN void ldmatrix(u32 (&r)[4], const void* row, bool transposed) {
  const void* const* rows = exchange(row, "ldmatrix");
  int group = LANE / 4, member = LANE % 4;
  for (int i = 0; i < 4; i++)
    r[i] = transposed ? matrix_element(rows, i, 2 * member, group) | matrix_element(rows, i, 2 * member + 1, group) << 16
                      : matrix_element(rows, i, group, 2 * member) | matrix_element(rows, i, group, 2 * member + 1) << 16;
}
UNSEEN void ldmatrix(u32 (&r)[4], const void* row) {
  check_aligned(row, 16, "ldmatrix");
  READ_HERE(row, 16);
  ldmatrix(r, row, false);
}
UNSEEN void ldmatrix_trans(u32 (&r)[4], const void* row) {
  check_aligned(row, 16, "ldmatrix");
  READ_HERE(row, 16);
  ldmatrix(r, row, true);
}

// ---------------------------------------------------------------------------------------------------------------------
// mma.m16n8k16, bfloat16: "Matrix fragments for mma.m16n8k16 with floating point type"

struct Operands { u32 a[4], b[2]; };

UNSEEN void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  const Operands* all = exchange(Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}}, "mma");
  int group = LANE / 4, member = LANE % 4;
  for (int i = 0; i < 4; i++) {
    int row = i < 2 ? group : group + 8, column = member * 2 + (i & 1);
    float sum = 0;
    for (int k = 0; k < 16; k++) {
      u32 left = of_lane(all, row % 8 * 4 + k % 8 / 2).a[(row >= 8) + 2 * (k >= 8)];
      u32 right = of_lane(all, column * 4 + k % 8 / 2).b[k >= 8];
      sum += half_to_float(left, k % 2) * half_to_float(right, k % 2);
    }
    c[i] += sum;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// mbarrier: bits 0-19 arrivals this phase still waits for, 20-39 arrivals of a phase, 40-62 bytes, 63 the phase

UNSEEN void pass(u64* barrier, u32 arrivals, long long bytes) {
  u64 left = *barrier & 0xfffff, all = *barrier >> 20 & 0xfffff;
  u64 due = (*barrier >> 40 & 0x7fffff) + bytes, phase = *barrier >> 63;
  if (arrivals > left) fail("more threads arrive at a barrier than it was made for");
  left -= arrivals;
  if (!left && !due) left = all, phase ^= 1;
  *barrier = left | all << 20 | due << 40 | phase << 63;
}

UNSEEN void mbarrier_init(u64* barrier, u32 arrivals) { *barrier = arrivals | (u64)arrivals << 20; }

UNSEEN void mbarrier_expect_tx(u64* barrier, u32 bytes) {
  *barrier += (u64)bytes << 40;
  pass(barrier, 1, 0);
}

UNSEEN void arrive_bulk(const Copy& copy) {
  if (descending) arrive(copy);
  BULK_ARRIVES(copy.to, copy.bytes);
  pass(copy.barrier, 0, -(long long)copy.bytes);
}

UNSEEN void mbarrier_wait(u64* barrier, u32 parity) {
  while (*barrier >> 63 == parity) {
    if (bulk.empty()) {
      sync(POLLS, 0, false, "a barrier's phase");
    } else {
      arrive_bulk(bulk.front());
      bulk.erase(bulk.begin());
    }
  }
}

UNSEEN void cp_async_bulk(void* shared, const void* global, u32 bytes, u64* barrier) {
  check_aligned(shared, 16, "a bulk copy to");
  check_aligned(global, 16, "a bulk copy from");
  if (bytes % 16) fail("a bulk copy of %u bytes, not a multiple of 16", bytes);
  Copy copy = {shared, global, bytes, bytes, barrier};
  READ_HERE(global, bytes);
  COPY_BEGINS(shared, bytes);
  if (!descending) arrive(copy);
  bulk.push_back(copy);
}
