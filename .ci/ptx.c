/* Runs PTX of one kernel for sm_90: one block of threads after the other, all of its lanes in step (ptx.py).

   Numbers are what a GPU gives but for the order of sums and the last bits of approximations. Beside them it refuses what a GPU
   may answer with anything: an address in no tensor, one that is not aligned; shared memory that nobody wrote, or that another
   lane wrote or still reads with no barrier between; what a copy has not brought yet (copies land when they are waited for, as
   late as they may); a product of shared memory without a fence after the write, or which changes before it is done. It does not
   see accumulators that are used too early, nor threads that meet in global memory. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LANES 1024
#define WARPS (LANES / 32)
#define GROUPS (LANES / 128) /* of four warps, which make a product together */
#define BASE 1024            /* where shared memory begins: 0 is no address of it */
#define FIRST_PLAIN @FIRST_PLAIN@

typedef uint8_t p;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int16_t s16;
typedef int32_t s32;
typedef int64_t s64;
typedef float f32;
typedef _Float16 f16;

/* operands: `count` registers from `first` on. guard: a predicate's register or -1; negated: it must be 0. */
typedef struct { s64 op, count, first, guard, negated, a, b; } Instruction;
/* What is known of a byte of shared memory: who wrote it when, who has read it, and up to which group of products it is read. */
typedef struct {
  u32 write_epoch, write_warp_epoch, write_time, read_epoch, read_warp_epoch, read_warps, products[GROUPS];
  s16 writer, reader; /* lanes; reader -1: several */
  uint8_t there, copying;
} Byte;
typedef struct { u32 to; u64 from; int size, real, lane, group; } Copy;
/* A product under way: where its operands stand and what they were. */
typedef struct { const Instruction *of; u64 a, b, content; int group, warpgroup; } Product;

static uint8_t *registers, *shared;
static Byte *known;
static int lanes, shared_end, watched; /* watched: whether this block's accesses are compared with each other */
static u32 epoch, warp_epoch[WARPS], fenced[LANES], fenced_epoch[LANES], now;
static Copy *copies;
static int copy_count, copy_room, copy_group[LANES];
static Product products[1024];
static int product_count, product_group[GROUPS], products_done[GROUPS];
static const u64 *tensors;
static u64 *written; /* of each tensor the first and the last byte that was stored to */
static int tensor_count, tensor;

static jmp_buf refusal;
static char *reason;
static int at; /* instruction */

static void refuse(const char *format, ...) {
  va_list values;
  va_start(values, format);
  vsnprintf(reason, 1024, format, values);
  va_end(values);
  longjmp(refusal, 1);
}

/* Whether lanes first .. first + n - 1 are on: an operation of a warp, or of four, is one of all their lanes. */
static int whole(const p *on, int first, int n) {
  for (int l = first; l < first + n; l++)
    if (on[l] != on[first]) refuse("lanes %d to %d part at what they do together", first, first + n - 1);
  return on[first];
}

static void *row(int number) { return registers + (size_t)number * 8 * lanes; }
static void *place(int number, int lane, int bytes) { return (uint8_t *)row(number) + (size_t)lane * bytes; }

/* Numbers */

static inline f32 float_of(u32 x) { f32 y; memcpy(&y, &x, 4); return y; }
static inline u32 bits_of(f32 x) { u32 y; memcpy(&y, &x, 4); return y; }
static inline f32 flushed(f32 x) { return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x; }
static inline f32 from_bf16(u16 x) { return float_of((u32)x << 16); }
static inline f32 from_f16(u16 x) { f16 y; memcpy(&y, &x, 2); return y; }
static inline u16 to_f16(f32 x) { f16 y = (f16)x; u16 z; memcpy(&z, &y, 2); return z; }
static inline u16 to_bf16(f32 x) {
  u32 y = bits_of(x);
  return isnan(x) ? 0x7fff : (y + 0x7fff + (y >> 16 & 1)) >> 16;
}
static inline u32 to_tf32(f32 x) { return isfinite(x) ? (bits_of(x) + 0x1000) & 0xffffe000 : bits_of(x); }
static inline u64 field(u64 x, u32 from, u32 length) {
  from &= 255, length &= 255;
  return !length || from > 63 ? 0 : x >> from & (length > 63 ? ~0ull : (1ull << length) - 1);
}
static inline s32 signed_field(s32 x, u32 from, u32 length) {
  from &= 255, length &= 255;
  if (!length) return 0;
  x >>= from > 31 ? 31 : from;
  return from + length > 31 ? x : (s32)((u32)x << (32 - length)) >> (32 - length);
}
static inline u32 permuted(u32 a, u32 b, u32 how) {
  u64 both = (u64)b << 32 | a;
  u32 y = 0;
  for (int i = 0; i < 4; i++) {
    u32 one = how >> 4 * i & 15, byte = both >> 8 * (one & 7) & 255;
    y |= (one & 8 ? (byte >> 7) * 255 : byte) << 8 * i;
  }
  return y;
}

/* Operations of one lane each, made of the table in ptx.py. */
@PLAIN@

