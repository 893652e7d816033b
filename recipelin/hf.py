"""Students as Hugging Face models: classes, export and loading. Importing this registers the Auto classes."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, initialization

from . import families, lookup
from .cache import check_cache
from .families import Architecture, Family
from .files import folder_atomically
from .masks import segments_of
from .states import State
from .steps import Swap
from .swap import forget_teacher, forms, swap, switch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_REMOTE = '''"""Loads a recipelin student with trust_remote_code; needs recipelin installed (pip install recipelin)."""

from recipelin.hf import {config}, {model}  # noqa: F401
'''


class _Student:
    """What the inner and the outer class of a student share: start values of parameters that no checkpoint holds."""

    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if hasattr(module, "start_values"):
            for name, value in module.start_values().items():
                # transformers' own: leaves what came from the checkpoint alone.
                initialization.copy_(getattr(module, name), value)


class _StudentModel(_Student):
    """The inner model: positions come from the padding where none are given; packed rows and training use no cache."""

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        check_cache(past_key_values)
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2 and position_ids is None:
            # Feature maps act after RoPE: unlike softmax, the linear branch moves with the positions.
            length = (input_ids if input_ids is not None else inputs_embeds).shape[1]
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        if use_cache is None and past_key_values is None:
            packed = kwargs.get("segment_ids") is not None or (
                attention_mask is None and segments_of(position_ids, None) is not None
            )
            use_cache = self.config.use_cache and not self.training and not packed  # type: ignore[attr-defined]
        return super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )


class _StudentForCausalLM(_Student):
    """A converted model with its language-model head; loads with AutoModelForCausalLM after `import recipelin.hf`."""

    _inner: type
    _keep_in_fp32_modules_strict = ["feature_map_q", "feature_map_k", "mix", "log_scale", "A_log", "dt_bias"]  # noqa: RUF012

    def __init__(self, config: Any) -> None:
        layout = config.recipelin
        if not layout:
            raise ValueError("config.recipelin is missing: this is not the folder of a recipelin student")
        if layout["version"] != families.LAYOUT:
            raise ValueError(
                f"config.recipelin has version {layout['version']}; this recipelin reads version {families.LAYOUT}"
            )
        PreTrainedModel.__init__(self, config)  # type: ignore[arg-type]  # not the family's own: it would make its own layers
        self.model = self._inner(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        form = lookup.lookup("attention", layout["form"])
        structure = form.Config.model_validate_json(json.dumps(layout["config"]))
        swap(self, Swap(form=layout["form"], config=structure, layers=tuple(layout["layers"])), seed=0)
        switch(self, State.model_validate_json(json.dumps(layout["state"])))
        forget_teacher(self)  # what is loaded are the student's projections: there is no teacher to restore
        self.post_init()  # type: ignore[attr-defined]

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        asked = generation_config.cache_implementation
        if asked is not None:
            raise ValueError(
                f"cache_implementation={asked!r}: a recipelin student generates with its own cache of constant size"
            )
        check_cache(model_kwargs.get("past_key_values"))
        return super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, *args, **kwargs
        )


def _student_classes(row: Family) -> tuple[type, type]:
    """(config class, causal LM class) of a family's students: `Recipelin<stem>Config`, `Recipelin<stem>ForCausalLM`."""

    def made(part: str, *own: type, **fields: Any) -> Any:
        stock = getattr(transformers, f"{row.stem}{part}")
        return type(f"Recipelin{row.stem}{part}", (*own, stock), {"__module__": __name__, **fields})

    config = made(
        "Config",
        model_type=f"{families.PREFIX}{row.model_type}",
        __doc__="`recipelin` holds {version, form, config, layers, state}: what swap and switch need.",
        # A field beside the family's own: transformers' configs are dataclasses.
        __annotations__={"recipelin": dict[str, Any] | None},
        recipelin=None,
    )
    inner = made("Model", _StudentModel, config_class=config, __doc__=_StudentModel.__doc__)
    outer = made(
        "ForCausalLM", _StudentForCausalLM, config_class=config, _inner=inner, __doc__=_StudentForCausalLM.__doc__
    )
    AutoConfig.register(config.model_type, config)
    AutoModelForCausalLM.register(config, outer)
    return config, outer


