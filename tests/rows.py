"""Rows of tokens for a tiny model, and what it makes of them: shared by the tests of students, forms and families."""

from types import SimpleNamespace

import torch


def tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 131, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids, **arguments):
    return model(input_ids=ids, **{"use_cache": False, **arguments}).logits


def left_padded(ids: torch.Tensor, lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that begin late, and their mask; the padding holds a token that a row could hold too."""
    padded, mask = torch.full_like(ids, 7), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        padded[row, -length:] = ids[row, :length]
        mask[row, -length:] = 1
    return padded, mask


def without_layers() -> SimpleNamespace:
    """What a scripted model has in the place of `model.model`: evaluations cut what the last layer computes."""
    attention, mlp = SimpleNamespace(o_proj=torch.nn.Identity()), torch.nn.Identity()
    return SimpleNamespace(layers=[SimpleNamespace(self_attn=attention, mlp=mlp)])


def poison_memory(monkeypatch) -> None:
    """What torch gives out uninitialised holds NaN from here on."""

    def poisoned(make):
        def made(*args, **kwargs):
            found = make(*args, **kwargs)
            return found.fill_(torch.nan) if found.is_floating_point() and found.device.type != "meta" else found

        return made

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
