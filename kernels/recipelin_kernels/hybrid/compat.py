"""LoLCATs' published terraced window (`lolcats_llama_window_tk`, 375df84) with its three defects (facts/peers.md A.1, A.6).

Its masks are cut from blocks that are counted from the end of the call, and its decoding slides. Every one of them is a
hybrid attention of other options; none depends on the tensors.
"""

from dataclasses import replace

from torch import Tensor

from .rows import COMPATS, Options, one_of


def check_compat(compat: str, options: Options, key_mask: Tensor | None, segment_ids: Tensor | None) -> None:
    """Raises ValueError for what LoLCATs does not have beside this window."""
    one_of("compat", compat, COMPATS)
    needed = {"shape": "terraced", "cover": "outside", "join": "shared", "sinks": 0}
    wrong = [f"{n}={found!r}, needs {x!r}" for n, x in needed.items() if (found := getattr(options, n)) != x]
    if options.window < 1:
        wrong.append(f"window={options.window}, needs at least 1")
    if wrong:
        raise ValueError(f"compat={compat!r}: found {'; '.join(wrong)}")
    if key_mask is not None or segment_ids is not None:
        given = "key_mask" if key_mask is not None else "segment_ids"
        raise ValueError(
            f"compat={compat!r} takes no {given}: LoLCATs has neither padding nor separate documents, and its blocks are "
            "counted from the end of the call; give rows of one length (batch 1)"
        )


def whole_rows(options: Options, length: int) -> Options:
    """Of a call over rows of `length` tokens.

    T <= w: one block, every causal pair in the softmax and in the linear set. T > w: the last block ends with the call,
    so the same prefix gives other outputs at another length, but for lengths that agree modulo w.
    """
    if length <= options.window:
        return replace(options, cover="all")
    return replace(options, anchor=length % options.window)


def decoding(options: Options) -> Options:
    """Of one more token, and of the state before it: a sliding window of w."""
    return replace(options, shape="sliding")
