"""Models on the Hugging Face hub: config, vocabulary and safetensors, kept in huggingface_hub's own cache.

``HF_ENDPOINT`` names another hub, ``HF_TOKEN`` opens what is gated or private, ``HF_HOME`` moves the cache; the library
reads them itself. What is in the cache is used as it is, without asking the hub, so a run needs no network after its
first start. The library's file locks let one process per machine download a file; after a broken connection a download
continues where it stopped.
"""

from __future__ import annotations

import errno
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ds_gpt2.common.errors import UserError
from ds_gpt2.config.model_names import HubName
from ds_gpt2.data.shards import sha256
from ds_gpt2.pretrained import gpt2_config, tensors
from ds_gpt2.pretrained.tokenizer_files import VOCABULARY_FILES, check_tokenizer

log = logging.getLogger(__name__)

_CONTACT_SECONDS = 5.0  # for the first answer of the hub, while a person waits
_ATTEMPTS = 6  # to download one file
_LONGEST_PAUSE = 30.0  # seconds
_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}
_SHA256 = re.compile("[0-9a-f]{64}")


def cached(name: HubName) -> Path | None:
    """Return the directory of a model that is in the cache, complete, or None."""
    config = _in_cache(name, gpt2_config.CONFIG, name.revision)
    if config is None:
        return None
    directory, commit = config.parent, config.parent.name
    if _in_cache(name, tensors.WEIGHTS, commit) is not None:
        return directory
    index = _in_cache(name, tensors.INDEX, commit)
    if index is None or any(_in_cache(name, file, commit) is None for file in tensors.index_files(index)):
        return None
    return directory


def config_file(name: HubName) -> Path:
    """Return ``config.json`` of a model, downloaded if it is not in the cache.

    Raises:
        UserError: there is no such model, or the hub cannot be reached.
    """
    found = _in_cache(name, gpt2_config.CONFIG, name.revision)
    if found is None:
        _contact(name)
        found = _download(name, gpt2_config.CONFIG, name.revision)
    return found


def fetch(name: HubName, tell: Callable[[str], None]) -> Path:
    """Return the directory of a model, complete, downloaded if it is not in the cache.

    Args:
        tell: is called with a line for people before a download begins.

    Raises:
        UserError: there is no such model, it has no safetensors, or the hub cannot be reached.
    """
    if (found := cached(name)) is not None:
        return found
    _contact(name)
    config = _download(name, gpt2_config.CONFIG, name.revision)
    directory, commit = config.parent, config.parent.name
    for file in VOCABULARY_FILES:  # which tell whether the model's tokenizer is GPT-2's
        _download_if_there(name, file, commit)
    # Before gigabytes are downloaded that are of no use.
    check_tokenizer(directory, gpt2_config.read_config(config).vocabulary)
    tell(f"downloading {name.repository} ({commit[:12]}) from {_endpoint()} to {directory}")
    if not _download_if_there(name, tensors.WEIGHTS, commit):
        if not _download_if_there(name, tensors.INDEX, commit):
            raise UserError(
                f"{name.repository} on {_endpoint()} has no {tensors.WEIGHTS}; other formats can run code and are not"
                " read: choose a revision that has safetensors with NAME@REVISION, or convert it with transformers'"
                " save_pretrained"
            )
        for file in tensors.index_files(directory / tensors.INDEX):
            if not _download_if_there(name, file, commit):
                raise UserError(f"{name.repository} on {_endpoint()} has no {file}, which its {tensors.INDEX} names")
    return directory


def _in_cache(name: HubName, file: str, revision: str) -> Path | None:
    found = _library().try_to_load_from_cache(name.repository, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def _contact(name: HubName) -> None:
    """Ask the hub for the model once, so that a missing network shows within seconds.

    Raises:
        UserError: there is no such model, or the hub cannot be reached.
    """
    library = _library()
    url = library.hf_hub_url(name.repository, gpt2_config.CONFIG, revision=name.revision)
    try:
        library.get_hf_file_metadata(url, timeout=_CONTACT_SECONDS)
    except Exception as error:  # the HTTP library differs between versions of huggingface_hub
        raise _explained(name, gpt2_config.CONFIG, error) from None


def _download_if_there(name: HubName, file: str, revision: str) -> bool:
    errors = _library().errors
    try:
        _download(name, file, revision)
    except errors.EntryNotFoundError:
        return False
    return True


def _download(name: HubName, file: str, revision: str) -> Path:
    """Return the path of a file in the cache.

    Raises:
        UserError: it cannot be downloaded.
        EntryNotFoundError: the repository has no such file.
    """
    library = _library()
    for attempt in range(_ATTEMPTS):
        try:
            path = Path(library.hf_hub_download(name.repository, file, revision=revision))
            _verify(path)
            return path
        except library.errors.EntryNotFoundError as error:
            if not isinstance(error, library.errors.LocalEntryNotFoundError):  # that one means: the network is gone
                raise
            problem: Exception = error
        except Exception as error:  # the HTTP library differs between versions of huggingface_hub
            problem = error
        if attempt == _ATTEMPTS - 1 or not _is_temporary(problem):
            raise _explained(name, file, problem) from None
        pause = min(_LONGEST_PAUSE, 2.0**attempt)
        log.warning(f"{file} of {name.repository}: {_first_line(problem)}; next attempt in {pause:.0f} s")
        time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def _verify(path: Path) -> None:
    """Compare a file of weights with the checksum that the hub announced, after which the cache calls its content.

    Raises:
        OSError: they differ; the file is removed.
    """
    content = path.resolve()
    if path.suffix == ".safetensors" and _SHA256.fullmatch(content.name) and sha256(content) != content.name:
        path.unlink()
        content.unlink(missing_ok=True)
        raise OSError("checksum mismatch")


def _explained(name: HubName, file: str, error: Exception) -> UserError:
    errors, where = _library().errors, f"{name.repository} on {_endpoint()}"
    if isinstance(error, errors.GatedRepoError):
        return UserError(f"{where} is gated: ask for access on its page, then set HF_TOKEN")
    if isinstance(error, errors.RepositoryNotFoundError):
        return UserError(f"there is no model {where}, no path {name.repository}, or it needs an HF_TOKEN")
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(f"{where} has no revision {name.revision}")
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return UserError(f"{where} has no {file}")
    if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
        cache = _library().constants.HF_HUB_CACHE
        return UserError(f"{file} of {where} cannot be stored in {cache}: {error.strerror}; HF_HOME moves the cache")
    return UserError(
        f"cannot download {file} of {name.repository} from {_endpoint()} ({_first_line(error)}), and it is not in the"
        " cache: check the network, or give a local directory"
    )


def _is_temporary(error: Exception) -> bool:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status in (408, 429) or status >= 500
    if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
        return False
    return isinstance(error, (OSError, RuntimeError)) or "http" in type(error).__module__


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _endpoint() -> str:
    return str(_library().constants.ENDPOINT)


def _library() -> Any:
    import huggingface_hub.constants  # takes a part of a second
    import huggingface_hub.errors

    return huggingface_hub