STUDENTS = {row.model_type: _student_classes(row) for row in families.FAMILIES.values()}
# By their names too: an exported folder's modeling_recipelin.py imports them from here.
globals().update({each.__name__: each for pair in STUDENTS.values() for each in pair})


def export(
    model: Any,
    tokenizer: Any,
    folder: Path,
    *,
    hybrid: State | None,
    origin: dict[str, Any] | None = None,
) -> None:
    """Write a student (or, where no layer is swapped, a plain model) as a folder that from_pretrained loads.

    Made beside `folder` and renamed, so that no reader meets half of it. `hybrid`: the state that it generates in;
    `origin`: {recipe, teacher: {source, revision, digest}}, for the diagnosis of the folder.
    """
    with folder_atomically(folder) as partial:
        found = forms(model)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if found:
            if hybrid is None:
                raise ValueError("export: a swapped model needs the state that it is to run in")
            _layout(partial, found, hybrid, origin)


def _layout(folder: Path, found: list[Any], hybrid: State, origin: dict[str, Any] | None) -> None:
    """Turn a saved config.json into the student's."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    base = families.base_type(config["model_type"])
    config_class, model_class = STUDENTS[base]
    file = "modeling_recipelin"
    config |= {
        "model_type": f"{families.PREFIX}{base}",
        "architectures": [model_class.__name__],
        "auto_map": {
            "AutoConfig": f"{file}.{config_class.__name__}",
            "AutoModelForCausalLM": f"{file}.{model_class.__name__}",
        },
        "recipelin": {
            "version": families.LAYOUT,
            "form": found[0].NAME,
            "config": found[0].config.model_dump(mode="json"),
            "layers": [f.layer_index for f in found],
            "state": hybrid.model_dump(mode="json"),
            "origin": origin,
        },
    }
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    text = _REMOTE.format(config=config_class.__name__, model=model_class.__name__)
    (folder / f"{file}.py").write_text(text, encoding="utf-8")


def tiny_teacher(architecture: Architecture, folder: Path, tokenizer: str | Path) -> Path:
    """A random model of these numbers in `folder`, with the tokenizer of another; made once. For `shrink`."""
    if not (folder / "config.json").is_file():
        words = load_tokenizer(tokenizer)
        export(new_model(architecture, words, embedding_std=0.1, seed=0), words, folder, hybrid=None)
    return folder


class TeacherError(ValueError):
    """A teacher, or a student's folder, that cannot be had or converted; the message says what to do."""


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """All that transformers makes of files which it cannot read, as a TeacherError in one line."""
    try:
        yield
    except TeacherError:
        raise
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = f"KeyError: {reason}" if isinstance(error, KeyError) else reason  # whose text is the key alone
        raise TeacherError(f"{what} cannot be loaded: {reason}") from error


def teacher_architecture(source: str | Path, *, revision: str | None = None) -> Architecture:
    """The numbers of a teacher's own config, before any weight is read. Raises TeacherError."""
    try:
        config = AutoConfig.from_pretrained(source, revision=revision)
        return families.architecture(config.to_dict())
    except OSError as error:
        raise TeacherError(_cannot_have(str(source), revision, error)) from error
    except ValueError as error:
        raise TeacherError(f"model.teacher {str(source)!r}: {error}") from error


def _cannot_have(source: str, revision: str | None, error: BaseException) -> str:
    at = f" at revision {revision!r}" if revision else ""
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    if any(isinstance(c, GatedRepoError) for c in causes):
        return (
            f"model.teacher {source!r}{at} is gated: accept its terms on its page at huggingface.co, then `hf auth login` "
            "(or set HF_TOKEN)"
        )
    if any(isinstance(c, (RevisionNotFoundError, RepositoryNotFoundError)) for c in causes):
        return f"model.teacher {source!r}{at}: the hub has no such repository or revision (or it is private)"
    if any(isinstance(c, LocalEntryNotFoundError) for c in causes):
        revised = f" --revision {revision}" if revision else ""
        return (
            f"model.teacher {source!r}{at} is not a folder beside the recipe, not in the Hugging Face cache, and the hub "
            f"cannot be reached from here. Where there is a network: `hf download {source}{revised} --local-dir teacher`; "
            "bring the folder here and write model: {teacher: ./teacher}"
        )
    return f"model.teacher {source!r}{at}: {str(error).splitlines()[0]}"


