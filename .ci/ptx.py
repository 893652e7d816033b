"""PTX of Triton's kernels for sm_90, run on a CPU: read here, run by ptx.c, which says what is refused.

    program = Program(text)
    program.run(grid, parameters, shared, tensors)

What Triton 3.6 and 3.7 make of this project's kernels is known; another operation is refused by name. Meanings: PTX ISA 8.8.
"""

import ctypes
import functools
import itertools
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from recipelin_kernels import cpu

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ("-O3", "-fno-strict-aliasing", "-fwrapv", "-ffp-contract=off", "-fno-math-errno", "-w", "-shared", "-fPIC")
Plain = tuple[str, list[str], str]  # type of the result, types of the operands a, b, c, and the result in C


class Refused(AssertionError):
    """What a GPU may answer with anything."""


def _whole(bits: int) -> Iterable[tuple[str, Plain]]:
    """Operations of integers of so many bits."""
    u, s, b = f"u{bits}", f"s{bits}", f"b{bits}"
    for name, sign in {"or": "|", "and": "&", "xor": "^"}.items():
        yield f"{name}.{b}", (u, [u, u], f"a {sign} b")
    yield f"not.{b}", (u, [u], "~a")
    for kind in (u, s, b):
        yield f"mov.{kind}", (u, [u], "a")
        yield f"selp.{kind}", (u, [u, u, "p"], "c ? a : b")
    yield f"shl.{b}", (u, [u, "u32"], f"b < {bits} ? ({u})(a << b) : 0")
    yield f"shr.{b}", (u, [u, "u32"], f"b < {bits} ? a >> b : 0")
    yield f"shr.{u}", (u, [u, "u32"], f"b < {bits} ? a >> b : 0")
    yield f"shr.{s}", (s, [s, "u32"], f"a >> (b < {bits} ? b : {bits - 1})")
    for kind in (u, s):
        for name, sign in {"add": "+", "sub": "-", "mul.lo": "*"}.items():
            yield f"{name}.{kind}", (u, [u, u], f"a {sign} b")
        yield f"mad.lo.{kind}", (u, [u, u, u], "a * b + c")
        yield f"max.{kind}", (kind, [kind, kind], "a > b ? a : b")
        yield f"min.{kind}", (kind, [kind, kind], "a < b ? a : b")
    yield f"neg.{s}", (u, [u], "-a")
    yield f"abs.{s}", (s, [s], "a < 0 ? -a : a")
    for name, sign in COMPARED.items():
        for kind in (u, s, b):
            if kind != b or name in ("eq", "ne"):
                yield f"setp.{name}.{kind}", ("p", [u if kind == b else kind] * 2, f"a {sign} b")
    for name, sign in {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}.items():
        yield f"setp.{name}.{u}", ("p", [u, u], f"a {sign} b")
    for kind in (u, s):
        yield f"cvt.rn.f32.{kind}", ("f32", [kind], "(f32)a")


def _wide() -> Iterable[tuple[str, Plain]]:
    """Of 32 bits, some with results of 64."""
    for one, two in (("u16", "u32"), ("s16", "s32"), ("u32", "u64"), ("s32", "s64")):
        yield f"mul.wide.{one}", (two, [one, one], f"({two})a * b")
        yield f"mad.wide.{one}", (two, [one, one, two], f"({two})a * b + c")
        yield f"mul.hi.{one}", (one, [one, one], f"({two})a * b >> {one[1:]}")
        signed = one[0] == "s"  # of which the least by -1 is none
        yield f"div.{one}", (one, [one, one], f"!b ? -1 : {'b == -1 ? -a : ' * signed}a / b")
        yield f"rem.{one}", (one, [one, one], f"!b ? a : {'b == -1 ? 0 : ' * signed}a % b")
    yield "max.relu.s32", ("s32", ["s32", "s32"], "a > b ? (a > 0 ? a : 0) : (b > 0 ? b : 0)")
    yield "bfe.u32", ("u32", ["u32"] * 3, "field(a, b, c)")
    yield "bfe.u64", ("u64", ["u64", "u32", "u32"], "field(a, b, c)")
    yield "bfe.s32", ("s32", ["s32", "u32", "u32"], "signed_field(a, b, c)")
    yield "prmt.b32", ("u32", ["u32"] * 3, "permuted(a, b, c)")
    for to in (16, 32, 64):
        for of in (8, 16, 32, 64):
            for held in (n for n in (16, 32, 64) if n >= of):  # the register may be wider than what is taken of it
                for x, y in itertools.product("us", repeat=2):
                    taken = f"({'int' if y == 's' else 'uint'}{of}_t)a"
                    yield f"cvt.{x}{to}.{y}{of}{_held(held, of)}", (f"{x}{to}", [f"u{held}"], f"({x}{to}){taken}")


