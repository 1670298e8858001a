"""The verb ``alert``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from alert_service import SECRET, Service, write_addresses

from ds_gpt2.commands import alert
from ds_gpt2.common.errors import UserError
from ds_gpt2.run_dir import exit_codes
from ds_gpt2.supervision.alerts.channels import ADDRESSES

pytestmark = pytest.mark.usefixtures("alert_home")

CONFIG = """
run: {name: mine, dir: RUNS}
model: {preset: 7M}
data: {dir: data}
schedule: {steps: 10, warmup_steps: 1}
"""

# Invented addresses, each with the parts that must stay secret.
PRIVATE = {
    f"json://me:{SECRET}@nas.local:8080/hooks/T0SECRET9?+X-Token=sekret99": (SECRET, "T0SECRET9", "sekret99"),
    "slack://T1JJ3T3L2/A1BRTD4JD/TIiajkdnlazkcOXrIdevi7FQ/#training": ("T1JJ3T3L2", "A1BRTD4JD", "TIiajkdnlazkcO"),
    "tgram://123456789:AAbbCCddEEffGGhhIIjjKKllMMnnOOppQQr/-1001234/": ("123456789", "AAbbCCddEEff", "1001234"),
    "mailto://me.myself:pa55word@gmail.com?to=you@example.org": ("me.myself", "pa55word", "you@example"),
    "ntfy://my-secret-topic": ("my-secret-topic",),
    "discord://123456789012345678/abcdefABCDEFxyz_tokentoken": ("123456789012345678", "abcdefABCDEFxyz"),
    "https://hooks.slack.com/services/T1JJ3T3L2/A1BRTD4JD/TIiajkdnlazkcOXrIdevi7FQ": ("T1JJ3T3L2", "TIiajkdnlazkcO"),
}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "runs" / "mine"
    directory.mkdir(parents=True)
    return directory


def command(run: Path | str, *words: str) -> int:
    parser = argparse.ArgumentParser()
    alert.add_arguments(parser)
    return alert.run(parser.parse_args([str(run), *words]))


@pytest.mark.slow
def test_a_channel_is_named_by_where_it_is_written_and_shows_no_part_of_the_address(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_addresses(run_dir.parent / "urls", "\n".join(PRIVATE))
    (run_dir / "config.yaml").write_text(CONFIG.replace("RUNS", str(run_dir.parent)), encoding="utf-8")
    assert command(run_dir, f"alerts.urls_file={file}", "--list") == exit_codes.DONE
    shown = capsys.readouterr().out
    services = ["JSON", "Slack", "Telegram", "E-Mail", "ntfy", "Discord", "Slack"]
    assert shown.splitlines() == [f"line {number} of {file}: {name}" for number, name in enumerate(services, 1)]
    secrets = [secret for found in PRIVATE.values() for secret in found]
    parts = {secret[start : start + 4].lower() for secret in secrets for start in range(len(secret) - 3)}
    assert [part for part in parts if part in shown.replace(str(file), "").lower()] == []


@pytest.mark.slow
def test_a_test_message_is_sent_through_every_channel_and_the_results_are_shown(
    run_dir: Path, service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_dir.parent / "own.yaml"
    config.write_text(CONFIG.replace("RUNS", str(run_dir.parent)), encoding="utf-8")
    assert command(config, "--test") == exit_codes.DONE
    assert capsys.readouterr().out == f"address 1 of {ADDRESSES}: delivered\n"
    assert service.titles == ["mine: test"] and list(run_dir.iterdir()) == []
    assert command(config, "alerts.command='exit 7'", "--test") == exit_codes.CRASHED
    first = "the command: NOT delivered: exit status 7\n"
    assert capsys.readouterr().out == f"{first}address 1 of {ADDRESSES}: delivered\n"
    assert command(config, "--list", "--json") == exit_codes.DONE
    assert json.loads(capsys.readouterr().out) == [
        {"channel": f"address 1 of {ADDRESSES}", "way": f"address 1 of {ADDRESSES}", "kind": "JSON"}
    ]
    service.status = 401
    assert command(config, "--test", "--json") == exit_codes.CRASHED
    (result,) = json.loads(capsys.readouterr().out)
    assert result["channel"] == result["way"] == f"address 1 of {ADDRESSES}"
    assert result["delivered"] is result["taken"] is False
    assert result["reason"] == result["why"] == "the service answered 401"


def test_missing_channels_and_unknown_runs_are_errors(run_dir: Path) -> None:
    (run_dir / "config.yaml").write_text(CONFIG.replace("RUNS", str(run_dir.parent)), encoding="utf-8")
    with pytest.raises(UserError, match=r"no alert channel is configured: .*alert_urls or DS_GPT2_ALERT_URLS"):
        command(run_dir, "--list")
    with pytest.raises(UserError, match="no run nowhere; runs in "):
        command("nowhere", "--test")
