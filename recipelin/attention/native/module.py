"""The `native` form: gated_delta under another name, in the shape that recipelin/stock.py writes."""

from ..gated_delta.module import GatedDeltaAttention


class NativeAttention(GatedDeltaAttention):
    """A gated_delta layer that a stock checkpoint can hold (see Config)."""

    NAME = "native"


FORM = NativeAttention
