"""A claims spec held against its recipes: each is there, and measures what the claims ask (no torch)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from .claimspec import Asked, Claims, read_placed
from .cost import suites_of
from .load import Loaded
from .mistakes import PlanError, listed, nearest, placed
from .naming import but_seed
from .plan import Plan, plan
from .points import points
from .recipe import Suite
from .steps import Evaluate, Select, Transfer, Tune
from .strict_yaml import RecipeError, Where


def check_claims(path: Path) -> Claims:
    """Read a claims spec and hold it against its recipes: each is there, is one but for the seed, and measures what is asked.

    Raises RecipeError with every mistake.
    """
    spec, places = read_placed(path)
    grids: dict[str, tuple[Loaded, ...]] = {}
    plans = {name: _planned(name, grids) for name in spec.recipes}
    unfit: list[tuple[Where, str]] = []
    for index, claim in enumerate(spec.claims):
        at: Where = ("claims", index, "effect")
        places_of = (at, (*at, "minus"), (*at, "less"), (*at, "less"))
        column = claim.effect.column
        for number, (where, recipe, value) in enumerate(
            zip(places_of, claim.effect.recipes, claim.effect.values, strict=False)
        ):
            found = plans[recipe]
            if isinstance(found, str):
                unfit.append(((*where, "minus" if number == 3 else "recipe"), f"claim {claim.id}: {found}"))
                continue
            step = found.steps[-1].step
            assert isinstance(step, Evaluate)
            if column is None:
                if not any(isinstance(p.step, Select) and p.step.scored for p in found.steps):
                    unfit.append(((*where, "value"), f"claim {claim.id}: {recipe} chooses no layers by a score"))
                continue
            if column.of_curve:
                if problem := _no_curve(column, found, value.states[0]):
                    unfit.append(((*at, "column"), f"claim {claim.id}: {recipe} {problem}"))
                continue
            states = [s.name for s in step.states]
            known = [*states, "gap", "retention"]
            for state in value.states:
                if state not in states:
                    text = f"{recipe} has no state {state!r}{nearest(state, known)}; it measures {listed(states)}"
                    unfit.append(((*where, "value"), f"claim {claim.id}: {text}"))
            if problem := _unmeasured(column, suites_of(step)):
                unfit.append(((*at, "column"), f"claim {claim.id}: {recipe} {problem}"))
    if unfit:
        raise RecipeError([placed(places, where, text) for where, text in dict.fromkeys(unfit)])
    return spec


def _planned(recipe: str, grids: dict[str, tuple[Loaded, ...]]) -> Plan | str:
    """A recipe's plan, of one of its seeds, or what is wrong with the name."""
    try:
        found = points(recipe, grids=grids)
        alike = list(dict.fromkeys(but_seed(p.recipe.name) for p in found))  # in the order of the grid
        if len(alike) > 1:
            text = f"{recipe} is {len(alike)} recipes; name one point of its grid: "
            return text + listed(f"{base}/{','.join(sorted(values))}" for base, values in alike)
        if alike != [but_seed(recipe)]:
            return f"recipe {recipe}: its Records are named {found[0].recipe.name}; use that name"
        return plan(found[0])
    except RecipeError as error:
        first = error.mistakes[0]
        return f"recipe {recipe}: {first.text}" if not first.line else f"recipe {recipe} is wrong: {first}"
    except PlanError as error:
        return f"recipe {recipe}: {error}"


def _no_curve(column: Asked, found: Plan, state: str) -> str | None:
    """What the curves of a recipe lack."""
    steps = [p.step for p in found.steps if isinstance(p.step, (Transfer, Tune)) and p.step.schedule.curve]
    stages = [s for s in steps if column.stage in (None, s.stage)]
    if not stages:
        has = f"; it has those of {listed(s.stage for s in steps)}" if steps else ""
        return f"has no curve{f' of stage {column.stage!r}' if column.stage else ''}{has}"
    evaluated = found.steps[-1].step
    assert isinstance(evaluated, Evaluate)
    suites = suites_of(evaluated)
    for step in stages:
        curve = step.schedule.curve
        assert curve is not None
        if state not in curve.states:
            return f"measures {listed(curve.states)} on its curve, not {state!r}"
        if column.suite is not None and column.suite not in curve.suites:
            return f"has no suite {column.suite!r} on its curve; it has {listed(curve.suites)}"
        if column.at_tokens is not None and column.at_tokens > curve.tokens[-1]:
            return f"is measured up to {curve.tokens[-1]:,} tokens, not at {column.at_tokens:,}"
        relative = column.tokens_to is not None and column.tokens_to.teacher is not None
        known = "teacher" in [s.name for s in evaluated.states] and {s.name for s in suites} & set(curve.suites)
        if relative and not known:
            return f"has no teacher on {listed(curve.suites)} (eval: suites, states), whose value the target multiplies"
    named = [s for s in suites if s.name in {name for step in stages for name in step.schedule.curve.suites}]  # type: ignore[union-attr]
    return _unmeasured(column, named) if named else None


def _unmeasured(column: Asked, suites: Sequence[Suite]) -> str | None:
    """What the suites of a recipe lack."""
    if column.suite is not None and column.suite not in (names := [s.name for s in suites]):
        return f"has no suite {column.suite!r}{nearest(column.suite, names)}; it has {listed(names)}"
    evals: list[Mapping[str, object]] = [
        e.model_dump() for s in suites if column.suite in (None, s.name) for e in s.evals
    ]
    if column.recall is not None:
        has = any(e["eval"] in ("recall", "retrieval") for e in evals)
        return None if has else "measures no recall"
    tasks = [t["task"] for e in evals for t in e.get("tasks", ())]  # type: ignore[attr-defined]
    tasks += [str(e["eval"]) for e in evals if e["eval"] == "perplexity"]
    if column.task in tasks:
        return None
    return f"has no task {column.task!r}{nearest(str(column.task), tasks)}; it measures {listed(tasks)}"
