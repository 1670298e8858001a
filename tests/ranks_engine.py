"""Train with an engine on several ranks; write the results as JSON for tests/engine/test_engine.py."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["DS_ACCELERATOR"] = "cpu"

from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

from benchmarks.bad_gradients import inject
from ds_gpt2.config import deepspeed_config
from ds_gpt2.config.batch_plan import plan_batch
from ds_gpt2.config.settings import HistogramsSettings, ValidationSettings, load_settings
from ds_gpt2.data.loader import MicroBatch, TrainingData
from ds_gpt2.data.sources import HeldOut, open_sources
from ds_gpt2.distributed import collectives, device
from ds_gpt2.engine import zero2_gradients
from ds_gpt2.engine.engine import Engine
from ds_gpt2.engine.process_group import close_process_group, open_process_group
from ds_gpt2.engine.train_state import TrainState
from ds_gpt2.model.gpt2 import GPT2
from ds_gpt2.model.shape import VOCABULARY, ModelShape
from ds_gpt2.monitoring.monitor import Histogram
from ds_gpt2.run_dir import exit_codes, process_end
from ds_gpt2.training.hooks import Histograms, Validation

LR = 1e-3
SEQUENCE = 16  # the time of a step is that of its logits


def begin_from_another(engine: Engine) -> dict[str, bool]:
    """Start from weights that bf16 cannot represent; return whether masters, bf16 weights and padding are right."""
    torch.manual_seed(9)
    weights = {name: torch.randn(parameter.shape) for name, parameter in engine.model.named_parameters()}
    weights["wte.weight"] = weights["wte.weight"][:VOCABULARY]
    padding = engine.model.wte.weight[VOCABULARY:].clone()
    engine.set_weights(weights)
    masters = {name: safe_get_full_fp32_param(each) for name, each in engine.model.named_parameters()}
    return {
        "masters": all(torch.equal(masters[name][: len(each)], each) for name, each in weights.items()),
        "rounded": all(torch.equal(each, masters[name].bfloat16()) for name, each in engine.model.named_parameters()),
        "padding": torch.equal(engine.model.wte.weight[VOCABULARY:], padding),
    }


def main(config: Path, out: Path) -> None:
    settings = load_settings(config)
    cpu = device.choose("cpu")
    open_process_group(cpu)
    plan = plan_batch(16 * SEQUENCE, 2, SEQUENCE, collectives.world_size())
    dataset = open_sources(settings.data)
    data = TrainingData(dataset.windows("train", SEQUENCE), plan, collectives.rank(), settings.run.seed, cpu)
    validation = Validation(
        ValidationSettings(tokens=7 * SEQUENCE), [HeldOut(dataset.windows("val", SEQUENCE))], group=2
    )

    def fresh_engine() -> Engine:
        torch.manual_seed(5)
        content = deepspeed_config.load_deepspeed_file(settings.deepspeed)
        model = GPT2(ModelShape(2, 2, 32, SEQUENCE))
        return Engine(model, deepspeed_config.complete(content, settings, plan, model.shape.parameters), 0.1)

    norm_errors: list[float] = []

    def steps(trained: Engine, count: int) -> list[tuple[float, float]]:
        results = []
        for step in range(1, count + 1):
            loss = trained.accumulate(data.micro_batches(step))
            exact = _exact_norm(trained)
            update = trained.apply(LR)
            assert update.applied and loss is not None
            norm_errors.append(abs(update.grad_norm / exact - 1))
            results.append((float(collectives.sum_over_ranks(loss)) / collectives.world_size(), update.grad_norm))
        return results

    found: dict[str, object] = {"world_size": collectives.world_size()}
    found["begun_from"] = begin_from_another(fresh_engine())
    engine = fresh_engine()
    found["validation_before"] = validation.loss(engine)
    norms = _count_norms()
    found["steps"] = steps(engine, 4)
    found["norms"] = len(norms)
    found["norm_error"] = max(norm_errors)
    found["dropped"] = _dropped(engine, data)
    found["summed_gradient"] = _sum_of_one_large_and_small_gradients(engine, data)
    found["bad"] = inject(engine, data, count=25, seed=collectives.world_size())
    found["unaccepted"] = _unaccepted_norm(engine, data)
    found["fingerprints"] = _fingerprints(engine)
    found["after_skip"] = steps(engine, 1)
    found["histograms"] = _histograms(engine, data)
    complaints = []
    for guilty in range(collectives.world_size()):
        complaints.append(_complaint_of(guilty))
    found["complaints"] = complaints
    found["interrupted"] = [_interrupted_by(rank) for rank in range(collectives.world_size())]
    found["failed_hook"] = _failed_on(collectives.world_size() - 1)
    if collectives.is_main():
        out.write_text(json.dumps(found))
    engine.close()
    close_process_group()


def _exact_norm(trained: Engine) -> float:
    """Return the norm of all ranks' gradients, computed in fp64."""
    total = torch.stack([part.double().square().sum() for part in trained.gradients().values()]).sum()
    return float(collectives.sum_over_ranks(total).sqrt())


