"""Checkpoints as LoLCATs publishes them -> weights of our `hybrid` form and of the merged projections.

The layout, read in HazyResearch/lolcats (no code of it is here):

* `src/trainer/default_lm.py` saves `{model_state_dict, step, <metric>}`, the state dict being the trainable parameters by
  their names in the model; `demos/demo_lolcats_hf.py` takes `model.pt` from the hub with or without that wrapper, and with
  either of the two prefixes below. Stage 1 and stage 2 are a file each (`_distill.pt`, `_ft.pt`).
* Names, `src/model/convert_model.py`, `peft.py`: `model.layers.<i>.self_attn.<part>` of the plain model, and
  `base_model.model.model.layers.<i>.self_attn.<part>` under peft.
* Parts of stage 1, `src/model/linear_attention/{linear_attention,linear_window_attention_tk}.py`, `feature_map.py`:
  `feature_map_q.mlp.layer` and `feature_map_k.mlp.layer` [H, d, f], both for every *query* head, u = x W;
  `window_factors` [1, H, 1, 1], theta of g = sigmoid(theta). The map is [softmax(u), softmax(-u)] >= 1e-12: F = 2f.
* Parts of stage 2, `configs/experiment/finetune_lora_qkvo_alpaca_clean.yaml`: `<q|k|v|o>_proj.lora_A.default.weight` [r, in],
  `lora_B.default.weight` [out, r], scaled by alpha / r. The `fqkvo` configs save the parts of stage 1 here too; they win.

LoLCATs runs the maps in bf16 and adds the adapters beside the projections; here maps run in fp32 and adapters are merged in
fp32: the same function, other rounding.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import families, reuse, swap
from .families import Architecture
from .load import Loaded
from .plan import Plan
from .recipe import SOURCES, Converted
from .steps import Swap, first

MAPS = ("feature_map_q.mlp.layer", "feature_map_k.mlp.layer", "window_factors")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_NAME = re.compile(r"(?:base_model\.model\.)?model\.layers\.(\d+)\.self_attn\.(.+)")
_LORA = re.compile(rf"({'|'.join(PROJECTIONS)})\.lora_([AB])\.default\.weight")
_SHOWN = 3  # mistakes of a file that are spelt out

Key = tuple[int, str]  # layer, part


class PublishedError(ValueError):
    """A published checkpoint that cannot be read or does not fit: the file, what was found, what was expected."""


@dataclass(frozen=True)
class Published:
    """What the files hold, checked against the teacher's numbers."""

    maps: Mapping[Key, Tensor]
    """(layer, part of stage 1) -> tensor as saved."""
    lora: Mapping[Key, tuple[Tensor, Tensor]]
    """(layer, projection) -> A [r, in], B [out, r]; empty without stage 2."""
    alpha: float


def of_run(loaded: Loaded, planned: Plan) -> Published | None:
    """The weights of `model.converted`, read and checked before the teacher is; None where the recipe has none.

    Raises PublishedError; for a file that is not here with where it is to be had.
    """
    swapped = first((p.step for p in planned.steps), Swap)
    converted = loaded.recipe.model.converted
    if converted is None or swapped is None:
        return None
    files = reuse.published(loaded)
    for name, path in files.items():
        if not path.is_file():
            raise PublishedError(f"model.converted.{name}: {path} is not there; {SOURCES[converted.format]}")
    features = swapped.config.features(planned.architecture)  # type: ignore[attr-defined]
    return read(converted, files, architecture=planned.architecture, features=features)


def read(converted: Converted, files: Mapping[str, Path], *, architecture: Architecture, features: int) -> Published:
    """Read and check the files of a `lolcats` checkpoint. `features`: F of the form that takes the maps.

    Every key of a file is used or named in the error; every key that the teacher needs is there or named.
    Raises PublishedError.
    """
    half = features // 2
    first = _File(files["distill"], architecture, half)
    maps = first.maps()
    first.need(maps, MAPS)
    first.finish()
    lora: dict[Key, tuple[Tensor, Tensor]] = {}
    if converted.finetune is not None:
        second = _File(files["finetune"], architecture, half)
        trained = second.maps()
        second.need(trained, tuple(part for part in MAPS if any(p == part for _, p in trained)))
        lora = second.lora()
        second.finish()
        maps |= trained
    return Published(maps, lora, converted.alpha)


def lay(model: Any, published: Published) -> None:
    """Put the weights into a swapped model: maps and factors as they are, LoRA merged in fp32 (fp64 for fp64).

    W <- W + alpha / r * B A, rounded once to the dtype of the projections.
    """
    with torch.no_grad():
        for form in swap.forms(model):
            layer = form.layer_index
            q, k, theta = (published.maps[layer, part] for part in MAPS)
            form.feature_map_q.weight.copy_(q)
            form.feature_map_k.weight.copy_(k)
            form.mix.theta.copy_(theta.flatten())
            for name in PROJECTIONS:
                if (layer, name) in published.lora:
                    weight = getattr(form, name).weight
                    exact = torch.promote_types(weight.dtype, torch.float32)
                    a, b = (x.to(weight.device, exact) for x in published.lora[layer, name])
                    weight.copy_(weight.to(exact) + (published.alpha / a.shape[0]) * (b @ a))
    if published.lora:
        swap.mark_merged(model)


