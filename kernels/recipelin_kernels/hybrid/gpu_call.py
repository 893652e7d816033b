"""What the Triton kernels of one call are compiled for and launched with."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from . import gpu_assembler, gpu_forward, gpu_launch
from .block import Past
from .gpu_parts import Form
from .gpu_support import interpreted
from .rows import Options, Rows
from .softmax_map import SoftmaxMap


@dataclass(frozen=True)
class Blocks:
    """Queries that a program owns and keys that it meets at once (or keys and queries: `columns` divide `rows`), queries between
    stored states, features at once; powers of two. At most so many stages of loads and warps (`Launch`)."""

    rows: int = 64
    columns: int = 64
    stored: int = 256
    tile: int = 128
    stages: int = 3
    warps: int = 4


SMALL = Blocks(32, 32, 256, 64, 1)  # what is in fp32 or fp16, or wider than 128, fits an H100's 227 KiB so
# In the interpreter small ones, so that short rows have several of each.
INTERPRETED = Blocks(16, 16, 32, 32)


def fitting(dtype: torch.dtype, kind: torch.dtype, width: int, features: int, made: bool = False) -> Blocks:
    """Sizes for inputs of a dtype, their features' dtype, head_dim and features; made: phi_q is made by the kernel."""
    if interpreted():
        return INTERPRETED
    if dtype != torch.bfloat16 or width > 128:
        return SMALL
    if kind != torch.bfloat16:
        return Blocks(stages=1)  # with features in fp32 a pipeline costs more than it gains
    if features > 128 or made:
        return Blocks(stages=1, warps=8)  # with more than a tile of features, or W, beside it a pipeline spills
    return Blocks(columns=32, warps=8)


def makes_queries(map_q: SoftmaxMap, dtype: torch.dtype, width: int) -> bool:
    """Whether the forward kernel makes phi_q itself: features that it can hold at once, of a dtype that holds small ones."""
    columns = map_q.columns
    tile = fitting(dtype, dtype, width, map_q.features, made=True).tile
    return columns >= 16 and columns == power(columns) and map_q.features <= tile and dtype != torch.float16


@dataclass(frozen=True)
class Launch:
    """How a kernel is compiled for a GPU."""

    num_warps: int
    num_stages: int
    maxnreg: int | None = None  # registers of a thread at most, where as many stages fit

    @property
    def options(self) -> dict[str, int | str]:
        """As Triton has them."""
        return {name: value for name, value in vars(self).items() if value is not None} | dict(gpu_assembler.options())


# Measured on an H200 (kernels/bench/tuning-h200.md): a block of 64 rows is one of 4 warps, 8 take half as long again or twice;
# with at most 168 registers a multiprocessor has three of them, and pairs in blocks of 32 columns fit into these.
# With 4 warps Triton 3.6 made a pipeline (stages above 1) for `sum_keys` whose sums were off by a tenth, and differed from call
# to call: its products read what was copied without a fence (`gpu_parts.copied`; `make gpu-compile` refuses those).
LAUNCHES = {
    "sum_keys": Launch(8, 3),
    "scan": Launch(4, 1),
    "output": Launch(4, 3, 168),
    "row_terms": Launch(4, 1),
    "sum_queries": Launch(4, 2),
    "query_gradient": Launch(4, 1),
    "query_features_gradient": Launch(4, 3, 168),
    "key_gradient": Launch(4, 2),
    "key_features_gradient": Launch(4, 3, 168),
    "sink_gradient": Launch(4, 1),
    "step": Launch(8, 1),
    "softmax_features": Launch(8, 1),
    "token_features": Launch(8, 1),
    "softmax_features_gradient": Launch(4, 1),
    "row_masses": Launch(8, 2),
    "transfer_rows": Launch(8, 3),
    "transfer_keys": Launch(8, 3),
}


def cdiv(n: int, size: int) -> int:
    """Blocks of a size that n need. (Triton's own, made for kernels too, costs the host a fifth of a call; so does its power.)"""
    return -(-n // size)


def power(n: int, least: int = 16) -> int:
    """The least power of two that is not below n."""
    return max(least, 1 << (n - 1).bit_length())


@functools.cache
def nothing(device: torch.device) -> Tensor:
    """Empty positions or segments, of calls without padding: one for all of them."""
    return torch.empty(0, dtype=torch.int32, device=device)


def strides(*tensors: Tensor) -> list[int]:
    return [s for t in tensors for s in t.stride()[:3]]


def check_size(tensors: list[Tensor]) -> None:
    """Kernels count 32 bits within a head: ValueError where that is too little."""
    for x in tensors:
        length = x.shape[2]
        if length * x.stride(2) >= 2**31:
            raise ValueError(
                f"kernel='gpu': a head of a tensor {tuple(x.shape)} with strides {x.stride()} spans 2^31 elements or more; "
                "make it contiguous, or use 'chunked'"
            )


@functools.cache
def _how(kernel: str, stages: int, warps: int, more: tuple[tuple[str, int], ...]) -> Mapping[str, int | str]:
    launch = LAUNCHES[kernel]
    if stages < launch.num_stages:
        launch = Launch(launch.num_warps, stages)
    return replace(launch, num_warps=min(launch.num_warps, warps)).options | dict(more)


@dataclass(frozen=True)
class Compiled:
    """Kernels of a form (for each its own NamedTuple of constants), launched. more: options of Triton's."""

    form: Any
    stages: int
    warps: int
    more: tuple[tuple[str, int], ...] = field(default=(), kw_only=True)

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **more: Any) -> None:
        if 0 not in grid:
            gpu_launch.launch(kernel, grid, arguments, {"o": self.form, **more}, self.how(kernel.__name__))

    def how(self, kernel: str) -> Mapping[str, int | str]:
        return _how(kernel, self.stages, self.warps, self.more)


