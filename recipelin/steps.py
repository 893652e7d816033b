"""The closed vocabulary of steps that methods compose and `run` carries out (DESIGN §4, no torch)."""

from typing import Annotated, Literal

from pydantic import Field, SerializeAsAny, model_validator

from .base import Config
from .branches import BranchSchedule
from .schedule import Schedule
from .sources import Data
from .states import NamedState, State

Layers = Literal["all"] | tuple[int, ...]
Objective = Literal["weights", "outputs", "hybrid_weights", "hybrid_outputs"]
Trained = Literal["feature_maps", "mix", "log_scale"]


class StepsError(ValueError):
    """A recipe that its method cannot be made of; the message says what to change."""


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

    `what` names a calibration of the form; hybrid has `log_scale` (closed form of c_h).
    """

    step: Literal["calibrate"] = "calibrate"
    what: str
    data: Data
    batches: Annotated[int, Field(ge=1)] = 8
    batch: Annotated[int, Field(ge=1)] = 4
    length: Annotated[int, Field(ge=2)] = 1024


class Transfer(Config):
    """Layer-local distillation: every layer is fed the teacher's stream and learns the teacher's attention.

    loss = mean over layers of sum over objectives of weight * loss:
    `weights` cross-entropy of pure linear weights, `outputs` MSE of pure linear outputs, `hybrid_weights` and
    `hybrid_outputs` the same of the hybrid in its current state; outputs are taken before o_proj.
    """

    step: Literal["transfer"] = "transfer"
    stage: str
    objective: dict[Objective, float]
    trains: tuple[Trained, ...]
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


Step = Swap | Switch | Calibrate | Transfer | Tune | Evaluate