class _File:
    """One file: its tensors by (layer, part), and the mistakes found in it."""

    def __init__(self, path: Path, architecture: Architecture, half: int) -> None:
        self.path, self.architecture, self.half = path, architecture, half
        self.mistakes: list[str] = []
        self.names: dict[Key, str] = {}
        self.found: dict[Key, Tensor] = {}
        for name, value in _state_dict(path).items():
            match = _NAME.fullmatch(name)
            layer = int(match[1]) if match else -1
            key = (layer, match[2] if match else name)
            if not match or not (key[1] in MAPS or _LORA.fullmatch(key[1])):
                self.mistakes.append(f"{name}: not a key of LoLCATs' hybrid attention or its LoRA")
            elif layer >= architecture.num_hidden_layers:
                self.mistakes.append(f"{name}: the teacher has layers 0 to {architecture.num_hidden_layers - 1}")
            elif key in self.found:
                self.mistakes.append(f"{name}: there already as {self.names[key]}")
            elif not value.is_floating_point() or not bool(value.isfinite().all()):
                self.mistakes.append(f"{name}: {value.dtype}, or not finite; expected finite floating-point numbers")
            else:
                self.names[key], self.found[key] = name, value

    def maps(self) -> dict[Key, Tensor]:
        """What the file has of stage 1, shapes checked."""
        heads, width = self.architecture.num_attention_heads, self.architecture.head_dim
        expected = dict.fromkeys(MAPS, (heads, width, self.half)) | {"window_factors": (1, heads, 1, 1)}
        taken = {key: value for key, value in self.found.items() if key[1] in MAPS}
        for key, value in taken.items():
            shape = tuple(value.shape)
            if shape != expected[key[1]]:
                hint = ""
                if shape[:-1] == (heads, width) and 2 * shape[-1] % width == 0:
                    hint = f"; method.width: {2 * shape[-1] // width} fits it"
                self._shape(key, shape, expected[key[1]], hint)
        return taken

    def lora(self) -> dict[Key, tuple[Tensor, Tensor]]:
        """Adapters by (layer, projection): the same projections in every layer, one rank."""
        halves = {(k[0], m[1], m[2]): k for k in self.found if (m := _LORA.fullmatch(k[1]))}
        targets = [p for p in PROJECTIONS if any(name == p for _, name, _ in halves)]
        if not targets:
            self.mistakes.append("no LoRA in it; a stage 1 file alone is `distill`, without `finetune`")
        self.need(halves.values(), tuple(f"{p}.lora_{side}.default.weight" for p in targets for side in "AB"))
        rank = next((self.found[k].shape[0] for (_, _, side), k in halves.items() if side == "A"), 0)
        shapes = families.shapes(self.architecture)
        for (_, name, side), key in halves.items():
            wide, tall = shapes[name]
            expected = (rank, wide) if side == "A" else (tall, rank)
            if tuple(self.found[key].shape) != expected:
                self._shape(key, tuple(self.found[key].shape), expected, f" (rank {rank})")
        pairs = {(layer, name) for layer, name, _ in halves}
        return {
            (layer, name): (self.found[halves[layer, name, "A"]], self.found[halves[layer, name, "B"]])
            for layer, name in sorted(pairs)
            if {(layer, name, "A"), (layer, name, "B")} <= set(halves)
        }

    def need(self, given: Any, parts: tuple[str, ...]) -> None:
        """Every layer has each of `parts`."""
        missing = [f"layers.{i}.self_attn.{p}" for p in parts for i in range(self.architecture.num_hidden_layers)
                   if (i, p) not in set(given)]  # fmt: skip
        self.mistakes += [f"{name} is missing" for name in missing]

    def finish(self) -> None:
        """Raises PublishedError if anything was wrong; nothing is left over, since every key was sorted or named."""
        if self.mistakes:
            shown = "\n  ".join(self.mistakes[:_SHOWN])
            more = f"\n  and {len(self.mistakes) - _SHOWN} more" if len(self.mistakes) > _SHOWN else ""
            raise PublishedError(f"{self.path} does not fit the teacher:\n  {shown}{more}")

    def _shape(self, key: Key, found: tuple[int, ...], expected: tuple[int, ...], hint: str) -> None:
        self.mistakes.append(f"{self.names[key]}: found shape {list(found)}, expected {list(expected)}{hint}")


def _state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, unpickled with weights_only. Raises PublishedError."""
    with path.open("rb") as file:
        start = file.read(9)
    if start[:4] != b"PK\x03\x04":
        kind = {b"{": "a safetensors file"}.get(start[8:9], "no zip archive")
        kind = "a bare pickle, which was not opened" if start[:1] == b"\x80" else kind
        raise PublishedError(f"{path}: {kind}; expected a .pt file, the zip archive that LoLCATs' torch.save writes")
    try:
        given = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken or hostile archive can raise anything; all of it is this file's fault
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code:
            text = f"loading it would run code ({code[1]}); refused, none of it was run. Only tensors are read"
        else:
            reason = str(error).rpartition("WeightsUnpickler error:")[2].strip().splitlines() or [type(error).__name__]
            text = f"a broken .pt file: {reason[0]}"
        raise PublishedError(f"{path}: {text}") from error
    if isinstance(given, Mapping) and "model_state_dict" in given:
        beside = [
            n for n, v in given.items() if n != "model_state_dict" and not isinstance(v, (int, float, type(None)))
        ]
        if beside:
            raise PublishedError(
                f"{path}: {beside[0]!r} beside model_state_dict; expected the step and its metric only"
            )
        given = given["model_state_dict"]
    if not isinstance(given, Mapping) or not given:
        raise PublishedError(
            f"{path}: holds {type(given).__name__}; expected a state dict, bare or as model_state_dict"
        )
    wrong = next((n for n, v in given.items() if not isinstance(n, str) or not isinstance(v, Tensor)), None)
    if wrong is not None:
        kind = type(given[wrong]).__name__
        raise PublishedError(f"{path}: {wrong!r} is a {kind}; expected tensors, bare or in model_state_dict")
    return {name: value.detach() for name, value in given.items()}
