#!/usr/bin/env python3
"""Runs every recipe that a claims spec names: what is published or finished is left out, what was interrupted goes on.

`make claims`, `make claims CLAIMS=pocket-taylor-claims JOBS=1`, `make claims AGAIN=1`, or
`python .ci/claims.py SPEC... [--jobs N] [--device D] [--plan] [--again] [--dirty]`. It publishes nothing; it ends with the
commands that do. With several jobs each runs on one thread, its output in a log under the home of runs: on two cores two runs
side by side are faster than one on two threads.
"""

import argparse
import os
import subprocess
import sys
import threading
import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from recipelin.claimcheck import check_claims
from recipelin.cost import count
from recipelin.mistakes import PlanError
from recipelin.naming import default_folder
from recipelin.plan import Plan, plan
from recipelin.points import points
from recipelin.records import Record, RecordError, provenance, read_record
from recipelin.reuse import home, lineage, threads
from recipelin.states import NamedState
from recipelin.steps import Evaluate, Tune
from recipelin.strict_yaml import RecipeError

ROOT = Path(__file__).resolve().parent.parent
MOST_JOBS = 8  # each holds up to a GiB
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
ENDED = "record, items, table, model, logs: "  # how `recipelin run` names the folder of a run that ended


@dataclass(frozen=True)
class Todo:
    """One run: its name, its plan, and the Record that makes it needless."""

    name: str
    teacher: str | None
    planned: Plan
    published: Path | None
    finished: Path | None

    @property
    def left(self) -> bool:
        return not (self.published or self.finished)


