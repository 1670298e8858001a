"""GPT-2 directories that others have made: what is read computes what transformers computes, the rest is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from ds_gpt2.common.errors import UserError
from ds_gpt2.data import tokenizer
from ds_gpt2.model.shape import VOCABULARY, ModelShape
from ds_gpt2.pretrained import torch_file
from ds_gpt2.pretrained.load import as_model, is_pretrained, padding_note, read, shape_at, weights_for
from ds_gpt2.pretrained.tokenizer_files import write_tokenizer

transformers = pytest.importorskip("transformers", reason="transformers 5 needs Python 3.10; of the extra dev")

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = torch.tensor([tokenizer.gpt2().encode_ordinary("The statement's 3 parts are naïve, if x == 1. " * 4)[:48]])
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


def make(directory: Path, vocabulary: int = VOCABULARY, **options: Any) -> Path:
    """Save a small model of transformers' with weights large enough for its options to matter."""
    torch.manual_seed(7)
    config = transformers.GPT2Config(
        n_layer=2, n_head=4, n_embd=32, n_positions=48, vocab_size=vocabulary, initializer_range=0.3, **options
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(directory)
    return directory


def theirs(directory: Path, **options: Any) -> torch.Tensor:
    """The logits (48, vocabulary) that transformers computes."""
    model = transformers.GPT2LMHeadModel.from_pretrained(directory, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        return model(TOKENS).logits[0]


def ours(directory: Path) -> torch.Tensor:
    found = read(directory)
    with torch.no_grad():
        return as_model(found.shape, found.weights).logits(TOKENS)[0]


def change(directory: Path, **values: Any) -> None:
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps({name: each for name, each in (config | values).items() if each != ...}))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture
def copy(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "copy"))


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"activation_function": "gelu_pytorch_tanh"},
        {"activation_function": "gelu_python_tanh"},
        {"activation_function": "gelu_fast"},
        {"activation_function": "gelu_accurate"},
        {"activation_function": ...},
        {"n_inner": 128},
        {"n_inner": None},
        {"reorder_and_upcast_attn": True},
        {"scale_attn_weights": ..., "scale_attn_by_inverse_layer_idx": ..., "tie_word_embeddings": ...},
        {"layer_norm_epsilon": ..., "reorder_and_upcast_attn": ..., "add_cross_attention": ..., "vocab_size": ...},
        {"architectures": ["GPT2Model"]},
        {"architectures": ...},
        {"n_ctx": 1024},
        {"n_layer": ..., "num_hidden_layers": 2},
        {"n_head": ..., "num_attention_heads": 4},
        {"n_embd": ..., "hidden_size": 32},
        {"n_positions": ..., "max_position_embeddings": 48},
        {"resid_pdrop": 0.3, "attn_pdrop": 0.3, "embd_pdrop": 0.3, "summary_type": "mean", "use_cache": False},
        {"bos_token_id": None, "eos_token_id": None},
        {"eos_token_id": [VOCABULARY - 1, 198], "pad_token_id": VOCABULARY - 1},
        {"dtype": "float16"},
        {"unknown_to_all": 3},
    ],
    ids=str,
)
def test_what_is_accepted_gives_the_logits_of_transformers(copy: Path, values: dict[str, Any]) -> None:
    change(copy, **values)
    expected = theirs(copy, attn_implementation="eager")
    assert expected.std() > 1, "else differences would not show"
    torch.testing.assert_close(ours(copy), expected, atol=2e-4, rtol=1e-4)
    assert shape_at(copy) == ModelShape(2, 4, 32, 48)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"scale_attn_weights": False}, r"scale_attn_weights is false; this model computes only true"),
        ({"scale_attn_by_inverse_layer_idx": True}, r"scale_attn_by_inverse_layer_idx is true; .* only false"),
        ({"activation_function": "gelu"}, r'activation_function is "gelu"; this model computes only "gelu_new" or'),
        ({"activation_function": "relu"}, r'activation_function is "relu"'),
        ({"layer_norm_epsilon": 1e-6}, r"layer_norm_epsilon is 1e-06; this model computes only 1e-05"),
        ({"layer_norm_epsilon": "1e-5"}, r"layer_norm_epsilon is \"1e-5\""),
        ({"n_inner": 64}, r"n_inner is 64; this model's is always 4 x n_embd = 128"),
        ({"n_inner": 0}, r"n_inner is 0"),
        ({"tie_word_embeddings": False}, r"tie_word_embeddings is false"),
        ({"add_cross_attention": True}, r"add_cross_attention is true"),
        ({"is_encoder_decoder": True}, r"is_encoder_decoder is true"),
        ({"is_causal": False}, r"is_causal is false"),
        ({"scale_attn_weights": None}, r"scale_attn_weights is null"),
        ({"scale_attn_weights": 1}, r"scale_attn_weights is 1"),
        ({"eos_token_id": 2}, r"eos_token_id is 2; GPT-2's <\|endoftext\|> is 50256"),
        ({"n_embd": "wide"}, r'n_embd is "wide"; input should be a valid integer'),
        ({"model_type": "llama"}, r'model_type is "llama"; this model computes only "gpt2"'),
        ({"model_type": ...}, r"model_type is missing"),
        ({"architectures": ["GPT2ForSequenceClassification"]}, r"architectures is \[\"GPT2ForSeq.*GPT2LMHeadModel"),
        ({"architectures": "GPT2LMHeadModel"}, r"architectures is \"GPT2LMHeadModel\"; it must be a list"),
        ({"pad_token_id": -1}, r"pad_token_id is -1; it is not the number of a token"),
        ({"sep_token_id": "x"}, r"sep_token_id is \"x\"; it is not the number of a token"),
        ({"auto_map": {"AutoModel": "modeling.Mine"}}, r"auto_map is \{\"AutoModel\""),
        ({"quantization_config": {"bits": 4}}, r"quantization_config is \{\"bits\": 4\}"),
        ({"pruned_heads": {"0": [1]}}, r"pruned_heads is"),
        ({"n_embd": 32.0}, r"n_embd is 32.0"),
        ({"n_head": 0}, r"n_head is 0"),
        ({"n_head": 3}, r"n_embd 32 is not divisible by n_head 3"),
        ({"n_head": True}, r"n_head is true"),
        ({"n_layer": "2"}, r"n_layer is \"2\""),
        ({"n_layer": 3}, r"has no h\.2\.ln_1\.weight"),
        ({"n_layer": 1}, r"has an unknown h\.1\.attn"),
        ({"n_layer": 10**6}, r"has no h\.2\."),
        ({"n_layer": 10**15}, "n_layer is 1000000000000000; input should be less than or equal to 1000000"),
        ({"num_hidden_layers": 3}, r"n_layer is 2 and num_hidden_layers is 3: they are the same field"),
        ({"n_positions": 47}, r"wpe\.weight is \(48, 32\)"),
        ({"vocab_size": 50_256}, r"vocab_size is 50,256; GPT-2's vocabulary has 50,257"),
        ({"vocab_size": 51_201}, r"vocab_size is 51,201; .* up to 51,200 rows with padding"),
        ({"vocab_size": 10**15}, r"vocab_size is"),
        ({"eos_token_id": 0}, r"eos_token_id is 0; .* is 50256, so this model has another tokenizer"),
        ({"bos_token_id": 1}, r"bos_token_id is 1"),
        ({"pad_token_id": 50_257}, r"pad_token_id is 50257; a token beyond GPT-2's 50,257 is in use"),
    ],
    ids=str,
)
def test_what_computes_something_else_is_refused_by_field_and_value(
    copy: Path, values: dict[str, Any], said: str
) -> None:
    change(copy, **values)
    for look in (read, shape_at):
        with pytest.raises(UserError, match=said) as raised:
            look(copy)
        assert str(copy) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"3", b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b" " * 10_000_001]
)
def test_a_config_that_is_none_is_one_line(copy: Path, content: bytes) -> None:
    (copy / CONFIG).write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json") as raised:
        read(copy)
    assert "\n" not in str(raised.value)