@dataclass(frozen=True)
class Call(Compiled):
    """One call without what carries gradient."""

    form: Form
    options: Options
    keep: Tensor | None
    q_rows: tuple[Tensor, Tensor]  # positions and segments, int32 [B, T] each; of a plain call empty
    k_rows: tuple[Tensor, Tensor]  # of the keys; those in front stand before them in memory
    sums: Tensor | None  # the state's that the call goes on from [B,p,F,D+1]
    lead: int
    ahead: int  # sinks of the state in front of the keys
    segmented: bool
    stored_dtype: torch.dtype  # of states and their parts: bf16 for bf16 inputs, else fp32 (fp16 could overflow)
    map_weight: Tensor | None  # W in fp32 [H,D,C] and the least feature, where the kernel makes phi_q
    clamp: float

    def run_sums(self, parts: Tensor | None, masses: Tensor, length: int, *, backward: bool) -> None:
        """In the place of parts [B,p,n,F,D] and masses [B,p,n,F] the sums up to n (backward: from n on), a segment's own, made in
        fp32. Of n = 0 nothing is read, unless it holds the state that a call goes on from.
        """
        batch, maps, states, features = masses.shape
        size = 0 if parts is None else features * parts.shape[4]
        block = min(1024, power(max(size, features)))
        self.launch(
            gpu_forward.scan,
            (batch * maps, cdiv(size, block) + cdiv(features, block)),
            parts, masses, self.q_rows[1], maps, length, states, size, features, backward=backward, block=block,
        )  # fmt: skip


@functools.lru_cache(1024)  # calls come back with the same options and widths
def make_form(
    options: Options,
    blocks: Blocks,
    *,
    heads: int,
    key_heads: int,
    maps: int,
    width: int,
    features: int,
    dtype: torch.dtype,
    plain: bool = True,
    drops: bool = False,
    resumed: bool = False,
    ahead: int = 0,
    map_columns: int = 0,
) -> Form:
    o = options
    near_linear = o.has("linear") and (o.cover == "all" or (drops and o.on_drop == "linear_covers_all"))
    return Form(
        join=o.join,
        signed=o.signed,
        through=o.join == "shared" and o.max_gradient == "through",
        terraced=o.shape == "terraced",
        window=o.window,
        sinks=o.sinks,
        reach=o.reach or 0,
        span=o.span,
        cover_all=o.cover == "all",
        drops=drops,
        drop_covers=o.on_drop == "linear_covers_all",
        has_window=o.has("window"),
        has_sinks=o.has("sinks"),
        has_linear=o.has("linear"),
        has_soft=(o.has("window") and o.window > 0) or (o.has("sinks") and o.sinks > 0),
        show_window=o.shown("window"),
        show_sinks=o.shown("sinks"),
        show_linear=o.shown("linear"),
        sums=o.sums_up,
        initial=resumed and o.sums_up,
        ahead=ahead,
        plain=plain,
        width=width,
        features=features,
        width_block=power(width),
        tile=min(power(features), blocks.tile),
        group=heads // key_heads,
        map_group=heads // maps,
        rows=blocks.rows,
        columns=blocks.columns,
        stored=blocks.stored,
        sink_block=power(o.sinks),
        precision="tf32x3" if dtype == torch.float32 else "tf32",
        near_linear=near_linear,
        near_pairs=near_linear or o.join == "replace",
        map_columns=map_columns,
    )


def make_call(
    options: Options,
    q: Tensor,
    k: Tensor,
    phi_k: Tensor,
    map_q: SoftmaxMap | None,
    keep: Tensor | None,
    q_rows: Rows,
    k_rows: Rows,
    past: Past | None,
    plain: bool,
    segmented: bool,
    blocks: Blocks,
) -> Call:
    ahead = 0
    if past is not None and options.sinks and options.has("sinks"):
        ahead = options.sinks
        k_rows = Rows(
            torch.cat((past.sink_rows.position, k_rows.position), 1),
            torch.cat((past.sink_rows.segment, k_rows.segment), 1),
        )
    form = make_form(
        options, blocks, heads=q.shape[1], key_heads=k.shape[1], maps=phi_k.shape[1], width=q.shape[-1],
        features=phi_k.shape[-1], dtype=q.dtype, plain=plain, drops=keep is not None, resumed=past is not None, ahead=ahead,
        map_columns=0 if map_q is None else map_q.columns,
    )  # fmt: skip

    def places(rows: Rows) -> tuple[Tensor, Tensor]:
        if plain:
            return nothing(q.device), nothing(q.device)
        batch = q.shape[0]
        return tuple(x.to(torch.int32).expand(batch, -1).contiguous() for x in (rows.position, rows.segment))  # type: ignore[return-value]

    return Call(
        form=form,
        options=options,
        keep=None if keep is None else keep.to(torch.uint8).contiguous(),
        q_rows=places(q_rows),
        k_rows=tuple(x[:, ahead:] if ahead else x for x in places(k_rows)),  # type: ignore[arg-type]
        sums=past.sums if past is not None and options.sums_up else None,
        lead=0 if past is None else past.lead,
        ahead=ahead,
        segmented=segmented,
        stages=blocks.stages,
        warps=blocks.warps,
        stored_dtype=torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32,
        map_weight=None if map_q is None else map_q.weight.float().contiguous(),
        clamp=0.0 if map_q is None else map_q.clamp,
    )
