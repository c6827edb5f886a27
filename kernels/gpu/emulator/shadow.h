// Shadow memory: who touched each byte of shared memory and of the arguments last, and whether a barrier is between.
//
// With SHADOW, g++ calls __tsan_read4(address) and its like before each access of the kernel (-fsanitize=thread, of
// which only the calls are taken, not its library). Here each byte has a Cell: its last write, and two of the
// reads since. A byte that is read before it is written is reported at the block's next barrier, or its end: if another
// thread writes it until then, that is a race. An access that a barrier does not order after those of other threads is a race:
//   - __syncthreads orders all threads of the block, __syncwarp the lanes of its mask. Shuffles and matrix
//     operations order nothing, and nothing orders two blocks.
//   - Two atomic operations never race.
//   - An asynchronous copy writes from the moment it is asked for until its thread waits; a bulk copy, until any thread
//     has waited at its barrier.
// A thread's `time` counts the barriers it has passed. `since` is its time at the block's last barrier, seen[l] the last
// time of lane l that is ordered before what the thread does now.

struct Access {
  unsigned block, time, pc;  // block: counted through all launches, 0 is none; pc: from the library's start
  uint16_t thread;
  bool atomic, comes;  // comes: an asynchronous copy that nobody has waited for
};

struct Cell { Access write, reads[2]; };

struct Range {  // a tensor's memory, and the closed memory around it
  uintptr_t begin, end, zone_begin, zone_end, element, argument;
  Cell* cells;
};

extern char __start_block_memory[] __attribute__((weak)), __stop_block_memory[] __attribute__((weak));
const size_t DYNAMIC = 256 << 10;
alignas(16) inline char dynamic_memory[DYNAMIC];
inline size_t dynamic_bytes;
inline unsigned block_number, first_block;
inline Range* ranges;
inline int n_ranges;

UNSEEN const Range* zone_of(uintptr_t at) {
  for (int i = 0; i < n_ranges; i++)
    if (ranges[i].zone_begin <= at && at < ranges[i].zone_end) return ranges + i;
  return nullptr;
}

struct Place {  // where an address is, in words
  char text[100];
  explicit Place(uintptr_t at) {
    size_t fixed = at - (uintptr_t)__start_block_memory, dynamic = at - (uintptr_t)dynamic_memory;
    const Range* r = zone_of(at);
    if (!r) {
      bool is_fixed = fixed < size_t(__stop_block_memory - __start_block_memory);
      snprintf(text, sizeof text, "%sshared memory byte %zu", is_fixed ? "" : "dynamic ", is_fixed ? fixed : dynamic);
      return;
    }
    long bytes = at - r->begin, size = r->element, element = bytes / size - (bytes % size < 0);
    long n = (r->end - r->begin) / size;
    snprintf(text, sizeof text, "argument %ld, element %ld", (long)r->argument, element);
    if (element < 0 || element >= n) snprintf(text + strlen(text), 40, " (it has %ld)", n);
  }
};

UNSEEN unsigned offset_of(const void* pc) {
  static uintptr_t start = 0;
  Dl_info info;
  if (!start && dladdr((void*)offset_of, &info)) start = (uintptr_t)info.dli_fbase;
  return (uintptr_t)pc - start;
}

struct Line { char text[20]; };  // emulator.py writes the source's line in its place
UNSEEN Line line_at(unsigned pc) {
  Line line = {};
  if (pc) snprintf(line.text, sizeof line.text, "@%x@", pc);
  return line;
}
UNSEEN Line pc_text(const void* pc) { return line_at(offset_of(pc)); }

#ifndef SHADOW
inline void begin_shadow(Range* tensors, int n) { ranges = tensors, n_ranges = n; }
inline void end_shadow() { n_ranges = 0; }
inline void order(const unsigned*, unsigned) {}
inline void order_block() {}
#define READ_HERE(at, bytes)
#define WRITE_HERE(at, bytes)
#define COPY_BEGINS(at, bytes)
#define COPY_ARRIVES(at, bytes)
#define BULK_ARRIVES(at, bytes)
template <class T> T atomicAdd(T* p, T x) { T old = *p; *p = old + x; return old; }
#else

