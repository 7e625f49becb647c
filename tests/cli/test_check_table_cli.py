"""vitrail check-table: sentences and exit codes."""

import pytest

from vitrail.cli.check_table import run


def test_one_sentence_for_each_finding_and_exit_code_1(tmp_path, capsys):
    path = tmp_path / "mine.csv"
    path.write_text("model,EV,FVU\nTopK,0.98,0.02\nReLU,0.98,0.05\n")
    with pytest.raises(SystemExit) as stopped:
        run([str(path)])
    assert stopped.value.code == 1
    told = capsys.readouterr()
    assert told.out == "mine.csv, row 2 (ReLU): EV = 0.98: with FVU 0.05 it should be 0.95: they add up to 1\n"
    assert "2 rows of 1 table: 1 finding" in told.err


def test_nothing_is_wrong(tmp_path, capsys):
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("model,EV,FVU\nTopK,0.98,0.02\n")
    run([str(tmp_path / "a.csv"), str(tmp_path / "b.csv")])
    assert capsys.readouterr().out == "2 rows of 2 tables: nothing is wrong\n"


def test_what_the_table_does_not_say_can_be_given(tmp_path, capsys):
    path = tmp_path / "clip.csv"
    path.write_text("layer,CE\n0,3.41\n")
    run([str(path)])
    with pytest.raises(SystemExit):
        run([str(path), "--unscaled-classes", "1000"])
    assert "unscaled cosines over 1000 classes can only have 4.9141..8.9069" in capsys.readouterr().out


def test_a_file_that_is_no_table_is_an_error(tmp_path):
    path = tmp_path / "empty.csv"
    path.write_text("")
    with pytest.raises(ValueError, match="needs a header"):
        run([str(path)])
