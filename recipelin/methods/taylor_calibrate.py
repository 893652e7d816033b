"""Taylor-Calibrate (arXiv 2606.16429): softmax layers become gated delta rules, set by statistics first (no torch)."""

from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from ..attention.gated_delta.config import STATE
from ..attention.gated_delta.config import Config as GatedDelta
from ..attention.gated_delta.rules import (
    DecayRule,
    OutputGateRule,
    Rule,
    SmallGateRule,
    ValueRule,
    WriteGateRule,
    ZeroGateRule,
)
from ..base import Config as Base
from ..compose import in_layers, transfer, tune
from ..recipe import Recipe
from ..schedule import Optimizer, Schedule, Validation
from ..sources import Data, Rows
from ..steps import BlockLoss, Calibrate, Choice, ConvertedLayers, Loss, Step, StepsError, Swap, Switch, Trained

Arm = Literal[
    "baseline",
    "zero_gate",
    "small_gate",
    "taylor_only",
    "alignment_only",
    "zero_gate_alignment",
    "taylor_calibrate",
]
ALIGNED: tuple[Arm, ...] = ("alignment_only", "zero_gate_alignment", "taylor_calibrate")


class Phase1(Base):
    """What is set in closed form, in this order; null leaves a piece out.

    Sample YAML: `{value: null, write_gate: {mode: ridge}, output_gate: {damping: 0.01}}`
    """

    decay: DecayRule | None = DecayRule()
    write_gate: WriteGateRule | None = WriteGateRule()
    value: ValueRule | None = ValueRule()
    output_gate: OutputGateRule | None = OutputGateRule()

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Those that are on."""
        return tuple(r for r in (self.decay, self.write_gate, self.value, self.output_gate) if r is not None)

    @model_validator(mode="after")
    def _something(self) -> "Phase1":
        if not self.rules:
            raise ValueError("every piece is null; use arm: baseline, or alignment_only, which have no phase 1")
        return self


class Config(Base):
    """Copies q, k, v, o of the teacher into a `gated_delta` layer and starts what is new by `arm`:

    | arm | start of the gates | stage `align` |
    |---|---|---|
    | baseline | as drawn | no |
    | zero_gate, small_gate | output gate 0; as drawn, times 0.02 | no |
    | taylor_only | phase 1, closed form | no |
    | alignment_only | as drawn | yes |
    | zero_gate_alignment | output gate 0 | yes: ours, what phase 1 must beat |
    | taylor_calibrate | phase 1 | yes |

    Stage `align` (phase 2): squared error of the block's output after o_proj, each layer fed the teacher's stream; trains q, k,
    v, decay and gates, o_proj and norm stay. Stages `transfer` (the paper's stage 1: block outputs, all of the layer) and
    `tune` (its stage 2: KL, all weights) are off unless the schedule has them; the paper's are in recipes/taylor-calibrate.
    So is stage `sft`, last: next-token loss on the assistant's answers of conversations. The authors ship a script (sft.py:
    togethercomputer/sft-mix-v0.2, default-with-system, AdamW at a constant rate after 100 steps of warm-up, clip 1) without its
    settings; theirs pads each conversation to a row, here they are packed::

        sft:
          tokens: 50000000
          length: 4096
          clip: 1.0
          optimizer: {lr: 1e-5}
          decay: {name: constant, warmup: 100}
          data: {mix: [{source: hub, dataset: ./sft-mix, chat: {column: conversations}, loss: response}]}

    Beside the authors' code: heads are copied whole (form: {kv_expand: row_interleave_legacy} brings their bug back);
    calibration, layer scores and `align`'s choice of the best step use the training and selection parts, never what is
    reported. One optimiser trains all layers: the gradient norm is clipped, and the best step kept, over all of them, where the
    authors do so layer by layer.

    Sample YAML: `{name: taylor_calibrate, arm: taylor_only, layers: {keep: 0.25}, phase1: {write_gate: {mode: ridge}}}`
    """

    name: Literal["taylor_calibrate"] = "taylor_calibrate"
    arm: Arm = "taylor_calibrate"
    form: GatedDelta = GatedDelta()
    layers: ConvertedLayers = Field(
        Choice(keep=0.25),
        description="arXiv 2606.16429: 0.25, 0.5 and 0.75 stay softmax; uniform, lm_ppl, single_keep_ppl",
    )
    phase1: Phase1 = Field(Phase1(), description="of the arms taylor_only and taylor_calibrate")
    small_gate: SmallGateRule = Field(SmallGateRule(), description="of the arm small_gate")
    calibration_batches: Annotated[int, Field(ge=1)] = Field(
        1,
        description="of phase 1, each as large as those of `align`, of its data (arXiv 2606.16429: one of 4 x 256 tokens)",
    )
    same_rows: bool = Field(
        True,
        description="`align` sees the calibration's rows again in every step (arXiv 2606.16429); false: new ones, which it "
        "cannot learn by heart",
    )
    held_out: Annotated[int, Field(ge=0)] = Field(
        2,
        description="batches of the selection part on which each calibration reports cosine and error, before and after",
    )
    as_published: bool = Field(
        False,
        description="calibration and layer scores read the test part, which is also reported, from its first row on, as in arXiv "
        "2606.16429 (the first 4 x 256 tokens; _get_calibration_data of its code); held-out rows are those behind them",
    )
    transfer_loss: BlockLoss = Field("l2norm", description="of stage `transfer` (the authors' code: l2norm)")
    loss: Loss = Field(
        Loss(lm=0.0, kl=1.0), description="of stage `tune` (arXiv 2606.16429: forward KL, temperature 1)"
    )

    @property
    def without(self) -> tuple[str, ...]:
        """Stages that the arm does not have, whatever the schedule says."""
        return () if self.arm in ALIGNED else ("align",)

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The calibrations of the arm, in their order."""
        if self.arm in ("taylor_only", "taylor_calibrate"):
            return self.phase1.rules
        gates: dict[Arm, tuple[Rule, ...]] = {
            "zero_gate": (ZeroGateRule(),),
            "zero_gate_alignment": (ZeroGateRule(),),
            "small_gate": (self.small_gate,),
        }
        return gates.get(self.arm, ())

    @model_validator(mode="after")
    def _form_has_it(self) -> "Config":
        for rule in self.rules:
            if why := self.form.refuses_calibration(rule.WHAT, rule):
                raise ValueError(f"arm {self.arm}: {why}")
        if self.as_published and not self.same_rows:
            raise ValueError("as_published: its rows are the same in every step; leave same_rows out")
        return self


