"""config.json: supported models compute the logits of transformers, others are errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pretrained_helpers import CONFIG, change, ours, theirs

from ds_gpt2.common.errors import UserError
from ds_gpt2.model.shape import VOCABULARY, ModelShape
from ds_gpt2.pretrained.load import read, shape_at

pytestmark = pytest.mark.usefixtures("one_thread")


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
def test_supported_configs_give_the_logits_of_transformers(copy: Path, values: dict[str, Any]) -> None:
    change(copy, **values)
    expected = theirs(copy, attn_implementation="eager")
    assert expected.std() > 1, "smaller logits would hide differences"
    torch.testing.assert_close(ours(copy), expected, atol=2e-4, rtol=1e-4)
    assert shape_at(copy) == ModelShape(2, 4, 32, 48)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scale_attn_weights": False}, r"scale_attn_weights is false; only true is supported"),
        ({"scale_attn_by_inverse_layer_idx": True}, r"scale_attn_by_inverse_layer_idx is true; only false"),
        ({"activation_function": "gelu"}, r'activation_function is "gelu"; only "gelu_new" or'),
        ({"activation_function": "relu"}, r'activation_function is "relu"'),
        ({"layer_norm_epsilon": 1e-6}, r"layer_norm_epsilon is 1e-06; only 1e-05 is supported"),
        ({"layer_norm_epsilon": "1e-5"}, r"layer_norm_epsilon is \"1e-5\""),
        ({"n_inner": 64}, r"n_inner is 64; only 4 x n_embd = 128 is supported"),
        ({"n_inner": 0}, r"n_inner is 0"),
        ({"tie_word_embeddings": False}, r"tie_word_embeddings is false"),
        ({"add_cross_attention": True}, r"add_cross_attention is true"),
        ({"is_encoder_decoder": True}, r"is_encoder_decoder is true"),
        ({"is_causal": False}, r"is_causal is false"),
        ({"scale_attn_weights": None}, r"scale_attn_weights is null"),
        ({"scale_attn_weights": 1}, r"scale_attn_weights is 1"),
        ({"eos_token_id": 2}, r"eos_token_id is 2; GPT-2's <\|endoftext\|> is 50256"),
        ({"n_embd": "wide"}, r'n_embd is "wide"; input should be a valid integer'),
        ({"model_type": "llama"}, r'model_type is "llama"; only "gpt2" is supported'),
        ({"model_type": ...}, r"model_type is missing"),
        ({"architectures": ["GPT2ForSequenceClassification"]}, r"architectures is \[\"GPT2ForSeq.*GPT2LMHeadModel"),
        ({"architectures": "GPT2LMHeadModel"}, r"architectures is \"GPT2LMHeadModel\"; it must be a list"),
        ({"pad_token_id": -1}, r"pad_token_id is -1; it is not a token id"),
        ({"sep_token_id": "x"}, r"sep_token_id is \"x\"; it is not a token id"),
        ({"auto_map": {"AutoModel": "modeling.Mine"}}, r"auto_map is \{\"AutoModel\""),
        ({"quantization_config": {"bits": 4}}, r"quantization_config is \{\"bits\": 4\}"),
        ({"pruned_heads": {"0": [1]}}, r"pruned_heads is"),
        ({"n_embd": 32.0}, r"n_embd is 32.0"),
        ({"n_head": 0}, r"n_head is 0"),
        ({"n_head": 3}, r"n_embd 32 is not divisible by n_head 3"),
        ({"n_head": True}, r"n_head is true"),
        ({"n_layer": "2"}, r"n_layer is \"2\""),
        ({"n_layer": 3}, r"has no h\.2\.ln_1\.weight"),
        ({"n_layer": 1}, r"has an unknown tensor h\.1\.attn"),
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
def test_unsupported_configs_are_errors_with_field_and_value(copy: Path, values: dict[str, Any], message: str) -> None:
    change(copy, **values)
    for function in (read, shape_at):
        with pytest.raises(UserError, match=message) as raised:
            function(copy)
        assert str(copy) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"3", b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b" " * 10_000_001]
)
def test_an_invalid_config_file_is_an_error_of_one_line(copy: Path, content: bytes) -> None:
    (copy / CONFIG).write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json") as raised:
        read(copy)
    assert "\n" not in str(raised.value)
