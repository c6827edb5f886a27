// The instructions that CUDA C has no word for, one small function each, named as in NVIDIA's "PTX ISA". No other file
// holds inline PTX, so kernels/gpu/emulator/emulated_ptx.h can replace this one and run the kernels on a CPU. No header
// is included, so NVRTC alone compiles it.
//
// Fragments: the 32 lanes of a warp hold a matrix together. lane = 4 * group + member; bfloat16 come in pairs, the left
// one in the low half of a register.
// clang-format off
//   A (16 x 16)  a[0]: row group,     columns 2 member, 2 member + 1      a[2]: the same row, columns + 8
//                a[1]: row group + 8, the same columns                    a[3]: the same row, columns + 8
//   B (16 x 8)   b0:   column group,  rows 2 member, 2 member + 1         b1:   the same column, rows + 8
//   C (16 x 8)   c[0], c[1]: row group,     columns 2 member, 2 member + 1
//                c[2], c[3]: row group + 8, the same columns
// clang-format on
// So two neighbouring C, packed to bfloat16, are one A: the weights of a softmax are at once an operand of P V.

#ifndef PTX_CUH
#define PTX_CUH

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define INLINE __device__ __forceinline__

// ---------------------------------------------------------------------------------------------------------------------
// Numbers

INLINE u32 pack_bf16(float low, float high) {  // two bfloat16, rounded to nearest even
  u32 y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

INLINE u16 to_bf16(float x) {
  u16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}

INLINE float exp2_approx(float x) {  // 2^x, to 2 units in the last place
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---------------------------------------------------------------------------------------------------------------------
// Shared memory

INLINE void* dynamic_shared() {  // what the launch asked for, after the arrays that the kernel declares
  extern __shared__ __align__(16) char memory[];
  return memory;
}

INLINE u32 smem_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Copy 16 bytes global -> shared without registers. Only `bytes` (0 or 16) are read, the rest becomes zeros. Both
// addresses are multiples of 16.
INLINE void cp_async(void* shared, const void* global, u32 bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}

// Close a group: all copies of this thread since the last commit.
INLINE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int N>
INLINE void cp_async_wait() {  // until at most N groups of this thread are in flight
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Load four 8 x 8 matrices of bfloat16. Lane 8 i + r gives the address of row r of matrix i (16 bytes, 16 byte
// aligned). r[i] receives, of matrix i, row group, columns 2 member and 2 member + 1.
INLINE void ldmatrix(u32 (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_address(row))
               : "memory");
}

// The same, transposed: r[i] receives column group, rows 2 member and 2 member + 1.
INLINE void ldmatrix_trans(u32 (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_address(row))
               : "memory");
}

// ---------------------------------------------------------------------------------------------------------------------
// Tensor cores

INLINE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {  // C += A B, summed in float32
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---------------------------------------------------------------------------------------------------------------------
// Hopper and later: bulk copies that count their bytes at a barrier in shared memory

#if __CUDA_ARCH__ >= 900
// Copies see the barrier at once, other threads after a __syncthreads.
INLINE void mbarrier_init(u64* barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(barrier)), "r"(arrivals) : "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

INLINE void mbarrier_expect_tx(u64* barrier, u32 bytes) {  // arrive, and add bytes to what this phase waits for
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(barrier)), "r"(bytes)
               : "memory");
}

INLINE void mbarrier_wait(u64* barrier, u32 parity) {  // until the phase of this parity is over; the first has 0
  u32 done = 0;
  while (!done)
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(done)
                 : "r"(smem_address(barrier)), "r"(parity)
                 : "memory");
}

INLINE void cp_async_bulk(void* shared, const void* global, u32 bytes, u64* barrier) {  // all three multiples of 16
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   smem_address(shared)),
               "l"(global), "r"(bytes), "r"(smem_address(barrier))
               : "memory");
}
#endif

#endif