def _held(held: int, of: int) -> str:
    """What the name of a conversion out of a wider register ends with."""
    return f" of {held}" if held != max(of, 16) else ""


def _floating() -> Iterable[tuple[str, Plain]]:
    one, two, three = (["f32"] * n for n in (1, 2, 3))
    for name, sign in {"add": "+", "sub": "-", "mul": "*"}.items():
        for rounded in ("", ".rn"):
            yield f"{name}{rounded}.f32", ("f32", two, f"a {sign} b")
            yield f"{name}{rounded}.ftz.f32", ("f32", two, f"flushed(flushed(a) {sign} flushed(b))")
        halves = [f"(u32)to_bf16(from_bf16(a >> {n}) {sign} from_bf16(b >> {n})) << {n}" for n in (16, 0)]
        yield f"{name}.bf16x2", ("u32", ["u32", "u32"], " | ".join(halves))
    yield "fma.rn.f32", ("f32", three, "fmaf(a, b, c)")
    yield "fma.rn.ftz.f32", ("f32", three, "flushed(fmaf(flushed(a), flushed(b), flushed(c)))")
    for name, value in {"neg": "-a", "abs": "fabsf(a)"}.items():
        yield f"{name}.f32", ("f32", one, value)
        yield f"{name}.ftz.f32", ("f32", one, f"flushed({value})")
    for name, sign in {"max": ">", "min": "<"}.items():
        yield f"{name}.f32", ("f32", two, f"isnan(a) ? b : isnan(b) || a {sign} b ? a : b")
        yield f"{name}.NaN.f32", ("f32", two, f"isnan(a) || isnan(b) ? NAN : a {sign} b ? a : b")
    for name in ("full", "rn", "approx"):
        yield f"div.{name}.f32", ("f32", two, "a / b")
    for name, value in {
        "ex2": "exp2f({})",
        "lg2": "log2f({})",
        "rcp": "1 / {}",
        "rsqrt": "1 / sqrtf({})",
        "sqrt": "sqrtf({})",
    }.items():
        yield f"{name}.approx.f32", ("f32", one, value.format("a"))
        yield f"{name}.approx.ftz.f32", ("f32", one, f"flushed({value.format('flushed(a)')})")
    for name, sign in COMPARED.items():
        yield f"setp.{name}.f32", ("p", two, "(a < b) | (a > b)" if name == "ne" else f"a {sign} b")
        yield f"setp.{name}u.f32", ("p", two, "a != b" if name == "ne" else f"a {sign} b || isnan(a) || isnan(b)")
    yield "setp.num.f32", ("p", two, "!isnan(a) && !isnan(b)")
    yield "setp.nan.f32", ("p", two, "isnan(a) || isnan(b)")
    yield "selp.f32", ("u32", ["u32", "u32", "p"], "c ? a : b")
    yield "mov.f32", ("u32", ["u32"], "a")
    yield "cvt.rna.tf32.f32", ("u32", one, "to_tf32(a)")
    yield "cvt.f32.bf16", ("f32", ["u16"], "from_bf16(a)")
    yield "cvt.f32.f16", ("f32", ["u16"], "from_f16(a)")
    for kind in ("bf16", "f16"):
        yield f"cvt.rn.{kind}.f32", ("u16", one, f"to_{kind}(a)")
        yield f"cvt.rn.{kind}x2.f32", ("u32", two, f"(u32)to_{kind}(a) << 16 | to_{kind}(b)")
    yield (
        "cvt.rzi.s32.f32",
        ("s32", one, "isnan(a) ? 0 : a >= 0x1p31f ? INT32_MAX : a <= -0x1p31f ? INT32_MIN : (s32)a"),
    )


