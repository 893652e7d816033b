"""Claims: every word of the rule, effects by hand, pairing by items and seeds, nothing invented, mistakes have a line."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recipelin.claimcheck import check_claims
from recipelin.claims import RESAMPLES, Judged, claims_table, judge_claims, read, sources_of
from recipelin.claimspec import Claims, read_claims
from recipelin.commands import checked
from recipelin.load import load
from recipelin.published import Published, TableError
from recipelin.records import ItemsOf
from recipelin.render import FORMATS, render
from recipelin.statistics import Interval
from recipelin.strict_yaml import RecipeError
from recipelin.tables import table_command

ROOT = Path(__file__).parents[2]
SHARED = "pocket/lolcats"
OTHER = "pocket/absolute"


def spec_of(*claims: dict[str, Any], **more: Any) -> Claims:
    """A spec of claims with the fields given; what is not given is filled."""
    filled = [
        {"id": str(i), "short": "a claim", "claim": "A claim", "expect": "greater"}
        | claim
        | {"effect": {"recipe": SHARED, "column": {"task": "perplexity"}} | claim["effect"]}
        for i, claim in enumerate(claims, start=1)
    ]
    return Claims.model_validate({"name": "x", "title": "X", "claims": tuple(filled)} | more)


def one(effect: dict[str, Any], records: list[Published], **more: Any) -> Judged:
    spec = spec_of({"effect": effect} | more)
    return judge_claims(spec, sources_of(spec, records))[0]


@pytest.fixture(scope="module")
def base(make: Any) -> Published:
    return Published(*make(recalls=60), Path("a.json"))


@pytest.fixture(scope="module")
def better(make: Any) -> Published:
    """Another recipe on the same items: its hybrid loses less and recalls more."""
    figures = {
        "teacher": (2.97, 0.50, 0.53, 0.99, 0.97),
        "hybrid": (3.02, 0.48, 0.50, 0.97, 0.90),
        "window": (3.17, 0.48, 0.44, 0.98, 0.02),
    }
    return Published(*make(figures, name=OTHER, recalls=60, seed=1), Path("b.json"))


# --- the rule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "value", "high", "adjusted", "greater", "less", "equal"),
    [
        (0.02, 0.05, 0.08, 0.01, "shown", "opposite", "opposite"),
        (-0.08, -0.05, -0.02, 0.01, "opposite", "shown", "opposite"),
        (0.02, 0.05, 0.08, 0.06, "undecided", "undecided", "undecided"),  # Holm took it
        (-0.009, 0.0, 0.009, 1.0, "equal", "equal", "shown"),
        (0.002, 0.005, 0.009, 0.001, "equal", "equal", "shown"),  # significant, and too small to count
        (0.002, 0.008, 0.02, 0.001, "undecided", "undecided", "undecided"),  # significant, its point within the margin
        (-0.05, 0.0, 0.05, 1.0, "undecided", "undecided", "undecided"),  # no difference seen is no equality
    ],
)
def test_how_an_effect_reads(
    low: float, value: float, high: float, adjusted: float, greater: str, less: str, equal: str
) -> None:
    interval = Interval(value, low, high, 100)
    found = [read(interval, adjusted, e, 0.01) for e in ("greater", "less", "equal")]  # type: ignore[arg-type]
    assert found == [greater, less, equal]


def test_every_word_is_reached(base: Published) -> None:
    far = {"recall": "far"}
    spec = spec_of(
        {"effect": {"value": "hybrid - window", "column": far}},
        {"effect": {"value": "hybrid - window", "column": {"recall": "near"}}},
        {"effect": {"value": "linear - linear_outside", "column": far}, "margin": 0.05},
        {"effect": {"value": "hybrid - window", "column": {"task": "next_line_long"}}, "margin": 0.05},
        {"effect": {"value": "hybrid - window", "column": {"task": "next_line_short"}}},
        {"effect": {"recipe": OTHER, "value": "gap"}},
        {"effect": {"value": "linear - linear_outside", "column": far}, "margin": 0.05, "expect": "equal"},
        {"effect": {"value": "hybrid - window", "column": far}, "expect": "less"},
    )
    judged = judge_claims(spec, sources_of(spec, [base]))
    words = ["shown", "opposite", "equal", "undecided", "not testable", "not run", "shown", "opposite"]
    assert [j.word for j in judged] == words
    assert judged[4].reason == "0 of 200 items exposed (at least half of their scored tokens), 100 needed"
    assert judged[5].missing == (OTHER,)
    # Holm over the seven that were run, the one that is not testable as p = 1: the smallest p, four times.
    smallest = 2 / (1 + RESAMPLES)
    assert judged[0].estimate is not None and judged[0].estimate.p == smallest
    assert judged[0].adjusted == pytest.approx(7 * smallest)
    table = claims_table(spec, [base])
    assert table.lead[-1] == "8 claims: 2 shown, 2 opposite, 1 equal, 1 undecided, 1 not testable, 1 not run."
    assert table.notes[-1] == "still to run: recipelin run pocket/absolute, then recipelin publish with its folder"
    assert any("over the 7 claims that were run" in n and "up to 250 claims" in n for n in table.notes)
    rows = dict(table.blocks[0].rows)
    assert len(rows) == 8 and not any(c.numbers for c in rows["6 a claim"])
    assert [c.text for c in rows["1 a claim"][4:5]] == ["1*"] and any(n.startswith("*: ") for n in table.notes)


# --- effects ----------------------------------------------------------------------------------------------------------


def test_effects_are_what_their_names_say(base: Published, better: Published) -> None:
    """Against means of the items, taken by hand; nats with the sign turned, so that larger is better."""

    def score(state: str, task: str, record: Published = base) -> float:
        metric = "log_loss" if task == "perplexity" else "acc" if "@" in task else "acc_norm"
        return float(np.mean(record.items[ItemsOf(state, "pocket", task, metric, 0)].score))

    def loss(state: str, record: Published = base) -> float:
        return score(state, "perplexity", record)

    gaps = [(loss("window", r) - loss("hybrid", r)) / (loss("window", r) - loss("teacher", r)) for r in (base, better)]
    line, far = {"task": "next_line_long"}, {"recall": "far"}
    recalled = float(np.mean([score("hybrid", f"recall@{d}") for d in (96, 150, 201)]))
    over_150 = float(np.mean([score("hybrid", f"recall@{d}") for d in (150, 201)]))
    kept = (loss("none") - loss("linear")) / (loss("none") - loss("teacher"))
    state, teacher = score("hybrid", "next_line_long"), score("teacher", "next_line_long")
    other = {"recipe": OTHER}
    for effect, expected, unit in (
        ({"value": "hybrid - window"}, loss("window") - loss("hybrid"), "nats"),
        ({"value": "hybrid", "minus": other}, loss("hybrid", better) - loss("hybrid"), "nats"),
        ({"value": "hybrid", "minus": other | {"value": "window"}}, loss("window", better) - loss("hybrid"), "nats"),
        ({"value": "gap"}, gaps[0], "%"),
        ({"value": "gap", "minus": 0.5}, gaps[0] - 0.5, "%"),
        ({"recipe": OTHER, "value": "gap", "minus": {"recipe": SHARED}}, gaps[1] - gaps[0], "%"),
        ({"value": "retention"}, kept, "%"),
        ({"value": "recovery of hybrid", "column": line}, state / teacher, "%"),
        ({"value": "corrected recovery of hybrid", "column": line}, (state - 0.25) / (teacher - 0.25), "%"),
        ({"value": "hybrid", "column": far}, recalled, "points"),
        ({"value": "hybrid", "minus": "chance", "column": far}, recalled - 0.125, "points"),
        ({"value": "hybrid", "column": far | {"reach": 100}}, over_150, "points"),
    ):
        found = one(effect, [base, better])
        assert found.estimate is not None, effect
        assert found.estimate.interval.value == pytest.approx(expected), effect
        assert found.estimate.unit == unit, effect
        assert found.estimate.interval.low < expected < found.estimate.interval.high, effect


def test_exposed_items_count_where_the_branch_is_judged(base: Published) -> None:
    short = {"task": "next_line_short"}
    assert one({"value": "hybrid - window", "column": short}, [base]).word == "not testable"
    everything = one({"value": "hybrid - window", "column": short, "items": "all"}, [base])
    assert everything.estimate is not None and everything.estimate.interval.n == 200
    # No answer changes: that is no certainty, as Wilson's bound says of 200 items.
    assert everything.estimate.interval.high == pytest.approx(1.96**2 / (200 + 1.96**2), abs=1e-4)
    assert everything.word == "undecided" and everything.estimate.p == 1.0
    assert one({"value": "hybrid - window", "column": short, "items": "all"}, [base], margin=0.02).word == "equal"
    assert one({"value": "hybrid", "minus": "chance", "column": short}, [base]).estimate is not None


def test_a_ratio_without_a_sure_denominator_is_not_testable(base: Published) -> None:
    found = one({"value": "gap", "column": {"recall": "near"}}, [base])  # teacher 99 %, window 98 %
    assert found.word == "not testable" and found.reason.startswith("gap of pocket/lolcats: its denominator")


def test_recipes_are_paired_by_items(base: Published, better: Published) -> None:
    effect = {"recipe": OTHER, "value": "hybrid", "minus": {"recipe": SHARED}}
    paired = one(effect, [base, better]).estimate
    single = one({"value": "hybrid - teacher"}, [base]).estimate
    assert paired is not None and single is not None
    assert paired.interval.high - paired.interval.low < 0.02  # the texts differ by 0.5 nats, the recipes by 0.03
    renamed = {k: replace(v, id=tuple(f"{i}x" for i in v.id)) for k, v in better.items.items()}
    with pytest.raises(
        TableError, match=r"claim 1: pocket/absolute and pocket/lolcats were not measured on the same items"
    ):
        one(effect, [base, better._replace(items=renamed)])


def five(name: str, make: Any, seeds: tuple[int, ...], lead: float) -> list[Published]:
    """Students of five seeds whose hybrids differ by tenths of a nat from seed to seed, the second recipe's by `lead` less."""
    offsets = (0.3, -0.1, 0.2, -0.3, -0.1)
    found = []
    for seed, offset in zip(seeds, offsets, strict=True):
        figures = {
            "teacher": (2.9, 0.5, 0.5, 1.0, 1.0),
            "window": (3.6, 0.5, 0.5, 1.0, 0.0),
            "hybrid": (3.2 + offset - lead, 0.5, 0.5, 1.0, 0.5),
        }
        day = f"2026-11-2{seed % 5}T00:00Z"
        record, items = make(
            figures,
            rows=110,
            questions=4,
            recalls=4,
            seed=seed,
            name=f"{name}/seed={seed}",
            started=day,
        )
        found.append(Published(record, items, Path(f"{name.replace('/', '-')}-seed={seed}.json")))
    return found


