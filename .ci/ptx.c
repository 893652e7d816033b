/* Runs PTX of one kernel for sm_90: one block of threads after the other, all of its lanes in step (ptx.py).

   Numbers are what a GPU gives but for the order of sums and the last bits of approximations. Beside them it refuses what a GPU
   may answer with anything: an address in no tensor, one that is not aligned; shared memory that nobody wrote, or that another
   lane wrote or still reads with no barrier between; what a copy has not brought yet (copies land when they are waited for, as
   late as they may); a product of shared memory without a fence after the write, or whose operands change before it is done. */
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
  s16 writer, reader; /* lanes; -1: several */
  uint8_t there, copying;
} Byte;
typedef struct { u32 to; u64 from; int size, real, lane, group; } Copy;
/* A product under way: where its operands stand and what they were. */
typedef struct { const Instruction *of; u64 a, b, content; int group, warps; } Product;

static uint8_t *registers, *shared;
static Byte *known;
static int lanes, shared_end, watched; /* watched: whether this block's accesses are compared with each other */
static u32 epoch, warp_epoch[WARPS], fenced[LANES], now;
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

/* Memory */

static void in_a_tensor(u64 address, int bytes, int lane) {
  for (int tried = 0; tried < tensor_count; tried++, tensor = (tensor + 1) % tensor_count)
    if (address >= tensors[2 * tensor] && address + bytes <= tensors[2 * tensor + 1]) return;
  refuse("lane %d: address %llx lies in none of the launch's tensors", lane, (unsigned long long)address);
}

static void in_shared(u32 address, int bytes, int lane) {
  if (address < BASE || address + bytes > (u32)shared_end)
    refuse("lane %d: byte %d of %d in shared memory", lane, (int)address - BASE, shared_end - BASE);
  if (address % bytes) refuse("lane %d: byte %d of shared memory is not aligned to %d", lane, (int)address - BASE, bytes);
}

static void reads(u32 address, int bytes, int lane) {
  in_shared(address, bytes, lane);
  for (u32 i = address; watched && i < address + bytes; i++) {
    Byte *x = known + i;
    int warp = lane >> 5;
    if (x->copying) refuse("lane %d reads byte %d of shared memory, which is being copied", lane, i - BASE);
    if (!x->there) refuse("lane %d reads byte %d of shared memory, which nothing wrote", lane, i - BASE);
    if (x->writer != lane && x->write_epoch == epoch && (x->writer >> 5 != warp || x->write_warp_epoch == warp_epoch[warp]))
      refuse("race: lane %d reads byte %d of shared memory, which lane %d wrote: no barrier", lane, i - BASE, x->writer);
    if (x->read_epoch != epoch) x->read_epoch = epoch, x->read_warps = 0, x->reader = lane;
    if (x->reader != lane) x->reader = -1;
    x->read_warps |= 1u << warp;
    x->read_warp_epoch = warp_epoch[warp];
  }
}

/* Replicas of one sum, made in another order: which of them is written does not matter. */
static int alike(const uint8_t *values, u32 address, u32 i, int bytes) {
  f32 one, other;
  if (values[i - address] == shared[i]) return 1;
  if (bytes % 4 || known[i].write_time != now) return 0;
  memcpy(&one, values + ((i - address) & ~3u), 4);
  memcpy(&other, shared + (i & ~3u), 4);
  return fabsf(one - other) <= 1e-5f * (fabsf(one) + fabsf(other));
}

/* Before a write; values: of lanes that may write the same, else NULL. */
static void writes(u32 address, int bytes, int lane, const uint8_t *values) {
  in_shared(address, bytes, lane);
  for (u32 i = address; watched && i < address + bytes; i++) {
    Byte *x = known + i;
    int warp = lane >> 5;
    if (x->copying) refuse("lane %d writes byte %d of shared memory, which is being copied", lane, i - BASE);
    for (int g = 0; g < lanes / 128; g++)
      if (x->products[g] > (u32)products_done[g])
        refuse("race: lane %d writes byte %d of shared memory, which a product still reads", lane, i - BASE);
    if (x->read_epoch == epoch && x->read_warps)
      if (x->read_warps & ~(1u << warp) || (x->reader != lane && x->read_warp_epoch == warp_epoch[warp]))
        refuse("race: lane %d writes byte %d of shared memory, which others read: no barrier", lane, i - BASE);
    if (x->there && x->write_epoch == epoch && x->writer != lane && !(values && alike(values, address, i, bytes)))
      if (x->writer >> 5 != warp || x->write_warp_epoch == warp_epoch[warp])
        refuse("race: lanes %d and %d write byte %d of shared memory", lane, x->writer, i - BASE);
  }
}

