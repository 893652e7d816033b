"""The process of one peak: `python -m recipelin.bench.peak '[module, class, fields]'` prints MiB."""

import dataclasses
import gc
import json
import sys

from .. import lookup, memory


def main() -> None:
    import torch

    torch.set_num_threads(1)
    module, name, fields = json.loads(sys.argv[1])
    case = getattr(lookup.implementation("bars", module.rpartition(".")[2]), name)(**fields)
    dataclasses.replace(case, length=64).make()()  # libraries and thread pools
    call = case.make()
    gc.collect()
    memory.reset_peak("cpu")  # making the inputs took more than they are: begin at what is held now
    before = memory.resident()
    call()
    highest = memory.peak("cpu")
    if before is None or highest is None:
        raise SystemExit("peak memory is read from /proc, which this system does not have")
    print((highest - before) / 2**20)


if __name__ == "__main__":
    main()
