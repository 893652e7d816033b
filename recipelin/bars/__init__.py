"""The bars and facts of `recipelin bench`: each file has them in `BARS` (docs of a bar: bench/measure.py).

A file may have `FIGURES` too: name of a picture beside the record -> what draws it from the file's own bars, as measured.
"""
