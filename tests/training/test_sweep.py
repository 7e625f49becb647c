"""A sweep's coders are the coders that `train` makes of them alone, whatever happens in between."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_examples import BATCH, D_IN, D_SAE, Killed, config, rows, source, weights

import vitrail.training.loop as loop_file
from vitrail.coders import load_coder, make_coder
from vitrail.metrics.reconstruction import fvu
from vitrail.training import Grid, TensorSource, sweep, train
from vitrail.training.grid import cell_name, estimated_cost
from vitrail.training.sweep import read_results

GRID = Grid(
    architectures=("topk", "batch_topk", "relu"),
    d_saes=(D_SAE, 2 * D_IN),
    arguments={"k": (3,), "l1": (0.2,)},
    lrs=(3e-3,),
    seeds=(0, 1),
)
SMALL = Grid(architectures=("topk", "batch_topk"), d_saes=(D_SAE,), arguments={"k": (3,)}, lrs=(3e-3, 1e-3))


def held_out():
    return list((rows(200) + 0.1).split(64))


def alone(grid, out, names=None, **changes):
    """Every cell of the grid by `train`, on a source of its own."""
    for cell in grid.cells(D_IN):
        if names is None or cell.name in names:
            plan = config(**{"lr": cell.lr, "seed": cell.seed, **changes})
            given = make_coder(cell.architecture, d_in=D_IN, **cell.arguments)
            train(given, source(), out / cell.name, config=plan, held_out=held_out())


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """SMALL's coders, each trained alone."""
    out = tmp_path_factory.mktemp("small")
    alone(SMALL, out)
    return out


def same_coders(one, other, grid=SMALL):
    for cell in grid.cells(D_IN):
        assert weights(one / cell.name) == weights(other / cell.name), cell.name
        assert (one / cell.name / "log.jsonl").read_bytes() == (other / cell.name / "log.jsonl").read_bytes(), cell.name


def test_every_coder_is_to_the_bit_what_train_makes_of_it_alone(tmp_path):
    result = sweep(GRID, source(), tmp_path / "sweep", config=config(), held_out=held_out())
    alone(GRID, tmp_path)
    assert [row["state"] for row in result.rows] == ["finished"] * (3 * 2 * 2)  # architectures, widths, seeds
    same_coders(tmp_path / "sweep", tmp_path, GRID)
    for cell in GRID.cells(D_IN):
        folder = tmp_path / "sweep" / cell.name
        assert {path.name for path in folder.iterdir()} == {path.name for path in (tmp_path / cell.name).iterdir()}
        told, expected = (json.loads((at / "coder.json").read_text()) for at in (folder, tmp_path / cell.name))
        assert told["config"] == expected["config"]
        assert told["metadata"]["calibration"] == expected["metadata"]["calibration"]
        assert told["metadata"]["training"]["request"] == expected["metadata"]["training"]["request"]


def test_stepped_at_the_same_time_they_come_out_the_same(tmp_path):
    sweep(GRID, source(), tmp_path / "one", config=config(), held_out=held_out())
    threads = torch.get_num_threads()
    sweep(GRID, source(), tmp_path / "three", config=config(), held_out=held_out(), workers=3)
    assert torch.get_num_threads() == threads
    same_coders(tmp_path / "one", tmp_path / "three", GRID)


def test_without_held_out_rows_thresholds_come_from_the_rows_that_train_takes(tmp_path):
    sweep(SMALL, source(), tmp_path / "sweep", config=config())
    for cell in SMALL.cells(D_IN):
        given = make_coder(cell.architecture, d_in=D_IN, **cell.arguments)
        train(given, source(), tmp_path / cell.name, config=config(lr=cell.lr))
    same_coders(tmp_path / "sweep", tmp_path)


def test_every_batch_is_read_once_and_normalised_once(tmp_path, monkeypatch):
    from vitrail.coders.normalize import MeanStd

    calls = []
    own = MeanStd.forward

    def counted(self, x):
        calls.append(len(x))
        return own(self, x)

    monkeypatch.setattr(MeanStd, "forward", counted)

    class Counted(TensorSource):
        given = 0

        def __iter__(self):
            for x in super().__iter__():
                self.given += 1
                yield x

    read = Counted(rows(), batch_size=BATCH, seed=2)
    sweep(SMALL, read, tmp_path, config=config(revive="none"), held_out=held_out())
    n_batches = 25  # 23 * 32 - 5 rows in epochs of 300, which end in a batch of 12
    assert read.given == n_batches  # and nothing again for the four coders' starting points
    assert len(calls) == n_batches + len(held_out())


