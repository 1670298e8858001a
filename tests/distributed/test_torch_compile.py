"""torch.compile: when it is used, equality with eager execution, bitwise resume of a compiled run."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launched import PROJECT, launch
from small_run import MODEL, SEQUENCE

from ds_gpt2.checkpoint.catalog import newest_tag
from ds_gpt2.common.errors import UserError
from ds_gpt2.distributed import torch_compile
from ds_gpt2.model.gpt2 import GPT2
from ds_gpt2.model.shape import ModelShape
from ds_gpt2.tools.drill.compare import checkpoint_differences, curve_differences

CPU = torch.device("cpu")


def test_a_cpu_compiles_only_if_the_setting_is_true(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", sys.executable)  # any existing program
    assert [torch_compile.decide(setting, CPU) for setting in ("auto", False, True)] == [False, False, True]


def test_a_missing_compiler_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"run.compile is true, but there is no C\+\+ compiler \(g\+\+, clang\+\+\)"):
        torch_compile.decide(True, CPU)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="no-such-compiler"):
        torch_compile.decide(True, CPU)


@pytest.mark.ranks
@pytest.mark.extended
def test_nothing_imports_the_compiler_before_its_variables_are_set() -> None:
    """PyTorch reads the variables when DeepSpeed imports the compiler; nothing may import it earlier."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from ds_gpt2 import train\n"
        "from ds_gpt2.distributed import device, torch_compile\n"
        "torch_compile.set_up(torch_compile.decide(False, device.choose('cpu')))\n"
        "sys.exit('torch._inductor.config' in sys.modules or 'deepspeed' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, str(PROJECT)], check=True)


@pytest.fixture(scope="module")
def models() -> tuple[GPT2, GPT2]:
    """Return an eager and a compiled model of the same weights."""
    torch.manual_seed(0)
    eager = GPT2(ModelShape(3, 2, 32, 64))
    compiled = GPT2(ModelShape(3, 2, 32, 64))
    compiled.load_state_dict(eager.state_dict())
    compiled.compile_blocks()
    return eager, compiled


@pytest.mark.ranks
@pytest.mark.extended
def test_compiled_loss_and_gradients_equal_eager_ones(models: tuple[GPT2, GPT2]) -> None:
    tokens, targets = torch.randint(50_257, (2, 3, 64), generator=torch.Generator().manual_seed(1))
    torch._dynamo.utils.counters.clear()
    found = []
    for model in models:
        loss = model(tokens, targets)
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
    # One graph for all blocks and one for the loss, not one per layer.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_evaluation_and_sampling_compile_nothing(models: tuple[GPT2, GPT2]) -> None:
    """Each of their many shapes would be compiled separately."""
    torch._dynamo.utils.counters.clear()
    for length in (1, 7, 64):
        tokens = torch.arange(length)[None]
        torch.testing.assert_close(models[1].logits(tokens), models[0].logits(tokens))
        with torch.no_grad():
            assert torch.equal(models[1](tokens, tokens), models[0](tokens, tokens))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


@pytest.mark.ranks
@pytest.mark.extended
def test_a_compiled_run_resumes_bitwise_identically(tmp_path: Path, write_config: Callable[..., Path]) -> None:
    run = {"name": "test", "dir": str(tmp_path / "one" / "runs"), "device": "cpu", "compile": True}
    config = write_config(
        tmp_path / "one",
        model=MODEL,
        run=run,
        schedule={"steps": 4, "warmup_steps": 2},
        checkpoint={"dir": str(tmp_path / "one" / "checkpoints"), "every": 2},
        validation={"every": 2, "tokens": 8 * SEQUENCE},
        samples={"every": 2, "prompts": ["The statement"], "tokens": 4},
    )
    first = launch(2, "--config", str(config))
    assert first.code == 0 and first.left_over == [], first.output
    assert "gloo, compiled" in first.output
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    (tmp_path / "other" / "run.yaml").write_text(config.read_text().replace(f"{tmp_path}/one", f"{tmp_path}/other"))
    again = launch(2, "--config", str(tmp_path / "other" / "run.yaml"), "--resume", "2")
    assert again.code == 0, again.output
    one, other = tmp_path / "one", tmp_path / "other"
    assert curve_differences(one / "runs" / "test", other / "runs" / "test") == []
    roots = [folder / "checkpoints" / "test" for folder in (one, other)]
    assert checkpoint_differences(*(root / str(newest_tag(root)) for root in roots)) == []
