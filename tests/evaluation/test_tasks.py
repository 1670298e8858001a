"""Evaluations: answers equal those of a plain loop and of lm-evaluation-harness's definitions, item by item."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.evaluation_rows import Row, rows_of
from ds_gpt2.data import tokenizer
from ds_gpt2.data.evaluation_files import load_items, measures_of
from ds_gpt2.data.items import Item, ItemList
from ds_gpt2.data.prepare.evaluation_sets import PUBLISHED
from ds_gpt2.evaluation import row_batches, scoring, tasks
from ds_gpt2.evaluation.scoring import is_greedy, score, score_batched, score_one
from ds_gpt2.model.gpt2 import GPT2
from ds_gpt2.model.shape import VOCABULARY, ModelShape

pytestmark = pytest.mark.usefixtures("one_thread")

ITEMS = 24


def make_model(dtype: torch.dtype, sequence_length: int = 128, gain: float = 5.0) -> GPT2:
    torch.manual_seed(0)
    model = GPT2(ModelShape(layers=2, heads=2, width=32, sequence_length=sequence_length)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(gain)
    return model.to(dtype)


def items_of(name: str, folder: Path, count: int = ITEMS) -> ItemList:
    path = folder / f"{name}.jsonl"
    lines = (json.dumps(PUBLISHED[name].convert(row)) + "\n" for row in rows_of(name, count))
    path.write_text("".join(lines), encoding="utf-8")
    return load_items(path, name)


def requests(name: str, row: Row) -> tuple[list[tuple[str, str]], int, list[int]]:
    """Return contexts and continuations, the correct one, and the lengths for acc_norm: the harness's definitions."""
    if name.startswith("arc") or name == "openbookqa":
        texts = row["choices"]["text"]
        context = row["question_stem"] if name == "openbookqa" else "Question: " + row["question"] + "\nAnswer:"
        correct = row["choices"]["label"].index(row["answerKey"])
    elif name == "piqa":
        context, texts, correct = f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], row["label"]
    elif name == "boolq":
        context, texts = row["passage"] + "\nQuestion: " + row["question"] + "?\nAnswer:", ["no", "yes"]
        correct = row["label"]
    elif name == "copa":
        context = row["premise"].strip().rstrip(".") + (" because" if row["question"] == "cause" else " therefore")
        texts = [" " + row[key][:1].lower() + row[key][1:] for key in ("choice1", "choice2")]
        correct = row["label"]
    elif name == "sciq":
        context = row["support"].lstrip() + "\nQuestion: " + row["question"] + "\nAnswer:"
        texts = [row[f"distractor{number}"] for number in (1, 2, 3)] + [row["correct_answer"]]
        correct = 3
    elif name == "winogrande":
        before, after = row["sentence"].split("_")
        pairs = [(before + row[option], " " + after.strip()) for option in ("option1", "option2")]
        return pairs, int(row["answer"]) - 1, [1, 1]
    else:
        context, _, word = row["text"].rpartition(" ")
        return [(context, " " + word)], 0, [len(word)]
    return [(context, " " + text) for text in texts], correct, [len(text) for text in texts]


@torch.no_grad()
def log_likelihood(model: GPT2, context: str, continuation: str) -> tuple[float, bool]:
    """Return the log-likelihood of a continuation, and whether greedy decoding generates it: one forward pass."""
    encode = tokenizer.gpt2().encode_ordinary
    kept = context.rstrip()
    continuation = context[len(kept) :] + continuation
    start = encode(kept) if kept else [tokenizer.END_OF_TEXT]
    rest = encode(kept + continuation)[len(encode(kept)) :]
    logits = model.logits(torch.tensor([start + rest])[:, :-1])[0, -len(rest) :].float()
    chosen = logits.log_softmax(1)[torch.arange(len(rest)), torch.tensor(rest)]
    return float(chosen.double().sum()), logits.argmax(1).tolist() == rest


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_item_is_answered_as_the_harness_defines_it(name: str, tmp_path: Path) -> None:
    model = make_model(torch.float32)
    table = tasks.results(model, items_of(name, tmp_path), measures_of(name), lambda done: None)
    expected: dict[str, list[float]] = {measure: [] for measure in measures_of(name)}
    for row in rows_of(name, ITEMS):
        pairs, correct, lengths = requests(name, row)
        found = [log_likelihood(model, *pair) for pair in pairs]
        sums = np.array([each for each, _ in found])
        if name == "lambada":
            expected["acc"].append(float(found[0][1]))
            expected["perplexity"].append(sums[0])
            continue
        expected["acc"].append(float(sums.argmax() == correct))
        if "acc_norm" in expected:
            expected["acc_norm"].append(float((sums / lengths).argmax() == correct))
    for measure, values in zip(expected, table, strict=True):
        np.testing.assert_allclose(values, expected[measure], atol=1e-3)
    assert name == "lambada" or 0 < table[0].sum() < ITEMS