alignas(16) inline Cell dynamic_cells[DYNAMIC];
inline Cell* fixed_cells;
enum Kind { READ, WRITE, ATOMIC, BEGIN_COPY, END_COPY, END_BULK };
const uint16_t NOBODY = 0xffff;  // who wrote what a bulk copy has brought

UNSEEN void begin_shadow(Range* tensors, int n) {
  ranges = tensors, n_ranges = n, first_block = block_number;
  for (int i = 0; i < n; i++) ranges[i].cells = (Cell*)calloc(ranges[i].end - ranges[i].begin + 1, sizeof(Cell));
  if (!fixed_cells) fixed_cells = (Cell*)calloc(__stop_block_memory - __start_block_memory + 1, sizeof(Cell));
}

UNSEEN void end_shadow() {
  for (int i = 0; i < n_ranges; i++) free(ranges[i].cells);
  n_ranges = 0;
}

// These threads of a warp have met at a barrier
UNSEEN void order(const unsigned* lanes, unsigned n) {
  unsigned seen[32] = {};
  for (unsigned k = 0; k < n; k++) {
    Thread& t = threads[lanes[k]];
    t.seen[lanes[k] % 32] = t.time++;
    for (int l = 0; l < 32; l++) seen[l] = max(seen[l], t.seen[l]);
  }
  for (unsigned k = 0; k < n; k++) memcpy(threads[lanes[k]].seen, seen, sizeof seen);
}

UNSEEN void order_block() {
  if (*unwritten) fail("");
  for (unsigned i = 0; i < n_threads; i++) threads[i].since = ++threads[i].time;
}

UNSEEN bool is_before_us(const Access& a) {
  unsigned mine = number(me);
  if (!a.block || a.thread == NOBODY) return true;
  if (a.block != block_number) return false;
  if (a.thread == mine || a.time < threads[a.thread].since) return true;
  return a.thread / 32 == mine / 32 && a.time <= me->seen[a.thread % 32];
}

UNSEEN const char* verb(bool writes, bool atomic) { return atomic ? "adds to" : writes ? "writes" : "reads"; }

[[noreturn]] __attribute__((noinline)) UNSEEN void race(const Access& a, bool a_writes, Kind kind, uintptr_t at, unsigned pc) {
  char who[100];
  int n = snprintf(who, sizeof who, "%s", Name(a.thread).text);
  *unwritten = 0;  // a thread that has not written yet
  bool elsewhere = a.block != block_number;
  uint3 b = coordinates(a.block - first_block - 1, gridDim);
  if (elsewhere) snprintf(who + n, sizeof who - n, " of block (%u, %u, %u)", b.x, b.y, b.z);
  fail("race: it %s %s%s, and %s %s it%s: %s", verb(kind != READ, kind == ATOMIC), Place(at).text, line_at(pc).text, who,
       verb(a_writes, a.atomic), line_at(a.pc).text,
       elsewhere ? "blocks run in any order" : "no barrier is between the two");
}

// How far apart two accesses are: those of other warps and blocks are ordered by less
UNSEEN int distance(const Access& a, const Access& b) { return a.block != b.block ? 2 : a.thread / 32 != b.thread / 32; }

UNSEEN void keep_read(Cell& c, const Access& now) {
  for (Access& read : c.reads)
    if (!read.block || (read.block == now.block && read.thread == now.thread)) return void(read = now);
  if (is_before_us(c.reads[0])) return void(c.reads[0] = now);
  if (is_before_us(c.reads[1])) return void(c.reads[1] = now);
  c.reads[distance(c.reads[0], now) > distance(c.reads[1], now)] = now;
}

