"""``alert``: list the alert channels of a run, or send a test message to each."""

from __future__ import annotations

import argparse
import json
import socket
import time
from pathlib import Path

from ds_gpt2.common.errors import UserError
from ds_gpt2.common.formatting import clock
from ds_gpt2.config import run_location
from ds_gpt2.config.lookup import find_config, find_run
from ds_gpt2.config.settings import Settings, parse_overrides
from ds_gpt2.run_dir import exit_codes
from ds_gpt2.supervision.alerts.channels import ADDRESSES, Address, Channel, channels_of, check, deliver
from ds_gpt2.supervision.alerts.message import Message


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN|CONFIG", help="a run's name or directory, or a YAML file or its name")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that override those of the file")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--test", action="store_true", help="send a test message to every configured channel")
    what.add_argument("--list", action="store_true", help="list the configured channels, send nothing")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    settings = run_location.load(_find(options.run), parse_overrides(options.settings))
    services = check(settings.alerts)
    found = channels_of(settings.alerts)
    if not found:
        raise UserError(
            f"no alert channel is configured: write addresses into ~/.config/ds_gpt2/alert_urls or {ADDRESSES},"
            " or set alerts.command (docs/operations.md)"
        )
    if options.test:
        return _test(settings, found, options.json)
    kinds = {channel: services[channel] if isinstance(channel, Address) else "shell command" for channel in found}
    return _show(kinds, options.json)


def _find(name: str) -> Path:
    """Return the settings file of a started run, or that of a config."""
    try:
        return find_run(name) / run_location.CONFIG
    except UserError as no_run:
        try:
            return find_config(name)
        except UserError:
            raise no_run from None


def _show(kinds: dict[Channel, str], as_json: bool) -> int:
    if as_json:
        print(json.dumps([_named(channel) | {"kind": kind} for channel, kind in kinds.items()]))
    else:
        for channel, kind in kinds.items():
            print(f"{channel.name}: {kind}")
    return exit_codes.DONE


def _test(settings: Settings, found: list[Channel], as_json: bool) -> int:
    reasons = deliver(dict.fromkeys(found, _test_message(settings.run.name)))
    if as_json:
        print(json.dumps([_named(channel) | _result(reason) for channel, reason in reasons.items()]))
    else:
        for channel, reason in reasons.items():
            print(f"{channel.name}: {'delivered' if reason is None else f'NOT delivered: {reason}'}")
    return exit_codes.CRASHED if any(reasons.values()) else exit_codes.DONE


def _named(channel: Channel) -> dict[str, object]:
    return {"channel": channel.name, "way": channel.name}  # "way": the key of earlier versions


def _result(reason: str | None) -> dict[str, object]:
    """Return the result of a delivery for JSON, also by the keys of earlier versions: "taken" and "why"."""
    delivered = reason is None
    return {"delivered": delivered, "reason": reason, "taken": delivered, "why": reason}


def _test_message(run: str) -> Message:
    now = time.time()
    text = f"This is a test: alerts of run {run} arrive here.\n{socket.gethostname()}, {clock(now)}"
    return Message(run, "test", f"{run}: test", text, now)