def plain(model: GPT2, items: ItemList, measures: tuple[str, ...]) -> Any:
    """Return the results of the loop over single items."""
    table = np.zeros((len(measures), len(items)))
    for number, item in enumerate(items):
        sums = score_one(model, item)
        values = {"acc": sums.argmax() == item.label, "perplexity": sums[0]}
        values["acc_norm"] = (sums / item.characters).argmax() == item.label
        if len(sums) == 1:
            values["acc"] = is_greedy(model, item)
        table[:, number] = [values[measure] for measure in measures]
    return table


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_bf16_answers_equal_those_of_the_plain_loop(name: str, tmp_path: Path) -> None:
    model, items = make_model(torch.bfloat16), items_of(name, tmp_path, 40)
    measures = measures_of(name)
    table, expected = tasks.results(model, items, measures, lambda done: None), plain(model, items, measures)
    assert (table[0] == expected[0]).all()
    if name == "lambada":
        np.testing.assert_allclose(table[1], expected[1], rtol=0, atol=0.5)
    elif "acc_norm" in measures:
        assert (table[1] == expected[1]).all()


def words(model: GPT2, count: int) -> list[Item]:
    """Return items whose ending is what the model generates; in every other one the last token is another."""
    rng, found = np.random.default_rng(0), []
    ones = np.ones(1, np.int32)
    with torch.no_grad():
        for number in range(count):
            tokens = rng.integers(0, VOCABULARY - 1, 6).tolist()
            for _ in range(2):
                tokens.append(int(model.logits(torch.tensor([tokens]))[0, -1].float().argmax()))
            if number % 2:
                tokens[-1] = (tokens[-1] + 1) % 1000
            context, ending = np.array(tokens[:6], np.uint16), np.array(tokens[6:], np.uint16)
            found.append(Item(context, [ending], 0, ones, ones))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_word_is_right_if_greedy_decoding_generates_it(dtype: torch.dtype) -> None:
    model = make_model(dtype, gain=1.0)
    items = words(model, 40)
    scores = score(model, items)
    assert scores.greedy.tolist() == [is_greedy(model, item) for item in items]
    assert 15 <= scores.greedy.sum() <= 20
    batched = score_batched(model, items)
    uncertain = batched.uncertain
    assert ((batched.greedy == scores.greedy) | uncertain).all()
    assert uncertain.any() if dtype is torch.bfloat16 else not uncertain.any()


def test_an_uncertain_word_is_decided_by_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(torch.float32, gain=1.0)
    items = words(model, 10)
    batched = score_batched(model, items)
    uncertain = np.arange(10) < 6
    wrong = replace(batched, greedy=batched.greedy ^ uncertain, uncertain=uncertain)
    monkeypatch.setattr(scoring, "score_batched", lambda *_: wrong)
    assert score(model, items).greedy.tolist() == [is_greedy(model, item) for item in items]


def test_items_with_different_numbers_of_endings_share_a_batch(tmp_path: Path) -> None:
    model, items = make_model(torch.float32), items_of("arc_easy", tmp_path)
    counts = [len(item.endings) for item in items]
    assert set(counts) == {3, 4, 5}
    scores = score(model, items)
    for number, item in enumerate(items):
        np.testing.assert_allclose(scores.sums[number, : counts[number]], score_one(model, item), atol=1e-4)
        assert (scores.sums[number, counts[number] :] == -np.inf).all()


