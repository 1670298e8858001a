from collections.abc import Callable
from pathlib import Path

import pytest

from ds_gpt2.common.errors import UserError
from ds_gpt2.config.settings import (
    PROJECT_DIR,
    BatchSettings,
    dump_settings,
    flat,
    known_keys,
    load_settings,
    parse_overrides,
)

CONFIGS = sorted((PROJECT_DIR / "ds_configs").glob("*.yaml"))
GPT2_124M = PROJECT_DIR / "ds_configs" / "gpt2_124m.yaml"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_shipped_configs_are_valid(path: Path) -> None:
    settings = load_settings(path)
    assert settings.run.name == path.stem
    assert settings.run_dir == PROJECT_DIR / "runs" / path.stem
    assert settings.checkpoint_dir == PROJECT_DIR / "checkpoints" / path.stem
    assert settings.deepspeed == PROJECT_DIR / "ds_configs" / "zero2_bf16.json"


def test_gpt2_124m_trains_on_fifty_billion_tokens() -> None:
    settings = load_settings(GPT2_124M)
    assert settings.schedule.steps == 95_365
    assert settings.schedule.steps * settings.batch.tokens_per_step == pytest.approx(50e9, rel=1e-4)
    assert (settings.checkpoint.every, settings.checkpoint.keep_last, settings.validation.every) == (250, 10, 250)
    assert (settings.schedule.max_lr, settings.schedule.min_lr, settings.schedule.warmup_steps) == (6e-4, 6e-5, 715)
    assert settings.optimizer.betas == (0.9, 0.95)


def test_overrides_are_typed_and_take_precedence() -> None:
    typed = parse_overrides(["schedule.max_lr=1e-4", "batch.micro_batch=8", "samples.prompts=[a, b]", "run.name=other"])
    settings = load_settings(GPT2_124M, typed)
    assert (settings.schedule.max_lr, settings.batch.micro_batch) == (1e-4, 8)
    assert settings.samples.prompts == ("a", "b")
    assert settings.checkpoint_dir.name == "other"


def test_an_override_removes_the_settings_that_it_excludes() -> None:
    by_epochs = load_settings(GPT2_124M, {"schedule.epochs": "5"}).schedule
    assert (by_epochs.steps, by_epochs.epochs) == (None, 5)
    own = {"model.layers": "2", "model.heads": "2", "model.width": "64"}
    assert load_settings(GPT2_124M, own).model.shape == (2, 2, 64)


def test_paths_are_relative_to_the_project_in_a_file_and_to_the_working_directory_in_overrides(tmp_path: Path) -> None:
    settings = load_settings(GPT2_124M, {"checkpoint.dir": "here"}, cwd=tmp_path)
    assert settings.checkpoint.dir == tmp_path / "here"
    assert settings.data.dir == PROJECT_DIR / "data" / "fineweb-edu"
    assert load_settings(GPT2_124M, {"data.dir": "/absolute"}, cwd=tmp_path).data.dir == Path("/absolute")


def test_paths_in_settings_have_no_parent_parts(tmp_path: Path) -> None:
    (tmp_path / "disk" / "target").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "target")
    names = {"data.dir": "a/../b", "model.init_from": "../c", "monitor.dir": "link/../d"}
    settings = load_settings(GPT2_124M, names, cwd=tmp_path)
    assert settings.data.dir == tmp_path / "b"
    assert settings.model.init_from == str(tmp_path.parent / "c")
    assert settings.monitor.dir == tmp_path / "disk" / "d"