#include "ptx_memory.h"
#include "ptx_products.h"

/* Lanes of a warp */

static void shuffle(const Instruction *in, const s32 *o, const uint8_t *on) {
  const u32 *from = row(o[1]), *by = row(o[2]);
  u32 found[LANES];
  for (int l = 0; l < lanes; l++) {
    if (!on[l]) continue;
    int own = l & 31, n = by[l] & 31, other = in->a == 0 ? own ^ n : in->a == 1 ? n : in->a == 2 ? own + n : own - n;
    if (other < 0 || other > 31) other = own;
    other += l & ~31;
    if (!on[other]) refuse("lane %d asks lane %d, which is not there", l, other);
    found[l] = from[other];
  }
  for (int l = 0; l < lanes; l++)
    if (on[l]) ((u32 *)row(o[0]))[l] = found[l];
}

static void reduce(const Instruction *in, const s32 *o, const uint8_t *on) {
  for (int w = 0; w < lanes / 32; w++) {
    if (!whole(on, 32 * w, 32)) continue;
    const u32 *x = (u32 *)row(o[1]) + 32 * w;
    u32 y = x[0];
    for (int l = 1; l < 32; l++) {
      int more = in->a < 2 ? (s32)x[l] > (s32)y : x[l] > y;
      y = in->a < 4 ? (more != (in->a & 1) ? x[l] : y) : in->a == 4 ? y + x[l] : in->a == 5 ? y | x[l] : y & x[l];
    }
    for (int l = 0; l < 32; l++) ((u32 *)row(o[0]))[32 * w + l] = y;
  }
}

/* Control */

static p active[LANES], on[LANES], waits[LANES], over[LANES];
static int next[LANES];

static void special(const Instruction *in, const s32 *o, const int *block, const int *grid) {
  for (int l = 0; l < lanes; l++)
    if (on[l]) ((u32 *)row(o[0]))[l] = in->a == 0 ? l : in->a < 3 ? 0 : in->a < 6 ? block[in->a - 3] : in->a < 9 ? grid[in->a - 6] : l & 31;
}

/* a: bytes of a part, b: of the whole. */
static void parts(const Instruction *in, const s32 *o, int together) {
  for (int l = 0; l < lanes; l++) {
    uint8_t whole[8];
    int count = in->count - 1, number = o[together ? 0 : count];
    if (!on[l]) continue;
    if (!together) memcpy(whole, place(number, l, in->b), in->b);
    for (int i = 0; i < count; i++) {
      int part = o[together ? 1 + i : i];
      if (part < 0) continue;
      if (together) memcpy(whole + i * in->a, place(part, l, in->a), in->a);
      else memcpy(place(part, l, in->a), whole + i * in->a, in->a);
    }
    if (together) memcpy(place(number, l, in->b), whole, in->b);
  }
}

/* b: bytes of the register. a: parameter, of which each is 8 bytes. */
static void parameter(const Instruction *in, const s32 *o, const u64 *given) {
  for (int l = 0; l < lanes; l++)
    if (on[l]) memcpy(place(o[0], l, in->b), given + in->a, in->b);
}

static void begin(int numbers, const u64 *constants, int constant_count) {
  memset(registers, 0xff, (size_t)numbers * 8 * lanes);
  memset(shared, 0xff, shared_end);
  memset(known, 0, sizeof(Byte) * shared_end);
  for (int i = 0; i < constant_count; i++)
    for (int l = 0; l < lanes; l++)
      memcpy(place(constants[3 * i], l, constants[3 * i + 2]), constants + 3 * i + 1, constants[3 * i + 2]);
  epoch = now = 1;
  copy_count = product_count = 0;
  for (int w = 0; w < WARPS; w++) warp_epoch[w] = 0;
  for (int g = 0; g < GROUPS; g++) product_group[g] = 1, products_done[g] = 0;
  for (int l = 0; l < lanes; l++) next[l] = waits[l] = over[l] = copy_group[l] = fenced[l] = fenced_epoch[l] = 0;
}

/* The lanes that go on: those whose next instruction is the first. Returns it, or -1; until: where others are met. */
static int who_goes_on(int end, int *until) {
  int alive = 0, waiting = 0, first = end;
  for (int l = 0; l < lanes; l++) {
    alive += !over[l];
    waiting += !over[l] && waits[l];
    if (!over[l] && !waits[l] && next[l] < first) first = next[l];
  }
  if (alive && alive == waiting) {
    memset(waits, 0, sizeof waits);
    epoch++;
    return who_goes_on(end, until);
  }
  *until = end;
  for (int l = 0; l < lanes; l++) {
    active[l] = !over[l] && !waits[l] && next[l] == first;
    if (!over[l] && !waits[l] && next[l] > first && next[l] < *until) *until = next[l];
  }
  return alive ? first : -1;
}

/* 0, or 1 with the reason and the instruction. code: `length` instructions; given: parameters; constants: register, value and
   bytes each; ranges: begin and end of each tensor; ahead(0): a block begins, ahead(1): it has waited for the launch ahead. */