def _predicates() -> Iterable[tuple[str, Plain]]:
    for name, sign in {"or": "|", "and": "&", "xor": "^"}.items():
        yield f"{name}.pred", ("p", ["p", "p"], f"a {sign} b")
    yield "not.pred", ("p", ["p"], "!a")
    yield "mov.pred", ("p", ["p"], "a")


COMPARED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
PLAIN: dict[str, Plain] = dict([*_whole(16), *_whole(32), *_whole(64), *_wide(), *_floating(), *_predicates()])
OTHERS = (
    "bra", "ret", "bar.sync", "bar.warp.sync", "ld.param", "ld.global", "st.global", "ld.shared", "st.shared", "ldmatrix",
    "stmatrix", "shfl.sync", "redux.sync", "cp.async", "cp.async.commit_group", "cp.async.wait_group", "mma.sync", "wgmma.fence",
    "wgmma.mma_async", "wgmma.commit_group", "wgmma.wait_group", "fence.proxy.async", "griddepcontrol.wait",
    "griddepcontrol.launch_dependents", "unpack", "pack", "special",
)  # fmt: skip
NUMBER = {name: n for n, name in enumerate((*OTHERS, *PLAIN))}
SPECIAL = (
    "%tid.x",
    "%tid.y",
    "%tid.z",
    "%ctaid.x",
    "%ctaid.y",
    "%ctaid.z",
    "%nctaid.x",
    "%nctaid.y",
    "%nctaid.z",
    "%laneid",
)
SHUFFLED = ("bfly", "idx", "down", "up")
REDUCED = ("max.s32", "min.s32", "max.u32", "min.u32", "add.s32", "or.b32", "and.b32")
TYPES = ("tf32", "bf16", "f16")
BASE = 1024  # where shared memory begins, as in ptx.c


def _c() -> str:
    """ptx.c, what it includes, and a function for each plain operation: of all lanes (as vectors), or of some."""
    made = []
    for n, (result, kinds, value) in enumerate(PLAIN.values()):
        named = list(zip("abc", kinds, strict=False))
        rows = "".join(f" const {kind} *x{x} = row(o[{i}]);" for i, (x, kind) in enumerate(named, 1))
        one = "".join(f" {kind} {x} = x{x}[l];" for x, kind in named) + f" y[l] = ({result})({value});"
        made.append(
            f"static void plain_{n}(const s32 *o, const p *on, int full) {{\n"
            f"  int count = lanes; {result} *y = row(o[0]);{rows}\n"
            f"  if (full) for (int l = 0; l < count; l++) {{{one} }}\n"
            f"  else for (int l = 0; l < count; l++) if (on[l]) {{{one} }}\n}}"
        )
    table = ", ".join(f"plain_{n}" for n in range(len(PLAIN)))
    made.append(f"static void (*const plain[])(const s32 *, const p *, int) = {{{table}}};")
    text = re.sub(r'#include "(.*)"', lambda found: SOURCE.with_name(found[1]).read_text(), SOURCE.read_text())
    text = text.replace("@PLAIN@", "\n".join(made)).replace("@FIRST_PLAIN@", str(len(OTHERS)))
    return re.sub(r"@([\w.]+)@", lambda found: str(NUMBER[found[1]]), text)


