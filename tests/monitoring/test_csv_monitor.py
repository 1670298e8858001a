"""An unusable directory for DeepSpeed's CSV files is detected before the run starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ds_gpt2.common.errors import UserError
from ds_gpt2.config.settings import PROJECT_DIR, load_settings
from ds_gpt2.monitoring import csv_monitor
from ds_gpt2.tools.doctor import checks


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"output_path": "/dev/null"}, r"csv_monitor: cannot write to /dev/null/DeepSpeedJobName: .*Not a directory"),
        ({"output_path": "/proc/nope", "job_name": "mine"}, r"csv_monitor: cannot write to /proc/nope/mine: /proc: "),
        ({"output_path": "/tmp", "job_name": "n" * 300}, r"csv_monitor: cannot write to /tmp/nnn.*: File name too lo"),
        ({"output_path": "/tmp\0"}, r"csv_monitor: cannot write to .*: a path cannot contain a null character"),
        ({"output_path": 7}, r"csv_monitor\.output_path: Input should be a valid string"),
        ({"job_name": 7, "enabled": False}, r"csv_monitor\.job_name: Input should be a valid string"),
        ({"enabled": "perhaps"}, r"csv_monitor\.enabled: Input should be a valid boolean"),
        ([], "csv_monitor: Input should be a valid dictionary"),
    ],
)
def test_an_error_is_one_line(block: Any, message: str) -> None:
    block = {"enabled": True, **block} if isinstance(block, dict) else block
    with pytest.raises(UserError, match=message) as error:
        csv_monitor.check({"csv_monitor": block})
    assert "\n" not in str(error.value)


def test_a_creatable_directory_passes_and_is_not_created(tmp_path: Path) -> None:
    csv_monitor.check({"csv_monitor": {"enabled": True, "output_path": str(tmp_path / "csv"), "job_name": "mine"}})
    csv_monitor.check({"csv_monitor": {"enabled": False, "output_path": "/dev/null"}})
    csv_monitor.check({})
    assert list(tmp_path.iterdir()) == []


def test_doctor_reports_it(tmp_path: Path) -> None:
    content = json.loads((PROJECT_DIR / "ds_configs" / "zero2_bf16.json").read_text())
    (tmp_path / "ds.json").write_text(json.dumps({**content, "csv_monitor": {"enabled": True, "output_path": "/proc"}}))
    deepspeed = {"deepspeed": str(tmp_path / "ds.json")}
    row = checks._deepspeed_file(load_settings(PROJECT_DIR / "ds_configs" / "gpt2_124m.yaml", deepspeed))
    assert row.status == "fail" and "cannot write to /proc/DeepSpeedJobName" in row.found
