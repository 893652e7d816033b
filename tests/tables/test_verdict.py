"""Known answers: the verdict may come out either way, and says so when it cannot tell."""

from dataclasses import replace
from typing import Any

import pytest

from recipelin.verdict import Verdict, verdict

TEACHER = (2.9, 0.50, 0.60, 1.0, 0.97)
WINDOW = (3.1, 0.49, 0.45, 1.0, 0.02)
REST = {
    "linear": (6.8, 0.3, 0.3, 0.0, 0.0),
    "linear_outside": (6.9, 0.3, 0.3, 0.0, 0.0),
    "none": (6.6, 0.3, 0.3, 0.0, 0.0),
}


def word(make: Any, hybrid: tuple[float, ...], *, teacher: tuple[float, ...] = TEACHER, **sizes: Any) -> Verdict:
    figures = {"teacher": teacher, "hybrid": hybrid, "window": WINDOW} | REST
    record, items = make(figures, **{"questions": 1000, "recalls": 100, "noise": 0.005} | sizes)
    return verdict(record, items)


def of(found: Verdict, metric: str) -> Verdict.OfMetric:
    return next(m for m in found.per_metric if m.metric == metric)


def test_a_hybrid_that_is_its_window_is_bypassed(make: Any) -> None:
    found = word(make, WINDOW)
    assert found.word == "bypassed"
    assert {m.metric: m.word for m in found.per_metric} == {
        "perplexity": "bypassed",
        "next line short": "not testable",
        "next line long": "bypassed",
        "recall near": "not testable",
        "recall far": "bypassed",
    }
    assert found.sentence.startswith("bypassed: dropping the linear branch costs nothing")


def test_a_hybrid_worse_than_its_window_is_bypassed(make: Any) -> None:
    found = word(make, (3.3, 0.4, 0.4, 0.5, 0.0))
    assert found.word == "bypassed"
    assert of(found, "perplexity").difference[0] == pytest.approx(-0.2, abs=0.01)  # type: ignore[index]


def test_a_quarter_brought_back_is_used(make: Any) -> None:
    found = word(make, (3.05, 0.49, 0.45, 1.0, 0.02))
    assert (found.word, found.metric) == ("used", "perplexity")
    assert of(found, "perplexity").gap[0] == pytest.approx(0.25, abs=0.02)  # type: ignore[index]
    assert of(found, "recall far").word == "bypassed"


def test_most_brought_back_carries(make: Any) -> None:
    found = word(make, (3.09, 0.49, 0.46, 1.0, 0.85))
    assert (found.word, found.metric) == ("carries", "recall far")
    assert "nats" not in found.sentence and "n = 300" in found.sentence


def test_half_brought_back_within_the_error_is_only_used(make: Any) -> None:
    found = word(make, (3.1, 0.49, 0.45, 1.0, 0.48))
    assert of(found, "recall far").word == "used"
    assert of(found, "recall far").gap[1] < 0.5 < of(found, "recall far").gap[2]  # type: ignore[index]


def test_few_noisy_items_are_undecided(make: Any) -> None:
    found = word(make, (3.1, 0.49, 0.48, 1.0, 0.02), questions=120, recalls=20, rows=60)
    assert of(found, "next line long").word == "undecided"
    assert of(found, "recall far").word == "not testable"
    assert found.word == "undecided"


def test_bypassed_needs_that_none_is_undecided(make: Any) -> None:
    found = word(make, (3.1, 0.49, 0.48, 1.0, 0.02), questions=120)
    assert {of(found, "perplexity").word, of(found, "next line long").word} == {"bypassed", "undecided"}
    assert found.word == "undecided"


def test_short_items_cannot_tell(make: Any) -> None:
    """Recall rows are always exposed, so this suite has none."""
    figures = {"teacher": TEACHER, "hybrid": TEACHER, "window": WINDOW}
    record, items = make(figures, exposed=0.2)
    record = record.model_copy(update={"rows": tuple(r for r in record.rows if r.distance is None)})
    found = verdict(record, items)
    assert found.word == "not testable"
    assert "0 of 120 items exposed" in found.sentence


def test_too_few_items_cannot_tell(make: Any) -> None:
    found = word(make, TEACHER, questions=99, recalls=33, rows=99)
    assert found.word == "not testable"
    assert of(found, "recall far").reason.startswith("99 of 99")


def test_nothing_to_win_where_the_teacher_is_no_better_than_the_window(make: Any) -> None:
    found = word(make, TEACHER, teacher=WINDOW)
    assert found.word == "not testable"
    assert "nothing for a linear branch to win" in found.sentence


def test_a_teacher_that_may_be_no_better_leaves_nothing_to_win(make: Any) -> None:
    """Three points better, but on 150 items that may be chance."""
    found = word(make, WINDOW, teacher=(2.9, 0.5, 0.47, 1.0, 0.97), questions=150)
    assert of(found, "next line long").lost[0] > 0.01 > 0 >= of(found, "next line long").lost[1]  # type: ignore[index]
    assert of(found, "next line long").word == "not testable"


def test_what_the_window_loses_must_exceed_the_margin(make: Any) -> None:
    found = word(make, WINDOW, teacher=(3.092, 0.49, 0.45, 1.0, 0.02), noise=0.001)
    assert 0 < of(found, "perplexity").lost[1] < of(found, "perplexity").lost[2] < 0.01  # type: ignore[index]
    assert found.word == "not testable"


def test_only_exposed_items_speak(make: Any) -> None:
    """The hybrid is better on the unexposed half alone, which arithmetic forbids: the verdict must not see it."""
    record, items = make({"teacher": TEACHER, "hybrid": TEACHER, "window": WINDOW}, rows=240)
    key = next(k for k in items if k.state == "hybrid" and k.task == "perplexity")
    window = items[key._replace(state="window")]
    mixed = {
        k: replace(v, exposed=tuple(float(n % 2) for n in range(len(v))))
        for k, v in items.items()
        if k.task == "perplexity"
    }
    scores = zip(items[key].score, window.score, strict=True)
    mixed[key] = replace(mixed[key], score=tuple(x if n % 2 == 0 else y for n, (x, y) in enumerate(scores)))
    found = of(verdict(record, items | mixed), "perplexity")
    assert (found.n, found.word) == (120, "bypassed")
    assert found.difference == (0.0, 0.0, 0.0)


def test_no_linear_branch(make: Any) -> None:
    record, items = make(branches=("window",))
    assert verdict(record, items).word == "not testable"


def test_a_record_without_items_cannot_tell(make: Any) -> None:
    record, _ = make()
    found = verdict(record, {})
    assert found.word == "not testable" and "no items of teacher, hybrid, window" in found.sentence
