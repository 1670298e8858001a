"""A few mutations of every file; benchmarks/fuzz.py makes thousands, with its result in benchmarks/."""

from __future__ import annotations

from pathlib import Path

from benchmarks.fuzz import Tally, make_world, mutate


def test_no_mutation_of_a_file_crashes_a_command_or_changes_a_file(tmp_path: Path) -> None:
    folder, smallest, tally = tmp_path / "world", dict[str, bytes](), Tally()
    folder.mkdir()
    for number, (name, target) in enumerate(make_world(folder, cache=tmp_path).items()):
        mutate(name, target, folder, number, 3, tally, smallest)
    assert smallest == {}
    assert tally.values > 10 and tally.refused > 10
