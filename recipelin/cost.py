"""What a step reads, trains and costs, in words and estimates (no torch, no network)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from . import families, layers
from .attention.form import Form
from .base import Config
from .branches import RandomWidth
from .families import Architecture
from .load import Loaded
from .recipe import Converted, Suite
from .schedule import optimiser_steps
from .sources import Data, Hub, LocalFile, Retrieval, Rows, Source, Stdlib, text_of
from .states import State
from .steps import LOGITS, Calibrate, Evaluate, Lora, Select, Step, Swap, Switch, Transfer, Tune, first
from .templates import name_of

BYTES_PER_TOKEN = 4  # of English text under a vocabulary of tens of thousands; only sizes `epochs` before tokenising
TRAINING_SHARE = 0.88  # of a source that is split by the names of its documents (sources.py)
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


class Cost(Config):
    """Estimates. `memory`: bytes at the peak by place; `cpu` for a CPU run, `cuda` and `host` for a run on one GPU."""

    tokens: int | None = None
    flops: float | None = None
    memory: dict[str, int] = Field({}, description="bytes at the peak by place")


@dataclass(frozen=True)
class Counting:
    """Counts and cost estimates of the steps of one recipe.

    FLOPs a token, forward: 2 a weight of the matrices, plus attention. Softmax over T keys: 2 T d a head (causal half);
    hybrid: 4 (C + w) d + 2 C F + 4 F d a head with chunk C = w (facts/performance.md §2). Backward: twice the forward
    where weights train, once where only activations carry gradient.
    """

    loaded: Loaded
    arch: Architecture
    steps: tuple[Step, ...]

    def describe(self, step: Step) -> dict[str, Any]:
        if isinstance(step, Select):
            return self._selection(step)
        if isinstance(step, Swap):
            what = f"{step.form} into {self._layers(step)} layers, {self._added():,} new parameters"
            if isinstance(step.published, Converted):
                what += f", published weights ({step.published.format})"
                return {"what": what, "reads": ", ".join(self._published(step.published))}
            return {"what": what}
        if isinstance(step, Switch):
            return {"what": describe_state(step.state)}
        if isinstance(step, Calibrate):
            tokens = (step.batches + 2 * step.held_out) * step.batch * step.length
            return {
                "what": f"{step.what} in closed form",
                "reads": describe_data(step.data),
                "cost": Cost(tokens=tokens, flops=tokens * self._forward(step.length), memory=self._memory(step, 0)),
            }
        if isinstance(step, Transfer):
            return self._training(step, self._groups(step.trains), factor=1.0, what=_objective(step))
        if isinstance(step, Tune):
            trained = self._groups(step.trains)
            teacher = 1.0 if step.loss.kl else 0.0  # a forward pass of the teacher beside the student's
            what = describe_loss(step)
            if step.lora:
                what += f", LoRA rank {step.lora.rank} on {', '.join(step.lora.targets)}"
                swap = self._swap()
                more = lora_parameters(step.lora, self.arch)
                if swap:
                    more = lora_parameters(step.lora, self.arch, self._form(swap), self._layers(swap))
                return self._training(step, trained + more, factor=2.0 + teacher, what=what)
            return self._training(step, self._all(step.trains), factor=3.0 + teacher, what=f"{what}, all weights")
        return self._evaluation(step)

    def _published(self, converted: Converted) -> list[str]:
        """The files in words, with what is not here."""
        return [
            f"{name} {path}" + ("" if (self.loaded.path.parent / path).is_file() else " (not here)")
            for name, path in converted.files().items()
        ]

    def _swap(self) -> Swap | None:
        return first(self.steps, Swap)

    def _layers(self, step: Swap) -> int:
        return layers.how_many(step.layers, first(self.steps, Select), self.arch.num_hidden_layers)

    def _new(self, step: Swap) -> dict[str, int]:
        counts = self._form(step).parameters(self.arch)
        return {group: n * self._layers(step) for group, n in counts.items()}

    def _form(self, step: Swap) -> Form:
        assert isinstance(step.config, Form), "every attention/<name>/config.py has a Form"
        return step.config

    def _added(self) -> int:
        """Parameters of the swapped model beyond the plain one's."""
        swap = self._swap()
        return self._form(swap).added(self.arch) * self._layers(swap) if swap else 0

    def _all(self, trains: Sequence[str]) -> int:
        """What trains where all weights do: everything but the form's own groups that are not named."""
        swap = self._swap()
        apart = {n: c for n, c in self._new(swap).items() if n not in self._form(swap).PROJECTIONS} if swap else {}
        left_out = sum(c for n, c in apart.items() if n not in trains)
        return families.parameters(self.arch)["total"] + self._added() - left_out

    def _groups(self, names: Sequence[str]) -> int:
        swap = self._swap()
        return sum(self._new(swap)[n] for n in names) if swap else 0

    def _forward(self, length: int) -> float:
        counts = families.parameters(self.arch)
        weights = self.arch.num_hidden_layers * (counts["attention"] + counts["mlp"])
        weights += self.arch.vocab_size * self.arch.hidden_size
        attention = 2 * length * self.arch.head_dim * self.arch.num_attention_heads * self.arch.num_hidden_layers
        return 2.0 * weights + attention

    def _operator(self, window: int) -> float:
        swap = self._swap()
        if swap is None:
            return 0.0
        return self._form(swap).flops(self.arch, window) * self._layers(swap)

    def _rows(self, data: Data, length: int) -> int | None:
        """Rows of one epoch by what is said or seen of the sources' size; None where neither is there."""
        total = 0
        for source in data.mix:
            tokens = self._tokens(text_of(source))
            if tokens is None:
                return None
            total += tokens
        return max(1, total // length)

    def _tokens(self, text: Stdlib | LocalFile | Hub) -> int | None:
        """Training tokens of a source, about."""
        if isinstance(text, Hub):
            kept = None if text.tokens is None else int(text.tokens * TRAINING_SHARE)
            return text.expected_tokens or kept
        path = self.loaded.path.parent / text.path if isinstance(text, LocalFile) else None
        return path.stat().st_size // BYTES_PER_TOKEN if path and path.is_file() else None

    def _selection(self, step: Select) -> dict[str, Any]:
        """What a Select costs: its layer-local steps once a draw, scoring and `tune` once for each candidate."""
        count_, arch = self.arch.num_hidden_layers, self.arch
        kept = layers.count(step, count_)
        what = f"{step.policy}, {kept} of {count_} layers stay softmax"
        if (known := layers.ahead(step, count_)) is not None:
            return {"what": f"{what}: {', '.join(map(str, known))}"}
        assert step.data is not None
        tried = len(layers.tried(step, count_))
        inner = Counting(self.loaded, arch, step.probe)
        costs = [(s, inner.describe(s)["cost"]) for s in step.probe if not isinstance(s, (Swap, Switch))]
        once = [cost for each, cost in costs if not isinstance(each, Tune)]
        tuned = [cost for each, cost in costs if isinstance(each, Tune)]
        scored = step.rows * step.length
        teachers = 2 if step.policy == "kl_stage2" else 1
        rows = Cost(tokens=scored, flops=teachers * scored * self._forward(step.length))
        each_ = f"{count(scored)} tokens scored"
        if tuned:
            each_ += f" and {count(tuned[0].tokens)} tuned"
        what += f": {tried} candidates x {step.draws} draw{'s' if step.draws > 1 else ''} x {each_}"
        memory = [c.memory for _, c in costs] or [self._memory(step, 0)]
        return {
            "what": what,
            "reads": f"selection rows of {describe_data(step.data)}",
            "cost": Cost(
                tokens=_sum(
                    [(c.tokens, step.draws) for c in once] + [(c.tokens, step.draws * tried) for c in (*tuned, rows)]
                ),
                flops=_sum(
                    [(c.flops, step.draws) for c in once] + [(c.flops, step.draws * tried) for c in (*tuned, rows)]
                ),
                memory={place: max(m[place] for m in memory) for place in memory[0]},
            ),
        }

    def _training(self, step: Transfer | Tune, trained: int, *, factor: float, what: str) -> dict[str, Any]:
        schedule = step.schedule
        count = optimiser_steps(schedule, self._rows(step.data, schedule.length))
        tokens = None if count is None else count * schedule.batch * schedule.accumulation * schedule.length
        before = self.steps[: self.steps.index(step)]
        keys = next((s.state.most_keys for s in reversed(before) if isinstance(s, Switch)), None)
        operator = self._operator(schedule.length if keys is None else min(keys, schedule.length))
        per_token = factor * self._forward(schedule.length) + 3.0 * operator
        if isinstance(step, Transfer) and "projections" in step.trains:
            # The layer's own beside the teacher's: forward, and backward to the weights or through o_proj.
            swap = self._swap()
            assert swap is not None
            per_token += 4.0 * families.parameters(self.arch)["attention"] * self._layers(swap)
        if isinstance(step, Tune) and schedule.gradient_checkpointing:
            per_token += self._forward(schedule.length)
        total = families.parameters(self.arch)["total"] + self._added()
        return {
            "what": what,
            "reads": describe_data(step.data),
            "trains": trained,
            "share": trained / total,
            "optimiser_steps": count,
            "cost": Cost(
                tokens=tokens,
                flops=None if tokens is None else tokens * per_token,
                memory=self._memory(step, trained),
            ),
        }

    def _memory(self, step: Select | Calibrate | Transfer | Tune | Evaluate, trained: int) -> dict[str, int]:
        """Weights + (value, gradient, two moments in fp32 of what trains) + activations of one micro-batch."""
        arch = self.arch
        size = DTYPE_BYTES[self.loaded.recipe.model.dtype]
        weights = families.parameters(arch)["total"] * size
        if isinstance(step, (Transfer, Tune)):
            tokens = step.schedule.batch * step.schedule.length
        elif isinstance(step, Calibrate):
            tokens = step.batch * step.length
        elif isinstance(step, Select):
            tokens = step.length
        else:
            tokens = max((e.batch * _row(e) for s in suites_of(step) for e in s.evals), default=0)  # type: ignore[attr-defined]
        swap = self._swap()
        saved = self._form(swap).saved(arch) if swap else 0
        heads = arch.num_attention_heads
        # Saved for backward in one layer: inputs of the projections, q k v, what the form adds, three of the MLP.
        layer = tokens * (4 * arch.hidden_size + 4 * heads * arch.head_dim + saved + 3 * arch.intermediate_size)
        if isinstance(step, Tune):
            checkpointed = step.schedule.gradient_checkpointing
            kept = (
                tokens * arch.hidden_size * arch.num_hidden_layers + layer
                if checkpointed
                else layer * arch.num_hidden_layers
            )
            activations = kept * (2 if step.schedule.autocast else 4)
            # Logits, their softmax and gradients, the teacher's beside them (measured, tests/test_distillation.py).
            activations += (7 if step.loss.kl else 4) * min(tokens * arch.vocab_size, LOGITS) * 4
        else:
            activations = layer * 4 + tokens * arch.vocab_size * 4
        if isinstance(step, Tune) and step.loss.kl:
            weights *= 2  # the teacher beside the student
        peak = weights + 16 * trained + activations
        return {"cpu": peak, "cuda": peak, "host": weights}

    def _evaluation(self, step: Evaluate) -> dict[str, Any]:
        suites = suites_of(step)
        counts = [e.tokens() for s in suites for e in s.evals]  # type: ignore[attr-defined]
        tokens = None if any(c is None for c in counts) else sum(counts) * len(step.states) * len(step.seeds)
        names = ", ".join(s.name for s in suites)
        length = max((_row(e) for s in suites for e in s.evals), default=512)
        return {
            "what": f"{names} in {len(step.states)} states: {', '.join(s.name for s in step.states)}",
            "reads": "the exported folder, reloaded",
            "cost": Cost(
                tokens=tokens,
                flops=None if tokens is None else tokens * self._forward(length),
                memory=self._memory(step, 0),
            ),
        }


def _sum(parts: Sequence[tuple[Any, int]]) -> Any:
    """Sum of value x times; None where a value is not known."""
    return None if any(value is None for value, _ in parts) else sum(value * times for value, times in parts)


def _row(evaluation: Config) -> int:
    """Tokens of an evaluation's row; 512 where it is lm-eval's own."""
    return getattr(evaluation, "length", None) or 512


def suites_of(step: Evaluate) -> tuple[Suite, ...]:
    """The step's suites; steps know them as plain Configs, since the recipe's schema comes after the steps'."""
    return tuple(s for s in step.suites if isinstance(s, Suite))


def lora_parameters(lora: Lora, arch: Architecture, form: Form | None = None, swapped: int = 0) -> int:
    """Adapter weights: rank x (in + out) for each named projection of each layer; `swapped` layers have the form's shapes."""

    def layer(shapes: Mapping[str, tuple[int, int]]) -> int:
        return sum(lora.rank * sum(shapes[t]) for t in lora.targets)

    kept = (arch.num_hidden_layers - swapped) * layer(families.shapes(arch))
    return kept + (swapped * layer(form.shapes(arch)) if form else 0)


def describe_loss(step: Tune) -> str:
    """What a Tune minimises, and what its branch schedule does, in words."""
    loss = step.loss
    parts = [
        "next-token loss" if loss.lm == 1 else f"{loss.lm:g} x next-token loss" if loss.lm else "",
        f"{loss.kl:g} x {loss.direction} divergence from the teacher" if loss.kl else "",
    ]
    what = " + ".join(p for p in parts if p)
    if not step.branches:
        return what
    if step.branches.dropout:
        rates = ", ".join(f"{r.value:g}" for r in step.branches.dropout)
        what += f", window dropped {rates} of the time ({step.branches.granularity}, {step.branches.on_drop})"
    window = step.branches.window
    if isinstance(window, RandomWidth):
        what += f", window at random of {', '.join(map(str, window.random))}"
    elif window:
        what += f", window {', '.join(str(w.value) for w in window)}"
    return what


def _objective(step: Transfer) -> str:
    kind = {"block_outputs": f" ({step.block_loss})"}
    return " + ".join(f"{weight:g} x {name}{kind.get(name, '')}" for name, weight in step.objective.items())


def describe_state(state: State) -> str:
    """A state in words, for the plan and the table's legend."""
    if not state.branches:
        return "no attention"
    parts = []
    if "window" in state.branches:
        shape = "" if state.shape == "sliding" else f"{state.shape} "
        parts.append(f"{shape}window {state.window}{f' ({state.compat})' if state.compat else ''}")
    if "sinks" in state.branches:
        parts.append(f"{state.sinks} sinks")
    if "linear" in state.branches:
        parts.append(f"linear over {'all keys' if state.cover == 'all' else 'keys outside the window'}")
    joined = f", join {state.join}" if len(parts) > 1 else ""
    return " + ".join(parts) + joined


def describe_data(data: Data) -> str:
    """The mixture in words."""
    total = sum(s.weight for s in data.mix)
    found = " + ".join(f"{s.weight / total:.0%} {_source(s)}" for s in data.mix)
    found += f", {data.first_rows} rows again and again" if data.first_rows else ""
    found += ", in the source's order" if data.order == "first" else ""
    return found + (f", all from the {data.only_part} part" if data.only_part else "")


def _source(source: Source) -> str:
    """A source in words: what is read, by which template, and which tokens carry loss."""
    if isinstance(source, Retrieval):
        return f"{source.format} {source.copied or ''}".strip()
    if not isinstance(source, Rows):
        return source.source
    facts = []
    if isinstance(source, LocalFile):
        name = source.path
    else:
        name = source.label
        facts = [x for x in (source.name, source.split if source.split != "train" else None) if x]
        if source.tokens:
            facts.append(f"the first {count(source.tokens)} tokens" + (" shuffled" if source.shuffle else ""))
    if source.template:
        facts.append(f"template {name_of(source.template)}")
    if source.chat:
        facts.append(f"chat in {source.chat.column}")
    if source.loss == "response":
        facts.append("loss on the assistant's answers" if source.chat else "loss on the response")
    if source.parts:
        held = {part: getattr(source.parts, part) for part in ("selection", "test")}
        facts.append(", ".join(f"{part} rows {first} to {end - 1}" for part, (first, end) in held.items()))
    return f"{source.source} {name}" + (f" ({', '.join(facts)})" if facts else "")


def count(value: float | None, unit: str = "") -> str:
    """1234567 -> '1.23 M', 748.716 -> '749', 999900 -> '1 M': at most three significant digits."""
    if value is None:
        return "not known"
    value = float(f"{value:.3g}")
    for size, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}{unit}"
    return f"{value:g} {unit}".strip()