# Weights


def rewrite(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(directory / WEIGHTS)
    edit(weights)
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_float_dtypes_are_read(copy: Path, dtype: torch.dtype) -> None:
    rewrite(copy, lambda weights: weights.update({name: each.to(dtype) for name, each in weights.items()}))
    torch.testing.assert_close(ours(copy), theirs(copy), atol=2e-4, rtol=1e-4)


def test_old_uploads_without_prefix_and_with_masks_are_read(copy: Path) -> None:
    expected = theirs(copy)

    def age(weights: dict[str, torch.Tensor]) -> None:
        for name in list(weights):
            weights[name.removeprefix("transformer.")] = weights.pop(name)
        for layer in range(2):
            weights[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 48, 48, dtype=torch.uint8).tril()
            weights[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)

    rewrite(copy, age)
    torch.testing.assert_close(ours(copy), expected, atol=2e-4, rtol=1e-4)


def test_a_head_that_is_the_embedding_is_read_and_another_refused(copy: Path) -> None:
    expected = theirs(copy)
    rewrite(copy, lambda weights: weights.update({"lm_head.weight": weights["transformer.wte.weight"].clone()}))
    torch.testing.assert_close(ours(copy), expected, atol=2e-4, rtol=1e-4)

    def untie(weights: dict[str, torch.Tensor]) -> None:
        weights["lm_head.weight"][5, 5] += 1e-3

    rewrite(copy, untie)
    with pytest.raises(UserError, match=r"lm_head\.weight differs from the embedding wte\.weight"):
        read(copy)


def _nan(weights: dict[str, torch.Tensor]) -> None:
    weights["transformer.h.1.mlp.c_fc.bias"][3] = float("nan")


def _beyond_fp32(weights: dict[str, torch.Tensor]) -> None:
    weights["transformer.ln_f.bias"] = torch.full((32,), 1e300, dtype=torch.float64)


def _cast(name: str, dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda weights: weights.update({name: weights[name].to(dtype)})


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (_nan, r"h\.1\.mlp\.c_fc\.bias has values that are Inf or NaN"),
        (_beyond_fp32, r"ln_f\.bias has values that are Inf or NaN in fp32"),
        (_cast("transformer.ln_f.bias", torch.int64), r"transformer\.ln_f\.bias is of dtype I64"),
        (_cast("transformer.h.0.attn.c_attn.weight", torch.int8), r"c_attn\.weight is of dtype I8"),
        (_cast("transformer.wte.weight", torch.float8_e4m3fn), r"wte\.weight is of dtype F8_E4M3"),
        (_cast("transformer.ln_f.bias", torch.bool), r"ln_f\.bias is of dtype BOOL"),
        (_cast("transformer.ln_f.bias", torch.complex64), r"ln_f\.bias is of dtype C64"),
        (lambda weights: weights.pop("transformer.h.0.ln_1.bias"), r"has no h\.0\.ln_1\.bias"),
        (lambda weights: weights.update(other=torch.zeros(2)), "has an unknown other"),
        (lambda weights: weights.update({"a\nb": torch.zeros(2)}), r"has an unknown 'a\\nb'"),
        (
            lambda weights: weights.update({"wte.weight": weights["transformer.wte.weight"].clone()}),
            r"has both (transformer\.)?wte\.weight and (transformer\.)?wte\.weight",
        ),
        (
            lambda weights: weights.update({"transformer.ln_f.bias": torch.zeros(1, 32)}),
            r"ln_f\.bias is \(1, 32\); of the model that it is said to be, \(32,\)",
        ),
        (
            lambda weights: weights.update({"transformer.h.0.mlp.c_fc.weight": torch.zeros(128, 32)}),
            r"c_fc\.weight is stored as \(128, 32\); .*, as \(32, 128\): it is transposed$",
        ),
        (lambda weights: weights.update({"lm_head.weight": torch.zeros(3, 32)}), r"lm_head\.weight is \(3, 32\)"),
        (lambda weights: weights.update({"transformer.lm_head.weight": torch.zeros(3)}), "has an unknown transformer"),
    ],
)
def test_weights_that_cannot_be_the_models_are_refused_by_name(
    copy: Path, edit: Callable[[dict[str, torch.Tensor]], object], said: str
) -> None:
    rewrite(copy, edit)
    with pytest.raises(UserError, match=said) as raised:
        read(copy)
    assert str(copy) in str(raised.value) and "\n" not in str(raised.value)


