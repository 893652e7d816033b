"""The laws of DESIGN §5 that belong to the hybrid: windows, joins, sinks, feature maps. What holds for all: test_forms.py."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

import recipelin.hf as hf
from recipelin import families
from recipelin.attention.hybrid.config import Config, FeatureMap
from recipelin.cache import state_bytes
from recipelin.states import NAMES, State, resolve, subsets
from recipelin.steps import Swap
from recipelin.swap import architecture_of, forms, mark_merged, observing, recording, restore, swap, switch
from recipelin_kernels import weight_transfer_loss
from tests.rows import logits, tokens

JOINS = ("shared", "absolute", "replace", "average", "sum")
GROUPS = ((2, 2), (6, 2), (4, 1))


def swapped(model, state: State, *, seed: int = 0, **config):
    swap(model, Swap(form="hybrid", config=Config(**config)), seed=seed)
    switch(model, state)
    for form in forms(model):
        torch.nn.init.normal_(form.log_scale.c, std=0.3)
    return model


@pytest.mark.parametrize(("heads", "key_heads"), GROUPS)
@pytest.mark.parametrize("join", JOINS)
def test_a_covering_window_is_the_teacher(tiny, heads, key_heads, join):
    model = tiny(heads, key_heads)
    ids = tokens(2, 37)
    teacher = logits(model, ids)
    swapped(model, State(window=37, join=join))
    assert (logits(model, ids) - teacher).abs().max() < 1e-5
    switch(model, State(window=19, shape="terraced", join=join))
    assert (logits(model, ids) - teacher).abs().max() < 1e-5
    for state in (State(window=36, join=join), State(window=18, shape="terraced", join=join)):
        switch(model, state)
        assert (logits(model, ids) - teacher).abs().max() > 1e-5  # one key outside is seen


@pytest.mark.parametrize("join", JOINS)
def test_features_without_mass_are_not_computed(tiny, join, monkeypatch):
    """Bit for bit the same; maps that train still get their gradients, which are zero."""
    model = swapped(tiny(), State(window=5, join=join, branches=("window",)))
    ids, own = tokens(2, 37), forms(model)
    calls: list[object] = []
    for form in own:
        form.feature_map_q.register_forward_hook(lambda *_: calls.append(1))
    y = logits(model, ids)
    assert bool(calls) == (join == "replace"), "its window weighs what its features say"
    trained = [p for form in own for p in form.groups()["feature_maps"]]
    found = torch.autograd.grad(model(ids).logits.sum(), trained)
    assert all(g.abs().max() < (1e-4 if join == "replace" else 1e-30) for g in found), (
        "there it cancels but for rounding"
    )
    monkeypatch.setattr(type(own[0]), "needs_no_features", lambda *_: False)
    assert torch.equal(logits(model, ids), y)


@pytest.mark.parametrize("key_heads", ["query", "key"])
@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize(
    ("join", "shape"), [*((j, "sliding") for j in JOINS), ("shared", "terraced"), ("sum", "terraced")]
)
def test_causal_and_prefix_invariant(tiny, join, shape, sinks, key_heads):
    branches = ("window", "linear", "sinks") if sinks else ("window", "linear")
    state = State(branches=branches, window=5, shape=shape, sinks=sinks, join=join)
    model = swapped(tiny(dtype=torch.float64), state, feature_map=FeatureMap(width=2, key_heads=key_heads))
    ids = tokens(2, 71)
    whole = logits(model, ids)
    for length in (1, 4, 23, 70):
        assert (logits(model, ids[:, :length]) - whole[:, :length]).abs().max() < 1e-10
    other = ids.clone()
    other[:, 40:] = tokens(2, 31, seed=2)
    assert torch.equal(logits(model, other)[:, :40], whole[:, :40]) or (
        (logits(model, other)[:, :40] - whole[:, :40]).abs().max() < 1e-12
    )


@pytest.mark.parametrize("cover", ["outside", "all"])
@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize(
    ("window", "shape", "own"), [(1, "sliding", None), (6, "sliding", None), (4, "terraced", None), (4, "terraced", 13)]
)
def test_prefill_and_decoding_are_the_parallel_form(tiny, window, shape, own, join, sinks, cover):
    branches = ("window", "linear", "sinks") if sinks else ("window", "linear")
    state = State(branches=branches, window=window, shape=shape, sinks=sinks, join=join, cover=cover)
    model = tiny(dtype=torch.float64, family="mistral", sliding_window=own)
    swapped(model, state, feature_map=FeatureMap(width=2))
    ids = tokens(2, 33)
    whole = logits(model, ids)
    cache, found, sizes = DynamicCache(config=model.config), [], []
    with torch.no_grad():
        for start, stop in ((0, 3), (3, 17), (17, 25), *((t, t + 1) for t in range(25, 33))):
            found.append(model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True).logits)
            sizes.append(state_bytes(cache))
    assert (torch.cat(found, 1) - whole).abs().max() < 1e-10
    assert len(set(sizes[:3])) == len(set(sizes[3:])) == 1, (
        "the cache's bytes must not grow, in parts or token by token"
    )


@pytest.mark.parametrize("given", ["mask", "mask and positions"])
@pytest.mark.parametrize("sinks", [0, 3])
def test_a_left_padded_row_is_the_row_alone(tiny, tmp_path, sinks, given):
    branches = ("window", "linear", "sinks") if sinks else ("window", "linear")
    model = student(tiny(), State(branches=branches, window=6, sinks=sinks), tmp_path)
    ids = tokens(3, 29)
    padded, mask = torch.full((3, 29), 7), torch.zeros(3, 29, dtype=torch.long)
    lengths = (29, 11, 4)
    for row, length in enumerate(lengths):
        padded[row, 29 - length :] = ids[row, :length]
        mask[row, 29 - length :] = 1
    extra = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if "positions" in given else {}
    together = logits(model, padded, attention_mask=mask, **extra)
    for row, length in enumerate(lengths):
        alone = logits(model, ids[row : row + 1, :length])
        assert (together[row, 29 - length :] - alone[0]).abs().max() < 1e-5


def student(model, state: State, folder: Path, **config):
    tokenizer = small_tokenizer()
    hf.export(swapped(model, state, **config), tokenizer, folder / "model", hybrid=state)
    return hf.load_student(folder / "model", dtype="float32", device="cpu")[0]


def small_tokenizer():
    from recipelin.data import train_tokenizer

    return train_tokenizer(["a small text"] * 3, 264)


@pytest.mark.parametrize(("heads", "key_heads"), GROUPS[1:])
def test_grouped_heads_are_repeated_heads(tiny, heads, key_heads):
    """Keys and values repeated for every query head, in a model without groups, give the same."""
    grouped = swapped(tiny(heads, key_heads, dtype=torch.float64), State(window=5))
    plain = tiny(heads, heads, dtype=torch.float64)
    for small, large in zip(grouped.model.layers, plain.model.layers, strict=True):
        large.load_state_dict({k: v for k, v in small.state_dict().items() if "self_attn" not in k}, strict=False)
        for name in ("q_proj", "o_proj"):
            getattr(large.self_attn, name).weight.data.copy_(getattr(small.self_attn, name).weight)
        for name in ("k_proj", "v_proj"):
            weight = getattr(small.self_attn, name).weight.view(key_heads, 8, -1)
            repeated = weight.repeat_interleave(heads // key_heads, 0).flatten(0, 1)
            getattr(large.self_attn, name).weight.data.copy_(repeated)
    plain.model.embed_tokens.load_state_dict(grouped.model.embed_tokens.state_dict())
    swapped(plain, State(window=5))
    for one, other in zip(forms(grouped), forms(plain), strict=True):
        other.load_state_dict(
            {k: v for k, v in one.state_dict().items() if "proj" not in k}
            | {k: v for k, v in other.state_dict().items() if "proj" in k}
        )
    ids = tokens(2, 31)
    assert (logits(grouped, ids) - logits(plain, ids)).abs().max() < 1e-10


OWN = 9


def windowed(tiny, **config):
    """(model, ids, the teacher's logits) of a teacher with a window of its own, swapped."""
    model, ids = tiny(2, 1, family="mistral", sliding_window=OWN), tokens(2, 33)
    teacher = logits(model, ids)
    return swapped(model, State(window=4), **config), ids, teacher


@pytest.mark.parametrize("join", JOINS)
def test_a_window_over_the_teachers_own_is_the_teacher(tiny, join):
    model, ids, teacher = windowed(tiny)
    for state in (
        State(window=OWN, join=join),
        State(window=30, join=join),
        State(window=8, shape="terraced", join=join),
    ):
        switch(model, state)
        assert (logits(model, ids) - teacher).abs().max() < 1e-5
    switch(model, State(window=OWN - 1, join=join))
    assert (logits(model, ids) - teacher).abs().max() > 1e-5


def far_tokens_matter(model, ids, by: int) -> bool:
    """Whether the first token still moves a query `by` tokens after it, in the first layer's own attention."""
    other = ids.clone()
    other[:, 0] = (other[:, 0] + 1) % 131
    seen = [[], []]
    for each, where in zip((ids, other), seen, strict=True):
        with torch.no_grad(), observing(model, lambda i, c, where=where: where.append(c.y) if i == 0 else None):
            model(input_ids=each, use_cache=False)
    return not torch.equal(seen[0][0][:, :, by], seen[1][0][:, :, by])


def test_the_linear_branch_ends_where_the_teachers_window_does_unless_told_otherwise(tiny):
    for choice, sees in (("cut", False), ("ignore", True)):
        model, ids, _ = windowed(tiny, teacher_window=choice)
        for state in (State(window=4), State(branches=("linear",), cover="all", window=4)):
            switch(model, state)
            assert far_tokens_matter(model, ids, OWN - 1) and far_tokens_matter(model, ids, OWN) == sees
        switch(model, State(window=30))  # ignored, the window is the window itself
        assert far_tokens_matter(model, ids, OWN) == sees


def test_transfer_losses_are_cut_as_the_student_is(tiny):
    for choice in ("cut", "ignore"):
        model, ids, _ = windowed(tiny, teacher_window=choice)
        captured = []
        with torch.no_grad(), recording(model, lambda i, c, captured=captured: captured.append(c)):
            logits(model, ids)
        form = forms(model)[0]
        for state in (State(window=4, shape="terraced"), State(window=30), State(window=4, join="average")):
            switch(model, state)
            names = ("weights", "hybrid_weights", "outputs", "hybrid_outputs")
            found = {n: float(x.detach()) for n, x in form.losses(captured[0], dict.fromkeys(names, 1.0)).items()}
            covered = choice == "cut" and state.window == 30
            assert (found["hybrid_outputs"] < 1e-10) == covered
            x = captured[0]
            given = (x.q, x.k, form.feature_map_q(x.q), form.feature_map_k(x.k), x.lse)
            reach = {"teacher_window": OWN, "reach": OWN if choice == "cut" else None, "kernel": "reference"}
            joint = {"window": state.window, "shape": state.shape, "join": state.join, "mix": form.mix()}
            for name, options in (("weights", {}), ("hybrid_weights", {"target": "hybrid", **joint})):
                expected = weight_transfer_loss(*given, **reach, **options)
                assert abs(found[name] - float(expected.detach())) < 1e-5


def test_the_transfer_loss_runs_by_the_forms_kernel(tiny):
    model = swapped(tiny(), State(window=4), kernel="gpu")
    form, captured = forms(model)[0], []
    with torch.no_grad(), recording(model, lambda i, c: captured.append(c)):
        logits(model, tokens(1, 5))
    for name in ("weights", "hybrid_weights"):
        with pytest.raises(RuntimeError, match=r"found torch\.float64|not installed"):
            q, k = (t.double() for t in (captured[0].q, captured[0].k))
            form.losses(replace(captured[0], q=q, k=k), {name: 1.0})


def test_losses_of_signed_features_divide_by_the_signed_sum(tiny):
    model = swapped(tiny(), State(window=4), feature_map=FeatureMap(activation="none"))
    captured = []
    with torch.no_grad(), recording(model, lambda i, c: captured.append(c)):
        logits(model, tokens(2, 33))
    form, x = forms(model)[0], captured[0]
    phi_q, phi_k = form.feature_map_q(x.q), form.feature_map_k(x.k)
    causal = torch.ones(33, 33, dtype=torch.bool).tril()
    p = (x.q @ x.k.repeat_interleave(4, 1).mT * form.scaling).masked_fill(~causal, -torch.inf).softmax(-1)
    a = (phi_q @ phi_k.mT).masked_fill(~causal, 0)
    assert (a.sum(-1) < 0).any()
    expected = -(p * (a / a.sum(-1, keepdim=True)).clamp(min=1e-12).log()).sum(-1).mean()
    names = ("weights", "hybrid_weights")
    found = form.losses(x, dict.fromkeys(names, 1.0))
    assert abs(float((found["weights"] - expected).detach())) < 1e-4
    joint = weight_transfer_loss(
        x.q, x.k, phi_q, phi_k, x.lse, target="hybrid", window=4, mix=form.mix(), signed=True, kernel="reference"
    )
    assert abs(float((found["hybrid_weights"] - joint).detach())) < 1e-4


def test_the_published_terraced_window_decodes_by_sliding_and_takes_no_padding(tiny):
    published = State(window=6, shape="terraced", compat="lolcats_tk_v1")
    model, ids = swapped(tiny(dtype=torch.float64), published), tokens(2, 33)
    for state, equal in ((published, False), (State(window=6, shape="terraced"), True)):
        switch(model, state)
        whole, cache, found = logits(model, ids), DynamicCache(config=model.config), []
        with torch.no_grad():
            for start, stop in ((0, 21), *((t, t + 1) for t in range(21, 33))):
                found.append(model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True).logits)
        error = (torch.cat(found, 1) - whole)[:, 21:].abs().max()
        assert error < 1e-10 if equal else error > 1e-3
        short = (logits(model, ids[:, :4]) - logits(model, ids)[:, :4]).abs().max()
        assert short < 1e-10 if equal else short > 1e-3
    switch(model, published)
    mask = torch.ones(2, 33, dtype=torch.long)
    assert torch.equal(logits(model, ids, attention_mask=mask), logits(model, ids))
    mask[0, :3] = 0
    with pytest.raises(ValueError, match=r"takes no key_mask.*batch 1"):
        logits(model, ids, attention_mask=mask)


