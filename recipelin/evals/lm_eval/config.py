"""Settings of the `lm_eval` evaluation (no torch)."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ...base import Config as Base
from ...base import RowName
from ...sources import Hub, LocalFile, Stdlib, Text


class NextLine(Base):
    """Which line comes next? One true line and distractors from the same held-out file.

    Sample YAML: `{text: {source: python-stdlib}, items: 200, context: [72, 200], options: 4}`; context in tokens.
    """

    text: Text = Stdlib(source="python-stdlib")
    part: Literal["selection", "test"] = "test"
    items: Annotated[int, Field(ge=1)] = 200
    context: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
    answer: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = Field(
        (4, 11), description="least and most tokens of the lines that are asked for and offered"
    )
    options: Annotated[int, Field(ge=2)] = 4

    @field_validator("text")
    @classmethod
    def _whole(cls, value: Stdlib | LocalFile | Hub) -> Stdlib | LocalFile | Hub:
        if isinstance(value, Hub) and value.streaming:
            raise ValueError("a stream's end is known in tokens only; next_line needs a source that is read whole")
        return value


class Task(Base):
    """One task by its lm-eval name; with `next_line`, a local task whose YAML and items are written beside the run.

    `word_perplexity` (of wikitext) is recorded as `word_log_loss`, nats a word over all documents; tables show its exp.
    RULER's tasks (arXiv 2404.06654) make 500 items each for the model's tokenizer and a length; `string_match` is the share
    of an item's reference answers that the generated text holds (of SQuAD and HotpotQA: whether it holds one). Their row is
    called `ruler_vt@4096`; `ruler` is the group of all thirteen.

    Sample YAML: `{task: next_line_short, metric: acc_norm, chance: 0.25, next_line: {context: [8, 20]}}`,
    `{task: ruler, metric: string_match, max_seq_length: 8192, mean: subtasks, chance: 0, limit: 100}`,
    `{task: gsm8k, metric: exact_match, shots: 5, filter: strict-match, chance: 0}`
    """

    task: str
    metric: Literal["acc", "acc_norm", "exact_match", "word_perplexity", "string_match"] = "acc"
    shots: Annotated[int, Field(ge=0)] = 0
    chance: Annotated[float, Field(ge=0, lt=1)] | None = Field(None, description="score of blind guessing")
    limit: Annotated[int, Field(ge=1)] | None = Field(None, description="first n items only (of each subtask)")
    mean: Literal["items", "subtasks"] = Field(
        "items", description="of a group such as mmlu: over all items (lm-eval's), or the plain mean of its subtasks"
    )
    filter: str | None = Field(
        None, description="whose answers count, of a task with several ways to read one off (gsm8k: strict-match)"
    )
    max_seq_length: Annotated[int, Field(ge=1)] | None = Field(
        None, description="of RULER: tokens of a prompt and its answer (lm-eval has 4096, 8192, ..., 131072)"
    )
    next_line: NextLine | None = None

    @property
    def row(self) -> str:
        """What its row is called."""
        return self.task if self.max_seq_length is None else f"{self.task}@{self.max_seq_length}"

    @model_validator(mode="after")
    def _fits(self) -> "Task":
        if (self.metric == "string_match") != (self.max_seq_length is not None):
            raise ValueError("string_match is the metric of RULER's tasks, and max_seq_length their length; give both")
        if self.max_seq_length is not None and (self.next_line is not None or self.shots):
            raise ValueError("RULER's tasks make their own items and have no examples: leave next_line and shots out")
        if self.metric == "word_perplexity" and (self.mean != "items" or self.chance is not None):
            raise ValueError("word_perplexity: a log-loss has no chance, and its mean is over all words")
        if self.next_line is not None and self.mean != "items":
            raise ValueError("mean: subtasks is for a group of lm-eval; a next-line task has no subtasks")
        return self


class Config(Base):
    """Tasks of EleutherAI's lm-evaluation-harness; an item is a document.

    Sample YAML: `{eval: lm_eval, tasks: [{task: piqa, metric: acc, chance: 0.5}]}`
    """

    eval: Literal["lm_eval"] = "lm_eval"
    tasks: Annotated[tuple[Task, ...], Field(min_length=1)]
    batch: Annotated[int, Field(ge=1)] = 16

    def names(self) -> tuple[RowName, ...]:
        """Of the rows that it makes, with the field that each comes from."""
        return tuple(
            RowName(("tasks", i), t.row, "word_log_loss" if t.metric == "word_perplexity" else t.metric)
            for i, t in enumerate(self.tasks)
        )

    @property
    def length(self) -> int | None:
        """Tokens of the longest row, as far as it is known before the items are here; None: lm-eval's own."""
        return max((t.max_seq_length for t in self.tasks if t.max_seq_length is not None), default=None)

    def tokens(self) -> int | None:
        """Tokens that one state and seed read, at most; None where a task's data is lm-eval's own."""
        found = 0
        for task in self.tasks:
            if task.next_line is None:
                return None
            found += task.next_line.items * task.next_line.options * task.next_line.context[1]
        return found
