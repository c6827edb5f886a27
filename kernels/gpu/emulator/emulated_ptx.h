// The functions of kernels/gpu/ptx.cuh for the emulator, each written after NVIDIA's "PTX ISA".

#define PTX_CUH
#define INLINE inline

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

inline u16 to_bf16(float x) {
  u32 bits = __float_as_uint(x);
  if (x != x) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline u32 pack_bf16(float low, float high) { return to_bf16(low) | (u32)to_bf16(high) << 16; }
inline float exp2_approx(float x) { return exp2f(x); }
inline float half_to_float(u32 word, int half) { return __uint_as_float(half ? word & 0xffff0000u : word << 16); }

inline void* dynamic_shared() { return dynamic_memory; }

inline void check_aligned(const void* p, unsigned n, const char* what) {
  if ((uintptr_t)p % n) fail("%s at an address that is not a multiple of %u", what, n);
}

// ---------------------------------------------------------------------------------------------------------------------
// Copies. `descending` lets them arrive as late as they may.

inline void arrive(const Copy& c) {
  memcpy(c.to, c.from, c.bytes);
  memset((char*)c.to + c.bytes, 0, c.of - c.bytes);
}

inline void cp_async(void* shared, const void* global, u32 bytes) {
  check_aligned(shared, 16, "cp.async to");
  check_aligned(global, 16, "cp.async from");
  Copy copy = {shared, global, bytes, 16, nullptr};
  if (!descending) return arrive(copy);
  if (me->groups.empty()) me->groups.emplace_back();
  me->groups.back().push_back(copy);
}

inline void cp_async_commit() {
  if (me->groups.empty()) me->groups.emplace_back();
  me->groups.emplace_back();
}

template <int N> void cp_async_wait() {
  while (me->groups.size() > N + 1) {  // the last group is not committed
    for (const Copy& copy : me->groups.front()) arrive(copy);
    me->groups.erase(me->groups.begin());
  }
}

inline void ldmatrix(u32 (&r)[4], const void* row, bool transposed) {
  check_aligned(row, 16, "ldmatrix");
  const void* const* rows = exchange(row, "ldmatrix");
  int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
  for (int i = 0; i < 4; i++) {
    auto at = [&](int line, int column) -> u32 { return ((const u16*)rows[8 * i + line])[column]; };
    r[i] = transposed ? at(2 * member, group) | at(2 * member + 1, group) << 16
                      : at(group, 2 * member) | at(group, 2 * member + 1) << 16;
  }
}
inline void ldmatrix(u32 (&r)[4], const void* row) { ldmatrix(r, row, false); }
inline void ldmatrix_trans(u32 (&r)[4], const void* row) { ldmatrix(r, row, true); }

// ---------------------------------------------------------------------------------------------------------------------
// mma.m16n8k16, bfloat16: "Matrix fragments for mma.m16n8k16 with floating point type"

inline void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  struct Operands { u32 a[4], b[2]; };
  const Operands* all = exchange(Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}}, "mma");
  int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
  for (int i = 0; i < 4; i++) {
    int row = i < 2 ? group : group + 8, column = member * 2 + (i & 1);
    float sum = 0;
    for (int k = 0; k < 16; k++) {
      u32 left = all[row % 8 * 4 + k % 8 / 2].a[(row >= 8) + 2 * (k >= 8)];
      u32 right = all[column * 4 + k % 8 / 2].b[k >= 8];
      sum += half_to_float(left, k % 2) * half_to_float(right, k % 2);
    }
    c[i] += sum;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// mbarrier: bits 0-19 arrivals this phase still waits for, 20-39 arrivals of a phase, 40-62 bytes, 63 the phase

inline void pass(u64* barrier, u32 arrivals, long long bytes) {
  u64 left = *barrier & 0xfffff, all = *barrier >> 20 & 0xfffff;
  u64 due = (*barrier >> 40 & 0x7fffff) + bytes, phase = *barrier >> 63;
  if (arrivals > left) fail("more threads arrive at a barrier than it was made for");
  left -= arrivals;
  if (!left && !due) left = all, phase ^= 1;
  *barrier = left | all << 20 | due << 40 | phase << 63;
}

inline void mbarrier_init(u64* barrier, u32 arrivals) { *barrier = arrivals | (u64)arrivals << 20; }

inline void mbarrier_expect_tx(u64* barrier, u32 bytes) {
  *barrier += (u64)bytes << 40;
  pass(barrier, 1, 0);
}

inline void arrive_bulk(const Copy& copy) {
  arrive(copy);
  pass(copy.barrier, 0, -(long long)copy.bytes);
}

inline void mbarrier_wait(u64* barrier, u32 parity) {
  while (*barrier >> 63 == parity) {
    if (bulk.empty()) {
      sync(POLL, "a barrier's phase");
    } else {
      arrive_bulk(bulk.front());
      bulk.erase(bulk.begin());
    }
  }
}

inline void cp_async_bulk(void* shared, const void* global, u32 bytes, u64* barrier) {
  check_aligned(shared, 16, "a bulk copy to");
  check_aligned(global, 16, "a bulk copy from");
  if (bytes % 16) fail("a bulk copy of %u bytes, not a multiple of 16", bytes);
  Copy copy = {shared, global, bytes, bytes, barrier};
  descending ? bulk.push_back(copy) : arrive_bulk(copy);
}