UNSEEN void check(Cell& c, bool shared, Kind kind, uintptr_t at, unsigned pc) {
  if (shared && c.write.block != block_number) c.write = {};
  for (Access& read : c.reads)
    if (shared && read.block != block_number) read = {};
  Access now = {block_number, me->time, pc, (uint16_t)number(me), kind == ATOMIC, kind == BEGIN_COPY};
  if (kind == END_COPY || kind == END_BULK) {
    if (kind == END_BULK) now.thread = NOBODY;
    c.write = now;
    return;
  }
  if (c.write.comes)
    fail("race: it %s %s%s before the asynchronous copy of %s%s is waited for", verb(kind != READ, kind == ATOMIC),
         Place(at).text, line_at(pc).text, Name(c.write.thread).text, line_at(c.write.pc).text);
  if (shared && !c.write.block && (kind == READ || kind == ATOMIC) && !*unwritten)
    describe(unwritten, number(me), "uninitialised: it reads %s%s, which no thread of the block has written",
             Place(at).text, line_at(pc).text);
  if (!is_before_us(c.write) && !(kind == ATOMIC && c.write.atomic)) race(c.write, true, kind, at, pc);
  if (kind == READ) return keep_read(c, now);
  for (Access& read : c.reads) {
    if (!is_before_us(read)) race(read, false, kind, at, pc);
    read = {};
  }
  c.write = now;
}

UNSEEN void out_of_bounds(Kind kind, uintptr_t at, unsigned pc) {
  fail("out of bounds: it %s %s%s", verb(kind != READ, kind == ATOMIC), Place(at).text, line_at(pc).text);
}

UNSEEN void touch(const void* address, size_t bytes, Kind kind, const void* caller) {
  if (!me) return;
  uintptr_t at = (uintptr_t)address;
  size_t fixed = at - (uintptr_t)__start_block_memory, dynamic = at - (uintptr_t)dynamic_memory;
  bool is_fixed = fixed < size_t(__stop_block_memory - __start_block_memory), shared = is_fixed || dynamic < DYNAMIC;
  Cell* cells = is_fixed ? fixed_cells + fixed : dynamic_cells + dynamic;
  unsigned pc = offset_of(caller) - 1;
  if (!shared) {
    const Range* r = zone_of(at);
    if (at < 65536) fail("out of bounds: it %s a null pointer%s", verb(kind != READ, kind == ATOMIC), line_at(pc).text);
    if (!r) return;  // a variable of the thread itself
    if (at < r->begin || at >= r->end) out_of_bounds(kind, at, pc);
    if (at + bytes > r->end) out_of_bounds(kind, r->end, pc);
    cells = r->cells + (at - r->begin);
  } else if (!is_fixed && dynamic + bytes > dynamic_bytes) {
    fail("out of bounds: it %s %s%s, and the launch asks for %zu bytes", verb(kind != READ, kind == ATOMIC),
         Place(at).text, line_at(pc).text, dynamic_bytes);
  }
  for (size_t i = 0; i < bytes; i++) check(cells[i], shared, kind, at + i, pc);
}

#define CALLER __builtin_return_address(0)
#define READ_HERE(at, bytes) touch(at, bytes, READ, CALLER)
#define WRITE_HERE(at, bytes) touch(at, bytes, WRITE, CALLER)
#define COPY_BEGINS(at, bytes) touch(at, bytes, BEGIN_COPY, CALLER)
#define COPY_ARRIVES(at, bytes) touch(at, bytes, END_COPY, nullptr)
#define BULK_ARRIVES(at, bytes) touch(at, bytes, END_BULK, nullptr)

template <class T> __attribute__((noinline)) UNSEEN T atomicAdd(T* p, T x) {
  touch(p, sizeof x, ATOMIC, CALLER);
  T old = *p;
  *p = old + x;
  return old;
}

// What g++ calls. The names are given to the linker alone: compilers declare them, each in its own way.
#define CALLED(name, ...) \
  __attribute__((used)) UNSEEN void called_##name(__VA_ARGS__) __asm__("__tsan_" #name); \
  __attribute__((used)) UNSEEN void called_##name(__VA_ARGS__)
#define SIZE(n)                                                     \
  CALLED(read##n, void* at) { READ_HERE(at, n); }                   \
  CALLED(write##n, void* at) { WRITE_HERE(at, n); }                 \
  CALLED(unaligned_read##n, void* at) { READ_HERE(at, n); }         \
  CALLED(unaligned_write##n, void* at) { WRITE_HERE(at, n); }
SIZE(1) SIZE(2) SIZE(4) SIZE(8) SIZE(16)
CALLED(read_range, void* at, size_t n) { READ_HERE(at, n); }
CALLED(write_range, void* at, size_t n) { WRITE_HERE(at, n); }
CALLED(func_entry, void*) {}
CALLED(func_exit) {}
CALLED(init) {}
#endif
