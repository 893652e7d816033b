"""Evaluations: each a folder of config.py (no torch) and run.py, found by its name."""


class EvalError(RuntimeError):
    """An evaluation that cannot run here; the message says what is missing."""
