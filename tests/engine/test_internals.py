from types import SimpleNamespace

import deepspeed
import pytest
import torch

from ds_gpt2.common.errors import UserError
from ds_gpt2.engine import internals


def _deepspeed() -> tuple[SimpleNamespace, torch.nn.Module]:
    """An engine and a model with every name that is used."""
    optimizer = SimpleNamespace(**dict.fromkeys(internals._OF_OPTIMIZER))
    engine = SimpleNamespace(optimizer=optimizer, **dict.fromkeys(internals._OF_ENGINE))
    csv = SimpleNamespace(filenames=[], log_dir="csv", write_events=None)
    tensorboard = SimpleNamespace(summary_writer=None)
    engine.monitor = SimpleNamespace(
        enabled=True, tb_monitor=tensorboard, csv_monitor=csv, wandb_monitor=None, comet_monitor=None
    )
    model = torch.nn.Linear(2, 2)
    for parameter in model.parameters():
        mapping = SimpleNamespace(**dict.fromkeys(internals._OF_MAPPING))
        vars(parameter).update(_hp_mapping=mapping, _index_in_param_group=0)
    return engine, model


def test_a_deepspeed_with_all_internals_passes() -> None:
    internals.check(*_deepspeed())


def test_a_rank_without_a_part_of_the_first_parameter_passes() -> None:
    engine, model = _deepspeed()
    vars(next(model.parameters()))["_hp_mapping"] = None
    internals.check(engine, model)


def test_every_missing_internal_is_named_with_the_tested_version() -> None:
    engine, model = _deepspeed()
    del engine.was_step_applied, engine.optimizer.has_overflow
    del vars(next(model.parameters()))["_hp_mapping"].lp_fragment_address
    with pytest.raises(UserError) as error:
        internals.check(engine, model)
    for name in ("DeepSpeedEngine.was_step_applied", "SimpleNamespace.has_overflow", "_hp_mapping.lp_fragment_address"):
        assert name in str(error.value)
    assert "pip install deepspeed==0.19.8" in str(error.value)


def test_a_missing_internal_of_the_monitors_is_named() -> None:
    engine, model = _deepspeed()
    del engine.monitor.enabled, engine.monitor.csv_monitor.filenames, engine.monitor.tb_monitor.summary_writer
    with pytest.raises(UserError) as error:
        internals.check(engine, model)
    for name in ("MonitorMaster.enabled", "SimpleNamespace.filenames", "SimpleNamespace.summary_writer"):
        assert name in str(error.value)


def test_internals_of_a_monitor_that_is_off_are_not_needed() -> None:
    engine, model = _deepspeed()
    engine.monitor.csv_monitor = engine.monitor.tb_monitor = None
    internals.check(engine, model)


def test_the_table_of_operators_is_checked_without_building_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Building it starts compilers in every rank."""
    monkeypatch.delitem(vars(deepspeed.ops), "__compatible_ops__", raising=False)
    monkeypatch.setattr(deepspeed.ops, "_probe_compatible_ops", lambda: pytest.fail("the table was built"))
    internals.check_operators()
    monkeypatch.delattr(deepspeed.ops, "_probe_compatible_ops")
    with pytest.raises(UserError, match=r"DeepSpeed \S+ has no deepspeed\.ops\.__compatible_ops__"):
        internals.check_operators()
