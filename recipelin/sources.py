"""Where text comes from: the `data:` block of a recipe, and fingerprints of what it names (no torch)."""

from typing import Annotated, Literal

from pydantic import Field

from .base import Config

Part = Literal["training", "selection", "test"]


class Stdlib(Config):
    """The sources of the running Python's standard library, split by module name (DESIGN §8).

    Sample YAML: `{source: python-stdlib, weight: 1.0}`
    """

    source: Literal["python-stdlib"]
    weight: Annotated[float, Field(gt=0)] = 1.0


class LocalFile(Config):
    """A local file: one document a line (jsonl), a row (parquet), or a paragraph or file (text).

    Sample YAML: `{source: jsonl, path: corpus.jsonl, field: text}`; a relative path starts at the recipe's folder.
    """

    source: Literal["jsonl", "parquet", "text"]
    path: str
    field: str = Field("text", description="key or column that holds the text (jsonl, parquet)")
    documents: Literal["paragraph", "file"] = Field("paragraph", description="what one document is in a text file")
    weight: Annotated[float, Field(gt=0)] = 1.0


class Recall(Config):
    """Rows of `<k> key value` slots scattered in real text; a key comes back later and asks for its value.

    Sample YAML: `{source: recall, weight: 1.0, text: {source: python-stdlib}}`
    """

    source: Literal["recall"]
    weight: Annotated[float, Field(gt=0)] = 1.0
    keys: Annotated[int, Field(ge=2)] = Field(64, description="distinct keys (facts/pocket.md §A)")
    values: Annotated[int, Field(ge=2)] = Field(64, description="distinct values (facts/pocket.md §A)")
    pairs: Annotated[int, Field(ge=1)] = Field(8, description="pairs alive in a row of 256 tokens (facts/pocket.md §A)")
    text: Stdlib | LocalFile = Field(Stdlib(source="python-stdlib"), description="the text between the slots")
    loss: Literal["values", "all"] = Field("values", description="tokens that carry loss: recalled values only, or all")


Source = Annotated[Stdlib | LocalFile | Recall, Field(discriminator="source")]


class Data(Config):
    """A mixture of sources and how it is packed into rows.

    Sample YAML::

        data: {mix: [{source: python-stdlib}, {source: recall, weight: 1.0}], separate: false, positions: run_on}
    """

    mix: Annotated[tuple[Source, ...], Field(min_length=1)] = (Stdlib(source="python-stdlib"),)
    separate: bool = Field(False, description="documents in a row cannot see each other (LoLCATs: they can)")
    positions: Literal["run_on", "restart"] = Field(
        "run_on", description="positions across packed documents (LoLCATs: run_on)"
    )
