import io

from vitrail.progress import SILENT, Terminal, _clock, _si


def test_plain_output_says_how_far_how_fast_and_how_long():
    out = io.StringIO()
    with Terminal(out, every_s=0).task("extract", 100, "images") as task:
        task.advance(40, "2 skipped")
        task.advance(60)
    first, last = out.getvalue().splitlines()
    assert first.startswith("  extract: 40/100 images, ")
    assert "images/s" in first
    assert "left" in first
    assert first.endswith("2 skipped")
    assert last.startswith("  extract: 100/100 images")
    assert "left" not in last


def test_numbers_are_short():
    assert [_si(x) for x in (3, 2.5, 9999, 12_345, 4.2e6, 3e9)] == ["3", "2.5", "9999", "12.3k", "4.2M", "3.0G"]
    assert [_clock(s) for s in (5, 65, 3605)] == ["0:05", "1:05", "1:00:05"]


def test_silence_is_silent(capsys):
    with SILENT.task("x", None, "rows") as task:
        task.advance(1)
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""