@pytest.mark.parametrize("join", JOINS)
def test_every_branch_gets_gradient(tiny, join):
    model = swapped(tiny(), State(window=4, join=join), feature_map=FeatureMap(width=2))
    model(input_ids=tokens(2, 19), use_cache=False).logits.square().mean().backward()
    for form in forms(model):
        groups = form.groups()
        named = {"shared": "mix", "absolute": "log_scale"}.get(join)
        for name in ("feature_maps", *([named] if named else [])):
            for parameter in groups[name]:
                assert parameter.grad is not None and parameter.grad.abs().sum() > 0, (name, form.layer_index)
        for projection in (form.q_proj, form.k_proj, form.v_proj):
            assert projection.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "fields", [{}, {"shape": "terraced"}, {"compat": "lolcats_tk_v1"}, {"join": "average"}], ids=str
)
def test_every_named_state_runs_and_none_gives_zeros(tiny, fields):
    hybrid = (
        State(branches=("window", "linear", "sinks"), window=5, sinks=2, **fields)
        if "compat" not in fields
        else (State(window=5, shape="terraced", **fields))
    )
    model = swapped(tiny(), hybrid)
    seen = {}
    for name in NAMES:
        if name == "teacher":
            continue
        switch(model, resolve(name, hybrid).state)
        seen[name] = logits(model, tokens(1, 23))
        assert torch.isfinite(seen[name]).all()
    with torch.no_grad(), recording_none(model) as outputs:
        switch(model, resolve("none", hybrid).state)
        model(input_ids=tokens(1, 23), use_cache=False)
    assert all(float(y.abs().sum()) == 0.0 for y in outputs)
    distinct = {tuple(v.flatten()[-5:].tolist()) for v in seen.values()}
    assert len(distinct) == len(seen), "two states give the same"
    assert len(subsets(hybrid)) == 2 ** len(hybrid.branches)
    for each in (resolve("window", hybrid).state, *(s.state for s in subsets(hybrid).values())):
        assert (each.shape, each.compat, each.join) == (hybrid.shape, hybrid.compat, hybrid.join)