# Several files and their index


@pytest.fixture
def sharded(plain: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "sharded"
    transformers.GPT2LMHeadModel.from_pretrained(plain).save_pretrained(directory, max_shard_size="60KB")
    assert len(list(directory.glob("*.safetensors"))) > 2 and not (directory / WEIGHTS).exists()
    return directory


def test_several_files_are_read(sharded: Path, plain: Path) -> None:
    assert is_pretrained(sharded)
    assert torch.equal(ours(sharded), ours(plain))


def _index(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((directory / INDEX).read_text())
    edit(content["weight_map"])
    (directory / INDEX).write_text(json.dumps(content))


@pytest.mark.parametrize(
    "name",
    [
        "../plain/model.safetensors",
        "/etc/passwd",
        "sub/x.safetensors",
        "..",
        "",
        ".x.safetensors",
        "x.bin",
        3,
        "a\n.safetensors",
    ],
)
def test_an_index_that_names_a_file_elsewhere_is_refused(sharded: Path, name: Any) -> None:
    _index(sharded, lambda listed: listed.update({"transformer.ln_f.bias": name}))
    with pytest.raises(UserError, match=r"for transformer\.ln_f\.bias: only safetensors files beside it") as raised:
        read(sharded)
    assert "\n" not in str(raised.value)


def test_an_index_and_its_files_must_agree(sharded: Path) -> None:
    listed = json.loads((sharded / INDEX).read_text())["weight_map"]
    first, last = sorted(set(listed.values()))[0], sorted(set(listed.values()))[-1]
    (sharded / last).rename(sharded / "away")
    with pytest.raises(UserError, match=f"lists {last}, which is not there"):
        read(sharded)
    weights = load_file(sharded / "away")
    moved = next(name for name, where in listed.items() if where == first)
    save_file({**weights, moved: load_file(sharded / first)[moved]}, sharded / last)
    with pytest.raises(UserError, match=rf"{moved} is in {first} and in {last}"):
        read(sharded)
    save_file({**weights, "more": torch.zeros(1)}, sharded / last)
    with pytest.raises(UserError, match=f"{last} has more, which {INDEX} does not list there"):
        read(sharded)
    gone = next(iter(weights))
    save_file({name: each for name, each in weights.items() if name != gone} | {}, sharded / last)
    with pytest.raises(UserError, match=f"lists {gone} in {last}, which does not have it"):
        read(sharded)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}', "[" * 100_000])
def test_an_index_that_is_none_is_one_line(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content)
    with pytest.raises(UserError, match=r"index\.json") as raised:
        read(sharded)
    assert "\n" not in str(raised.value)


def test_files_that_are_none_are_one_line(copy: Path, tmp_path: Path) -> None:
    (copy / CONFIG).unlink()
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        read(copy)
    for path in (copy / WEIGHTS, copy / "pytorch_model.bin"):
        path.touch()
        with pytest.raises(UserError, match=f"{path} is one file of a model: give its directory, {copy}"):
            read(path)
    with pytest.raises(UserError, match="nowhere does not exist: give a Hugging Face directory"):
        read(tmp_path / "nowhere")
    with pytest.raises(UserError, match=f"no model in {tmp_path}"):
        read(tmp_path)
    for look in (read, is_pretrained):
        with pytest.raises(UserError, match="x cannot be read: File name too long"):
            look(tmp_path / ("x" * 300))


# Vocabulary


@pytest.mark.parametrize("vocabulary", [50_258, 50_304, 50_311, 51_200])
def test_padding_of_the_vocabulary_is_left_out(tmp_path: Path, vocabulary: int, heard: list[str]) -> None:
    """The loss is the cross entropy over GPT-2's tokens: theirs, less what the padding has of the probability."""
    directory = make(tmp_path / "padded", vocabulary)
    logits, targets = theirs(directory)[:-1], TOKENS[0, 1:]
    assert logits.shape[1] == vocabulary
    torch.testing.assert_close(ours(directory)[:-1], logits[:, :VOCABULARY], atol=2e-4, rtol=1e-4)
    found = read(directory)
    with torch.no_grad():
        loss = float(as_model(found.shape, found.weights)(TOKENS[:, :-1], TOKENS[:, 1:]))
    assert loss == pytest.approx(float(F.cross_entropy(logits[:, :VOCABULARY], targets)), abs=1e-4)
    real = logits.softmax(-1)[:, :VOCABULARY].sum(-1)
    assert loss == pytest.approx(float(F.cross_entropy(logits, targets) + real.log().mean()), abs=1e-4)
    assert real.log().mean() < -1e-6, "else the padding has no share of the probability"
    assert found.padding == vocabulary - VOCABULARY
    assert f"vocabulary of {vocabulary:,}: the {vocabulary - VOCABULARY:,} rows" in str(padding_note(found))
    assert len(weights_for(found.shape, str(directory))["wte.weight"]) == VOCABULARY
    assert heard == [f"{directory}: {padding_note(found)}"]


def test_a_model_without_padding_has_no_note(plain: Path) -> None:
    assert padding_note(read(plain)) is None


@pytest.mark.parametrize(
    ("name", "edit", "said"),
    [
        ("vocab.json", {"der": 50_256}, r"vocab\.json: token 50,256 is 'der', GPT-2's is '<\|endoftext\|>'"),
        ("vocab.json", {"der": 7}, r"vocab\.json: token 7 is 'der', GPT-2's is '\('"),
        ("vocab.json", {"[PAD]": 50_257}, r"vocab\.json: token 50,257, '\[PAD\]', is added to GPT-2's 50,257"),
        (
            "added_tokens.json",
            {"<x>": 50_303},
            r"added_tokens\.json: token 50,303, '<x>', is added .*embeddings\(50257\)",
        ),
        ("added_tokens.json", {"<x>": "3"}, r"added_tokens\.json does not hold tokens and their numbers"),
        ("tokenizer.json", {"der": 7}, r"tokenizer\.json: token 7 is 'der'"),
        ("tokenizer.json", b"{}", r"tokenizer\.json cannot be read: it does not have model\.vocab"),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "LlamaTokenizer"},
            r"tokenizer_class is \"LlamaTokenizer\", GPT-2.s is",
        ),
        ("tokenizer_config.json", b"[]", r"tokenizer_config\.json does not hold a JSON object"),
    ],
)
def test_another_tokenizer_or_tokens_in_the_padding_are_refused(
    tmp_path: Path, name: str, edit: dict[str, Any] | bytes, said: str
) -> None:
    directory = make(tmp_path / "padded", 50_304)
    write_tokenizer(directory, 48)
    (directory / "added_tokens.json").write_text(json.dumps({"<outside>": 50_304}))  # the model has no such row
    read(directory)
    content = json.loads((directory / name).read_text())
    if isinstance(edit, bytes):
        (directory / name).write_bytes(edit)
    elif name == "tokenizer.json":
        content["model"]["vocab"] |= edit
        (directory / name).write_text(json.dumps(content))
    else:
        (directory / name).write_text(json.dumps(content | edit))
    for look in (read, shape_at):
        with pytest.raises(UserError, match=said):
            look(directory)


