"""Tasks of EleutherAI's lm-evaluation-harness, stock ones by name and local ones from a folder beside the run."""

import copy
import json
import logging
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from ... import data
from ...exposure import exposed_share
from ...files import write_atomically
from ...hub import without_bars
from ...records import Item, Result
from ...sources import fingerprint
from ...spool import tokenizer_digest
from .. import EvalError
from ..greedy import cannot_generate
from ..subject import Subject
from . import ruler, stock
from .config import Config, Task


def run(config: Config, subject: Subject) -> tuple[Result, ...]:
    """A Result for each task; an item is a document, scored by the task's metric; what a model generates as well.

    Local tasks are written to `folder` as YAML and items, and the stock command on the exported model gives the same numbers:
    `lm_eval --model hf --model_args pretrained=RUN/model,trust_remote_code=True,dtype=float32 --include_path RUN/tasks
    --tasks NAME --batch_size N`. Tasks that generate are left out in a state that keeps no cache: said on stderr.
    Raises EvalError if lm-eval is not installed or does not know a task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ModuleNotFoundError as error:
        raise EvalError(f"lm_eval needs {error.name}: pip install 'recipelin[eval]'") from error
    config = _without_generation(config, subject)
    if not config.tasks:
        return ()
    with _quiet():
        prepare(config, subject.tokenizer, seed=subject.seed, folder=subject.folder, base=subject.base)
        manager = _manager(config, [subject.folder] if any(_is_local(t) for t in config.tasks) else [])
        wrapped = HFLM(
            pretrained=subject.model,
            tokenizer=copy.deepcopy(subject.tokenizer),  # lm-eval gives it a padding token
            batch_size=config.batch,
            device=subject.device,
            max_length=_beyond(config, subject.model),
        )
        outcomes: dict[tuple[int, int | None], Any] = {}
        # Tasks that are asked alike go in one call: each call costs lm-eval half a second of its own.
        for shots, limit in dict.fromkeys((t.shots, t.limit) for t in config.tasks):
            together = [task_name(t, subject.seed) for t in config.tasks if (t.shots, t.limit) == (shots, limit)]
            outcomes[shots, limit] = simple_evaluate(
                model=wrapped,
                tasks=list(dict.fromkeys(together)),
                task_manager=manager,
                num_fewshot=shots,
                limit=limit,
                log_samples=True,
                bootstrap_iters=0,
                random_seed=subject.seed,
                numpy_random_seed=subject.seed,
                torch_random_seed=subject.seed,
                fewshot_random_seed=subject.seed,
            )
        return tuple(
            _result(
                task, task_name(task, subject.seed), outcomes[task.shots, task.limit], wrapped, subject.exposed_from
            )
            for task in config.tasks
        )


def preflight(config: Config, *, tokenizer: Any, seeds: Sequence[int], base: Path) -> None:
    """Raises EvalError, before any work, for a tokenizer without the token that lm-eval needs, for a stock task that it lacks,
    whose metric it does not declare, or whose dataset is not here and cannot be fetched; SourceError for texts that do not give
    a local task's items.

    RULER's items are made, where they are not there yet.
    """
    try:
        manager = _manager(config, [])
    except ModuleNotFoundError as error:
        raise EvalError(f"lm_eval needs {error.name}: pip install 'recipelin[eval]'") from error
    own = config.model_copy(update={"tasks": tuple(t for t in config.tasks if t.next_line is not None)})
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            prepare(own, tokenizer, seed=seed, folder=Path(folder), base=base)
    asked = [t for t in config.tasks if t.next_line is None]
    every = [(task, leaf) for task in asked for leaf in stock.leaves(manager, task.task)]
    _refuse(every)
    _refuse_without_end(tokenizer, [leaf for _, leaf in every])
    for task, leaf in every:
        if task.max_seq_length is None:
            with _quiet(show=False):
                stock.fetch(leaf)
    made = [
        (leaf, task.max_seq_length, seed) for seed in seeds for task, leaf in every if task.max_seq_length is not None
    ]
    bar = tqdm(made, desc="RULER items", unit="task", file=sys.stderr, disable=None, leave=False)
    for leaf, length, seed in bar:
        bar.set_postfix_str(f"{leaf['task']}@{length}")
        ruler.items(leaf, length, tokenizer, seed=seed)


def _refuse_without_end(tokenizer: Any, leaves: Sequence[dict[str, Any]]) -> None:
    """Raises EvalError for a tokenizer with neither BOS nor EOS: lm-eval begins a text without context with one of them; and
    for one without EOS where a task generates: what is generated ends with it."""
    if tokenizer.eos_token_id is not None:
        return
    generated = next((leaf["task"] for leaf in leaves if leaf["output_type"] == "generate_until"), None)
    if generated is None and tokenizer.bos_token_id is not None:
        return
    lacks = (
        f"no EOS token, which ends what task {generated!r} generates"
        if generated
        else "neither a BOS nor an EOS token, and lm-eval needs one of them"
    )
    raise EvalError(
        f"the tokenizer has {lacks}: name one in its tokenizer_config.json (eos_token), or leave these tasks out"
    )


def _refuse(every: Sequence[tuple[Task, dict[str, Any]]]) -> None:
    """Raises EvalError for a task that does not fit its settings in lm-eval, and for one that is asked for twice at once."""
    owners: dict[tuple[Any, ...], str] = {}
    for task, leaf in every:
        name = repr(leaf["task"])
        if ruler.is_ruler(leaf) != (task.max_seq_length is not None):
            raise EvalError(
                f"task {name} makes its items for a length; give metric: string_match and max_seq_length"
                if task.max_seq_length is None
                else f"task {name} is none of RULER's; max_seq_length and string_match are theirs"
            )
        declared, asked = stock.metrics(leaf), str(task.max_seq_length or task.metric)
        if asked not in declared:
            what = "length" if task.max_seq_length else "metric"
            raise EvalError(
                f"task {name} has no {what} {asked if task.max_seq_length else repr(asked)}; it has {', '.join(declared)}"
            )
        filters = stock.filters(leaf)
        if task.filter not in (filters if len(filters) > 1 else (None, *filters)):
            found = "none is given" if task.filter is None else f"found {task.filter!r}"
            raise EvalError(f"task {name}: filter: {found}; it has {', '.join(filters)}")
        # lm-eval takes no task twice in one call; a task that is asked for twice alike is one.
        call = (leaf["task"], task.shots, task.limit, task.max_seq_length)
        if (other := owners.setdefault(call, task.task)) != task.task:
            raise EvalError(f"task {name} is asked for twice, by {other!r} and by {task.task!r}; leave one out")


def _is_local(task: Task) -> bool:
    """Whether it is written beside the run: a next-line task, or RULER's."""
    return task.next_line is not None or task.max_seq_length is not None


