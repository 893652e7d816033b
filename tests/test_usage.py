"""Usage, agreement and decoding against numbers made by hand, and what they leave beside the Record."""

import gzip
import io
import json
import sys
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from recipelin import heatmap, lookup
from recipelin.attention.hybrid.config import Config as Hybrid
from recipelin.attention.hybrid.config import FeatureMap
from recipelin.evals.agreement.config import Config as Agreement
from recipelin.evals.decode.config import Config as Decode
from recipelin.evals.greedy import greedy
from recipelin.evals.subject import Subject
from recipelin.evals.usage.config import Config as Usage
from recipelin.records import Bands, BandsOf, RecordError, Result, bands_path, read_bands, write_bands
from recipelin.states import State, resolve
from recipelin.steps import Swap
from recipelin.swap import forms, swap, switch

WINDOW, LENGTH = 6, 40
WORDS = SimpleNamespace(pad_token_id=0, eos_token_id=1)


def run(config, model, folder, *, hybrid, name="hybrid", exposed_from=WINDOW, seed=0, **extra):
    state = resolve(name, hybrid)
    if state.state is not None:
        switch(model, state.state)
    subject = Subject(
        model=model, tokenizer=WORDS, state=state, seed=seed, exposed_from=exposed_from, folder=folder,
        base=folder, device="cpu", **extra,
    )  # fmt: skip
    return lookup.implementation("evals", config.eval).run(config, subject)


@pytest.fixture
def alike(monkeypatch):
    """Rows of one token over and over: every value of a layer is the same."""
    for name in ("usage", "agreement"):
        module = lookup.implementation("evals", name)
        monkeypatch.setattr(module, "held_out_rows", lambda config, *_, **__: np.full((config.rows, config.length), 7))


def student(tiny, **features):
    model = tiny()
    swap(model, Swap(form="hybrid", config=Hybrid(feature_map=FeatureMap(**features))), seed=0)
    return model


@pytest.fixture
def blind(tiny):
    """Queries of zeros: softmax is uniform, phi(q) too, and b = 1/2 for every key: features are 1/4, halves sum to 1."""
    model = student(tiny)
    for form in forms(model):
        torch.nn.init.zeros_(form.q_proj.weight)
    return model


def by_hand(edges):
    """Means over bands of b / (a + b), a = 0.1 a key of the window, b = 0.5 a key before it; and of the keys before it."""
    linear = {t: 0.5 * (t + 1 - WINDOW) / (0.5 * (t + 1 - WINDOW) + 0.1 * WINDOW) for t in range(WINDOW, LENGTH)}
    outside = {t: (t + 1 - WINDOW) / (t + 1) for t in range(WINDOW, LENGTH)}
    return [[float(np.mean([x[t] for t in range(a, b)])) for a, b in pairwise(edges)] for x in (linear, outside)]


@pytest.mark.parametrize(
    ("given", "edges"), [(None, (6, 12, 24, 40)), ((10,), (6, 10, 40)), ((2, 6, 39), (6, 39, 40)), ((), (6, 40))]
)
def test_bands_by_hand(blind, alike, tmp_path, given, edges):
    found = run(Usage(rows=3, length=LENGTH, edges=given, batch=2), blind, tmp_path, hybrid=State(window=WINDOW))
    assert [(r.task, r.metric) for r in found] == [
        (f"layer_{i}", m) for m in ("linear_share", "output_share", "outside_share") for i in (0, 1)
    ]
    linear, outside = by_hand(edges)
    for result in found:
        assert result.bands.edges == edges and len(result.bands.heads) == 4
        assert result.bands.counts == tuple(3 * (b - a) for a, b in pairwise(edges))
        # Values are alike: shares of norm and of mass are one.
        expected = outside if result.metric == "outside_share" else linear
        assert np.allclose(result.bands.heads, [expected] * 4, atol=1e-6)
        assert result.n == 3 * (LENGTH - WINDOW)
        assert result.value == pytest.approx(np.average(expected, weights=result.bands.counts), abs=1e-6)


@pytest.mark.parametrize(("level", "share"), [(60.0, 1.0), (-60.0, 0.0)])
def test_a_linear_branch_that_holds_everything_and_one_that_holds_nothing(tiny, alike, tmp_path, level, share):
    model = student(tiny)
    for form in forms(model):
        torch.nn.init.constant_(form.log_scale.c, level)
    found = run(Usage(rows=2, length=LENGTH), model, tmp_path, hybrid=State(window=WINDOW, join="absolute"))
    for result in found:
        if result.metric != "outside_share":
            assert np.allclose(result.bands.heads, share, atol=1e-9)


