from pathlib import Path

import pytest

from ds_gpt2.common.errors import UserError
from ds_gpt2.common.files import check_writable, replace_file


def test_check_writable_creates_the_directory_or_raises_an_error(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*file/below"):
        check_writable(tmp_path / "file" / "below")


def test_a_file_is_replaced_completely_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("old")
    with file.open() as reader:
        replace_file(file, "new")
        assert (reader.read(), file.read_text()) == ("old", "new")

    def fail(source: Path, target: Path) -> None:
        raise OSError("no")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no"):
        replace_file(file, "newer")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("config.yaml", "new")]