int run(const Instruction *code, int length, const s32 *all_operands, int numbers, const u64 *constants, int constant_count,
        int threads, const u64 *given, int x, int y, int z, int shared_bytes, const u64 *ranges, int range_count, u64 *spans,
        void (*ahead)(int), char *said, int *where) {
  int grid[] = {x, y, z}, failed = 0;
  s64 blocks = (s64)x * y * z;
  lanes = threads, shared_end = shared_bytes + BASE, tensors = ranges, tensor_count = range_count, tensor = 0;
  reason = said, written = spans;
  for (int i = 0; i < range_count; i++) written[2 * i] = ~0ull, written[2 * i + 1] = 0;
  registers = malloc((size_t)numbers * 8 * lanes);
  shared = malloc(shared_end);
  known = malloc(sizeof(Byte) * shared_end);
  if (setjmp(refusal)) {
    failed = 1, *where = at;
    goto end;
  }
  for (s64 number = 0; number < blocks; number++) {
    int block[] = {number % x, number / x % y, number / x / y}, until, i;
    /* The first, the last, and some between, of any row and column: watching costs several times what running does. */
    watched = blocks < 8 || number == 0 || number == blocks - 1 || (u32)(number * 2654435761u) < 0xffffffffu / blocks * 4;
    begin(numbers, constants, constant_count);
    ahead(0);
    while ((i = who_goes_on(length, &until)) >= 0) {
      for (int together = 1; together;) {
        if (i >= until) { /* others are met here, or nothing follows */
          if (i >= length) refuse("the end, without a return");
          for (int l = 0; l < lanes; l++)
            if (active[l]) next[l] = i;
          break;
        }
        const Instruction *in = code + i;
        const s32 *o = all_operands + in->first;
        int full = 1;
        at = i++, now++;
        for (int l = 0; l < lanes; l++) {
          on[l] = active[l] && (in->guard < 0 || ((p *)row(in->guard))[l] != in->negated);
          full &= on[l];
        }
        switch (in->op) {
          case @bra@:
            for (int l = 0; l < lanes; l++)
              if (active[l]) next[l] = on[l] ? in->a : i;
            together = 0;
            break;
          case @ret@:
            for (int l = 0; l < lanes; l++)
              if (active[l]) over[l] = on[l], next[l] = i;
            together = 0;
            break;
          case @bar.sync@:
            for (int l = 0; l < lanes; l++)
              if (active[l]) waits[l] = on[l], next[l] = i;
            together = 0;
            break;
          case @bar.warp.sync@:
            for (int w = 0; w < lanes / 32; w++) warp_epoch[w] += whole(on, 32 * w, 32);
            break;
          case @ld.param@: parameter(in, o, given); break;
          case @ld.global@: access(in, o, on, 1, 1); break;
          case @st.global@: access(in, o, on, 1, 0); break;
          case @ld.shared@: access(in, o, on, 0, 1); break;
          case @st.shared@: access(in, o, on, 0, 0); break;
          case @ldmatrix@: matrices(in, o, on, 1); break;
          case @stmatrix@: matrices(in, o, on, 0); break;
          case @shfl.sync@: shuffle(in, o, on); break;
          case @redux.sync@: reduce(in, o, on); break;
          case @cp.async@: copy(in, o, on); break;
          case @cp.async.commit_group@:
            for (int l = 0; l < lanes; l++) copy_group[l] += on[l];
            break;
          case @cp.async.wait_group@: wait_for_copies(in, on); break;
          case @mma.sync@:
            for (int w = 0; w < lanes / 32; w++)
              if (whole(on, 32 * w, 32)) warp_product(in, o, w);
            break;
          case @wgmma.fence@: break;
          case @wgmma.mma_async@:
            if (lanes % 128) refuse("a product of four warps in a block of %d threads", lanes);
            for (int g = 0; g < lanes / 128; g++)
              if (whole(on, 128 * g, 128)) group_product(in, o, g);
            break;
          case @wgmma.commit_group@:
            for (int g = 0; g < lanes / 128; g++) product_group[g] += whole(on, 128 * g, 128);
            break;
          case @wgmma.wait_group@:
            for (int g = 0; g < lanes / 128; g++)
              if (whole(on, 128 * g, 128)) wait_for_products(g, in->a);
            break;
          case @fence.proxy.async@:
            for (int l = 0; l < lanes; l++)
              if (on[l]) fenced[l] = now, fenced_epoch[l] = epoch;
            break;
          case @griddepcontrol.wait@:
            if (whole(on, 0, lanes)) ahead(1);
            break;
          case @griddepcontrol.launch_dependents@: break;
          case @unpack@: parts(in, o, 0); break;
          case @pack@: parts(in, o, 1); break;
          case @special@: special(in, o, block, grid); break;
          default: plain[in->op - FIRST_PLAIN](o, on, full);
        }
      }
    }
    if (copy_count || product_count) refuse("%d copies and %d products are left at the end", copy_count, product_count);
  }
end:
  free(registers), free(shared), free(known);
  return failed;
}
