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
// With SHADOW, shadow.h sees each access to memory as well.
// Left out: clusters, textures, cooperative launches, flushing of denormals, and all timing.

#include <dlfcn.h>
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <functional>
#include <type_traits>
#include <utility>
#include <vector>

#define UNSEEN __attribute__((no_sanitize_thread)) inline  // the emulator's own accesses to memory are not the kernel's

#include "cuda_words.h"

// ---------------------------------------------------------------------------------------------------------------------
// Threads

uint3 threadIdx, blockIdx, blockDim, gridDim;  // not static: every synchronisation may change them
const int warpSize = 32;

struct Copy {
  void* to;
  const void* from;
  unsigned bytes, of;  // bytes read, and bytes written; the difference is zeros
  unsigned long long* barrier;
};

enum State { RUNS, POLLS, AT_WARP, AT_BLOCK, LEFT, ABSENT };  // ABSENT: lanes of the last warp that the block lacks

struct Thread {
  jmp_buf at;
  ucontext_t start;
  bool started;
  State state;
  const char* where;  // the operation that it waits at, and its line
  unsigned mask;      // lanes that must come there
  bool orders;        // whether memory written before the operation is seen by the others after it
  unsigned bytes;     // of the operand that it brings
  unsigned time, since, seen[32];                  // for shadow.h
  std::vector<std::vector<Copy>> groups;           // asynchronous copies in flight; the last group is open
  alignas(16) char operand[64];
};

const size_t STACK = 512 << 10, CLOSED = 4 << 10;  // of a thread, as much as on a GPU, after closed memory
const unsigned MOST = 1024;  // threads of a block
inline Thread threads[MOST];
inline Thread* me;
inline unsigned n_threads, n_lanes;  // of this block, and with the lanes that its last warp lacks
inline jmp_buf scheduler, launcher;
inline bool descending;
inline std::vector<Copy> bulk;  // bulk copies in flight
const int LONGEST = 1000;
inline char message[LONGEST], unwritten[LONGEST], *stacks;  // unwritten: a read of shared memory to complain of
alignas(16) inline char received[MOST][64];  // operands of the operation that a warp has just done
inline std::function<void()> body;

UNSEEN unsigned number(const Thread* t) { return t - threads; }

UNSEEN uint3 coordinates(unsigned i, uint3 of) { return {i % of.x, i / of.x % of.y, i / of.x / of.y}; }

struct Name {  // of a thread: a number in a block of one dimension
  char text[40];
  explicit Name(unsigned i) {
    uint3 t = coordinates(i, blockDim);
    bool row = blockDim.y == 1 && blockDim.z == 1;
    row ? snprintf(text, sizeof text, "thread %u", i) : snprintf(text, sizeof text, "thread (%u, %u, %u)", t.x, t.y, t.z);
  }
};

template <class... A> void describe(char* text, unsigned thread, const char* format, A... a) {
  const uint3& b = blockIdx;
  int n = snprintf(text, LONGEST, "block (%u, %u, %u), %s: ", b.x, b.y, b.z, Name(thread).text);
  snprintf(text + n, LONGEST - n, format, a...);
}

template <class... A> [[noreturn]] void fail_in(unsigned thread, const char* format, A... a) {
  *unwritten ? (void)strcpy(message, unwritten) : describe(message, thread, format, a...);
  _longjmp(launcher, 1);
}

template <class... A> [[noreturn]] void fail(const char* format, A... a) { fail_in(number(me), format, a...); }

__attribute__((noinline)) UNSEEN void sync(State state, unsigned mask, bool orders, const char* where) {
  me->state = state;
  me->mask = mask;
  me->orders = orders;
  me->where = where;
  if (!_setjmp(me->at)) _longjmp(scheduler, 1);
}

#define TEXT_OF(x) #x
#define LINE_OF(line) TEXT_OF(line)
#define SITE(name) name " (" __FILE__ ":" LINE_OF(__LINE__) ")"
#define __syncthreads() sync(AT_BLOCK, 0, true, SITE("__syncthreads"))
#define __syncwarp(...) sync_warp(SITE("__syncwarp"), ##__VA_ARGS__)

