"""CSV tables: what each column means, and what is said when one is missing."""

import csv
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_examples import encoded

from vitrail.images import open_images


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def records(source):
    return [source.record(i) for i in range(len(source))]


def test_paths_are_relative_to_the_table(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "1.png").write_bytes(encoded(1))
    source = open_images(write(tmp_path / "t.csv", "path\ndeep/1.png\n"))
    assert source.load(0).size == (16, 12)
    assert records(source)[0].id == "deep/1.png"
    assert records(source)[0].label is None
    assert source.classes == ()


def test_file_and_name_are_taken_for_path_and_class_name(tmp_path):
    source = open_images(write(tmp_path / "t.csv", "file,label,wnid,name\nx.jpg,2,n01,tench\ny.jpg,0,n02,shark\n"))
    assert [(r.label, r.class_name) for r in records(source)] == [(2, "tench"), (0, "shark")]
    assert source.classes == ("shark", "1", "tench")  # label 1 occurs nowhere and has no name


def test_text_labels_are_numbered_in_sorted_order(tmp_path):
    source = open_images(write(tmp_path / "t.csv", "path,label\na,zebra\nb,ape\nc,\n"))
    assert source.classes == ("ape", "zebra")
    assert [r.label for r in records(source)] == [1, 0, None]


def test_labels_agree_between_splits(tmp_path):
    table = write(tmp_path / "t.csv", "path,class_name,split\na,ape,train\nb,bee,val\nc,bee,train\n")
    val = open_images(table, split="val")
    assert [(r.id, r.label, r.split) for r in records(val)] == [("b", 1, "val")]
    assert val.classes == ("ape", "bee")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("picture,label\na,1\n", r"no column 'path' \(or 'file'\)\. Found: picture, label\. Needed: path"),
        ("", "Found: nothing"),
        ("path\n", "holds no pictures"),
        ("path,label\na,1\n,2\n", "line 3: the path is empty"),
        ("path\na\na\n", "2 pictures with id 'a'"),
        ("path,label,class_name\na,1,ape\nb,1,bee\n", "names label 1 both 'ape' and 'bee'"),
        ("path,label\na,-1\n", "label -1"),
    ],
)
def test_bad_tables_get_a_sentence(tmp_path, text, sentence):
    with pytest.raises(ValueError, match=sentence):
        open_images(write(tmp_path / "t.csv", text))


def test_a_table_in_another_encoding_is_refused_by_name(tmp_path):
    (tmp_path / "t.csv").write_bytes("path,caption\na,caf\xe9\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"t\.csv is not a readable CSV file in UTF-8"):
        open_images(tmp_path / "t.csv")


_TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1).map(str.strip).filter(bool)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(_TEXT, st.integers(0, 50), _TEXT), min_size=1, max_size=8, unique_by=lambda row: row[0]))
def test_any_ids_labels_and_captions_survive_a_table(tmp_path, rows):
    with (tmp_path / "t.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["path", "id", "label", "caption"])
        writer.writerows([(f"{at}.png", *row) for at, row in enumerate(rows)])
    found = records(open_images(tmp_path / "t.csv"))
    assert [(r.id, r.label, r.caption) for r in found] == rows


@pytest.mark.shared
def test_the_photographs_on_this_machine_open():
    table = Path(os.environ.get("VITRAIL_SHARED", "../shared")) / "data" / "imagenet_1000" / "labels.csv"
    if not table.exists():
        pytest.skip(f"{table} is not here")
    source = open_images(table)
    assert len(source) == len(source.classes) == 1000
    assert source.record(0).class_name == "tench"
    assert min(source.load(0).size) == 240
