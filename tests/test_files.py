import json

import pytest
import torch

from vitrail.files import read_json, read_tensors, replacing, tensors_digest, write_json, write_tensors


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(OSError, match="No space left"), replacing(path) as temporary:
        temporary.write_text("half of a new fi")
        raise OSError(28, "No space left on device")
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_nan_is_not_written_as_json(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not (tmp_path / "a.json").exists()


def test_a_cut_tensor_file_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"x": torch.arange(1000.0)})
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"x\.safetensors is cut short"):
        read_tensors(path, "test tensors")


def test_a_broken_json_file_is_named(tmp_path):
    (tmp_path / "m.json").write_text('{"a": ')
    with pytest.raises(ValueError, match=r"m\.json is not a readable store manifest"):
        read_json(tmp_path / "m.json", "store manifest")


def test_the_digest_sees_names_shapes_and_bytes():
    x = torch.arange(6.0)
    seen = {tensors_digest(t) for t in ({"a": x}, {"b": x}, {"a": x.reshape(2, 3)}, {"a": x + 1}, {"a": x.half()})}
    assert len(seen) == 5
    assert tensors_digest({"a": x, "b": x + 1}) == tensors_digest({"b": x + 1, "a": x.clone()})


def test_files_are_as_readable_as_the_umask_has_it(tmp_path):
    write_tensors(tmp_path / "x.safetensors", {"x": torch.ones(2)})
    (tmp_path / "plain").touch()
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
