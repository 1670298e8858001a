"""HellaSwag: batched scoring gives the answers of the reference, for any batches and any number of ranks; the hook."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
from dataclasses import replace
from pathlib import Path
from pydoc_data import topics
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ds_gpt2.common.host import free_port
from ds_gpt2.config.settings import PROJECT_DIR, HellaswagSettings
from ds_gpt2.data.hellaswag import Question, load_items, to_item
from ds_gpt2.data.items import Item
from ds_gpt2.engine.rng_state import get_rng_state
from ds_gpt2.engine.train_state import TrainState
from ds_gpt2.evaluation import scoring
from ds_gpt2.evaluation.row_batches import batches_of_lengths, row_length, truncate
from ds_gpt2.evaluation.scoring import (
    CLOSE,
    MEASURES,
    score,
    score_batched,
    score_one,
)
from ds_gpt2.model.gpt2 import GPT2
from ds_gpt2.model.shape import ModelShape
from ds_gpt2.training.hooks.hellaswag import HellaSwag, items_of_rank, open_hellaswag
from ds_gpt2.training.hooks.hook import HookFailedError

pytestmark = pytest.mark.usefixtures("one_thread")
PUBLISHED = PROJECT_DIR.parent / "shared" / "data" / "hellaswag_val.jsonl"


def lines(count: int) -> list[dict[str, Any]]:
    """Return items made of Python's manual: contexts of 1 to 8 words, endings of 1 to 5, some endings equal."""
    words = [word for word in " ".join(topics.topics.values()).split() if "[" not in word]
    rng = random.Random(7)

    def text(most: int) -> str:
        start = rng.randrange(len(words) - most)
        return " ".join(words[start : start + rng.randint(1, most)])

    found = []
    for number in range(count):
        endings = [text(5) for _ in range(4)]
        if number % 20 == 0:
            endings[3] = endings[1]
        context = text(8)
        found.append(
            {"activity_label": "Reading", "ctx": context, "ctx_a": context, "ctx_b": "", "endings": endings, "label": 0}
            | {"label": rng.randrange(4)}
        )
    return found


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> list[Item]:
    """Return 200 generated items, and the first 15 published ones if that file is present."""
    folder = tmp_path_factory.mktemp("items")
    (folder / "ours.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines(200)), encoding="utf-8")
    ours = load_items(folder / "ours.jsonl", "original", folder)
    return ours + (load_items(PUBLISHED, "original", folder)[:15] if PUBLISHED.exists() else [])


def make_model(dtype: torch.dtype, sequence_length: int = 256) -> GPT2:
    """Return a model whose weights are five times the initial ones, so that its logits differ clearly."""
    torch.manual_seed(0)
    model = GPT2(ModelShape(layers=2, heads=2, width=32, sequence_length=sequence_length)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5.0)
    return model.to(dtype)


def plain_sums(model: GPT2, items: list[Item]) -> Any:
    return np.stack([score_one(model, item) for item in items])


@pytest.fixture(scope="module")
def plain_fp32(items: list[Item]) -> Any:
    return plain_sums(make_model(torch.float32), items)


@pytest.fixture(scope="module")
def plain_bf16(items: list[Item]) -> Any:
    return plain_sums(make_model(torch.bfloat16), items)


def answers(sums: Any, items: list[Item]) -> Any:
    """Return the answers by each measure, implemented independently."""
    tokens = np.array([[len(ending) for ending in item.endings] for item in items])
    in_bytes, characters = np.array([item.bytes for item in items]), np.array([item.characters for item in items])
    return np.stack([(sums / length).argmax(1) for length in (1, tokens, in_bytes, characters)])


def test_score_one_equals_the_definition() -> None:
    model = make_model(torch.float32)
    question = Question("", "The statement is", "", "", ["executed.", "a name", "not an expression.", "x"], 2)
    item = to_item(question, "original")
    expected = []
    for ending in item.endings:
        tokens = torch.tensor([[*item.context, *ending]], dtype=torch.int64)
        log_probabilities = model.logits(tokens)[0].detach().log_softmax(-1)
        positions = range(len(item.context), tokens.shape[1])
        expected.append(sum(float(log_probabilities[at - 1, tokens[0, at]]) for at in positions))
    np.testing.assert_allclose(score_one(model, item), expected, atol=1e-4)


@pytest.mark.slow
def test_batched_sums_equal_those_of_the_reference(items: list[Item], plain_fp32: Any) -> None:
    assert len(items) >= 200
    fast = score_batched(make_model(torch.float32), items)
    np.testing.assert_allclose(fast.sums, plain_fp32, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_every_bf16_answer_equals_that_of_the_reference(items: list[Item], plain_bf16: Any) -> None:
    model = make_model(torch.bfloat16)
    fast, scores = score_batched(model, items), score(model, items)
    close = fast.close()
    assert np.abs(fast.sums - plain_bf16).max() > 0
    assert (np.abs(fast.sums - plain_bf16) <= CLOSE * fast.rounding).all()
    assert 0 < close.mean() < 0.3
    assert (scores.sums[close] == plain_bf16[close]).all()
    assert (scores.sums[~close] == fast.sums[~close]).all()
    assert (scores.answers() == answers(plain_bf16, items)).all()


@pytest.mark.slow
def test_answers_stay_correct_at_the_largest_rounding_error(
    items: list[Item], plain_bf16: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(torch.bfloat16)
    fast = score_batched(model, items)
    signs = np.random.default_rng(0).choice([-1, 1], fast.sums.shape)
    perturbed = replace(fast, sums=plain_bf16 + signs * fast.rounding * 0.7 * CLOSE)
    assert (perturbed.answers() != answers(plain_bf16, items)).any()
    monkeypatch.setattr(scoring, "score_batched", lambda *_: perturbed)
    assert (score(model, items).answers() == answers(plain_bf16, items)).all()


def test_in_fp32_only_equal_endings_are_scored_again(
    items: list[Item], plain_fp32: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, scored_again = make_model(torch.float32), []

    def spy(model: GPT2, item: Item) -> Any:
        scored_again.append(item)
        return score_one(model, item)

    monkeypatch.setattr(scoring, "score_one", spy)
    assert (score(model, items).answers() == answers(plain_fp32, items)).all()
    assert len(scored_again) > 0
    assert all(item.endings[1].tolist() == item.endings[3].tolist() for item in scored_again)


@pytest.mark.slow
def test_the_order_of_items_does_not_change_answers(items: list[Item]) -> None:
    model, items = make_model(torch.bfloat16), items[::2]
    order = np.random.default_rng(0).permutation(len(items))
    shuffled = score(model, [items[number] for number in order])
    assert (shuffled.answers() == score(model, items).answers()[:, order]).all()
    assert shuffled.labels.tolist() == [items[number].label for number in order]


@pytest.mark.slow
def test_counts_summed_over_ranks_equal_those_of_one_rank(items: list[Item]) -> None:
    model, items = make_model(torch.bfloat16), items[::2]
    shares = [items_of_rank(items, rank, 3) for rank in range(3)]
    assert sum(map(len, shares)) == len({id(item) for mine in shares for item in mine}) == len(items)
    sizes = [sum(row_length(item) for item in mine) for mine in shares]
    assert max(sizes) < 1.1 * min(sizes)
    counts = np.sum([score(model, mine).correct() for mine in shares], axis=0)
    assert counts.tolist() == score(model, items).correct().tolist()


def test_long_items_are_cut_at_the_start(items: list[Item]) -> None:
    model, items = make_model(torch.float32, sequence_length=7), items[::4]
    for item in items:
        cut = truncate(item, 7)
        for number, ending in enumerate(item.endings):
            row = [*cut.context, *cut.endings[number]]
            scored = row[len(cut.context) + cut.first_scored(number) :]
            assert scored == ending[:7].tolist()
            whole = [*item.context, *ending[:7]]
            assert row == (whole[-8:] if len(whole) > 8 else whole)
    assert any(max(map(len, item.endings)) > 7 for item in items)
    np.testing.assert_allclose(score_batched(model, items).sums, plain_sums(model, items), rtol=0, atol=1e-4)


def test_batches_hold_each_item_once_with_similar_lengths_within_the_limit(items: list[Item]) -> None:
    of_items = np.array(list(map(row_length, items)))
    batches = batches_of_lengths(of_items, 200)
    assert sorted(np.concatenate(batches)) == list(range(len(items)))
    lengths = [[row_length(items[number]) for number in batch] for batch in batches]
    assert all(len(rows) * max(rows) <= 200 and min(rows) >= 0.9 * max(rows) for rows in lengths)
    assert max(map(len, lengths)) > 3
    assert len(batches_of_lengths(of_items, 1)) == len(items)  # a row above the limit forms a batch alone


def write(folder: Path, count: int = 30) -> HellaswagSettings:
    path = folder / "items.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines(count)), encoding="utf-8")
    return HellaswagSettings(every=10, path=path)


def observe(hook: HellaSwag, model: GPT2) -> dict[str, Any]:
    engine: Any = SimpleNamespace(model=model, device=torch.device("cpu"))  # the attributes that the hook uses
    return hook.observe(engine, TrainState(step=10))


def test_the_hook_reports_the_share_of_correct_answers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings, model = write(tmp_path), make_model(torch.bfloat16).train()
    hook = open_hellaswag(settings, make_model(torch.bfloat16), tmp_path / "cache")
    assert hook is not None and hook.every.due(20, 25) and not hook.every.due(21, 25)
    before = get_rng_state()
    with caplog.at_level(logging.INFO, "ds_gpt2"):
        seen = observe(hook, model)
    assert repr(get_rng_state()) == repr(before)
    assert model.training
    scores = score(model.eval(), load_items(settings.path, "original", tmp_path / "cache"))
    assert list(seen) == [f"hellaswag/{measure}{end}" for measure in MEASURES for end in ("", "_stderr")]
    for measure, count in zip(MEASURES, scores.correct().tolist(), strict=True):
        share = count / 30
        assert seen[f"hellaswag/{measure}"] == share
        assert seen[f"hellaswag/{measure}_stderr"] == pytest.approx(math.sqrt(share * (1 - share) / 30))
    (line,) = caplog.messages
    assert line.startswith(f"step 10: HellaSwag acc {seen['hellaswag/acc']:.4f}, acc_norm ")


def test_the_hook_scores_the_configured_number_of_items(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = write(tmp_path).model_copy(update={"items": 7})
    hook = open_hellaswag(settings, make_model(torch.bfloat16), tmp_path / "cache")
    assert hook is not None
    with caplog.at_level(logging.INFO, "ds_gpt2"):
        accuracy = observe(hook, make_model(torch.bfloat16))["hellaswag/acc"]
    assert "(7 items, " in caplog.text
    assert round(accuracy * 7, 9).is_integer()


@pytest.mark.parametrize("content", ["{}\n", ""])
def test_a_file_without_items_disables_the_hook_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    settings = write(tmp_path)
    settings.path.write_text(content)
    assert open_hellaswag(settings, make_model(torch.bfloat16), tmp_path / "cache") is None
    (line,) = caplog.messages
    assert line.startswith(f"training continues without HellaSwag: {settings.path}")


def test_a_missing_file_is_downloaded_and_a_failed_download_does_not_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = write(tmp_path)
    content = settings.path.read_bytes()
    elsewhere = tmp_path / "elsewhere.jsonl"
    settings.path.rename(elsewhere)
    monkeypatch.setattr("ds_gpt2.training.hooks.hellaswag.URL", f"http://127.0.0.1:{free_port()}/items.jsonl")
    assert open_hellaswag(settings, make_model(torch.bfloat16), tmp_path / "cache") is None
    (line,) = [message for message in caplog.messages if not message.startswith("fetching")]
    assert line.startswith("training continues without HellaSwag: http://127.0.0.1:")
    assert "`./launch.sh prepare hellaswag --from FILE`" in line
    monkeypatch.setattr("ds_gpt2.training.hooks.hellaswag.URL", elsewhere.as_uri())
    monkeypatch.setattr("ds_gpt2.training.hooks.hellaswag.SHA256", hashlib.sha256(content).hexdigest())
    assert open_hellaswag(settings, make_model(torch.bfloat16), tmp_path / "cache") is not None
    assert settings.path.read_bytes() == content


def test_a_failure_of_a_rank_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(torch.bfloat16).train()
    hook = open_hellaswag(write(tmp_path), model, tmp_path / "cache")
    assert hook is not None

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr("ds_gpt2.training.hooks.hellaswag.score", fail)
    with pytest.raises(HookFailedError, match=r"^rank 0: CUDA out of memory\. Tried to allocate$"):
        observe(hook, model)
    assert model.training