@functools.cache
def machine() -> ctypes.CDLL:
    """ptx.c, compiled once (some seconds) and kept beside the C kernels."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "ptx.c"
        source.write_text(_c())
        return cpu.built("ptx", [source], FLAGS, "ptx.c")


class Program:
    """A kernel, of its text."""

    def __init__(self, text: str) -> None:
        head, _, body = text[text.index(".entry") :].partition("{\n")
        self.parameters = [(kind, name) for kind, name in re.findall(r"\.param \.(\w+)[^,)]*?(\w+_param_\d+)", head)]
        found = re.search(r"\.reqntid (\d+)", head)
        if not found:
            raise Refused("a kernel without .reqntid")
        self.threads = int(found[1])
        self.numbers: dict[str | tuple[int, int], int] = {}  # of registers, and of constants (value, bytes)
        self.code: list[list[int]] = []
        self.operands: list[int] = []
        self.lines: list[tuple[str, str]] = []  # where an instruction comes from, and its text
        labels: dict[str, int] = {}
        self._jumps: list[tuple[int, str]] = []
        source = ""
        for line in body.partition("-- End function")[0].splitlines():
            if found := re.match(r"\s*\.loc\s.*// ([\w.]+:\d+)", line):
                source = found[1]
            for part in (p.strip() for p in line.partition("//")[0].split(";")):
                while found := re.match(r"(\$\w+):\s*", part):
                    labels[found[1]] = len(self.code)
                    part = part[found.end() :]
                if part not in ("", "{", "}") and not part.startswith("."):
                    self._read(part, source)
        for n, label in self._jumps:
            self.code[n][5] = labels[label]

    # Registers and constants

    def _register(self, name: str) -> int:
        if not re.fullmatch(r"%(p|r|rs|rd)\d+", name):
            raise NotImplementedError(f"{name} as a register")
        return self.numbers.setdefault(name, len(self.numbers))

    def _constant(self, value: int, size: int) -> int:
        return self.numbers.setdefault((value & (1 << 8 * size) - 1, size), len(self.numbers))

    def _value(self, text: str, kind: str) -> int:
        """A register, or a constant of this type."""
        size = 1 if kind == "p" else int(kind[1:]) // 8
        if text.startswith("%"):
            if _size(text) != size:
                raise NotImplementedError(f"{text} as {kind}")
            return self._register(text)
        if text.startswith("0f"):
            return self._constant(int(text[2:], 16), size)
        name, _, more = text.partition("+")
        if name == "global_smem":
            return self._constant(BASE + int(more or 0), size)
        value = int(text.rstrip("U"), 0)
        return self._constant(int(value != 0) if kind == "p" else value, size)

    def _address(self, text: str) -> tuple[int, int]:
        """Of what stands in brackets: a register and an offset."""
        name, _, offset = text.replace(" ", "").partition("+")
        register = self._constant(BASE, 4) if name == "global_smem" else self._register(name)
        return register, int(offset or 0)

    # Instructions

    def _read(self, text: str, source: str) -> None:
        guard, negated, whole = -1, 0, text
        if found := re.match(r"@(!?)(%p\d+)\s+", text):
            guard, negated, text = self._register(found[2]), int(bool(found[1])), text[found.end() :]
        name, *rest = text.split(None, 1)
        made = self._known(name, rest[0] if rest else "")
        if made is None:
            raise NotImplementedError(f"{source}: {whole}")
        name, operands, a, b = made
        self.code.append([NUMBER[name], len(operands), len(self.operands), guard, negated, a, b])
        self.operands += operands
        self.lines.append((source, whole))

    def _known(self, name: str, rest: str) -> tuple[str, list[int], int, int] | None:
        """Name, operands and the two numbers of an instruction, as ptx.c has them."""
        parts = [x.strip() for x in rest.split(",")]
        if name.startswith("mov.") and "{" in rest:
            return self._parts(name, rest)
        if name in ("mov.u32", "mov.b32") and parts[1] in SPECIAL:
            return "special", [self._register(parts[0])], SPECIAL.index(parts[1]), 0
        if name in PLAIN:
            if found := re.fullmatch(r"cvt\.\w+\.[us](\d+)", name):
                name += _held(8 * _size(parts[1]), int(found[1]))
            result, kinds, _ = PLAIN[name]
            return name, [self._value(x, kind) for x, kind in zip(parts, [result, *kinds], strict=True)], 0, 0
        if name in ("bra", "bra.uni"):
            self._jumps.append((len(self.code), rest))
            return "bra", [], 0, 0
        if name == "prefetch.global.L2":  # a hint: nothing happens here, as by what it is read as
            return "griddepcontrol.launch_dependents", [], 0, 0
        if name in ("ret", "cp.async.commit_group", "griddepcontrol.wait", "griddepcontrol.launch_dependents"):
            return name, [], 0, 0
        if name in ("bar.sync", "bar.warp.sync"):
            return (name, [], 0, 0) if rest == {"bar.sync": "0", "bar.warp.sync": "-1"}[name] else None  # of all lanes
        if name == "cp.async.wait_group":
            return name, [], int(rest), 0
        if found := re.fullmatch(r"wgmma\.(fence|commit_group|wait_group)\.sync\.aligned", name):
            return f"wgmma.{found[1]}", [], int(rest or 0), 0
        if name in ("fence.proxy.async", "fence.proxy.async.shared::cta"):
            return "fence.proxy.async", [], 0, 0
        if name.startswith("ld.param."):
            index = [n for _, n in self.parameters].index(parts[1].strip("[]"))
            return "ld.param", [self._register(parts[0])], index * 2 + (name[9] == "s"), _size(parts[0])
        if found := re.fullmatch(
            r"(ld|st)\.(global|shared)(?:\.cg)?(?:\.(v2|v4))?\.(?:[bu](?:8|16)|[bfsu](?:32|64))", name
        ):
            return self._access(
                found[1], found[2], int((found[3] or "v1")[1:]), int(re.findall(r"\d+", name)[-1]) // 8, rest
            )
        if found := re.fullmatch(r"shfl\.sync\.(\w+)\.b32", name):
            if parts[3:] != ["0" if found[1] == "up" else "31", "-1"]:
                return None
            values = [self._value(x, "u32") for x in parts[1:3]]
            return "shfl.sync", [self._register(parts[0]), *values], SHUFFLED.index(found[1]), 0
        if (found := re.fullmatch(r"redux\.sync\.(.*)", name)) and found[1] in REDUCED and parts[2] == "-1":
            return "redux.sync", [self._register(parts[0]), self._value(parts[1], "u32")], REDUCED.index(found[1]), 0
        if found := re.fullmatch(r"(ldmatrix|stmatrix)\.sync\.aligned\.m8n8\.x\d(\.trans)?\.shared\.b16", name):
            address, offset = self._address(_inner(rest, "[]"))
            names = _inner(rest, "{}").split(",")
            return found[1], [address, *(self._register(x.strip()) for x in names)], offset, int(bool(found[2]))
        if re.fullmatch(r"cp\.async\.c[ag]\.shared\.global", name):
            (to, to_offset), (of, of_offset) = map(self._address, re.findall(r"\[([^]]*)\]", rest))
            size = int(parts[2], 0)
            real = self._value(parts[3], "u32") if len(parts) > 3 else self._constant(size, 4)
            return "cp.async", [to, of, real], size, to_offset & 0xFFFFFFFF | of_offset << 32
        if found := re.fullmatch(r"mma\.sync\.aligned\.m16n8k(\d+)\.row\.col\.f32\.(\w+)\.\2\.f32", name):
            names = [x for group in re.findall(r"\{([^}]*)\}", rest) for x in group.split(",")]
            return "mma.sync", [self._register(x.strip()) for x in names], int(found[1]), TYPES.index(found[2])
        if found := re.fullmatch(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.f32\.(\w+)\.\3", name):
            return self._product(int(found[1]), int(found[2]), TYPES.index(found[3]), rest)
        return None

    def _parts(self, name: str, rest: str) -> tuple[str, list[int], int, int]:
        """Registers that are one larger one together."""
        size = int(name[5:]) // 8
        names = [x.strip() for x in _inner(rest, "{}").split(",")]
        part = size // len(names)
        outside = re.sub(r"\{.*\}", "", rest).strip(", ")
        if rest.startswith("{"):
            registers = [-1 if x == "_" else self._register(x) for x in names]
            return "unpack", [*registers, self._value(outside, f"u{8 * size}")], part, size
        return "pack", [self._register(outside), *(self._value(x, f"u{8 * part}") for x in names)], part, size

    def _access(self, kind: str, space: str, count: int, size: int, rest: str) -> tuple[str, list[int], int, int]:
        address, offset = self._address(_inner(rest, "[]"))
        names = [x.strip() for x in re.sub(r"\[.*?\]", "", rest).strip("{}, ").split(",")]
        assert len(names) == count, rest
        held = max([max(size, 2), *(_size(x) for x in names if x.startswith("%"))])  # bytes of a register
        return f"{kind}.{space}", [address, *(self._value(x, f"u{8 * held}") for x in names)], offset, size | held << 8

    def _product(self, n: int, k: int, kind: int, rest: str) -> tuple[str, list[int], int, int] | None:
        groups = [[self._register(x.strip()) for x in group.split(",")] for group in re.findall(r"\{([^}]*)\}", rest)]
        others = [x.strip() for x in re.sub(r"\{[^}]*\},?", "", rest).split(",")]
        left = groups[1] if len(groups) > 1 else [self._register(others.pop(0))]
        right, scale, *how = others
        signs, transposed = how[:2], [int(x) for x in how[2:]]
        if signs != ["1", "1"] or len(groups[0]) != n // 2:
            return None
        a, b = ([0] * (2 - len(transposed)) + transposed)[:2]
        operands = [self._register(right), self._value(scale, "p"), *left, *groups[0]]
        return "wgmma.mma_async", operands, n, k | kind << 8 | a << 12 | b << 13

    # Running

    def run(
        self,
        grid: Sequence[int],
        parameters: Sequence[int],
        shared: int,
        tensors: Iterable[tuple[int, int]],
        ahead: Callable[[int], None] = lambda _: None,
    ) -> list[tuple[int, int]]:
        """parameters: bits; shared: bytes; tensors: addresses where each begins and ends. Returns what of them was written.
        ahead(0): a block begins, ahead(1): it has waited for the launch ahead."""
        if len(parameters) != len(self.parameters):
            raise TypeError(f"expected {len(self.parameters)} parameters, found {len(parameters)}")
        given = []
        for (kind, _), bits in zip(self.parameters, parameters, strict=True):
            low = bits & (1 << int(kind[1:])) - 1
            negative = low >> int(kind[1:]) - 1 and kind[0] != "f"
            given += [low, (low - (1 << int(kind[1:]))) & 2**64 - 1 if negative else low]  # as it is, and with its sign
        ranges = sorted(set(tensors))
        constants = [x for key, n in self.numbers.items() if not isinstance(key, str) for x in (n, *key)]
        spans = (ctypes.c_uint64 * max(1, 2 * len(ranges)))()
        said, where = ctypes.create_string_buffer(1024), ctypes.c_int(-1)
        wide = [*grid, *[1] * (3 - len(grid))]
        failed = machine().run(
            _array(ctypes.c_int64, [x for one in self.code for x in one]), len(self.code), _array(ctypes.c_int32, self.operands),
            len(self.numbers), _array(ctypes.c_uint64, constants), len(constants) // 3, self.threads,
            _array(ctypes.c_uint64, given), *wide, shared, _array(ctypes.c_uint64, [x for r in ranges for x in r]), len(ranges),
            spans, ctypes.CFUNCTYPE(None, ctypes.c_int)(ahead), said, ctypes.byref(where),
        )  # fmt: skip
        if failed:
            source, text = self.lines[where.value]
            raise Refused(f"{source}: {said.value.decode()}: {text[:120]}")
        return [(a, b) for a, b in zip(spans[::2], spans[1::2], strict=True) if b > a]


def _size(register: str) -> int:
    """Its bytes."""
    return {"%p": 1, "%rs": 2, "%rd": 8}.get(register.rstrip("0123456789"), 4)


def _inner(text: str, brackets: str) -> str:
    return text[text.index(brackets[0]) + 1 : text.index(brackets[1])]


def _array(kind: type, values: Sequence[int]) -> ctypes.Array:  # type: ignore[type-arg]
    return (kind * max(1, len(values)))(*values)