def test_dumped_settings_are_read_back(tmp_path: Path) -> None:
    settings = load_settings(
        GPT2_124M, {"samples.prompts": '["é: \\n", "x"]', "schedule.max_lr": "1e-5", "schedule.min_lr": "0"}
    )
    (tmp_path / "config.yaml").write_text(dump_settings(settings), encoding="utf-8")
    assert load_settings(tmp_path / "config.yaml", cwd=tmp_path) == settings


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_settings(GPT2_124M).run.seed = 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch.microbatch=4", r"unknown setting batch\.microbatch: did you mean batch\.micro_batch\?"),
        ("schedule.max_Lr=4", r"did you mean schedule\.max_lr\?"),
        ("bathc.micro_batch=4", r"unknown setting bathc: .*batch"),
        ("zzzzz=4", "unknown setting zzzzz"),
        ("batch.micro_batch=four", r"batch\.micro_batch=four: must be a whole number"),
        ("batch.micro_batch=2.5", r"batch\.micro_batch=2\.5: must be a whole number"),
        ("batch.micro_batch=true", r"batch\.micro_batch=true: must be a whole number"),
        ("batch.micro_batch=0", r"batch\.micro_batch=0: input should be greater than 0"),
        ("batch.tokens_per_step=-5", r"batch\.tokens_per_step=-5"),
        ("model.preset=125M", r"model\.preset is '125M': known are 7M, 30M, 124M"),
        ("model.dropout=1.5", r"model\.dropout=1\.5"),
        ("schedule.min_lr=1", r"schedule\.min_lr 1\.0 is above schedule\.max_lr"),
        ("schedule.steps=715", r"warmup_steps 715 must be below schedule\.steps 715"),
        ("run.name=../x", r"run\.name=\.\./x: must be letters"),
        ("run.name=a/b", r"run\.name=a/b: must be letters"),
        ("run.name=", r"run\.name='': must be letters"),
        ("run.device=tpu", r"run\.device=tpu: input should be 'auto', 'cuda' or 'cpu'"),
        ("optimizer.betas=[0.9]", r"optimizer\.betas has too few values"),
        ("ema.decay=0", r"ema\.decay=0: input should be greater than 0"),
        ("ema.decay=1", r"ema\.decay=1: input should be less than 1"),
        ("ema.decay=nan", r"ema\.decay=nan: must be a number"),
        ("ema.decay=off", r"ema\.decay=off: must be a number"),
        ("ema.rate=0.9", r"unknown setting ema\.rate"),
        ("schedule.steps=010", r"schedule\.steps=010: must be a whole number"),
        ("schedule.steps=2:30", r"schedule\.steps=2:30: must be a whole number"),
        ("schedule.steps=0x10", r"schedule\.steps=0x10: must be a whole number"),
        ("schedule.max_lr=nan", r"schedule\.max_lr=nan: must be a number"),
        ("schedule.max_lr=.inf", r"schedule\.max_lr=\.inf: must be a number"),
        ("schedule.max_lr=1e999", r"schedule\.max_lr=1e999: input should be less than or equal to 1000000000"),
        ("batch.tokens_per_step=1000000000000", "input should be less than or equal to 1000000000"),
        ("batch.micro_batch=1000000000000", "input should be less than or equal to 1000000"),
        ("checkpoint.min_free_gb=1e300", "input should be less than or equal to 1000000000"),
        ("checkpoint.write_mb_per_s=1e-300", "must be 0 \\(no limit\\) or at least 0.001"),
        ("optimizer.weight_decay=1e308", "input should be less than or equal to 1000"),
        ("samples.per_prompt=1000000000", "input should be less than or equal to 1000"),
        ("supervisor.hang_factor=1:30", r"supervisor\.hang_factor=1:30: must be a number"),
        ("run.deterministic=2", r"run\.deterministic=2: must be true or false"),
        ("checkpoint.dir=$NOT_SET_ANYWHERE/ck", r"checkpoint\.dir=.*variable \$NOT_SET_ANYWHERE is not set"),
        ("data.dir=${NOT_SET_ANYWHERE}", r"data\.dir=.*variable \$\{NOT_SET_ANYWHERE\} is not set"),
        ("checkpoint.dir=~nobody-by-this-name/ck", r"checkpoint\.dir=~nobody-by-this-name/ck: "),
        ("checkpoint.dir=", r"checkpoint\.dir is an empty path"),
        ("run.name=" + "x" * 101, "must be letters"),
        (
            "schedule.steps=99999999999999999999999",
            "schedule\\.steps=9+: input should be less than or equal to 100000000",
        ),
        ("run.seed=99999999999999999999", "input should be less than or equal to"),
        ("optimizer.betas=0.9", r"optimizer\.betas=0\.9: must be a list, such as \[0\.9, 0\.95\]"),
        ("checkpoint.backup=x", r"checkpoint\.backup=x: must be a section"),
        ("data.dir=${HOME", r"the environment variable \$\{HOME is not set"),
        ("samples.prompts=" + "[" * 3000, "not valid YAML"),
        ("run=5", "run="),
        ("samples.prompts=[", "not valid YAML"),
    ],
)
def test_an_invalid_override_is_a_one_line_error(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_settings(GPT2_124M, parse_overrides([override]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("guards.spike=off", "off"),
        ("run.compile=off", False),
        ("run.compile=auto", "auto"),
        ("run.deterministic=yes", True),
        ("run.name=123", "123"),
        ("run.name=2026-11-29", "2026-11-29"),
        ("run.name=off", "off"),
        ("schedule.steps=1_000", 1000),
        ("schedule.max_lr=1", 1.0),
        ("checkpoint.keep_epochs=3", 3),
        ("checkpoint.keep_epochs=all", "all"),
        ("checkpoint.backup.to=null", None),
        ("monitor.dir=", None),
        ("alerts.command=echo 'a: b' | mail me", "echo 'a: b' | mail me"),
        ('alerts.command="echo: a"', "echo: a"),
        ("samples.prompts=[1, off, 'null']", ("1", "off", "null")),
    ],
)
def test_text_is_parsed_by_the_type_of_the_setting(override: str, value: object, tmp_path: Path) -> None:
    typed = load_settings(GPT2_124M, parse_overrides([override]))
    key = override.partition("=")[0]
    assert flat(typed.model_dump())[key] == value
    stored = tmp_path / "config.yaml"
    stored.write_text(dump_settings(typed), encoding="utf-8")
    assert load_settings(stored) == typed


def test_off_in_a_file_is_text(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "model: {preset: 7M}\ndata: {dir: x}\nschedule: {steps: 800}\nguards: {spike: off}\nvalidation:\n", "utf-8"
    )
    settings = load_settings(tmp_path / "run.yaml")
    assert settings.guards.spike == "off"
    assert settings.validation.every == 250  # an empty section has the defaults


@pytest.mark.parametrize("character", ["\x1b", "\udce9", "\x00"])
def test_a_character_that_yaml_does_not_allow_is_a_one_line_error(character: str) -> None:
    with pytest.raises(UserError, match="is not valid YAML"):
        load_settings(PROJECT_DIR / "ds_configs" / "quickstart.yaml", {"samples.prompts": f'["{character}"]'})


def test_a_merged_key_is_not_a_duplicate(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "model: {preset: 7M}\ndata: {dir: x}\n"
        "validation: &often {<<: {every: 10, tokens: 4096}, every: 20}\nschedule: {steps: 800}\n",
        "utf-8",
    )
    validation = load_settings(tmp_path / "run.yaml").validation
    assert (validation.every, validation.tokens) == (20, 4096)


def test_variables_and_the_home_directory_are_expanded_in_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    settings = load_settings(GPT2_124M, {"checkpoint.dir": "$SCRATCH/ck", "data.dir": "~/data"})
    assert settings.checkpoint.dir == tmp_path / "scratch" / "ck"
    assert settings.data.dir == tmp_path / "home" / "data"
    copies = load_settings(GPT2_124M, {"checkpoint.backup.to": "${SCRATCH}/copies"}).checkpoint.backup.to
    assert copies == str(tmp_path / "scratch" / "copies")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"run: \xe9\n", bytes(2_000_000), b"\x80PK\x03\x04"])