def load_teacher(source: str | Path, *, revision: str | None = None, dtype: str, device: str) -> tuple[Any, Any]:
    """(model, tokenizer) of a local folder or a hub id, in eval mode. Raises TeacherError."""
    teacher_architecture(source, revision=revision)
    with _reading(f"model.teacher {str(source)!r}"):
        return _load(source, revision=revision, dtype=dtype, device=device)


def load_student(folder: Path, *, dtype: str, device: str) -> tuple[Any, Any]:
    """(model, tokenizer) of an exported folder, in eval mode. Raises TeacherError."""
    with _reading(f"the student {str(folder)!r}"):
        return _load(folder, dtype=dtype, device=device)


def _load(source: str | Path, *, dtype: str, device: str, revision: str | None = None) -> tuple[Any, Any]:
    tokenizer = load_tokenizer(source, revision=revision)  # first: weights of many gigabytes take their time
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source, revision=revision, dtype=DTYPES[dtype], output_loading_info=True, ignore_mismatched_sizes=True
    )
    model, report = loaded
    wrong = {name: "is missing" for name in report["missing_keys"]}
    wrong |= {name: "is not the model's" for name in report["unexpected_keys"]}
    wrong |= {
        name: f"is {list(found)} in the file, not {list(expected)}"
        for name, found, expected in report["mismatched_keys"]
    }
    if wrong:
        first = min(wrong)
        raise ValueError(f"the weights do not fit the model, first {first!r} {wrong[first]} ({len(wrong)} in all)")
    return model.to(device).eval(), tokenizer


def load_tokenizer(source: str | Path, *, revision: str | None = None) -> Any:
    """The tokenizer of a folder or a hub id. Raises TeacherError."""
    lacks = ""
    if (folder := Path(source)).is_dir() and not (folder / "tokenizer.json").is_file():
        there = sorted(p.name for p in folder.iterdir() if p.is_file() and p.suffix != ".safetensors")
        lacks = f" (no tokenizer.json there; found {', '.join(there)})"
    with _reading(f"the tokenizer of {str(source)!r}{lacks}"):
        return AutoTokenizer.from_pretrained(source, revision=revision)


def refuse_tokens_without_row(tokenizer: Any, rows: int) -> None:
    """TeacherError for a token beyond the rows of a model's embedding; a tokenizer smaller than it is usual."""
    beyond = [(number, token) for token, number in tokenizer.get_vocab().items() if number >= rows]
    if beyond:
        number, token = min(beyond)
        raise TeacherError(
            f"the tokenizer has {len(tokenizer):,} tokens, the model's embedding {rows:,} rows; first without a row: "
            f"{token!r}, number {number:,} counted from 0. Take the model's own tokenizer, or give the model more rows "
            "(resize_token_embeddings)"
        )


def new_model(architecture: Architecture, tokenizer: Any, *, embedding_std: float, seed: int) -> Any:
    """A model from nothing, a pure function of the seed; the generator of the caller is left as it was."""
    row = families.family(architecture.model_type)
    config = getattr(transformers, f"{row.stem}Config")(
        **families.config_json(architecture),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    refuse_tokens_without_row(tokenizer, architecture.vocab_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{row.stem}ForCausalLM")(config).eval()
        nn.init.normal_(model.model.embed_tokens.weight, std=embedding_std)
        return model


__all__ = [
    "STUDENTS",
    "TeacherError",
    "export",
    "load_student",
    "load_teacher",
    "new_model",
    "refuse_tokens_without_row",
    "teacher_architecture",
    "tiny_teacher",
]
