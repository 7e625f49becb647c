"""Extraction: what is stored is what the model computes; a run that dies goes on to the same bytes."""

import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from vitrail.images.loader import load_batches
from vitrail.store import Store, extract
from vitrail.store import write as write_module

POINTS = ["blocks.1.hook_resid_post", "hook_image_embed", "blocks.0.hook_mlp_out"]
SMALL = dict(batch_size=8, shard_images=16, dtype="float32")


def direct(backbone, pictures, positions, point):
    batch = next(load_batches(pictures, positions, backbone.preprocess, batch_size=len(positions)))
    with torch.inference_mode():
        return backbone.run_with_cache(batch.images, [point])[1][point]


def test_rows_are_the_models_activations_keyed_by_name(backbone, pictures, tmp_path):
    store = extract(backbone, pictures, POINTS, tmp_path / "s", **SMALL)
    assert store.points == tuple(POINTS)
    assert store.n_images == 50
    assert [shard.n_images for shard in store.manifest.shards] == [16, 16, 16, 2]
    table = store.images()
    for point in POINTS:
        for first, x in store.image_batches(point, store.kind(point, None), n_images=16):
            expected = direct(backbone, pictures, table["position"][first : first + len(x)].tolist(), point)
            if expected.ndim == 2:
                expected = expected[:, None]
            torch.testing.assert_close(x, expected, rtol=0, atol=2e-6)  # batches of 8 there, of 16 here


def test_images_are_permuted_once_and_the_table_says_which_is_which(backbone, pictures, tmp_path):
    store = extract(backbone, pictures, POINTS[:1], tmp_path / "s", **SMALL)
    table = store.images()
    assert sorted(table["position"].tolist()) == list(range(50))
    assert table["position"].tolist() != list(range(50))
    assert table["row"].tolist() == list(range(50))
    position = int(table["position"][7])
    record = pictures.record(position)
    assert (table["id"][7], table["label"][7], table["caption"][7]) == (record.id, record.label, record.caption)


@pytest.mark.parametrize(("tokens", "n_tokens"), [("all", 17), ("cls", 1), ("spatial", 16), ("pooled", 1)])
def test_token_kinds(backbone, pictures, tmp_path, tokens, n_tokens):
    point = POINTS[0]
    store = extract(backbone, pictures, [point], tmp_path / "s", tokens=tokens, limit=8, **SMALL)
    stored = store.manifest.points[point]
    assert (stored.tokens, stored.n_tokens, stored.d_in) == (tokens, n_tokens, 24)
    ((_, x),) = store.image_batches(point, tokens)
    full = direct(backbone, pictures, store.images()["position"].tolist(), point)
    expected = {"all": full, "cls": full[:, :1], "spatial": full[:, 1:], "pooled": full[:, 1:].mean(1, keepdim=True)}
    torch.testing.assert_close(x, expected[tokens], rtol=0, atol=2e-6)


