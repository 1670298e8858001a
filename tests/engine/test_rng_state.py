import io
import random

import numpy as np
import torch

from ds_gpt2.engine.rng_state import get_rng_state, seed_everything, set_rng_state


def _draw() -> tuple[object, ...]:
    normal = random.gauss(0, 1)  # leaves a spare value inside the generator
    return (normal, random.random(), np.random.rand(), np.random.randn(), torch.rand(1).item(), torch.randn(1).item())


def test_a_restored_random_state_gives_the_same_numbers() -> None:
    seed_everything(3)
    _draw()
    file = io.BytesIO()
    torch.save(get_rng_state(), file)
    expected = [_draw() for _ in range(3)]
    seed_everything(4)
    file.seek(0)
    set_rng_state(torch.load(file, weights_only=True))
    assert [_draw() for _ in range(3)] == expected


def test_a_seed_fixes_all_generators() -> None:
    seed_everything(5)
    first = _draw()
    seed_everything(5)
    assert _draw() == first
    seed_everything(6)
    assert _draw() != first