def test_recipes_are_paired_by_seeds_and_the_grid_is_one_recipe(make: Any) -> None:
    effect = {"recipe": OTHER, "value": "hybrid", "minus": {"recipe": SHARED}}
    shared = five(SHARED, make, (1, 2, 3, 4, 5), 0.0)
    same = one(effect, [*shared, *five(OTHER, make, (1, 2, 3, 4, 5), 0.05)]).estimate
    others = one(effect, [*shared, *five(OTHER, make, (6, 7, 8, 9, 10), 0.05)]).estimate
    assert same is not None and others is not None
    assert same.interval.value == pytest.approx(0.05, abs=0.01) == others.interval.value
    assert same.interval.half < 0.02 and others.interval.half > 0.3
    assert same.seeds == ((1, 2, 3, 4, 5),) * 2
    table = claims_table(spec_of({"effect": effect}), [*shared, *five(OTHER, make, (6, 7, 8, 9, 10), 0.05)])
    assert dict(table.blocks[0].rows)["1 a claim"][4].text == "5, 5"
    assert "Paired by items; the seeds are not the same." in table.conclusions[0]
    assert not any(n.startswith("*: ") for n in table.notes)
    assert sum("seeds 1, 2, 3, 4, 5: cpu, commit 0123456789, pocket-lolcats-seed=1.json" in n for n in table.notes) == 1
    three = one(
        {"value": "hybrid", "minus": {"recipe": OTHER}}, [*shared[:3], *five(OTHER, make, (1, 2, 3, 4, 5), 0.05)]
    )
    assert three.estimate is not None and three.estimate.seeds == ((1, 2, 3), (1, 2, 3, 4, 5))