def test_a_file_that_is_not_a_settings_file_is_a_one_line_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"not a settings file|not UTF-8") as refused:
        load_settings(tmp_path / "model.safetensors")
    assert "\n" not in str(refused.value)


def test_a_shape_must_be_complete_and_divisible() -> None:
    with pytest.raises(UserError, match=r"give model\.preset .* or all of model\.layers, heads and width"):
        load_settings(GPT2_124M, {"model.layers": "2"})
    with pytest.raises(UserError, match=r"model\.width 30 is not divisible by model\.heads 4"):
        load_settings(GPT2_124M, {"model.layers": "2", "model.heads": "4", "model.width": "30"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("run: [", "not valid YAML"),
        ("- 1", "must be a mapping"),
        (
            "schedule: {steps: 800}\nmodel: {preset: 7M}\nschedule: {steps: 900}\n",
            "'schedule' appears twice, in lines 1 and 3",
        ),
        ("schedule: {steps: 800, steps: 900}\n", "'steps' appears twice"),
        ("model: {preset: 7M}\ndata: {dir: x}\nschedule: {steps: 010}\n", "steps=010: must be a whole number"),
        ("", "must be a mapping"),
        ("run: 5\n", "run=5"),
        ("!!python/object/apply:os.system ['touch owned']", "not valid YAML"),
        ("model: {preset: 7M}\nschedule: {steps: 800}\n", r"data\.dir is not set|data is not set"),
        ("model: {preset: 7M}\ndata: {dir: x}\n", "schedule is not set"),
        ("model: {preset: 7M}\ndata: {dir: x}\nschedule: {steps: 9, epochs: 1}\n", "exactly one of schedule.steps"),
    ],
)
def test_an_invalid_file_is_a_one_line_error(
    tmp_path: Path, content: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        load_settings(tmp_path / "bad.yaml")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "owned").exists()


