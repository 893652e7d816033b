"""What many tests need: a tiny model of the pocket's shape, its tokenizer, and a home for finished steps of their own."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    try:
        import torch
    except ModuleNotFoundError:
        return
    torch.set_num_threads(1)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """$RECIPELIN_HOME of this test alone."""
    monkeypatch.setenv("RECIPELIN_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def tiny():
    """A function that makes a random Llama: tiny(heads=4, key_heads=1, layers=2, dtype=...)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(heads: int = 4, key_heads: int = 1, layers: int = 2, dtype: torch.dtype = torch.float32, **extra):
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=48,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            head_dim=8,
            vocab_size=131,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=0.2,
            **extra,
        )
        return LlamaForCausalLM(config).to(dtype).eval()

    return make
