"""`make gpu-emulate` runs PTX as a GPU would, and refuses what a GPU may answer with anything."""

import ctypes
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from recipelin_kernels import cpu
from tests.kernels.test_gpu_compile import ROOT

pytestmark = pytest.mark.skipif(cpu.compiler() is None, reason="no C compiler")
spec = importlib.util.spec_from_file_location("ptx", ROOT / ".ci" / "ptx.py")
ptx = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ptx)

STORE = "add.s64 %rd2, %rd1, %rd3;\nst.global.b32 [%rd2], %r2;"
HEAD = """
ld.param.b64 %rd1, [k_param_0];
mov.u32 %r1, %tid.x;
mul.wide.u32 %rd3, %r1, 4;
mov.b32 %r9, global_smem;
shl.b32 %r3, %r1, 2;
add.s32 %r4, %r9, %r3;
"""


def run(body, arrays, threads=64, shared=4096, ranges=None, **more):
    """A kernel of one block whose parameters are these arrays."""
    names = [f".param .u64 .ptr .global .align 1 k_param_{n}" for n in range(len(arrays))]
    text = f".visible .entry k(\n{','.join(names)}\n)\n.reqntid {threads}\n{{\n{HEAD}{body}\nret;\n}}\n"
    at = [x.ctypes.data for x in arrays]
    spans = ranges or [(a, a + x.nbytes) for a, x in zip(at, arrays, strict=True)]
    return ptx.Program(text).run((1,), at, shared, spans, **more)


# What lane n reads of shared memory is what lane n ^ 1, or n ^ 32, wrote.
OTHER = "st.shared.b32 [%r4], %r1;\n{barrier}\nxor.b32 %r5, %r3, {distance};\nadd.s32 %r5, %r9, %r5;\nld.shared.b32 %r2, [%r5];\n"


@pytest.mark.parametrize(
    ("distance", "barrier", "refused"),
    [
        (1, "bar.sync 0;", None),
        (1, "bar.warp.sync -1;", None),
        (1, "", "no barrier"),
        (32, "bar.sync 0;", None),
        (32, "bar.warp.sync -1;", "no barrier"),
        (32, "setp.lt.s32 %p1, %r1, 0;\n@%p1 bar.sync 0;", "no barrier"),
    ],
)
def test_lanes_meet_at_barriers(distance, barrier, refused):
    out = np.zeros(64, np.int32)
    body = OTHER.format(distance=4 * distance, barrier=barrier) + STORE
    if refused:
        with pytest.raises(
            ptx.Refused, match=f"race: lane 0 reads byte {4 * distance} .*lane {distance} wrote: {refused}"
        ):
            run(body, [out])
    else:
        written = run(body, [out])
        assert out.tolist() == [n ^ distance for n in range(64)]
        assert written == [(out.ctypes.data, out.ctypes.data + out.nbytes)]


def test_what_is_read_is_not_written_before_a_barrier():
    body = OTHER.format(distance=4, barrier="bar.sync 0;") + "{}\nst.shared.b32 [%r4], %r2;\n" + STORE
    run(body.format("bar.sync 0;"), [np.zeros(64, np.int32)])
    with pytest.raises(ptx.Refused, match="which others read: no barrier"):
        run(body.format(""), [np.zeros(64, np.int32)])


def test_what_nothing_wrote_is_not_read():
    with pytest.raises(ptx.Refused, match="lane 0 reads byte 0 of shared memory, which nothing wrote"):
        run("ld.shared.b32 %r2, [%r4];\n" + STORE, [np.zeros(64, np.int32)])


COPY = """
add.s64 %rd4, %rd1, %rd3;
cp.async.ca.shared.global [ %r4 + 0 ], [ %rd4 + 0 ], 0x4, {real};
cp.async.commit_group;
{wait}
bar.sync 0;
xor.b32 %r5, %r3, 4;
add.s32 %r5, %r9, %r5;
ld.shared.b32 %r2, [%r5];
ld.param.b64 %rd1, [k_param_1];
"""


def test_copies_are_there_once_they_are_waited_for():
    given, out = np.arange(64, dtype=np.int32) + 7, np.zeros(64, np.int32)
    run(COPY.format(real="4", wait="cp.async.wait_group 0;") + STORE, [given, out])
    assert out.tolist() == [(n ^ 1) + 7 for n in range(64)]
    run(COPY.format(real="0", wait="cp.async.wait_group 0;") + STORE, [given, out])
    assert not out.any()  # none of four bytes: zeros
    with pytest.raises(ptx.Refused, match="a copy of 64 of 4 bytes"):
        run(COPY.format(real="64", wait="cp.async.wait_group 0;") + STORE, [given, out])
    for wait in ("", "cp.async.wait_group 1;"):
        with pytest.raises(ptx.Refused, match="which is being copied"):
            run(COPY.format(real="4", wait=wait) + STORE, [given, out])