# Files of `export --format fp32`


def _export(path: Path, edit: Callable[[dict[str, Any]], object], model: Path) -> Path:
    found = read(model)
    weights = dict(found.weights, **{"wte.weight": F.pad(found.weights["wte.weight"], (0, 0, 0, 47))})
    torch_file.write(weights, found.shape, {}, path)
    content = torch.load(path, weights_only=True)
    edit(content)
    torch.save(content, path)
    return path


def _weight(name: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["model"].update({name: value})


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda content: content.pop("shape"), "does not say the model's shape"),
        (lambda content: content["shape"].update(layers=10**6), r"has no h\.2\."),
        (
            lambda content: content["shape"].update(layers=10**15),
            "layers is 1,000,000,000,000,000, more than 1,000,000",
        ),
        (lambda content: content["shape"].update(layers="2"), "is no model's shape"),
        (lambda content: content["shape"].update(heads=3), "width 32 is not divisible by heads 3"),
        (lambda content: content["shape"].update(width=True), "is no model's shape"),
        (lambda content: content.update(model=[1]), "no weights by name"),
        (_weight("ln_f.bias", 3), "'ln_f.bias' is no weight"),
        (lambda content: content["model"].update({3: torch.zeros(1)}), "'3' is no weight"),
        (_weight("ln_f.bias", torch.zeros(32, dtype=torch.int64)), r"ln_f\.bias is of dtype torch\.int64"),
        (_weight("ln_f.bias", torch.zeros(32).to(torch.float8_e5m2)), r"ln_f\.bias is of dtype torch\.float8"),
        (_weight("ln_f.bias", torch.zeros(32).to_sparse()), r"ln_f\.bias is not stored whole"),
        (_weight("ln_f.bias", torch.zeros(1).expand(32)), r"ln_f\.bias is not stored whole"),
        (_weight("ln_f.bias", torch.zeros(32, device="meta")), r"ln_f\.bias is not stored whole"),
        (_weight("ln_f.bias", torch.zeros(31)), r"ln_f\.bias is \(31,\)"),
        (_weight("more", torch.zeros(31)), "has an unknown more"),
    ],
)
def test_an_export_that_is_odd_is_refused_by_name(
    plain: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], object], said: str
) -> None:
    path = _export(tmp_path / "model.pt", edit, plain)
    for look in (read, shape_at):
        with pytest.raises(UserError, match=said) as raised:
            look(path)
        assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_an_export_that_is_not_finite_is_refused_by_name(plain: Path, tmp_path: Path) -> None:
    path = _export(tmp_path / "model.pt", _weight("ln_f.bias", torch.full((32,), float("inf"))), plain)
    with pytest.raises(UserError, match=r"ln_f\.bias has values that are Inf or NaN"):
        read(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_an_export_of_another_float_dtype_is_read(plain: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    def cast(content: dict[str, Any]) -> None:
        content["model"] = {name: each.to(dtype) for name, each in content["model"].items()}

    found = read(_export(tmp_path / "model.pt", cast, plain)).weights
    for name, expected in read(plain).weights.items():
        assert torch.equal(found[name], expected.to(dtype).float()), name


@pytest.mark.parametrize("size", [0, 1, 100, 100_000])
def test_an_export_that_is_cut_is_refused(plain: Path, tmp_path: Path, size: int) -> None:
    path = _export(tmp_path / "model.pt", lambda content: None, plain)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(
        UserError, match=r"model\.pt is not a file that `export --format fp32` has written: ."
    ) as raised:
        read(path)
    assert "\n" not in str(raised.value)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("harm was done"),)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a text\n", "it is damaged, or something else than a file of torch.save"),
        (b"", "it is damaged, or something else than a file of torch.save"),
        (Harmful(), "it holds more than tensors and plain values, such as code, which is not loaded"),
    ],
    ids=["text", "empty", "code"],
)
def test_a_file_that_is_no_export_is_refused_without_pytorchs_internals(
    tmp_path: Path, content: Any, said: str
) -> None:
    path = tmp_path / "model.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UserError) as raised:
        read(path)
    assert str(raised.value) == f"{path} is not a file that `export --format fp32` has written: {said}"


def test_a_tokenizer_file_need_not_have_added_tokens(plain: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(plain, tmp_path / "copy"))
    write_tokenizer(directory, 48)
    content = json.loads((directory / "tokenizer.json").read_text())
    del content["added_tokens"]
    (directory / "tokenizer.json").write_text(json.dumps(content))
    assert shape_at(directory) == ModelShape(2, 4, 32, 48)
