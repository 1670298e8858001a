"""Damage of any kind is found, and selectors find the right checkpoints."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import write_checkpoint

from ds_gpt2.checkpoint import catalog, manifest
from ds_gpt2.checkpoint.catalog import Generation, candidates, open_generation, problem_of, scan
from ds_gpt2.checkpoint.manifest import encode
from ds_gpt2.checkpoint.naming import epoch_tag, rolling_tag, superseded_tag
from ds_gpt2.common import files
from ds_gpt2.common.errors import UserError

FLIPS = 10_000


def problem_in(checkpoint: Path) -> str | None:
    return problem_of(open_generation(checkpoint))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint with three files of random bytes, some 3 kB with the manifest."""
    noise = random.Random(1)
    contents = {name: noise.randbytes(length) for name, length in (("a.pt", 700), ("b.pt", 300), ("c.pt", 40))}
    return write_checkpoint(tmp_path, rolling_tag(7), 7, contents)


def test_an_intact_checkpoint_has_no_problem(checkpoint: Path) -> None:
    assert problem_in(checkpoint) is None
    assert open_generation(checkpoint).step == 7


@pytest.mark.slow
def test_any_flipped_bit_is_found_and_its_file_is_named(checkpoint: Path) -> None:
    """Random bits of all files of the checkpoint, including the manifest."""
    draw = random.Random(2)
    contents = {path: path.read_bytes() for path in sorted(checkpoint.iterdir())}
    paths, sizes = list(contents), [len(content) for content in contents.values()]
    missed, hit = [], set()
    for path in draw.choices(paths, sizes, k=FLIPS):
        content = bytearray(contents[path])
        bit = draw.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        problem = problem_in(checkpoint)
        if problem is None or not problem.startswith(path.name + " "):
            missed.append((path.name, bit, problem))
        path.write_bytes(contents[path])
        hit.add(path)
    assert missed == []
    assert hit == set(paths)
    assert problem_in(checkpoint) is None


@pytest.mark.slow
def test_every_truncation_is_found(checkpoint: Path) -> None:
    for path in sorted(checkpoint.iterdir()):
        content = path.read_bytes()
        for length in range(len(content)):
            path.write_bytes(content[:length])
            problem = problem_in(checkpoint)
            assert problem is not None and problem.startswith(path.name + " "), (path.name, length)
        path.write_bytes(content)
    assert problem_in(checkpoint) is None


@pytest.mark.slow
@pytest.mark.parametrize("filled", [False, True], ids=["cut", "zeros"])
def test_a_larger_file_cut_at_any_page_is_found(tmp_path: Path, filled: bool) -> None:
    """The file is cut, or has zeros because the last pages were not written to the disk."""
    content = random.Random(3).randbytes(1 << 20)
    checkpoint = write_checkpoint(tmp_path, rolling_tag(7), 7, {"a.pt": b"small", "large.pt": content})
    assert problem_in(checkpoint) is None
    for length in range(0, len(content), 4096):
        with (checkpoint / "large.pt").open("wb") as file:
            file.write(content[:length])
            file.truncate(len(content) if filled else length)
        written = "is damaged: sha256 mismatch" if filled else f"has {length} bytes, {1 << 20} were written"
        assert problem_in(checkpoint) == f"large.pt {written}"


def test_a_missing_a_longer_and_a_swapped_file_are_found(checkpoint: Path) -> None:
    content_of_c = (checkpoint / "c.pt").read_bytes()
    for path in sorted(checkpoint.iterdir()):
        content = path.read_bytes()
        path.unlink()
        problem = problem_in(checkpoint)
        assert problem in (f"{path.name} is missing", f"{path.name} cannot be read: No such file or directory")
        path.mkdir()
        assert str(problem_in(checkpoint)).startswith(path.name + " ")
        path.rmdir()
        path.write_bytes(content + b"\0")
        assert str(problem_in(checkpoint)).startswith(path.name + " ")
        path.write_bytes(content)
    with (checkpoint / "c.pt").open("ab") as file:
        file.write(b"\0")
    assert problem_in(checkpoint) == "c.pt has 41 bytes, 40 were written"
    (checkpoint / "c.pt").write_bytes(content_of_c)
    shutil.copy(checkpoint / "b.pt", checkpoint / "a.pt")
    assert str(problem_in(checkpoint)) == "a.pt has 300 bytes, 700 were written"