@pytest.mark.parametrize("join", ["average", "sum"])
def test_where_each_branch_has_its_own_normaliser_there_is_no_share_of_one(tiny, alike, tmp_path, join):
    found = run(Usage(rows=2, length=LENGTH), student(tiny), tmp_path, hybrid=State(window=WINDOW, join=join))
    assert {r.metric for r in found} == {"output_share", "outside_share"}
    # Equal values, equal weights; the second layer's values are not: `sum` doubles what has left the window.
    (first,) = [r.value for r in found if (r.task, r.metric) == ("layer_0", "output_share")]
    assert first == pytest.approx(0.5)


def test_signed_features_have_no_share_of_the_normaliser_but_one_of_the_output(tiny, tmp_path, monkeypatch):
    """The share of the norm against both numerators, summed by hand from the features."""
    module = lookup.implementation("evals", "usage")
    ids = np.random.default_rng(0).integers(2, 131, (2, 14))
    monkeypatch.setattr(module, "held_out_rows", lambda *_, **__: ids)
    seen = {}
    original = module.output_share
    monkeypatch.setattr(module, "output_share", lambda parts: seen.setdefault(len(seen), original(parts)))
    for activation in ("none", "softmax"):
        seen.clear()
        model = student(tiny, activation=activation)
        form = forms(model)[0]
        captured = []
        monkeypatch.setattr(form, "components", lambda c, f=form, k=captured: k.append(c) or type(f).components(f, c))
        found = run(Usage(rows=2, length=14), model, tmp_path, hybrid=State(window=4), exposed_from=4)
        assert ("linear_share" in {r.metric for r in found}) == (activation != "none")
        c = captured[0]
        k, v = (x.repeat_interleave(4, 1) for x in (c.k, c.v))
        phi = form.feature_map_q(c.q) @ form.feature_map_k(c.k).mT
        behind = torch.arange(14)[:, None] - torch.arange(14)
        near, far = (behind >= 0) & (behind < 4), behind >= 4
        scores = (c.q @ k.mT / 8**0.5).masked_fill(~near, -torch.inf)
        a = 0.1 * (scores - scores.amax(-1, keepdim=True)).exp() @ v
        b = phi.masked_fill(~far, 0) @ v
        a, b = a.norm(dim=-1), b.norm(dim=-1)
        assert torch.allclose(seen[0], b / (a + b), atol=1e-4)


def test_rows_that_fit_into_the_window_and_settings_that_do_not_fit(tiny, alike, tmp_path):
    model, hybrid = student(tiny), State(window=WINDOW)
    assert run(Usage(rows=2, length=WINDOW), model, tmp_path, hybrid=hybrid) == ()
    assert run(Usage(rows=2, length=WINDOW + 1), model, tmp_path, hybrid=hybrid)[0].n == 2
    with pytest.raises(ValidationError, match="edges must rise, found 9, 9"):
        Usage(edges=(9, 9))
    with pytest.raises(ValidationError, match="edge 256 lies beyond a row of 256 tokens"):
        Usage(edges=(256,))
    # Cover `all` has mass everywhere; sinks and a window of its own move the first query.
    assert Usage(length=100).bands(0, 32) == (0, 32, 64, 100)
    assert Usage(length=100).bands(34, 32) == (34, 64, 100)


# --- beside the Record ------------------------------------------------------------------------------------------------


def results(layers=2, heads=16, metrics=("linear_share", "outside_share"), seeds=(0,)):
    bands = Bands(edges=(6, 12, 40), counts=(6, 28), heads=((1.0, 0.0),) + ((0.25, 0.123456789),) * (heads - 1))
    return [
        (r.row(state="hybrid", suite="s", seed=seed), r)
        for seed in seeds
        for metric in metrics
        for layer in range(layers)
        for r in [Result(task=f"layer_{layer}", metric=metric, value=0.1, stderr=None, n=34, bands=bands)]
    ]


def test_bands_are_written_and_read(tmp_path):
    path = bands_path(tmp_path / "record.json")
    write_bands(path, results(seeds=(0, 1)))
    assert bands_path(tmp_path / "X.json").name == "X.usage.json.gz"
    found = read_bands(path)
    assert len(found) == 8 and found[0].counts == (6, 28) and found[0].heads[1] == (0.25, 0.123457)
    assert read_bands(tmp_path / "usage.json.gz") == found
    for damage in (b"{}", gzip.compress(b'{"bands": [{"edges": 1}]}'), path.read_bytes()[:40]):
        path.write_bytes(damage)
        with pytest.raises(RecordError, match="not the bands of a Record"):
            read_bands(path)