def test_the_random_state_is_each_coders_own_and_the_callers_is_left_alone(tmp_path, monkeypatch):
    from vitrail.coders import TopK

    own = TopK.loss

    def noisy(self, x):
        return own(self, x + 0.1 * torch.randn(len(x), 1))

    monkeypatch.setattr(TopK, "loss", noisy)
    grid = Grid(architectures=("topk",), d_saes=(D_SAE,), arguments={"k": (3,)}, lrs=(3e-3,), seeds=(0, 1))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    sweep(grid, source(), tmp_path / "sweep", config=config(), held_out=held_out())
    assert torch.equal(before, torch.get_rng_state())
    alone(grid, tmp_path)
    same_coders(tmp_path / "sweep", tmp_path, grid)
    with pytest.raises(RuntimeError, match="workers=1"):
        sweep(grid, source(), tmp_path / "threads", config=config(), held_out=held_out(), workers=2)
    sweep(grid, source(), tmp_path / "threads", config=config(), held_out=held_out())
    same_coders(tmp_path / "threads", tmp_path, grid)


@pytest.mark.parametrize("killed_after", [3, 10, 14, 15, 16, 24])  # the first: while the coders are fitted
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_between_steps_it_ends_in_the_same_bits(killed_after, workers, small, tmp_path):
    with pytest.raises(Killed):
        sweep(SMALL, source(survives=killed_after), tmp_path / "out", config=config(), workers=workers)
    sweep(SMALL, source(), tmp_path / "out", config=config(), held_out=held_out(), workers=workers)
    same_coders(tmp_path / "out", small)


@pytest.mark.parametrize("call", [2, 3, 5, 8])
def test_killed_between_two_coders_checkpoints_the_later_waits_for_the_earlier(call, small, tmp_path, monkeypatch):
    real, calls = loop_file.write_checkpoint, []

    def dies_at_that_call(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            raise Killed
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop_file, "write_checkpoint", dies_at_that_call)
        with pytest.raises(Killed):
            sweep(SMALL, source(), tmp_path / "out", config=config(), held_out=held_out())
    sweep(SMALL, source(), tmp_path / "out", config=config(), held_out=held_out())
    same_coders(tmp_path / "out", small)


SCRIPT = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {here!r})
import test_sweep
import vitrail.training.loop as loop_file
from training_examples import config, source

what, at = sys.argv[2], int(sys.argv[3])
real, calls = getattr(loop_file, what), []

def dies_at_that_call(*arguments):
    calls.append(arguments)
    if len(calls) == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)