def test_what_the_records_lack_is_named(base: Published) -> None:
    for effect, words in (
        ({"value": "hybird"}, "no items of state 'hybird' of pocket/lolcats; did you mean 'hybrid'"),
        (
            {"value": "hybrid", "column": {"task": "next_line_lng"}},
            "has no next line lng; did you mean 'next_line_long'",
        ),
        ({"value": "hybrid"}, "a log-loss alone is compared with another state or recipe, not with a number"),
        ({"value": "recovery of hybrid"}, "the recovery of a log-loss has no meaning"),
    ):
        with pytest.raises(TableError, match=f"claim 1: .*{words}"):
            one(effect, [base])


# --- the spec ---------------------------------------------------------------------------------------------------------

SPEC = """\
name: claims
title: Claims
claims:
  - id: 1a
    group: First
    short: "recall far: hybrid > window"
    claim: "The linear branch recalls beyond the windows"
    paper: "arXiv 0000.00000 §3"
    effect: {recipe: pocket/lolcats, value: hybrid - window, column: {recall: far}}
    expect: greater
    note: "Best explanation: recall rows."
  - id: 1b
    short: "gap over LoLCATs"
    claim: "The absolute join raises the gap"
    effect: {recipe: pocket/absolute, value: gap, minus: {recipe: pocket/lolcats}, column: {task: perplexity}}
    expect: greater
    margin: 0.02
"""


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('short: "gap', 'shrot: "gap', r"x.yaml:13:5: claims.1.shrot: unknown key; did you mean 'short'"),
        (
            "value: gap",
            "value: gap of hybrid",
            r"x.yaml:15:13: .*found the text 'gap of hybrid'; expected a state",
        ),
        ("{recall: far}", "{recall: far, task: piqa}", r"x.yaml:9:\d+: .*give exactly one of task and recall"),
        ("{recall: far}", "{task: piqa, reach: 9}", "`reach` parts recall near from far"),
        ("id: 1b", "id: 1a", r"x.yaml:12:9: two claims have the id '1a'"),
        (
            "expect: greater\n    margin: 0.02",
            "expect: equal\n    margin: 0",
            r"x.yaml:16:13: claim 1b: .*a margin above 0",
        ),
        ("expect: greater\n    note", "expect: grater\n    note", r"x.yaml:10:13: .*did you mean 'greater'"),
        ("gap over LoLCATs", "x" * 33, "found 33 characters; expected at most 32"),
        (
            "minus: {recipe: pocket/lolcats}",
            "minus: {recipe: pocket/lolcats, value: window}",
            "a ratio and a score have no",
        ),
        ("hybrid - window,", "hybrid - window, minus: chance,", "minus: chance goes with a state alone"),
        (
            "recipe: pocket/absolute",
            "recipe: pocket/absolut",
            r"x.yaml:15:22: claim 1b: recipe pocket/absolut: .*did you mean",
        ),
        (
            "recipe: pocket/absolute",
            "recipe: pocket/windows",
            "is 5 recipes; name one point of its grid: "
            + ", ".join(f"pocket/windows/window={w}" for w in (4, 8, 16, 32, 64))  # in the order of the grid
            + "$",
        ),
        (
            "recipe: pocket/absolute",
            "recipe: pocket/windows/window=9",
            r"no such point; did you mean '?pocket/windows/window",
        ),
        ("hybrid - window,", "hybrid - widnow,", r"x.yaml:9:45: .*has no state 'widnow'; did you mean 'window'"),
        (
            "{task: perplexity}",
            "{task: perplexty}",
            r"x.yaml:15:\d+: .*has no task 'perplexty'; did you mean 'perplexity'",
        ),
        ("{task: perplexity}", "{task: perplexity, suite: poket}", "has no suite 'poket'; did you mean 'pocket'"),
    ],
)
def test_mistakes_in_a_spec(old: str, new: str, words: str, tmp_path: Path) -> None:
    assert old in SPEC
    (tmp_path / "x.yaml").write_text(SPEC.replace(old, new))
    with pytest.raises(RecipeError, match=words):
        check_claims(tmp_path / "x.yaml")


