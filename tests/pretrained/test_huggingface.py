"""Our models in Hugging Face's layout: transformers computes equal logits; unsupported or damaged files are errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ds_gpt2.common.errors import UserError
from ds_gpt2.data import tokenizer
from ds_gpt2.model.gpt2 import GPT2
from ds_gpt2.model.shape import VOCABULARY, ModelShape
from ds_gpt2.pretrained import huggingface, torch_file
from ds_gpt2.pretrained.load import as_model, check, read, weights_for
from ds_gpt2.pretrained.tokenizer_files import write_tokenizer

transformers = pytest.importorskip("transformers", reason="transformers 5 needs Python 3.10; in the extra dev")

SHAPE = ModelShape(layers=2, heads=4, width=32, sequence_length=96)
TEXT = "The statement's 3 parts:\n\n  if x == 1:\n\treturn 'é' \u2013 naïve 日本 👍  \n\nDon't  they've   I'll"


@pytest.fixture(scope="module")
def model() -> GPT2:
    torch.manual_seed(3)
    model = GPT2(SHAPE)
    with torch.no_grad():  # make biases and norms differ from each other, so that exchanged ones are detected
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def weights_of(model: GPT2) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def directory(model: GPT2, tmp_path_factory: pytest.TempPathFactory) -> Path:
    exported = tmp_path_factory.mktemp("exported")
    config = huggingface.config_of(SHAPE, 0.1, "float32")
    (exported / "config.json").write_text(json.dumps(config), encoding="utf-8")
    huggingface.write_weights(weights_of(model), exported / "model.safetensors", torch.float32)
    write_tokenizer(exported, SHAPE.sequence_length)
    return exported


@pytest.mark.slow
def test_names_and_shapes_equal_those_of_transformers(directory: Path) -> None:
    """Converters such as that of llama.cpp depend on them."""
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config.from_pretrained(directory)).state_dict()
    del theirs["lm_head.weight"]  # tied
    written = load_file(directory / "model.safetensors")
    assert {name: tensor.shape for name, tensor in written.items()} == {
        name: tensor.shape for name, tensor in theirs.items()
    }


def test_transformers_computes_equal_logits(model: GPT2, directory: Path) -> None:
    loaded, unused = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(unused.values())
    assert loaded.config.resid_pdrop == 0.1 and loaded.dtype == torch.float32
    tokens = torch.tensor([tokenizer.gpt2().encode_ordinary(TEXT * 4)[: SHAPE.sequence_length]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model.logits(tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize("files", [["tokenizer.json"], ["vocab.json", "merges.txt"]])
def test_the_written_tokenizer_equals_that_of_gpt2(directory: Path, tmp_path: Path, files: list[str]) -> None:
    for name in [*files, "tokenizer_config.json", "config.json"]:
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(TEXT)["input_ids"] == tokenizer.gpt2().encode_ordinary(TEXT)
    assert theirs.decode(theirs(TEXT)["input_ids"]) == TEXT
    assert theirs("a<|endoftext|>")["input_ids"] == [64, tokenizer.END_OF_TEXT]
    assert (theirs.eos_token_id, theirs.model_max_length) == (tokenizer.END_OF_TEXT, SHAPE.sequence_length)


def test_written_weights_are_read_back_exactly(model: GPT2, directory: Path, tmp_path: Path) -> None:
    torch_file.write(weights_of(model), SHAPE, {"step": 7}, tmp_path / "model.pt")
    for path in (directory, tmp_path / "model.pt"):
        found = read(path)
        assert found.shape == SHAPE
        for name, parameter in as_model(found.shape, found.weights).named_parameters():
            rows = VOCABULARY if name == "wte.weight" else len(parameter)
            assert torch.equal(parameter[:rows], model.get_parameter(name)[:rows]), name
    assert torch.load(tmp_path / "model.pt", weights_only=True)["model"].keys() == dict(model.named_parameters()).keys()


def test_a_model_saved_by_transformers_is_read(model: GPT2, tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = transformers.GPT2Config(n_layer=2, n_head=4, n_embd=32, n_positions=96)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    found = read(tmp_path)
    tokens = torch.randint(0, VOCABULARY, (2, 50))
    with torch.no_grad():
        ours = as_model(found.shape, found.weights).logits(tokens)
        torch.testing.assert_close(ours, theirs(tokens).logits, atol=1e-4, rtol=0)


def test_names_without_prefix_and_masks_are_read(directory: Path, tmp_path: Path) -> None:
    """This is the format of openai-community/gpt2 on the hub."""
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    old = {name.removeprefix("transformer."): each for name, each in load_file(directory / "model.safetensors").items()}
    old |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 96, 96) for layer in range(2)}
    save_file(old, tmp_path / "model.safetensors")
    expected = read(directory).weights
    assert all(torch.equal(each, expected[name]) for name, each in read(tmp_path).weights.items())


def test_a_shorter_context_uses_the_first_positions(directory: Path) -> None:
    weights = weights_for(ModelShape(2, 4, 32, 10), str(directory))
    assert torch.equal(weights["wpe.weight"], read(directory).weights["wpe.weight"][:10])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            ModelShape(3, 4, 32, 96),
            r"has layers 2, heads 4, width 32; this run has layers 3, .*: set model\.layers=2",
        ),
        (ModelShape(2, 2, 32, 96), "this run has layers 2, heads 2, width 32"),
        (ModelShape(2, 4, 64, 96), "this run has layers 2, heads 4, width 64"),
        (ModelShape(2, 4, 32, 97), r"has 96 positions, but batch\.sequence_length is 97: set it to at most 96"),
    ],
)
def test_another_shape_is_an_error(directory: Path, shape: ModelShape, message: str) -> None:
    with pytest.raises(UserError, match=message):
        weights_for(shape, str(directory))
    with pytest.raises(UserError, match=message):
        check(shape, str(directory))


def _changed(**values: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | values))

    return change


def _cut(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _pickled(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    torch.save({"wte.weight": torch.zeros(3)}, directory / "pytorch_model.bin")


def _without_a_tensor(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.bias"]
    save_file(weights, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_changed(vocab_size=50_258), r"wte\.weight is \(50257, 32\), but .* requires \(50258, 32\)"),
        (_changed(n_layer=10**12), "n_layer is 1000000000000; input should be less than or equal to 1000000"),
        (_changed(n_layer=10**6), r"has no h\.2\."),
        (_changed(n_layer=3), r"has no h\.2\."),
        (_changed(n_positions=95), r"wpe\.weight is \(96, 32\), but the model's config requires \(95, 32\)"),
        (_cut, r"model\.safetensors cannot be read"),
        (_pickled, r"has no model\.safetensors .*\(it has pytorch_model\.bin\): save the model again"),
        (_without_a_tensor, r"has no h\.1\.mlp\.c_fc\.bias"),
        (lambda directory: (directory / "config.json").write_text("{"), r"config\.json cannot be read"),
    ],
)
def test_unsupported_or_damaged_files_are_errors_of_one_line(
    directory: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as raised:
        read(tmp_path)
    assert "\n" not in str(raised.value)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("code was run"),)


@pytest.mark.parametrize("content", [{"model": Harmful()}, {"wte.weight": torch.zeros(2)}, b"no file of torch"])
def test_code_in_a_forged_file_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any) -> None:
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        Path("model.pt").write_bytes(content)
    else:
        torch.save(content, "model.pt")
    with pytest.raises(UserError, match=r"model\.pt is not a valid file of `export --format fp32`") as raised:
        read(Path("model.pt"))
    assert "\n" not in str(raised.value)
    assert not Path("code was run").exists()
