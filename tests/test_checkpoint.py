"""Checkpoints: whole or not there at all, whatever ends the process; and clear words where the disk is full."""

import json
import resource
import signal
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import recipelin.checkpoint
import recipelin.stages as stages
from recipelin.checkpoint import FILE, Checkpoint, read_checkpoint, write_checkpoint
from recipelin.data import Batch
from recipelin.loop import Loop
from recipelin.optimizer import make_optimizers
from recipelin.schedule import Decay, Optimizer, Schedule
from recipelin.sources import Data
from recipelin.steps import Tune
from tests.forked import Pipe, start


class Rows:
    rows = 8

    def batch(self, step: int, micro: int = 0) -> Batch:
        draw = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 7, (2, 16), generator=draw)
        return Batch(ids, ids.clone(), torch.arange(16).expand(2, -1))


def train(folder: Path, slow: str, here: Connection) -> None:
    """A stage with muon, and its weights; with `slow` it says where it is and goes no further."""
    write, gradients = recipelin.checkpoint.save_file, Loop._gradients

    def wait() -> None:
        here.send(slow)
        here.recv()

    def in_halves(tensors, path, metadata):
        write(tensors, path, metadata)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        if json.loads(metadata["at"])["step"] == 12:
            wait()  # half a file lies on the disk while the test kills this process
        path.write_bytes(content)

    def told(self, number, total):
        found = gradients(self, number, total)
        if number == 10:
            wait()
        return found

    if slow == "write":
        recipelin.checkpoint.save_file = in_halves
    if slow == "step":
        Loop._gradients = told
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1,
            head_dim=8, vocab_size=67, max_position_embeddings=64, initializer_range=0.2,
        )
    )  # fmt: skip
    optimizer, decay = Optimizer(name="muon", lr=1e-2), Decay(name="cosine", warmup=3)
    schedule = Schedule(steps=20, batch=2, length=16, checkpoint_every=4, log_every=5, optimizer=optimizer, decay=decay)
    step = Tune(stage="tune", lora=None, schedule=schedule, data=Data())
    report = stages.tune(
        model, step, Rows(), device="cpu", folder=folder / "work", seed=0, log=folder / "logs", key="k"
    )
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if n != "lm_head.weight"}
    save_file(trained, folder / "end.safetensors")
    here.send(report["resumed_from"])


def started(folder: Path, slow: str = "") -> tuple[BaseProcess, Connection]:
    folder.mkdir(parents=True, exist_ok=True)
    here, there = Pipe()
    process = start(train, folder, slow, there, stderr=folder / "stderr.txt")
    there.close()
    return process, here


def finish(folder: Path) -> int:
    """The whole stage, or the rest of it; the step that it went on from."""
    process, here = started(folder)
    process.join(240)
    assert process.exitcode == 0, (folder / "stderr.txt").read_text()
    with here:
        return here.recv()


@pytest.mark.slow
def test_sigkill_in_a_step_and_in_a_write_ends_bit_equal(tmp_path):
    """Killed with gradients made but not taken, then with half a checkpoint on the disk: bit-equal to one run."""
    finish(tmp_path / "whole")
    folder = tmp_path / "broken"
    for where, left in (("step", 8), ("write", 8)):
        process, here = started(folder, where)
        with here:
            assert here.recv() == where
            process.kill()
            process.join(240)
        assert process.exitcode == -signal.SIGKILL
        known = read_checkpoint(folder / "work", "k")
        assert known is not None and known.step == left
    assert list((folder / "work").glob(f".{FILE}.*")), "the kill was to leave half a checkpoint behind"
    assert finish(folder) == 8
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
