"""Elastic restarts: when a worker is killed, torch's agent starts all of them anew, and training goes on where it was.

Workers write a checkpoint after each step. A killed run must end with the losses and parameters of an uninterrupted one.
"""

import json
import multiprocessing
import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tests import ranks
from tests.distributed.checkpoints import STEPS, load, make_training, outcome, save, train

KILLED_IN = 2  # the step; its forward has run
NOBODY, ANYBODY = -1, -2  # instead of a victim's rank


def worker(folder: Path, engine: str, victim: int, agent: int | None) -> None:
    """A worker that an agent started. `victim` is the rank to be killed, and with it the process `agent`."""
    ranks.prepare()
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    run(folder, engine, victim, agent)
    dist.destroy_process_group()


def run(folder: Path, engine: str, victim: int = NOBODY, agent: int | None = None) -> None:
    """Take all steps that have no checkpoint yet."""
    rank, killed_before = dist.get_rank(), (folder / "killed").exists()
    dist.barrier()  # all have looked
    model, optimizer = make_training(engine)
    start = last_step(folder) + 1
    if start:
        load(model, optimizer, folder / str(start - 1))
    for step in range(start, STEPS):
        if step == KILLED_IN and victim in (rank, ANYBODY) and not killed_before:
            model.register_forward_hook(lambda *_: die(folder, agent))
        [loss] = train(model, optimizer, range(step, step + 1))
        save(model, optimizer, folder / str(step))
        if rank == 0:
            (folder / f"{step}.json").write_text(json.dumps({"loss": loss, "world": dist.get_world_size()}))
    found = outcome(model, optimizer)
    if rank == 0:
        torch.save(found, folder / "end.pt")
    dist.barrier()


def die(folder, agent):
    (folder / "killed").touch()
    if agent is not None:
        os.kill(agent, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def last_step(folder):
    """The last step with a whole checkpoint: its metadata is written last."""
    return max((step for step in range(STEPS) if (folder / str(step) / ".metadata").exists()), default=-1)


def uninterrupted(rank, folder, engine):
    run(folder, engine)


def launch(folder, engine, workers, victim, endpoint="localhost:0", nodes=1, agent=None):
    """Run workers under an agent of this process."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=nodes,
        nproc_per_node=workers,
        run_id=folder.name,
        rdzv_backend="c10d",
        rdzv_endpoint=endpoint,
        rdzv_configs={"last_call_timeout": 2, "keep_alive_interval": 1, "keep_alive_max_attempt": 3},
        max_restarts=1,
        monitor_interval=0.1,
        start_method=ranks.STARTED_BY,
    )
    ranks.start_server()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)}
    # A store of their own for each life of the workers: from a shared one they may read addresses of the dead.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    try:
        elastic_launch(config, worker)(folder, engine, victim, agent)
    finally:
        del os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"]
        for number, handler in handlers.items():
            signal.signal(number, handler)


def assert_same_run(folder, other, worlds, **bound):
    for step, world in enumerate(worlds):  # of the run in `folder`
        found, expected = (json.loads((each / f"{step}.json").read_text()) for each in (folder, other))
        assert found["world"] == world
        torch.testing.assert_close(found["loss"], expected["loss"], **bound)
    found, expected = (torch.load(each / "end.pt") for each in (folder, other))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if "key.bias" not in name or not bound["atol"]:  # its gradient is rounding alone
            torch.testing.assert_close(found[name], value, **bound, msg=name)


@pytest.fixture
def folders(tmp_path):
    made = [tmp_path / "killed-run", tmp_path / "other-run"]
    for folder in made:
        folder.mkdir()
    return made


@pytest.mark.parametrize("engine", ["fsdp", pytest.param("ddp", marks=pytest.mark.long)])
def test_a_killed_worker(engine, folders):
    killed, other = folders
    launch(killed, engine, workers=2, victim=1)
    assert (killed / "killed").exists()
    ranks.on_ranks(2, uninterrupted, other, engine)
    assert_same_run(killed, other, worlds=[2] * STEPS, rtol=0.0, atol=0.0)


def agent_of_one(folder: Path, engine: str, port: int, victim: int) -> None:
    """An agent with one worker, which kills both if it is the victim. Agents find each other at the port of the first."""
    launch(folder, engine, 1, victim, endpoint=f"localhost:{port}", nodes=2, agent=os.getpid())


@pytest.mark.long
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_lost_node(engine, folders):
    """Of two nodes with a worker each one is lost, agent and all; the other goes on alone, on the same global batches."""
    lost, other = folders
    ranks.start_server()
    context, port = multiprocessing.get_context(ranks.STARTED_BY), ranks.free_port()
    agents = [context.Process(target=agent_of_one, args=(lost, engine, port, victim)) for victim in (NOBODY, ANYBODY)]
    for agent in agents:
        agent.start()
        time.sleep(2.0)  # the first one has the store in which they meet, and survives
    for agent in agents:
        agent.join(120.0)
    assert [agent.exitcode for agent in agents] == [0, -signal.SIGKILL]
    ranks.on_ranks(2, uninterrupted, other, engine)
    # One rank adds up in another order than two; a step moves parameters a hundred times as far.
    assert_same_run(lost, other, worlds=[2] * KILLED_IN + [1] * (STEPS - KILLED_IN), rtol=0.0, atol=1e-5)
