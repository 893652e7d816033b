"""Checkpoints: whole or not there at all, whatever ends the process; and clear words where the disk is full."""

import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from recipelin.checkpoint import FILE, Checkpoint, read_checkpoint, write_checkpoint
from recipelin.optimizer import make_optimizers
from recipelin.schedule import Optimizer

TRAINING = """
    import sys
    from pathlib import Path

    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    import recipelin.checkpoint
    import recipelin.loop as loop
    import recipelin.stages as stages
    from recipelin.data import Batch
    from recipelin.schedule import Decay, Optimizer, Schedule
    from recipelin.sources import Data
    from recipelin.steps import Tune

    torch.set_num_threads(1)
    folder, slow = Path(sys.argv[1]), sys.argv[2]


    class Rows:
        rows = 8

        def batch(self, step, micro=0):
            draw = torch.Generator().manual_seed(step)
            ids = torch.randint(0, 7, (2, 16), generator=draw)
            return Batch(ids, ids.clone(), torch.arange(16).expand(2, -1))


    write = recipelin.checkpoint.save_file


    def in_halves(tensors, path, metadata):
        # Half a file lies on the disk while the test kills this process.
        write(tensors, path, metadata)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        if step_of(metadata) == 12:
            print("writing", flush=True)
            sys.stdin.read()
        path.write_bytes(content)


    def step_of(metadata):
        import json

        return json.loads(metadata["at"])["step"]


    if slow == "write":
        recipelin.checkpoint.save_file = in_halves
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1,
        head_dim=8, vocab_size=67, max_position_embeddings=64, initializer_range=0.2))
    schedule = Schedule(steps=20, batch=2, length=16, checkpoint_every=4, log_every=5,
                        optimizer=Optimizer(name="muon", lr=1e-2), decay=Decay(name="cosine", warmup=3))
    if slow == "step":
        real = loop.Loop._gradients

        def told(self, number, total):
            found = real(self, number, total)
            if number == 10:
                print("step", flush=True)
                sys.stdin.read()
            return found

        loop.Loop._gradients = told
    report = stages.tune(model, Tune(stage="tune", lora=None, schedule=schedule, data=Data()), Rows(), device="cpu",
                         folder=folder / "work", seed=0, log=folder / "logs", key="k")
    save_file({n: p.detach().clone() for n, p in model.named_parameters() if n != "lm_head.weight"},
              folder / "end.safetensors")
    print("resumed", report["resumed_from"], flush=True)
"""


def start(folder: Path, slow: str = "") -> subprocess.Popen[str]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = os.pathsep.join(p for p in sys.path if p)
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(TRAINING), str(folder), slow],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(folder: Path) -> str:
    said, wrong = (process := start(folder)).communicate(timeout=240)
    assert process.returncode == 0, wrong
    return said


def test_sigkill_in_a_step_and_in_a_write_ends_bit_equal(tmp_path):
    """Killed with gradients made but not taken, then with half a checkpoint on the disk: bit-equal to one run."""
    finish(tmp_path / "whole")
    folder = tmp_path / "broken"
    for where, left in (("step", 8), ("write", 8)):
        process = start(folder, where)
        assert process.stdout is not None and process.stdout.readline().strip() in ("step", "writing")
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=240)
        assert process.returncode == -signal.SIGKILL
        known = read_checkpoint(folder / "work", "k")
        assert known is not None and known.step == left
    assert list((folder / "work").glob(f".{FILE}.*")), "the kill was to leave half a checkpoint behind"
    assert finish(folder).split() == ["resumed", "8"]
    assert not list((folder / "work").glob(f".{FILE}.*"))
    one, other = load_file(tmp_path / "whole" / "end.safetensors"), load_file(folder / "end.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def parts(fill: float = 0.0):
    torch.manual_seed(0)
    trained = {
        "model.layers.0.q.weight": torch.nn.Parameter(torch.randn(6, 4)),
        "norm": torch.nn.Parameter(torch.randn(4) + fill),
    }
    return trained, make_optimizers(Optimizer(name="muon", lr=1e-2), trained, {})


def take(trained, optimizers, number: int) -> None:
    for parameter in trained.values():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    optimizers.step()


def test_what_is_read_goes_on_as_what_was_written(tmp_path):
    trained, optimizers = parts()
    for number in range(3):
        take(trained, optimizers, number)
    at = Checkpoint(
        step=3, curve=[(1, 2.0)], validation=((2, 1.5),), best={"norm": torch.ones(4)}, best_step=2, waited=1
    )
    write_checkpoint(tmp_path, "k", at, trained, optimizers)
    known = read_checkpoint(tmp_path, "k")
    assert (known.step, known.curve, known.validation, known.best_step, known.waited) == (
        3,
        [(1, 2.0)],
        ((2, 1.5),),
        2,
        1,
    )
    assert torch.equal(known.best["norm"], torch.ones(4))
    fresh, again = parts(fill=5.0)
    with torch.no_grad():
        for name, parameter in fresh.items():
            parameter.copy_(known.weights[name])
    again.load(known.optimizer, known.optimizer_steps)
    for number in (3, 4):
        take(trained, optimizers, number)
        take(fresh, again, number)
    assert all(torch.equal(trained[n], fresh[n]) for n in trained)


def test_a_disk_that_takes_no_more_keeps_the_old_checkpoint(tmp_path):
    """The system refuses the write itself (a limit on the size of a file), inside safetensors."""
    trained, optimizers = parts()
    write_checkpoint(tmp_path, "k", Checkpoint(step=1), trained, optimizers)
    before = (tmp_path / FILE).read_bytes()
    large = {"large": torch.nn.Parameter(torch.zeros(1_000_000))}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            write_checkpoint(tmp_path, "k", Checkpoint(step=2), large, make_optimizers(Optimizer(), large, {}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "too large" in str(caught.value).lower() and caught.value.strerror
    assert (tmp_path / FILE).read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [FILE]