def test_addresses_lie_in_the_tensors_and_are_aligned():
    out = np.zeros(64, np.int32)
    at = out.ctypes.data
    with pytest.raises(ptx.Refused, match=r"lane 63: address .* lies in none of the launch's tensors"):
        run("mov.b32 %r2, 1;\n" + STORE, [out], ranges=[(at, at + 252)])
    with pytest.raises(ptx.Refused, match="is not aligned to 4"):
        run("mov.b32 %r2, 1;\nadd.s64 %rd1, %rd1, 2;\n" + STORE, [out])
    for by, byte in ((4096, 4096), (-1028, -1028)):
        with pytest.raises(ptx.Refused, match=f"byte {byte} of 4096 in shared memory"):
            run(f"add.s32 %r4, %r4, {by};\nst.shared.b32 [%r4], %r1;", [out])


def test_lanes_part_and_meet_again():
    """Each lane counts to its number; a shuffle after it finds all of them."""
    out = np.zeros(64, np.int32)
    body = """
mov.b32 %r2, 0;
$L1:
setp.ge.s32 %p1, %r2, %r1;
@%p1 bra $L2;
add.s32 %r2, %r2, 1;
bra $L1;
$L2:
shfl.sync.bfly.b32 %r2, %r2, 31, 31, -1;
"""
    run(body + STORE, [out])
    assert out.tolist() == [n ^ 31 for n in range(64)]


def test_lanes_do_together_what_is_a_warps():
    with pytest.raises(ptx.Refused, match="lanes 0 to 31 part at what they do together"):
        run("setp.eq.s32 %p1, %r1, 0;\n@%p1 redux.sync.add.s32 %r2, %r1, -1;", [np.zeros(64, np.int32)])


def test_arithmetic_is_the_gpus():
    """bf16 is rounded to the nearest, to even; tf32 away from zero; a maximum is the number beside a NaN; ftz."""
    given = np.array([1 + 2**-8, 1 + 3 * 2**-8, np.nan, 1e-40], np.float32)
    found = {}
    for name, body in {
        "bf16": "cvt.rn.bf16.f32 %rs1, %r2;\ncvt.f32.bf16 %r2, %rs1;",
        "tf32": "add.f32 %r2, %r2, 0f3A000000;\ncvt.rna.tf32.f32 %r2, %r2;",
        "max": "max.f32 %r2, %r2, 0f00000000;",
        "rcp": "rcp.approx.ftz.f32 %r2, %r2;",
        "bits": "bfe.s32 %r2, %r2, 23, 8;\ncvt.rn.f32.s32 %r2, %r2;",
    }.items():
        wide = np.resize(given, 32)
        run(f"add.s64 %rd2, %rd1, %rd3;\nld.global.b32 %r2, [%rd2];\n{body}\n" + STORE, [wide], threads=32)
        found[name] = wide[:4]
    assert found["bf16"][:2].tolist() == [1.0, 1 + 2**-6]
    assert found["max"].tolist() == [1 + 2**-8, 1 + 3 * 2**-8, 0.0, np.float32(1e-40)]
    assert found["tf32"][0] == 1 + 2**-8 + 2**-10 and found["rcp"][3] == np.inf
    assert found["bits"].tolist() == [127.0, 127.0, -1.0, 0.0]


# d [64,8] = a [64,16] b [8,16]^T, both in blocks of 8 rows and 16 bytes: 128 bytes on the next of a row, 256 the next rows.
PRODUCT = """
shl.b32 %r3, %r1, 4;
add.s32 %r4, %r9, %r3;
mul.wide.u32 %rd3, %r1, 16;
add.s64 %rd2, %rd1, %rd3;
ld.global.v4.b32 {{ %r10, %r11, %r12, %r13 }}, [%rd2];
st.shared.v4.b32 [%r4], {{ %r10, %r11, %r12, %r13 }};
setp.lt.u32 %p1, %r1, 16;
@%p1 ld.global.v4.b32 {{ %r10, %r11, %r12, %r13 }}, [%rd2+2048];
@%p1 st.shared.v4.b32 [%r4+2048], {{ %r10, %r11, %r12, %r13 }};
{fence}
{barrier}
shr.u32 %r5, %r9, 4;
cvt.u64.u32 %rd5, %r5;
or.b64 %rd6, %rd5, 68720001024;
add.s64 %rd7, %rd6, 128;
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%r20,%r21,%r22,%r23}}, %rd6, %rd7, 0, 1, 1, 0, 0;
wgmma.commit_group.sync.aligned;
{early}
wgmma.wait_group.sync.aligned 0;
ld.param.b64 %rd1, [k_param_1];
add.s64 %rd2, %rd1, %rd3;
st.global.v4.b32 [%rd2], {{ %r20, %r21, %r22, %r23 }};
"""


