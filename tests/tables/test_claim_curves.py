"""Claims read off curves and chosen layers: values and budgets by arithmetic, bounds, and what seeds agree on."""

import math
from pathlib import Path
from typing import Any

import pytest

from recipelin.budget import spent
from recipelin.claimcheck import check_claims
from recipelin.claims import RESAMPLES, Judged, claims_table, judge_claims, read, sources_of
from recipelin.claimspec import Claims
from recipelin.published import Published, TableError
from recipelin.records import CurveRow, StepTime
from recipelin.statistics import Interval, over_seeds
from recipelin.strict_yaml import RecipeError

ONE, TWO, THREE, FOUR = ("pocket/claims/taylor-arms/arm=" + a for a in ("a", "b", "c", "d"))
T4 = 2.7764451051977987  # of a two-sided 95 % interval, 4 degrees of freedom
# Nats lost by seed: mean 0, variance 0.01 x 2.5.
OFFSETS = (-0.2, -0.1, 0.0, 0.1, 0.2)


def student(make: Any, name: str, seed: int, losses: dict[int, float], **more: Any) -> Published:
    """A Record with a curve of log-losses at tokens of stage tune, after an alignment that read 300 of its planned 400 tokens."""
    record, items = make(rows=4, questions=1, recalls=1, seed=seed, name=f"{name},seed={seed}")
    row = next(r for r in record.rows if r.state == "hybrid" and r.task == "perplexity").model_dump()
    cost = {"tokens": 400, "flops": 800.0}
    steps: tuple[tuple[dict[str, Any], dict[str, Any], dict[str, object]], ...] = (
        ({"step": "select"}, {"tokens": 100, "flops": 50.0}, more.get("report", {})),
        ({"step": "swap"}, {"tokens": None, "flops": None}, {}),
        ({"step": "transfer", "stage": "align"}, cost, {"tokens": 300}),
        ({"step": "tune", "stage": "tune"}, {"tokens": 1000, "flops": 3000.0}, {}),
        ({"step": "evaluate"}, {"tokens": 10, "flops": 10.0}, {}),
    )
    times = [
        StepTime(step=s["step"], key="", seconds=1.0, peak_memory=None, reused=False, report=report)
        for s, _, report in steps
    ]
    changes = {
        "curves": tuple(CurveRow(**row | {"value": v}, stage="tune", tokens=t) for t, v in losses.items()),
        "plan": record.plan | {"steps": [{"step": s, "cost": c} for s, c, _ in steps]},
        "steps": tuple(times),
    }
    return Published(record.model_copy(update=changes), items, Path(f"{name.rpartition('=')[2]}-{seed}.json"))


def five(make: Any, name: str, curve: Any, **more: Any) -> list[Published]:
    """Students of seeds 1 to 5; `curve`: the offset of a seed -> its losses."""
    return [student(make, name, seed, curve(o), **more) for seed, o in enumerate(OFFSETS, start=1)]


def one(effect: dict[str, Any], records: list[Published], expect: str = "greater", **more: Any) -> Judged:
    filled = {"recipe": ONE, "value": "hybrid"} | effect
    claim = {"id": "1", "short": "a claim", "claim": "A claim", "expect": expect, "effect": filled} | more
    spec = Claims.model_validate({"name": "x", "title": "X", "claims": (claim,)})
    return judge_claims(spec, sources_of(spec, records))[0]


def at(tokens: int) -> dict[str, Any]:
    return {"task": "perplexity", "at_tokens": tokens}


def to(nats: float, counted: str = "stage") -> dict[str, Any]:
    return {"task": "perplexity", "tokens_to": {"value": math.exp(nats)}, "counted": counted}