static void wrote(u32 address, int bytes, int lane) {
  for (u32 i = address; watched && i < address + bytes; i++) {
    Byte *x = known + i;
    x->there = 1, x->copying = 0, x->writer = lane;
    x->write_epoch = epoch, x->write_warp_epoch = warp_epoch[lane >> 5], x->write_time = now;
  }
}

static void store_shared(u32 address, const void *values, int bytes, int lane) {
  writes(address, bytes, lane, values);
  memcpy(shared + address, values, bytes);
  wrote(address, bytes, lane);
}

/* Vectors of in->count - 1 registers at register 0 + a; b: bytes of one, and of its register << 8. */
static void access(const Instruction *in, const s32 *o, const uint8_t *on, int global, int load) {
  int bytes = in->b & 255, wide = in->b >> 8, count = in->count - 1, all = bytes * count;
  uint8_t values[LANES][16];
  for (int l = 0; l < lanes; l++) {
    if (!on[l]) continue;
    u64 address = global ? ((u64 *)row(o[0]))[l] + in->a : (u64)(((u32 *)row(o[0]))[l] + (u32)in->a);
    if (global) {
      if (address % all) refuse("lane %d: address %llx is not aligned to %d", l, (unsigned long long)address, all);
      in_a_tensor(address, all, l);
    }
    if (load) {
      if (!global) reads(address, all, l);
      memcpy(values[l], global ? (void *)address : shared + address, all);
      continue;
    }
    for (int i = 0; i < count; i++) memcpy(values[l] + i * bytes, place(o[1 + i], l, wide), bytes);
    if (!global) {
      store_shared(address, values[l], all, l);
      continue;
    }
    memcpy((void *)address, values[l], all);
    u64 *span = written + 2 * tensor;
    if (address < span[0]) span[0] = address;
    if (address + all > span[1]) span[1] = address + all;
  }
  for (int l = 0; load && l < lanes; l++)
    for (int i = 0; on[l] && i < count; i++) {
      memset(place(o[1 + i], l, wide), 0, wide);
      memcpy(place(o[1 + i], l, wide), values[l] + i * bytes, bytes);
    }
}

static void land(const Copy *x) {
  memset(shared + x->to, 0, x->size);
  if (x->real) memcpy(shared + x->to, (void *)x->from, x->real);
  wrote(x->to, x->size, x->lane);
}

/* cp.async of a bytes, b: offsets of both addresses. */
static void copy(const Instruction *in, const s32 *o, const uint8_t *on) {
  int size = in->a;
  for (int l = 0; l < lanes; l++) {
    if (!on[l]) continue;
    u32 to = ((u32 *)row(o[0]))[l] + (u32)in->b, real = ((u32 *)row(o[2]))[l];
    u64 from = ((u64 *)row(o[1]))[l] + (in->b >> 32);
    if (real && from % size) refuse("lane %d: a copy from %llx is not aligned to %d", l, (unsigned long long)from, size);
    if (real) in_a_tensor(from, real, l);
    writes(to, size, l, NULL);
    for (u32 i = to; i < to + size; i++) known[i].copying = 1;
    if (copy_count == copy_room) copies = realloc(copies, sizeof(Copy) * (copy_room = 2 * copy_room + 1024));
    copies[copy_count++] = (Copy){to, from, size, real, l, copy_group[l]};
  }
}

static void wait_for_copies(const Instruction *in, const uint8_t *on) {
  int left = 0;
  for (int i = 0; i < copy_count; i++) {
    Copy x = copies[i];
    if (on[x.lane] && x.group < copy_group[x.lane] - in->a) land(&x);
    else copies[left++] = x;
  }
  copy_count = left;
}

