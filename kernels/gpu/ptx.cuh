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
  extern __shared__ __align__(16) char memory[];
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

#endif
