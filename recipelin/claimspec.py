"""The schema of a claims spec: for each claim the effect, what is expected of it, and the margin (no torch)."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from .base import Config
from .mistakes import located, placed
from .strict_yaml import Mistake, RecipeError, Where, read_yaml
from .tablespec import OfCurve

Expected = Literal["greater", "less", "equal"]
RATIOS = ("gap", "retention", "recovery", "corrected recovery")
STATES_OF = {"gap": ("hybrid", "window", "teacher"), "retention": ("linear", "none", "teacher")}


class Value(Config):
    """A quantity, read: `kind`, and the states it is made of."""

    kind: Literal["state", "difference", "gap", "retention", "recovery", "corrected recovery", "agreement"]
    states: tuple[str, ...]

    @property
    def judges_the_branch(self) -> bool:
        """Whether exposed items alone count unless the spec says otherwise."""
        return self.kind in ("difference", "gap", "retention")


def read_value(text: str) -> Value:
    """`hybrid`, `hybrid - window`, `gap`, `retention`, `[corrected] recovery of linear`, `agreement of layers`."""
    if text == "agreement of layers":
        return Value(kind="agreement", states=())
    if text in ("gap", "retention"):
        return Value(kind=text, states=STATES_OF[text])  # type: ignore[arg-type]
    if found := re.fullmatch(r"((?:corrected )?recovery) of (\S+)", text):
        return Value(kind=found[1], states=(found[2], "teacher"))  # type: ignore[arg-type]
    names = text.split(" - ")
    if len(names) > 2 or any(not n or " " in n for n in names):
        raise ValueError(
            f"found the text {text!r}; expected a state, `STATE - STATE`, gap, retention, `recovery of STATE`, "
            "`corrected recovery of STATE` or `agreement of layers`"
        )
    return Value(kind="state" if len(names) == 1 else "difference", states=tuple(names))


Counted = Literal["stage", "training", "compute"]
COUNTED = {
    "stage": "tokens",
    "training": "tokens, those of the steps before counted too",
    "compute": "FLOPs, those of the steps before counted too",
}


class Asked(OfCurve):
    """On what an effect is measured: a task, recall near or far, or a task while a stage trained (schedule: curve), after so
    many tokens or by what a target took.

    Sample YAML: `{task: next_line_long}`, `{recall: far, reach: 93}`, `{task: perplexity, suite: pocket-curve, at_tokens: 0}`,
    `{task: perplexity, suite: pocket-curve, tokens_to: {teacher: 3}, counted: compute}`
    """

    reach: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="the distance in tokens where near ends; default: layers x (window - 1) of each recipe; needed where "
        "recipes of different windows are compared",
    )
    counted: Counted = Field(
        "stage",
        description="with tokens_to: the tokens of the stage alone, of everything that trained or calibrated up to there, or "
        "the FLOPs of all that, by the plan's estimates",
    )

    @model_validator(mode="after")
    def _one_kind(self) -> "Asked":
        if (self.task is None) == (self.recall is None):
            raise ValueError("give exactly one of task and recall")
        if self.reach is not None and self.recall is None:
            raise ValueError("`reach` parts recall near from far; give recall: near or far beside it")
        if self.of_curve and (self.task is None or (self.tokens_to is not None and self.at_tokens is not None)):
            raise ValueError("give one of tokens_to and at_tokens, with a task")
        if self.counted != "stage" and self.tokens_to is None:
            raise ValueError(f"counted: {self.counted} says what a target took; give tokens_to beside it")
        return self

    def __str__(self) -> str:
        what = self.task.replace("_", " ") if self.task else " ".join(filter(None, ("recall", self.of, self.recall)))
        more = [x.replace("_", " ") for x in (self.suite, self.metric) if x]
        more += [f"over {self.reach} tokens" if self.recall == "far" else f"up to {self.reach} tokens"] * bool(
            self.reach
        )
        of_stage = f" of {self.stage}" if self.stage else ""
        more += [f"after {self.at_tokens:,} tokens{of_stage}"] if self.at_tokens is not None else []
        what += f" ({', '.join(more)})" if more else ""
        if self.tokens_to is None:
            return what
        wanted = self.tokens_to
        target = f"{wanted.value}" if wanted.value is not None else f"{wanted.teacher} times the teacher's"
        return f"{COUNTED[self.counted]}{of_stage} to a {what} of {target}"


class Other(Config):
    """The other side of a difference between recipes. Sample YAML: `{recipe: pocket/lolcats, value: window}`"""

    recipe: str
    value: str | None = Field(None, description="default: the same as on the first side")

    @model_validator(mode="after")
    def _readable(self) -> "Other":
        if self.value is not None:
            read_value(self.value)
        return self


class Less(Config):
    """A difference between two more recipes. Sample YAML: `{recipe: pocket/lolcats, minus: pocket/hedgecats}`"""

    recipe: str
    minus: str


class Effect(Config):
    """What is estimated: a value of a recipe, less a constant or a value of another recipe on the same items.

    `value`: a state (its mean score; of a log-loss minus the nats, so that larger is better), `STATE - STATE` (paired),
    `gap` = (hybrid - window)/(teacher - window), `retention` = (linear - none)/(teacher - none), `recovery of STATE` =
    state/teacher, `corrected recovery of STATE` = (state - chance)/(teacher - chance). `agreement of layers`: the share of the
    layers kept as softmax that two seeds have in common, mean over pairs (no column; minus: chance). Of a column with
    tokens_to: the other recipe's budget over this one's, in logarithms, so above 0 this one needs less.

    `recipe` stands for every seed of its grid; a point of other axes is named: `pocket/windows/window=8`. Sample YAML::

        {recipe: pocket/absolute, value: gap, minus: {recipe: pocket/lolcats-with-recall}, column: {task: perplexity}}
    """

    recipe: str
    value: str
    column: Asked | None = Field(None, description="everything but `agreement of layers` has one")
    minus: Other | Literal["chance"] | float = Field(
        0.0, description="a constant (a share: 0.5 is 50 %), chance (a blind guess), or another recipe, paired by items"
    )
    less: Less | None = Field(None, description="what the same difference is between two more recipes, taken off")
    items: Literal["exposed", "all"] | None = Field(
        None, description="which count; default: exposed for STATE - STATE, gap and retention, all for the others"
    )

    @model_validator(mode="after")
    def _readable(self) -> "Effect":
        value = read_value(self.value)
        if (self.column is None) != (value.kind == "agreement"):
            raise ValueError("give a column: what is measured, and `agreement of layers` alone has none")
        if value.kind == "agreement" and (self.minus != "chance" or self.less):
            raise ValueError("agreement of layers goes with minus: chance")
        if self.less and not isinstance(self.minus, Other):
            raise ValueError("`less` takes a difference between recipes off another; give minus: {recipe: ...}")
        if self.column is not None and self.column.of_curve:
            if any(v.kind != "state" for v in (value, *self._others)):
                raise ValueError("a curve has no items: give a state, not a difference or a ratio of states")
            if self.items is not None:
                raise ValueError("`items`: a curve has none")
            if self.column.tokens_to is not None and not isinstance(self.minus, Other):
                raise ValueError("tokens_to compares two recipes; give minus: {recipe: ...}")
        if self.minus == "chance" and value.kind not in ("state", "agreement"):
            raise ValueError(
                f"minus: chance goes with a state alone; `corrected recovery of` corrects, found {self.value!r}"
            )
        if isinstance(self.minus, Other) and (value.kind in RATIOS) != (self.other.kind in RATIOS):
            raise ValueError(f"found {self.value!r} minus {self.minus.value!r}: a ratio and a score have no difference")
        return self

    @property
    def _others(self) -> tuple[Value, ...]:
        return (self.other,) if isinstance(self.minus, Other) else ()

    @property
    def values(self) -> tuple[Value, ...]:
        """What is taken from each of `recipes`."""
        own = (read_value(self.value), *self._others)
        return own * 2 if self.less else own

    @property
    def other(self) -> Value:
        """What is taken from the other recipe."""
        assert isinstance(self.minus, Other)
        return read_value(self.minus.value or self.value)

    @property
    def exposed(self) -> bool:
        """Whether only exposed items count."""
        return read_value(self.value).judges_the_branch if self.items is None else self.items == "exposed"

    @property
    def recipes(self) -> tuple[str, ...]:
        """What is compared: the first less the second, less the third, plus the fourth."""
        own = (self.recipe, self.minus.recipe) if isinstance(self.minus, Other) else (self.recipe,)
        return (*own, self.less.recipe, self.less.minus) if self.less else own

    def __str__(self) -> str:
        first = f"{self.value} of {self.recipe}"
        if isinstance(self.minus, Other):
            first += f", less {self.minus.value or self.value} of {self.minus.recipe}"
        elif self.minus == "chance":
            first += " less chance"
        elif self.minus:
            first += f" less {self.minus:g}"
        if self.less:
            first += f", less the same of {self.less.recipe} and {self.less.minus}"
        if self.column is None:
            return f"{first}, share of layers that two seeds have in common"
        return f"{first}, {'by' if self.column.tokens_to else 'on'} {self.column}"


class Claim(Config):
    """One row. Sample YAML::

    id: 1a
    short: "text only: hybrid = window, next line"
    claim: "LoLCATs on text: dropping the linear branch costs nothing on the next line"
    effect: {recipe: pocket/lolcats, value: hybrid - window, column: {task: next_line_long}}
    expect: equal
    """

    id: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")]
    short: Annotated[str, Field(max_length=32)] = Field(description="the row's label")
    claim: str = Field(description="the claim, whole: a sentence that can turn out wrong")
    effect: Effect
    expect: Expected
    margin: Annotated[float, Field(ge=0)] | None = Field(
        None, description="smallest effect that counts, in shares (0.01 is a point or 1 %) or nats; default: the spec's"
    )
    group: str | None = Field(None, description="the heading that it stands under; default: that of the claim before")
    paper: str | None = Field(None, description="who claims it, and where")
    note: str | None = Field(None, description="the best explanation, the experiment that would decide")


class Claims(Config):
    """A claims spec, whole. Sample YAML: `{name: pocket-claims, title: What holds on the pocket teacher, claims: [...]}`"""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")]
    title: str
    about: str | None = Field(None, description="what a reader should know before the rows")
    margin: Annotated[float, Field(ge=0)] = Field(0.01, description="of claims that name none (DESIGN §6: one point)")
    claims: Annotated[tuple[Claim, ...], Field(min_length=1)]

    @property
    def recipes(self) -> tuple[str, ...]:
        """Every recipe named, in order, once."""
        return tuple(dict.fromkeys(name for c in self.claims for name in c.effect.recipes))

    def margin_of(self, claim: Claim) -> float:
        return self.margin if claim.margin is None else claim.margin


def read_claims(path: Path) -> Claims:
    """Read a claims spec. Raises RecipeError with every mistake of the file."""
    return read_placed(path)[0]


def read_placed(path: Path) -> tuple[Claims, dict[Where, Mistake]]:
    """The same, with the place of every value."""
    expected = "a claims spec (name, title, claims; results/README.md)"
    raw, places, _ = read_yaml(path, kind=expected)
    try:
        spec = Claims.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(list(located(error, (), Claims, places))) from error
    if unfit := [placed(places, where, text) for where, text in _unfit(spec)]:
        raise RecipeError(unfit)
    return spec, places


def _unfit(spec: Claims) -> Iterator[tuple[Where, str]]:
    """Names given twice, and equality without a margin."""
    ids = [c.id for c in spec.claims]
    for index, claim in enumerate(spec.claims):
        if claim.id in ids[:index]:
            yield ("claims", index, "id"), f"two claims have the id {claim.id!r}"
        if claim.expect == "equal" and not spec.margin_of(claim):
            yield ("claims", index, "expect"), f"claim {claim.id}: expect: equal needs a margin above 0"
