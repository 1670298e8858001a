"""List and download the files of a dataset on the Hugging Face hub, with retries.

huggingface_hub itself reads ``HF_ENDPOINT`` (another hub) and ``HF_TOKEN`` (access to gated datasets). An interrupted
download continues where it stopped, also in another process.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from ds_gpt2.common.errors import UserError, reason_of
from ds_gpt2.common.files import sha256
from ds_gpt2.common.formatting import counted
from ds_gpt2.data import hub_client
from ds_gpt2.data.hub_client import endpoint
from ds_gpt2.data.prepare.documents import COLUMN
from ds_gpt2.data.prepare.formats import PARQUET
from ds_gpt2.data.prepare.hub_datasets import Repository
from ds_gpt2.data.prepare.parquet import parquet_documents
from ds_gpt2.data.prepare.sources import Source

log = logging.getLogger(__name__)

_FILE_ATTEMPTS = 12  # several minutes; a dataset may have thousands of files
_LIST_ATTEMPTS = 4  # several seconds, as the user waits for the first answer
_LONGEST_PAUSE = 120.0  # seconds
_BYTES_PER_TOKEN = 2.86  # of parquet: FineWeb-Edu's 10BT sample, see hub_datasets.py
CONVERTED = "refs/convert/parquet"  # revision with the hub's own conversion of other formats

_TEST_SPLIT = re.compile(r"(^|/)test(-\d+-of-\d+\.|[./])")  # the names that the hub's tools give

Result = TypeVar("Result")


@dataclass(frozen=True)
class HubFile:
    """A file of a repository at one commit."""

    repository: str
    revision: str  # commit
    path: str
    size: int  # bytes
    mark: str  # identifies its content
    sha256: str | None  # None for a file that is not stored by Git LFS


def list_files(repository: Repository, suffixes: Sequence[str]) -> list[HubFile]:
    """Return all files with these suffixes, sorted by path, at the newest commit of the revision.

    Raises:
        UserError: there is no such dataset, or the hub cannot be reached.
    """
    hub = hub_client.huggingface_hub()
    api = hub.HfApi()

    def request() -> list[HubFile]:
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
            if getattr(each, "size", None) is not None and each.path.endswith(tuple(suffixes))
        ]

    files = _requested(request, f"{repository.name} on {endpoint()}", _LIST_ATTEMPTS)
    return sorted(files, key=lambda file: file.path)


def fetch(file: HubFile, directory: Path) -> Path:
    """Download ``file`` to ``directory``, unless it is there, and return its path.

    Raises:
        UserError: it cannot be downloaded, or its size or checksum does not match.
    """
    hub = hub_client.huggingface_hub()

    def download() -> Path:
        path = Path(
            hub.hf_hub_download(
                file.repository, file.path, repo_type="dataset", revision=file.revision, local_dir=directory
            )
        )
        if path.stat().st_size != file.size or (file.sha256 and sha256(path) != file.sha256):
            path.unlink()
            raise OSError("checksum mismatch")
        return path

    return _requested(download, f"{file.path} of {file.repository}", _FILE_ATTEMPTS)


@dataclass
class HubPart:
    """A part of a source: a parquet file that is downloaded shortly before it is read, and removed afterwards."""

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
            self._thread = threading.Thread(target=self._fetch, daemon=True)  # so that Ctrl+C does not wait
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
    """Return the parquet files of a dataset as a source. At most two of them are on the disk.

    Args:
        directory: for the downloaded files.

    Raises:
        UserError: there is no such dataset or it has no parquet files, or the hub cannot be reached.
    """
    listed = list_files(repository, PARQUET) or _converted(repository)
    files = [file for file in listed if not _TEST_SPLIT.search(file.path)] or listed
    if len(files) < len(listed):
        log.warning(f"{repository.name}: left out {counted(len(listed) - len(files), 'file')} of its test split")
    return Source(source_name(repository, files), [HubPart(file, directory, column) for file in files])


def source_name(repository: Repository, files: Sequence[HubFile]) -> str:
    """Return a name for display: the dataset, its directory and commit."""
    return f"{repository.name}/{repository.path}".rstrip("/") + f" at {files[0].revision[:12]}"


def _converted(repository: Repository) -> list[HubFile]:
    """Return the hub's own conversion of a dataset of another format to parquet.

    Raises:
        UserError: there is none, or only of a part of the dataset.
    """
    try:
        files = list_files(Repository(repository.name, repository.path, CONVERTED), PARQUET)
    except UserError:
        files = []
    if not files or any("partial-" in file.path for file in files):
        raise UserError(
            f"{repository.name} has no parquet files: download it yourself, then use `./launch.sh prepare text FILE...`"
        )
    return files


def _requested(request: Callable[[], Result], what: str, attempts: int) -> Result:
    """Return the result of ``request``, which is retried after temporary errors.

    Raises:
        UserError: ``what`` does not exist or access is denied, the disk is full, or all attempts failed.
    """
    try:
        return hub_client.with_retries(request, what, attempts, _LONGEST_PAUSE)
    except Exception as error:  # the HTTP library differs between versions of huggingface_hub
        if isinstance(error, hub_client.huggingface_hub().errors.GatedRepoError):
            raise UserError(f"{what} is gated: request access on its page, then set HF_TOKEN") from None
        if hub_client.is_not_found(error):
            raise UserError(f"{what}: there is no such dataset, or it requires an HF_TOKEN") from None
        if (problem := hub_client.disk_problem(error)) is not None:
            raise UserError(
                f"{what} cannot be stored: {problem}; free some space or check the permissions, then run the same"
                " command again to continue"
            ) from None
        raise UserError(f"{what} cannot be downloaded: {reason_of(error)}") from None
