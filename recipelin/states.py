"""Branch states: which parts of a hybrid take part in a forward pass, and how they are joined (DESIGN §6)."""

from typing import Annotated, Literal, Protocol

from pydantic import Field, model_validator

from .base import Config

Branch = Literal["window", "linear", "sinks"]
Join = Literal["shared", "absolute", "replace", "average", "sum"]
Shape = Literal["sliding", "terraced"]
Compat = Literal["lolcats_tk_v1"]


class State(Config):
    """What a form does in a forward pass; structure (feature maps, widths) is the form's own config.

    Sample YAML (in `method:` most of these are fields of the method; in `eval.states:` a state may be spelt out)::

        {branches: [window, linear], window: 32, sinks: 0, cover: outside, join: shared}
    """

    branches: tuple[Branch, ...] = ("window", "linear")
    window: Annotated[int, Field(ge=1)] | Literal["full"] = Field(
        64, description="softmax window in tokens, the query included; `full` is causal softmax (LoLCATs: 64)"
    )
    shape: Shape = Field(
        "sliding",
        description="sliding: the last `window` keys; terraced: the query's block of `window` keys and the whole block "
        "before it, blocks counted from the first real token",
    )
    compat: Compat | None = Field(
        None,
        description="the terraced window as LoLCATs published it: rows of at most `window` tokens are counted twice, blocks "
        "end with the call, decoding slides; takes no padding (lm_eval: batch 1), sinks, other cover or join",
    )
    sinks: Annotated[int, Field(ge=0)] = Field(
        0, description="first real tokens of a row that softmax always sees (LoLCATs has none)"
    )
    cover: Literal["outside", "all"] = Field(
        "outside", description="keys of the linear branch: those outside the softmax set (LoLCATs), or all"
    )
    join: Join = Field(
        "shared", description="how the branches share a row (DESIGN §5); LoLCATs: shared; Liger: average"
    )
    mix: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="g of the `shared` join for every head; None: what was learned (LoLCATs)"
    )
    max_gradient: Literal["through", "detached"] = Field(
        "through", description="gradient through the row maximum of the softmax side (LoLCATs: through)"
    )
    ablate: Literal["mass", "output"] = Field(
        "mass", description="an absent branch leaves numerator and denominator (mass), or only the numerator (output)"
    )

    @model_validator(mode="after")
    def _compat_fits(self) -> "State":
        check_compat(self)
        return self

    @property
    def most_keys(self) -> int | None:
        """Most keys that the softmax window of one query holds; None: all. A terrace is the own block and the one before."""
        if self.window == "full":
            return None
        return 2 * self.window if self.shape == "terraced" else self.window

    def leaves_keys(self, length: int, own_window: int | None) -> bool:
        """Whether a row of `length` tokens has a key outside window and sinks that a teacher's own window still holds."""
        if self.window == "full":
            return False
        for query in range(length):
            terrace = self.shape == "terraced"
            nearest = (query // self.window - 1) * self.window if terrace else query - self.window + 1
            if max(self.sinks, 0 if own_window is None else query - own_window + 1) < nearest:
                return True
        return False


class _Compat(Protocol):
    """What `check_compat` always finds, in a State or in a method's fields; cover, join and sinks only if they are there."""

    @property
    def compat(self) -> Compat | None: ...
    @property
    def shape(self) -> Shape: ...
    @property
    def window(self) -> int | Literal["full"]: ...


def check_compat(fields: _Compat) -> None:
    """Raises ValueError for fields that LoLCATs does not have beside its published window."""
    if fields.compat is None:
        return
    needed = {"shape": "terraced", "cover": "outside", "sinks": 0, "join": "shared"}
    wrong = [f"{n}: {getattr(fields, n)}" for n, x in needed.items() if getattr(fields, n, x) != x]
    if fields.window == "full":
        wrong.append("window: full")
    if wrong:
        raise ValueError(
            f"compat: {fields.compat} needs shape: terraced, a window in tokens, cover: outside, join: shared and no sinks; "
            f"found {', '.join(wrong)}"
        )


class NamedState(Config):
    """A state as a table shows it: its name, whose weights, and the resolved state (None: the module as it stands)."""

    name: str
    weights: Literal["teacher", "student"]
    state: State | None


SINKS_ONLY = 8  # arXiv 2510.05901 Table 1: 'Sinks only (8)'

NAMES = ("teacher", "softmax", "hybrid", "window", "window+sinks", "linear", "linear_outside", "sinks", "none")


def resolve(name: str, hybrid: State) -> NamedState:
    """The named state of DESIGN §6, made from the hybrid state that the method ends in.

    Raises KeyError for a name outside `NAMES`.
    """
    if name not in NAMES:
        raise KeyError(name)
    if name == "teacher":
        return NamedState(name=name, weights="teacher", state=None)

    def change(**fields: object) -> State:
        return State(**{**hybrid.model_dump(), **fields})

    state = {
        # LoLCATs' published window has no meaning beside all keys, all windows or sinks: compat ends there.
        "softmax": lambda: change(branches=("window",), window="full", sinks=0, compat=None),
        "hybrid": lambda: hybrid,
        "window": lambda: change(branches=("window",)),
        "window+sinks": lambda: change(branches=("window", "sinks"), sinks=hybrid.sinks or SINKS_ONLY, compat=None),
        "linear": lambda: change(branches=("linear",), cover="all", compat=None),
        "linear_outside": lambda: change(branches=("linear",), cover="outside"),
        "sinks": lambda: change(branches=("sinks",), sinks=SINKS_ONLY, compat=None),
        "none": lambda: change(branches=()),
    }[name]()
    return NamedState(name=name, weights="student", state=state)


def subsets(hybrid: State) -> dict[tuple[str, ...], NamedState]:
    """All subsets of the hybrid's branches, for the Shapley values: the hybrid with the others ablated, cover unchanged.

    A subset that is one of `NAMES` has its name. The state `sinks` is that of the first 8; the hybrid's own are `sinks-4`.
    """
    found: dict[tuple[str, ...], NamedState] = {}
    for mask in range(2 ** len(hybrid.branches)):
        kept = tuple(b for i, b in enumerate(hybrid.branches) if mask >> i & 1)
        state = State(**{**hybrid.model_dump(), "branches": kept})
        known = next((n for n in NAMES if n != "teacher" and resolve(n, hybrid).state == state), None)
        plain = f"sinks-{hybrid.sinks}" if kept == ("sinks",) else "+".join(kept)
        found[kept] = NamedState(name=known or plain, weights="student", state=state)
    return found
