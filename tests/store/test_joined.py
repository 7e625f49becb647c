"""Rows of several points: aligned, mixed alike, resumable; refused where they would not be of the same token."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from vitrail.backbones.toy import ToyViT, wrap
from vitrail.coders import Crosscoder, TopKTranscoder, load_coder
from vitrail.images import open_images
from vitrail.statistics import ActivationStats
from vitrail.store import Store, extract
from vitrail.store.joined import JoinedSource, Part
from vitrail.training import Source, TrainConfig, train

READ, WRITTEN = "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"


@pytest.fixture(scope="module")
def store(backbone, pictures, tmp_path_factory) -> Store:
    out = tmp_path_factory.mktemp("a") / "s"
    points = [READ, WRITTEN, "hook_image_embed"]
    return extract(backbone, pictures, points, out, batch_size=8, shard_images=16, dtype="float32")


def toy(**changes):
    torch.manual_seed(1)
    shape = {"image_px": 32, "patch_px": 8, "d_model": 20, "n_layers": 2, "n_heads": 2, "d_mlp": 24, "n_classes": 5}
    return wrap(ToyViT(**{**shape, **changes}), name="toy/other")


@pytest.fixture(scope="module")
def other(pictures, tmp_path_factory) -> Store:
    """Another model, narrower, of the same pictures; in shards of another size."""
    out = tmp_path_factory.mktemp("b") / "s"
    return extract(toy(), pictures, [READ], out, batch_size=12, shard_images=24, dtype="float32")


def rows_of(store, point, kind="all"):
    return torch.cat([x for _, x in store.image_batches(point, kind)]).flatten(0, 1)


def aligned(batches, left, right):
    """Each joined row is the same row of both."""
    place = {tuple(row.tolist()): i for i, row in enumerate(left)}
    seen = []
    for batch in batches:
        found = torch.tensor([place[tuple(row.tolist())] for row in batch[:, : left.shape[1]]])
        assert torch.equal(batch[:, left.shape[1] :], right[found])
        seen.append(found)
    return torch.cat(seen)


@pytest.mark.parametrize("kind", ["all", "cls", "spatial"])
def test_two_points_of_a_store_are_read_row_by_row(store, kind):
    source = JoinedSource([Part(store, READ, kind), Part(store, WRITTEN, kind)], batch_size=100, seed=3)
    left, right = rows_of(store, READ, kind), rows_of(store, WRITTEN, kind)
    assert isinstance(source, Source)
    assert (source.widths, source.d_in, source.n_rows) == ((24, 24), 48, len(left))
    first, second = aligned(list(source), left, right), aligned(list(source), left, right)
    assert torch.equal(first.sort().values, torch.arange(len(left)))  # every row once
    assert torch.equal(second.sort().values, torch.arange(len(left)))
    assert not torch.equal(first, second)


def test_two_models_in_shards_of_other_sizes_are_read_image_by_image(store, other):
    source = JoinedSource([Part(store, READ), Part(other, READ)], batch_size=64, window_bytes=40_000)
    assert source.n_windows(0) > 1
    seen = aligned(list(source), rows_of(store, READ), rows_of(other, READ))
    assert len(seen.unique()) == 850
    in_order = JoinedSource([Part(store, READ), Part(other, READ)], batch_size=64, shuffle=False)
    assert torch.equal(aligned(list(in_order), rows_of(store, READ), rows_of(other, READ)), torch.arange(850))


def test_one_row_per_image_of_unlike_points(store):
    source = JoinedSource([Part(store, READ, "cls"), Part(store, "hook_image_embed")], batch_size=10)
    aligned(list(source), rows_of(store, READ, "cls"), rows_of(store, "hook_image_embed", "pooled"))


def test_a_batch_mixes_many_images(store):
    batch = next(iter(JoinedSource([Part(store, READ), Part(store, WRITTEN)], batch_size=64)))
    images = {int(i) // 17 for i in aligned([batch], rows_of(store, READ), rows_of(store, WRITTEN))}
    assert len(images) > 30


def test_held_out_images_are_never_read(store):
    def read(images):
        source = JoinedSource([Part(store, READ), Part(store, WRITTEN)], batch_size=64, images=images)
        return aligned(list(source), rows_of(store, READ), rows_of(store, WRITTEN)).sort().values

    assert torch.equal(read((0, 35)), torch.arange(35 * 17))
    assert torch.equal(read((35, 50)), torch.arange(35 * 17, 50 * 17))


def test_statistics_are_those_of_the_joined_rows(store, other):
    source = JoinedSource([Part(store, READ), Part(other, READ)])
    found, expected = source.stats, ActivationStats.of(torch.cat([rows_of(store, READ), rows_of(other, READ)], 1))
    assert found.n == expected.n
    torch.testing.assert_close(found.mean, expected.mean)
    torch.testing.assert_close(found.variance, expected.variance)
    assert found.centred_norm_rows <= 850
    assert found.centred_norm == pytest.approx(expected.centred_norm, rel=0.05)
    assert found.mean_norm == pytest.approx(expected.mean_norm, rel=0.05)


def test_identity_says_what_is_read_and_in_which_order(store, other):
    def identity(*parts, **options):
        return JoinedSource(parts or (Part(store, READ), Part(store, WRITTEN)), **options).identity

    given = identity()
    assert given == identity()
    assert given == identity(Part(store, READ, "all"), Part(store, WRITTEN))
    changed = [
        identity(seed=1),
        identity(batch_size=7),
        identity(shuffle=False),
        identity(images=(0, 9)),
        identity(window_bytes=1),
        identity(Part(store, WRITTEN), Part(store, READ)),
        identity(Part(store, READ, "cls"), Part(store, WRITTEN, "cls")),
        identity(Part(store, READ), Part(other, READ)),
    ]
    assert len({given, *changed}) == 9


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stop=st.integers(0, 12), prefetch=st.sampled_from([0, 2]), window=st.sampled_from([1, 20_000, 1 << 20]))
def test_resuming_anywhere_gives_the_same_rows(store, other, stop, prefetch, window):
    def make(prefetch):
        parts = [Part(store, READ), Part(other, READ)]
        return JoinedSource(parts, batch_size=110, window_bytes=window, prefetch=prefetch, seed=5)

    def endless(source):
        while True:
            yield from source

    straight = [b for b, _ in zip(endless(make(0)), range(stop + 6), strict=False)]
    source = make(prefetch)
    begun = endless(source)
    for _ in range(stop):
        next(begun)
    resumed = make(prefetch)
    resumed.load_state_dict(source.state_dict())
    begun.close()
    for a, b in zip(straight[stop:], endless(resumed), strict=False):
        assert torch.equal(a, b)


@pytest.fixture(scope="module")
def misfits(pictures, backbone, tmp_path_factory):
    """Stores that cannot be read beside the first one, by what is wrong with them."""

    def made(name, model, images, **options):
        return extract(model, images, [READ], tmp_path_factory.mktemp(name) / "s", batch_size=8, **options)

    return {
        "fewer": made("fewer", backbone, open_images("world:shapes?n=30&image_px=32")),
        "order": made("order", backbone, pictures, seed=7),
        "patches": made("patches", toy(patch_px=16), pictures),
    }


def test_rows_that_are_not_of_the_same_token_are_refused(store, misfits):
    def join(*parts):
        return lambda: JoinedSource(parts)

    here = Part(store, READ)
    asked = {
        r"holds 50 images, .* 30: they are not of the same images": join(here, Part(misfits["fewer"], READ)),
        r"image 0 is '.*' in .* and '.*' in .*another order": join(here, Part(misfits["order"], READ)),
        r"has 17 rows per image, .* has 5: they have no common rows": join(here, Part(misfits["patches"], READ)),
        r"has 17 rows per image, .* has 1:": join(here, Part(store, WRITTEN, "cls")),
        r"at least two points to read side by side, got 1": join(here),
        r"each point once, got": join(here, Part(store, READ, "all")),
    }
    for sentence, ask in asked.items():
        with pytest.raises(ValueError, match=sentence):
            ask()
    with pytest.raises(KeyError, match=r"asked for 'blocks.9.x'"):
        JoinedSource([here, Part(store, "blocks.9.x")])
    JoinedSource([Part(store, READ, "cls"), Part(misfits["patches"], READ, "cls")])  # CLS tokens are common to both
    with pytest.raises(ValueError, match=r"images must be a range within 0..50, got \(3, 51\)"):
        JoinedSource([here, Part(store, WRITTEN)], images=(3, 51))


def test_another_grid_of_as_many_tokens_is_refused(store, other, monkeypatch):
    from dataclasses import replace

    grid = replace(other.manifest.grid, height=2, width=8)
    wrong = Store(other.path, replace(other.manifest, grid=grid))
    with pytest.raises(ValueError, match=r"other token grids .*\(4, 4, 1, 0\) and \(2, 8, 1, 0\)"):
        JoinedSource([Part(store, READ), Part(wrong, READ)])


def test_transcoders_and_crosscoders_learn_from_it(store, other, tmp_path):
    config = TrainConfig(n_rows=12_000, lr=3e-3, warmup_steps=5)
    source = JoinedSource([Part(store, READ), Part(store, WRITTEN)], batch_size=128)
    transcoder = TopKTranscoder(d_in=24, d_out=24, d_sae=64, k=6)
    first = train(transcoder, source, tmp_path / "t", config=config)
    x_in, x_out = rows_of(store, READ), rows_of(store, WRITTEN)
    fvu = (first.coder(x_in) - x_out).square().sum() / (x_out - x_out.mean(0)).square().sum()
    assert fvu < 0.6
    source = JoinedSource([Part(store, READ), Part(other, READ)], batch_size=128)
    crosscoder = Crosscoder(d_in=44, d_sae=64, widths=source.widths, l1=0.1)
    second = train(crosscoder, source, tmp_path / "c", config=config)
    assert second.last["fvu"] < 0.6
    assert load_coder(tmp_path / "c").decode_source(second.coder.encode(next(iter(source))), 1).shape[1] == 20