def _count_norms() -> list[object]:
    """Return a list that grows whenever this project computes the norm of the gradients."""
    norms: list[object] = []
    ours = zero2_gradients._global_norm

    def counted(optimizer: object) -> torch.Tensor:
        norms.append(optimizer)
        return ours(optimizer)

    zero2_gradients._global_norm = counted
    return norms


def _dropped(trained: Engine, data: TrainingData) -> dict[str, object]:
    """End steps before their last micro-batch; return the gradients that are left and the number of reductions.

    A reduction would block: a rank may fail alone, and the others would not take part.
    """

    def failing() -> Iterator[MicroBatch]:
        yield next(data.micro_batches(6))
        raise OSError("no more")

    reduced: list[object] = []
    all_reduce = torch.distributed.all_reduce

    def counted(*tensors: Any, **named: Any) -> object:
        reduced.append(tensors)
        return all_reduce(*tensors, **named)

    torch.distributed.all_reduce = counted
    try:
        stopped = trained.accumulate(data.micro_batches(6), lambda: True)
        left = [float(part.abs().max()) for part in trained.gradients().values()]
        with contextlib.suppress(OSError):
            trained.accumulate(failing())
        left += [float(part.abs().max()) for part in trained.gradients().values()]
    finally:
        torch.distributed.all_reduce = all_reduce
    return {"stopped": stopped is None, "left": max(left), "reductions": len(reduced)}


def _sum_of_one_large_and_small_gradients(trained: Engine, data: TrainingData) -> float:
    """Return the accumulated gradient of a weight: 1 from the first micro-batch, 1/512 from each other."""
    weight: Any = trained.model.get_parameter("h.1.mlp.c_fc.weight")
    values = iter([1.0] + [1 / 512] * (data.plan.accumulation - 1))
    hook = weight.register_hook(lambda grad: torch.full_like(grad, next(values)))
    trained.accumulate(data.micro_batches(5))
    hook.remove()
    gradient = safe_get_full_grad(weight)
    assert gradient is not None
    trained.apply(0.0)
    return float(gradient.mean())


def _unaccepted_norm(trained: Engine, data: TrainingData) -> dict[str, object]:
    """Refuse the norm of a step's gradients, then train on: return what the update reported, and what it changed."""
    asked: list[float] = []

    def refuse(norm: float) -> bool:
        asked.append(norm)
        return False

    before = {name: part.clone() for name, part in trained.masters().items()}
    trained.accumulate(data.micro_batches(6))
    update = trained.apply(LR, refuse)
    unchanged = all(torch.equal(part, before[name]) for name, part in trained.masters().items())
    trained.accumulate(data.micro_batches(6))
    again = trained.apply(0.0)
    return {
        "asked": asked == [update.grad_norm],
        "norms": [update.grad_norm, again.grad_norm],
        "applied": [update.applied, again.applied],
        "unchanged": all(collectives.gather_objects(unchanged)),
    }


def _fingerprints(trained: Engine) -> dict[str, object]:
    """Return all ranks' fingerprints: unchanged, with one bit flipped on the last rank, and flipped back."""
    weight = trained.model.get_parameter("h.0.attn.c_attn.weight").detach().view(torch.int16).view(-1)
    fingerprints: dict[str, object] = {"same": collectives.gather_objects(trained.fingerprint())}
    for name in ("flipped", "back"):
        if collectives.rank() == collectives.world_size() - 1:
            weight[7] ^= 1 << 9
        fingerprints[name] = collectives.gather_objects(trained.fingerprint())
    return fingerprints


