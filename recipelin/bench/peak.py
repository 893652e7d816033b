"""The process of one peak: `python -m recipelin.bench.peak '[module, class, fields]'` prints MiB."""

import dataclasses
import gc
import json
import sys
from pathlib import Path

from .. import lookup
from .measure import status_kib


def main() -> None:
    import torch

    torch.set_num_threads(1)
    module, name, fields = json.loads(sys.argv[1])
    case = getattr(lookup.implementation("bars", module.rpartition(".")[2]), name)(**fields)
    dataclasses.replace(case, length=64).make()()  # libraries and thread pools
    call = case.make()
    gc.collect()
    # Making the inputs took more than they are: begin at what is held now.
    Path("/proc/self/clear_refs").write_text("5")
    before = status_kib("VmRSS")
    call()
    print((status_kib("VmHWM") - before) / 1024)


if __name__ == "__main__":
    main()