/* Eight rows of eight 16 bit numbers each, of which lane l of a warp holds two of row l / 4; b: transposed. */
static void matrices(const Instruction *in, const s32 *o, const uint8_t *on, int load) {
  const u32 *addresses = row(o[0]);
  for (int w = 0; w < lanes / 32; w++) {
    if (!on[32 * w]) continue;
    u16 x[4][8][8];
    for (int m = 0; m < in->count - 1; m++) {
      for (int r = 0; load && r < 8; r++) {
        int lane = 32 * w + 8 * m + r;
        reads(addresses[lane] + (u32)in->a, 16, lane);
        memcpy(x[m][r], shared + addresses[lane] + (u32)in->a, 16);
      }
      for (int l = 0; l < 32; l++)
        for (int half = 0; half < 2; half++) {
          int r = l / 4, c = 2 * (l % 4) + half;
          u16 *one = in->b ? &x[m][c][r] : &x[m][r][c], *held = (u16 *)place(o[1 + m], 32 * w + l, 4) + half;
          if (load) *held = *one;
          else *one = *held;
        }
    }
    for (int i = 0; !load && i < 8 * ((int)in->count - 1); i++)
      store_shared(addresses[32 * w + i] + (u32)in->a, x[i / 8][i % 8], 16, 32 * w + i);
  }
}

/* Lanes of a warp */

static void shuffle(const Instruction *in, const s32 *o, const uint8_t *on) {
  const u32 *from = row(o[1]), *by = row(o[2]);
  u32 found[LANES];
  for (int l = 0; l < lanes; l++) {
    if (!on[l]) continue;
    int own = l & 31, other = in->a == 0 ? own ^ (int)by[l] : in->a == 1 ? (int)(by[l] & 31) : in->a == 2 ? own + (int)by[l] : own - (int)by[l];
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
    if (!on[32 * w]) continue;
    const u32 *x = (u32 *)row(o[1]) + 32 * w;
    u32 y = x[0];
    for (int l = 1; l < 32; l++) {
      int more = in->a < 2 ? (s32)x[l] > (s32)y : x[l] > y;
      y = in->a < 4 ? (more != (in->a & 1) ? x[l] : y) : in->a == 4 ? y + x[l] : in->a == 5 ? y | x[l] : y & x[l];
    }
    for (int l = 0; l < 32; l++) ((u32 *)row(o[0]))[32 * w + l] = y;
  }
}

/* Products. Types: 0 tf32, 1 bf16, 2 fp16. */

static f32 narrow(u32 x, int type, int half) {
  return type == 0 ? float_of(x & 0xffffe000) : type == 1 ? from_bf16(x >> 16 * half) : from_f16(x >> 16 * half);
}

/* Registers of a left operand [16,k] of a warp: lane l has rows l / 4 and l / 4 + 8, a register of it 4 bytes of them. */
static void left_rows(f32 *x, int stride, const s32 *o, int count, int type, int warp) {
  for (int n = 0; n < count; n++) {
    const u32 *held = (u32 *)row(o[n]) + 32 * warp;
    f32 *to = x + 8 * (n & 1) * stride + (type ? 8 : 4) * (n / 2);
    if (type == 0)
      for (int l = 0; l < 32; l++) to[l / 4 * stride + l % 4] = narrow(held[l], 0, 0);
    else
      for (int l = 0; l < 64; l++) to[l / 8 * stride + l % 8] = narrow(held[l / 2], type, l & 1);
  }
}

/* c [16,n] of a warp is added to, or put into, registers of four for each eight columns. */
static void put_rows(const f32 *c, int stride, const s32 *to, const s32 *from, int blocks, int warp) {
  for (int n = 0; n < 4 * blocks; n++) {
    f32 *y = (f32 *)row(to[n]) + 32 * warp;
    const f32 *x = c + 8 * (n / 2 % 2) * stride + 8 * (n / 4) + n % 2, *z = from ? (f32 *)row(from[n]) + 32 * warp : NULL;
    for (int l = 0; l < 32; l++) y[l] = x[l / 4 * stride + 2 * (l % 4)] + (z ? z[l] : 0);
  }
}

static void multiply(f32 *c, int stride, const f32 *a, const f32 *b, int m, int n, int k) {
  for (int i = 0; i < m; i++, c += stride, a += 16) {
    memset(c, 0, n * sizeof(f32));
    for (int x = 0; x < k; x++)
      for (int j = 0; j < n; j++) c[j] += a[x] * b[x * stride + j];
  }
}

