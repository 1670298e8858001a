"""Reading the files of a run."""

from __future__ import annotations

from report_files import WriteRun, record

from ds_gpt2.tools.report.run import load_run


def test_steps_follow_from_epochs(write_run: WriteRun) -> None:
    directory = write_run([record(7, **{"train/epoch": 7 / 33.3})])
    config = directory / "config.yaml"
    config.write_text(config.read_text().replace("steps: 100,", "epochs: 3,"))
    assert load_run(directory).steps == 100  # 99.9, rounded up
