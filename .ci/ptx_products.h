/* Products of tensor cores, of ptx.c. Types: 0 tf32, 1 bf16, 2 fp16. */

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
      if (y->write_epoch == epoch) /* each of its warps reads; none of them waits for another */
        refuse("race: a product reads byte %d of shared memory, which lane %d wrote: no barrier", i - BASE, y->writer);
      if (fenced[y->writer] <= y->write_time && fenced_epoch[128 * group] <= y->write_epoch)
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
    if (x.warpgroup != group || x.group > done) products[left++] = x;
    else if (operands(&x) != x.content) refuse("what a product reads was overwritten before it was done");
  }
  product_count = left;
  if (done > products_done[group]) products_done[group] = done;
}

