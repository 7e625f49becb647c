"""Exact search over sparse codes and embeddings, what hits share, and search by words and by a drawn box."""

import json

import numpy as np
import pytest
import torch

from vitrail.backbones.grid import Grid
from vitrail.coders.sparse import Codes
from vitrail.codes import CodeShard, CodesManifest, CodeStore, _tensors
from vitrail.concepts import inverted
from vitrail.concepts.dense import EmbeddingIndex
from vitrail.concepts.inverted import SparseIndex, build_search, pooled_codes
from vitrail.concepts.search import (
    explained,
    fires_here,
    groups_of,
    images_firing,
    latents_named,
    nearest_names,
    read_names,
    why,
)
from vitrail.files import file_digest, write_tensors

D_SAE = 60


def random_codes(n, *, d_sae=D_SAE, seed=0, dtype=torch.float16):
    """Skewed: latent 0 fires in most rows, the last ones hardly ever. Some rows are empty, some are equal."""
    generator = torch.Generator().manual_seed(seed)
    share = 0.9 / torch.arange(1, d_sae + 1).float() ** 0.8
    fires = torch.rand(n, d_sae, generator=generator) < share
    z = torch.rand(n, d_sae, generator=generator).to(dtype).float() * fires
    z[::50] = 0
    z[7] = z[3]
    return z


def sklearn_nearest(z, queries, k, metric):
    neighbors = pytest.importorskip("sklearn.neighbors")
    model = neighbors.NearestNeighbors(n_neighbors=k, metric=metric, algorithm="brute").fit(z.double().numpy())
    return model.kneighbors(queries.double().numpy())


def test_the_distance_and_its_parts_by_hand():
    # q = (2, 1, 0), x = (1, 3, 0): |q| + |x| - 2 (min(2, 1) + min(1, 3)) = 3 + 4 - 4 = 3 = |2-1| + |1-3|
    # y = (0, 0, 5) shares nothing: 3 + 5 = 8. cosine(q, x) = 5 / sqrt(5 * 10)
    z = torch.tensor([[1.0, 3.0, 0.0], [0.0, 0.0, 5.0]])
    index = SparseIndex.of_codes(Codes.from_dense(z))
    query = Codes.from_dense(torch.tensor([[2.0, 1.0, 0.0]]))
    found = index.nearest(query, 2, "l1")
    assert found.rows.tolist() == [[0, 1]]
    assert found.values.tolist() == [[3.0, 8.0]]
    assert index.nearest(query, 2, "cosine").values[0].tolist() == pytest.approx([5 / 50**0.5, 0.0])
    assert index.nearest(query, 2, "overlap").values[0].tolist() == pytest.approx([2 / 3, 0.0])
    # of the shared 2, latents 0 and 1 make up a half each; of the product 5, two fifths and three fifths
    assert [(s.latent, s.share) for s in why(query, index.rows(torch.tensor([0])), "l1")] == [(0, 0.5), (1, 0.5)]
    by_cosine = why(query, index.rows(torch.tensor([0])), "cosine", names={1: "stripes"})
    assert [(s.latent, s.name, s.share) for s in by_cosine] == [(1, "stripes", 0.6), (0, None, 0.4)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("metric", "theirs"), [("l1", "manhattan"), ("cosine", "cosine")])
def test_neighbours_are_scikit_learns(metric, theirs, dtype, monkeypatch):
    monkeypatch.setattr(inverted, "ENTRIES_AT_ONCE", 500)  # several blocks
    z, queries = random_codes(700, dtype=dtype), random_codes(25, seed=1, dtype=dtype)
    index = SparseIndex.of_codes(Codes.from_dense(z))
    assert 0 < len(index._tensors["dense_latents"]) < D_SAE
    assert index._tensors["row_values"].dtype == dtype
    found = index.nearest(Codes.from_dense(queries), 12, metric)
    distances, _ = sklearn_nearest(z, queries, 12, theirs)
    ours = found.values if metric == "l1" else 1 - found.values
    np.testing.assert_allclose(ours.numpy(), distances, rtol=1e-12, atol=1e-12)
    # the rows are those too, wherever no tie stands at the end
    every = torch.cdist(queries.double(), z.double(), p=1) if metric == "l1" else None
    if every is not None:
        torch.testing.assert_close(every.gather(1, found.rows), found.values)


def test_ties_go_to_the_earlier_row_and_equal_codes_are_at_distance_zero():
    z = random_codes(300)
    index = SparseIndex.of_codes(Codes.from_dense(z))
    found = index.nearest(Codes.from_dense(z[7:8]), 2, "l1")
    assert found.rows.tolist() == [[3, 7]]  # row 7 is a copy of row 3
    assert found.values.tolist() == [[0.0, 0.0]]
    assert found.without(torch.tensor([7])).rows.tolist() == [[3]]
    empty = index.nearest(Codes.from_dense(torch.zeros(1, D_SAE)), 3, "l1")
    assert empty.rows.tolist() == [[0, 50, 100]]
    assert index.nearest(Codes.from_dense(torch.zeros(1, D_SAE)), 3, "cosine").values.tolist() == [[0.0] * 3]


