"""Check W&B and Comet as the DeepSpeed file configures them, before a run starts; nothing is sent."""

from __future__ import annotations

import importlib.util
import json
import logging
import subprocess
import sys
from typing import Any

from pydantic import BaseModel, ValidationError

from ds_gpt2.common.errors import UserError, one_line_reason

_CHECK_SECONDS = 60.0

log = logging.getLogger(__name__)


class WandbBlock(BaseModel):
    """``wandb`` in the DeepSpeed file, with DeepSpeed's defaults."""

    enabled: bool = False
    group: str | None = None
    team: str | None = None
    project: str = "deepspeed"


class CometBlock(BaseModel):
    """``comet`` in the DeepSpeed file, with DeepSpeed's defaults, except the interval: every step."""

    enabled: bool = False
    samples_log_interval: int = 1
    project: str | None = None
    workspace: str | None = None
    api_key: str | None = None
    experiment_name: str | None = None
    experiment_key: str | None = None
    online: bool | None = None
    mode: str | None = None


def check(content: dict[str, Any]) -> None:
    """Check that the enabled trackers can be used; nothing is started and nothing is sent.

    Takes a few seconds if one is enabled: the packages are loaded in a child process.

    Args:
        content: of the DeepSpeed file.

    Raises:
        UserError: a block is wrong, a package is missing or broken, or there is no API key.
    """
    check_packages(content)
    wandb, comet = read_blocks(content)
    if wandb.enabled:
        _run_check("wandb", _WANDB_LOGIN, {}, "run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline")
    if comet.enabled:
        fix = 'set COMET_API_KEY, or "online": false in the comet block'
        _run_check("comet", _COMET_KEY, comet.model_dump(include={"api_key", "online"}), fix)


def check_packages(content: dict[str, Any]) -> None:
    """Check only that the packages are installed; takes milliseconds.

    Raises:
        UserError: a block is wrong or a package is missing.
    """
    wandb, comet = read_blocks(content)
    if wandb.enabled:
        _check_package("wandb", "wandb")
    if comet.enabled:
        _check_package("comet", "comet_ml")


def read_blocks(content: dict[str, Any]) -> tuple[WandbBlock, CometBlock]:
    """Return the two trackers' blocks of the DeepSpeed file; a missing one is disabled.

    Raises:
        UserError: a block is wrong.
    """
    try:
        return WandbBlock.model_validate(content.get("wandb", {})), CometBlock.model_validate(content.get("comet", {}))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([error.title.removesuffix("Block").lower(), *map(str, first["loc"])])
        raise UserError(f"DeepSpeed file: {where}: {first['msg']}") from None


def _check_package(block: str, package: str) -> None:
    """Check that the package of a tracker is installed.

    Raises:
        UserError: the package is not installed. A directory of its name, as W&B writes, is not a package.
    """
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        install = f"{sys.executable} -m pip install {package}"
        raise UserError(f'the DeepSpeed file enables "{block}", but {package} is not installed: {install}')


def _run_check(block: str, program: str, request: dict[str, Any], fix: str) -> None:
    """Run ``program`` in a child process, and report what it prints if it exits with 2 or 3.

    Args:
        fix: appended to the message after exit code 2; after 3 the program's own text has a fix.

    Raises:
        UserError: the program exited with 2 or 3.
    """
    try:
        child = subprocess.run(
            [sys.executable, "-c", program],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=_CHECK_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning(f"{block} could not be checked: {one_line_reason(error, 300)}")
        return
    if child.returncode in (2, 3):
        hint = f": {fix}" if child.returncode == 2 else ""
        raise UserError(f'the DeepSpeed file enables "{block}", but {_last_line(child.stdout)}{hint}')


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it cannot be used"])[-1]


# W&B's messages about a missing or malformed key do not contain the key. An unavailable service is not an error. W&B
# reads its settings from environment variables named WANDB_ and the setting's name in capitals.
_WANDB_LOGIN = """
import os, re, sys

def refuse_setting(name, reason):
    variable = "WANDB_" + name.upper()
    value = "" if re.search("key|token|secret|password", name) else "=" + os.environ.get(variable, "")
    what = f"the environment variable {variable}{value}" if variable in os.environ else f"W&B's setting {name}"
    print(f"{what} is not valid ({' '.join(reason.split())[:200]}): correct it or remove it")
    sys.exit(3)

try:
    import wandb
    from pydantic import ValidationError
    wandb.login(verify=True)
except ImportError as error:
    print(f"wandb cannot be imported ({error})")
    sys.exit(2)
except ValidationError as error:
    first = error.errors()[0]
    refuse_setting(str((*first["loc"], "?")[0]), first["msg"])
except (wandb.errors.UsageError, ValueError) as error:
    for name in ("run_id", "project", "entity"):
        if name.replace("_", " ") in str(error).lower() and "API key" not in str(error):
            refuse_setting(name, str(error))
    print("W&B has no valid API key")
    sys.exit(2)
except wandb.errors.AuthenticationError as error:
    if re.search(r"invalid|error 40[13]", str(error)):
        print("W&B rejects the API key")
        sys.exit(2)
"""
_COMET_KEY = """
import json, sys
request = json.load(sys.stdin)
try:
    import comet_ml
    from comet_ml.config import get_config
except ImportError as error:
    print(f"comet_ml cannot be imported ({error})")
    sys.exit(2)
config = get_config()
try:
    online = request["online"] if request["online"] is not None else config["comet.start.online"]
except Exception:  # the library's own
    print("COMET_START_ONLINE, or online in ~/.comet.config, is not valid: set it to true or false")
    sys.exit(3)
if online is not False and not (request["api_key"] or config["comet.api_key"]):
    print("Comet has no API key")
    sys.exit(2)
"""
