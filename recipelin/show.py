"""A plan as text (no torch)."""

from collections.abc import Sequence

from .cost import count
from .plan import Plan
from .schedule import Schedule
from .steps import Transfer, Tune


def show(planned: Plan, *, header: Sequence[str] = (), reused: Sequence[str] = ()) -> str:
    """The plan as text: one block a step. `reused[i]` says what is known of an earlier result of step i."""
    lines = [*header]
    arch = planned.architecture
    lines.append(
        f"model     {arch.model_type}, {arch.num_hidden_layers} layers, {count(planned.parameters)} parameters, "
        f"{arch.num_attention_heads}:{arch.num_key_value_heads} heads of {arch.head_dim}, vocabulary {arch.vocab_size}"
    )
    lines.append(f"plan      {planned.hash[:8]}, seed {planned.seed}")
    lines.append("")
    for i, p in enumerate(planned.steps):
        lines.append(f"{i + 1:>2}. {p.step.step:<9} {p.what}")
        if p.reads:
            lines.append(f"    {'reads':<9} {p.reads}")
        if p.trains:
            lines.append(f"    {'trains':<9} {p.trains:,} parameters ({p.share:.2%} of the model)")
        if isinstance(p.step, (Transfer, Tune)):
            lines.append(f"    {'schedule':<9} {_schedule(p.step.schedule, p.optimiser_steps)}")
        if p.cost.memory:
            memory = p.cost.memory
            lines.append(
                f"    {'cost':<9} {count(p.cost.tokens)} tokens, {count(p.cost.flops, 'FLOP')}; memory about "
                f"{count(memory['cpu'], 'B')} on a CPU, or {count(memory['cuda'], 'B')} on a GPU "
                f"+ {count(memory['host'], 'B')} of host"
            )
        if i < len(reused) and reused[i]:
            lines.append(f"    {'result':<9} {reused[i]}")
    flops = [p.cost.flops for p in planned.steps if p.cost.memory]
    total = sum(f for f in flops if f)
    unknown = " beside what is not known" if any(f is None for f in flops) else ""
    lines += ["", f"in all    {count(total, 'FLOP')}{unknown} (estimates; memory without the allocator's own)"]
    return "\n".join(lines)


def _schedule(schedule: Schedule, steps: int | None) -> str:
    given = (
        f"{schedule.epochs:g} epochs" if schedule.epochs else f"{schedule.tokens:,} tokens" if schedule.tokens else ""
    )
    known = f"{steps} optimiser steps" if steps is not None else "steps known once the data is read"
    size = f"{schedule.batch} x {schedule.length} tokens"
    if schedule.accumulation > 1:
        size += f" x {schedule.accumulation} accumulated"
    rate = f"{schedule.optimizer.name} lr {schedule.optimizer.lr:g}, {schedule.decay.name}"
    curve = ""
    if schedule.curve:
        points = ", ".join(count(t) for t in schedule.curve.tokens)
        curve = f"{', '.join(schedule.curve.suites)} in {', '.join(schedule.curve.states)} at {points} tokens"
    return ", ".join(x for x in (given, known, size, rate, curve) if x)
