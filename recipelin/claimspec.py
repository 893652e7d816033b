"""The schema of a claims spec: for each claim the effect, what is expected of it, and the margin (no torch)."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from .base import Config
from .mistakes import located, placed
from .strict_yaml import Mistake, RecipeError, Where, read_yaml
from .tablespec import Measured

Expected = Literal["greater", "less", "equal"]
RATIOS = ("gap", "retention", "recovery", "corrected recovery")
STATES_OF = {"gap": ("hybrid", "window", "teacher"), "retention": ("linear", "none", "teacher")}


class Value(Config):
    """A quantity, read: `kind`, and the states it is made of."""

    kind: Literal["state", "difference", "gap", "retention", "recovery", "corrected recovery"]
    states: tuple[str, ...]

    @property
    def judges_the_branch(self) -> bool:
        """Whether exposed items alone count unless the spec says otherwise."""
        return self.kind in ("difference", "gap", "retention")


def read_value(text: str) -> Value:
    """`hybrid`, `hybrid - window`, `gap`, `retention`, `recovery of linear`, `corrected recovery of linear`."""
    if text in ("gap", "retention"):
        return Value(kind=text, states=STATES_OF[text])  # type: ignore[arg-type]
    if found := re.fullmatch(r"((?:corrected )?recovery) of (\S+)", text):
        return Value(kind=found[1], states=(found[2], "teacher"))  # type: ignore[arg-type]
    names = text.split(" - ")
    if len(names) > 2 or any(not n or " " in n for n in names):
        raise ValueError(
            f"found the text {text!r}; expected a state, `STATE - STATE`, gap, retention, `recovery of STATE` or "
            "`corrected recovery of STATE`"
        )
    return Value(kind="state" if len(names) == 1 else "difference", states=tuple(names))


class Asked(Measured):
    """On what an effect is measured: a task, or recall near or far.

    Sample YAML: `{task: next_line_long}`, `{recall: far, reach: 93}`
    """

    reach: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="the distance in tokens where near ends; default: layers x (window - 1) of each recipe; needed where "
        "recipes of different windows are compared",
    )

    @model_validator(mode="after")
    def _one_kind(self) -> "Asked":
        if (self.task is None) == (self.recall is None):
            raise ValueError("give exactly one of task and recall")
        if self.reach is not None and self.recall is None:
            raise ValueError("`reach` parts recall near from far; give recall: near or far beside it")
        return self

    def __str__(self) -> str:
        what = self.task.replace("_", " ") if self.task else " ".join(filter(None, ("recall", self.of, self.recall)))
        more = [x.replace("_", " ") for x in (self.suite, self.metric) if x]
        more += [f"over {self.reach} tokens" if self.recall == "far" else f"up to {self.reach} tokens"] * bool(
            self.reach
        )
        return what + (f" ({', '.join(more)})" if more else "")


class Other(Config):
    """The other side of a difference between recipes. Sample YAML: `{recipe: pocket/lolcats, value: window}`"""

    recipe: str
    value: str | None = Field(None, description="default: the same as on the first side")

    @model_validator(mode="after")
    def _readable(self) -> "Other":
        if self.value is not None:
            read_value(self.value)
        return self


class Effect(Config):
    """What is estimated: a value of a recipe, less a constant or a value of another recipe on the same items.

    `value`: a state (its mean score; of a log-loss minus the nats, so that larger is better), `STATE - STATE` (paired),
    `gap` = (hybrid - window)/(teacher - window), `retention` = (linear - none)/(teacher - none), `recovery of STATE` =
    state/teacher, `corrected recovery of STATE` = (state - chance)/(teacher - chance). `recipe` stands for every seed of its
    grid; a point of other axes is named: `pocket/windows/window=8`. Sample YAML::

        {recipe: pocket/absolute, value: gap, minus: {recipe: pocket/lolcats-with-recall}, column: {task: perplexity}}
    """

    recipe: str
    value: str
    column: Asked
    minus: Other | Literal["chance"] | float = Field(
        0.0, description="a constant (a share: 0.5 is 50 %), chance (a blind guess), or another recipe, paired by items"
    )
    items: Literal["exposed", "all"] | None = Field(
        None, description="which count; default: exposed for STATE - STATE, gap and retention, all for the others"
    )

    @model_validator(mode="after")
    def _readable(self) -> "Effect":
        value = read_value(self.value)
        if self.minus == "chance" and value.kind != "state":
            raise ValueError(
                f"minus: chance goes with a state alone; `corrected recovery of` corrects, found {self.value!r}"
            )
        if isinstance(self.minus, Other) and (value.kind in RATIOS) != (self.other.kind in RATIOS):
            raise ValueError(f"found {self.value!r} minus {self.minus.value!r}: a ratio and a score have no difference")
        return self

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
        return (self.recipe, self.minus.recipe) if isinstance(self.minus, Other) else (self.recipe,)

    def __str__(self) -> str:
        first = f"{self.value} of {self.recipe}"
        if isinstance(self.minus, Other):
            first += f", less {self.minus.value or self.value} of {self.minus.recipe}"
        elif self.minus == "chance":
            first += " less chance"
        elif self.minus:
            first += f" less {self.minus:g}"
        return f"{first}, on {self.column}"


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
