from pathlib import Path

import pytest

from ds_gpt2.errors import UserError
from ds_gpt2.machine import check_writable


def test_a_directory_is_made_or_its_refusal_told(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*file/below"):
        check_writable(tmp_path / "file" / "below")
