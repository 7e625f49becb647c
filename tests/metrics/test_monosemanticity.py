"""M5: closed forms, a slow loop, the released package, and codes that come in parts."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from seen_examples import coder_of, same_in_two_batches, setting_of

from test_index import code_store
from vitrail.coders.sparse import Codes
from vitrail.index import build_index
from vitrail.metrics.monosemanticity import (
    TABLE_TYPES,
    Monosemanticity,
    TopImages,
    monosemantic,
    random_group_baseline,
    visaebench_scores,
)
from vitrail.metrics.passing import Seen
from vitrail.tables import read_table, write_table


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sparse(n, d_sae, seed=0, share=0.3):
    z = draw(n, d_sae, seed=seed).abs()
    return z * (torch.rand(n, d_sae, generator=torch.Generator().manual_seed(seed + 1)) < share)


def score(z, embeddings, labels=None, n_top=16, **given):
    return monosemantic(TopImages.of_codes(Codes.from_dense(z), n_top), embeddings, labels, **given)


def test_identical_orthogonal_and_antipodal_pictures():
    z = torch.full((16, 1), 2.0)
    z[0] = 3.0  # so that the weights are not all 0: fires everywhere, min-max over all pictures
    one = torch.ones(16, 1) + torch.zeros(1, 3)
    flipped = one * torch.tensor([1.0, -1.0]).repeat(8)[:, None]
    for embeddings, expected in ((one, 1.0), (torch.eye(16), 0.0), (flipped, -1 / 15)):
        assert score(z, embeddings).equal[0] == pytest.approx(expected, abs=1e-12)
        assert random_group_baseline(embeddings) == pytest.approx(expected, abs=1e-12)
    # A 17th picture that does not excite it: 0 is the minimum, so that equal activations weigh the same.
    z = torch.cat([torch.full((16, 1), 2.0), torch.zeros(1, 1)])
    for embeddings, expected in ((one, 1.0), (torch.eye(16), 0.0), (flipped, -1 / 15)):
        more = torch.cat([embeddings, embeddings[:1]])
        assert score(z, more).weighted[0] == pytest.approx(expected, abs=1e-12)


def test_three_pictures_by_hand():
    # Activations 4, 2, 1 and 0 weigh 1, 1/2, 1/4. Cosines: 12: 1, 13: 0, 23: 0. Pairs weigh 1/2, 1/4, 1/8: MS = 4/7.
    z = torch.tensor([[4.0], [2], [1], [0]])
    embeddings = torch.tensor([[5.0, 0], [1, 0], [0, 2], [1, 1]])
    found = score(z, embeddings, torch.tensor([0, 0, 0, 1]))
    assert found.weighted[0] == pytest.approx(4 / 7)
    assert found.equal[0] == pytest.approx(1 / 3)
    assert (found.within[0], found.within_share[0]) == (pytest.approx(4 / 7), 1)
    assert math.isnan(found.between[0])
    # All six pairs: 1, 0, 0 and three of cosine 1/sqrt 2.
    assert found.baseline == pytest.approx((1 + 3 / math.sqrt(2)) / 6)
    assert found.pool_baseline == pytest.approx(1 / 3)
    summary = found.summary(n_bootstrap=0)
    assert summary["monosemanticity_normalized"].value == pytest.approx((4 / 7 - found.baseline) / (1 - found.baseline))


def test_against_a_slow_loop_and_the_decomposition_is_exact():
    z, embeddings, labels = sparse(60, 25), draw(60, 7, seed=5), torch.arange(60) % 4
    z[:, 3] = 0  # dead
    z[:, 4] = 0
    z[7, 4] = 1.0  # one picture: no pair
    z[:, 5] = draw(60, seed=9).abs() + 0.5  # fires everywhere
    z[:, 6] = (z[:, 6] > 0) * 2.0  # ties
    found = score(z, embeddings, labels)
    e = torch.nn.functional.normalize(embeddings.double(), dim=1).numpy()
    for j in range(25):
        a = z[:, j].double().numpy()
        top = sorted(np.flatnonzero(a > 0), key=lambda i: (-a[i], i))[:16]
        if len(top) < 2:
            assert math.isnan(found.weighted[j])
            continue
        w = {i: (a[i] - a.min()) / (a.max() - a.min()) for i in top}
        sums = {"all": [0.0, 0.0], True: [0.0, 0.0], False: [0.0, 0.0]}
        for u, v in combinations(top, 2):
            for part in ("all", bool(labels[u] == labels[v])):
                sums[part][0] += w[u] * w[v] * (e[u] @ e[v])
                sums[part][1] += w[u] * w[v]
        assert found.weighted[j] == pytest.approx(sums["all"][0] / sums["all"][1])
        if sums[True][1]:
            assert found.within[j] == pytest.approx(sums[True][0] / sums[True][1])
        assert found.within_share[j] == pytest.approx(sums[True][1] / sums["all"][1])
        rho = found.within_share[j]
        both = (rho * found.within[j] if rho > 0 else 0) + ((1 - rho) * found.between[j] if rho < 1 else 0)
        assert both == pytest.approx(found.weighted[j], abs=1e-12)
    assert (found.n_dead, found.n_too_few) == (1, 1)
    numbers = {name: one.value for name, one in found.summary(n_bootstrap=10).items()}
    parts = numbers["monosemanticity_within_part"] + numbers["monosemanticity_between_part"]
    assert parts == pytest.approx(numbers["monosemanticity"], abs=1e-12)
    assert (numbers["monosemanticity_dead"], numbers["monosemanticity_too_few"]) == (1, 1)


def test_the_baseline_is_the_mean_of_random_groups():
    embeddings = draw(40, 5) + 0.5
    e = torch.nn.functional.normalize(embeddings.double(), dim=1)
    rng = np.random.default_rng(0)
    means = []
    for _ in range(4000):
        group = e[torch.from_numpy(rng.choice(40, 16, replace=False))]
        means.append(float((group.sum(0).square().sum() - 16) / 240))
    error = np.std(means) / len(means) ** 0.5
    assert random_group_baseline(embeddings) == pytest.approx(np.mean(means), abs=4 * error)
    assert error < 0.002


def test_pure_latents_score_above_random_ones():
    labels = torch.arange(80) % 4
    embeddings = torch.eye(4)[labels] + 0.1 * draw(80, 4)
    pure = (torch.eye(4)[labels] * (1 + draw(80, 4, seed=2).abs())).float()
    numbers = [score(z, embeddings, labels).summary(n_bootstrap=0) for z in (pure, sparse(80, 30, share=0.5))]
    first, second = (one["monosemanticity_normalized"].value for one in numbers)
    assert first > 0.9
    assert abs(second) < 0.1


def test_streamed_in_parts_with_patches():
    coder = coder_of(6)
    z, embeddings, labels = sparse(12 * 5, 6, share=0.6), draw(12, 3, seed=4), torch.arange(12) % 3
    setting = setting_of(coder, n_tokens=5, patches=slice(1, 5), n_images=12)

    def seen(rows):
        part = z[rows.start * 5 : rows.stop * 5]
        x = torch.zeros(rows.stop - rows.start, 5, 2)
        return Seen(x=x, target=x, codes=Codes.from_dense(part), x_hat=x, labels=labels[rows])

    same_in_two_batches(
        lambda: Monosemanticity(setting, embeddings=embeddings, n_top=4),
        seen(slice(0, 12)),
        [seen(slice(0, 5)), seen(slice(5, 12))],
    )
    metric = Monosemanticity(setting, embeddings=embeddings, n_top=4)
    metric.update(seen(slice(0, 12)))
    pooled = z.reshape(12, 5, 6)[:, 1:].amax(1)  # CLS is no patch
    expected = score(pooled, embeddings, labels, n_top=4)
    assert np.array_equal(metric.scores().weighted, expected.weighted, equal_nan=True)


def test_from_an_index_it_is_the_same_where_no_latent_always_fires(tmp_path):
    z = sparse(30, 8, share=0.5)
    z[0] = 0
    direct = TopImages.of_codes(Codes.from_dense(z), 4)
    index = build_index(code_store(tmp_path / "codes", z[:, None], [18, 12]), tmp_path / "index", k=6)
    indexed = TopImages.of_index(index, 4)
    assert np.array_equal(indexed.images, direct.images)
    assert np.allclose(indexed.weights(), direct.weights(), atol=1e-3)  # codes on disk are fp16
    embeddings = draw(30, 3)
    found = monosemantic(indexed, embeddings)
    assert np.allclose(found.weighted, monosemantic(direct, embeddings).weighted, atol=1e-3, equal_nan=True)
    assert found.summary(n_bootstrap=0)["monosemanticity"].definition == "top-4, pairs-weighted, min-0, any-token"
    with pytest.raises(ValueError, match=r"n_top must be in 2\.\.6"):
        TopImages.of_index(index, 7)


def test_a_table_of_latents_is_written_and_read(tmp_path):
    found = score(sparse(20, 5), draw(20, 3))
    table = found.table()
    write_table(tmp_path / "m5.parquet", table, {name: TABLE_TYPES[name] for name in table})
    again = read_table(tmp_path / "m5.parquet")
    assert np.allclose(again["monosemanticity"], found.weighted, atol=1e-6, equal_nan=True)


def test_the_released_package_has_this_number():
    pytest.importorskip("visaebench")
    from visaebench.metrics.concept_detection.monosemanticity import MonosemanticityScore

    z, embeddings = sparse(50, 40, share=0.4), draw(50, 6, seed=8)
    z[:, 0] = 0
    z[:, 1] += 0.25

    class Coder:
        def encode(self, x):
            return x

    class Eyes:
        def extract_activations(self, images, layer):
            return embeddings[images][:, None]

    theirs = MonosemanticityScore(max_features=20).compute(
        Coder(), z[:, None], device="cpu", images=list(range(50)), evaluator_backbone=Eyes()
    )
    found = score(z, embeddings)
    ours = visaebench_scores(found, max_latents=20)
    assert ours["monosemanticity_visaebench"].value == pytest.approx(theirs.value, abs=1e-6)
    assert ours["monosemanticity_visaebench_std"].value == pytest.approx(theirs.metadata["ms_std"], abs=1e-6)
    assert ours["monosemanticity_visaebench_median"].value == pytest.approx(theirs.metadata["ms_median"], abs=1e-6)
    assert ours["monosemanticity_visaebench"].n == theirs.metadata["num_features_scored"]
    assert found.n_dead == theirs.metadata["num_dead_features"]


def test_wrong_input_is_named():
    z = sparse(10, 3)
    with pytest.raises(ValueError, match="codes are of 10 pictures, got 9 embeddings"):
        score(z, draw(9, 2))
    with pytest.raises(ValueError, match="1 of 10 embeddings are all 0"):
        score(z, torch.cat([draw(9, 2), torch.zeros(1, 2)]))
    with pytest.raises(ValueError, match="n_top must be 2 or more, got 1"):
        score(z, draw(10, 2), n_top=1)
    with pytest.raises(ValueError, match=r"min_images must be in 2\.\.16"):
        score(z, draw(10, 2), min_images=40)
    with pytest.raises(ValueError, match=r"compat must be 'visaebench-0\.1'"):
        Monosemanticity(setting_of(coder_of(3)), embeddings=draw(3, 2), compat="0.2")
    with pytest.raises(ValueError, match="no images were measured"):
        Monosemanticity(setting_of(coder_of(3)), embeddings=draw(3, 2)).compute()
