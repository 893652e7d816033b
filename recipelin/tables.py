"""Tables: of one run (`run_table`), rendered (`render`)."""

from .render import FORMATS, render
from .runtable import run_table

__all__ = ["FORMATS", "render", "run_table"]
