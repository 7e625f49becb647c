"""Killed anywhere and run again, training ends in the same bits."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_examples import ARGUMENTS, BATCH, N_STEPS, READ_BY_FIT, Killed, coder, config, rows, source, weights

import vitrail.training.checkpoint as checkpoint_file
import vitrail.training.loop as loop_file
from vitrail.coders import CODERS, load_coder
from vitrail.training import read_log, train


def test_every_architecture_is_tried():
    assert set(ARGUMENTS) == set(CODERS)


@pytest.mark.parametrize("name", sorted(CODERS))
def test_killed_between_steps_it_ends_in_the_same_bits_and_the_same_log(name, tmp_path):
    train(coder(name), source(), tmp_path / "whole", config=config())
    for killed_after in (0, 4, 5, 6, 12, 22):
        out = tmp_path / f"killed_{killed_after}"
        with pytest.raises(Killed):
            train(coder(name), source(survives=READ_BY_FIT + killed_after), out, config=config())
        assert not (out / "coder.json").exists()
        resumed = train(coder(name), source(), out, config=config())
        assert resumed.resumed_at == killed_after // 5 * 5
        assert weights(out) == weights(tmp_path / "whole")
        assert (out / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()


def test_killed_again_and_again_it_ends_in_the_same_bits(tmp_path):
    train(coder(), source(), tmp_path / "whole", config=config())
    for survives in (READ_BY_FIT + 7, 7, 7, 4):
        with pytest.raises(Killed):
            train(coder(), source(survives=survives), tmp_path / "often", config=config())
    train(coder(), source(), tmp_path / "often", config=config())
    assert weights(tmp_path / "often") == weights(tmp_path / "whole")


def test_latents_that_were_dead_before_the_kill_are_dead_after_it(tmp_path):
    def with_faint_latents():
        made = coder()
        made.fit(source().stats, rows())
        with torch.no_grad():
            made.W_enc[:, ::2] *= 0.02
        return made

    plan = config(dead_window_rows=8 * BATCH, log_every=1)  # dead from step 8 on; the checkpoint is of step 10
    train(with_faint_latents(), source(), tmp_path / "whole", config=plan)
    with pytest.raises(Killed):
        train(with_faint_latents(), source(survives=12), tmp_path / "killed", config=plan)
    train(with_faint_latents(), source(), tmp_path / "killed", config=plan)
    assert read_log(tmp_path / "whole" / "log.jsonl")[10]["dead"] > 5
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


@pytest.mark.parametrize("call", [3, 4])
@pytest.mark.parametrize("where", ["write_tensors", "write_json", "_flush_folder", "_folders", "removal"])
def test_killed_while_a_checkpoint_is_written_it_continues_from_a_whole_one(where, call, tmp_path, monkeypatch):
    train(coder(), source(), tmp_path / "whole", config=config())
    out, calls = tmp_path / "out", []
    owner, name = (checkpoint_file.shutil, "rmtree") if where == "removal" else (checkpoint_file, where)
    real = getattr(owner, name)

    def dies_at_that_call(*arguments, **options):
        calls.append(arguments)
        if len(calls) == call:
            raise Killed
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dies_at_that_call)
        with pytest.raises(Killed):
            train(coder(), source(), out, config=config())
    resumed = train(coder(), source(), out, config=config())
    assert resumed.resumed_at >= 5  # there never is a moment without a whole checkpoint
    assert weights(out) == weights(tmp_path / "whole")
    assert sorted(path.name for path in out.iterdir()) == [
        "coder.json",
        "log.jsonl",
        "timing.jsonl",
        "weights.safetensors",
    ]


def test_killed_while_the_result_is_saved_it_is_saved_again(tmp_path, monkeypatch):
    train(coder("batch_topk"), source(), tmp_path / "whole", config=config())

    def dies(*arguments):
        raise Killed

    for step in ("save_coder", "remove_checkpoints"):
        with monkeypatch.context() as patch:
            patch.setattr(loop_file, step, dies)
            with pytest.raises(Killed):
                train(coder("batch_topk"), source(), tmp_path / "out", config=config())
    train(coder("batch_topk"), source(), tmp_path / "out", config=config())
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert not list((tmp_path / "out").glob("*checkpoint*"))


SCRIPT = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {here!r})
from training_examples import InterruptedSource, coder, config, source
from vitrail.training import train

class Suicidal(InterruptedSource):
    def __iter__(self):
        for x in super().__iter__():
            if self.survives == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            yield x

rows = source(survives=float(sys.argv[2]))
rows.__class__ = Suicidal
train(coder("batch_topk"), rows, Path(sys.argv[1]), config=config())
"""