UNSEEN void sync_lanes(unsigned mask, bool orders, const char* where) {
  if (!(mask >> number(me) % 32 & 1)) fail("the mask %#x of its %s leaves out the thread itself", mask, where);
  sync(AT_WARP, mask, orders, where);
}

UNSEEN void sync_warp(const char* where, unsigned mask = ~0u) { sync_lanes(mask, true, where); }

// The operands of all 32 lanes for an operation that they do together. It does not order memory.
template <class T> UNSEEN const T* exchange(const T& mine, const char* where, unsigned mask = ~0u) {
  static_assert(sizeof(T) <= 64, "larger than its slot");
  memcpy(me->operand, &mine, me->bytes = sizeof mine);
  sync_lanes(mask, false, where);
  return (const T*)received[number(me) / 32 * 32];  // valid until the next operation
}

// Operands lie 64 bytes apart
template <class T> UNSEEN const T& of_lane(const T* all, unsigned lane) { return *(const T*)((const char*)all + 64 * lane); }

// The number of another lane; beyond the `width` lanes of its part of the warp, a lane keeps its own
template <class T> UNSEEN T shuffle(const char* where, unsigned mask, T x, int lane, int width) {
  int mine = number(me) % 32, begin = mine / width * width;
  if (lane < begin || lane >= begin + width) lane = mine;
  const T* all = exchange(x, where, mask);
  if (mask >> lane & 1 && threads[number(me) / 32 * 32 + lane].state != ABSENT) return of_lane(all, lane);
  memset(&x, 0xff, sizeof x);  // undefined on a GPU; NaN here
  return x;
}

#define LANE ((int)(number(me) % 32))
template <class T> UNSEEN T shfl(const char* where, unsigned mask, T x, int lane, int width = 32) {
  return shuffle(where, mask, x, LANE / width * width + lane % width, width);
}
template <class T> UNSEEN T shfl_xor(const char* where, unsigned mask, T x, int lanes, int width = 32) {
  return shuffle(where, mask, x, LANE ^ lanes, width);
}
template <class T> UNSEEN T shfl_down(const char* where, unsigned mask, T x, unsigned n, int width = 32) {
  return shuffle(where, mask, x, LANE + n, width);
}
template <class T> UNSEEN T shfl_up(const char* where, unsigned mask, T x, unsigned n, int width = 32) {
  return shuffle(where, mask, x, LANE - n, width);
}
#define __shfl_sync(...) shfl(SITE("__shfl_sync"), __VA_ARGS__)
#define __shfl_xor_sync(...) shfl_xor(SITE("__shfl_xor_sync"), __VA_ARGS__)
#define __shfl_down_sync(...) shfl_down(SITE("__shfl_down_sync"), __VA_ARGS__)
#define __shfl_up_sync(...) shfl_up(SITE("__shfl_up_sync"), __VA_ARGS__)

#include "shadow.h"

// ---------------------------------------------------------------------------------------------------------------------
// Scheduler

inline void run_fibre() {
  body();
  me->state = LEFT;
  _longjmp(scheduler, 1);
}

UNSEEN void resume(unsigned i) {
  me = &threads[i];
  threadIdx = coordinates(i, blockDim);
  if (_setjmp(scheduler)) return;
  if (me->started) _longjmp(me->at, 1);
  me->started = true;
  getcontext(&me->start);
  me->start.uc_stack.ss_sp = stacks + i * (STACK + CLOSED) + CLOSED;
  me->start.uc_stack.ss_size = STACK;
  makecontext(&me->start, run_fibre, 0);
  setcontext(&me->start);
}

