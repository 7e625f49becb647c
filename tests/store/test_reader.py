"""Readers: every row once an epoch, well mixed, and exactly resumable; the stream gives the store's rows."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from vitrail.store import ActivationStream, Store, extract

POINT = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def store(backbone, pictures, tmp_path_factory) -> Store:
    out = tmp_path_factory.mktemp("store") / "s"
    return extract(backbone, pictures, [POINT, "hook_image_embed"], out, batch_size=8, shard_images=16, dtype="float32")


def sorted_rows(x):
    """Rows in an order of their own: equal for the same set of rows."""
    return x[x[:, 0].argsort()]


def all_rows(store, kind="all"):
    return torch.cat([x for _, x in store.image_batches(POINT, kind)]).flatten(0, 1)


@pytest.mark.parametrize("kind", ["all", "cls", "spatial"])
def test_an_epoch_is_every_row_once(store, kind):
    reader = store.reader(POINT, tokens=kind, batch_size=100, seed=3)
    batches = list(reader)
    assert all(len(batch) == 100 for batch in batches[:-1])
    assert torch.equal(sorted_rows(torch.cat(batches)), sorted_rows(all_rows(store, kind)))
    assert reader.n_rows == len(all_rows(store, kind))


def test_without_shuffling_rows_come_in_store_order(store):
    batches = list(store.reader(POINT, batch_size=64, shuffle=False))
    assert torch.equal(torch.cat(batches), all_rows(store))


def test_epochs_and_seeds_differ_and_the_same_seed_is_the_same(store):
    reader = store.reader(POINT, batch_size=128, seed=1)
    first, second = next(iter(list(reader))), next(iter(list(reader)))
    assert not torch.equal(first, second)
    assert torch.equal(first, next(iter(store.reader(POINT, batch_size=128, seed=1))))
    assert not torch.equal(first, next(iter(store.reader(POINT, batch_size=128, seed=2))))


def test_a_batch_mixes_many_images(store):
    table = {tuple(row.tolist()): i // 17 for i, row in enumerate(all_rows(store))}
    batch = next(iter(store.reader(POINT, batch_size=64)))
    images = {table[tuple(row.tolist())] for row in batch}
    assert len(images) > 30  # of 50; 64 neighbouring rows would come from 4


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch_size=st.integers(1, 300),
    stop=st.integers(0, 12),
    prefetch=st.sampled_from([0, 1, 3]),
    window=st.sampled_from([1, 6000, 1 << 20]),
    drop_last=st.booleans(),
)
def test_resuming_anywhere_gives_the_same_rows(store, batch_size, stop, prefetch, window, drop_last):
    options = dict(batch_size=max(batch_size, 40), window_bytes=window, drop_last=drop_last, seed=5)

    def endless(reader):
        while True:
            yield from reader

    n = stop + 8
    straight = [b for b, _ in zip(endless(store.reader(POINT, prefetch=0, **options)), range(n), strict=False)]
    reader = store.reader(POINT, prefetch=prefetch, **options)
    begun = endless(reader)
    for _ in range(stop):
        next(begun)
    resumed = store.reader(POINT, prefetch=prefetch, **options)
    resumed.load_state_dict(reader.state_dict())
    rest = [b for b, _ in zip(endless(resumed), range(8), strict=False)]
    begun.close()
    assert len(rest) == 8
    for a, b in zip(straight[stop:], rest, strict=True):
        assert torch.equal(a, b)


def test_drop_last_drops_only_the_last(store):
    kept = list(store.reader(POINT, batch_size=300, drop_last=True))
    assert [len(batch) for batch in kept] == [300, 300]


def test_held_out_images_are_never_read(store):
    rows = all_rows(store)
    kept = torch.cat(list(store.reader(POINT, batch_size=64, images=(0, 35))))
    rest = torch.cat(list(store.reader(POINT, batch_size=64, images=(35, 50))))
    assert torch.equal(sorted_rows(kept), sorted_rows(rows[: 35 * 17]))
    assert torch.equal(sorted_rows(rest), sorted_rows(rows[35 * 17 :]))
    with pytest.raises(ValueError, match=r"images must be a range within 0..50, got \(3, 51\)"):
        store.reader(POINT, images=(3, 51))


def test_ranks_share_an_epoch(store):
    parts = [torch.cat(list(store.reader(POINT, batch_size=50, rank=r, world_size=3, seed=2))) for r in range(3)]
    assert torch.equal(sorted_rows(torch.cat(parts)), sorted_rows(all_rows(store)))


def test_bad_asks_of_a_store(store):
    with pytest.raises(KeyError, match=r"holds blocks.1.hook_resid_post, hook_image_embed; asked for 'blocks.2.x'"):
        store.reader("blocks.2.x")
    with pytest.raises(ValueError, match="stored with tokens='pooled' and cannot be read as 'cls'"):
        store.reader("hook_image_embed", tokens="cls")
    with pytest.raises(ValueError, match="rank must be in"):
        store.reader(POINT, rank=2, world_size=2)


def test_an_error_in_the_reading_thread_reaches_the_caller(store, monkeypatch):
    reader = store.reader(POINT, batch_size=10, prefetch=2)
    monkeypatch.setattr(type(reader), "window_rows", lambda *_: (_ for _ in ()).throw(OSError("disk gone")))
    with pytest.raises(OSError, match="disk gone"):
        next(iter(reader))


def test_the_stream_gives_the_stores_rows(backbone, pictures, store):
    stream = ActivationStream(backbone, pictures, POINT, batch_size=100, image_batch=8, window_images=20, seed=1)
    assert (stream.d_in, stream.n_rows) == (24, 850)
    torch.testing.assert_close(sorted_rows(torch.cat(list(stream))), sorted_rows(all_rows(store)), rtol=0, atol=2e-6)
    torch.testing.assert_close(stream.stats.mean, store.stats(POINT, "all").mean, rtol=0, atol=1e-5)


def test_a_stream_resumes_exactly(backbone, pictures):
    def make():
        return ActivationStream(backbone, pictures, POINT, batch_size=90, image_batch=8, window_images=16, prefetch=1)

    straight, stream = list(make()), make()
    begun = iter(stream)
    for _ in range(4):
        next(begun)
    resumed = make()
    resumed.load_state_dict(stream.state_dict())
    begun.close()
    rest = list(resumed)
    assert len(rest) == len(straight) - 4
    assert all(torch.equal(a, b) for a, b in zip(straight[4:], rest, strict=True))


def test_a_stream_passes_over_bad_images(backbone, pictures, some_bad):
    stream = ActivationStream(backbone, some_bad(pictures, {1, 2}), POINT, batch_size=64, window_images=16)
    assert sum(len(batch) for batch in stream) == 48 * 17


def test_stream_batches_can_be_trained_on(backbone, pictures):
    batch = next(iter(ActivationStream(backbone, pictures, POINT, batch_size=32, window_images=16)))
    weight = torch.ones(24, requires_grad=True)
    (batch @ weight).sum().backward()
    assert weight.grad is not None