def test_a_claims_spec_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(SPEC)
    assert checked(path) == "claims claims (2 about 2 recipes)"
    with pytest.raises(RecipeError, match=r"x.yaml:3:1: this is a claims spec \(recipelin table .*; expected a recipe"):
        load(path)


def test_the_table_is_made_anew_to_the_same_bytes(tmp_path: Path, capsys: Any, base: Published) -> None:
    (tmp_path / "tables").mkdir()
    path = tmp_path / "tables" / "x.yaml"
    path.write_text(SPEC)
    assert table_command(argparse.Namespace(path=path, format="markdown", check=False, figure=False)) == 0
    path.with_suffix(".md").write_text(capsys.readouterr().out)
    assert table_command(argparse.Namespace(path=path, format="markdown", check=True, figure=False)) == 0
    path.with_suffix(".md").write_text(path.with_suffix(".md").read_text().replace("not run", "shown", 1))
    assert table_command(argparse.Namespace(path=path, format="markdown", check=True, figure=False)) == 1
    spec = read_claims(path)
    for format in FORMATS:
        text = render(claims_table(spec, [base]), format)
        assert text == render(claims_table(spec, [base]), format) and "not run" in text and "§3" in text
    markdown = render(claims_table(spec, [base]), "markdown")
    assert "## First" in markdown and "**1b not run**: The absolute join raises the gap. Effect: gap of" in markdown
    assert "Note: Best explanation: recall rows." in " ".join(markdown.split())


@pytest.mark.parametrize("name", ["pocket-claims", "pocket-taylor-claims"])
def test_the_shipped_claims_fit_their_recipes_and_a_terminal(name: str) -> None:
    path = ROOT / "results" / "tables" / f"{name}.yaml"
    spec = check_claims(path)
    assert spec.name == path.stem
    assert max(map(len, render(claims_table(spec, []), "markdown").splitlines())) <= 140
    assert max(map(len, path.with_suffix(".md").read_text().splitlines())) <= 140
