"""Opening a dataset by name: the Hugging Face hub at one commit, what is cached of it, or a local folder (no torch).

A commit never changes, so what is here of it is used without asking the hub. Never another commit: the datasets library
itself falls back on whatever it has cached of a dataset when there is no network.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from .mistakes import among, listed
from .sources import Hub, SourceError, dataset_folder


def open_dataset(source: Hub, folder: Path) -> Any:
    """A datasets.Dataset, or an IterableDataset (shuffled as asked) where `streaming`.

    Raises SourceError: no such dataset, commit, configuration or split; gated; not here and no network.
    """
    try:
        import datasets  # noqa: F401 (asked for here, used by all below)
    except ModuleNotFoundError as error:
        raise SourceError("a dataset by name needs the datasets library: pip install 'recipelin[data]'") from error
    if source.local:
        found = _load(source, str(dataset_folder(source, folder)))
    elif not source.streaming and (prepared := _prepared(source)):
        found = _prepared_split(source, prepared)
    elif snapshot := _snapshot(source):
        found = _load(source, snapshot)
    else:
        _ask_hub(source)
        if Path(source.dataset).exists():
            raise SourceError(
                f"data: a file or folder {source.dataset} is in the current folder, and the datasets library would read it "
                f"in place of {source.label}: say dataset: ./{source.dataset} if it is meant, else run elsewhere"
            )
        found = _load(source, source.dataset, downloads=not source.streaming, revision=source.revision)
    if source.shuffle:
        return found.shuffle(seed=source.shuffle.seed, buffer_size=source.shuffle.buffer)
    return found


@contextmanager
def reading(source: Hub) -> Iterator[None]:
    """Around reading a stream: what the libraries raise becomes a SourceError that says how to go on."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except SourceError:
        raise
    except (DatasetsError, HTTPError, OSError, ValueError, RuntimeError) as error:
        raise SourceError(
            f"data: {source.label}: the stream broke off: {error}; the same command goes on from what is on disk"
        ) from error


@contextmanager
def without_bars() -> Iterator[None]:
    """The datasets library draws no progress bars, on a terminal or not; afterwards as before."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _load(source: Hub, path: str, *, downloads: bool = False, **revision: str | None) -> Any:
    """The library's bars show where it downloads, which no bar of ours does."""
    import datasets

    try:
        with nullcontext() if downloads else without_bars():
            return datasets.load_dataset(path, source.name, split=source.split, streaming=source.streaming, **revision)
    except (datasets.exceptions.DatasetsError, ValueError, RuntimeError, OSError) as error:
        raise SourceError(f"data: {source.label}: {_say(source, str(error))}") from error


def _say(source: Hub, message: str) -> str:
    """The library's words on a wrong configuration or split, with the nearest right name."""
    known: Sequence[str] = re.findall(r"'([^']+)'", message.partition("[")[2])
    if message.startswith(("Unknown split", "Bad split")):
        return f"no split {source.split!r}{among(source.split, known)}"
    if message.startswith("BuilderConfig") and "not found" in message:
        return f"no configuration {source.name!r}{among(str(source.name), known)}"
    if message.startswith("Config name is missing"):
        return f"name is missing: the dataset has the configurations {listed(known)}"
    return message.splitlines()[0] if message else "the datasets library gave no reason"


def _prepared(source: Hub) -> Path | None:
    """The folder in which the datasets library has prepared this very commit and configuration, if it has.

    Without a name that is `default`: what else is there was asked for by name, or is a part (`data_files`).
    """
    import datasets
    from datasets.naming import camelcase_to_snakecase

    owner, _, name = source.dataset.rpartition("/")
    root = Path(datasets.config.HF_DATASETS_CACHE) / "___".join([owner] * bool(owner) + [camelcase_to_snakecase(name)])
    versions = (root / (source.name or "default")).glob(f"*/{source.revision}")
    found = [f for f in versions if (f / "dataset_info.json").is_file()]
    return found[0] if len(found) == 1 else None


def _prepared_split(source: Hub, prepared: Path) -> Any:
    from datasets.packaged_modules.cache.cache import Cache

    configuration, version, commit = prepared.parts[-3:]
    builder = Cache(
        cache_dir=str(prepared.parents[3]),
        dataset_name=source.dataset.rpartition("/")[2],
        repo_id=source.dataset,
        config_name=configuration,
        version=version,
        hash=commit,
    )
    try:
        return builder.as_dataset(split=source.split)
    except ValueError as error:
        raise SourceError(f"data: {source.label}: {_say(source, str(error))}") from error


def _snapshot(source: Hub) -> str | None:
    """The folder of a download (`hf download`) of this very commit, if it is whole.

    Without a listing of the commit's files nobody can tell whether a snapshot is whole: then it does not count.
    """
    import huggingface_hub
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, LocalEntryNotFoundError

    asked: dict[str, Any] = {"repo_id": source.dataset, "repo_type": "dataset", "revision": source.revision}
    try:
        huggingface_hub.get_cached_repo_tree(**asked)
        return str(huggingface_hub.snapshot_download(**asked, local_files_only=True))
    except (CachedRepoTreeNotFoundError, LocalEntryNotFoundError):
        return None


def _ask_hub(source: Hub) -> None:
    """Asks for the commit before anything is loaded: fails at once, with one reason. Raises SourceError."""
    import datasets
    import huggingface_hub
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if datasets.config.HF_HUB_OFFLINE:
        raise SourceError(_elsewhere(source, "HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set"))
    page = f"https://huggingface.co/datasets/{source.dataset}"
    login = "log in with `hf auth login`, or set HF_TOKEN"
    try:
        huggingface_hub.HfApi().auth_check(source.dataset, repo_type="dataset")
        huggingface_hub.HfApi().dataset_info(source.dataset, revision=source.revision, timeout=20)
    except GatedRepoError as error:
        raise SourceError(f"data: {source.dataset} is gated: ask for access at {page}, then {login}") from error
    except RepositoryNotFoundError as error:
        text = f"data: the hub has no dataset {source.dataset!r}, or it is private: look at {page}; for a private one {login}"
        raise SourceError(text) from error
    except RevisionNotFoundError as error:
        raise SourceError(
            f"data: {source.dataset} has no commit {source.revision}: look at {page}/commits/main"
        ) from error
    except OfflineModeIsEnabled as error:
        raise SourceError(_elsewhere(source, "HF_HUB_OFFLINE is set")) from error
    except HfHubHTTPError as error:
        raise SourceError(f"data: {source.label}: the hub answered with an error: {error}") from error
    except (HTTPError, OSError) as error:
        raise SourceError(_elsewhere(source, f"the hub cannot be reached ({error})")) from error


def _elsewhere(source: Hub, why: str) -> str:
    template = ", template: …" if source.template else ""
    return (
        f"data: {source.dataset}@{source.revision} is not on this machine, and {why}. Ways out:\n"
        f"  - fill the cache where there is a network, and carry it here ($HF_HOME is {_cache()}):\n"
        f"    hf download {source.dataset} --repo-type dataset --revision {source.revision}\n"
        "  - name a folder with its files, in place of dataset and revision: dataset: ./folder\n"
        f"  - name one file: {{source: parquet, path: file.parquet{template}}}, or jsonl"
    )


def _cache() -> str:
    from huggingface_hub.constants import HF_HOME

    return os.path.expanduser(HF_HOME)
