"""metrics.jsonl, wandb and TensorBoard: each record once, whatever was killed; and none of them can hurt the run."""

import json
import math
import os
import sys
from types import ModuleType

import pytest

from nanogpt.config import Config
from nanogpt.trackers import Trackers, flat


@pytest.fixture
def make(tmp_path):
    """(trackers of a run that goes on after a step, what they have said)."""
    def make(first_step=0, **log):
        said = []
        config = Config.model_validate(dict(run=dict(dir=str(tmp_path), name="x"), log=log))
        return Trackers(config, first_step, said.append), said
    return make


def record(step, **more):
    return dict(step=step, loss=5 - step / 100, mfu=None, skipped_steps=[3, 4], **{"health/dead_units": [0.25, 0.5]}) | more


def steps(tmp_path):
    return [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


class FakeWandb(ModuleType):
    """wandb as we use it, which fails where it is told to."""

    def __init__(self, fails_at=None):
        super().__init__("wandb")
        self.fails_at, self.logged, self.started = fails_at, [], []

    def _may_fail(self, at):
        if at == self.fails_at:
            raise ConnectionError("no route\nto host")

    def init(self, **options):
        self._may_fail("init")
        self.started.append(options)
        return self

    def log(self, scalars, step):
        self.logged.append((step, scalars))
        self._may_fail(step)

    def finish(self):
        self._may_fail("finish")


@pytest.fixture
def wandb(monkeypatch):
    def use(fails_at=None):
        fake = FakeWandb(fails_at)
        monkeypatch.setitem(sys.modules, "wandb", fake)
        return fake
    return use


@pytest.mark.parametrize("fails_at, logged, said", [
    (None, 4, None), ("init", 0, "warning: wandb is off for this run (ConnectionError: no route to host)"),
    (2, 2, "warning: wandb is off from here on (ConnectionError: no route to host)"),
    ("finish", 4, "warning: wandb did not finish (ConnectionError: no route to host)")])
def test_wandb_that_raises(tmp_path, make, wandb, fails_at, logged, said):
    fake = wandb(fails_at)
    trackers, told = make(wandb="online")
    for step in range(1, 5):
        trackers.log(record(step))
    assert trackers.close() is None
    assert told == [said] * (said is not None) and len(fake.logged) == logged
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_wandb_goes_on_with_the_same_id(make, wandb):
    fake = wandb()
    for _ in range(2):
        trackers, _ = make(wandb="online", wandb_project="p")
        trackers.log(record(7))
        trackers.close()
    make(wandb="offline")
    one, two, offline = fake.started
    assert one == two and one["id"] == offline["id"] and len(one["id"]) == 12
    assert (one["resume"], one["mode"], one["project"], one["name"]) == ("allow", "online", "p", "x")
    assert (offline["resume"], offline["mode"]) == (None, "offline")
    scalars = {"step": 7, "loss": 4.93, "skipped_steps": 2, "health/dead_units/0": 0.25, "health/dead_units/1": 0.5}
    assert fake.logged == [(7, scalars)] * 2


def test_wandb_without_wandb(tmp_path, make, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    trackers, told = make(wandb="online")
    trackers.log(record(1))
    assert len(told) == 1 and told[0].startswith("warning: wandb is off for this run (ModuleNotFoundError: ")
    assert steps(tmp_path) == [1]


def events(folder) -> dict[str, list]:
    """{tag: [(step, value), …]} as TensorBoard itself reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    found = EventAccumulator(str(folder), size_guidance=dict(scalars=0)).Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_shows_no_step_twice(tmp_path, make):
    killed, _ = make(tensorboard=True)
    for step in range(1, 11):
        killed.log(record(step))  # and is never closed
    again, told = make(first_step=6, tensorboard=True)
    for step in range(7, 13):
        again.log(record(step, loss=1.0 if step != 9 else math.nan))
    assert again.close() is None and told == []
    found = events(tmp_path / "tensorboard")
    assert found.keys() == {"loss", "skipped_steps", "health/dead_units/0", "health/dead_units/1"}
    assert [step for step, _ in found["loss"]] == list(range(1, 13)) == steps(tmp_path)
    assert [value for _, value in found["loss"]] == pytest.approx(
        [5 - step / 100 for step in range(1, 7)] + [1.0, 1.0, math.nan, 1.0, 1.0, 1.0], nan_ok=True)
    assert set(found["health/dead_units/1"]) == {(step, 0.5) for step in range(1, 13)}


def test_folders_that_are_not_writable(tmp_path, make, wandb):
    """A file is where a folder should be, a folder where a file should be."""
    fake = wandb()
    (tmp_path / "tensorboard").write_text("")
    (tmp_path / "wandb_id").mkdir()
    trackers, told = make(wandb="offline", tensorboard=True)
    trackers.log(record(1))
    assert trackers.close() is None and steps(tmp_path) == [1] and fake.started == []
    assert [line.partition(" (")[0] for line in told] == [
        f"warning: {name} is off for this run" for name in ("wandb", "tensorboard")]


def test_tensorboard_whose_disk_fails_later(tmp_path, make, monkeypatch):
    trackers, told = make(tensorboard=True)
    trackers.log(record(1))
    monkeypatch.setattr(trackers.others["tensorboard"].writer, "add_scalar", lambda *a: (_ for _ in ()).throw(OSError(28, "No space")))
    for step in (2, 3):
        trackers.log(record(step))
    assert trackers.close() is None and steps(tmp_path) == [1, 2, 3]
    assert told == ["warning: tensorboard is off from here on (OSError: [Errno 28] No space)"]


def test_metrics_that_cannot_be_written_to_their_end_are_told(tmp_path, make, monkeypatch, capsys):
    trackers, _ = make()
    trackers.log(record(1))
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    trackers.log(record(2))
    trackers.log(record(3))
    assert capsys.readouterr().err.count("metrics.jsonl: cannot be written (No space left on device)") == 1  # once
    monkeypatch.setattr(os, "write", write)
    trackers.log(record(4))
    assert steps(tmp_path) == [1, 2, 3, 4] and trackers.close() is None


def test_what_is_flat():
    assert flat({"health/x": [1.0] * 11}).keys() == {f"health/x/{i:02}" for i in range(11)}
    assert flat(dict(step=1, loss=None, name="x", loss_spikes=[7])) == dict(step=1, loss_spikes=1)


def test_no_record_is_nan_in_json(tmp_path, make):
    trackers, _ = make()
    trackers.log({"step": 1, "loss": math.nan, "health/x": [1.0, math.inf]})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null, "health/x": [1.0, null]}\n'