def test_an_all_store_reads_as_cls_and_spatial_with_their_own_statistics(backbone, pictures, tmp_path):
    point = POINTS[0]
    store = extract(backbone, pictures, [point], tmp_path / "s", **SMALL)
    rows = {
        kind: torch.cat([x for _, x in store.image_batches(point, kind)]).flatten(0, 1)
        for kind in ("all", "cls", "spatial")
    }
    assert rows["cls"].shape == (50, 24)
    assert rows["spatial"].shape == (800, 24)
    for kind, x in rows.items():
        stats = store.stats(point, kind)
        assert stats.n == len(x)
        np.testing.assert_allclose(stats.mean.numpy(), x.double().mean(0).numpy(), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(stats.scalar_std, x.double().var(0, unbiased=False).mean().sqrt(), rtol=1e-9)
        np.testing.assert_allclose(stats.mean_norm, x.double().norm(dim=1).mean(), rtol=1e-9)
        centred = (x.double() - x.double().mean(0)).norm(dim=1).mean()
        np.testing.assert_allclose(stats.centred_norm, centred, rtol=1e-9)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_one_rounding_of_fp32(backbone, pictures, tmp_path, dtype):
    point = POINTS[0]
    exact = extract(backbone, pictures, [point], tmp_path / "a", limit=16, **SMALL)
    half = extract(backbone, pictures, [point], tmp_path / "b", limit=16, **{**SMALL, "dtype": dtype})
    ((_, x),) = exact.image_batches(point, "all")
    ((_, y),) = half.image_batches(point, "all")
    assert torch.equal(y, x.to(getattr(torch, dtype)).float())


def test_bad_images_are_skipped_counted_and_listed(backbone, pictures, some_bad, tmp_path):
    store = extract(backbone, some_bad(pictures, {3, 4, 40}), POINTS[:1], tmp_path / "s", **SMALL)
    assert (store.n_images, store.manifest.n_skipped) == (47, 3)
    table = store.images()
    skipped = {int(p): r for p, r in zip(table["position"], table["skipped"], strict=True) if r is not None}
    assert skipped == dict.fromkeys((3, 4, 40), "image file is truncated")
    assert np.isnan(table["row"][47:].astype(float)).all()
    assert sum(shard.n_images for shard in store.manifest.shards) == 47


def test_when_no_image_can_be_read_it_says_why(backbone, pictures, some_bad, tmp_path):
    with pytest.raises(ValueError, match=r"none of the 50 images could be read \(image file is truncated\)"):
        extract(backbone, some_bad(pictures, set(range(50))), POINTS[:1], tmp_path / "s", **SMALL)


def test_only_the_blocks_that_are_needed_run(backbone, pictures, tmp_path):
    ran = []
    handle = backbone.blocks[1].register_forward_hook(lambda *_: ran.append(1))
    try:
        extract(backbone, pictures, ["blocks.0.hook_resid_post"], tmp_path / "s", limit=8, **SMALL)
    finally:
        handle.remove()
    assert ran == []


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_run_that_dies_goes_on_to_the_same_bytes(
    backbone, pictures, some_bad, tmp_path, monkeypatch, file_bytes, after
):
    images = some_bad(pictures, {7, 8})
    extract(backbone, images, POINTS, tmp_path / "whole", **SMALL)
    commit, done = write_module.Extraction._commit, []

    def dying(self, *arguments):
        if len(done) == after:
            raise Killed
        done.append(1)
        commit(self, *arguments)

    monkeypatch.setattr(write_module.Extraction, "_commit", dying)
    with pytest.raises(Killed):
        extract(backbone, images, POINTS, tmp_path / "cut", **SMALL)
    with pytest.raises(ValueError, match=rf"unfinished: {after} of 4 shards are there. Run the same extract again"):
        Store.open(tmp_path / "cut")
    monkeypatch.undo()
    extract(backbone, images, POINTS, tmp_path / "cut", **SMALL)
    assert file_bytes(tmp_path / "cut") == file_bytes(tmp_path / "whole")


def test_kill_9_in_the_middle_of_a_shard_then_the_same_store(tmp_path, file_bytes):
    script = textwrap.dedent("""
        import os, signal, sys, torch
        from pathlib import Path
        from vitrail.backbones.toy import ToyViT, wrap
        from vitrail.images import open_images
        from vitrail.store import extract, write
        out, kill_at = Path(sys.argv[1]), int(sys.argv[2])
        torch.manual_seed(0)
        model = ToyViT(image_px=32, patch_px=8, d_model=24, n_layers=2, n_heads=2, d_mlp=32, n_classes=5)
        written = []
        real = write.write_tensors
        def write_tensors(path, tensors):
            if len(written) == kill_at:
                path.write_bytes(b"half a file")
                os.kill(os.getpid(), signal.SIGKILL)
            written.append(path)
            real(path, tensors)
        write.write_tensors = write_tensors
        points = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
        images = open_images("world:shapes?n=24&image_px=32")
        extract(wrap(model, name="toy/t"), images, points, out, batch_size=4, shard_images=8)
    """)

    def run(out, kill_at):
        return subprocess.run([sys.executable, "-c", script, str(out), str(kill_at)], check=False, capture_output=True)

    assert run(tmp_path / "whole", -1).returncode == 0
    assert run(tmp_path / "cut", 3).returncode == -signal.SIGKILL
    assert len(list((tmp_path / "cut/shards").glob("shard-*"))) == 1
    assert run(tmp_path / "cut", -1).returncode == 0
    assert file_bytes(tmp_path / "cut") == file_bytes(tmp_path / "whole")


def test_a_full_disk_loses_only_the_shard_being_written(backbone, pictures, tmp_path, monkeypatch):
    write_tensors, calls = write_module.write_tensors, []

    def full(path, tensors):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        write_tensors(path, tensors)

    monkeypatch.setattr(write_module, "write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        extract(backbone, pictures, POINTS[:1], tmp_path / "s", **SMALL)
    monkeypatch.undo()
    assert len(list((tmp_path / "s/shards").glob("shard-*"))) == 1
    assert extract(backbone, pictures, POINTS[:1], tmp_path / "s", **SMALL).n_images == 50


def test_asking_again_returns_at_once_and_another_request_is_refused(backbone, pictures, tmp_path, monkeypatch):
    extract(backbone, pictures, POINTS[:1], tmp_path / "s", **SMALL)
    monkeypatch.setattr(write_module, "load_batches", lambda *a, **k: pytest.fail("images were read again"))
    extract(backbone, pictures, POINTS[:1], tmp_path / "s", **SMALL)
    with pytest.raises(
        ValueError, match=r"store of another request \(points: there \['blocks.1.hook_resid_post'\], asked"
    ):
        extract(backbone, pictures, POINTS[1:], tmp_path / "s", **SMALL)


def test_a_cut_shard_is_named_and_repaired(backbone, pictures, tmp_path, file_bytes):
    extract(backbone, pictures, POINTS, tmp_path / "s", **SMALL)
    before = file_bytes(tmp_path / "s")
    path = tmp_path / "s/shards/shard-00001" / f"{POINTS[0]}.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        ValueError, match=r"shard-00001/blocks.1.hook_resid_post.safetensors is cut or altered.*--repair"
    ):
        Store.open(tmp_path / "s")
    extract(backbone, pictures, POINTS, tmp_path / "s", repair=True, **SMALL)
    assert file_bytes(tmp_path / "s") == before


def test_an_altered_byte_is_found_by_verify(backbone, pictures, tmp_path):
    store = extract(backbone, pictures, POINTS[:1], tmp_path / "s", **SMALL)
    store.verify()
    path = tmp_path / "s/shards/shard-00002" / f"{POINTS[0]}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"shard-00002.*was altered"):
        Store.open(tmp_path / "s").verify()


def test_nan_and_overflow_stop_with_a_sentence(backbone, pictures, tmp_path):
    def broken(x, point):
        return x * float("nan")

    def huge(x, point):
        return x * 1e30

    with backbone.hooks({POINTS[0]: broken}), pytest.raises(ValueError, match="NaN or infinite activations"):
        extract(backbone, pictures, POINTS[:1], tmp_path / "a", **SMALL)
    with backbone.hooks({POINTS[0]: huge}), pytest.raises(ValueError, match="more than float16 can hold. Extract with"):
        extract(backbone, pictures, POINTS[:1], tmp_path / "b", **{**SMALL, "dtype": "float16"})


def test_bad_requests_say_what_would_be_right(backbone, pictures, tmp_path):
    with pytest.raises(KeyError, match=r"no hook point 'blocks.1.resid_post'. Nearest: blocks.1.hook_resid_post"):
        extract(backbone, pictures, ["blocks.1.resid_post"], tmp_path / "s")
    with pytest.raises(ValueError, match="dtype must be one of float16, bfloat16, float32, got 'int8'"):
        extract(backbone, pictures, POINTS, tmp_path / "s", dtype="int8")
    with pytest.raises(ValueError, match=r"limit must be in 1..50 \(the number of images\), got 51"):
        extract(backbone, pictures, POINTS, tmp_path / "s", limit=51)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("mine")
    with pytest.raises(ValueError, match="not empty and holds no store"):
        extract(backbone, pictures, POINTS, tmp_path / "other")


def test_a_newer_format_and_a_stranger_are_refused(backbone, pictures, tmp_path):
    extract(backbone, pictures, POINTS[:1], tmp_path / "s", limit=8, **SMALL)
    path = tmp_path / "s/manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "version": 99}))
    with pytest.raises(ValueError, match="format version 99; this vitrail reads version 1"):
        Store.open(tmp_path / "s")
    path.write_text(json.dumps({"hello": 1}))
    with pytest.raises(ValueError, match="not a vitrail-store manifest"):
        Store.open(tmp_path / "s")


def test_workers_change_nothing(backbone, pictures, tmp_path, file_bytes):
    extract(backbone, pictures, POINTS[:1], tmp_path / "a", **SMALL)
    extract(backbone, pictures, POINTS[:1], tmp_path / "b", n_workers=2, **SMALL)
    assert file_bytes(tmp_path / "a") == file_bytes(tmp_path / "b")
    assert os.path.exists(tmp_path / "a/cost.json")


def test_no_worker_outlives_the_extraction(backbone, pictures, tmp_path):
    gc.disable()  # the workers must not wait for it: one that does can hold up whatever comes next by five seconds
    try:
        extract(backbone, pictures, POINTS[:1], tmp_path / "s", n_workers=2, **SMALL)
        assert multiprocessing.active_children() == []
    finally:
        gc.enable()


def test_a_shard_folder_that_is_gone_is_made_anew(backbone, pictures, tmp_path, file_bytes):
    import shutil

    extract(backbone, pictures, POINTS, tmp_path / "s", **SMALL)
    before = file_bytes(tmp_path / "s")
    shutil.rmtree(tmp_path / "s/shards/shard-00001")
    with pytest.raises(ValueError, match="is missing"):
        Store.open(tmp_path / "s")
    extract(backbone, pictures, POINTS, tmp_path / "s", repair=True, **SMALL)
    assert file_bytes(tmp_path / "s") == before


def test_an_attempt_that_stored_nothing_does_not_block_its_folder(backbone, pictures, tmp_path):
    with backbone.hooks({POINTS[0]: lambda x, _: x * float("nan")}), pytest.raises(ValueError, match="NaN"):
        extract(backbone, pictures, POINTS[:1], tmp_path / "s", **SMALL)
    assert extract(backbone, pictures, POINTS[2:], tmp_path / "s", **SMALL).points == (POINTS[2],)
    with pytest.raises(ValueError, match="hook_embed has patch tokens only"):
        extract(backbone, pictures, ["hook_embed"], tmp_path / "e", tokens="cls", **SMALL)


def test_where_pictures_lie_is_not_what_they_are(backbone, pictures, tmp_path):
    """A folder that was moved goes on; its digest is the same."""
    import shutil

    from vitrail.images import open_images

    (tmp_path / "a").mkdir()
    for i in range(6):
        pictures.load(i).save(tmp_path / "a" / f"{i}.png")
    first = extract(backbone, open_images(tmp_path / "a"), POINTS[:1], tmp_path / "s", **SMALL)
    shutil.move(tmp_path / "a", tmp_path / "b")
    again = extract(backbone, open_images(tmp_path / "b"), POINTS[:1], tmp_path / "s", **SMALL)
    assert again.digest == first.digest
    other = extract(backbone, open_images(tmp_path / "b"), POINTS[:1], tmp_path / "t", **SMALL)
    assert other.digest == first.digest


def test_a_model_without_special_tokens_reads_all_as_spatial(pictures, tmp_path):
    import timm

    from vitrail.backbones.timm import wrap

    torch.manual_seed(0)
    model = timm.create_model(
        "vit_base_patch16_siglip_224", pretrained=False, img_size=32, embed_dim=24, depth=2, num_heads=2, num_classes=0
    )
    store = extract(wrap(model, name="timm/siglip"), pictures, ["blocks.0.hook_resid_post"], tmp_path / "s", limit=8)
    assert store.reader(tokens="spatial").stats.n == store.reader(tokens="all").stats.n == 8 * 4
