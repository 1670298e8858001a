"""Models from a local hub server, with the real client: names, downloads, errors, and commands."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from hub_server import Hub, commit_of
from launched import PROJECT
from safetensors.torch import save, save_file

from ds_gpt2.cli import main
from ds_gpt2.common.errors import UserError
from ds_gpt2.config.model_names import HubName, hub_name, resolve
from ds_gpt2.model.gpt2 import GPT2
from ds_gpt2.model.shape import ModelShape
from ds_gpt2.pretrained import huggingface, load, tensors
from ds_gpt2.run_dir import exit_codes

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = ModelShape(layers=2, heads=2, width=32, sequence_length=64)
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PROGRAM = [sys.executable, str(PROJECT / "ds_gpt2" / "__main__.py")]  # as launch.sh does


def files_of(seed: int, folder: Path) -> dict[str, bytes]:
    """Return the files of a model on the hub, and a file of another format that must never be requested."""
    torch.manual_seed(seed)
    weights = {name: parameter.detach() for name, parameter in GPT2(SHAPE).named_parameters()}
    folder.mkdir()
    huggingface.write_weights(weights, folder / WEIGHTS, torch.float32)
    (folder / CONFIG).write_text(json.dumps(huggingface.config_of(SHAPE, 0.0, "float32")))
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return files_of(1, tmp_path_factory.mktemp("one") / "model")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return files_of(2, tmp_path_factory.mktemp("two") / "model")


@pytest.fixture
def served(
    one: dict[str, bytes], two: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Hub]:
    with Hub({}, {"some/gpt2": one, "some/gpt2@v2": two, "openai-community/gpt2": two}) as serving:
        point_at(serving.url, tmp_path / "cache", monkeypatch)
        monkeypatch.chdir(tmp_path)
        yield serving


def point_at(url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do what HF_ENDPOINT, HF_HOME and HF_HUB_DISABLE_XET do if they are set before the library is imported."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


# Names


@pytest.mark.parametrize(
    ("name", "repository", "revision"),
    [
        ("gpt2", "gpt2", "main"),
        ("gpt2-xl", "gpt2-xl", "main"),
        ("openai-community/gpt2", "openai-community/gpt2", "main"),
        ("o/n_a.me-1", "o/n_a.me-1", "main"),
        ("o/n@v1.0", "o/n", "v1.0"),
        ("gpt2@refs/pr/3", "gpt2", "refs/pr/3"),
    ],
)
def test_names_on_the_hub_are_recognized(tmp_path: Path, name: str, repository: str, revision: str) -> None:
    assert resolve(name, tmp_path) == name
    assert hub_name(name) == HubName(repository, revision)


@pytest.mark.parametrize(
    "name",
    [
        "./gpt2",
        "../gpt2",
        "/gpt2",
        "~x/gpt2",
        "gpt2/",
        "x/y/z",
        "x//y",
        "nowhere",
        "x/model.pt",
        "model.pt",
        ".",
        "..",
        "",
        "x y/z",
        "x/y@",
        "x/y@../z",
        "x/..",
        "a/b--c",
        "x\\y",
        "s3://x/y",
        "x/" + "y" * 200,
        "gpt2\n",
    ],
)
def test_other_names_are_paths(tmp_path: Path, name: str) -> None:
    assert resolve(name, tmp_path) == os.path.normpath(tmp_path / name)
    assert hub_name(resolve(name, tmp_path)) is None


def test_an_existing_path_precedes_the_hub(tmp_path: Path) -> None:
    (tmp_path / "some" / "gpt2").mkdir(parents=True)
    assert resolve("some/gpt2", tmp_path) == str(tmp_path / "some" / "gpt2")
    assert resolve("some/gpt2@v2", tmp_path) == "some/gpt2@v2"


# Downloads


def test_config_and_safetensors_are_downloaded_once(served: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    path = load.prepare(SHAPE, "some/gpt2")
    assert sorted(each.name for each in path.iterdir()) == [CONFIG, WEIGHTS]
    assert served.requests == {CONFIG: 1, WEIGHTS: 1} and "pytorch_model.bin" not in served.heads
    assert (
        f"downloading some/gpt2 ({commit_of('some/gpt2')[:12]}) from {served.url} to {path}" in capsys.readouterr().err
    )
    served.__exit__()
    assert load.prepare(SHAPE, "some/gpt2") == path
    assert len(load.weights_for(SHAPE, "some/gpt2")) == 2 + 2 * 12 + 2
    assert capsys.readouterr().err == ""


def test_a_check_downloads_the_config_only(served: Hub) -> None:
    load.check(SHAPE, "some/gpt2")
    assert served.requests == {CONFIG: 1}
    with pytest.raises(
        UserError, match=r"model\.init_from some/gpt2 has layers 2, heads 2, width 32; .* set model\.layers=2"
    ):
        load.prepare(ModelShape(3, 2, 32, 64), "some/gpt2")
    assert served.requests == {CONFIG: 1}


def test_short_names_and_revisions_are_resolved(served: Hub) -> None:
    weights = {name: load.weights_for(SHAPE, name) for name in ("gpt2", "some/gpt2", "some/gpt2@v2")}
    first, second, third = (each["wte.weight"] for each in weights.values())
    assert torch.equal(first, third) and not torch.equal(first, second)
    by_commit = load.weights_for(SHAPE, f"some/gpt2@{commit_of('some/gpt2@v2')}")
    assert torch.equal(by_commit["wte.weight"], third)


def test_sharded_weights_are_downloaded(served: Hub, one: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes(one[WEIGHTS])
    weights = tensors.read(tensors.headers(tmp_path))
    parts: dict[str, dict[str, torch.Tensor]] = {"a.safetensors": {}, "b.safetensors": {}}
    for number, (name, tensor) in enumerate(weights):
        parts[sorted(parts)[number % 2]][name] = tensor
    listed = {name: file for file, part in parts.items() for name in part}
    content = {CONFIG: one[CONFIG], INDEX: json.dumps({"weight_map": listed}).encode()}
    served.models["some/parts"] = content | {file: save(part) for file, part in parts.items()}
    expected = load.weights_for(SHAPE, "some/gpt2")
    found = load.weights_for(SHAPE, "some/parts")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    served.models["some/outside"] = content | {INDEX: json.dumps({"weight_map": {"x": "../../secret"}}).encode()}
    with pytest.raises(UserError, match="only safetensors files in its directory"):
        load.locate("some/outside")
    assert not [path for path in [*served.requests, *served.heads] if "secret" in path]


def test_broken_connections_and_wrong_bytes_are_retried(served: Hub) -> None:
    faults: dict[int, int | str] = {1: "corrupt", 2: 503, 3: "drop"}
    served.fault = lambda path, requests: faults.get(requests) if path == WEIGHTS else None
    found = load.weights_for(SHAPE, "some/gpt2")
    assert served.requests[WEIGHTS] >= 4
    served.__exit__()
    assert torch.equal(found["wpe.weight"], load.weights_for(SHAPE, "some/gpt2")["wpe.weight"])


def _with_config(**values: Any) -> Callable[[Hub], object]:
    def change(served: Hub) -> None:
        files = served.models["some/gpt2"]
        config = json.loads(files[CONFIG]) | values
        served.models["some/gpt2"] = {**files, CONFIG: json.dumps(config).encode()}

    return change


def _without(*names: str) -> Callable[[Hub], object]:
    def change(served: Hub) -> None:
        files = served.models["some/gpt2"]
        served.models["some/gpt2"] = {name: each for name, each in files.items() if name not in names}

    return change


def _german(served: Hub) -> None:
    vocabulary = json.dumps({"der": 0}).encode()
    served.models["some/gpt2"] = {**served.models["some/gpt2"], "vocab.json": vocabulary}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("some/gpt2", _with_config(scale_attn_weights=False), r"config\.json: scale_attn_weights is false"),
        ("some/gpt2", _german, r"vocab\.json: token 0 is 'der', GPT-2's is '!'"),
        ("some/gpt2", _without(WEIGHTS), r"some/gpt2 on http.* has no model\.safetensors; other formats can run code"),
        ("some/gpt2", _without(CONFIG), r"some/gpt2 on http.* has no config\.json"),
        ("some/none", None, r"there is no model some/none on http"),
        ("gpt2-medium", None, r"there is no model gpt2-medium on http"),
        ("some/gpt2@v3", None, r"some/gpt2 on http.* has no revision v3"),
        (
            "some/gpt2",
            lambda served: served.gated.add("some/gpt2"),
            r"is gated: request access on its page, then set HF_T",
        ),
        (
            "some/gpt2",
            lambda served: setattr(served, "fault", lambda path, requests: 500),
            r"cannot download config\.json of some/gpt2 from http.* \(",
        ),
    ],
)
def test_errors_are_one_line_and_precede_the_download_of_weights(
    served: Hub, name: str, change: Callable[[Hub], object] | None, message: str
) -> None:
    if change is not None:
        change(served)
    with pytest.raises(UserError, match=message) as raised:
        load.prepare(SHAPE, name)
    assert "\n" not in str(raised.value)
    assert served.requests[WEIGHTS] == served.requests["pytorch_model.bin"] == 0


@pytest.mark.ranks
def test_a_missing_network_is_an_error_within_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent:  # accepts connections and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            ports = silent.getsockname()[1], closed.getsockname()[1]
        for port in ports:
            point_at(f"http://127.0.0.1:{port}", tmp_path / "cache", monkeypatch)
            for function in (load.check, load.prepare, load.weights_for):
                start = time.monotonic()
                with pytest.raises(
                    UserError, match=r"cannot download config\.json of gpt2 from http.*check the network"
                ) as raised:
                    function(SHAPE, "gpt2")
                assert time.monotonic() - start < 15 and "\n" not in str(raised.value)
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_is_an_error(served: Hub, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=rf"cannot be stored in {tmp_path}/cache: .*; set HF_HOME to move the cache"):
        load.prepare(SHAPE, "some/gpt2")


# Commands


def test_eval_and_generate_accept_the_same_names(
    served: Hub, dataset_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    found: list[dict[str, Any]] = []
    for name in ("some/gpt2", "gpt2"):
        assert main(["eval", name, "--data", str(dataset_dir), "--tokens", "64", "--json", "--device", "cpu"]) == 0
        found += json.loads(capsys.readouterr().out)["rows"]
    assert [row["title"] for row in found] == ["some/gpt2", "gpt2"]
    assert found[0]["loss"] != found[1]["loss"]
    assert main(["generate", "gpt2", "--prompt", "The", "--tokens", "3", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("The")
    assert served.requests[WEIGHTS] == 2

    (tmp_path / "gpt2").mkdir()  # an existing path precedes the hub
    assert main(["generate", "gpt2", "--device", "cpu"]) == exit_codes.MISTAKE
    assert "gpt2" in capsys.readouterr().err
    assert main(["eval", "nowhere", "--data", str(dataset_dir)]) == exit_codes.MISTAKE
    assert "no run nowhere" in capsys.readouterr().err
    assert main(["eval", "some/gpt2", "--tag", "best", "--data", str(dataset_dir)]) == exit_codes.MISTAKE
    assert "some/gpt2 is one model and has no checkpoints" in capsys.readouterr().err


def test_the_padding_is_reported_by_eval_and_generate(
    served: Hub, one: dict[str, bytes], dataset_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "padded"
    directory.mkdir()
    weights = load.weights_for(SHAPE, "some/gpt2")
    weights["wte.weight"] = torch.cat([weights["wte.weight"], torch.ones(47, 32)])
    theirs = {name: huggingface._to_theirs(name, each).contiguous() for name, each in weights.items()}
    save_file({**theirs, "wte.weight": weights["wte.weight"]}, directory / WEIGHTS)
    (directory / CONFIG).write_text(json.dumps(json.loads(one[CONFIG]) | {"vocab_size": 50_304}))
    options = ["--data", str(dataset_dir), "--tokens", "64", "--device", "cpu"]
    assert main(["eval", str(directory), "some/gpt2", *options, "--json"]) == exit_codes.DONE
    output = capsys.readouterr()
    assert f"{directory}: vocabulary of 50,304: the 47 rows beyond GPT-2's 50,257 tokens are padding" in output.err
    first, second = json.loads(output.out)["rows"]
    assert first["loss"] == second["loss"]
    assert main(["generate", str(directory), "--tokens", "2", "--device", "cpu"]) == exit_codes.DONE
    assert "vocabulary of 50,304" in capsys.readouterr().err


def environment(url: str, folder: Path) -> dict[str, str]:
    hidden = {name: each for name, each in os.environ.items() if not name.startswith("HF_")}
    of_hub = {"HF_ENDPOINT": url, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1"}
    return {**hidden, **of_hub, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def run(folder: Path, url: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *words], env=environment(url, folder), cwd=folder, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("nowhere", "/nowhere does not exist"),
        ("./some/gpt2", "/some/gpt2 does not exist"),
        ("some/none", "there is no model some/none"),
        ("some/gpt2@v3", "has no revision v3"),
    ],
)
def test_an_unknown_name_is_an_error_before_anything_is_written(
    served: Hub,
    write_config: Callable[..., Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    name: str,
    problem: str,
) -> None:
    config = write_config(tmp_path)
    code = main(["train", str(config), f"model.init_from={name}", "run.name=x", "--num_gpus", "2"])
    error = capfd.readouterr().err
    assert code == exit_codes.MISTAKE
    assert error.startswith("error: ") and problem in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists() and not (tmp_path / "checkpoints").exists()


@pytest.mark.ranks
def test_a_run_downloads_once_and_resumes_without_the_network(
    served: Hub, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    run_settings = {"name": "test", "dir": str(tmp_path / "runs"), "device": "cpu"}
    config = write_config(tmp_path, run=run_settings, samples={"every": 0}, validation={"every": 0})
    settings = ["model.init_from=some/gpt2", "schedule.steps=2", "schedule.warmup_steps=0", "checkpoint.every=1"]
    first = run(tmp_path, served.url, "train", str(config), *settings, "--num_gpus", "2")
    assert first.returncode == exit_codes.DONE, first.stdout + first.stderr
    assert served.requests == {CONFIG: 1, WEIGHTS: 1}
    assert first.stderr.count("downloading some/gpt2") == 1
    assert "initial weights from some/gpt2" in (tmp_path / "runs" / "test" / "train.log").read_text()
    assert "init_from: some/gpt2\n" in (tmp_path / "runs" / "test" / "config.yaml").read_text()

    served.__exit__()
    words = ("resume", str(tmp_path / "runs" / "test"), "--num_gpus", "1", "schedule.steps=3")
    resumed = run(tmp_path, "http://127.0.0.1:9", *words)
    assert resumed.returncode == exit_codes.DONE, resumed.stdout + resumed.stderr
    assert "resumed from" in (tmp_path / "runs" / "test" / "train.log").read_text()
