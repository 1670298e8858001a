import html
import logging
import re
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import markdown
import pytest
import torch

from ds_gpt2.config.settings import SamplesSettings
from ds_gpt2.data.tokenizer import END_OF_TEXT, gpt2
from ds_gpt2.engine.rng_state import get_rng_state, seed_everything
from ds_gpt2.engine.train_state import TrainState
from ds_gpt2.model.gpt2 import GPT2
from ds_gpt2.model.shape import ModelShape
from ds_gpt2.training.hooks import HookFailedError, Samples
from ds_gpt2.training.hooks.samples import _code_block

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = ModelShape(layers=1, heads=2, width=16, sequence_length=32)
SETTINGS = SamplesSettings(prompts=("Hello", "The statement"), per_prompt=2, tokens=8, temperature=1.0, top_k=50)
STATE = TrainState(step=250, tokens=1_048_576, val_loss=3.25, val_step=240)


@pytest.fixture
def engine() -> Any:
    """The attributes of an engine that the hook uses, with a real model."""
    torch.manual_seed(0)
    model = GPT2(SHAPE, dropout=0.5).train()
    return SimpleNamespace(model=model, device=torch.device("cpu"))


def _samples(directory: Path, settings: SamplesSettings = SETTINGS, seed: int = 1337) -> Samples:
    return Samples(settings, seed, directory, SHAPE.sequence_length)


def _with(**changes: Any) -> SamplesSettings:
    return SETTINGS.model_copy(update=changes)


def _blocks(text: str) -> list[str]:
    """Return the contents of the code blocks that a Markdown parser finds."""
    page = markdown.markdown(text, extensions=["fenced_code"])
    return [html.unescape(block) for block in re.findall(r"<pre><code[^>]*>(.*?)\n</code></pre>", page, re.DOTALL)]


def test_each_prompt_is_one_text_with_its_continuations(engine: Any, tmp_path: Path) -> None:
    seen = _samples(tmp_path).observe(engine, STATE)
    assert list(seen) == ["samples/0", "samples/1"]
    for prompt, text in zip(SETTINGS.prompts, seen.values(), strict=True):
        parts = re.fullmatch(re.escape(prompt) + r"\n\n\[1\] (.+)\n\n\[2\] (.+)", str(text), flags=re.DOTALL)
        assert parts is not None
        assert parts[1] != parts[2]


def test_each_prompt_has_its_own_random_generator(engine: Any, tmp_path: Path) -> None:
    two = _samples(tmp_path).observe(engine, STATE)
    assert _samples(tmp_path).observe(engine, STATE) == two
    three = _samples(tmp_path, _with(prompts=(*SETTINGS.prompts, "Hello"))).observe(engine, STATE)
    assert {**three, **two} == three
    assert three["samples/2"] != three["samples/0"]
    assert _samples(tmp_path, seed=1).observe(engine, STATE)["samples/0"] != two["samples/0"]


def test_the_file_contains_settings_step_and_samples(engine: Any, tmp_path: Path) -> None:
    directory = tmp_path / "samples"
    seen = _samples(directory).observe(engine, STATE)
    text = (directory / "step_000250.md").read_text(encoding="utf-8")
    assert text.startswith("# Step 250\n\n1,048,576 tokens seen, validation loss 3.2500 at step 240.\n\n")
    blocks = _blocks(text)
    assert len(blocks) == 6
    for number in (0, 1):
        prompt, first, second = blocks[3 * number : 3 * number + 3]
        assert seen[f"samples/{number}"] == f"{prompt}\n\n[1] {first}\n\n[2] {second}"
    assert {path.name for path in directory.iterdir()} == {"step_000250.md", "latest.md"}


def test_latest_is_updated_and_a_repeated_step_is_replaced(engine: Any, tmp_path: Path) -> None:
    hook = _samples(tmp_path)
    hook.observe(engine, TrainState(step=10))
    hook.observe(engine, TrainState(step=20))
    first, second = (tmp_path / f"step_0000{step}.md" for step in (10, 20))
    assert "0 tokens seen.\n" in first.read_text(encoding="utf-8")
    assert (tmp_path / "latest.md").read_bytes() == second.read_bytes() != first.read_bytes()
    hook.observe(engine, TrainState(step=10, tokens=5))
    assert "5 tokens seen.\n" in first.read_text(encoding="utf-8")
    assert (tmp_path / "latest.md").read_bytes() == first.read_bytes()


@pytest.mark.parametrize(
    "content",
    ["", "plain", "```", "a\n```\n# b\n", "~~~\n````text\nx\n````", "`" * 9, "<b>&amp;</b>\n    indented\n* no list"],
)
def test_no_text_escapes_its_code_block(content: str) -> None:
    page = f"before\n\n{_code_block(content)}\n\nafter\n"
    assert _blocks(page) == [content]
    assert markdown.markdown(page, extensions=["fenced_code"]).endswith("<p>after</p>")