def _without_generation(config: Config, subject: Subject) -> Config:
    """Without the tasks whose answers are generated, where the model keeps no cache in its state."""
    why = cannot_generate(subject.model)
    if not why:
        return config
    manager = _manager(config, [])
    left = [
        t
        for t in config.tasks
        if t.next_line is None and any(x["output_type"] == "generate_until" for x in stock.leaves(manager, t.task))
    ]
    for task in left:
        print(f"    {task.row}: state {subject.state.name}: {why}: left out", file=sys.stderr)
    return config.model_copy(update={"tasks": tuple(t for t in config.tasks if t not in left)})


def _beyond(config: Config, model: Any) -> int | None:
    """Tokens that lm-eval may feed the model, where rows are longer than its context; None: its context, as lm-eval finds it."""
    context = getattr(model.config, "max_position_embeddings", None)
    return config.length if context is not None and config.length is not None and config.length > context else None


def _manager(config: Config, own: list[Path]) -> Any:
    """lm-eval's index of the tasks that are named, ours in `own`. Raises EvalError for a name that it does not have."""
    from lm_eval.tasks import TaskManager

    found = stock.folders(t.task for t in config.tasks if t.next_line is None)
    return TaskManager(include_path=[str(p) for p in (*found, *own)], include_defaults=False)


def prepare(config: Config, tokenizer: Any, *, seed: int, folder: Path, base: Path) -> None:
    """Write the local tasks; a run does so also where it reuses their results, so that the stock command finds them."""
    for task in config.tasks:
        if task.next_line is not None:
            write_task(task, tokenizer, folder=folder, base=base, seed=seed)
        elif task.max_seq_length is not None:
            ruler.write(task, tokenizer, folder=folder, seed=seed)