NEW: tuple[Trained, ...] = ("decay", "write_gate", "output_gate")
LAYER: tuple[Trained, ...] = ("projections", "output_projection", *NEW, "output_norm")
# The authors' code, apply_taylor_calibrate: 300 steps of one batch of 4 x 256, AdamW, 1e-4 for q, k, v and 1e-3 for the rest,
# weight decay 0.01, clip 1. It keeps the step of the lowest training loss; here the held-out rows choose.
STAGES: dict[str, Schedule | None] = {
    "align": Schedule(
        steps=300,
        batch=4,
        length=256,
        clip=1.0,
        optimizer=Optimizer(lr=1e-3, weight_decay=0.01, group_lr={"projections": 1e-4}),
        validation=Validation(every=50, watch=(Validation.Watch(state="transfer"),), batches=2),
    ),
    "transfer": None,
    "tune": None,
    "sft": None,
}


def steps(recipe: Recipe) -> tuple[Step, ...]:
    """Swap, switch to the linear branch, the arm's calibrations, align, transfer, tune, sft."""
    method = recipe.method
    assert isinstance(method, Config)
    size = recipe.schedule["align"] or STAGES["align"]
    assert size is not None
    data = _read(size.data or recipe.data, method, size.batch * method.calibration_batches)
    calibrations = [
        Calibrate(
            what=rule.WHAT,
            rule=rule,
            data=data,
            batches=method.calibration_batches,
            batch=size.batch,
            length=size.length,
            held_out=method.held_out,
        )
        for rule in method.rules
    ]
    aligned: tuple[Step, ...] = ()
    if "align" not in method.without:
        found = transfer(recipe, "align", {"block_outputs": 1.0}, ("projections", *NEW, *_convolution(method)))
        aligned = tuple(s.model_copy(update={"data": data}) for s in found)
    started = (Swap(form="gated_delta", config=method.form), Switch(state=STATE), *calibrations, *aligned)
    trained = (*NEW, "output_norm", *_convolution(method))
    layers = method.layers
    if isinstance(layers, Choice) and layers.scored:
        scored_on = _read(layers.data or recipe.data, method, None)
        layers = layers.model_copy(update={"data": scored_on})
    return in_layers(
        recipe,
        layers,
        *started,
        *transfer(recipe, "transfer", {"block_outputs": 1.0}, (*LAYER, *_convolution(method)), method.transfer_loss),
        *tune(recipe, "tune", lora=None, trains=trained, loss=method.loss),
        *_sft(recipe, trained),
        untrained=len(started),
    )


def _sft(recipe: Recipe, trained: tuple[Trained, ...]) -> tuple[Step, ...]:
    """Stage `sft`. Raises StepsError where it would read what has no answers."""
    schedule = recipe.schedule["sft"]
    whole = (
        [s for s in schedule.data.mix if isinstance(s, Rows) and s.loss != "response"]
        if schedule and schedule.data
        else []
    )
    if schedule is not None and (schedule.data is None or whole):
        found = "no data of its own" if schedule.data is None else "rows with loss: all"
        raise StepsError(
            f"schedule.sft: {found}; expected data: {{mix: [...]}} of sources with a chat (or a template) and loss: response"
        )
    return tune(recipe, "sft", lora=None, trains=trained)


def _read(data: Data, method: Config, rows: int | None) -> Data:
    """The data block as calibration and scoring read it: which part, and how many rows."""
    changes: dict[str, object] = {}
    if method.as_published:
        changes |= {"only_part": "test", "order": "first"}
    if method.same_rows and rows is not None:
        changes["first_rows"] = rows
    try:
        return Data.model_validate({**dict(data), **changes})
    except ValidationError as error:
        raise StepsError(f"method.as_published: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error


def _convolution(method: Config) -> tuple[Trained, ...]:
    return ("short_convolution",) if method.form.short_convolution else ()