/* mma.sync m16n8k(a) of type b: operands d, a, b, c. */
static void warp_product(const Instruction *in, const s32 *o, int warp) {
  int type = in->b, per_k = in->a / (type ? 8 : 4);
  const s32 *right = o + 4 + 2 * per_k;
  f32 a[16][16], b[16][8], c[16][8];
  left_rows(a[0], 16, o + 4, 2 * per_k, type, warp);
  for (int n = 0; n < per_k; n++) {
    const u32 *held = (u32 *)row(right[n]) + 32 * warp;
    for (int l = 0; l < 32; l++)
      for (int half = 0; half < (type ? 2 : 1); half++)
        b[type ? 2 * (l % 4) + 8 * n + half : l % 4 + 4 * n][l / 4] = narrow(held[l], type, half);
  }
  multiply(c[0], 8, a[0], b[0], 16, 8, in->a);
  put_rows(c[0], 8, o, right + per_k, 1, warp);
}

/* Where number k of row `line` of an operand stands by its descriptor (PTX ISA, "Matrix descriptor"); transposed: lines are
   contiguous. Numbers of `size` bytes, sixteen bytes of them together. */
static u32 by_descriptor(u64 x, int line, int k, int size, int transposed) {
  static const int row_bytes[] = {16, 128, 64, 32};
  u32 start = (x & 0x3fff) << 4, leading = (x >> 16 & 0x3fff) << 4, stride = (x >> 32 & 0x3fff) << 4, y;
  int mode = x >> 62, bytes = row_bytes[mode], unit = 16 / size;
  if (x >> 49 & 7) refuse("a descriptor with a base offset");
  if (!transposed && mode) y = start + line / 8 * stride + line % 8 * bytes + k * size;
  else if (!transposed) y = start + line / 8 * stride + line % 8 * 16 + k / unit * leading + k % unit * size;
  else if (mode) y = start + line / (bytes / size) * leading + line % (bytes / size) * size + k % 8 * bytes + k / 8 * stride;
  else y = start + line / unit * stride + line % unit * size + k % 8 * 16 + k / 8 * leading;
  return mode ? y ^ (y >> 7 & (8 >> (mode - 1)) - 1) << 4 : y;
}

typedef struct { u64 at; int lines, k, size, transposed; } Operand;

/* For each sixteen bytes of an operand: where they stand, and which number is their first. */
#define EACH_UNIT(x, address, line, n)                                                        \
  for (int line = 0; line < (x).lines; line += (x).transposed ? 16 / (x).size : 1)             \
    for (int n = 0, address; n < (x).k && (address = by_descriptor((x).at, line, n, (x).size, (x).transposed), 1); \
         n += (x).transposed ? 1 : 16 / (x).size)

static void product_reads(Operand x, int group) {
  EACH_UNIT(x, address, line, n) {
    in_shared(address, 16, 128 * group);
    for (int i = address; watched && i < address + 16; i++) {
      Byte *y = known + i;
      if (y->copying) refuse("a product reads byte %d of shared memory, which is being copied", i - BASE);
      if (!y->there) refuse("a product reads byte %d of shared memory, which nothing wrote", i - BASE);
      if (y->write_epoch == epoch && y->writer >> 7 != group)
        refuse("race: a product reads byte %d of shared memory, which lane %d wrote: no barrier", i - BASE, y->writer);
      if (fenced[y->writer] <= y->write_time && fenced[128 * group] <= y->write_time)
        refuse("a product reads byte %d of shared memory, which lane %d wrote: no fence", i - BASE, y->writer);
      if (y->read_epoch != epoch) y->read_epoch = epoch, y->read_warps = 0;
      y->read_warps |= 15u << 4 * group, y->reader = -1, y->read_warp_epoch = warp_epoch[4 * group];
      y->products[group] = product_group[group];
    }
  }
}

static void fetch(Operand x, int type, f32 *to, int line_stride, int k_stride) {
  EACH_UNIT(x, address, line, n)
    for (int i = 0; i < 16 / x.size; i++) {
      u32 bits = 0;
      memcpy(&bits, shared + address + i * x.size, x.size);
      to[(line + (x.transposed ? i : 0)) * line_stride + (n + (x.transposed ? 0 : i)) * k_stride] = narrow(bits, type, 0);
    }
}

static u64 content(Operand x, u64 sum) {
  EACH_UNIT(x, address, line, n)
    for (int i = 0; i < 16; i += 8) {
      u64 part;
      memcpy(&part, shared + address + i, 8);
      sum = (sum ^ part) * 0x9e3779b97f4a7c15ull;
      sum ^= sum >> 29;
    }
  return sum;
}

