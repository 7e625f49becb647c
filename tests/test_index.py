"""The index against a slow, dense witness."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from vitrail import index as index_module
from vitrail.backbones import Grid
from vitrail.coders import Codes
from vitrail.codes import CodeShard, CodesManifest, CodeStore, _tensors
from vitrail.files import file_digest, write_tensors
from vitrail.index import Index, TopK, build_index, rank_in_run

GRID = Grid(height=2, width=2, patch_px=8, image_px=(16, 16), n_cls=1, n_registers=0)


def code_store(path, z, shard_sizes, tokens="all"):
    """A CodeStore of z (n_images, n_tokens, d_sae)."""
    n_images, n_tokens, d_sae = z.shape
    shards, first = [], 0
    for number, size in enumerate(shard_sizes):
        file = path / "shards" / f"shard-{number:05d}.safetensors"
        codes = Codes.from_dense(z[first : first + size].flatten(0, 1))
        write_tensors(file, _tensors(codes, "float16"))
        shards.append(CodeShard(file.stem, size, codes.nnz, file.stat().st_size, file_digest(file)))
        first += size
    manifest = CodesManifest(
        request={}, state="complete", store="nowhere", grid=GRID, tokens=tokens, n_tokens=n_tokens, d_sae=d_sae,
        n_images=n_images, shards=shards,
    )  # fmt: skip
    manifest.write(path)
    return CodeStore.open(path)


def dense_top(z, latent, k, one_per_image):
    """(image, token, value) of a latent's top k, by sorting everything."""
    entries = [(-float(v), i, t) for i, image in enumerate(z[..., latent]) for t, v in enumerate(image) if v > 0]
    entries.sort()
    if one_per_image:
        seen: set[int] = set()
        entries = [e for e in entries if not (e[1] in seen or seen.add(e[1]))]
    return [(i, t, -v) for v, i, t in entries[:k]]


def random_codes(seed, n_images=40, n_tokens=5, d_sae=7, density=0.3):
    rng = np.random.default_rng(seed)
    z = rng.integers(1, 6, size=(n_images, n_tokens, d_sae)) / 4  # few values: many ties
    z[rng.random(z.shape) > density] = 0
    z[..., 3] = 0  # a dead latent
    return torch.from_numpy(z).float()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), cut=st.integers(1, 39), k=st.sampled_from([1, 3, 16]))
def test_top_images_and_patches_are_those_of_the_slow_way(tmp_path_factory, seed, cut, k):
    z, path = random_codes(seed), tmp_path_factory.mktemp("index")
    index = build_index(code_store(path / "codes", z, [cut, 40 - cut]), path / "index", k=k)
    for latent in range(7):
        top, patches = index.top_images(latent), index.top_patches(latent)
        assert list(zip(top["image"], top["token"], top["value"], strict=True)) == dense_top(z, latent, k, True)
        expected = dense_top(z[:, 1:], latent, k, False)  # token 0 is CLS: not a patch
        assert [
            (i, t - 1, v) for i, t, v in zip(*(patches[c] for c in ("image", "token", "value")), strict=True)
        ] == expected


def test_an_index_does_not_depend_on_how_codes_were_cut(tmp_path):
    z = random_codes(0)
    a = build_index(code_store(tmp_path / "a", z, [40]), tmp_path / "ia")
    b = build_index(code_store(tmp_path / "b", z, [1, 30, 9]), tmp_path / "ib")
    for name in ("latents", "images", "patches"):
        assert (a.path / f"{name}.parquet").read_bytes() == (b.path / f"{name}.parquet").read_bytes()
    assert (a.path / "histograms.safetensors").read_bytes() == (b.path / "histograms.safetensors").read_bytes()


def test_latent_numbers_by_hand(tmp_path):
    # latent 0 fires on two tokens of image 0 (1 and 3) and on one of image 1 (2): 3 of 10 tokens, 2 of 2 images
    z = torch.zeros(2, 5, 2)
    z[0, 1, 0], z[0, 2, 0], z[1, 4, 0] = 1, 3, 2
    index = build_index(code_store(tmp_path / "c", z, [2]), tmp_path / "i")
    row = {name: values[0] for name, values in index.latents.items()}
    assert row == {
        "latent": 0, "n_tokens_active": 3, "density": 0.3, "n_images_active": 2, "image_density": 1.0,
        "mean": 2.0, "max": 3.0, "dead": False,
    }  # fmt: skip
    assert index.latents["dead"].tolist() == [False, True]
    counts, edges = index.histograms()
    assert counts.sum(1).tolist() == [3, 0]
    # log10 1 = 0, log10 2 = .301, log10 3 = .477, bins of an eighth of a decade from -4: bins 32, 34, 35
    assert counts[0].nonzero()[0].tolist() == [32, 34, 35]
    assert edges[32] == 0


def test_a_full_top_k_keeps_the_earlier_image_on_a_tie():
    top = TopK(d_sae=1, k=2, one_per_image=True)
    for image in range(4):
        top.update(candidate(value=1.0, image=image))
    top.update(candidate(value=2.0, image=9))
    top.flush()
    assert top.best.image.tolist() == [9, 0]


def candidate(value, image):
    return index_module.Candidates(np.array([0]), np.array([value], dtype=np.float32), np.array([image]), np.array([0]))


def test_rank_in_run():
    assert rank_in_run(np.array([4, 4, 4, 7, 9, 9])).tolist() == [0, 1, 2, 0, 0, 1]
    assert rank_in_run(np.array([], dtype=np.int64)).tolist() == []


def test_the_same_index_is_not_built_twice_and_another_is_refused(tmp_path, monkeypatch):
    codes = code_store(tmp_path / "c", random_codes(1), [40])
    build_index(codes, tmp_path / "i")
    monkeypatch.setattr(index_module, "candidates", lambda *a, **k: pytest.fail("codes were read again"))
    build_index(codes, tmp_path / "i")
    with pytest.raises(ValueError, match="holds an index of other codes or another k"):
        build_index(codes, tmp_path / "i", k=3)


def test_what_is_no_index_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no index manifest here"):
        Index.open(tmp_path)
    index = build_index(code_store(tmp_path / "c", random_codes(1), [40]), tmp_path / "i")
    with pytest.raises(IndexError, match=r"latent must be in 0..6, got 7"):
        index.top_images(7)
