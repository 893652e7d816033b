"""What many tests need: a tiny model of the pocket's shape, its tokenizer, and a home for finished steps of their own."""

import os
from pathlib import Path

import pytest

GPU = os.environ.get("RECIPELIN_TEST_GPU") == "1"  # `make test-gpu`
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is first imported, by whomever
# Read before torch is imported, and by each run, which sets torch's threads: two workers of two threads each wait for one
# another at every operator, ten times as long as the operator takes.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session", autouse=True)
def _own_home(tmp_path_factory):
    """No test writes into the checkout's runs/; what several of them tokenise is kept for the session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECIPELIN_HOME", str(tmp_path_factory.mktemp("home")))
        yield


def pytest_collection_modifyitems(items):
    """The long ones first, so that no worker is alone with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_terminal_summary(terminalreporter):
    """What tests counted: shown with workers too, whose own output nobody sees."""
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{name}: {value}")


@pytest.fixture
def little_library():
    """The text `python-stdlib` is every eighth module of the library: for tests that read it, whatever its size."""
    from recipelin import documents, sources

    little = dict(list(sources.stdlib_modules().items())[::8])
    with pytest.MonkeyPatch.context() as patch:
        for module in (sources, documents):
            patch.setattr(module, "stdlib_modules", lambda: little)
        sources._stdlib_fingerprint.cache_clear()
        yield little
    sources._stdlib_fingerprint.cache_clear()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """$RECIPELIN_HOME of this test alone."""
    monkeypatch.setenv("RECIPELIN_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def tiny():
    """A function that makes a random model: tiny(heads=4, key_heads=1, layers=2, dtype=..., family="llama", ...)."""
    import torch
    import transformers

    from recipelin import families

    def make(
        heads: int = 4,
        key_heads: int = 1,
        layers: int = 2,
        dtype: torch.dtype = torch.float32,
        family: str = "llama",
        **extra,
    ):
        torch.manual_seed(0)
        stem = families.family(family).stem
        if family == "mistral":
            extra.setdefault("sliding_window", None)
        config = getattr(transformers, f"{stem}Config")(
            **{
                "hidden_size": 48,
                "intermediate_size": 48,
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "num_key_value_heads": key_heads,
                "head_dim": 8,
                "vocab_size": 131,
                "max_position_embeddings": 512,
                "tie_word_embeddings": True,
                "initializer_range": 0.2,
                **extra,
            }
        )
        model = getattr(transformers, f"{stem}ForCausalLM")(config)
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "q_norm.weight", "k_norm.weight")):  # transformers starts them at 0 and 1
                torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
        return model.to(dtype).eval()

    return make