def test_a_process_killed_with_signal_9_and_started_again_ends_in_the_same_bits(tmp_path):
    train(coder("batch_topk"), source(), tmp_path / "whole", config=config())
    script = SCRIPT.format(here=str(Path(__file__).parent))
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }

    def run(survives: str) -> int:
        command = [sys.executable, "-c", script, str(tmp_path / "out"), survives]
        return subprocess.run(command, env=environment, check=False).returncode

    assert run(str(READ_BY_FIT + 13)) == -signal.SIGKILL
    assert [path.name for path in tmp_path.joinpath("out").glob("checkpoint-*")] == ["checkpoint-000000010"]
    assert run("inf") == 0
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_a_finished_run_returns_at_once(tmp_path):
    first = train(coder(), source(), tmp_path, config=config())
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = train(coder(), source(survives=0), tmp_path, config=config())  # this source would raise if it were read
    assert (again.steps, again.rows, again.last) == (first.steps, first.rows, first.last)
    assert torch.equal(again.coder.W_dec, first.coder.W_dec)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("finished", [True, False])
def test_another_request_in_the_same_folder_is_refused_by_the_name_of_what_differs(finished, tmp_path):
    if finished:
        train(coder(), source(), tmp_path, config=config())
    else:
        with pytest.raises(Killed):
            train(coder(), source(survives=READ_BY_FIT + 8), tmp_path, config=config())
    with pytest.raises(ValueError, match=r"config\.lr was 0\.003, now 0\.5"):
        train(coder(), source(), tmp_path, config=config(lr=0.5))
    with pytest.raises(ValueError, match=r"source\.identity was"):
        train(coder(), source(batch_size=8), tmp_path, config=config())
    with pytest.raises(ValueError, match=r"coder\.k was 3, now 4"):
        train(coder(k=4), source(), tmp_path, config=config())
    with pytest.raises(ValueError, match="architecture was 'topk', now 'relu'"):
        train(coder("relu"), source(), tmp_path, config=config())


def test_a_checkpoint_of_another_version_or_a_cut_one_is_named(tmp_path):
    with pytest.raises(Killed):
        train(coder(), source(survives=READ_BY_FIT + 8), tmp_path, config=config())
    folder = tmp_path / "checkpoint-000000005"
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "version": 99}))
    with pytest.raises(ValueError, match="version 99"):
        train(coder(), source(), tmp_path, config=config())
    (folder / "state.json").write_text(json.dumps(state))
    tensors = (folder / "tensors.safetensors").read_bytes()
    (folder / "tensors.safetensors").write_bytes(tensors[:-100])
    with pytest.raises(ValueError, match=r"checkpoint-000000005/tensors\.safetensors is cut short"):
        train(coder(), source(), tmp_path, config=config())


def test_an_uninterrupted_run_is_the_same_twice_and_leaves_the_callers_random_state_alone(tmp_path):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = train(coder(), source(), tmp_path / "a", config=config())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    train(coder(), source(), tmp_path / "b", config=config())
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert (first.steps, first.rows) == (first.last["step"], N_STEPS * BATCH - 5)
    assert read_log(tmp_path / "a" / "log.jsonl")[-1] == first.last
    assert torch.equal(load_coder(tmp_path / "a").W_enc, first.coder.W_enc)
