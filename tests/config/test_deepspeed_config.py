import json
import re
from pathlib import Path
from typing import Any

import deepspeed
import pytest
from deepspeed.runtime import config as deepspeed_config

from ds_gpt2.common.errors import UserError
from ds_gpt2.config import deepspeed_config as deepspeed_file
from ds_gpt2.config.batch_plan import BatchPlan
from ds_gpt2.config.deepspeed_config import complete, load_deepspeed_file
from ds_gpt2.config.settings import PROJECT_DIR, load_settings

SHIPPED = PROJECT_DIR / "ds_configs" / "zero2_bf16.json"


def _with(tmp_path: Path, **changes: Any) -> Path:
    content = {**json.loads(SHIPPED.read_text()), **changes}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    return path


def test_complete_fills_in_the_values_of_the_settings() -> None:
    settings = load_settings(PROJECT_DIR / "ds_configs" / "gpt2_124m.yaml", {"optimizer.grad_clip": "0.5"})
    content = load_deepspeed_file(SHIPPED)
    completed = complete(content, settings, BatchPlan(16, 1024, 8, 4), 1_000)
    assert completed["zero_optimization"]["reduce_bucket_size"] == 1_000
    assert completed["train_batch_size"] == 512
    assert completed["train_micro_batch_size_per_gpu"] == 16
    assert completed["gradient_accumulation_steps"] == 8
    assert completed["gradient_clipping"] == 0.5
    params = completed["optimizer"]["params"]
    assert (params["lr"], params["betas"], params["eps"], params["weight_decay"]) == (6e-4, [0.9, 0.95], 1e-8, 0.1)
    assert params["fused"]
    assert "auto" not in json.dumps(completed)
    assert content == load_deepspeed_file(SHIPPED), "the file's own content was changed"


def test_gradients_are_accumulated_and_reduced_in_fp32_by_default() -> None:
    settings = load_settings(PROJECT_DIR / "ds_configs" / "gpt2_124m.yaml")
    unset = load_deepspeed_file(SHIPPED)
    del unset["data_types"], unset["communication_data_type"]
    bf16 = {**unset, "data_types": {"grad_accum_dtype": "bf16"}, "communication_data_type": "bf16"}
    found = [complete(content, settings, BatchPlan(16, 1024, 8, 4), 10**9) for content in (unset, bf16)]
    assert [each["data_types"]["grad_accum_dtype"] for each in found] == ["fp32", "bf16"]
    assert [each["communication_data_type"] for each in found] == ["fp32", "bf16"]
    assert {each["zero_optimization"]["reduce_bucket_size"] for each in found} == {100_000_000}  # as in the file


def test_secrets_of_the_file_are_not_passed_to_deepspeed(tmp_path: Path) -> None:
    settings = load_settings(PROJECT_DIR / "ds_configs" / "gpt2_124m.yaml")
    blocks = {
        "comet": {"enabled": True, "api_key": "s3cr3t", "workspace": "w"},
        "wandb": {"enabled": True, "team": "t", "api_key": "s3cr3t"},
        "csv_monitor": {"enabled": False, "upload": {"auth_token": "s3cr3t"}},
        "aio": {"password": "s3cr3t", "block_size": 1},
    }
    content = load_deepspeed_file(_with(tmp_path, **blocks))
    completed = complete(content, settings, BatchPlan(16, 1024, 8, 4), 1_000)
    assert "s3cr3t" not in json.dumps(completed)
    assert completed["comet"] == completed["wandb"] == {"enabled": False}
    assert completed["aio"] == {"block_size": 1}
    assert content["comet"]["api_key"] == "s3cr3t", "the trackers themselves still need the key"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"zero_optimisation": {"stage": 2}},
            "unknown top-level key 'zero_optimisation': did you mean zero_optimization",
        ),
        ({"qqqqqq": 1}, "unknown top-level key 'qqqqqq': remove it"),
        ({"elasticity": {}}, "unknown top-level key 'elasticity'"),
        ({"train_batch_size": 64}, r"train_batch_size belongs to the setting batch\.tokens_per_step: write \"auto\""),
        ({"gradient_clipping": 1.0}, r"gradient_clipping belongs to the setting optimizer\.grad_clip"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler belongs to the setting schedule"),
        ({"tensorboard": {"enabled": True}}, "tensorboard belongs to the setting monitor"),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}},
            r"optimizer\.params\.lr belongs to .* schedule\.max_lr",
        ),
        (
            {"bf16": {"enabled": True, "check_grad_overflow": False}},
            r"bf16\.check_grad_overflow protects .*: remove it",
        ),
        (
            {"zero_optimization": {"stage": 2, "compute_grad_norm": False}},
            "compute_grad_norm protects the weights from gradients with Inf",
        ),
        ({"optimizer": {"params": {}}}, r"optimizer\.type is None: ds_gpt2 supports AdamW"),
        ({"optimizer": None}, r"optimizer\.type is None"),
        ({"optimizer": {"type": "Sophia"}}, r"optimizer\.type is Sophia"),
        ({"optimizer": {"type": "AdamW", "params": None}}, r"optimizer\.params must be an object"),
        ({"optimizer": {"type": "AdamW", "params": {"fusd": True}}}, r"optimizer\.params\.fusd is unknown"),
        ({"zero_optimization": {"stage": 3}}, r"stage is 3: ds_gpt2 supports stage 2 only"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "big"}}, "reduce_bucket_size must be a number of el"),
        ({"zero_optimization": {}}, "stage is None"),
        ({"zero_optimization": None}, "stage is None"),
        ({"zero_optimization": []}, "stage is None"),
        ({"zero_optimization": {"stage": 1}}, "stage is 1"),
    ],
)
def test_an_invalid_file_is_a_one_line_error(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_deepspeed_file(_with(tmp_path, **changes))


@pytest.mark.parametrize("content", ["", "{", "[1]", "{'a': 1}", '{"bf16": {}, "bf16": {}}', "[" * 100_000])
def test_a_file_that_is_not_a_json_object_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(content)
    with pytest.raises(UserError, match=str(path)):
        load_deepspeed_file(path)
    with pytest.raises(UserError, match="DeepSpeed file not found"):
        load_deepspeed_file(tmp_path / "nowhere.json")


def test_deepspeed_reads_every_known_key() -> None:
    """Every accepted key occurs as a string in the source of the installed DeepSpeed."""
    root = Path(deepspeed.__file__).parent
    sources = [root / "runtime", root / "monitor", root / "utils", root / "profiling", root / "compile", root / "comm"]
    text = "\n".join(path.read_text() for folder in sources for path in folder.rglob("*.py"))
    text += Path(deepspeed_config.__file__).read_text()
    missing = [key for key in deepspeed_file._TOP_LEVEL if not re.search(rf"""["']{key}["']""", text)]
    fields = set(re.findall(r"^    (\w+): ", text, re.MULTILINE))  # pydantic blocks such as the monitor's
    assert not set(missing) - fields


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"# Title\n", "Expecting value: line 1 column 1 (char 0)"), (b"\xff\xb6\xb6", "byte 0 is not text in UTF-8")],
)
def test_a_file_that_is_not_json_is_reported_as_such(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.md").write_bytes(content)
    with pytest.raises(UserError) as refused:
        load_deepspeed_file(tmp_path / "a.md")
    expected = f"DeepSpeed file {tmp_path / 'a.md'} is not valid JSON ({reason}): correct it, or set deepspeed=PATH"
    assert str(refused.value) == expected
