"""The bars of `recipelin bench`: each file measures one operator, and has them in `BARS` (docs of a bar: bench/measure.py)."""
