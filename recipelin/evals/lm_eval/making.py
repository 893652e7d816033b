"""A process of its own: lm-eval's generator of one RULER task makes its items. Asked in JSON on stdin, answers on stdout.

lm-eval's generators draw from global random states, print, and try again without end where a prompt does not fit.
"""

import importlib.util
import json
import random
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any


def main() -> None:
    """{function, length, tokenizer, seed, path} -> the items at `path`, one a line; {} or {package}, {absent}, {reason}."""
    asked = json.load(sys.stdin)
    print(json.dumps(_answer(asked)))


def _answer(asked: dict[str, Any]) -> dict[str, str]:
    try:
        with redirect_stdout(sys.stderr):
            made = _made(asked)
    except ImportError as error:
        cause = error.__cause__ if isinstance(error.__cause__, ImportError) else error
        return {"package": cause.name or str(error)}
    except Exception as error:
        reason = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
        # nltk says with a plain LookupError that its data are not here.
        return {"absent" if isinstance(error, OSError) or type(error) is LookupError else "reason": reason}
    Path(asked["path"]).write_text("".join(json.dumps(item) + "\n" for item in made), encoding="utf-8")
    return {}


def _made(asked: dict[str, Any]) -> list[dict[str, Any]]:
    import numpy

    file, _, name = asked["function"].rpartition(".")
    spec = importlib.util.spec_from_file_location("making_items", f"{file}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    random.seed(asked["seed"])
    numpy.random.seed(asked["seed"])
    spec.loader.exec_module(module)
    return list(getattr(module, name)(max_seq_lengths=[asked["length"]], tokenizer=asked["tokenizer"])["test"])


if __name__ == "__main__":
    main()
