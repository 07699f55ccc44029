"""transformers' schedules: a learning rate that changes every step, in every group."""

import pytest
from transformers import get_scheduler

from .stepping import assert_same, make_params, pair, run

SCHEDULES = {
    "constant": {},
    "constant_with_warmup": {},
    "linear": {},
    "cosine": {},
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"power": 2.0},
}
STEPS = 20


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule(name, launches):
    a, b, c = make_params()
    groups = [{"params": [a, b], "lr": 1e-2}, {"params": [c], "lr": 3e-3, "weight_decay": 0.0}]
    ours, theirs = pair(groups)
    schedules = [
        get_scheduler(name, optimizer, 5, STEPS, scheduler_specific_kwargs=SCHEDULES[name]) for optimizer in (ours, theirs)
    ]
    rates = set()

    def each(step):
        for schedule in schedules:
            schedule.step()
        rates.add(ours.param_groups[0]["lr"])
        assert [g["lr"] for g in ours.param_groups] == [g["lr"] for g in theirs.param_groups]

    run(ours, theirs, steps=STEPS, each=each)
    assert len(rates) == 1 if name == "constant" else len(rates) >= 5
    assert_same(ours, theirs)
    assert ours._tables.built == 1
    assert launches() == {"adamw_kernel": STEPS}
