"""`vitrail compare`: families of coders at equal L0."""

import json

import pytest

from vitrail.cli import main


def write(path, points):
    rows = [
        {"name": name, "control_of": None,
         "measured": {"l0_tokens": {"value": l0}, "explained_variance": {"value": ev}}}
        for name, l0, ev in points
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_at_equal_l0_by_hand(tmp_path, capsys):
    # a: .5 at 8, .7 at 32; b: .4 at 16 alone. At 16, half way in log L0, a is .6: the difference is .2.
    # Areas up to (48, .4): a: (48 - 32)(.7 - .5) + (48 - 8)(.5 - .4) = 7.2; b, on the edge: 0.
    write(tmp_path / "eval.jsonl", [("topk-8", 8, 0.5), ("topk-32", 32, 0.7), ("other", 16, 0.4)])
    main(["compare", str(tmp_path), "--a", "topk*", "--b", "other"])
    told = capsys.readouterr().out
    assert "16  +0.200" in told
    assert "mean over log l0_tokens  +0.200" in told
    assert "hypervolume of topk*, up to (48, 0.4): 7.2" in told
    assert "hypervolume of other, up to (48, 0.4): 0" in told


def test_what_cannot_be_compared_is_a_sentence(tmp_path, capsys):
    write(tmp_path / "eval.jsonl", [("a", 8, 0.5), ("b", 16, 0.4)])
    for arguments, said in (
        (["--a", "a", "--b", "b"], "they share no x"),
        (["--a", "a", "--b", "c*"], "0 of 2 rows are named 'c*'"),
        (["--a", "a", "--b", "b", "--measure", "cknna"], "none has both cknna and l0_tokens"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["compare", str(tmp_path), *arguments])
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err