def test_a_value_after_so_many_tokens_is_over_seeds_alone(make: Any) -> None:
    """The second's offsets are doubled, so that the paired difference is 0.3 - o, whose t interval is the textbook's."""
    records = five(make, ONE, lambda o: {0: 5.0 + o, 500: 3.0 + o})
    records += five(make, TWO, lambda o: {0: 6.0, 500: 3.3 + 2 * o})
    start = one({"column": at(0), "minus": {"recipe": TWO}}, records).estimate
    assert start is not None and start.unit == "nats" and start.interval.value == pytest.approx(1.0)
    late = one({"column": at(200), "minus": {"recipe": TWO}}, records).estimate  # the first point that has read 200
    assert late is not None and late.interval.value == pytest.approx(0.3)
    side = T4 * math.sqrt(0.025 / 5)
    assert late.interval.high - 0.3 == pytest.approx(side, rel=0.06) and 0.3 - late.interval.low == pytest.approx(
        side, rel=0.06
    )
    assert late.interval.n == 4 and late.seeds == ((1, 2, 3, 4, 5),) * 2


def test_a_difference_less_another(make: Any) -> None:
    records = [
        p
        for name, loss in ((ONE, 2.0), (TWO, 2.7), (THREE, 3.0), (FOUR, 4.1))
        for p in five(make, name, lambda o, loss=loss: {0: loss + o})
    ]
    effect = {"column": at(0), "minus": {"recipe": TWO}, "less": {"recipe": THREE, "minus": FOUR}}
    found = one(effect, records, expect="less")
    assert found.estimate is not None and found.estimate.interval.value == pytest.approx(0.7 - 1.1)
    assert found.word == "shown", "offsets cancel: no seed differs"
    assert "less the same of" in str(found.claim.effect)
    missing = one(effect, [p for p in records if not p.record.name.startswith(FOUR)])
    assert missing.word == "not run" and missing.missing == (FOUR,)


def test_budgets_and_what_counts(make: Any) -> None:
    """One reaches 3 nats between 0 and 500 tokens, the other between 500 and 1,000: linear in the loss."""
    first = five(make, ONE, lambda o: {0: 4.0, 500: 2.0 + o})  # 3 nats after 500 / (2 - o)
    other = five(make, TWO, lambda o: {0: 6.0, 500: 4.0, 1000: 2.0})  # after 750
    logs = [math.log(500 / (2 - o)) for o in OFFSETS]
    plain = one({"column": to(3.0), "minus": {"recipe": TWO}}, first + other)
    assert plain.estimate is not None and plain.estimate.unit == "times" and not plain.estimate.bound
    assert plain.estimate.interval.value == pytest.approx(math.log(750) - sum(logs) / 5)
    # Before the stage: 100 tokens and 50 FLOPs of choosing layers, 300 of 400 tokens and so 600 FLOPs of alignment.
    assert spent(first[0].record, "tune") == (400.0, 650.0, 3.0)
    assert spent(first[0].record, "align") == (100.0, 50.0, 2.0)
    with pytest.raises(ValueError, match="has no stage 'refine'"):
        spent(first[0].record, "refine")
    for counted, before, each in (("training", 400.0, 1.0), ("compute", 650.0, 3.0)):
        found = one({"column": to(3.0, counted), "minus": {"recipe": TWO}}, first + other).estimate
        mine = sum(math.log(before + each * math.exp(x)) for x in logs) / 5
        assert found is not None and found.interval.value == pytest.approx(math.log(before + each * 750) - mine)
    table = claims_table(Claims.model_validate({"name": "x", "title": "X", "claims": (plain.claim,)}), first + other)
    cells = dict(table.blocks[0].rows)["1 a claim"]
    assert cells[0].text.startswith(f"x{math.exp(plain.estimate.interval.value):.3g} [") and cells[3].text == "4"
    assert any(n.startswith("x: the other recipe's budget") for n in table.notes)
    assert "Paired by seeds." in table.conclusions[0]