def test_rows_that_fp32_cannot_tell_apart_are_ranked_exactly():
    # 1 and 1 + 2^-23 differ in the last bit of fp32; beside 4096 their sums in fp32 are the same
    z = torch.tensor([[4096.0, 1.0 + 2.0**-23], [4096.0, 1.0]])
    index = SparseIndex.of_codes(Codes.from_dense(z))
    query = Codes.from_dense(torch.tensor([[4096.0, 1.0]]))
    found = index.nearest(query, 2, "l1")
    assert found.rows.tolist() == [[1, 0]]
    assert found.values.tolist() == [[0.0, 2.0**-23]]


def test_columns_and_rows_are_the_codes_and_survive_the_disk(tmp_path):
    z = random_codes(400)
    SparseIndex.of_codes(Codes.from_dense(z)).save(tmp_path / "search")
    index = SparseIndex.open(tmp_path / "search")
    torch.testing.assert_close(index.rows(torch.tensor([5, 399, 5])).to_dense(), z[[5, 399, 5]], rtol=0, atol=0)
    for latent in (0, 1, 30, D_SAE - 1):
        rows, values = index.column(latent)
        assert rows.tolist() == z[:, latent].nonzero().squeeze(1).tolist()
        torch.testing.assert_close(values, z[rows, latent], rtol=0, atol=0)
    assert index.fired().tolist() == (z > 0).sum(0).tolist()
    assert index.manifest["sha256"] == file_digest(tmp_path / "search/index.safetensors")
    file = tmp_path / "search/index.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match="cut or missing"):
        SparseIndex.open(tmp_path / "search")


def test_mistakes_get_a_sentence():
    index = SparseIndex.of_codes(Codes.from_dense(random_codes(30)))
    query = Codes.from_dense(random_codes(60)[1:2])
    for arguments, said in [
        ((Codes.from_dense(torch.ones(1, 5)), 3), "d_sae=5"),
        ((query, 31), "k must be in 1..30"),
        ((query, 3, "euclid"), "metric must be one of l1, cosine, overlap"),
    ]:
        with pytest.raises(ValueError, match=said):
            index.nearest(*arguments)
    with pytest.raises(IndexError, match="rows must be in"):
        index.rows(torch.tensor([30]))
    with pytest.raises(ValueError, match="no rows"):
        SparseIndex.of_codes(Codes.from_dense(torch.zeros(0, 4)))
    with pytest.raises(ValueError, match="positive and finite"):
        SparseIndex.of_codes(Codes.from_dense(torch.tensor([[1.0, torch.inf]])))


# -- embeddings


def test_embedding_neighbours_are_scikit_learns():
    rows = torch.randn(400, 24, generator=torch.Generator().manual_seed(0))
    rows[11] = 0
    found = EmbeddingIndex(rows).nearest(rows[:9] * 3, 6)
    distances, places = sklearn_nearest(rows, rows[:9], 6, "cosine")
    assert found.rows.tolist() == places.tolist()
    np.testing.assert_allclose(1 - found.values.numpy(), distances, atol=1e-6)


def test_blocks_change_nothing(monkeypatch):
    rows = torch.randn(300, 8, generator=torch.Generator().manual_seed(1))
    whole = EmbeddingIndex(rows).nearest(rows[:5], 7)
    monkeypatch.setattr("vitrail.concepts.dense.ROWS_AT_ONCE", 64)
    assert torch.equal(EmbeddingIndex(rows).nearest(rows[:5], 7).rows, whole.rows)


def test_many_rows_are_searched_by_a_graph_that_knows_its_recall(tmp_path):
    pytest.importorskip("usearch")
    rows = torch.randn(3000, 16, generator=torch.Generator().manual_seed(2))
    graph = EmbeddingIndex(rows, exact=False, cache=tmp_path)
    assert graph.recall(10, n_queries=50) > 0.95
    again = EmbeddingIndex(rows, exact=False, cache=tmp_path)
    assert len(list(tmp_path.glob("*.usearch"))) == 1
    assert torch.equal(again.nearest(rows[:4], 3).rows, graph.nearest(rows[:4], 3).rows)
    assert EmbeddingIndex(rows).recall(10, n_queries=20) == 1.0


def test_the_library_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "usearch.index", None)
    with pytest.raises(ImportError, match=r'pip install "vitrail\[search\]"'):
        EmbeddingIndex(torch.ones(4, 3), exact=False)


# -- words


NAMES = {4: "striped circle", 9: "circle", 2: "red", 5: "red"}


def test_latents_are_found_by_name():
    assert latents_named("Circle", NAMES) == (9,)
    assert latents_named("striped", NAMES) == (4,)
    assert latents_named("red", NAMES) == (2, 5)
    with pytest.raises(KeyError, match="no latent is named 'zebra'"):
        latents_named("zebra", NAMES)


