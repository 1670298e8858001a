"""Download models from the Hugging Face hub: config, vocabulary and safetensors, into huggingface_hub's cache.

The library reads ``HF_ENDPOINT`` (another hub), ``HF_TOKEN`` (access to gated and private models) and ``HF_HOME`` (the
cache). Cached files are used without a request to the hub, so a run needs no network after its first start. The
library's file locks let one process per machine download a file. An interrupted download continues where it stopped.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from ds_gpt2.common.errors import UserError, reason_of
from ds_gpt2.common.files import sha256
from ds_gpt2.config.model_names import HubName
from ds_gpt2.data import hub_client
from ds_gpt2.data.hub_client import endpoint
from ds_gpt2.pretrained import gpt2_config, tensors
from ds_gpt2.pretrained.tokenizer_files import VOCABULARY_FILES, check_tokenizer

_CONTACT_SECONDS = 5.0  # timeout of the first request, for which the user waits
_ATTEMPTS = 6  # to download one file
_LONGEST_PAUSE = 30.0  # seconds
_SHA256 = re.compile("[0-9a-f]{64}")


def cached(name: HubName) -> Path | None:
    """Return the directory of a model that is completely in the cache, or None.

    Raises:
        UserError: the index of its weights cannot be read.
    """
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


def fetch(name: HubName, report: Callable[[str], None]) -> Path:
    """Return the directory of a model, downloaded if it is not completely in the cache.

    Args:
        report: called with a line for the user before the weights are downloaded.

    Raises:
        UserError: there is no such model, it has no safetensors, or the hub cannot be reached.
    """
    if (found := cached(name)) is not None:
        return found
    _contact(name)
    config = _download(name, gpt2_config.CONFIG, name.revision)
    directory, commit = config.parent, config.parent.name
    for file in VOCABULARY_FILES:
        _download_if_present(name, file, commit)
    # Refuse a model of another tokenizer before its weights are downloaded.
    check_tokenizer(directory, gpt2_config.read_config(config).vocabulary)
    report(f"downloading {name.repository} ({commit[:12]}) from {endpoint()} to {directory}")
    if not _download_if_present(name, tensors.WEIGHTS, commit):
        if not _download_if_present(name, tensors.INDEX, commit):
            raise UserError(
                f"{name.repository} on {endpoint()} has no {tensors.WEIGHTS}; other formats can run code and are not"
                " read: select a revision with safetensors by NAME@REVISION, or convert the model with transformers'"
                " save_pretrained"
            )
        for file in tensors.index_files(directory / tensors.INDEX):
            if not _download_if_present(name, file, commit):
                raise UserError(f"{name.repository} on {endpoint()} has no {file}, which its {tensors.INDEX} lists")
    return directory


def _in_cache(name: HubName, file: str, revision: str) -> Path | None:
    found = hub_client.huggingface_hub().try_to_load_from_cache(name.repository, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def _contact(name: HubName) -> None:
    """Request the model's metadata once, so that a missing network is an error within seconds.

    Raises:
        UserError: there is no such model, or the hub cannot be reached.
    """
    hub = hub_client.huggingface_hub()
    url = hub.hf_hub_url(name.repository, gpt2_config.CONFIG, revision=name.revision)
    try:
        hub.get_hf_file_metadata(url, timeout=_CONTACT_SECONDS)
    except Exception as error:  # the HTTP library differs between versions of huggingface_hub
        raise _user_error(name, gpt2_config.CONFIG, error) from None


def _download_if_present(name: HubName, file: str, revision: str) -> bool:
    """Download a file and return True; return False if the repository does not have it.

    Raises:
        UserError: it cannot be downloaded.
    """
    errors = hub_client.huggingface_hub().errors
    try:
        _download(name, file, revision)
    except errors.EntryNotFoundError:
        return False
    return True


def _download(name: HubName, file: str, revision: str) -> Path:
    """Return the path of a file in the cache, downloaded if necessary.

    Raises:
        UserError: it cannot be downloaded.
        EntryNotFoundError: the repository has no such file.
    """
    hub = hub_client.huggingface_hub()

    def download() -> Path:
        path = Path(hub.hf_hub_download(name.repository, file, revision=revision))
        _verify(path)
        return path

    try:
        return hub_client.with_retries(download, f"{file} of {name.repository}", _ATTEMPTS, _LONGEST_PAUSE)
    except Exception as error:  # the HTTP library differs between versions of huggingface_hub
        if isinstance(error, hub.errors.EntryNotFoundError) and hub_client.is_not_found(error):
            raise
        raise _user_error(name, file, error) from None


def _verify(path: Path) -> None:
    """Compare a file of weights with the checksum of the hub, which is its name in the cache.

    Raises:
        OSError: they differ; the file is removed.
    """
    content = path.resolve()
    if path.suffix == ".safetensors" and _SHA256.fullmatch(content.name) and sha256(content) != content.name:
        path.unlink()
        content.unlink(missing_ok=True)
        raise OSError("checksum mismatch")


def _user_error(name: HubName, file: str, error: Exception) -> UserError:
    """Return the error message for a failed download."""
    errors, where = hub_client.huggingface_hub().errors, f"{name.repository} on {endpoint()}"
    if isinstance(error, errors.GatedRepoError):
        return UserError(f"{where} is gated: request access on its page, then set HF_TOKEN")
    if isinstance(error, errors.RepositoryNotFoundError):
        return UserError(f"there is no model {where} and no path {name.repository}; a private model needs HF_TOKEN")
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(f"{where} has no revision {name.revision}")
    if hub_client.is_not_found(error):
        return UserError(f"{where} has no {file}")
    if (problem := hub_client.disk_problem(error)) is not None:
        cache = hub_client.huggingface_hub().constants.HF_HUB_CACHE
        return UserError(f"{file} of {where} cannot be stored in {cache}: {problem}; set HF_HOME to move the cache")
    return UserError(
        f"cannot download {file} of {name.repository} from {endpoint()} ({reason_of(error)}), and it is not in the"
        " cache: check the network, or give a local directory"
    )