def test_a_file_that_cannot_be_read_is_named(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *arguments: Any, **options: Any) -> object:
        if path.name == "b.pt":
            raise OSError(5, "Input/output error")
        return open(path, *arguments, **options)

    monkeypatch.setattr(files, "open", refuse, raising=False)
    assert problem_in(checkpoint) == "b.pt cannot be read: Input/output error"


def test_ranks_that_share_the_verification_find_all_damage(checkpoint: Path) -> None:
    generation = open_generation(checkpoint)
    for name in ("a.pt", "b.pt", "c.pt"):
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        for parts in (1, 2, 3, 4, 8):
            found = [problem_of(generation, part, parts) for part in range(parts)]
            assert [one for one in found if one] == [f"{name} is damaged: sha256 mismatch"]
        (checkpoint / name).write_bytes(content[:-1])
        assert all(problem_of(generation, part, 8) for part in range(8)), "a wrong size is seen by every rank"
        (checkpoint / name).write_bytes(content)


def test_with_a_damaged_manifest_the_step_is_read_from_the_tag(tmp_path: Path) -> None:
    tags = {rolling_tag(7): 7, superseded_tag(8): 8, epoch_tag(1): -1, "best_model": -1, "my_copy_9": -1}
    for tag, step in tags.items():
        path = write_checkpoint(tmp_path, tag, 5)
        assert open_generation(path).step == 5
        (path / "manifest.json").write_text("{")
        damaged = open_generation(path)
        assert (damaged.step, damaged.weights_only, damaged.manifest) == (step, False, None)
        assert damaged.problem == problem_of(damaged) == "manifest.json is damaged: it cannot be parsed"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Steps 100 to 400; 300 ends epoch 2, 200 is the best, 150 exists only as epoch 1, 350 is superseded."""
    directory = tmp_path / "checkpoints" / "run"
    for step in (100, 200, 300, 400):
        write_checkpoint(directory, rolling_tag(step), step)
    for tag, step in ((epoch_tag(2), 300), (epoch_tag(1), 150), ("best_model", 200), (superseded_tag(350), 350)):
        write_checkpoint(directory, tag, step)
    (directory / "latest").write_text(rolling_tag(400))
    (directory / "latest_backup").write_text(rolling_tag(300))
    return directory


def tags_of(found: list[Generation]) -> list[str]:
    return [generation.tag for generation in found]


HISTORY = [
    rolling_tag(400),
    rolling_tag(300),
    epoch_tag(2),
    rolling_tag(200),
    "best_model",
    epoch_tag(1),
    rolling_tag(100),
]


def test_only_checkpoints_are_listed_newest_first(run: Path) -> None:
    write_checkpoint(run, rolling_tag(500) + ".tmp", 500)
    write_checkpoint(run, "my_copy", 600)
    (run / rolling_tag(700)).mkdir()  # an interrupted deletion
    (run / rolling_tag(800)).write_text("a file")
    assert tags_of(scan(run)) == [rolling_tag(400), superseded_tag(350), *HISTORY[1:]]
    assert catalog.newest_tag(run) == rolling_tag(400)
    assert scan(run / "nowhere") == [] and catalog.newest_tag(run / "nowhere") is None


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for step in (999_999, 20, 1_000_000):
        write_checkpoint(tmp_path, rolling_tag(step), step)
    assert tags_of(scan(tmp_path)) == [rolling_tag(step) for step in (1_000_000, 999_999, 20)]


def test_superseded_checkpoints_are_not_part_of_the_history(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, superseded_tag(5), 5)
    assert catalog.newest_tag(tmp_path) is None
    write_checkpoint(tmp_path, epoch_tag(1), 3)
    assert catalog.newest_tag(tmp_path) == epoch_tag(1)
    assert tags_of(catalog.history(tmp_path)) == [epoch_tag(1)]
    assert [generation.is_primary for generation in scan(tmp_path)] == [False, True]


def test_in_a_directory_of_copies_the_last_created_comes_first(tmp_path: Path) -> None:
    for step, day in ((300, 1), (200, 2), (250, 3)):  # rolled back from 300 to before 200
        path = write_checkpoint(tmp_path, rolling_tag(step), step)
        found = open_generation(path).manifest
        assert found is not None
        (path / "manifest.json").write_bytes(
            encode(found.model_copy(update={"created": f"2026-01-0{day}T00:00:00+00:00"}))
        )
    copies = candidates(tmp_path / "run", str(tmp_path))
    assert tags_of(copies) == [rolling_tag(250), rolling_tag(200), rolling_tag(300)]


@pytest.mark.parametrize(
    ("selector", "tags"),
    [
        ("latest", HISTORY),
        ("auto", HISTORY),
        ("latest_backup", HISTORY[1:]),
        ("backup", HISTORY[1:]),
        ("best", ["best_model"]),
        ("best_model", ["best_model"]),
        ("100", [rolling_tag(100)]),
        ("0100", [rolling_tag(100)]),
        ("300", [rolling_tag(300)]),
        ("150", [epoch_tag(1)]),
        ("350", [superseded_tag(350)]),
        ("epoch_00002", [epoch_tag(2)]),
        ("epoch_2", [epoch_tag(2)]),
        ("epoch 2", [epoch_tag(2)]),
        ("epoch=2", [epoch_tag(2)]),
        ("epoch2", [epoch_tag(2)]),
        (rolling_tag(200), [rolling_tag(200)]),
        (superseded_tag(350), [superseded_tag(350)]),
    ],
)
def test_a_checkpoint_is_found_by_any_selector(run: Path, selector: str, tags: list[str]) -> None:
    assert tags_of(candidates(run, selector)) == tags


def test_a_step_selects_the_history_before_superseded_checkpoints(run: Path) -> None:
    write_checkpoint(run, superseded_tag(300), 300)
    assert tags_of(candidates(run, "300")) == [rolling_tag(300)]


def test_a_checkpoint_is_found_by_its_path(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = write_checkpoint(tmp_path / "elsewhere", "for the paper", 50)
    for selector in (str(copy), f"{copy}/"):
        assert [found.path for found in candidates(run, selector)] == [copy]
    assert candidates(run, str(copy))[0].role is None
    write_checkpoint(tmp_path / "elsewhere", superseded_tag(60), 60)
    write_checkpoint(tmp_path / "elsewhere", rolling_tag(40), 40)
    write_checkpoint(tmp_path / "elsewhere", rolling_tag(45), 45)
    assert tags_of(candidates(run, str(tmp_path / "elsewhere"))) == [rolling_tag(45), rolling_tag(40)]
    monkeypatch.chdir(tmp_path)
    assert tags_of(candidates(run, "./elsewhere")) == [rolling_tag(45), rolling_tag(40)]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tags_of(candidates(run, "~/elsewhere")) == [rolling_tag(45), rolling_tag(40)]


def test_without_checkpoints_there_are_no_candidates(tmp_path: Path) -> None:
    assert candidates(tmp_path / "nowhere", "latest") == candidates(tmp_path, "auto") == []
    with pytest.raises(UserError, match=r"no checkpoint '100' in .*: there are no checkpoints"):
        candidates(tmp_path, "100")
    with pytest.raises(UserError, match=r"no second checkpoint in .*: use --resume latest"):
        candidates(tmp_path, "backup")


@pytest.mark.parametrize(
    ("selector", "near"),
    [
        ("rolling_step_000401", rolling_tag(400)),
        ("401", rolling_tag(400)),
        ("epoch_00012", epoch_tag(2)),
        ("bset_model", "best_model"),
        ("something else", rolling_tag(400)),
    ],
)
def test_an_unknown_name_suggests_similar_ones(run: Path, selector: str, near: str) -> None:
    with pytest.raises(UserError) as error:
        candidates(run, selector)
    assert str(error.value).startswith(f"no checkpoint {selector!r} in {run}: did you mean ")
    assert near in str(error.value).partition("did you mean ")[2]


def test_a_tag_is_not_searched_in_the_working_directory(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, rolling_tag(999), 999)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no checkpoint"):
        candidates(run, rolling_tag(999))


STRANGE = [
    f"../other/{rolling_tag(9)}",
    "../..",
    "..",
    ".",
    "",
    "/etc/passwd",
    "/dev/null",
    "../other",
    "manifest.json",
    "\0",
    "-1",
    "1e2",
    "1.0",
    "%s",
]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are opened during the test."""
    found: list[Path] = []

    def recording(path: Path, *arguments: Any, **options: Any) -> object:
        found.append(path)
        return open(path, *arguments, **options)

    for module in (manifest, files):
        monkeypatch.setattr(module, "open", recording, raising=False)
    return found


