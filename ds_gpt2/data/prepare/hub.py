"""Files of a dataset on the Hugging Face hub: what there is, and fetching it, with patience.

``HF_ENDPOINT`` names another hub, ``HF_TOKEN`` opens what is gated; both are read by huggingface_hub itself. A transfer
that breaks off goes on where it was, also in another process.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ds_gpt2.common.errors import UserError
from ds_gpt2.data.prepare.documents import COLUMN
from ds_gpt2.data.prepare.formats import PARQUET
from ds_gpt2.data.prepare.hub_datasets import Repository
from ds_gpt2.data.prepare.parquet import parquet_documents
from ds_gpt2.data.prepare.sources import Source
from ds_gpt2.data.shards import sha256

log = logging.getLogger(__name__)

_TRIES = 12  # of a file, of which there may be thousands: minutes
_FIRST_TRIES = 4  # of the list of them, while a person looks on
_LONGEST_WAIT = 120.0  # seconds
_BYTES_PER_TOKEN = 2.86  # of parquet: FineWeb-Edu's 10BT sample, see published.py
_CONVERTED = "refs/convert/parquet"  # where the hub keeps what it has made of other formats

_TEST_SPLIT = re.compile(r"(^|/)test(-\d+-of-\d+\.|[./])")  # as the hub's tools name a split's files or directory

Result = TypeVar("Result")


@dataclass(frozen=True)
class HubFile:
    """A file at one revision."""

    repository: str
    revision: str  # a commit
    path: str
    size: int
    mark: str  # of its content
    sha256: str | None


def list_files(repository: Repository, endings: Sequence[str]) -> list[HubFile]:
    """All files with these endings, by name, at the newest commit of the revision.

    Raises:
        UserError: there is no such dataset, none of its files ends so, or the hub cannot be reached.
    """
    library = _library()
    api = library.HfApi()

    def ask() -> list[HubFile]:
        commit = api.dataset_info(repository.name, revision=repository.revision).sha
        found = api.list_repo_tree(
            repository.name, repository.path or None, recursive=True, revision=commit, repo_type="dataset"
        )
        return [
            HubFile(
                repository.name,
                commit,
                each.path,
                each.size,
                each.lfs.sha256 if each.lfs else each.blob_id,
                each.lfs.sha256 if each.lfs else None,
            )
            for each in found
            if getattr(each, "size", None) is not None and each.path.endswith(tuple(endings))
        ]

    files = _patiently(ask, f"{repository.name} on {_endpoint()}", _FIRST_TRIES)
    return sorted(files, key=lambda file: file.path)


def fetch(file: HubFile, directory: Path) -> Path:
    """Have ``file`` below ``directory``, whole.

    Raises:
        UserError: it cannot be had, or what comes is not what the hub says it is.
    """
    library = _library()

    def get() -> Path:
        path = Path(
            library.hf_hub_download(
                file.repository, file.path, repo_type="dataset", revision=file.revision, local_dir=directory
            )
        )
        if path.stat().st_size != file.size or (file.sha256 and sha256(path) != file.sha256):
            path.unlink()
            raise OSError("what came is not what was sent")
        return path

    return _patiently(get, f"{file.path} of {file.repository}", _TRIES)


@dataclass
class Fetched:
    """A part of a source: a parquet file, fetched when it is read or a little before, and removed afterwards."""

    file: HubFile
    directory: Path
    column: str
    _thread: threading.Thread | None = field(default=None, init=False)
    _result: Path | BaseException | None = field(default=None, init=False)

    @property
    def name(self) -> str:
        return f"{self.file.repository}/{self.file.path}"

    @property
    def size(self) -> int:
        return self.file.size

    @property
    def mark(self) -> str:
        return self.file.mark

    @property
    def reading(self) -> tuple[str, ...]:
        return () if self.column == COLUMN else (f"column {self.column}",)

    @property
    def tokens(self) -> float:
        return self.file.size / _BYTES_PER_TOKEN

    def prefetch(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._fetch, daemon=True)  # Ctrl+C does not wait for it
            self._thread.start()

    def documents(self, skip: int) -> Iterator[str | None]:
        self.prefetch()
        assert self._thread is not None
        self._thread.join()
        self._thread = None
        if isinstance(self._result, BaseException):
            raise self._result
        assert self._result is not None
        yield from parquet_documents(self._result, self.column, skip)
        self._result.unlink()

    def _fetch(self) -> None:
        try:
            self._result = fetch(self.file, self.directory)
        except BaseException as error:
            self._result = error


def hub_source(repository: Repository, column: str, directory: Path) -> Source:
    """All parquet files of a dataset, of which one is on the disk and the next one on its way.

    Args:
        directory: where they are while they are read.

    Raises:
        UserError: it has none.
    """
    listed = list_files(repository, PARQUET) or _converted(repository)
    files = [file for file in listed if not _TEST_SPLIT.search(file.path)] or listed
    if len(files) < len(listed):
        log.warning(f"{repository.name}: {len(listed) - len(files)} files of its test split are left out")
    return Source(source_name(repository, files), [Fetched(file, directory, column) for file in files])


def source_name(repository: Repository, files: Sequence[HubFile]) -> str:
    """For people: the dataset, its directory and commit."""
    return f"{repository.name}/{repository.path}".rstrip("/") + f" at {files[0].revision[:12]}"


def _converted(repository: Repository) -> list[HubFile]:
    """What the hub has made of a dataset in another format.

    Raises:
        UserError: nothing, or a part of it.
    """
    try:
        files = list_files(Repository(repository.name, repository.path, _CONVERTED), PARQUET)
    except UserError:
        files = []
    if not files or any("partial-" in file.path for file in files):
        raise UserError(f"{repository.name} has no parquet files: fetch it yourself, then `prepare text FILE...`")
    return files


def _patiently(ask: Callable[[], Result], what: str, tries: int) -> Result:
    """Again and again, with growing pauses, while the hub is busy or the network is away.

    Raises:
        UserError: it is not there, not ours to have, or does not come after all.
    """
    errors = _library().errors
    for number in range(tries):
        try:
            return ask()
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError) as error:
            if isinstance(error, errors.GatedRepoError):
                raise UserError(f"{what}: gated; ask for access on its page, then set HF_TOKEN") from None
            raise UserError(f"{what}: there is no such dataset, or only for those with an HF_TOKEN") from None
        except Exception as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            if not _passes(error, status) or number == tries - 1:
                raise UserError(f"{what} cannot be had: {_first_line(error)}") from None
            pause = min(_LONGEST_WAIT, 2.0**number)
            log.warning(f"{what}: {_first_line(error)}; once more in {pause:.0f} s")
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def _passes(error: Exception, status: int | None) -> bool:
    """Whether it may be better next time."""
    if status is not None:
        return status in (408, 429) or status >= 500
    return isinstance(error, OSError) or "httpx" in type(error).__module__


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _endpoint() -> str:
    return str(_library().constants.ENDPOINT)


def _library() -> Any:
    import huggingface_hub.constants  # takes a part of a second
    import huggingface_hub.errors

    return huggingface_hub