def test_a_bound_speaks_for_its_side_alone(make: Any) -> None:
    early = five(make, ONE, lambda o: {100: 2.5 + o, 500: 2.0})  # 3 nats met at the first point
    zero = five(make, ONE, lambda o: {0: 2.5 + o, 100: 2.4, 500: 2.0})  # or before any training: 100 bounds it too
    other = five(make, TWO, lambda o: {100: 6.0, 500: 4.0, 1000: 2.0 + o})
    never = five(make, TWO, lambda o: {100: 6.0 + o, 500: 5.0})
    effect = {"column": to(3.0), "minus": {"recipe": TWO}}
    for records in (early + other, zero + other):
        found = one(effect, records)
        assert found.estimate is not None and found.estimate.bound == "at least" and found.word == "shown"
        mean = sum(math.log(500 + 500 / (2 - o)) for o in OFFSETS) / 5
        assert found.estimate.interval.value == pytest.approx(mean - math.log(100))
        assert one(effect, records, expect="less").word == "opposite"
    turned = {"recipe": TWO, "column": to(3.0), "minus": {"recipe": ONE}}
    found = one(turned, early + other, expect="less")
    assert found.estimate is not None and found.estimate.bound == "at most" and found.word == "shown"
    assert one(effect, early + never).reason.startswith("the same budgets in every seed")
    both = [*other[:2], *never[2:]]  # some seeds of the second never meet it: no more than
    mixed = one({"column": to(3.0), "minus": {"recipe": THREE}}, [*both_bounds(make)])
    assert mixed.word == "not testable" and "some from above" in mixed.reason
    some = one(effect, five(make, ONE, lambda o: {100: 4.0, 500: 2.0 + o}) + both)
    assert some.estimate is not None and some.estimate.bound == "at least"
    up, down = Interval(0.5, 0.4, 0.6, 9), Interval(-0.5, -0.6, -0.4, 9)
    assert (
        read(up, 0.01, "greater", 0.1, "at least") == "shown" and read(up, 0.01, "less", 0.1, "at most") == "undecided"
    )
    assert (
        read(down, 0.01, "less", 0.1, "at least") == "undecided" and read(down, 0.01, "less", 0.1, "at most") == "shown"
    )
    small = Interval(0.01, -0.02, 0.03, 9)
    assert read(small, 1.0, "equal", 0.1) == "shown" and read(small, 1.0, "equal", 0.1, "at least") == "undecided"


def both_bounds(make: Any) -> list[Published]:
    """The first meets the target at its first point in one seed and at no point in another."""
    first = [
        {100: 2.0, 500: 1.0},
        {100: 5.0, 500: 4.0},
        {100: 5.0, 500: 2.0},
        {100: 5.0, 500: 2.0},
        {100: 5.0, 500: 2.0},
    ]
    mine = [student(make, ONE, seed, losses) for seed, losses in enumerate(first, start=1)]
    return mine + five(make, THREE, lambda o: {100: 5.0, 500: 2.0 + o})


def test_one_seed_and_what_a_curve_lacks(make: Any) -> None:
    records = [student(make, name, 1, {0: 3.0, 100: 2.0}) for name in (ONE, TWO)]
    assert one({"column": at(0), "minus": {"recipe": TWO}}, records).reason.startswith("one seed")
    with pytest.raises(ValueError, match="fewer than two"):
        over_seeds([1.0], (1,), n=3)
    both = five(make, ONE, lambda o: {0: 3.0 + o}) + five(make, TWO, lambda o: {0: 2.0})
    for effect, words in (
        ({"column": at(900), "minus": {"recipe": TWO}}, "measured up to 0 tokens, not at 900"),
        ({"column": at(0), "value": "window", "minus": {"recipe": TWO}}, "has no curve of .* in state 'window'"),
        ({"column": at(0)}, "compared with another recipe, not with a number"),
    ):
        with pytest.raises(TableError, match=words):
            one(effect, both)


