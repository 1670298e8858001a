"""A run whose directory was moved or deleted."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from alert_service import command_messages, settings_with_command

from ds_gpt2.config.run_location import CONFIG, write_first_settings
from ds_gpt2.config.sections import ClusterSettings
from ds_gpt2.config.settings import Settings, load_settings
from ds_gpt2.run_dir.journal import read_journal
from ds_gpt2.run_dir.supervisor_record import read_supervisor_record
from ds_gpt2.supervision import relocation
from ds_gpt2.supervision.cluster.hostfile import Host
from ds_gpt2.supervision.cluster.setup import cluster_of
from ds_gpt2.supervision.context import Context
from ds_gpt2.supervision.launcher import RankLayout
from ds_gpt2.supervision.stop_signals import StopSignals
from ds_gpt2.supervision.supervised_run import SupervisedRun

pytestmark = pytest.mark.usefixtures("alert_home")

RUN = SupervisedRun((), RankLayout("cpu", 2), "auto", (3, 4))


@pytest.fixture
def settings(tmp_path: Path, write_config: Callable[..., Path]) -> Settings:
    """Settings of a run that exists, with an alert command."""
    run_dir = tmp_path / "runs" / "test"
    loaded = load_settings(write_config(tmp_path, alerts={"command": settings_with_command(run_dir).command}))
    run_dir.mkdir(parents=True)
    write_first_settings(loaded)
    return loaded


@pytest.mark.parametrize(("change", "text"), [("move", "before its first checkpoint"), ("delete", "was deleted")])
def test_a_run_that_cannot_be_resumed_is_reported_also_by_an_alert(settings: Settings, change: str, text: str) -> None:
    context, moved = Context(settings, StopSignals(), 2), settings.run_dir.with_name("moved")
    settings.run_dir.rename(moved) if change == "move" else shutil.rmtree(settings.run_dir)
    assert relocation.command_to_resume(context, RUN, 5, has_started=True) == []
    context.reporter.record_ended(3)
    context.reporter.close()
    (message,) = command_messages(settings.run_dir)
    assert text in message
    if change == "move":
        (event, *_) = read_journal(moved)
        assert (event.kind, event.step) == ("stop", 5) and text in event.text
        record = read_supervisor_record(moved)
        assert record is not None and (record.state, record.code) == ("ended", 3)


@pytest.mark.parametrize(
    ("cluster", "ranks"),
    [
        (ClusterSettings(), ["--num_gpus", "2"]),
        (ClusterSettings(hostfile=Path("hosts")), []),
        (ClusterSettings(launch="srun"), ["--num_gpus", "3"]),
    ],
    ids=["this machine", "hostfile", "Slurm"],
)
def test_a_moved_run_is_resumed_with_its_ranks_and_skipped_batches(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster: ClusterSettings, ranks: list[str]
) -> None:
    monkeypatch.setenv("DS_GPT2_MOVED", "")
    monkeypatch.setattr("ds_gpt2.supervision.run_directories.newest_step", lambda _: 4)
    settings.checkpoint_dir.mkdir(parents=True)
    settings = settings.model_copy(update={"cluster": cluster})
    context, moved = Context(settings, StopSignals(), 2), tmp_path / "elsewhere" / "test"
    moved.parent.mkdir()
    settings.run_dir.rename(moved)
    hosts = None if cluster == ClusterSettings() else cluster_of(settings, [Host("a", 3), Host("b", 3)], ())
    command = relocation.command_to_resume(context, RUN, 5, has_started=True, cluster=hosts)
    assert command[command.index("resume") :] == [
        "resume",
        str(moved),
        *ranks,
        *"--from latest --leave_out 3-4".split(),
    ]
    assert os.environ["DS_GPT2_MOVED"] == "test"
    assert relocation.was_resumed_after_move("test") and not relocation.was_resumed_after_move("test")
    context.reporter.close()


def test_a_moved_run_whose_settings_cannot_be_read_ends_with_that_reason(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relocation, "_CHECKPOINTS_MOVE_SECONDS", 0.0)
    monkeypatch.setattr("ds_gpt2.supervision.run_directories.newest_step", lambda _: 4)
    context, moved = Context(settings, StopSignals(), 2), settings.run_dir.with_name("moved")
    settings.run_dir.rename(moved)
    (moved / CONFIG).write_text("model: {layers: [", encoding="utf-8")
    assert relocation.command_to_resume(context, RUN, 5, has_started=True) == []
    context.reporter.close()
    (event, *_) = read_journal(moved)
    assert event.kind == "stop" and str(moved / CONFIG) in event.text and event.text.endswith("then resume")
