from pathlib import Path

import pytest

from ds_gpt2.run_dir.heartbeat import Heartbeat, read_beat
from ds_gpt2.run_dir.stop_request import STOP_FILE, StopRequest
from ds_gpt2.training.hooks import Interrupted
from ds_gpt2.training.progress import Progress


def test_progress_beats_and_is_interrupted_by_a_stop_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ds_gpt2.training.progress._SECONDS", 0.0)
    progress = Progress(Heartbeat(tmp_path, 0), StopRequest(), tmp_path / STOP_FILE)
    before = read_beat(tmp_path, 0)
    progress()
    after = read_beat(tmp_path, 0)
    assert before is not None and after is not None and after.count == before.count + 1
    (tmp_path / STOP_FILE).touch()
    with pytest.raises(Interrupted):
        progress()