def test_the_heat_maps_open_and_show_the_numbers(tmp_path):
    write_bands(bands_path(tmp_path / "record.json"), results())
    assert heatmap.write(tmp_path) == ""
    image = Image.open(io.BytesIO((tmp_path / "usage.png").read_bytes()))
    image.load()
    # Margins; labels and 16 heads of 40; a gap; labels and the words over the bands, wider than its two columns.
    assert image.format == "PNG" and image.width > 32 + (62 + 640) + 48 + (62 + 80)
    assert image.height == 32 + 2 * (3 * 22 + 2 * 20) + 24
    corner = (16 + 62 + 2, 16 + 3 * 22 + 2)  # of layer 0, head 0: (1.0 x 6 + 0.0 x 28) / 34
    shade = 6 / 34
    expected = tuple(round(255 + (c - 255) * shade) for c in heatmap.FULL)
    assert image.getpixel(corner) == expected
    bands_at = 16 + 62 + 640 + 48 + 62 + 2  # of layer 0, first band: (1.0 + 15 x 0.25) / 16
    mean = (1 + 15 * 0.25) / 16
    assert image.getpixel((bands_at, corner[1])) == tuple(round(255 + (c - 255) * mean) for c in heatmap.FULL)
    ((left, right), _) = heatmap.grids(read_bands(tmp_path))
    assert left.rows[0][1][0] == pytest.approx(shade) and right.rows[1][1][0] == pytest.approx(mean)


def test_seeds_are_averaged_and_lengths_kept_apart():
    def bands(seed, edges, value):
        fields = {"state": "hybrid", "suite": "s", "task": "layer_3", "metric": "linear_share", "seed": seed}
        return BandsOf(edges=edges, counts=(1,), heads=((value,),), **fields)

    found = heatmap.grids([bands(0, (6, 12), 0.2), bands(1, (6, 12), 0.4), bands(0, (6, 99), 1.0)])
    assert [left.rows for left, _ in found] == [(("layer 3", (pytest.approx(0.3),)),), (("layer 3", (1.0,)),)]


def test_without_pillow_there_is_a_sentence_and_no_picture(tmp_path, monkeypatch):
    write_bands(bands_path(tmp_path / "record.json"), results())
    (tmp_path / "usage.png").write_bytes(b"of an earlier run")
    monkeypatch.setitem(sys.modules, "PIL", None)
    said = heatmap.write(tmp_path)
    assert "no heat maps: PIL is not installed (pip install pillow)" in said and str(tmp_path) in said
    assert not (tmp_path / "usage.png").exists()


# --- agreement --------------------------------------------------------------------------------------------------------


class Scripted:
    """Generates what it is told, padded with 0; 1 ends a text."""

    def __init__(self, rows, end=1):
        self.rows, self.generation_config = rows, SimpleNamespace(eos_token_id=end)

    def modules(self):
        return iter(())

    def generate(self, prompts, attention_mask, generation_config):
        made = [r[: generation_config.max_new_tokens] for r in self.rows[: len(prompts)]]
        most = max(map(len, made))
        return torch.cat([prompts, torch.tensor([r + [0] * (most - len(r)) for r in made])], 1)


def test_greedy_tells_the_end_of_a_text_from_what_fills_the_row():
    prompts = torch.full((3, 5), 7)
    for end in (1, [1, 9]):
        made = greedy(Scripted([[4, 1], [5, 5, 0, 5], [1]], end), WORDS, prompts, 6)
        assert made.tolist() == [[4, 1, -1, -1, -1, -1], [5, 5, 0, 5, -1, -1], [1, -1, -1, -1, -1, -1]]
    made = greedy(Scripted([[4, 1, 1]] * 3, None), WORDS, prompts, 3)
    assert made.tolist() == [[4, 1, 1]] * 3


def test_agreement_by_hand(alike, tmp_path):
    """Equal; another third token; an end too early; one too late; nothing equal."""
    config = Agreement(rows=5, length=10, new_tokens=4, batch=5)
    module = lookup.implementation("evals", "agreement")
    theirs = Scripted([[4, 5, 6, 7], [4, 5, 6, 7], [4, 5, 6, 7], [4, 5, 1], [4, 1]])
    asked = {"tokenizer": WORDS, "seed": 0, "base": tmp_path, "device": "cpu"}
    reference = module.reference(config, model=theirs, **asked)
    assert reference == [[4, 5, 6, 7]] * 3 + [[4, 5, 1], [4, 1]]
    own = Scripted([[4, 5, 6, 7], [4, 5, 8, 7], [4, 1], [4, 5, 6, 7], [8, 8]])
    state = {"state": resolve("hybrid", State()), "exposed_from": 11, "folder": tmp_path}
    prefix, exact = module.run(config, Subject(model=own, reference=reference, **state, **asked))
    assert [i.score for i in prefix.items] == [1, 1 / 2, 1 / 4, 2 / 3, 0]
    assert [i.score for i in exact.items] == [1, 0, 0, 0, 0] and exact.value == 1 / 5
    assert (prefix.task, exact.task, prefix.chance) == ("agreement@4", "agreement_exact@4", None)
    assert [i.length for i in prefix.items] == [14, 14, 14, 13, 12]
    assert [i.exposed for i in prefix.items] == [2 / 4] * 3 + [1 / 3, 0]  # tokens at 12 and 13 see the linear set


