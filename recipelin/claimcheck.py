"""A claims spec held against its recipes: each is there, and measures what the claims ask (no torch)."""

from collections.abc import Mapping
from pathlib import Path

from .claimspec import Asked, Claims, Other, read_placed, read_value
from .cost import suites_of
from .mistakes import PlanError, listed, nearest, placed
from .naming import but_seed
from .plan import plan
from .points import points
from .steps import Evaluate
from .strict_yaml import RecipeError, Where


def check_claims(path: Path) -> Claims:
    """Read a claims spec and hold it against its recipes: each is there, is one but for the seed, and measures what is asked.

    Raises RecipeError with every mistake.
    """
    spec, places = read_placed(path)
    plans: dict[str, Evaluate | str] = {name: _evaluation(name) for name in spec.recipes}
    unfit: list[tuple[Where, str]] = []
    for index, claim in enumerate(spec.claims):
        at: Where = ("claims", index, "effect")
        sides = [(at, claim.effect.recipe, read_value(claim.effect.value))]
        if isinstance(claim.effect.minus, Other):
            sides.append(((*at, "minus"), claim.effect.minus.recipe, claim.effect.other))
        for where, recipe, value in sides:
            step = plans[recipe]
            if isinstance(step, str):
                unfit.append(((*where, "recipe"), f"claim {claim.id}: {step}"))
                continue
            states = [s.name for s in step.states]
            known = [*states, "gap", "retention"]
            for state in value.states:
                if state not in states:
                    text = f"{recipe} has no state {state!r}{nearest(state, known)}; it measures {listed(states)}"
                    unfit.append(((*where, "value"), f"claim {claim.id}: {text}"))
            if problem := _unmeasured(claim.effect.column, step):
                unfit.append(((*at, "column"), f"claim {claim.id}: {recipe} {problem}"))
    if unfit:
        raise RecipeError([placed(places, where, text) for where, text in dict.fromkeys(unfit)])
    return spec


def _evaluation(recipe: str) -> Evaluate | str:
    """The last step of a recipe's plan, or what is wrong with the name."""
    try:
        found = points(recipe)
        alike = list(dict.fromkeys(but_seed(p.recipe.name) for p in found))  # in the order of the grid
        if len(alike) > 1:
            text = f"{recipe} is {len(alike)} recipes; name one point of its grid: "
            return text + listed(f"{base}/{','.join(sorted(values))}" for base, values in alike)
        if alike != [but_seed(recipe)]:
            return f"recipe {recipe}: its Records are named {found[0].recipe.name}; use that name"
        step = plan(found[0]).steps[-1].step
    except RecipeError as error:
        first = error.mistakes[0]
        return f"recipe {recipe}: {first.text}" if not first.line else f"recipe {recipe} is wrong: {first}"
    except PlanError as error:
        return f"recipe {recipe}: {error}"
    assert isinstance(step, Evaluate)
    return step


def _unmeasured(column: Asked, step: Evaluate) -> str | None:
    """What the suites of a recipe lack."""
    suites = suites_of(step)
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