def task_name(task: Task, seed: int) -> str:
    """A local task's name says its draw, since its items differ with the seed; draw 0 has the plain name."""
    if task.max_seq_length is not None:
        return ruler.local_name(task.task, task.max_seq_length, seed)
    return task.task if task.next_line is None or seed == 0 else f"{task.task}_seed{seed}"


def write_task(task: Task, tokenizer: Any, *, folder: Path, base: Path, seed: int) -> Path:
    """Write a next-line task as lm-eval reads it: `<name>.yaml` and `<name>.jsonl`; what is there already is kept."""
    settings = task.next_line
    assert settings is not None
    name = task_name(task, seed)
    path, items_path = folder / f"{name}.yaml", folder / f"{name}.jsonl"
    facts = {
        "settings": settings.model_dump(mode="json"),
        "seed": seed,
        "text": fingerprint(settings.text, base),
        "tokenizer": tokenizer_digest(tokenizer),
    }
    text = yaml.safe_dump(
        {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(items_path.resolve())}},
            "output_type": "multiple_choice",
            "test_split": "test",
            "doc_to_text": "{{context}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "target_delimiter": "",
            "metric_list": [
                {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
            ],
            "metadata": {"version": 1.0, "made_from": json.dumps(facts, sort_keys=True)},
        },
        sort_keys=False,
    )
    if items_path.is_file() and path.is_file() and path.read_text(encoding="utf-8") == text:
        return path
    items = data.next_line_items(
        data.documents(settings.text, settings.part, base),
        tokenizer,
        items=settings.items,
        seed=seed,
        context=settings.context,
        answer=settings.answer,
        options=settings.options,
    )
    write_atomically(items_path, "".join(json.dumps(i) + "\n" for i in items).encode())
    write_atomically(path, text.encode())
    return path


def _result(task: Task, name: str, outcome: Any, wrapped: Any, exposed_from: int | None) -> Result:
    leaves = _leaves(outcome, name)
    if not any(outcome["samples"][leaf] for leaf in leaves):
        raise EvalError(f"lm-eval gave no items for {name!r}")
    items: list[Item] = []
    for leaf in leaves:
        samples = [s for s in outcome["samples"][leaf] if task.filter is None or s["filter"] == task.filter]
        for number, sample in enumerate(samples):
            item = _item(task, leaf, number, sample, wrapped, exposed_from)
            if len(leaves) > 1:
                weight = 1 / len(samples) if task.mean == "subtasks" else 1.0
                item = item.model_copy(update={"id": f"{leaf}/{item.id}", "subtask": leaf, "weight": weight})
            items.append(item)
    is_loss = task.metric == "word_perplexity"
    mean = sum(i.score * i.weight for i in items) / sum(i.weight for i in items)
    return Result(
        task=task.row,
        metric="word_log_loss" if is_loss else task.metric,
        value=mean,
        stderr=_stderr(items, mean, is_loss=is_loss),
        n=len(items),
        exposed=sum(i.exposed for i in items) / len(items),
        chance=task.chance,
        higher_is_better=not is_loss,
        items=tuple(items),
    )


def _stderr(items: Sequence[Item], mean: float, *, is_loss: bool) -> float:
    """Of a ratio of two sums for words; else of subtasks of fixed sizes (or one task), each a sample of its own."""
    total = sum(i.weight for i in items)
    if is_loss:
        return math.sqrt(sum((i.weight * (i.score - mean)) ** 2 for i in items)) / total
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.subtask, []).append(item)
    variance = 0.0
    for group in groups.values():
        own = sum(i.score for i in group) / len(group)
        spread = sum((i.score - own) ** 2 for i in group) / len(group)  # own (1 - own) where items are right or wrong
        variance += (sum(i.weight for i in group) / total) ** 2 * spread / max(1, len(group) - 1)
    return math.sqrt(variance)