def test_a_model_agrees_with_itself_and_not_with_another(tiny, alike, tmp_path, capsys):
    config = Agreement(rows=4, length=12, new_tokens=8, batch=3)
    module = lookup.implementation("evals", "agreement")
    plain = tiny()
    asked = {"tokenizer": WORDS, "seed": 0, "base": tmp_path, "device": "cpu"}
    reference = module.reference(config, model=plain, **asked)
    model, hybrid = student(tiny), State(window=WINDOW)
    for name in ("teacher", "softmax"):  # the swapped model under full softmax is the teacher
        each = run(
            config, plain if name == "teacher" else model, tmp_path, hybrid=hybrid, name=name, reference=reference
        )
        assert [r.value for r in each] == [1.0, 1.0]
    with torch.no_grad():
        model.lm_head.weight.neg_()
    assert run(config, model, tmp_path, hybrid=hybrid, name="none", reference=reference)[1].value == 0.0
    assert run(config, model, tmp_path, hybrid=hybrid, reference=None) == ()
    full = State(window="full")
    assert run(config, model, tmp_path, hybrid=full, reference=reference) == ()
    said = capsys.readouterr().err
    assert "agreement@8: state hybrid: there is no teacher to agree with: left out" in said
    assert "state hybrid: window `full` beside a linear branch keeps no cache: left out" in said


# --- decode -----------------------------------------------------------------------------------------------------------


def test_cache_bytes_are_those_counted_by_hand(tiny, tmp_path):
    model, hybrid = student(tiny), State(window=WINDOW)
    config = Decode(contexts=(4, 30), new_tokens=2, repeats=3, batch=2)
    threads = torch.get_num_threads()
    grows = {c: 2 * 2 * c * 8 * 4 * 2 for c in config.contexts}  # rows, layers, tokens, width, fp32, keys and values
    # Sums of 4 heads, ring with a place for the next token, features of 4 heads for a key that leaves, position.
    state = 2 * 2 * (4 * 8 * (8 + 1) * 4 + 2 * WINDOW * 8 * 4 + 4 * 8 * 4 + 8)
    for name in ("teacher", "softmax", "hybrid"):
        found = run(config, tiny() if name == "teacher" else model, tmp_path, hybrid=hybrid, name=name)
        assert [(r.task, r.metric, r.n) for r in found] == [
            (f"decode@{c}", m, n) for c in (4, 30) for m, n in (("tokens_per_second", 3), ("cache_bytes", 1))
        ]
        sizes = {c: r.value for c, r in zip((4, 4, 30, 30), found, strict=True) if r.metric == "cache_bytes"}
        assert sizes == ({c: state for c in sizes} if name == "hybrid" else grows)
        assert all(0 < r.value < 1e6 for r in found if r.metric == "tokens_per_second")
    assert run(config, model, tmp_path, hybrid=hybrid, name="window") == ()
    assert torch.get_num_threads() == threads


def test_the_speed_is_that_of_the_median_after_a_warm_up(tiny, tmp_path, monkeypatch):
    clock = iter([0, 50, 100, 101, 200, 204, 300, 302])  # 50 s to warm up, then 1, 4 and 2
    module = lookup.implementation("evals", "decode")
    monkeypatch.setattr(module.time, "process_time", lambda: next(clock))
    config = Decode(contexts=(4,), new_tokens=2, repeats=3, batch=2)
    speed = run(config, tiny(), tmp_path, hybrid=State(), name="teacher")[0]
    assert speed.value == 4 / 2 and config.tokens() == 2 * (4 + 2 * 4) and config.length == 6


def test_decoding_that_cannot_be_is_said(tiny, tmp_path, capsys):
    assert run(Decode(contexts=(4,)), student(tiny), tmp_path, hybrid=State(window="full")) == ()
    assert "decode: state hybrid: window `full` beside a linear branch keeps no cache" in capsys.readouterr().err
    with pytest.raises(ValidationError, match="contexts must rise, found 8, 4"):
        Decode.model_validate_json(json.dumps({"contexts": [8, 4]}))