@pytest.mark.parametrize(
    ("effect", "words"),
    [
        ({"column": at(0), "value": "hybrid - window"}, "a curve has no items"),
        ({"column": at(0), "items": "all"}, "`items`: a curve has none"),
        ({"column": to(3.0)}, "tokens_to compares two recipes"),
        ({"column": at(0) | {"counted": "compute"}}, "counted: compute says what a target took"),
        ({"column": to(3.0) | {"at_tokens": 1}}, "give one of tokens_to and at_tokens"),
        ({"column": at(0), "less": {"recipe": TWO, "minus": ONE}}, "`less` takes a difference between recipes"),
        ({"value": "hybrid"}, "give a column"),
        ({"value": "agreement of layers", "column": at(0), "minus": "chance"}, "alone has none"),
        ({"value": "agreement of layers"}, "goes with minus: chance"),
    ],
)
def test_effects_that_mean_nothing_are_refused(effect: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        one(effect, [])


# --- layers -----------------------------------------------------------------------------------------------------------


def choosing(make: Any, lists: list[list[int]], candidates: int) -> list[Published]:
    scores = {str(i): 0.0 for i in range(candidates)}
    return [
        student(make, ONE, seed, {0: 3.0}, report={"layers": kept, "scores": scores})
        for seed, kept in enumerate(lists, start=1)
    ]


AGREE = {"value": "agreement of layers", "minus": "chance"}


def test_how_far_seeds_agree_on_layers(make: Any) -> None:
    """Of ten pairs of {0}, {0}, {0}, {1}, {2} three agree; two of four layers kept: {0,1}, {0,2}, {0,1} share 1/2, 1, 1/2."""
    mixed = one(AGREE, choosing(make, [[0], [0], [0], [1], [2]], 4)).estimate
    assert mixed is not None and mixed.interval.value == pytest.approx(0.3 - 0.25) and mixed.p > 0.3
    pairs = one(AGREE, choosing(make, [[0, 1], [0, 2], [0, 1]], 4)).estimate
    assert pairs is not None and pairs.interval.value == pytest.approx(2 / 3 - 0.5)
    # All five alike: by chance once in 4^4 = 256 times; two-sided twice that.
    alike = one(AGREE, choosing(make, [[3]] * 5, 4)).estimate
    assert alike is not None and alike.interval.value == pytest.approx(0.75)
    assert alike.p == pytest.approx(2 / 256, rel=0.35) and alike.p > 2 / RESAMPLES
    assert alike.interval.low == pytest.approx(1 - 1.96**2 / (5 + 1.96**2) - 0.25, abs=1e-3)
    with pytest.raises(TableError, match="chose no layers by a score"):
        one(AGREE, five(make, ONE, lambda o: {0: 3.0}))


# --- the spec against its recipes ---------------------------------------------------------------------------------------

SPEC = """\
name: claims
title: Claims
claims:
  - id: "1"
    short: a claim
    claim: A claim
    effect:
      recipe: pocket/claims/taylor-short
      value: hybrid
      minus: {recipe: pocket/claims/taylor-baseline-long}
      column: {task: perplexity, suite: pocket-curve, tokens_to: {teacher: 3}}
    expect: greater
"""


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("tokens_to: {teacher: 3}", "at_tokens: 150000", r"x.yaml:11:.*taylor-short is measured up to 102,400 tokens"),
        ("value: hybrid", "value: none", "taylor-short measures hybrid on its curve, not 'none'"),
        ("suite: pocket-curve", "suite: pocket-claims", "has no suite 'pocket-claims' on its curve"),
        ("taylor-short", "taylor-delta", "taylor-delta has no curve"),
        ("teacher: 3}", "teacher: 3}, stage: align", "has no curve of stage 'align'; it has those of tune"),
        ("{task: perplexity, suite", "{task: perplexty, suite", "has no task 'perplexty'"),
        ("teacher: 3", "teacher: -3", "greater than 0"),
    ],
)
def test_what_the_recipes_curves_lack(old: str, new: str, words: str, tmp_path: Path) -> None:
    assert old in SPEC
    (tmp_path / "x.yaml").write_text(SPEC.replace(old, new))
    with pytest.raises(RecipeError, match=words):
        check_claims(tmp_path / "x.yaml")


def test_a_spec_that_fits_and_one_that_chooses_no_layers(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(SPEC)
    check_claims(tmp_path / "x.yaml")
    text = (
        SPEC[: SPEC.index("      value")]
        + "      value: agreement of layers\n      minus: chance\n    expect: greater\n"
    )
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(RecipeError, match="taylor-short chooses no layers by a score"):
        check_claims(tmp_path / "x.yaml")