// Let thread i and the lanes of its mask run if all of them wait at the same place
UNSEEN bool release_lanes(unsigned i) {
  Thread& first = threads[i];
  unsigned lanes[32], n = 0;
  for (unsigned j = i / 32 * 32; j < i / 32 * 32 + 32; j++) {
    Thread& other = threads[j];
    if (!(first.mask >> j % 32 & 1) || other.state == ABSENT) continue;
    if (other.state == LEFT) fail_in(j, "it has left, but %s of %s needs it", first.where, Name(i).text);
    if (other.state == AT_BLOCK) fail_in(j, "it waits at %s, where the %s of %s needs it", other.where, first.where, Name(i).text);
    if (other.state != AT_WARP) return false;
    if (strcmp(other.where, first.where)) fail_in(j, "it is at %s, %s at %s", other.where, Name(i).text, first.where);
    if (other.mask != first.mask) fail_in(j, "the mask of its %s is %#x, that of %s %#x", first.where, other.mask, Name(i).text, first.mask);
    lanes[n++] = j;
  }
  for (unsigned k = 0; k < n; k++) {
    Thread& other = threads[lanes[k]];
    memcpy(received[lanes[k]], other.operand, other.bytes);
    other.state = RUNS;
  }
  if (first.orders) order(lanes, n);
  return true;
}

// Let the block run if all of its threads wait at one __syncthreads; it does not wait for threads that have left
UNSEEN bool release_block() {
  Thread* first = nullptr;
  for (unsigned i = 0; i < n_threads; i++) {
    Thread& t = threads[i];
    if (t.state == LEFT) continue;
    if (t.state != AT_BLOCK) return false;
    if (!first) first = &t;
    if (strcmp(t.where, first->where)) fail_in(i, "it is at %s, %s at %s", t.where, Name(number(first)).text, first->where);
  }
  if (!first) return false;
  for (unsigned i = 0; i < n_threads; i++)
    if (threads[i].state == AT_BLOCK) threads[i].state = RUNS;
  order_block();
  return true;
}

// Run a warp until all of its threads wait for other warps. Returns whether any thread advanced.
UNSEEN bool run_warp(unsigned first) {
  bool moved = false, again = true;
  while (again) {
    again = false;
    for (unsigned n = 0; n < 32; n++) {
      unsigned i = first + (descending ? 31 - n : n);
      if (threads[i].state != RUNS) continue;
      resume(i);
      moved |= threads[i].state != POLLS;
    }
    for (unsigned i = first; i < first + 32; i++) again |= threads[i].state == AT_WARP && release_lanes(i);
  }
  return moved;
}

UNSEEN void begin_block() {
  n_threads = blockDim.x * blockDim.y * blockDim.z;
  n_lanes = (n_threads + 31) / 32 * 32;
  for (unsigned i = 0; i < n_lanes; i++) {
    threads[i] = Thread{};
    threads[i].state = i < n_threads ? RUNS : ABSENT;
    threads[i].time = 1;
  }
  *unwritten = 0;
  bulk.clear();
}

