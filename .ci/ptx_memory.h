/* Global and shared memory, and copies from one to the other, of ptx.c. */

static void in_a_tensor(u64 address, int bytes, int lane) {
  for (int tried = 0; tried < tensor_count; tried++, tensor = (tensor + 1) % tensor_count)
    if (address >= tensors[2 * tensor] && address + bytes <= tensors[2 * tensor + 1]) return;
  refuse("lane %d: address %llx lies in none of the launch's tensors", lane, (unsigned long long)address);
}

static void in_shared(u32 address, int bytes, int lane) {
  if (address < BASE || (u64)address + bytes > (u64)shared_end)
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
    if (x->read_warps == 1u << warp && x->read_warp_epoch != warp_epoch[warp]) x->reader = lane;
    if (x->reader != lane) x->reader = -1;
    x->read_warps |= 1u << warp;
    x->read_warp_epoch = warp_epoch[warp];
  }
}

/* Replicas of one sum, made in another order: which of them is written does not matter. Terms of a size of 1 may cancel, so of
   values below 1.5e-7 no difference is seen. */
static int alike(const uint8_t *values, u32 address, u32 i, int bytes) {
  f32 one, other;
  if (values[i - address] == shared[i]) return 1;
  if (bytes % 4 || known[i].write_time != now) return 0;
  memcpy(&one, values + ((i - address) & ~3u), 4);
  memcpy(&other, shared + (i & ~3u), 4);
  return fabsf(one - other) <= 1e-6f * (fabsf(one) + fabsf(other)) + 3e-7f;
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
  if (all > 16) refuse("%d bytes at once", all);
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
    if (real > (u32)size) refuse("lane %d: a copy of %u of %d bytes", l, real, size);
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
  for (int w = 0; w < lanes / 32; w++) {
    if (!whole(on, 32 * w, 32)) continue;
    u16 x[4][8][8];
    u32 addresses[32]; /* a result may be their register */
    memcpy(addresses, (u32 *)row(o[0]) + 32 * w, sizeof addresses);
    for (int m = 0; m < in->count - 1; m++) {
      for (int r = 0; load && r < 8; r++) {
        int lane = 32 * w + 8 * m + r;
        reads(addresses[8 * m + r] + (u32)in->a, 16, lane);
        memcpy(x[m][r], shared + addresses[8 * m + r] + (u32)in->a, 16);
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
      store_shared(addresses[i] + (u32)in->a, x[i / 8][i % 8], 16, 32 * w + i);
  }
}