def test_a_missing_file_is_named_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config not found: .*nowhere\.yaml"):
        load_settings(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("argument", ["--steps", "steps", "=5"])
def test_an_override_needs_a_key_and_a_value(argument: str) -> None:
    with pytest.raises(UserError, match="not of the form key=value"):
        parse_overrides([argument])


def test_two_values_for_one_setting_are_refused() -> None:
    assert parse_overrides(["a=1", "a=1"]) == {"a": "1"}
    with pytest.raises(UserError, match="a is given twice, as 1 and as 2"):
        parse_overrides(["a=1", "a=2"])


def test_a_dotted_key_in_a_file_has_a_hint(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: {preset: 7M}\ndata: {dir: x}\nschedule.steps: 20\n")
    with pytest.raises(UserError, match=r"unknown setting schedule\.steps: in a file it is `steps` below `schedule:`"):
        load_settings(tmp_path / "run.yaml")


def test_the_names_of_settings_are_stable() -> None:
    names = """run.name run.seed run.dir model.preset model.layers model.heads model.width model.dropout data.dir
    batch.tokens_per_step batch.micro_batch batch.sequence_length schedule.steps schedule.epochs schedule.warmup_steps
    schedule.max_lr schedule.min_lr checkpoint.dir checkpoint.every checkpoint.keep_last validation.every samples.every
    samples.prompts monitor.dir deepspeed"""
    assert set(names.split()) <= set(known_keys())


def test_the_config_of_the_fixture_is_valid(write_config: Callable[..., Path], tmp_path: Path) -> None:
    assert load_settings(write_config(tmp_path)).schedule.steps == 12


@pytest.mark.parametrize("secret", ["s3://key:word@bucket/x", "https://host/x?token=1", "ftp://me@host/x"])
def test_secrets_are_refused(secret: str) -> None:
    with pytest.raises(UserError, match="must not hold a password or key") as refused:
        load_settings(PROJECT_DIR / "ds_configs" / "quickstart.yaml", {"checkpoint.backup.to": secret})
    assert "word" not in str(refused.value).replace("password", "") and "token" not in str(refused.value)


def test_the_backup_destination_is_a_path_or_a_url(tmp_path: Path) -> None:
    config = PROJECT_DIR / "ds_configs" / "quickstart.yaml"
    assert load_settings(config, {"checkpoint.backup.to": "s3://bucket/x"}).checkpoint.backup.to == "s3://bucket/x"
    given = load_settings(config, {"checkpoint.backup.to": "copies"}, cwd=tmp_path).checkpoint.backup.to
    assert given == str(tmp_path / "copies")


def test_a_step_with_too_many_windows_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 10,000,000 windows of"):
        BatchSettings(tokens_per_step=10**9, sequence_length=10)


def test_backups_to_memory_are_refused() -> None:
    with pytest.raises(UserError, match="backups in memory are lost when the process ends"):
        load_settings(GPT2_124M, parse_overrides(["checkpoint.backup.to=memory://x"]))


def test_an_error_in_a_name_from_the_file_says_where_it_is_from(tmp_path: Path) -> None:
    path = tmp_path / "my config.yaml"
    path.write_text("model: {preset: 7M}\ndata: {dir: data}\nschedule: {steps: 100, warmup_steps: 1}\n")
    with pytest.raises(UserError) as refused:
        load_settings(path)
    hint = "; that is the name of the settings file, because run.name is not set: set run.name=NAME"
    assert str(refused.value).startswith(f"{path}: run.name=my config: must be letters")
    assert str(refused.value).endswith(hint)
    with pytest.raises(UserError) as refused:
        load_settings(path, {"run.name": "my config"})
    assert str(refused.value).startswith("command line: run.name=my config: ") and hint not in str(refused.value)
    assert load_settings(path, {"run.name": "mine"}).run.name == "mine"


def test_an_error_in_a_file_and_an_override_names_both(tmp_path: Path) -> None:
    path = tmp_path / "k.yaml"
    path.write_text("model: {preset: 7M}\ndata: {dir: data}\nschedule: {steps: 100, warmup_steps: 1}\n")
    with pytest.raises(UserError) as refused:
        load_settings(path, {"schedule.warmup_steps": "5000"})
    assert str(refused.value).startswith(f"{path} and command line: schedule.warmup_steps 5000 must be below ")