def _histograms(trained: Engine, data: TrainingData) -> dict[str, object]:
    """Return the hook's values of an update, and the expected values from complete tensors."""
    hook = Histograms(HistogramsSettings(every=1, norms=True), trained.model)
    trained.accumulate(data.micro_batches(7))
    hook.before_update(trained)
    parameters = dict(trained.model.named_parameters())
    gradients = {name: safe_get_full_grad(parameter) for name, parameter in parameters.items()}
    before = {name: safe_get_full_fp32_param(parameter).clone() for name, parameter in parameters.items()}
    trained.apply(LR)
    after = {name: safe_get_full_fp32_param(parameter) for name, parameter in parameters.items()}
    observed = hook.observe(trained, TrainState())
    expected: dict[str, object] = {
        f"grad/{name}": _figures(tensor) for name, tensor in gradients.items() if tensor.dim() == 2
    }
    expected |= {f"param/{name}": _figures(tensor) for name, tensor in after.items() if tensor.dim() == 2}
    for part in ("wte", "wpe", "h.0", "h.1", "ln_f"):
        names = [name for name in parameters if name.startswith(part + ".")]
        moved, old = (
            math.sqrt(sum(float(tensors[name].double().square().sum()) for name in names))
            for tensors in ({name: after[name] - before[name] for name in names}, before)
        )
        expected[f"update_ratio/{part}"] = moved / old
        expected[f"param_norm/{part}"] = old
        expected[f"grad_norm/{part}"] = math.sqrt(sum(float(gradients[name].square().sum()) for name in names))
    shown = {
        tag: [sum(value.counts), value.minimum, value.maximum, value.total, value.squares]
        if isinstance(value, Histogram)
        else value
        for tag, value in observed.items()
    }
    middle = observed["param/wte.weight"]
    assert isinstance(middle, Histogram)
    return {"measured": shown, "expected": expected, "counts": middle.counts, "limits": middle.limits,
            "counted": _counted(after["wte.weight"], middle.limits)}  # fmt: skip


def _figures(tensor: torch.Tensor) -> list[float]:
    values = tensor.double()
    return [values.numel(), float(values.min()), float(values.max()), float(values.sum()), float(values.square().sum())]


def _counted(tensor: torch.Tensor, limits: list[float]) -> list[int]:
    """Return the number of values up to each limit and above the previous one."""
    values, last = tensor.float(), -math.inf
    counts = []
    for limit in torch.tensor(limits, dtype=torch.float32).tolist():
        counts.append(int(((values > last) & (values <= limit)).sum()))
        last = limit
    return counts


def _interrupted_by(stopped: int) -> list[bool]:
    """Return for each rank whether an evaluation is interrupted if only rank ``stopped`` is requested to stop."""
    from ds_gpt2.training.hooks.hook import Interrupted, on_all_ranks

    def part() -> None:
        if collectives.rank() == stopped:
            raise Interrupted

    try:
        on_all_ranks(part)
    except Interrupted:
        return collectives.gather_objects(True)
    return collectives.gather_objects(False)


def _failed_on(guilty: int) -> list[str]:
    """Return the message that each rank receives if a hook runs out of memory on rank ``guilty`` only."""
    from ds_gpt2.training.hooks.hook import HookFailedError, on_all_ranks

    def part() -> int:
        if collectives.rank() == guilty:
            raise torch.OutOfMemoryError("out of memory")
        return 1

    try:
        return collectives.gather_objects(f"no exception: {on_all_ranks(part)}")
    except HookFailedError as error:
        return collectives.gather_objects(str(error))


def _complaint_of(guilty: int) -> list[str | None]:
    """Return the error that each rank raises if only rank ``guilty`` raises one."""
    from ds_gpt2.common.errors import UserError

    def action() -> None:
        if collectives.rank() == guilty:
            raise UserError(f"rank {guilty} found it")

    try:
        collectives.call_on_all_ranks(action)
    except UserError as error:
        heard: str | None = str(error)
    else:
        heard = None
    return collectives.gather_objects(heard)


main(Path(sys.argv[-2]), Path(sys.argv[-1]))
process_end.end_process(exit_codes.DONE)