UNSEEN void run_block() {
  begin_block();
  for (unsigned idle = 0;;) {
    bool moved = false;
    for (unsigned n = 0; n < n_lanes; n += 32) moved |= run_warp(descending ? n_lanes - 32 - n : n);
    for (unsigned i = 0; i < n_threads; i++)
      if (threads[i].state == POLLS) threads[i].state = RUNS;
    moved |= release_block();
    unsigned waits = 0;
    while (waits < n_threads && threads[waits].state == LEFT) waits++;
    if (waits == n_threads) return *unwritten ? fail("") : void();
    idle = moved ? 0 : idle + 1;
    if (idle > 2) fail_in(waits, "it waits at %s for ever", threads[waits].where);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Launches

// Stacks grow downwards, so the closed memory before a thread's stack is what it touches when it needs more
UNSEEN size_t open_stacks(size_t n) {
  size_t bytes = n * (STACK + CLOSED);
  stacks = (char*)mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  for (size_t i = 0; i < n && stacks != MAP_FAILED; i++) mprotect(stacks + i * (STACK + CLOSED), CLOSED, PROT_NONE);
  return bytes;
}

inline void on_signal(int number, siginfo_t* info, void*) {
  size_t in_stacks = (char*)info->si_addr - stacks;
  if (number == SIGFPE) fail("a whole number is divided by zero%s", pc_text(info->si_addr).text);
  if (number != SIGILL && in_stacks < n_threads * (STACK + CLOSED)) fail("its arrays and calls need more than 512 KB");
  if (number == SIGILL) fail("an array's index or an address's alignment is wrong%s", pc_text(info->si_addr).text);
  const Range* range = zone_of((uintptr_t)info->si_addr);
  if (range) fail("out of bounds: it touches %s", Place((uintptr_t)info->si_addr).text);
  fail("an address is outside every tensor");
}

template <class... A, size_t... I> void call(void (*kernel)(A...), void** at, std::index_sequence<I...>) {
  kernel(*(A*)at[I]...);
}

template <class T> constexpr char kind() {  // p: a pointer, f and d: floating point, i and l: whole numbers; 32 and 64 bits
  return std::is_pointer<T>() ? 'p' : std::is_floating_point<T>() ? sizeof(T) == 8 ? 'd' : 'f' : sizeof(T) == 8 ? 'l' : 'i';
}

UNSEEN void run_grid() {
  for (blockIdx.z = 0; blockIdx.z < gridDim.z; blockIdx.z++)
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; blockIdx.y++)
      for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++) {
        memset(dynamic_memory, 0xff, DYNAMIC);
        if (__start_block_memory) memset(__start_block_memory, 0xff, __stop_block_memory - __start_block_memory);
        block_number++;
        run_block();
        for (size_t i = dynamic_bytes; i < DYNAMIC; i++)
          if (dynamic_memory[i] != (char)0xff) fail("it writes after the %zu bytes of shared memory", dynamic_bytes);
      }
}

// kinds: of the arguments that are given; sizes: grid x, y, z, block x, y, z, bytes of dynamic shared memory,
// descending, number of ranges. Returns what went wrong, or null.
template <class... A>
const char* launch(void (*kernel)(A...), const char* kinds, const int* sizes, void** arguments, Range* tensors) {
  const char wanted[] = {kind<A>()..., 0};
  if (strcmp(kinds, wanted)) {
    snprintf(message, sizeof message, "the call gives %s where the kernel takes %s (p: a tensor, i and l: an int of 32 and 64 bits, f and d: a float)",
             kinds, wanted);
    return message;
  }
  gridDim = {(unsigned)sizes[0], (unsigned)sizes[1], (unsigned)sizes[2]};
  blockDim = {(unsigned)sizes[3], (unsigned)sizes[4], (unsigned)sizes[5]};
  dynamic_bytes = sizes[6];
  descending = sizes[7];
  size_t stack_bytes = open_stacks(blockDim.x * blockDim.y * blockDim.z);
  if (stacks == MAP_FAILED) return strcpy(message, "there is no memory for its threads");
  begin_shadow(tensors, sizes[8]);
  body = [&] { call(kernel, arguments, std::index_sequence_for<A...>()); };
  const int signals[] = {SIGILL, SIGSEGV, SIGBUS, SIGFPE};
  struct sigaction ours = {}, before[4];
  ours.sa_sigaction = on_signal;
  ours.sa_flags = SA_NODEFER | SA_SIGINFO | SA_ONSTACK;  // a thread's own stack may be full
  for (int i = 0; i < 4; i++) sigaction(signals[i], &ours, before + i);
  static char own[64 << 10];
  stack_t handlers = {own, 0, sizeof own}, handlers_before;
  sigaltstack(&handlers, &handlers_before);
  bool failed = _setjmp(launcher);
  if (!failed) run_grid();
  me = nullptr;
  end_shadow();
  for (int i = 0; i < 4; i++) sigaction(signals[i], before + i, nullptr);
  sigaltstack(&handlers_before, nullptr);
  munmap(stacks, stack_bytes);
  return failed ? message : nullptr;
}