def recording_none(model):
    from contextlib import contextmanager

    from recipelin.swap import observing

    @contextmanager
    def seen():
        outputs: list[torch.Tensor] = []
        with observing(model, lambda _, captured: outputs.append(captured.y)):
            yield outputs

    return seen()


def test_the_softmax_state_is_the_teacher_and_restore_gives_it_back(tiny):
    model = tiny()
    ids = tokens(2, 41)
    teacher = logits(model, ids)
    hybrid = State(window=5)
    swapped(model, hybrid)
    switch(model, resolve("softmax", hybrid).state)
    assert (logits(model, ids) - teacher).abs().max() < 1e-5
    switch(model, hybrid)
    captured = []
    with torch.no_grad(), recording(model, lambda i, c: captured.append((i, c))):
        passed_on = logits(model, ids)
    assert (passed_on - teacher).abs().max() < 1e-5
    assert [i for i, _ in captured] == [0, 1]
    restore(model)
    assert torch.equal(logits(model, ids), teacher)
    swapped(model, hybrid)
    mark_merged(model)
    with pytest.raises(RuntimeError, match="load the teacher anew"):
        restore(model)


@pytest.mark.parametrize(
    "rope",
    [
        None,
        {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
)
def test_rope_scaling_is_the_teachers(tiny, rope):
    model = tiny(**({"rope_parameters": rope} if rope else {}))
    ids = tokens(1, 53)
    teacher = logits(model, ids)
    swapped(model, State(window=53))
    assert (logits(model, ids) - teacher).abs().max() < 1e-5


@pytest.mark.parametrize("width", [1, 2, 8])
@pytest.mark.parametrize("key_heads", ["query", "key"])
@pytest.mark.parametrize(("heads", "groups"), GROUPS)
def test_counts_without_torch_are_the_built_modules(tiny, heads, groups, key_heads, width):
    model = tiny(heads, groups)
    architecture = architecture_of(model)
    plain = sum(p.numel() for p in model.parameters())
    assert families.parameters(architecture)["total"] == plain
    config = Config(feature_map=FeatureMap(width=width, key_heads=key_heads))
    swap(model, Swap(form="hybrid", config=config), seed=0)
    counted = config.parameters(architecture)
    for form in forms(model):
        assert {name: sum(p.numel() for p in ps) for name, ps in form.groups().items()} == counted
    assert sum(p.numel() for p in model.parameters()) == plain + 2 * sum(counted.values())


@pytest.mark.parametrize("activation", ["softmax", "exp", "relu", "elu", "none"])
def test_feature_maps(tiny, activation):
    model = swapped(tiny(), State(window=5), feature_map=FeatureMap(activation=activation, width=2, init="random"))
    form = forms(model)[0]
    x = torch.randn(2, 4, 7, 8)
    phi = form.feature_map_q(x)
    assert phi.shape == (2, 4, 7, 16)
    u = torch.einsum("bhtd,hdf->bhtf", x, form.feature_map_q.weight)
    expected = {
        "softmax": lambda: torch.cat((u.softmax(-1), (-u).softmax(-1)), -1),
        "exp": lambda: torch.cat(((u - u.amax(-1, True)).exp(), (u.amin(-1, True) - u).exp()), -1),
        "relu": lambda: torch.cat((u.relu(), (-u).relu()), -1).clamp(min=1e-12),
        "elu": lambda: torch.cat((torch.nn.functional.elu(u) + 1, torch.nn.functional.elu(-u) + 1), -1),
        "none": lambda: torch.cat((u, -u), -1),
    }[activation]()
    assert (phi - expected).abs().max() < 1e-5
    assert torch.isfinite(logits(model, tokens(1, 19))).all()


def test_packed_documents_are_alone(tiny):
    """Positions that begin anew, or segment_ids beside running positions, isolate documents."""
    model = swapped(tiny(), State(branches=("window", "linear", "sinks"), window=4, sinks=2))
    ids = tokens(1, 40)
    positions = torch.cat((torch.arange(23), torch.arange(17)))[None]
    together = logits(model, ids, position_ids=positions)
    assert (together[:, 23:] - logits(model, ids[:, 23:])).abs().max() < 1e-5
    assert (together[:, :23] - logits(model, ids[:, :23])).abs().max() < 1e-5
    segments = (positions[:, :, None] < -1).any(-1).long()
    segments[:, 23:] = 1
    assert (logits(model, ids, position_ids=positions, segment_ids=segments) - together).abs().max() < 1e-6


def test_features_stay_exact_under_autocast(tiny):
    form = forms(swapped(tiny(), State(window=5)))[0]
    x = torch.randn(1, 4, 9, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (
            torch.equal(form.feature_map_q(x), form.feature_map_q(x)) and form.feature_map_q(x).dtype == torch.float32
        )
        inside = form.feature_map_q(x)
    assert torch.equal(inside, form.feature_map_q(x))