@pytest.mark.parametrize("selector", STRANGE)
def test_an_invalid_name_is_a_user_error_and_opens_no_other_directory(
    run: Path, opened: list[Path], monkeypatch: pytest.MonkeyPatch, selector: str
) -> None:
    write_checkpoint(run.parent / "other", rolling_tag(9), 9)  # relative to the run, not to the working directory
    monkeypatch.chdir(run.parents[1])
    opened.clear()
    with pytest.raises(UserError):
        candidates(run, selector)
    assert [path for path in opened if run not in path.parents] == []


@pytest.mark.parametrize(
    "selector",
    ["²", "epoch ²", "9" * 5000, "epoch" + "9" * 5000, "a" * 300, "a/" * 3000, "~nobody-of-that-name/x"],
    ids=lambda selector: selector[:10],
)
def test_a_name_that_is_not_a_valid_path_is_a_user_error(run: Path, selector: str) -> None:
    with pytest.raises(UserError):
        candidates(run, selector)


def test_a_checkpoint_of_another_program_is_recognized(run: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    (foreign / "global_step10").mkdir(parents=True)
    with pytest.raises(UserError, match=r"foreign is not a checkpoint of ds_gpt2 or a directory of checkpoints"):
        candidates(run, str(foreign))
    (foreign / "global_step10" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    for selector in (foreign, foreign / "global_step10"):
        with pytest.raises(UserError, match=r"has DeepSpeed files of another program: .* has a manifest\.json"):
            candidates(run, str(selector))


def test_a_checkpoint_of_weights_is_a_candidate_only_by_its_name(run: Path) -> None:
    write_checkpoint(run, rolling_tag(500), 500, kind="weights")
    assert open_generation(run / rolling_tag(500)).weights_only
    assert tags_of(candidates(run, "latest")) == HISTORY
    assert tags_of(candidates(run, "500")) == [rolling_tag(500)]  # so that the reason is reported


def test_a_damaged_checkpoint_is_a_candidate_so_that_it_is_reported(run: Path) -> None:
    (run / rolling_tag(400) / "manifest.json").write_text("{")
    newest = candidates(run, "latest")[0]
    assert (newest.tag, problem_of(newest)) == (rolling_tag(400), "manifest.json is damaged: it cannot be parsed")


@pytest.mark.parametrize("pointer", [None, "", "rolling_step_999999", "../../etc", "\xff"])
def test_the_second_newest_is_found_without_latest_backup(run: Path, pointer: str | None) -> None:
    (run / "latest_backup").unlink()
    if pointer is not None:
        (run / "latest_backup").write_text(pointer, encoding="latin-1")
    assert tags_of(candidates(run, "backup")) == HISTORY[1:]


def test_the_second_newest_has_another_step(run: Path) -> None:
    """All tags of the newest step are excluded."""
    (run / "latest_backup").unlink()
    write_checkpoint(run, epoch_tag(3), 400)
    assert tags_of(candidates(run, "backup")) == HISTORY[1:]


def test_before_a_step_selects_the_newest_of_an_earlier_step_else_the_oldest(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        write_checkpoint(tmp_path, rolling_tag(step), step, {"a.pt": b"x"})

    def steps(selector: str) -> list[int]:
        return [found.step for found in candidates(tmp_path, selector)]

    assert steps("before:15") == [10, 5]
    assert steps("before:16") == [15, 10, 5]
    assert steps("before:5") == [5]
    with pytest.raises(UserError):
        steps("before:soon")