def main() -> int:
    """0: all are run. 1: one failed. 2: the spec, a recipe or the checkout is not fit. 130: interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="+", type=Path, metavar="SPEC")
    told = f"runs side by side; left out: one a core, up to {MOST_JOBS}; on a GPU one"
    parser.add_argument("--jobs", type=int, choices=range(1, 65), metavar="N", help=told)
    parser.add_argument("--device", default="auto", help="as in recipelin run")
    parser.add_argument("--plan", action="store_true", help="only show what would run, and its cost")
    parser.add_argument(
        "--again", action="store_true", help="also what is published; what the home of runs holds stays"
    )
    parser.add_argument("--dirty", action="store_true", help="run though nothing of it could be published")
    arguments = parser.parse_args()
    try:
        every = list(todo(arguments.specs, home(), again=arguments.again))
    except (RecipeError, PlanError, RecordError) as error:
        print(error, file=sys.stderr)
        return 2
    left = [each for each in every if each.left]
    print("\n".join(shown(every)))
    if arguments.plan:
        return 0
    if left and provenance(ROOT).dirty is not False and not arguments.dirty:
        print(
            "claims: this checkout has uncommitted changes (or no commit), so no Record of it could be published; commit "
            "first, and change nothing until the runs have ended (--dirty runs all the same)",
            file=sys.stderr,
        )
        return 2
    if left:
        from recipelin.run import RunError, choose_device  # torch, which --plan does without

        try:
            jobs = jobs_on(choose_device(arguments.device)) if arguments.jobs is None else arguments.jobs
        except (PlanError, RunError) as error:
            print(error, file=sys.stderr)
            return 2
        program = [sys.executable, "-m", "recipelin", "run", "--device", arguments.device]
        code = carry_out(program, [each.name for each in left], jobs=jobs, logs=home() / "claims")
        if code:
            return code
    folders = [
        each.finished or home() / default_folder(each.name, each.planned.hash) for each in every if not each.published
    ]
    if folders:
        print(f"\nto publish: recipelin publish {' '.join(map(str, folders))}")
    for spec in arguments.specs:
        print(f"then: recipelin table {spec} > {spec.with_suffix('.md')}")
    return 0


def jobs_on(device: str) -> int:
    """A run of a pocket model gains little from a second thread, and several runs on one GPU wait for one another."""
    return min(threads(), MOST_JOBS) if device.partition(":")[0] == "cpu" else 1


def todo(specs: Sequence[Path], runs: Path, *, again: bool = False) -> Iterator[Todo]:
    """Every point of every recipe, once, in order. A Record counts if it is finished, clean and of the present plan; `again`: a
    published one does not."""

    def fits(record: Record, planned: Plan) -> bool:
        return record.status == "finished" and record.dirty is False and record.plan_hash == planned.hash

    seen: set[str] = set()
    for spec in specs:
        records = spec.resolve().parent.parent / "records"  # where `recipelin table` looks
        for point in (point for recipe in check_claims(spec).recipes for point in points(recipe)):
            planned = plan(point)
            folder = default_folder(planned.name, planned.hash)
            if folder in seen:
                continue
            seen.add(folder)
            known = (p for p in sorted(records.glob(f"{folder}--*.json")) if fits(read_record(p), planned))
            run = runs / folder
            finished = run if (run / "record.json").is_file() and fits(read_record(run), planned) else None
            yield Todo(
                planned.name, point.recipe.model.teacher, planned, None if again else next(known, None), finished
            )


def shown(every: Sequence[Todo]) -> Iterator[str]:
    """What is there and what it would cost, a line a run."""
    left = [each for each in every if each.left]
    for each in every:
        state = f"published, {each.published.name}" if each.published else f"finished, {each.finished}"
        yield f"{each.name:<48} {_flops([each]):>12}  {'to run' if each.left else state}"
    yield f"{len(left)} of {len(every)} runs are left, {_flops(left)} (estimated; what several of them share, once)"


def _flops(these: Sequence[Todo]) -> str:
    costs = {what: flops for each in these for what, flops in costs_of(each)}
    known = [f for f in costs.values() if f is not None]
    return count(sum(known), "FLOP") if len(known) == len(costs) else "unknown"


def costs_of(run: Todo) -> Iterator[tuple[Hashable, float | None]]:
    """(what is made, its FLOPs): steps by their lineage, which runs share; what suites find of a teacher, and of students that
    are alike in what a state reads, is measured once."""
    for index, planned in enumerate(run.planned.steps):
        step, flops = planned.step, planned.cost.flops
        if isinstance(step, Evaluate) and flops is not None:
            a_state = flops / len(step.states)
            for shared in (_shared(run, state) for state in step.states):
                if shared is not None:
                    flops -= a_state
                    yield (shared, str(step.suites), step.seeds), a_state
        if planned.cost.memory:
            yield lineage(run.planned.steps, index), flops


def _shared(run: Todo, state: NamedState) -> Hashable | None:
    """Of which weights a state tells more than this run; None: of its student alone. `student_digest` says why."""
    if state.weights == "teacher":
        return run.teacher
    tuned = [p.step for p in run.planned.steps if isinstance(p.step, Tune)]
    attention_alone = all(step.lora and set(step.lora.targets) <= ATTENTION for step in tuned)
    if run.teacher and state.state is not None and not state.state.branches and attention_alone:
        return run.teacher, state.state.model_dump_json()
    return None


def carry_out(program: Sequence[str], names: Sequence[str], *, jobs: int, logs: Path) -> int:
    """Run `program NAME...` in `jobs` processes, each with every jobs-th name; say what ended, and how long is left.

    0 if all ended well, 130 if interrupted, else 1. A job that fails does not stop the others.
    """
    jobs = min(jobs, len(names))
    environment = dict(os.environ) | ({"OMP_NUM_THREADS": "1"} if jobs > 1 else {})
    logs.mkdir(parents=True, exist_ok=True)
    start, done, lock = time.monotonic(), [0], threading.Lock()

    def follow(process: "subprocess.Popen[str]", mine: Sequence[str], log: Path) -> None:
        began, waiting = time.monotonic(), list(mine)
        assert process.stdout is not None
        with process.stdout as lines, log.open("a", encoding="utf-8") as out:
            for line in lines:
                out.write(line)
                out.flush()
                if line.startswith(ENDED):
                    with lock:
                        done[0] += 1
                        now = time.monotonic()
                        rest = (now - start) / done[0] * (len(names) - done[0])
                        print(
                            f"[{done[0]}/{len(names)}] {waiting.pop(0)}: {now - began:.0f} s; "
                            f"{(now - start) / 60:.1f} min so far, about {rest / 60:.1f} min left",
                            flush=True,
                        )
                        began = now

    started = []
    for job in range(jobs):
        mine, log = names[job::jobs], logs / f"job-{job + 1}.log"
        log.write_text("", encoding="utf-8")
        with log.open("a", encoding="utf-8") as out:  # two write to it: each at its end
            process = subprocess.Popen(
                [*program, *mine],
                stdout=subprocess.PIPE,
                stderr=out if jobs > 1 else None,  # one job shows its own bars
                text=True,
                env=environment,
            )
        thread = threading.Thread(target=follow, args=(process, mine, log))
        thread.start()
        started.append((process, thread, log))
    print(
        f"{jobs} job{'s' if jobs > 1 else ''}; tables and messages: {', '.join(str(log) for _, _, log in started)}",
        flush=True,
    )
    interrupted = False
    for process, thread, _ in started:
        while thread.is_alive() or process.poll() is None:
            try:
                process.wait()
                thread.join()
            except KeyboardInterrupt:  # the jobs get it too, from the terminal, and keep what they have
                interrupted = True
    failed = [(process.returncode, log) for process, _, log in started if process.returncode]
    if interrupted or any(code == 130 for code, _ in failed):
        print("claims: interrupted; the same command goes on from there", file=sys.stderr)
        return 130
    for code, log in failed:
        print(f"claims: a job ended with exit code {code}; the end of {log}:", file=sys.stderr)
        print("\n".join(log.read_text(encoding="utf-8").splitlines()[-8:]), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
