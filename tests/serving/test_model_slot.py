"""The app in this process while its run writes and deletes checkpoints."""

import asyncio
import threading

import pytest

from tests.serving.services import SLOW, at_work, write_checkpoint
from yuzogpt import checkpoints
from yuzogpt.serving import model_slot


def test_if_the_run_deletes_a_checkpoint_while_it_loads_the_next_one_is_loaded(
    tmp_path, monkeypatch
):
    """The step that is reported is the one that was loaded."""
    mine = tmp_path / "run"
    write_checkpoint(mine, 20, 2.0, **SLOW)
    load = model_slot.load_engine

    def slowly(reference, *arguments, **options):
        if reference.checkpoint.state.step == 20:
            write_checkpoint(mine, 40, 1.9, seed=2, **SLOW)
            checkpoints.remove(mine / "checkpoints" / "step-20")
        return load(reference, *arguments, **options)

    monkeypatch.setattr(model_slot, "load_engine", slowly)

    async def check() -> None:
        async with at_work(mine) as app:
            assert app.state.manager.current.step == 40

    asyncio.run(check())
    assert [path.name for path in checkpoints.candidates(mine)] == ["step-40"]


def polls(manager) -> "asyncio.Queue[None]":
    """Return a queue that grows with every finished poll of the run."""
    finished = asyncio.Queue()
    manager.after_poll = lambda: finished.put_nowait(None)
    return finished


async def next_whole_poll(finished) -> None:
    """Wait until a poll that starts from now on has finished: the next one may have started."""
    while not finished.empty():
        finished.get_nowait()
    await finished.get()
    await finished.get()


FOLLOWING = "--follow", "--follow_interval=0.05"


@pytest.mark.slow
def test_worse_weights_are_not_taken_even_when_the_best_are_deleted(tmp_path):
    mine = tmp_path / "run"
    write_checkpoint(mine, 20, 2.0, **SLOW)

    async def check() -> None:
        async with at_work(mine, *FOLLOWING) as app:
            manager = app.state.manager
            polled = polls(manager)
            write_checkpoint(mine, 40, 2.5, seed=2, **SLOW)
            checkpoints.remove(mine / "checkpoints" / "step-20")
            await next_whole_poll(polled)
            assert manager.current.step == 20
            write_checkpoint(mine, 60, 1.8, seed=3, **SLOW)
            while manager.current.step != 60:
                await polled.get()
            checkpoints.remove(mine / "checkpoints" / "step-60")
            write_checkpoint(mine, 80, 1.85, seed=4, **SLOW)
            await next_whole_poll(polled)
            assert manager.current.step == 60

    asyncio.run(asyncio.wait_for(check(), 60))


@pytest.mark.slow
def test_a_transient_error_is_reported_once_and_loading_is_tried_again(
    tmp_path, monkeypatch, capfd
):
    """Out of memory for the best: the second best is served until there is enough."""
    mine = tmp_path / "run"
    write_checkpoint(mine, 20, 2.0, **SLOW)
    load, is_out_of_memory = model_slot.load_engine, True

    def load_engine(reference, *arguments, **options):
        if is_out_of_memory and reference.checkpoint.state.step == 40:
            raise MemoryError
        return load(reference, *arguments, **options)

    monkeypatch.setattr(model_slot, "load_engine", load_engine)

    async def check() -> None:
        nonlocal is_out_of_memory
        async with at_work(mine, *FOLLOWING) as app:
            manager = app.state.manager
            polled = polls(manager)
            write_checkpoint(mine, 40, 1.5, seed=2, **SLOW)
            write_checkpoint(mine, 60, 1.9, seed=3, **SLOW)
            while manager.current.step != 60:
                await polled.get()
            await next_whole_poll(polled)
            is_out_of_memory = False
            while manager.current.step != 40:
                await polled.get()
            # Failed and retired engines leave no thread behind.
            while sum(thread.name.startswith("engine") for thread in threading.enumerate()) > 1:
                await polled.get()

    asyncio.run(asyncio.wait_for(check(), 60))
    assert capfd.readouterr().err.count("step-40: MemoryError") == 1


@pytest.mark.slow
def test_a_checkpoint_that_is_deleted_while_it_is_verified_is_not_called_corrupt(
    tmp_path, monkeypatch, capfd
):
    mine = tmp_path / "run"
    write_checkpoint(mine, 20, 2.0, **SLOW)

    async def check() -> None:
        async with at_work(mine, *FOLLOWING) as app:
            polled, verify = polls(app.state.manager), checkpoints.verify
            was_gone = asyncio.Event()
            loop = asyncio.get_running_loop()

            def late(checkpoint, **options):
                if checkpoint.name == "step-40":
                    checkpoints.remove(checkpoint.local)
                    loop.call_soon_threadsafe(was_gone.set)
                return verify(checkpoint, **options)

            better = write_checkpoint(tmp_path / "elsewhere", 40, 1.5, seed=2, **SLOW)
            monkeypatch.setattr(checkpoints, "verify", late)
            better.rename(mine / "checkpoints" / "step-40")
            await was_gone.wait()
            await next_whole_poll(polled)
            assert app.state.manager.current.step == 20

    asyncio.run(asyncio.wait_for(check(), 60))
    assert capfd.readouterr().err == ""
