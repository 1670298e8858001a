"""Channels of alerts: commands, and addresses that nothing reveals."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil
import pytest
from alert_service import SECRET, Service, wait_for, write_addresses

from ds_gpt2.common.errors import UserError
from ds_gpt2.config.settings import AlertSettings
from ds_gpt2.run_dir.journal import Journal
from ds_gpt2.supervision.alerts import channels
from ds_gpt2.supervision.alerts.alerts import Alerts
from ds_gpt2.supervision.alerts.channels import ADDRESSES, Address
from ds_gpt2.supervision.alerts.message import Message


def test_a_command_gets_the_text_on_stdin_and_no_addresses(run_dir: Path, service: Service) -> None:
    out = run_dir / "out"
    Alerts(AlertSettings(command=f"(cat; env) > {out}"), run_dir).send("hang", "mine: $(reboot)", "it's; `stuck` $HOME")
    output = out.read_text(encoding="utf-8")
    assert output.startswith("it's; `stuck` $HOME\n")
    assert {"DS_GPT2_RUN=mine", "DS_GPT2_KIND=hang", "DS_GPT2_STEP=", "DS_GPT2_TITLE=mine: $(reboot)"} <= set(
        output.splitlines()
    )
    assert ADDRESSES not in output and SECRET not in output
    alerts = Alerts(AlertSettings(command=f"(echo $DS_GPT2_STEP) > {out}"), run_dir)
    Journal(run_dir).write("hang", "stuck", 12)
    alerts.send_news()
    alerts.close()
    assert out.read_text(encoding="utf-8") == "12\n"


@pytest.mark.slow
def test_a_hanging_command_is_killed_with_its_children_and_delays_no_other_channel(run_dir: Path) -> None:
    file = run_dir / "pid"
    hangs, works = channels.Command(f"sleep 60 & echo $! > {file}; wait"), channels.Command("exit 0")
    message = Message("mine", "hang", "mine: hang", "stuck", time.time())
    start = time.monotonic()
    assert channels.deliver({hangs: message, works: message}, 3.0) == {hangs: "timed out after 3 s", works: None}
    assert time.monotonic() - start < 30
    sleeper = int(file.read_text(encoding="ascii"))
    wait_for(lambda: not psutil.pid_exists(sleeper) or psutil.Process(sleeper).status() == psutil.STATUS_ZOMBIE)


@pytest.mark.slow
def test_an_address_that_never_answers_times_out(service: Service) -> None:
    service.answers.clear()
    message = Message("mine", "crash", "mine: crash", "exit status 1", time.time())
    start = time.monotonic()
    assert Address("it", service.address).send(message, 2.0) == "timed out after 2 s"
    assert time.monotonic() - start < 30


def test_addresses_are_read_from_a_private_file(alert_home: Path, service: Service) -> None:
    text = f"# mine\n\n  {service.address}  \n#json://no\n"
    file = write_addresses(alert_home / ".config" / "ds_gpt2" / "alert_urls", text)
    names = {found.name: found.url for found in channels.addresses(AlertSettings())}
    assert names == {f"address 1 of {ADDRESSES}": service.address, f"line 3 of {file}": service.address}
    assert SECRET not in repr(channels.addresses(AlertSettings()))
    own = write_addresses(alert_home / "own", "json://other\n")
    assert [found.url for found in channels.addresses(AlertSettings(urls_file=own))] == [
        service.address,
        "json://other",
    ]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_file_that_other_users_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    file = write_addresses(tmp_path / "urls", f"json://{SECRET}\n", mode)
    message = f"contains passwords and can be read by other users: chmod 600 {file}$"
    with pytest.raises(UserError, match=message) as refused:
        channels.check(AlertSettings(urls_file=file))
    assert SECRET not in str(refused.value)


def test_a_file_of_addresses_that_is_not_a_private_text_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def error_of(name: str) -> str:
        with pytest.raises(UserError) as refused:
            channels.check(AlertSettings(urls_file=tmp_path / name))
        return str(refused.value)

    os.mkfifo(tmp_path / "pipe", 0o600)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "binary").chmod(0o600)
    assert "is not a regular file" in error_of("pipe")
    assert "cannot be read: Is a directory" in error_of("")
    assert "cannot be read: No such file" in error_of("missing")
    assert "is not UTF-8 text" in error_of("binary")
    write_addresses(tmp_path / "urls", "json://x\n")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert "belongs to another user" in error_of("urls")


def test_unsupported_addresses_and_a_missing_apprise_are_found_before_the_start(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ADDRESSES, f"{service.address} nonsense://{SECRET}")
    with pytest.raises(UserError, match=f"^apprise does not support address 2 of {ADDRESSES}; ") as refused:
        channels.check(AlertSettings())
    assert SECRET not in str(refused.value)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"apprise is not installed: .* -m pip install --editable '.*\[alerts\]'$"):
        channels.check(AlertSettings())