/* wgmma m64n(a)k(b & 255): operands b's descriptor, scale of d, a (its descriptor or four registers), d.
   b: k, type << 8, transposed a << 12 and b << 13. */
static Operand right_of(const Instruction *in, u64 descriptor) {
  return (Operand){descriptor, in->a, in->b & 255, in->b >> 8 & 15 ? 2 : 4, in->b >> 13 & 1};
}
static Operand left_of(const Instruction *in, u64 descriptor) {
  return (Operand){descriptor, 64, in->b & 255, in->b >> 8 & 15 ? 2 : 4, in->b >> 12 & 1};
}
static int left_is_shared(const Instruction *in) { return in->count == 3 + in->a / 2; }
static u64 operands(const Product *x) {
  u64 sum = content(right_of(x->of, x->b), 1);
  return left_is_shared(x->of) ? content(left_of(x->of, x->a), sum) : sum;
}

static u64 descriptor(int number, int group) {
  const u64 *x = (u64 *)row(number) + 128 * group;
  for (int l = 1; l < 128; l++)
    if (x[l] != x[0]) refuse("lanes of a product differ in its descriptor");
  return x[0];
}

/* The sums are there at once; that they are asked for in time is the compiler's to see. */
static void group_product(const Instruction *in, const s32 *o, int group) {
  static f32 a[64][16], b[16][256], c[64][256];
  int type = in->b >> 8 & 15, by_descriptors = left_is_shared(in);
  const s32 *to = o + (by_descriptors ? 3 : 6);
  Product x = {in, 0, descriptor(o[0], group), 0, product_group[group], group};
  product_reads(right_of(in, x.b), group);
  fetch(right_of(in, x.b), type, b[0], 1, 256);
  if (by_descriptors) {
    x.a = descriptor(o[2], group);
    product_reads(left_of(in, x.a), group);
    fetch(left_of(in, x.a), type, a[0], 16, 1);
  } else
    for (int w = 0; w < 4; w++) left_rows(a[16 * w], 16, o + 2, 4, type, 4 * group + w);
  multiply(c[0], 256, a[0], b[0], 64, in->a, in->b & 255);
  int adds = ((p *)row(o[1]))[128 * group];
  for (int w = 0; w < 4; w++) put_rows(c[16 * w], 256, to, adds ? to : NULL, in->a / 8, 4 * group + w);
  x.content = operands(&x);
  if (product_count == 1024) refuse("1024 products are under way");
  products[product_count++] = x;
}

static void wait_for_products(int group, int but) {
  int left = 0, done = product_group[group] - 1 - but;
  for (int i = 0; i < product_count; i++) {
    Product x = products[i];
    if (x.warps != group || x.group > done) products[left++] = x;
    else if (operands(&x) != x.content) refuse("what a product reads was overwritten before it was done");
  }
  product_count = left;
  if (done > products_done[group]) products_done[group] = done;
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
  for (int l = 0; l < lanes; l++) next[l] = waits[l] = over[l] = copy_group[l] = fenced[l] = 0;
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
  s64 blocks = (s64)x * y * z, some = blocks / 5 + 1;
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
    watched = number % some == 0 || number == blocks - 1; /* all take the same ways */
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
              if (active[l]) waits[l] = 1, next[l] = i;
            together = 0;
            break;
          case @bar.warp.sync@:
            for (int w = 0; w < lanes / 32; w++) warp_epoch[w] += on[32 * w];
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
              if (on[32 * w]) warp_product(in, o, w);
            break;
          case @wgmma.fence@: break;
          case @wgmma.mma_async@:
            for (int g = 0; g < lanes / 128; g++)
              if (on[128 * g]) group_product(in, o, g);
            break;
          case @wgmma.commit_group@:
            for (int g = 0; g < lanes / 128; g++) product_group[g] += on[128 * g];
            break;
          case @wgmma.wait_group@:
            for (int g = 0; g < lanes / 128; g++)
              if (on[128 * g]) wait_for_products(g, in->a);
            break;
          case @fence.proxy.async@:
            for (int l = 0; l < lanes; l++)
              if (on[l]) fenced[l] = now;
            break;
          case @griddepcontrol.wait@: ahead(1); break;
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
