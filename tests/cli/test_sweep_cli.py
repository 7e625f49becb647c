"""`vitrail sweep` as a person types it."""

import json
import xml.etree.ElementTree as ET

import pytest
from PIL import Image

from vitrail.cli import main
from vitrail.cli.sweep import TICK_ROOM, Grid, _Axis, grid_of, options, pareto_front, parsed
from vitrail.coders import load_coder

POINT = "blocks.1.hook_resid_post"


def say(capsys, *arguments):
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "store"
    main(
        ["extract", "world:shapes?n=48", str(out), "--backbone", "toy/shapes", "--points", POINT]
        + ["--workers", "0", "--device", "cpu"]
    )
    return out


SMALL = ["--architecture", "topk", "relu", "--d-sae", 128, 256, "--k", 4, 8, "--l1", 0.5, "--lr", "1e-3"]
SMALL += ["--batch-size", 512, "--device", "cpu"]


def test_a_grid_becomes_coders_a_table_and_a_picture(store, capsys, tmp_path):
    told = say(capsys, "sweep", store, tmp_path, *SMALL)
    names = ["topk-x1-k4-lr0.001-s0", "topk-x1-k8-lr0.001-s0", "topk-x2-k4-lr0.001-s0", "topk-x2-k8-lr0.001-s0"]
    names += ["relu-x1-l1_0.5-lr0.001-s0", "relu-x2-l1_0.5-lr0.001-s0"]
    assert all(name in told for name in names)
    assert "6 coders" in told
    assert "on the front" in told
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == names
    assert all(row["held_out_rows"] == 2 * 65 for row in rows)
    assert load_coder(tmp_path / names[3]).k == 8
    ET.parse(tmp_path / "pareto.svg")
    with Image.open(tmp_path / "pareto.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 10
    again = say(capsys, "sweep", store, tmp_path, *SMALL)
    assert again == told


def test_a_plan_says_what_it_takes_and_trains_nothing(store, capsys, tmp_path):
    told = say(capsys, "sweep", store, tmp_path / "out", "--preset", "visaebench", "--plan")
    assert told.count("batch_topk-x") == 12
    assert "batch_topk-x32-k256-lr0.001-s42" in told
    assert "12 coders, 2,990 rows in 1 steps of 8,192" in told  # 46 of 48 images, 65 tokens
    # d_in 128, d_sae 4096: 2 * 128 * 4096 + 4096 + 128 parameters of 16 bytes
    assert "1,052,800" in told
    assert "16.1 MiB" in told
    assert not (tmp_path / "out").exists()


def test_options_beside_a_preset_win():
    import tyro

    asked = tyro.cli(options("visaebench"), args=["--store", "s", "--out", "o", "--k", "32", "--schedule", "linear"])
    assert grid_of(asked) == Grid(
        architectures=("batch_topk",), expansions=(8, 16, 32), arguments={"k": [32]}, lrs=(1e-3,), seeds=(42,)
    )
    assert (asked.train.schedule, asked.train.warmup_steps, asked.batch_size) == ("linear", 0, 8192)


def test_values_are_read_as_what_they_are():
    found = [parsed(text) for text in ("32", "0.5", "none", "true", "8,16", "8,", "relu")]
    assert found == [32, 0.5, None, True, [8, 16], [8], "relu"]


def test_the_front_is_what_nothing_beats_in_both():
    places = {"a": (4, 0.5), "b": (8, 0.3), "c": (8, 0.4), "d": (16, 0.3), "e": (32, 0.1), "f": (3, 0.9)}
    rows = [{"name": name, "l0": l0, "fvu": fvu} for name, (l0, fvu) in places.items()]
    assert [row["name"] for row in pareto_front(rows)] == ["f", "a", "b", "e"]


def test_coders_that_stop_are_told_at_the_end_and_the_exit_says_so(store, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        main(
            ["sweep", str(store), str(tmp_path), "--architecture", "relu", "--d-sae", "128", "--l1", "0.5", "1e38"]
            + ["--batch-size", "512", "--device", "cpu"]
        )
    assert "1 of 2 coders stopped" in str(stopped.value.code)
    assert (tmp_path / "relu-x1-l1_0.5-lr0.0005-s0" / "coder.json").is_file()
    assert "stopped" in capsys.readouterr().out


def test_mistakes_get_a_sentence(store, capsys, tmp_path):
    for arguments, sentence in (
        (["--preset", "visaebnch"], "no preset 'visaebnch'. Known: visaebench"),
        (["--architecture", "topp"], "no coder architecture 'topp'"),
        (["--l1", "0.1"], "none of topk takes 'l1'"),
        (["--d-sae", "64", "--k", "65"], "k must be in 1..d_sae=64"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["sweep", str(store), str(tmp_path), *arguments])
        assert stopped.value.code == 2
        assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("values", [[2, 4, 8, 16, 3, 150], [5, 7], [0.1, 0.9], [1, 10_000], [0.21, 0.23], [3]])
def test_numbers_along_an_axis_do_not_crowd(values):
    axis = _Axis(values, 74, 736)
    ticks = axis.ticks()
    assert len(ticks) >= 2
    places = [axis(tick) for tick in ticks]
    assert min(b - a for a, b in zip(places, places[1:], strict=False)) >= TICK_ROOM