def test_a_prompt_of_backticks_stays_in_its_code_block(engine: Any, tmp_path: Path) -> None:
    _samples(tmp_path, _with(prompts=("```python\nx = 1\n```\n# no title",))).observe(engine, STATE)
    blocks = _blocks((tmp_path / "latest.md").read_text(encoding="utf-8"))
    assert blocks[0] == "```python\nx = 1\n```\n# no title"
    assert len(blocks) == 3


def test_the_log_shows_the_start_of_each_first_continuation(
    engine: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ds_gpt2")
    seen = _samples(tmp_path, _with(tokens=30)).observe(engine, STATE)
    first = [str(text).split("[1] ")[1].split("\n\n[2] ")[0] for text in seen.values()]
    assert all(len(text) > 100 for text in first)
    assert caplog.messages == [f"step 250: sample {number}: {text[:97] + '...'!r}" for number, text in enumerate(first)]


def test_sampling_restores_random_state_and_mode(engine: Any, tmp_path: Path) -> None:
    seed_everything(1)
    before = get_rng_state()
    for training in (True, False):
        engine.model.train(training)
        first = _samples(tmp_path).observe(engine, STATE)
        assert engine.model.training is training
        assert _samples(tmp_path).observe(engine, STATE) == first  # in eval mode there is no dropout
    after = get_rng_state()
    assert after["python"] == before["python"]
    assert torch.equal(after["torch"], before["torch"])
    assert torch.equal(after["numpy"][1], before["numpy"][1])
    assert after["numpy"][2:] == before["numpy"][2:]


def test_other_ranks_do_not_sample(engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert _samples(tmp_path).observe(engine, STATE) == {}
    assert list(tmp_path.iterdir()) == []


def test_no_prompts_write_no_file(engine: Any, tmp_path: Path) -> None:
    assert _samples(tmp_path, _with(prompts=())).observe(engine, STATE) == {}
    assert list(tmp_path.iterdir()) == []


def test_an_uncreatable_directory_is_reported_in_one_line(
    engine: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    directory = tmp_path / "file" / "samples"
    assert list(_samples(directory).observe(engine, STATE)) == ["samples/0", "samples/1"]
    assert caplog.messages == [f"step 250: samples are not written to {directory}: Not a directory"]


def test_a_full_disk_is_reported_in_one_line_and_keeps_existing_files(
    engine: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A limit on the file size simulates a full disk."""
    hook = _samples(tmp_path)
    hook.observe(engine, STATE)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limit[1]))
    try:
        assert hook.observe(engine, TrainState(step=250, tokens=5)) != {}
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert caplog.messages == [f"step 250: samples are not written to {tmp_path}: File too large"]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_prompt_longer_than_the_context_is_reported_once(
    engine: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = " ".join(str(number) for number in range(40))
    length = len(gpt2().encode_ordinary(prompt))
    assert length > 32
    hook = _samples(tmp_path, _with(prompts=("short", prompt)))
    warning = f"prompt 1 has {length} tokens, the model's context 32: only the last ones are used"
    assert caplog.messages == [f"samples.prompts: {warning}"]
    text = str(hook.observe(engine, STATE)["samples/1"])
    assert len(caplog.messages) == 1
    assert text.startswith(" 8 9 10 ")  # 32 tokens from here on
    assert " 37 38 39\n\n[1]" in text


def test_an_empty_prompt_is_shown_as_the_start_of_a_document(engine: Any, tmp_path: Path) -> None:
    seen = _samples(tmp_path, _with(prompts=("",))).observe(engine, STATE)
    assert str(seen["samples/0"]).startswith("<|endoftext|>\n\n[1] ")


def test_a_model_may_end_the_text_immediately(engine: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        engine.model.wte.weight.zero_()
        engine.model.wte.weight[END_OF_TEXT] = 50.0
        engine.model.ln_f.bias.fill_(1.0)
    assert _samples(tmp_path).observe(engine, STATE)["samples/0"] == "Hello\n\n[1] <|endoftext|>\n\n[2] <|endoftext|>"


def test_a_broken_model_is_reported(engine: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        engine.model.ln_f.weight.fill_(float("nan"))
    with pytest.raises(HookFailedError, match=r"^rank 0: the model's scores are not finite$"):
        _samples(tmp_path).observe(engine, STATE)
    assert engine.model.training


def test_out_of_memory_is_reported(engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 MiB.")

    monkeypatch.setattr(engine.model, "hidden", fail)
    with pytest.raises(HookFailedError, match=r"^rank 0: CUDA out of memory\. Tried to allocate 20 MiB\.$"):
        _samples(tmp_path).observe(engine, STATE)
    assert engine.model.training