def test_a_row_that_is_too_long_is_computed_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, items = make_model(torch.float32), items_of("arc_easy", tmp_path)
    whole = score_batched(model, items)
    monkeypatch.setattr(scoring, "longest_row", lambda sequence_length: 20)
    monkeypatch.setattr(scoring, "REFERENCE_TOKENS", 10)
    assert max(map(row_batches.row_length, items)) > 25
    np.testing.assert_allclose(score_batched(model, items).sums, whole.sums, atol=1e-4)
    plain_sums = [score_one(model, item) for item in items]  # the reference in parts
    for number, sums in enumerate(plain_sums):
        np.testing.assert_allclose(sums, whole.sums[number, : len(sums)], atol=1e-4)


@torch.no_grad()
def cut_log_likelihood(model: GPT2, context: list[int], continuation: list[int]) -> float:
    """Return the log-likelihood with the input cut as the harness cuts it: its last tokens remain."""
    tokens = [*context, *continuation][-(model.shape.sequence_length + 1) :]
    logits = model.logits(torch.tensor([tokens[:-1]]))[0, -len(continuation) :].float()
    return float(logits.log_softmax(1)[torch.arange(len(continuation)), torch.tensor(continuation)].sum())


@pytest.mark.parametrize("name", ["winogrande", "boolq", "arc_easy", "mine"])
def test_items_longer_than_the_model_are_cut_as_by_the_harness(name: str, tmp_path: Path) -> None:
    if name == "mine":  # the contexts differ early, so that the part after the difference is longer than the model
        path = tmp_path / "mine.jsonl"
        after = " was the one who" + " had waited" * 20
        path.write_text(json.dumps({"contexts": ["Ann" + after, "Bea" + after], "ending": "so long.", "label": 1}))
        items = load_items(path, "mine")
    else:
        items = items_of(name, tmp_path)
    model = make_model(torch.float32, sequence_length=12)
    chosen = [item for item in items if max(map(len, scored_parts(item))) <= 12]
    assert any(row_batches.truncate(item, 12) is not item for item in chosen)
    scores = score(model, chosen)
    for number, item in enumerate(chosen):
        rows = [[*item.context.tolist(), *ending.tolist()] for ending in item.endings]
        parts = scored_parts(item)
        expected = [cut_log_likelihood(model, row[: -len(part)], part) for row, part in zip(rows, parts, strict=True)]
        np.testing.assert_allclose(scores.sums[number, : len(rows)], expected, atol=1e-4)
        np.testing.assert_allclose(score_one(model, item), expected, atol=1e-4)
        assert max(expected) < -1


def scored_parts(item: Item) -> list[list[int]]:
    return [ending[item.first_scored(number) :].tolist() for number, ending in enumerate(item.endings)]


def test_the_number_of_cut_items_is_described(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    texts = [(3, 1), (9, 1), (1, 9)]  # words of context and ending
    items = [
        {"context": "a" + " a" * (context - 1), "endings": ["b" * 2, "b" + " b" * (ending - 1)]}
        for context, ending in texts
    ]
    path.write_text("".join(json.dumps({**item, "label": 0}) + "\n" for item in items))
    loaded = load_items(path, "mine")
    assert row_batches.describe_truncation(loaded, 12) is None
    expected = "2 items longer than 8 tokens, cut at the start, and 1 of them also at the end of an ending"
    assert row_batches.describe_truncation(loaded, 8) == expected


def test_estimates_have_the_standard_errors_of_their_definitions() -> None:
    right, logs = np.array([1.0, 0, 0, 1, 1]), np.array([-1.0, -2, -3, -4, -5])
    found = tasks.estimates(np.stack([right, logs]), ("acc", "perplexity"))
    assert (found["acc"].value, found["acc"].stderr) == (0.6, pytest.approx(math.sqrt(0.6 * 0.4 / 5)))
    assert found["perplexity"].value == pytest.approx(math.exp(3))
    assert found["perplexity"].stderr == pytest.approx(math.exp(3) * logs.std(ddof=1) / math.sqrt(5))


def test_batches_of_all_ranks_are_those_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(row_batches._BATCH_TOKENS, "cpu", 100)
    batches = scoring.batches_of(make_model(torch.float32), items_of("arc_easy", tmp_path))
    shares = [tasks.batches_of_rank(batches, rank, 3) for rank in range(3)]
    together = [batch.tolist() for share in shares for batch in share]
    assert sorted(together) == sorted(batch.tolist() for batch in batches) and len(batches) > 5