class Letters:
    """Counts of letters as text embeddings."""

    logit_scale = 1.0

    def encode(self, texts):
        counts = torch.tensor([[text.count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts])
        return torch.nn.functional.normalize(counts.float(), dim=1)


def test_words_that_are_no_name_find_the_nearest_names():
    assert [latent for latent, _ in nearest_names("reddish", NAMES, Letters(), template="{}", k=2)] == [2, 5]
    assert groups_of("circle, red", NAMES) == [(9,), (2, 5)]
    assert groups_of("reddish", NAMES, Letters(), k=2) == [(2, 5)]


def test_images_of_words_are_those_where_every_word_fires():
    z = torch.zeros(4, 10)
    z[0, 9], z[1, 9], z[1, 2], z[2, 5] = 4.0, 2.0, 3.0, 1.0
    # circle is 1 in row 0 and a half in row 1; red is 1 in row 1 (latent 2) and in row 2 (latent 5, at its own largest)
    rows, scores = images_firing(SparseIndex.of_codes(Codes.from_dense(z)), [(9,), (2, 5)])
    assert rows.tolist() == [1, 0, 2]
    assert scores.tolist() == [0.75, 0.5, 0.5]


def test_names_are_read_from_json(tmp_path):
    (tmp_path / "names.json").write_text(json.dumps({"17": "stripes"}))
    assert read_names(tmp_path / "names.json") == {17: "stripes"}
    (tmp_path / "names.json").write_text(json.dumps({"stripes": 17}))
    with pytest.raises(ValueError, match="must map latents to names"):
        read_names(tmp_path / "names.json")


# -- codes on disk, and a drawn box


@pytest.fixture
def code_store(tmp_path):
    """3 images of a CLS token and 2 x 3 patches, latents on known patches."""
    grid = Grid(height=2, width=3, patch_px=8, image_px=(16, 24), n_cls=1, n_registers=0)
    z = torch.zeros(3, 7, 5)
    z[:, 0, 4] = 9.0  # CLS
    z[0, 1, 0], z[0, 2, 0], z[0, 5, 1] = 2.0, 4.0, 1.0  # patches 0, 1 and 4, which is row 1, column 1
    z[1, 6, 0], z[1, 6, 1] = 3.0, 0.5
    z[2, 3, 2] = 5.0
    file = tmp_path / "codes/shards/shard-00000.safetensors"
    write_tensors(file, _tensors(Codes.from_dense(z.flatten(0, 1)), "float16"))
    shard = CodeShard("shard-00000", 3, int((z > 0).sum()), file.stat().st_size, file_digest(file))
    CodesManifest({}, "complete", "", grid, "all", 7, 5, 3, {}, [shard]).write(tmp_path / "codes")
    return CodeStore.open(tmp_path / "codes")


def test_codes_are_pooled_over_patches_or_taken_from_one_token(code_store):
    assert pooled_codes(code_store).to_dense().tolist() == [[4, 1, 0, 0, 0], [3, 0.5, 0, 0, 0], [0, 0, 5, 0, 0]]
    assert pooled_codes(code_store, "mean").to_dense()[0].tolist() == pytest.approx([1.0, 1 / 6, 0, 0, 0])
    assert pooled_codes(code_store, "cls").to_dense().tolist() == [[0, 0, 0, 0, 9]] * 3
    assert pooled_codes(code_store, 2).to_dense()[0].tolist() == [4, 0, 0, 0, 0]
    with pytest.raises(ValueError, match=r"holds rows 0\.\.6"):
        pooled_codes(code_store, 7)
    with pytest.raises(ValueError, match="pool must be"):
        pooled_codes(code_store, "median")


def test_a_box_says_what_fires_in_it_and_where_else(code_store, tmp_path):
    fires, query = fires_here(code_store, 0, (4, 0, 16, 5), names={0: "stripes"})  # touches patches 0 and 1
    assert [(f.latent, f.name, f.max, f.mean, f.n_patches) for f in fires] == [(0, "stripes", 4.0, 3.0, 2)]
    index = build_search(code_store, tmp_path / "search")
    found = index.nearest(query, 3, "overlap")
    assert found.rows.tolist() == [[0, 1, 2]]
    assert found.values.tolist() == [[1.0, 0.75, 0.0]]
    hits = explained(index, query, found, names={0: "stripes"})
    assert [shared.share for shared in hits[1].why] == [1.0]
    assert hits[2].why == ()
    with pytest.raises(ValueError, match="within 24 x 16 pixels"):
        fires_here(code_store, 0, (0, 0, 25, 8))


def test_an_index_of_other_codes_is_not_taken_for_this_one(code_store, tmp_path):
    first = build_search(code_store, tmp_path / "search")
    assert build_search(code_store, tmp_path / "search").manifest == first.manifest
    with pytest.raises(ValueError, match="pooled otherwise"):
        build_search(code_store, tmp_path / "search", pool="cls")
