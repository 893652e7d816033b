"""The closed vocabulary of steps that methods compose and `run` carries out (DESIGN §4, no torch)."""

from collections.abc import Iterable
from typing import Annotated, Literal, TypeVar

from pydantic import ConfigDict, Field, SerializeAsAny, model_validator

from .base import Config
from .branches import BranchSchedule
from .schedule import Schedule
from .sources import Data
from .states import NamedState, State

Policy = Literal["uniform", "lm_ppl", "single_keep_ppl", "kl_stage2", "explicit"]
Objective = Literal["weights", "outputs", "hybrid_weights", "hybrid_outputs", "block_outputs"]
BlockLoss = Literal["mse", "l2norm"]
Trained = Literal[
    "feature_maps",
    "mix",
    "log_scale",
    "projections",
    "output_projection",
    "decay",
    "write_gate",
    "output_gate",
    "output_norm",
    "short_convolution",
]  # groups of parameters of the forms: the first three of hybrid, the others of gated_delta and native


class StepsError(ValueError):
    """A recipe that its method cannot be made of; the message says what to change."""


class FromSelect(Config):
    """All layers but those that the plan's `Select` keeps: `layers: {from: select}`."""

    model_config = ConfigDict(serialize_by_alias=True)

    source: Literal["select"] = Field("select", alias="from")


Layers = Literal["all"] | tuple[int, ...] | FromSelect


class Swap(Config):
    """Put a form into layers of the model instance and copy the projections. Structure only: no window, no join.

    `published`: weights of somebody else's conversion (`model.converted`), laid in once the form is there.
    """

    step: Literal["swap"] = "swap"
    form: str
    config: SerializeAsAny[Config]
    layers: Layers = "all"
    published: SerializeAsAny[Config] | None = None


class Switch(Config):
    """Set what the swapped layers do from here on."""

    step: Literal["switch"] = "switch"
    state: State


class Calibrate(Config):
    """Set parameters of the form from the teacher's activations, without gradients.

    `what` names a calibration of the form; hybrid has `log_scale` (closed form of c_h), gated_delta those of its rules.py,
    whose settings are `rule`. `held_out`: batches of the selection part on which the report says how near each layer is to
    the teacher's, before and after.
    """

    step: Literal["calibrate"] = "calibrate"
    what: str
    data: Data
    batches: Annotated[int, Field(ge=1)] = 8
    batch: Annotated[int, Field(ge=1)] = 4
    length: Annotated[int, Field(ge=2)] = 1024
    rule: SerializeAsAny[Config] | None = None
    held_out: Annotated[int, Field(ge=0)] = 0


class Transfer(Config):
    """Layer-local distillation: every layer is fed the teacher's stream and learns the teacher's attention.

    loss = mean over layers of sum over objectives of weight * loss:
    `weights` cross-entropy of pure linear weights, `outputs` MSE of pure linear outputs, `hybrid_weights` and
    `hybrid_outputs` the same of the hybrid in its current state; outputs are taken before o_proj. `block_outputs`: after
    o_proj, in the current state: `block_loss` mse, or l2norm: mean over tokens of |t - s| / sqrt(hidden_size), the
    Euclidean norm (stage 1 of arXiv 2606.16429's code).
    """

    step: Literal["transfer"] = "transfer"
    stage: str
    objective: dict[Objective, float]
    trains: tuple[Trained, ...]
    block_loss: BlockLoss = "mse"
    schedule: Schedule
    data: Data


class Lora(Config):
    """Adapters by peft on named projections.

    Sample YAML: `{rank: 8, alpha: 16, dropout: 0.0, targets: [q_proj, k_proj, v_proj, o_proj]}`.
    Defaults: LoLCATs' configs/experiment/finetune_lora_qkvo_alpaca_clean.yaml.
    """

    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0)] = 16
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Annotated[
        tuple[Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], ...],
        Field(min_length=1),
    ] = ("q_proj", "k_proj", "v_proj", "o_proj")


LOGITS = 2**25  # numbers of one kind (logits, their softmax, ...) that a loss holds at once: 128 MiB in fp32


class Loss(Config):
    """What `Tune` minimises: lm x next-token cross-entropy + kl x divergence between teacher and student, in nats a token.

    forward: KL(teacher || student), reverse: KL(student || teacher), both of logits / temperature and times
    temperature^2, so that gradients keep their size (Hinton et al., arXiv 1503.02531). Over the tokens that have a label.

    Sample YAML: `{lm: 0.0, kl: 1.0, direction: forward, temperature: 1.0}`
    """

    lm: Annotated[float, Field(ge=0)] = 1.0
    kl: Annotated[float, Field(ge=0)] = 0.0
    direction: Literal["forward", "reverse"] = "forward"
    temperature: Annotated[float, Field(gt=0)] = 1.0

    @model_validator(mode="after")
    def _something(self) -> "Loss":
        if not (self.lm or self.kl):
            raise ValueError("lm and kl are both 0: there is nothing to minimise")
        return self


class Tune(Config):
    """End-to-end training; adapters (merged once at the end, in fp32) or all weights."""

    step: Literal["tune"] = "tune"
    stage: str
    loss: Loss = Loss()
    branches: BranchSchedule | None = Field(None, description="dropped or changing windows; None: the hybrid as it is")
    lora: Lora | None = Field(Lora(), description="None: all weights")
    trains: tuple[Trained, ...] = Field((), description="the form's own parameters that train along")
    schedule: Schedule
    data: Data


