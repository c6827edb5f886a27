// The instructions that CUDA C has no word for, one small function each. No other file holds inline PTX, so
// kernels/gpu/emulator/emulator.h can stand in for this one and run the kernels on a CPU. Names of operands and layouts are
// those of NVIDIA's "PTX ISA"; no header is included, so NVRTC alone compiles it.
//
// Fragments: a warp's lanes hold a matrix together, lane = 4 * group + member, bfloat16 in pairs, the left one in the
// low half of a register.
//   A (16 x 16)  a[0]: row group, columns 2 member, 2 member + 1;  a[1]: row group + 8;  a[2], a[3]: the same, columns
//   + 8 B (16 x 8)   b0: rows 2 member, 2 member + 1 of column group;  b1: rows + 8 C (16 x 8)   c[0], c[1]: row group,
//   columns 2 member, 2 member + 1;  c[2], c[3]: row group + 8
// So two neighbouring C, packed, are one A.

#ifndef PTX_CUH
#define PTX_CUH

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define INLINE __device__ __forceinline__

// ---------------------------------------------------------------------------------------------------------------------
// Numbers

INLINE u32 pack(float low, float high) {  // two bfloat16, rounded to nearest even
  u32 y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

INLINE u16 narrow(float x) {  // one bfloat16
  u16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}

INLINE float power(float x) {  // 2^x, to 2 units in the last place
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---------------------------------------------------------------------------------------------------------------------
// Shared memory

INLINE void* dynamic_shared() {  // what the launch asked for, behind the arrays that are declared
  extern __shared__ __align__(1024) char memory[];
  return memory;
}

INLINE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// 16 bytes past the registers; of them `bytes` (0 or 16) are read, the others are zeros. Both addresses: multiples of
// 16.
INLINE void copy_async(void* shared, const void* global, u32 bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}

INLINE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }  // this thread's, since the last

template <int N>
INLINE void copies_wait() {  // until at most N groups of this thread are on their way
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four 8 x 8 matrices of bfloat16. Lane 8 i + r names row r of matrix i (16 bytes, 16 byte aligned) and gets in r[i] of
// each matrix row group, columns 2 member and 2 member + 1; transposed, rows 2 member and 2 member + 1 of column group.
INLINE void load_matrices(u32 (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

INLINE void load_matrices_transposed(u32 (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// ---------------------------------------------------------------------------------------------------------------------
// Tensor cores

INLINE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {  // C += A B, float32 sums
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---------------------------------------------------------------------------------------------------------------------
// Hopper and later: copies that count their bytes at a barrier in shared memory

#if __CUDA_ARCH__ >= 900
INLINE void barrier_init(u64* barrier, u32 arrivals) {  // seen by copies, too; threads see it after a __syncthreads
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

INLINE void barrier_expect(u64* barrier, u32 bytes) {  // arrives, and adds bytes to what this phase waits for
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

INLINE void barrier_wait(u64* barrier, u32 parity) {  // until the phase of this parity is over; the first has 0
  u32 done = 0;
  while (!done)
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(done)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
}

INLINE void bulk_copy(void* shared, const void* global, u32 bytes, u64* barrier) {  // all three multiples of 16
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Hopper alone: products of a warpgroup, 4 warps of 16 rows each, that run while the threads go on
//
// D (64 x 64) += A (64 x 16) B (16 x 64): warp w of the group has rows 16 w of D and A as fragments C and A above,
// eight of C side by side. Operands in shared memory are named by descriptors of tiles in rows of 128 bytes, 8 rows
// 1,024 bytes that start at a multiple of that, with the 16 bytes at place p of row r stored at place p ^ (r % 8).

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
INLINE u64 descriptor(const void* tile) {  // where it starts; 1,024 bytes from 8 rows to the next; mode 1: 128 bytes
  return (shared_address(tile) & 0x3ffff) >> 4 | 1ull << 16 | (u64)(1024 >> 4) << 32 | 1ull << 62;
}

INLINE void shared_is_written() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }  // by this thread

#define LIST_OF_D \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}"
#define TILE_OF_D(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define EACH_OF_D \
  TILE_OF_D(0), TILE_OF_D(1), TILE_OF_D(2), TILE_OF_D(3), TILE_OF_D(4), TILE_OF_D(5), TILE_OF_D(6), TILE_OF_D(7)

// No instruction: whatever was done with D stays on its side of this line, for the compiler does not know who writes
// it.
INLINE void pin(float (&d)[8][4]) { asm volatile("" : EACH_OF_D::"memory"); }

INLINE void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }  // registers are set from here on

// A and B in shared memory, both in rows of K: D = A B^T, or D += with add
INLINE void wgmma_rows(float (&d)[8][4], u64 a, u64 b, int add) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " LIST_OF_D
      ", %32, %33, p, 1, 1, 0, 0;}"
      : EACH_OF_D
      : "l"(a), "l"(b), "r"(add));
}

// A in registers, B in shared memory in rows of N: D += A B
INLINE void wgmma_columns(float (&d)[8][4], const u32 (&a)[4], u64 b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " LIST_OF_D ", {%32,%33,%34,%35}, %36, 1, 1, 1, 1;"
      : EACH_OF_D
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

INLINE void wgmma_end() {  // all of this warpgroup's products are done
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}
#endif

#endif
