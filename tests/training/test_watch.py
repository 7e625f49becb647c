"""Watching a run changes nothing in it."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from training_examples import BATCH, Killed, coder, config, source, weights

from vitrail.coders import coder_metadata
from vitrail.training import read_log, train
from vitrail.training.watch import SINKS, flat

PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}


class Recorder:
    """Stands in for all three packages, and remembers."""

    def __init__(self):
        self.opened, self.lines, self.closed = [], {}, 0

    def module(self, name):
        made = ModuleType(name)

        def log(numbers, step):
            self.lines.setdefault(step, {}).update(numbers)

        def finish():
            self.closed += 1

        def init(**options):
            self.opened.append(options)
            return SimpleNamespace(log=log, finish=finish)

        def writer(**options):
            self.opened.append(options)
            return SimpleNamespace(
                add_scalar=lambda key, value, global_step: log({key: value}, global_step), close=finish
            )

        made.init, made.log, made.finish, made.SummaryWriter = init, log, finish, writer
        return made


@pytest.fixture
def recorder(monkeypatch):
    made = Recorder()
    for module in PACKAGES.values():
        monkeypatch.setitem(sys.modules, module, made.module(module))
    return made


def test_a_line_made_flat_by_hand():
    line = {"loss": 2.5, "terms": {"l1": 1, "reconstruction": 1.5}, "fvu": None, "density": {"never": 3, "counts": [1]}}
    assert flat(line) == {"loss": 2.5, "terms/l1": 1, "terms/reconstruction": 1.5, "density/never": 3}


@pytest.mark.parametrize("sink", sorted(SINKS))
def test_a_sink_gets_every_line_and_is_closed(sink, recorder, tmp_path):
    train(coder(), source(), tmp_path / "run", config=config(watch=(sink,)))
    log = read_log(tmp_path / "run" / "log.jsonl")
    assert list(recorder.lines) == [line["step"] for line in log]
    for line in log:
        seen = recorder.lines[line["step"]]
        assert seen["loss"] == line["loss"]
        assert seen["terms/reconstruction"] == line["terms"]["reconstruction"]
        assert seen["dead_share"] == line["dead_share"]
        assert seen["rows_per_s"] > 0
        assert seen["memory_mb"] > 10
    assert (len(recorder.opened), recorder.closed) == (1, 1)


def test_a_resumed_run_is_the_same_run_there(recorder, tmp_path):
    every = tuple(SINKS)
    with pytest.raises(Killed):
        train(coder(), source(23), tmp_path / "run", config=config(watch=every))
    assert recorder.closed == 3  # closed however it ends
    train(coder(), source(), tmp_path / "run", config=config(watch=every))
    before, after = recorder.opened[:3], recorder.opened[3:]
    assert [options.get("purge_step") for options in before + after] == [None, None, None, 11, None, None]
    assert before[1]["id"] == after[1]["id"] == before[2]["name"] == after[2]["name"]
    assert before[1]["id"].startswith("run-")
    assert [options.get("resume") for options in after] == [None, "allow", "allow"]


def test_watching_shapes_nothing_and_may_change_between_sittings(recorder, tmp_path):
    train(coder(), source(), tmp_path / "whole", config=config())
    with pytest.raises(Killed):
        train(coder(), source(23), tmp_path / "run", config=config())
    resumed = train(coder(), source(), tmp_path / "run", config=config(watch=("wandb",), checkpoint_every=7))
    assert resumed.resumed_at == 10
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()
    train(coder(), source(survives=0), tmp_path / "run", config=config(watch=("trackio",)))  # finished: at once
    assert coder_metadata(tmp_path / "run")["training"]["request"]["config"]["watch"] == ["wandb"]


def test_a_request_from_before_an_option_existed_is_one_for_its_default(tmp_path):
    train(coder(), source(), tmp_path, config=config())
    described = json.loads((tmp_path / "coder.json").read_text())
    for name in ("accumulate", "compute_dtype", "watch"):
        del described["metadata"]["training"]["request"]["config"][name]
    (tmp_path / "coder.json").write_text(json.dumps(described))
    train(coder(), source(survives=0), tmp_path, config=config())
    with pytest.raises(ValueError, match="accumulate was 1, now 2"):
        train(coder(), source(), tmp_path, config=config(accumulate=2))


@pytest.mark.parametrize("sink", sorted(SINKS))
def test_a_missing_package_is_named(sink, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, PACKAGES[sink], None)
    with pytest.raises(ImportError, match=rf"pip install 'vitrail\[{sink}\]'"):
        train(coder(), source(), tmp_path, config=config(watch=(sink,)))


def test_clocks_are_kept_in_a_file_of_their_own(tmp_path):
    with pytest.raises(Killed):
        train(coder(), source(23), tmp_path, config=config())
    train(coder(), source(), tmp_path, config=config())
    log, timing = (read_log(tmp_path / f"{name}.jsonl") for name in ("log", "timing"))
    assert [line["step"] for line in timing] == [line["step"] for line in log]
    assert [line["rows"] for line in timing] == [line["rows"] for line in log]
    assert all(set(line) == {"step", "rows", "rows_per_s", "memory_mb"} for line in timing)
    assert not {"rows_per_s", "memory_mb"} & set(log[0])


def test_throughput_by_hand(tmp_path, monkeypatch):
    # Half a second passes at each look at the clock; lines are of steps 1 and 2, of 32 rows each: 64 rows a second.
    from vitrail.training import watch

    clock = iter(range(1000))
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: next(clock) / 2))
    train(coder(), source(), tmp_path, config=config(n_rows=2 * BATCH, log_every=1))
    assert [line["rows_per_s"] for line in read_log(tmp_path / "timing.jsonl")] == [64, 64]


def test_tensorboard_itself_reads_what_was_written(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(Killed):
        train(coder(), source(23), tmp_path, config=config(watch=("tensorboard",)))
    train(coder(), source(), tmp_path, config=config(watch=("tensorboard",)))
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    told = {event.step: event.value for event in read.Scalars("loss")}
    log = read_log(tmp_path / "log.jsonl")
    assert list(told) == [line["step"] for line in log]
    for line in log:
        assert told[line["step"]] == pytest.approx(line["loss"], rel=1e-6)
    assert torch.tensor([event.value for event in read.Scalars("rows_per_s")]).gt(0).all()