def _item(task: Task, name: str, number: int, sample: Any, wrapped: Any, exposed_from: int | None) -> Item:
    score = sample.get(str(task.max_seq_length or task.metric))
    if score is None:
        raise EvalError(
            f"task {name!r} has no metric {task.metric!r} for each item; it has {', '.join(_metrics(sample))}"
        )
    target = sample["target"]
    index = target if isinstance(target, int) and target < len(sample["arguments"]) else 0
    context, continuation = _texts(sample["arguments"], index)
    id = str(sample["doc"].get("id", number)) if isinstance(sample["doc"], dict) else str(number)
    if task.metric == "word_perplexity":
        log_likelihood, words = score
        length = len(wrapped.tok_encode(context))
        exposed = exposed_share(_rolling_positions(length, wrapped.max_length), exposed_from)
        return Item(id=id, score=-log_likelihood / words, length=length, exposed=exposed, weight=words)
    if generation := _generation(sample["arguments"]):
        start = min(len(wrapped.tok_encode(context)), wrapped.max_length - generation.get("max_gen_toks", 256))
        made = wrapped.tok_encode(str(sample["resps"][0][0]), add_special_tokens=False)
        positions = range(start, start + max(1, len(made)))
        exposed = exposed_share(positions, exposed_from)
        return Item(id=id, score=float(score), length=positions.stop, exposed=exposed)
    # As lm-eval splits a request: white space at the end of the context belongs to what is scored.
    start = len(wrapped.tok_encode(context.rstrip())) if context.rstrip() else 0
    stop = len(wrapped.tok_encode(context + continuation))
    positions = range(min(start, stop - 1), stop)
    return Item(id=id, score=float(score), length=stop, exposed=exposed_share(positions, exposed_from))


def _rolling_positions(tokens: int, most: int) -> list[int]:
    """Where a document's tokens stand in the rows that lm-eval cuts: full rows behind a first token, then one that reaches
    back for context, in which only the new tokens are scored."""
    rest = tokens % most if tokens > most else 0
    return [1 + i % most for i in range(tokens - rest)] + list(range(most - rest + 1, most + 1))


def _leaves(outcome: Any, name: str) -> list[str]:
    """A group such as mmlu stands for its subtasks, at any depth, and for no other task of the same call."""
    if name in outcome["samples"]:
        return [name]
    return [leaf for child in sorted(outcome["group_subtasks"].get(name, [])) for leaf in _leaves(outcome, child)]


def _metrics(sample: dict[str, Any]) -> list[str]:
    return list(sample.get("metrics", [])) or [k for k, v in sample.items() if isinstance(v, (int, float))]


def _texts(arguments: Any, index: int) -> tuple[str, str]:
    """(context, continuation) of one request; arguments are a list, or a map gen_args_N -> {arg_0, arg_1}."""
    one = arguments[f"gen_args_{index}"] if isinstance(arguments, dict) else arguments[index]
    pair = list(one.values()) if isinstance(one, dict) else list(one)
    return str(pair[0]), pair[1] if len(pair) > 1 and isinstance(pair[1], str) else ""


def _generation(arguments: Any) -> dict[str, Any] | None:
    """How an answer was generated; None where continuations were scored."""
    one = arguments["gen_args_0"] if isinstance(arguments, dict) else arguments[0]
    pair = list(one.values()) if isinstance(one, dict) else list(one)
    return pair[1] if len(pair) > 1 and isinstance(pair[1], dict) else None


@contextmanager
def _quiet(*, show: bool = True) -> Iterator[None]:
    """Keeps what lm-eval, datasets and their child processes write to stderr; with `show`, an error brings it out."""
    loggers = {name: logging.getLogger(name).level for name in ("lm_eval", "lm-eval", "datasets")}
    for name in loggers:
        logging.getLogger(name).setLevel(logging.ERROR)
    sys.stderr.flush()
    kept, own = tempfile.TemporaryFile(), os.dup(2)  # noqa: SIM115 (closed below, after stderr has its own file back)
    os.dup2(kept.fileno(), 2)
    try:
        with without_bars():
            yield
    except BaseException:
        sys.stderr.flush()
        kept.seek(0)
        if show:
            os.write(own, kept.read())
        raise
    finally:
        sys.stderr.flush()
        os.dup2(own, 2)
        os.close(own)
        kept.close()
        for name, level in loggers.items():
            logging.getLogger(name).setLevel(level)
