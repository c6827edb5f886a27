// Runs CUDA kernels on a CPU: g++ compiles an unchanged .cu file after this header (see emulator.py). It finds mistakes
// and is slow; blocks run one after the other.
//
// A thread of a block is a fibre with a stack of its own. It yields only where CUDA's threads synchronise: at
// __syncthreads, and at operations that a warp does together. What this finds:
//   - Threads that do not synchronise, or do so at different places, end the launch with a sentence instead of hanging.
//   - A warp runs as far as it can before another warp does, in two orders. Ascending: asynchronous copies arrive at
//     once. Descending: they arrive only when a thread waits for them. A missing barrier or wait shows in one
//     of the two.
//   - Shared memory starts as NaN in each block, and bytes after the dynamic part must not change.
//   - Misaligned addresses and addresses outside every tensor end the launch.
// Left out: clusters, textures, cooperative launches, flushing of denormals, and all timing.

#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <type_traits>
#include <utility>
#include <vector>

// ---------------------------------------------------------------------------------------------------------------------
// CUDA C

#define __global__ __attribute__((used))
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static __attribute__((section("block_memory")))

struct uint3 { unsigned x, y, z; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

template <class T> T min(T a, T b) { return a < b ? a : b; }
template <class T> T max(T a, T b) { return a > b ? a : b; }
template <class To, class From> To same_bits(From x) { To y; memcpy(&y, &x, sizeof y); return y; }
inline float __uint_as_float(unsigned x) { return same_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return same_bits<unsigned>(x); }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline float __fdividef(float x, float y) { return x / y; }
#define __log2f log2f
#define __logf logf
#define __expf expf
const int warpSize = 32;
template <class T> T __ldg(const T* p) { return *p; }
template <class T> T atomicAdd(T* p, T x) { T old = *p; *p = old + x; return old; }
template <class T> void __stcs(T* p, T x) { *p = x; }

// ---------------------------------------------------------------------------------------------------------------------
// Threads

uint3 threadIdx, blockIdx, blockDim, gridDim;  // not static: every synchronisation may change them

struct Copy {
  void* to;
  const void* from;
  unsigned bytes, of;  // bytes read, and bytes written; the difference is zeros
  unsigned long long* barrier;
};

struct Thread {
  jmp_buf at;
  ucontext_t start;
  bool started, done;
  unsigned waits_for;  // neighbours to synchronise with; 0 while it runs, POLL while it polls
  const char* where;
  int parity;  // which of two buffers its next operand of an exchange goes to
  std::vector<std::vector<Copy>> groups;  // asynchronous copies in flight; the last group is open
};

const unsigned POLL = ~0u;
const size_t STACK = 64 << 10;
inline std::vector<Thread> threads;
inline Thread* me;
inline jmp_buf scheduler, launcher;
inline bool descending;
inline std::vector<Copy> bulk;  // bulk copies in flight
inline char message[400], *stacks, operands[2][1024 * 64];
inline std::function<void()> body;

template <class... A> [[noreturn]] void fail(const char* format, A... a) {
  const uint3& b = blockIdx;
  int n = snprintf(message, sizeof message, "block (%u, %u, %u), thread %u: ", b.x, b.y, b.z, threadIdx.x);
  snprintf(message + n, sizeof message - n, format, a...);
  _longjmp(launcher, 1);
}

__attribute__((noinline)) inline void sync(unsigned n, const char* where) {  // returns when n neighbours are here
  me->waits_for = n;
  me->where = where;
  if (!_setjmp(me->at)) _longjmp(scheduler, 1);
}

inline void __syncthreads() { sync(blockDim.x, "__syncthreads"); }
inline void __syncwarp(unsigned = ~0u) { sync(32, "__syncwarp"); }

// The operands of all 32 lanes for an operation that the warp does together, in the order of the lanes
template <class T> const T* exchange(const T& mine, const char* where) {
  static_assert(sizeof(T) <= 64, "larger than its slot");
  T* slots = (T*)(operands[me->parity ^= 1] + threadIdx.x / 32 * 32 * 64);
  memcpy(slots + threadIdx.x % 32, &mine, sizeof mine);
  sync(32, where);
  return slots;  // valid until the operation after the next
}

// The number of another lane; beyond the warp, a lane keeps its own
template <class T> T shuffle(unsigned mask, T x, unsigned lane, const char* where) {
  if (mask != ~0u) fail("a shuffle of part of a warp is not emulated");
  return exchange(x, where)[lane < 32 ? lane : threadIdx.x % 32];
}
template <class T> T __shfl_sync(unsigned mask, T x, int lane) { return shuffle(mask, x, lane & 31, "__shfl_sync"); }
template <class T> T __shfl_xor_sync(unsigned mask, T x, int lanes) {
  return shuffle(mask, x, threadIdx.x % 32 ^ lanes, "__shfl_xor_sync");
}
template <class T> T __shfl_down_sync(unsigned mask, T x, unsigned n) {
  return shuffle(mask, x, threadIdx.x % 32 + n, "__shfl_down_sync");
}
template <class T> T __shfl_up_sync(unsigned mask, T x, unsigned n) {
  return shuffle(mask, x, threadIdx.x % 32 - n, "__shfl_up_sync");
}

inline void run_fibre() {
  body();
  me->done = true;
  _longjmp(scheduler, 1);
}

inline void resume(unsigned i) {
  me = &threads[i];
  threadIdx = {i, 0, 0};
  if (_setjmp(scheduler)) return;
  if (me->started) _longjmp(me->at, 1);
  me->started = true;
  getcontext(&me->start);
  me->start.uc_stack.ss_sp = stacks + i * STACK;
  me->start.uc_stack.ss_size = STACK;
  makecontext(&me->start, run_fibre, 0);
  setcontext(&me->start);
}

// Resume thread i and its neighbours if all of them wait at the same place
inline bool release(unsigned i) {
  Thread& first = threads[i];
  unsigned n = first.waits_for, begin = i / n * n;
  for (unsigned j = begin; j < begin + n; j++) {
    Thread& other = threads[j];
    if (other.done && n == blockDim.x) continue;  // __syncthreads does not wait for threads that have left
    threadIdx.x = j;
    if (other.done) fail("it has left, but %s of thread %u needs it", first.where, i);
    if (!other.waits_for || other.waits_for == POLL) return false;
    if (other.waits_for < n) return false;  // it waits for fewer threads, and may still come
    if (other.waits_for == n && other.where != first.where)
      fail("it is at %s, thread %u at %s", other.where, i, first.where);
    if (other.waits_for > n) fail("it waits at %s, where thread %u's %s needs it", other.where, i, first.where);
  }
  for (unsigned j = begin; j < begin + n; j++) threads[j].waits_for = 0;
  return true;
}

// Run a warp until all of its threads wait for other warps. Returns whether any thread advanced.
inline bool run_warp(unsigned first) {
  bool moved = false, again = true;
  while (again) {
    again = false;
    for (unsigned n = 0; n < 32; n++) {
      unsigned i = first + (descending ? 31 - n : n);
      if (threads[i].done || threads[i].waits_for) continue;
      resume(i);
      moved |= threads[i].waits_for != POLL;
    }
    for (unsigned i = first; i < first + 32; i++) again |= !threads[i].done && threads[i].waits_for == 32 && release(i);
  }
  return moved;
}

inline void run_block() {
  threads.assign(blockDim.x, Thread{});
  bulk.clear();
  for (unsigned idle = 0;;) {
    bool moved = false;
    for (unsigned n = 0; n < blockDim.x; n += 32) moved |= run_warp(descending ? blockDim.x - 32 - n : n);
    for (unsigned i = 0; i < blockDim.x; i++) {
      Thread& t = threads[i];
      if (t.waits_for == POLL) t.waits_for = 0;
      else if (t.waits_for && !t.done) moved |= release(i);
    }
    unsigned waits = 0;
    while (waits < blockDim.x && threads[waits].done) waits++;
    if (waits == blockDim.x) return;
    idle = moved ? 0 : idle + 1;
    threadIdx.x = waits;
    if (idle > 2) fail("it waits at %s for ever", threads[waits].where);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Launches

extern char __start_block_memory[] __attribute__((weak)), __stop_block_memory[] __attribute__((weak));
const size_t DYNAMIC = 256 << 10;
alignas(16) inline char dynamic_memory[DYNAMIC];

inline void on_signal(int number) {
  fail(number == SIGILL ? "an array's index or an address's alignment is wrong" : "an address is outside every tensor");
}

template <class... A, size_t... I> void call(void (*kernel)(A...), void** at, std::index_sequence<I...>) {
  kernel(*(A*)at[I]...);
}

template <class T> constexpr char kind() {  // p: a pointer, f: a float, i and l: whole numbers of 32 and 64 bits
  return std::is_pointer<T>() ? 'p' : std::is_floating_point<T>() ? 'f' : sizeof(T) == 8 ? 'l' : 'i';
}

// kinds: of the arguments that are given; sizes: grid x, y, z, block, bytes of dynamic shared memory, descending.
// Returns what went wrong, or null.
template <class... A> const char* launch(void (*kernel)(A...), const char* kinds, const int* sizes, void** arguments) {
  const char wanted[] = {kind<A>()..., 0};
  if (strcmp(kinds, wanted)) {
    snprintf(message, sizeof message, "the call gives %s where the kernel takes %s", kinds, wanted);
    return message;
  }
  if (!stacks) stacks = (char*)malloc(1024 * STACK);
  gridDim = {(unsigned)sizes[0], (unsigned)sizes[1], (unsigned)sizes[2]};
  blockDim = {(unsigned)sizes[3], 1, 1};
  descending = sizes[5];
  body = [&] { call(kernel, arguments, std::index_sequence_for<A...>()); };
  const int signals[] = {SIGILL, SIGSEGV, SIGBUS, SIGFPE};
  struct sigaction ours = {}, before[4];
  ours.sa_handler = on_signal;
  ours.sa_flags = SA_NODEFER;
  for (int i = 0; i < 4; i++) sigaction(signals[i], &ours, before + i);
  bool failed = _setjmp(launcher);
  if (!failed)
    for (blockIdx.z = 0; blockIdx.z < gridDim.z; blockIdx.z++)
      for (blockIdx.y = 0; blockIdx.y < gridDim.y; blockIdx.y++)
        for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++) {
          memset(dynamic_memory, 0xff, DYNAMIC);
          if (__start_block_memory) memset(__start_block_memory, 0xff, __stop_block_memory - __start_block_memory);
          run_block();
          for (size_t i = sizes[4]; i < DYNAMIC; i++)
            if (dynamic_memory[i] != (char)0xff) fail("it writes after the %d bytes of shared memory", sizes[4]);
        }
  for (int i = 0; i < 4; i++) sigaction(signals[i], before + i, nullptr);
  return failed ? message : nullptr;
}