class Evaluate(Config):
    """Run suites in a list of states; the evaluated student is the exported folder, reloaded."""

    step: Literal["evaluate"] = "evaluate"
    suites: tuple[SerializeAsAny[Config], ...]
    states: tuple[NamedState, ...]
    hybrid: State | None = Field(description="the state the student is exported in; None: no layer was swapped")
    seeds: tuple[int, ...]
    margin: float


class Choice(Config):
    """Which layers stay softmax; the others are converted.

    `uniform`: layers offset + floor(i n / keep) of n, i = 0, 1, ... (at 1/4 every fourth). `explicit`: `layers`. The others
    score each candidate on `rows` held-out rows (selection part) of `length` tokens, in nats a token:

    * `lm_ppl` ("AR" in arXiv 2606.16429): what the teacher's log-loss rises by without the layer's attention output; the
      largest stay. No student is made.
    * `single_keep_ppl` (its "GA-S2"): log-loss of a student with this layer alone as softmax, after the method's steps up to
      its first `tune`; the smallest stay.
    * `kl_stage2` (GA-S2 of arXiv 2512.20569): that student is first tuned on KL(teacher || student) by `tune`; its KL counts.

    Steps before a `tune` learn layer by layer from the teacher's stream, so they are made once, for all layers, and each
    candidate borrows from them. Several `draws` (start values of new parameters, and rows) are pooled; how far their own
    choices agree is in the Record. Equal scores: the lower layer stays.

    Sample YAML: `{keep: 0.25, policy: lm_ppl}`, `{keep: 7, policy: single_keep_ppl, draws: 3}`,
    `{policy: explicit, layers: [0, 13, 27]}`
    """

    policy: Policy = Field("uniform", description="arXiv 2606.16429 compares uniform, lm_ppl and single_keep_ppl")
    keep: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="layers that stay softmax: how many, or their share (a whole number of layers)"
    )
    offset: Annotated[int, Field(ge=0)] = Field(0, description="uniform: the first layer that stays")
    layers: tuple[Annotated[int, Field(ge=0)], ...] = Field((), description="explicit: the layers that stay")
    candidates: Literal["all"] | tuple[Annotated[int, Field(ge=0)], ...] = Field(
        "all", description="layers that may stay; the rest are converted unseen"
    )
    draws: Annotated[int, Field(ge=1)] = 1
    rows: Annotated[int, Field(ge=2)] = Field(16, description="of each draw")
    length: Annotated[int, Field(ge=2)] = Field(1024, description="tokens of a row (the authors: 2048)")
    data: Data | None = Field(None, description="held-out rows come from its selection part; None: the recipe's data")
    tune: Schedule | None = Field(None, description="kl_stage2: how each candidate is tuned, all weights")

    @model_validator(mode="after")
    def _fits(self) -> "Choice":
        """Every field that is given has an effect under the policy."""
        scored = {"keep", "candidates", "draws", "rows", "length", "data"}
        used: dict[str, set[str]] = {
            "uniform": {"keep", "offset"},
            "explicit": {"layers"},
            "lm_ppl": scored,
            "single_keep_ppl": scored,
            "kl_stage2": {*scored, "tune"},
        }
        mine = used[self.policy]
        idle = [n for n in Choice.model_fields if n not in {*mine, "policy"} and getattr(self, n) != _default(n)]
        if idle:
            text = f"policy {self.policy} does not use {', '.join(idle)}; it has {', '.join(sorted(mine))}"
            raise ValueError(text)
        if missing := [n for n in ("keep", "layers", "tune") if n in mine and not getattr(self, n)]:
            raise ValueError(f"policy {self.policy} needs {', '.join(missing)}")
        if self.tune and (self.tune.validation or self.tune.curve):
            raise ValueError("tune of kl_stage2 has neither validation nor curve: every candidate trains alike")
        return self

    @property
    def scored(self) -> bool:
        """Whether the choice is made by measuring; else it is known ahead."""
        return self.policy not in ("uniform", "explicit")


def _default(name: str) -> object:
    return Choice.model_fields[name].default


class Select(Choice):
    """Choose which layers stay softmax, before any is swapped; later steps say `layers: {from: select}`.

    `probe`: the steps that make the student in which a candidate is tried; its `Tune`, if any, is made for each candidate.
    The model is left as it was.
    """

    step: Literal["select"] = "select"
    probe: tuple[Swap | Switch | Calibrate | Transfer | Tune, ...] = ()


ConvertedLayers = Annotated[
    Literal["all"] | Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | Choice,
    Field(
        description="layers to convert: all, a list, or a choice of those that stay softmax: {keep: 0.25, policy: lm_ppl}"
    ),
]

Step = Select | Swap | Switch | Calibrate | Transfer | Tune | Evaluate
_S = TypeVar("_S", bound=Config)


def first(steps: Iterable[Step], kind: type[_S]) -> _S | None:
    """The first step of a kind; None where there is none."""
    return next((s for s in steps if isinstance(s, kind)), None)
