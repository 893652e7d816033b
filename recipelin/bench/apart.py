"""The process of one measurement: `python -m recipelin.bench.apart '[file, function, arguments]'` prints its numbers as JSON."""

import json
import sys

from .. import lookup, memory


def main() -> None:
    import torch

    torch.set_num_threads(1)
    memory.tune_allocator()  # as a run does
    file, function, given = json.loads(sys.argv[1])
    print(json.dumps(getattr(lookup.implementation("bars", file), function)(**given)))


if __name__ == "__main__":
    main()
