"""Reading by name: local files and folders, the hub's caches, and one clear sentence for all that is not there."""

import json
import sys
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from huggingface_hub import errors

from recipelin import hub
from recipelin.cli import main
from recipelin.documents import Reader, documents
from recipelin.sources import PARTS, Hub, LocalFile, SourceError, Stdlib, fingerprint, part_of, stdlib_modules
from recipelin.templates import TEMPLATES

COMMIT = "12567cabf869d7c92e573c7c783905fc160e9639"
ALPACA = Hub(source="hub", dataset="yahma/alpaca-cleaned", revision=COMMIT, template="alpaca", loss="response")


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch) -> Path:
    """Empty caches of the hub and of the datasets library, and no network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return tmp_path


def rows(count: int) -> list[dict[str, str]]:
    return [{"instruction": f"say {i}", "input": "", "output": f"it is {i}"} for i in range(count)]


def write_rows(path: Path, found) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in found))
    return path


def everything(source, folder: Path) -> list[str]:
    return [d.prompt + d.text for d in Reader(source, folder).documents(PARTS)]


def test_jsonl_and_parquet_hold_the_same(tmp_path):
    texts = [f"document {i} " * 20 + "\u2028 and \r more" for i in range(60)]
    write_rows(tmp_path / "d.jsonl", [{"text": t, "n": 1} for t in texts])
    datasets.Dataset.from_dict({"text": texts}).to_parquet(str(tmp_path / "d.parquet"))
    found = [
        [t for part in PARTS for _, t in documents(LocalFile(source=kind, path=f"d.{kind}"), part, tmp_path)]
        for kind in ("jsonl", "parquet")
    ]
    assert sorted(found[0]) == sorted(found[1]) == sorted(texts)


@pytest.mark.parametrize("text", ["a\n\nb", "a\n\n\nb\n", "\n\na\n \n\n\n\nb\n\n", "", "a", "\n\n\n\n", "a\r\n\r\nb"])
def test_paragraphs_are_those_of_a_split(tmp_path, text):
    (tmp_path / "t.txt").write_bytes(text.encode())
    expected = [p for p in text.replace("\r\n", "\n").split("\n\n") if p.strip()]
    assert everything(LocalFile(source="text", path="t.txt"), tmp_path) == expected


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"text": "x"}\n{"text": \n', r"a.jsonl:2:\d+: not JSON"),
        (b'{"txt": "x"}\n', "a.jsonl:1: no column 'text', found 'txt'; did you mean 'txt'"),
        (b'{"text": "x"}\n\n["x"]\n', "a.jsonl:3: no column 'text', found no columns"),
        (b'{"text": "x"}\n{"text": "\xff"}\n', "a.jsonl:2: not UTF-8 at byte 24"),
        (b'{"text": "x"}\n\n{"text": ["x"]}\n', "a.jsonl:3: column 'text' holds a list; expected text"),
    ],
)
def test_files_that_are_not_as_named(tmp_path, content, words):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(SourceError, match=words):
        everything(LocalFile(source="jsonl", path="a.jsonl"), tmp_path)


def test_a_row_of_a_table_is_named_as_parts_counts_it(tmp_path):
    datasets.Dataset.from_list([{"text": "x"}, {"text": "y"}]).to_parquet(str(tmp_path / "set" / "a.parquet"))
    for source, table in (
        (LocalFile(source="parquet", path="set/a.parquet", chat={"column": "text"}), "set/a.parquet"),
        (Hub(source="hub", dataset="./set", chat={"column": "text"}), "./set"),
        (Hub(source="hub", dataset="./set", chat={"column": "text"}, streaming=True, tokens=9), "./set"),
    ):
        second = Reader(source, tmp_path, {"rows": 1, "stream": None})
        with pytest.raises(SourceError, match=rf"{table}, row 1 \(counted from 0\): column 'text' holds a str"):
            list(second.documents(PARTS))


def test_columns_that_are_missing_are_named_with_the_nearest(tmp_path):
    found = [{"instructions": "a", "input": "", "output": "b"}]
    datasets.Dataset.from_list(found).to_parquet(str(tmp_path / "set" / "a.parquet"))
    words = "no column 'instruction', found 'instructions', 'input', 'output'; did you mean 'instructions'"
    for source in (
        LocalFile(source="parquet", path="set/a.parquet", template="alpaca"),
        Hub(source="hub", dataset="./set", template="alpaca"),
        Hub(source="hub", dataset="./set", template="alpaca", streaming=True, tokens=9),
    ):
        with pytest.raises(SourceError, match=words):
            everything(source, tmp_path)
    (tmp_path / "set" / "a.parquet").write_bytes(b"not parquet")
    with pytest.raises(SourceError, match=r"a\.parquet: not a parquet file"):
        everything(LocalFile(source="parquet", path="set/a.parquet"), tmp_path)


def test_a_folder_in_place_of_the_hub(tmp_path):
    write_rows(tmp_path / "set" / "train.jsonl", rows(7))
    source = Hub(source="hub", dataset="./set", template="alpaca", loss="response")
    assert everything(source, tmp_path) == ["".join(TEMPLATES["alpaca"].render(r)) for r in rows(7)]
    before = fingerprint(source, tmp_path)
    (tmp_path / "set" / ".cache").mkdir()
    (tmp_path / "set" / ".cache" / "note").write_text("not data")
    assert fingerprint(source, tmp_path) == before
    write_rows(tmp_path / "set" / "train.jsonl", rows(8))
    assert fingerprint(source, tmp_path) != before
    assert fingerprint(source.model_copy(update={"dataset": "./sett"}), tmp_path) == "absent"
    for change, words in (
        ({"dataset": "./sets"}, r"folder .*sets is not there; did you mean 'set'"),
        ({"split": "trian"}, r"no split 'trian'; did you mean 'train'\? There are train"),
        ({"name": "defaul"}, r"no configuration 'defaul'; did you mean 'default'\? There are default"),
        ({"split": "trian", "streaming": True, "tokens": 5}, "did you mean 'train'"),
    ):
        with pytest.raises(SourceError, match=words):
            everything(Hub(**{**source.model_dump(), **change}), tmp_path)


@pytest.mark.parametrize("wanted", [True, False])
def test_the_library_draws_no_bars_here_and_does_so_again_afterwards(wanted, tmp_path, capfd):
    write_rows(tmp_path / "set" / "train.jsonl", rows(7))
    before = datasets.are_progress_bars_disabled()
    try:
        (datasets.enable_progress_bars if wanted else datasets.disable_progress_bars)()
        everything(Hub(source="hub", dataset="./set", template="alpaca"), tmp_path)
        with pytest.raises(SourceError):
            everything(Hub(source="hub", dataset="./set", split="trian"), tmp_path)
        assert datasets.are_progress_bars_disabled() is not wanted
        assert capfd.readouterr().err == ""
        datasets.load_dataset(str(tmp_path / "set"), cache_dir=str(tmp_path / "other"))
        assert ("Generating train split" in capfd.readouterr().err) is wanted
    finally:
        (datasets.disable_progress_bars if before else datasets.enable_progress_bars)()


# --- the hub ----------------------------------------------------------------------------------------------------------


def snapshot(caches: Path, found, *, tree: bool = True, commit: str = COMMIT, whole: bool = True) -> None:
    """What `hf download` leaves behind."""
    root = caches / "hub" / "datasets--yahma--alpaca-cleaned"
    file = write_rows(root / "snapshots" / commit / "alpaca.jsonl", found)
    files = {"alpaca.jsonl": file.stat().st_size} | ({} if whole else {"second.jsonl": 10})
    if tree:
        from huggingface_hub._tree_cache import TreeCacheEntry, write_tree_cache

        entries = {
            name: TreeCacheEntry(size=size, blob_id="0" * 40, lfs_sha256=None, lfs_size=None, xet_hash=None)
            for name, size in files.items()
        }
        write_tree_cache(str(root), commit, entries)


@pytest.fixture(autouse=True)
def _no_trees_of_other_tests():
    from huggingface_hub import _tree_cache

    _tree_cache._IN_MEMORY_TREE_CACHE.clear()


def test_a_whole_download_needs_no_network(caches):
    snapshot(caches, rows(5))
    expected = ["".join(TEMPLATES["alpaca"].render(r)) for r in rows(5)]
    assert everything(ALPACA, caches) == expected
    streamed = Hub(**{**ALPACA.model_dump(), "streaming": True, "tokens": 50})
    assert everything(streamed, caches) == expected


@pytest.mark.parametrize("how", [{"tree": False}, {"whole": False}, {"commit": "0" * 40}])
def test_a_download_that_may_lack_files_does_not_count(caches, how):
    snapshot(caches, rows(5), **how)
    with pytest.raises(SourceError, match=f"{COMMIT} is not on this machine"):
        everything(ALPACA, caches)


def prepared(caches: Path, commit: str, count: int, configuration: str = "default") -> None:
    """What `datasets.load_dataset` leaves behind."""
    made = datasets.load_dataset("json", data_files=str(write_rows(caches / "raw.jsonl", rows(count))))["train"]
    folder = Path(made.cache_files[0]["filename"]).parent
    target = caches / "datasets" / "yahma___alpaca-cleaned" / configuration / "0.0.0" / commit
    target.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(target)
    for file in target.iterdir():
        file.rename(target / file.name.replace("json-train", "alpaca-cleaned-train"))
    info = json.loads((target / "dataset_info.json").read_text())
    info |= {"config_name": configuration, "dataset_name": "alpaca-cleaned"}
    (target / "dataset_info.json").write_text(json.dumps(info))


def test_without_a_name_no_other_configuration_is_read(caches):
    """`sample` may be another configuration or one shard (`data_files`); it counts for who names it."""
    prepared(caches, COMMIT, 3, "sample")
    with pytest.raises(SourceError, match="is not on this machine"):
        everything(ALPACA, caches)
    assert len(everything(Hub(**{**ALPACA.model_dump(), "name": "sample"}), caches)) == 3
    prepared(caches, COMMIT, 5)
    assert len(everything(ALPACA, caches)) == 5


def test_what_the_library_prepared_counts_for_its_commit_only(caches):
    """Offline, the library itself takes whatever commit it has: here it would read two rows of another."""
    for commit, count in ((COMMIT, 4), ("f" * 40, 2)):
        prepared(caches, commit, count)
    assert len(datasets.load_dataset("yahma/alpaca-cleaned", split="train", revision=COMMIT)) == 2
    assert everything(ALPACA, caches) == ["".join(TEMPLATES["alpaca"].render(r)) for r in rows(4)]
    with pytest.raises(SourceError, match="no split 'trian'; did you mean 'train'"):
        everything(Hub(**{**ALPACA.model_dump(), "split": "trian"}), caches)
    with pytest.raises(SourceError, match="0000 is not on this machine"):
        everything(Hub(**{**ALPACA.model_dump(), "revision": "0" * 40}), caches)


def answer(kind: type, status: int) -> Exception:
    http = sys.modules[errors.HTTPError.__module__.partition(".")[0]]
    response = http.Response(status, request=http.Request("GET", "https://huggingface.co/api"))
    return kind("refused", response=response)


def test_each_reason_has_its_own_sentence(caches, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    http = sys.modules[errors.HTTPError.__module__.partition(".")[0]]
    ways = (
        "hf download yahma/alpaca-cleaned --repo-type dataset",
        "dataset: ./folder",
        "source: parquet",
        "template: …",
    )
    for error, words in (
        (answer(errors.GatedRepoError, 403), ("is gated: ask for access at https://huggingface.co/datasets/yahma",)),
        (
            answer(errors.RepositoryNotFoundError, 404),
            ("the hub has no dataset 'yahma/alpaca-cleaned', or it is private",),
        ),
        (answer(errors.RevisionNotFoundError, 404), (f"has no commit {COMMIT}",)),
        (answer(errors.HfHubHTTPError, 500), ("the hub answered with an error",)),
        (errors.OfflineModeIsEnabled("off"), ("HF_HUB_OFFLINE is set", *ways)),
        (http.ConnectError("no route"), ("the hub cannot be reached (no route)", *ways)),
        (TimeoutError("slow"), ("the hub cannot be reached (slow)", *ways)),
    ):

        def refuse(*_, error=error, **__):
            raise error

        monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", refuse)
        with pytest.raises(SourceError) as found:
            hub.open_dataset(ALPACA, caches)
        assert all(w in str(found.value) for w in words), found.value


def test_a_folder_of_the_datasets_name_is_never_read_in_its_place(caches, monkeypatch):
    monkeypatch.setattr(hub, "_ask_hub", lambda source: None)
    monkeypatch.chdir(caches)
    write_rows(caches / "yahma" / "alpaca-cleaned" / "x.jsonl", rows(3))
    with pytest.raises(SourceError, match=r"say dataset: \./yahma/alpaca-cleaned"):
        hub.open_dataset(ALPACA, caches)


def test_a_stream_that_breaks_off_says_how_to_go_on(caches, monkeypatch):
    write_rows(caches / "set" / "train.jsonl", [{"text": "x"}] * 50)
    source = Hub(source="hub", dataset="./set", streaming=True, tokens=50)

    class Breaking:
        def __iter__(self):
            yield {"text": "x"}
            raise ConnectionError("reset by peer")

    monkeypatch.setattr("recipelin.documents.open_dataset", lambda *_: Breaking())
    with pytest.raises(SourceError, match=r"the stream broke off: reset by peer; the same command goes on"):
        everything(source, caches)


def test_a_run_without_network_says_it_before_any_work(home, capsys, monkeypatch):
    from recipelin import hf

    def never(*_, **__):
        raise AssertionError("the teacher must not be loaded")

    monkeypatch.setattr(hf, "load_teacher", never)
    assert main(["run", "untangling/llama3-8b-lolcats", "--device", "cpu"]) == 2
    text = capsys.readouterr().err
    assert f"yahma/alpaca-cleaned@{COMMIT} is not on this machine, and HF_HUB_OFFLINE" in text
    assert "dataset: ./folder" in text and "Traceback" not in text
    assert not home.exists(), "nothing is half written"


def test_parts_of_the_library_are_disjoint_and_split_by_name():
    library = Stdlib(source="python-stdlib")
    names = {part: {n for n, _ in documents(library, part, Path())} for part in PARTS}
    assert all(len(names[p]) >= 10 for p in PARTS)
    assert sum(len(n) for n in names.values()) == len(set().union(*names.values())) == len(stdlib_modules())
    assert part_of("json.decoder") == part_of("json.decoder") and "json.decoder" in set().union(*names.values())
    assert fingerprint(library, Path()) == fingerprint(library, Path("/"))
