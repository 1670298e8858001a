"""Messages reach the person whom they are for, at a bearable rate, and nobody else learns where that person is."""

from __future__ import annotations

import argparse
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest
from launched import PROJECT

from ds_gpt2.commands import alert
from ds_gpt2.common.errors import UserError
from ds_gpt2.config.settings import AlertSettings
from ds_gpt2.run_dir import exit_report
from ds_gpt2.run_dir.journal import JOURNAL, Journal, Kind, read_journal
from ds_gpt2.supervision.alerts import alerts, channels, delivery_queue
from ds_gpt2.supervision.alerts.alerts import Alerts
from ds_gpt2.supervision.alerts.channels import ADDRESSES, Address

SECRET = "hunter2secret"
CONFIG = """
run: {name: mine, dir: RUNS}
model: {preset: 7M}
data: {dir: data}
schedule: {steps: 10, warmup_steps: 1}
"""


class Service:
    """What apprise's json:// posts to; ``status`` is what it answers, ``busy`` keeps it from answering."""

    def __init__(self) -> None:
        self.taken: list[dict[str, Any]] = []
        self.asked = 0
        self.status = 200
        self.busy = threading.Event()
        self.busy.set()
        service = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status = service.status  # before anybody knows that it was asked, and changes it
                service.asked += 1
                service.busy.wait(60)
                if status == 200:
                    service.taken.append(json.loads(body))
                self.send_response(status)
                self.end_headers()

            def log_message(self, *words: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        self.address = f"json://me:{SECRET}@127.0.0.1:{self._server.server_port}/{SECRET}?+X-Token={SECRET}"

    @property
    def titles(self) -> list[str]:
        return [message["title"] for message in self.taken]

    def close(self) -> None:
        self.busy.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Whoever runs the tests gets none of their messages."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv(ADDRESSES, raising=False)
    return tmp_path / "home"


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    service = Service()
    monkeypatch.setenv(ADDRESSES, service.address)
    yield service
    service.close()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "runs" / "mine"
    directory.mkdir(parents=True)
    return directory


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time at which messages are counted."""
    now = [time.time()]
    monkeypatch.setattr(alerts, "time", SimpleNamespace(time=lambda: now[0]))
    return now


def note(run_dir: Path) -> AlertSettings:
    """Settings with a command that appends each title and text to a file."""
    file = run_dir.parent / "told"
    return AlertSettings(command=f'(echo "== $DS_GPT2_TITLE"; cat) >> "{file}"', per_hour=3)


def told(run_dir: Path) -> list[str]:
    """What the command of ``note`` got, message by message."""
    file = run_dir.parent / "told"
    return file.read_text(encoding="utf-8").split("== ")[1:] if file.exists() else []


def wait_for(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def complaints(run_dir: Path) -> list[str]:
    """What the journal says of messages that were not taken, or were."""
    return [event.text for event in read_journal(run_dir) if event.kind == "alert"]


def test_news_is_one_message_that_says_what_to_type(run_dir: Path, service: Service) -> None:
    journal = Journal(run_dir)
    journal.write("crash", "before this process", 1)
    mine = Alerts(AlertSettings(kinds=("crash", "gave_up", "alert")), run_dir)
    mine.check()
    mine.tell_news()
    journal.write("save", "saved rolling_step_000005", 5)
    journal.write("crash", "rank 1: RuntimeError: out of luck", 1234)
    journal.write("gave_up", "9 starts in a row got no further", 1230)
    mine.tell_news()
    wait_for(lambda: complaints(run_dir))  # that it was told, and by whom
    mine.tell_news()  # which is no news
    mine.close()
    (message,) = service.taken
    assert message["title"] == "mine: gave up, crash"
    gave_up, crash, to_do = message["message"].split("\n\n")
    assert gave_up.startswith("9 starts in a row got no further\nstep 1,230, ")
    assert crash.startswith("rank 1: RuntimeError: out of luck\nstep 1,234, ")
    assert to_do == f"look into {run_dir}/train.log, fix the cause, then type `./launch.sh resume {run_dir}`"
    assert complaints(run_dir) == ["told mine: gave up, crash"]


def test_a_line_that_is_being_written_waits_and_a_new_journal_is_read_from_its_start(run_dir: Path) -> None:
    journal = run_dir / "journal.jsonl"
    line = json.dumps({"time": 1.0, "kind": "crash", "step": 1, "text": "the first"}) + "\n"
    mine = Alerts(note(run_dir), run_dir)
    for part in (line[:20], line[20:]):
        with journal.open("a", encoding="utf-8") as file:
            file.write(part)
        mine.tell_news()
    wait_for(lambda: complaints(run_dir))  # so that this is read as news, too
    mine.tell_news()
    journal.write_text("no JSON\n[]\n" + line.replace("first", "2nd"), encoding="utf-8")
    mine.tell_news()
    mine.close()
    assert sum("the first" in text for text in told(run_dir)) == 1
    assert sum("the 2nd" in text for text in told(run_dir)) == 1


def test_looking_for_news_opens_no_file(run_dir: Path, service: Service) -> None:
    Journal(run_dir).write("crash", "long ago")
    mine = Alerts(AlertSettings(), run_dir)
    opened = []
    sys.addaudithook(lambda event, what: opened.append(what) if event == "open" else None)  # for good: it cannot go
    mine.tell_news()
    assert opened == []


def test_an_event_that_the_journal_does_not_take_is_sent_all_the_same_and_once(run_dir: Path) -> None:
    sender, journal = Alerts(note(run_dir), run_dir), Journal(run_dir)
    (run_dir / JOURNAL).mkdir()  # stands for a disk that takes nothing
    for kind in ("crash", "save"):
        missed = journal.write(cast(Kind, kind), "rank 1: gone")
        assert missed is not None
        sender.tell(missed)
    (run_dir / JOURNAL).rmdir()
    journal.write_missed()
    sender.tell_news()
    sender.close()
    (message,) = told(run_dir)
    assert "rank 1: gone" in message and [event.kind for event in read_journal(run_dir)][:2] == ["crash", "save"]


def test_a_thousand_events_at_once_are_one_short_message(run_dir: Path) -> None:
    mine = Alerts(note(run_dir), run_dir)
    with (run_dir / "journal.jsonl").open("w", encoding="utf-8") as file:
        for number in range(1000):
            kind = "spike" if number < 700 else "not_finite"
            file.write(json.dumps({"time": 0.0, "kind": kind, "step": number, "text": f"event {number}"}) + "\n")
    mine.tell_news()
    mine.close()
    (message,) = told(run_dir)
    assert message.startswith("mine: not finite, spike\nevent 999\nstep 999, ")
    assert message.rstrip().endswith(": 700 spike, 292 not finite") and "and 992 more since " in message
    assert len(message) < 4000


def test_a_flood_is_held_back_and_summed_up_even_if_nothing_comes_after_it(run_dir: Path, clock: list[float]) -> None:
    journal = Journal(run_dir)
    for _ in range(4):  # whoever starts again has not forgotten
        mine = Alerts(note(run_dir), run_dir)
        for step in range(50):
            journal.write("crash" if step % 5 else "hang", "over", step)
            mine.tell_news()
        mine.close()
    assert sum(text.count("over\n") for text in told(run_dir)) == 3
    clock[0] += 3599
    mine.tell_news()
    clock[0] += 2
    again = Alerts(note(run_dir), run_dir)
    again.tell_news()
    again.tell_news()
    again.close()
    *_, last = told(run_dir)
    assert last.startswith("mine: held back\nand 197 more since ") and last.endswith(": 158 crash, 39 hang\n")
    assert last.count("\n") == 2


def test_the_end_of_a_run_is_told_beyond_the_limit_but_not_without_any(run_dir: Path) -> None:
    mine = Alerts(note(run_dir), run_dir)
    for _ in range(9):
        Journal(run_dir).write("crash", "gone", 5)
        mine.tell_news()
    for _ in range(9):
        Journal(run_dir).write("done", "trained all steps", 10)
        mine.tell_news()
    mine.close()
    messages = "".join(told(run_dir))
    assert messages.count("gone\n") == 3 and messages.count("trained all steps") == 4
    assert messages.count("and 6 more since ") == 1


def test_the_count_survives_damage_and_a_disk_that_cannot_be_written(run_dir: Path) -> None:
    (run_dir / alerts.COUNT).write_text('{"sent": [', encoding="utf-8")
    assert Alerts(note(run_dir), run_dir).send("hang", "mine: hang", "x") is True
    assert len(json.loads((run_dir / alerts.COUNT).read_text(encoding="utf-8"))["sent"]) == 1
    (run_dir / alerts.COUNT).unlink()
    (run_dir / alerts.COUNT).mkdir()
    mine = Alerts(note(run_dir), run_dir)
    assert [mine.send("hang", "mine: hang", "x") for _ in range(5)] == [True] * 3 + [False] * 2


def test_what_is_not_taken_is_tried_again_and_told_newest_first(
    run_dir: Path,
    service: Service,
    heard: list[str],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(delivery_queue, "FIRST_RETRY_SECONDS", 0.01)
    monkeypatch.setattr(delivery_queue, "LONGEST_RETRY_SECONDS", 0.1)
    service.status = 503
    mine = Alerts(AlertSettings(), run_dir)
    for number in range(3):
        Journal(run_dir).write("crash", f"crash number {number}", number)
        before = service.asked
        mine.tell_news()
        wait_for(lambda before=before: service.asked > before)
    service.status = 200
    wait_for(lambda: service.taken)
    mine.close()
    (message,) = service.taken
    assert message["title"] == "mine: crash and 2 more"
    places = [message["message"].index(f"crash number {number}") for number in (2, 1, 0)]
    assert places == sorted(places)
    refused = f"address 1 of {ADDRESSES} did not take 'mine: crash' (the service answered 503): it is tried again"
    assert complaints(run_dir) == [refused, "told mine: crash and 2 more"]
    assert heard == [f"alerts: {refused}"]
    everything = "".join(file.read_text(encoding="utf-8") for file in run_dir.iterdir()) + "".join(capfd.readouterr())
    assert SECRET not in everything and "127.0.0.1" not in everything


def test_what_was_never_taken_is_said_at_the_end_and_old_news_is_given_up(
    run_dir: Path, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.close()
    monkeypatch.setattr(delivery_queue, "FIRST_RETRY_SECONDS", 0.01)
    mine = Alerts(AlertSettings(), run_dir)
    assert mine.send("crash", "mine: crash", "gone") is False
    mine.close()
    name = f"address 1 of {ADDRESSES}"
    assert complaints(run_dir) == [
        f"{name} did not take 'mine: crash' (no connection): it is tried again",
        f"1 message was not delivered: {name} failed (no connection)",
    ]
    monkeypatch.setattr(delivery_queue, "KEPT_SECONDS", 0.2)
    mine.send("crash", "mine: crash", "gone")
    wait_for(lambda: "will not be tried again" in complaints(run_dir)[-1])
    mine.close()
    given_up = f"1 message was not delivered within 0s and will not be tried again: {name} failed (no connection)"
    assert complaints(run_dir)[-1] == given_up


def test_messages_that_were_not_delivered_at_the_end_are_counted_in_the_journal(run_dir: Path) -> None:
    mine = Alerts(AlertSettings(command="exit 7"), run_dir)
    mine.send("crash", "mine: crash", "gone")
    mine.send("done", "mine: done", "all steps")
    mine.close()
    last = list(read_journal(run_dir))[-1]
    assert last.text == "2 messages were not delivered: the command failed with exit status 7"
    assert last.facts == {"undelivered": 2}


def test_a_new_message_does_not_wait_for_the_next_try(run_dir: Path, service: Service) -> None:
    service.status = 500
    mine = Alerts(AlertSettings(), run_dir)
    assert mine.send("crash", "mine: crash", "gone") is False
    service.status = 200
    assert mine.send("hang", "mine: hang", "stuck") is True  # though the next try is due in 10 seconds
    assert service.titles == ["mine: hang and 1 more"]
    mine.close()


def test_the_supervisor_does_not_wait_and_no_process_shows_the_address(run_dir: Path, service: Service) -> None:
    service.busy.clear()
    mine = Alerts(AlertSettings(), run_dir)
    Journal(run_dir).write("crash", "gone")
    begun = time.monotonic()
    mine.tell_news()
    assert time.monotonic() - begun < 30  # the service keeps it for 60
    wait_for(lambda: service.asked)
    children = psutil.Process().children(recursive=True)
    assert any(channels.apprise_child.__file__ in child.cmdline() for child in children)
    assert SECRET not in str([(child.cmdline(), child.environ()) for child in children])
    service.busy.set()
    mine.close()
    assert service.titles == ["mine: crash"]


def test_a_command_gets_the_text_on_stdin_and_no_addresses(run_dir: Path, service: Service) -> None:
    out = run_dir / "out"
    Alerts(AlertSettings(command=f"(cat; env) > {out}"), run_dir).send("hang", "mine: $(reboot)", "it's; `stuck` $HOME")
    said = out.read_text(encoding="utf-8")
    assert said.startswith("it's; `stuck` $HOME\n")
    assert {"DS_GPT2_RUN=mine", "DS_GPT2_KIND=hang", "DS_GPT2_STEP=", "DS_GPT2_TITLE=mine: $(reboot)"} <= set(
        said.splitlines()
    )
    assert ADDRESSES not in said and SECRET not in said
    mine = Alerts(AlertSettings(command=f"(echo $DS_GPT2_STEP) > {out}"), run_dir)
    Journal(run_dir).write("hang", "stuck", 12)
    mine.tell_news()
    mine.close()
    assert out.read_text(encoding="utf-8") == "12\n"


def test_a_command_that_hangs_is_killed_with_all_it_started_and_holds_up_nobody(run_dir: Path) -> None:
    file = run_dir / "pid"
    hangs, works = channels.Command(f"sleep 60 & echo $! > {file}; wait"), channels.Command("exit 0")
    message = channels.Message("mine", "hang", "mine: hang", "stuck", time.time())
    begun = time.monotonic()
    assert channels.deliver({hangs: message, works: message}, 3.0) == {hangs: "no end within 3 s", works: None}
    assert time.monotonic() - begun < 30
    sleeper = int(file.read_text(encoding="ascii"))
    wait_for(lambda: not psutil.pid_exists(sleeper) or psutil.Process(sleeper).status() == psutil.STATUS_ZOMBIE)


def test_a_command_that_fails_is_written_down(run_dir: Path) -> None:
    mine = Alerts(AlertSettings(command="exit 3"), run_dir)
    assert mine.send("hang", "mine: hang", "stuck") is False
    mine.close()
    assert complaints(run_dir)[0] == "the command did not take 'mine: hang' (exit status 3): it is tried again"


def test_nothing_happens_where_there_is_no_way(run_dir: Path) -> None:
    mine = Alerts(AlertSettings(), run_dir)
    mine.check()
    Journal(run_dir).write("crash", "gone")
    mine.tell_news()
    assert mine.send("crash", "mine: crash", "gone") is False
    mine.close()
    assert [file.name for file in run_dir.iterdir()] == ["journal.jsonl"]


def write_addresses(file: Path, text: str, mode: int = 0o600) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    file.chmod(mode)
    return file


def test_addresses_stand_in_a_private_file(home: Path, service: Service) -> None:
    text = f"# mine\n\n  {service.address}  \n#json://no\n"
    file = write_addresses(home / ".config" / "ds_gpt2" / "alert_urls", text)
    names = {found.name: found.url for found in channels.addresses(AlertSettings())}
    assert names == {f"address 1 of {ADDRESSES}": service.address, f"line 3 of {file}": service.address}
    assert SECRET not in repr(channels.addresses(AlertSettings()))
    own = write_addresses(home / "own", "json://other\n")
    assert [found.url for found in channels.addresses(AlertSettings(urls_file=own))] == [
        service.address,
        "json://other",
    ]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_file_that_others_may_read_is_refused_with_the_mend(tmp_path: Path, mode: int) -> None:
    file = write_addresses(tmp_path / "urls", f"json://{SECRET}\n", mode)
    with pytest.raises(UserError, match=f"can be read by others, and holds passwords: chmod 600 {file}$") as complaint:
        Alerts(AlertSettings(urls_file=file), tmp_path).check()
    assert SECRET not in str(complaint.value)


def test_so_is_whatever_else_is_no_private_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(name: str) -> str:
        with pytest.raises(UserError) as complaint:
            channels.check(AlertSettings(urls_file=tmp_path / name))
        return str(complaint.value)

    os.mkfifo(tmp_path / "pipe", 0o600)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "binary").chmod(0o600)
    assert "is not a plain file" in refused("pipe")
    assert "cannot be read: Is a directory" in refused("")
    assert "cannot be read: No such file" in refused("gone")
    assert "is not UTF-8 text" in refused("binary")
    write_addresses(tmp_path / "urls", "json://x\n")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert "belongs to another user" in refused("urls")


def test_a_file_that_is_spoiled_later_is_said_once_and_used_again_when_mended(
    run_dir: Path, service: Service, heard: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ADDRESSES)
    file = write_addresses(run_dir.parent / "urls", service.address)
    mine = Alerts(AlertSettings(urls_file=file), run_dir)
    mine.check()
    file.chmod(0o644)
    for _ in range(3):
        assert mine.send("crash", "mine: crash", "gone") is False
    assert heard == [f"alerts: {file} can be read by others, and holds passwords: chmod 600 {file}"]
    file.chmod(0o600)
    assert mine.send("hang", "mine: hang", "stuck") is True
    mine.close()


def test_mistakes_in_addresses_are_found_at_the_start(
    run_dir: Path, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ADDRESSES, f"{service.address} nonsense://{SECRET}")
    with pytest.raises(UserError, match=f"^address 2 of {ADDRESSES} is no address that apprise knows") as complaint:
        Alerts(AlertSettings(), run_dir).check()
    assert SECRET not in str(complaint.value)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"apprise is not installed: .* -m pip install --editable '.*\[alerts\]'$"):
        Alerts(AlertSettings(), run_dir).check()


# Of each service: an address, made up, and what in it is nobody's business.
PRIVATE = {
    f"json://me:{SECRET}@nas.local:8080/hooks/T0SECRET9?+X-Token=sekret99": (SECRET, "T0SECRET9", "sekret99"),
    "slack://T1JJ3T3L2/A1BRTD4JD/TIiajkdnlazkcOXrIdevi7FQ/#training": ("T1JJ3T3L2", "A1BRTD4JD", "TIiajkdnlazkcO"),
    "tgram://123456789:AAbbCCddEEffGGhhIIjjKKllMMnnOOppQQr/-1001234/": ("123456789", "AAbbCCddEEff", "1001234"),
    "mailto://me.myself:pa55word@gmail.com?to=you@example.org": ("me.myself", "pa55word", "you@example"),
    "ntfy://my-secret-topic": ("my-secret-topic",),
    "discord://123456789012345678/abcdefABCDEFxyz_tokentoken": ("123456789012345678", "abcdefABCDEFxyz"),
    "https://hooks.slack.com/services/T1JJ3T3L2/A1BRTD4JD/TIiajkdnlazkcOXrIdevi7FQ": ("T1JJ3T3L2", "TIiajkdnlazkcO"),
}


def test_a_way_is_named_by_where_it_is_written_and_shows_no_part_of_the_address(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_addresses(run_dir.parent / "urls", "\n".join(PRIVATE))
    (run_dir / "config.yaml").write_text(CONFIG.replace("RUNS", str(run_dir.parent)), encoding="utf-8")
    assert command(run_dir, f"alerts.urls_file={file}", "--list") == exit_report.DONE
    shown = capsys.readouterr().out
    services = ["JSON", "Slack", "Telegram", "E-Mail", "ntfy", "Discord", "Slack"]
    assert shown.splitlines() == [f"line {number} of {file}: {name}" for number, name in enumerate(services, 1)]
    secrets = [secret for found in PRIVATE.values() for secret in found]
    parts = {secret[begin : begin + 4].lower() for secret in secrets for begin in range(len(secret) - 3)}
    assert [part for part in parts if part in shown.replace(str(file), "").lower()] == []


def command(run: Path | str, *words: str) -> int:
    """The verb, as the command line starts it."""
    parser = argparse.ArgumentParser()
    alert.add_arguments(parser)
    return alert.run(parser.parse_args([str(run), *words]))


def test_a_test_message_goes_every_way_and_says_which_worked(
    run_dir: Path, service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_dir.parent / "own.yaml"
    config.write_text(CONFIG.replace("RUNS", str(run_dir.parent)), encoding="utf-8")
    assert command(config, "--test") == exit_report.DONE
    assert capsys.readouterr().out == f"address 1 of {ADDRESSES}: delivered\n"
    assert service.titles == ["mine: test"] and list(run_dir.iterdir()) == []
    assert command(config, "alerts.command='exit 7'", "--test") == exit_report.CRASHED
    first = "the command: NOT delivered: exit status 7\n"
    assert capsys.readouterr().out == f"{first}address 1 of {ADDRESSES}: delivered\n"
    assert command(config, "--list", "--json") == exit_report.DONE
    assert json.loads(capsys.readouterr().out) == [{"way": f"address 1 of {ADDRESSES}", "kind": "JSON"}]
    service.status = 401
    assert command(config, "--test", "--json") == exit_report.CRASHED
    why = {"way": f"address 1 of {ADDRESSES}", "taken": False, "why": "the service answered 401"}
    assert json.loads(capsys.readouterr().out) == [why]


def test_the_verb_says_where_addresses_belong_and_which_run_is_not_there(run_dir: Path) -> None:
    (run_dir / "config.yaml").write_text(CONFIG.replace("RUNS", str(run_dir.parent)), encoding="utf-8")
    with pytest.raises(UserError, match=r"no alert channel is configured: .*alert_urls or DS_GPT2_ALERT_URLS"):
        command(run_dir, "--list")
    with pytest.raises(UserError, match="no run nowhere: known in "):
        command("nowhere", "--test")


def test_an_address_that_never_answers_ends_in_time(service: Service) -> None:
    service.busy.clear()
    message = channels.Message("mine", "crash", "mine: crash", "gone", time.time())
    begun = time.monotonic()
    assert Address("it", service.address).take(message, 2.0) == "no end within 2 s"
    assert time.monotonic() - begun < 30


def test_alerts_do_not_wait_for_torch_or_apprise() -> None:
    code = "import sys, ds_gpt2.supervision.alerts.alerts; print({'torch', 'apprise', 'deepspeed'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
