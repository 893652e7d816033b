"""The catalogue of recipes and suites as Markdown, made from their files alone (no torch)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .committed import is_current
from .cost import count
from .finding import CHECKOUT, INSTALLED
from .load import Loaded, expand, load
from .plan import Plan, plan
from .recipe import Model
from .records import Record, read_record
from .shipped import SHIPPED
from .suites import read_suite

HEAD = """\
# Recipes

Made by `recipelin list --format markdown`, not by hand; `make catalogue` makes it anew and CI compares. Run one by its
name: `recipelin run pocket/lolcats`. `recipelin plan NAME` shows its steps; `recipelin new mine --from NAME` begins your own.

* **runs**: points of the grid, each with a Record of its own.
* **FLOP** over all runs and **memory**, the peak of the largest step, are the plan's estimates; a dash where they depend on
  data that is not in this repository.
* **Record**: whether `results/records` (for the teachers: `recipelin/pocket*`) holds a finished one of every run. *older plan*:
  one of the same name whose plan was another (the recipe, its suite, or what recipelin makes of them): run it again to compare.
"""


@dataclass(frozen=True)
class Entry:
    """A recipe with the plans of all points of its grid."""

    name: str
    path: Path
    loaded: Loaded
    plans: tuple[Plan, ...]


def root() -> Path:
    """The folder of recipes: the checkout's, else the installed copy."""
    return CHECKOUT if CHECKOUT.is_dir() else INSTALLED


def names(*, suites: bool = False) -> dict[str, Path]:
    """Name -> file of every recipe, or of every suite, sorted by folder, then by name."""
    found = {p.relative_to(root()).with_suffix("").as_posix(): p for p in root().rglob("*.yaml")}
    order = sorted(found, key=lambda name: name.split("/"))
    return {name: found[name] for name in order if name.startswith("suites/") == suites}


def entries() -> tuple[Entry, ...]:
    """Every recipe, planned. Raises RecipeError, PlanError."""
    found = []
    for name, path in names().items():
        loaded = load(path)
        found.append(Entry(name, path, loaded, tuple(plan(point) for point in expand(loaded))))
    return tuple(found)


def catalogue() -> str:
    """The whole page. Raises RecipeError, PlanError, RecordError."""
    folder = root().parent / "results" / "records"
    files = [*sorted(folder.glob("*.json")), *(f / "record.json" for f in SHIPPED.values())]
    records = [read_record(path) for path in files] if folder.is_dir() else None
    lines = [HEAD]
    sections: dict[str, list[Entry]] = {}
    for entry in entries():
        sections.setdefault(entry.name.rpartition("/")[0] or ".", []).append(entry)
    for title, members in sections.items():
        columns = ["recipe", "claim", "paper", "teacher", "method", "runs", "FLOP", "memory"]
        rows = [_row(entry) for entry in members]
        if records is not None:
            columns.append("Record")
            rows = [[*row, _recorded(entry, records)] for row, entry in zip(rows, members, strict=True)]
        lines += [f"## {title}", "", *_table(columns, rows), ""]
    suites = []
    for name, path in names(suites=True).items():
        suite = read_suite(path)
        kinds = [str(getattr(e, "eval", "")) for e in suite.evals]
        suites.append([_link(name.removeprefix("suites/"), path), suite.about or "", ", ".join(dict.fromkeys(kinds))])
    lines += ["## Suites", "", "A recipe names them in `eval.suites`.", ""]
    lines += [*_table(["suite", "measures", "evaluations"], suites), ""]
    return "\n".join(lines)


def _row(entry: Entry) -> list[str]:
    recipe = entry.loaded.recipe
    costs = [p.cost for planned in entry.plans for p in planned.steps if p.cost.memory]
    flops = [c.flops for c in costs]
    known = [f for f in flops if f is not None]
    memory = max(max(c.memory["cpu"], c.memory["cuda"]) for c in costs)
    return [
        _link(entry.name, entry.path),
        recipe.about.claim or "",
        recipe.about.paper or "",
        _teacher(recipe.model),
        f"`{recipe.method.name}`",  # type: ignore[attr-defined]
        str(len(entry.plans)),
        count(sum(known)) if len(known) == len(flops) else "–",  # noqa: RUF001
        count(memory, "B"),
    ]


def _teacher(model: Model) -> str:
    if model.scratch:
        return "made from nothing"
    return model.teacher or (f"student {model.student.folder}" if model.student else "")


def _recorded(entry: Entry, records: Sequence[Record]) -> str:
    """How many runs have a finished Record of the present plan, and whether one of an older plan is there."""
    ours = {planned.name: planned.hash for planned in entry.plans}
    finished = [r for r in records if r.status == "finished" and r.name in ours]
    now = {r.name for r in finished if r.plan_hash == ours[r.name]}
    if len(now) == len(ours):
        return "yes"
    if now:
        return f"{len(now)} of {len(ours)}"
    return "older plan" if finished else "no"


def _link(name: str, path: Path) -> str:
    return f"[{name}]({path.relative_to(root()).as_posix()})"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield f"|{'|'.join('---:' if c in ('runs', 'FLOP', 'memory') else '---' for c in columns)}|"
    for row in rows:
        cells = [" ".join(cell.replace("|", "\\|").split()) for cell in row]
        yield f"| {' | '.join(cells)} |"


def compare(path: Path) -> int:
    """Hold a file against the catalogue; the exit code: 0 the same, 1 not. Raises OSError for a file that is not there."""
    path.stat()
    return 0 if is_current(path, catalogue, source="the recipes", command="recipelin list --format markdown") else 1