def in_blocks(x):
    return x.reshape(-1, 8, 2, 8).transpose(0, 2, 1, 3).reshape(-1)


def bf16(x):
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def test_products_of_shared_memory_need_a_fence_and_what_they_read():
    assert 68720001024 == (128 >> 4) << 16 | (256 >> 4) << 32
    draw = np.random.default_rng(0)
    a, b = (draw.integers(-8, 9, (n, 16)).astype(np.float32) for n in (64, 8))
    given, out = np.concatenate([in_blocks(bf16(a)), in_blocks(bf16(b))]), np.zeros((128, 4), np.float32)
    right = dict(fence="fence.proxy.async.shared::cta;", barrier="bar.sync 0;", early="")
    run(PRODUCT.format(**right), [given, out], threads=128)
    row, column = np.arange(128) // 32 * 16 + np.arange(128) % 32 // 4, 2 * (np.arange(128) % 4)
    expected = a @ b.T
    places = [(row + down, column + right) for down in (0, 8) for right in (0, 1)]
    assert np.array_equal(out, np.stack([expected[place] for place in places], 1))
    first = "setp.eq.s32 %p3, %r1, 0;\n@%p3 fence.proxy.async.shared::cta;"
    for change, refused in (
        (dict(fence=""), "which lane 0 wrote: no fence"),
        (dict(fence=first), "wrote: no fence"),
        (dict(barrier=""), "which lane 0 wrote: no barrier"),
        (dict(early="bar.sync 0;\nst.shared.b32 [%r4], %r1;"), "which a product still reads"),
    ):
        with pytest.raises(ptx.Refused, match=refused):
            run(PRODUCT.format(**{**right, **change}), [given, out], threads=128)
    late = dict(barrier="bar.sync 0;\nfence.proxy.async.shared::cta;", fence="")  # by those that read
    run(PRODUCT.format(**{**right, **late}), [given, out], threads=128)


def test_an_operation_that_is_not_known_is_named():
    for text, named in (
        ("tex.2d.v4.f32.f32 {%r1, %r2, %r3, %r4}, [%rd1, {%r5, %r6}];", r"tex\.2d\.v4"),
        ("mov.u32 %r2, %ntid.x;", "%ntid.x as"),
        ("redux.sync.add.s32 %r2, %r1, 1;", "redux"),
        ("fence.proxy.async.global;", "fence.proxy.async.global"),
    ):
        with pytest.raises(NotImplementedError, match=named):
            run(text, [np.zeros(1)])


def test_a_launch_ahead_is_waited_for():
    """Until then its results are not there."""
    given, out = np.arange(64, dtype=np.int32), np.zeros(64, np.int32)
    content = given.tobytes()

    def ahead(waited):
        ctypes.memmove(given.ctypes.data, content if waited else b"\xff" * 256, 256)

    for wait, expected in (("griddepcontrol.wait;", list(range(64))), ("", [-1] * 64)):
        read = "add.s64 %rd4, %rd1, %rd3;\nld.global.b32 %r2, [%rd4];\nld.param.b64 %rd1, [k_param_1];\n"
        run(f"{wait}\n{read}{STORE}", [given, out], ahead=ahead)
        assert out.tolist() == expected


def test_the_gpus_tests_run_without_one(tmp_path):
    """Two of them, in bf16: forward and backward with copies under way, and decoding of few and of many rows by turns."""
    cases = (
        "80-96-heads0-333-shared-64-torch.bfloat16 or (decoding_equals and shared-64-64-heads0-False-torch.bfloat16)"
    )
    asked = ["tests/kernels/on_gpu_hybrid.py", "-n", "0", "-k", cases]
    environment = {n: x for n, x in os.environ.items() if not n.startswith("PYTEST_")}
    environment |= {
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / ".ci"))),
    }
    command = [sys.executable, str(Path(ROOT) / ".ci" / "gpu_emulate.py"), *asked]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "2 passed" in done.stdout