setattr(loop_file, what, dies_at_that_call)
test_sweep.sweep(test_sweep.SMALL, source(), sys.argv[1], config=config(), held_out=test_sweep.held_out())
"""


def test_a_process_killed_with_signal_9_and_started_again_ends_in_the_same_bits(small, tmp_path):
    script = SCRIPT.format(here=str(Path(__file__).parent))
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }

    def run(what: str, at: int) -> int:
        command = [sys.executable, "-c", script, str(tmp_path / "out"), what, str(at)]
        return subprocess.run(command, env=environment, check=False).returncode

    assert run("write_checkpoint", 7) == -signal.SIGKILL  # two of four coders are at step 10, two at step 5
    steps = sorted(path.name for path in (tmp_path / "out").glob("*/checkpoint-*"))
    assert steps == ["checkpoint-000000005"] * 2 + ["checkpoint-000000010"] * 2
    assert run("save_coder", 3) == -signal.SIGKILL  # two coders are finished
    assert len(list((tmp_path / "out").glob("*/coder.json"))) == 2
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/weights.safetensors")}
    assert run("save_coder", -1) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    same_coders(tmp_path / "out", small)
    assert [row["state"] for row in read_results(tmp_path / "out/results.jsonl")] == ["finished"] * 4


def test_a_finished_sweep_returns_at_once(tmp_path):
    kept = TensorSource(rows(200) + 0.1, batch_size=64)
    first = sweep(SMALL, source(), tmp_path, config=config(), held_out=kept)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*")}

    class Unread(TensorSource):
        def __iter__(self):
            raise AssertionError("these rows were measured on before")

    # This source would raise if it were read.
    unread = Unread(rows(200) + 0.1, batch_size=64)
    again = sweep(SMALL, source(survives=0), tmp_path, config=config(), held_out=unread)
    assert again == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*")} == before


def test_a_larger_grid_trains_what_is_new_and_keeps_what_is_there(tmp_path):
    sweep(SMALL, source(), tmp_path / "out", config=config(), held_out=held_out())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/weights.safetensors")}
    larger = Grid(architectures=("topk", "relu"), d_saes=(D_SAE,), arguments={"k": (3, 4), "l1": (0.2,)}, lrs=(3e-3,))
    result = sweep(larger, source(), tmp_path / "out", config=config(), held_out=held_out())
    assert {path: path.stat().st_mtime_ns for path in before} == before
    alone(larger, tmp_path)
    same_coders(tmp_path / "out", tmp_path, larger)
    assert [row["name"] for row in result.rows] == [cell.name for cell in larger.cells(D_IN)]
    named = {row["name"] for row in read_results(tmp_path / "out/results.jsonl")}
    assert named == {cell.name for grid in (SMALL, larger) for cell in grid.cells(D_IN)}
    declared = json.loads((tmp_path / "out/sweep.json").read_text())
    assert set(declared["cells"]) == named
    assert declared["grid"]["architectures"] == ["topk", "relu"]


def test_another_request_for_a_cell_that_is_there_is_refused_before_anything_is_trained(tmp_path):
    sweep(SMALL, source(), tmp_path, config=config(), held_out=held_out())
    larger = Grid(architectures=("topk", "batch_topk"), d_saes=(D_SAE,), arguments={"k": (3, 4)}, lrs=(3e-3, 1e-3))
    with pytest.raises(ValueError, match=r"config\.warmup_steps was 4, now 2"):
        sweep(larger, source(), tmp_path, config=config(warmup_steps=2), held_out=held_out())
    with pytest.raises(ValueError, match=r"source\.identity was"):
        sweep(larger, source(batch_size=8), tmp_path, config=config(), held_out=held_out())
    assert len(list(tmp_path.glob("*/log.jsonl"))) == 4


@pytest.mark.parametrize("workers", [1, 2])
def test_a_coder_that_is_no_longer_finite_stops_and_the_others_go_on(workers, tmp_path):
    grid = Grid(architectures=("relu",), d_saes=(D_SAE,), arguments={"l1": (0.2, 1e38)}, lrs=(3e-3,))
    good, bad = (cell.name for cell in grid.cells(D_IN))
    result = sweep(grid, source(), tmp_path / "out", config=config(), held_out=held_out(), workers=workers)
    assert set(result.stopped) == {bad}
    assert "is inf at step" in result.stopped[bad]
    assert [row["state"] for row in result.rows] == ["finished", "stopped"]
    assert result.rows[1]["error"] == result.stopped[bad]
    alone(grid, tmp_path, names=[good])
    assert weights(tmp_path / "out" / good) == weights(tmp_path / good)
    again = sweep(grid, source(survives=0), tmp_path / "out", config=config(), held_out=held_out(), workers=workers)
    assert again.stopped == result.stopped


def test_the_table_says_what_the_coders_do_on_held_out_rows(tmp_path):
    result = sweep(SMALL, source(), tmp_path, config=config(), held_out=held_out())
    x = torch.cat(held_out())
    for row in result.rows:
        coder = load_coder(tmp_path / row["name"])
        with torch.no_grad():
            codes = coder.encode_sparse(x)
            x_hat = coder.decode_sparse(codes)
        assert row["held_out_fvu"] == pytest.approx(fvu(x, x_hat), rel=1e-4)
        assert row["held_out_l0"] == pytest.approx(codes.nnz / len(x), rel=0.01)
        assert (row["held_out_rows"], row["d_sae"], row["k"], row["seed"]) == (200, D_SAE, 3, 0)
        assert row["fvu"] == json.loads((tmp_path / row["name"] / "log.jsonl").read_text().splitlines()[-1])["fvu"]
        assert row["seconds"] > 0
    with (tmp_path / "results.csv").open() as stream:
        sheet = list(csv.DictReader(stream))
    assert [line["name"] for line in sheet] == [row["name"] for row in result.rows]
    assert [float(line["held_out_fvu"]) for line in sheet] == [row["held_out_fvu"] for row in result.rows]


def test_held_out_rows_beyond_the_budget_are_read_again_and_give_the_same(tmp_path, monkeypatch):
    kept = sweep(SMALL, source(), tmp_path / "kept", config=config(), held_out=TensorSource(rows(200), batch_size=64))
    monkeypatch.setitem(sweep.__globals__, "HELD_OUT_BYTES", 1000)
    read = sweep(SMALL, source(), tmp_path / "read", config=config(), held_out=TensorSource(rows(200), batch_size=64))
    same_coders(tmp_path / "kept", tmp_path / "read")
    for one, other in zip(kept.rows, read.rows, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_names_say_what_the_coder_is_whatever_grid_it_stands_in():
    assert cell_name("topk", 64, {"d_sae": 512, "k": 32, "seed": 0}, 5e-4) == "topk-x8-k32-lr0.0005-s0"
    assert cell_name("topk", 64, {"d_sae": 512, "seed": 0}, 5e-4) == "topk-x8-k32-lr0.0005-s0"
    assert cell_name("topk", 64, {"d_sae": 512, "normalization": "mean_std", "seed": 0}, 5e-4).count("-") == 4
    assert cell_name("relu", 64, {"d_sae": 500, "l1": 0.5, "seed": 3}, 1e-5) == "relu-d500-l1_0.5-lr1e-05-s3"
    given = {"d_sae": 512, "ks": [1, 3, 9], "weighting": "uniform", "seed": 0}
    assert cell_name("matryoshka", 64, given, 1e-3) == "matryoshka-x8-ks1.3.9-weighting_uniform-lr0.001-s0"
    assert len({cell.name for cell in GRID.cells(D_IN)}) == 12


def test_what_a_coder_takes_is_known_before():
    (cell,) = Grid(architectures=("topk",), d_saes=(D_SAE,), arguments={"k": (3,)}).cells(D_IN)
    cost = estimated_cost(cell, D_IN, batch_size=10)
    assert cost.parameters == 2 * D_IN * D_SAE + D_SAE + D_IN
    assert cost.held_bytes == 16 * cost.parameters  # weights, gradients and two moments in fp32
    assert cost.step_flops == 2 * 10 * D_IN * D_SAE + 8 * 10 * D_IN * 3 + 12 * cost.parameters


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"architectures": ("topp",)}, "no coder architecture 'topp'"),
        ({"architectures": ("topk_transcoder",)}, "a sweep reads one hook point and topk_transcoder needs several"),
        ({"architectures": ("topk", "crosscoder")}, "and crosscoder needs several"),
        ({"arguments": {"l1": (1,)}}, "none of topk takes 'l1'"),
        ({"arguments": {"k": ()}}, "no values for k"),
        ({"lrs": ()}, "the grid has no lrs"),
        ({"arguments": {"seed": (1,)}}, "none of topk takes 'seed'"),
    ],
)
def test_impossible_grids_are_named(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        Grid(**{"architectures": ("topk",), **changes}).cells(D_IN)


def test_progress_shows_the_best_and_the_worst(tmp_path):
    notes = []

    class Watched:
        def task(self, title, total, unit, done=0):
            notes.append(title)
            return self

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def advance(self, n, note=""):
            notes.append(note)

    sweep(SMALL, source(), tmp_path, config=config(n_rows=70), held_out=held_out(), progress=Watched())
    assert notes[0] == "training 4 coders"
    fvu_then = [row["fvu"] for row in read_results(tmp_path / "results.jsonl")]
    assert notes[3].startswith(f"fvu {min(fvu_then):.3f} (")
    assert f"to {max(fvu_then):.3f} (" in notes[3]
    assert math.isfinite(max(fvu_then))
