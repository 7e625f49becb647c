"""The metrics against numbers worked by hand, a slow loop, and the closed forms of SPEC section M."""

import numpy as np
import pytest
import torch

from vitrail.steering.steerability import (
    Tally,
    expected_distinct,
    layer,
    limit_steerability,
    share_interval,
    steerability,
    word_distances,
)


def uniform_over(n, v):
    p = torch.zeros(v, dtype=torch.float64)
    p[:n] = 1 / n
    return p


WORDS = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("n", [1, 3, 12])
def test_from_uniform_to_uniform_over_n_words(n):
    before = uniform_over(12, 12).expand(4, -1)
    found = steerability(uniform_over(n, 12).expand(1, 4, -1), before, WORDS)
    assert found.s == pytest.approx([1 / n - 1 / 12], abs=1e-15)
    assert found.ipr == pytest.approx([1 / n], rel=1e-12)
    assert found.delta_tv == pytest.approx([1 - n / 12], abs=1e-12)
    assert found.delta_max == pytest.approx([max(1 / n - 1 / 12, 1 / 12 if n < 12 else 0)], abs=1e-12)


def test_from_one_word_to_another():
    before = torch.eye(12, dtype=torch.float64)[[3, 3]]
    found = steerability(torch.eye(12, dtype=torch.float64)[[7, 7]][None], before, WORDS)
    assert found.s == pytest.approx([2.0], rel=1e-15)
    assert found.s_sd.tolist() == [0.0]
    assert found.ipr.tolist() == [1.0]
    assert (found.delta_max, found.delta_tv, found.top, found.top_probability) == ([1.0], [1.0], [7], [1.0])
    assert found.distance == pytest.approx([float(word_distances(WORDS)[7])])


def test_the_mean_of_squares_is_not_the_square_of_the_mean():
    # Two images, two words: one moves (1, 0) -> (0, 1), the other back. Each changes by 1 + 1 = 2; the mean not at all.
    before = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    found = steerability(torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]), before, torch.eye(2))
    assert found.s == pytest.approx([2.0], rel=1e-15)
    assert (found.delta_max, found.delta_tv) == ([0.0], [0.0])


def test_the_distance_by_hand():
    # Words (1, 0) and (0, 2), made unit rows: their mean is (.5, .5), each is sqrt(.5) away. D = sqrt(.5) for every p.
    found = steerability(
        torch.tensor([[[0.3, 0.7]]]), torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    )
    assert found.distance == pytest.approx([0.5**0.5])


def test_in_parts_it_is_what_a_slow_loop_gives():
    generator = torch.Generator().manual_seed(3)
    after = (3 * torch.randn(5, 7, 12, generator=generator)).softmax(2)
    before = (3 * torch.randn(7, 12, generator=generator)).softmax(1)
    tally = Tally(5, before)
    for first in (0, 2, 4):
        for images in (slice(0, 3), slice(3, 7)):
            chosen = slice(first, min(first + 2, 5))
            tally.add(chosen, images, after[chosen, images].clone())
    found, distances = tally.result(word_distances(WORDS)), word_distances(WORDS)
    for j in range(5):
        p = np.zeros(12)
        s, ipr, delta = [], 0.0, np.zeros(12)
        for i in range(7):
            new, old = after[j, i].double().numpy(), before[i].double().numpy()
            s.append(((new - old) ** 2).sum())
            ipr += (new**2).sum() / 7
            p += new / 7
            delta += (new - old) / 7
        assert found.per_image[j] == pytest.approx(s, rel=1e-5)
        expected = (np.mean(s), np.std(s, ddof=1), ipr, np.abs(delta).max(), np.abs(delta).sum() / 2, p.max())
        assert (
            found.s[j],
            found.s_sd[j],
            found.ipr[j],
            found.delta_max[j],
            found.delta_tv[j],
            found.top_probability[j],
        ) == pytest.approx(expected, rel=1e-5)
        assert (found.top[j], found.delta_word[j]) == (p.argmax(), np.abs(delta).argmax())
        assert found.distance[j] == pytest.approx(float(torch.from_numpy(p) @ distances), rel=1e-5)


def test_a_change_of_almost_nothing_is_not_lost():
    before = torch.full((1, 4), 0.25)
    after = before + torch.tensor([1e-5, -1e-5, 0, 0])  # s = 2e-10; in fp32 ipr - 2 <P~, P> + |P|^2 gives 0 or 1e-8
    tally = Tally(1, before)
    tally.add(slice(0, 1), slice(0, 1), after[None].clone())
    assert tally.result(torch.ones(4)).s == pytest.approx([2e-10], rel=0.01)


def test_a_missing_pair_is_told():
    tally = Tally(2, torch.full((3, 4), 0.25))
    tally.add(slice(0, 2), slice(0, 2), torch.full((2, 2, 4), 0.25))
    with pytest.raises(ValueError, match="2 pairs"):
        tally.result(torch.ones(4))
    with pytest.raises(ValueError, match="no images"):
        Tally(2, torch.zeros(0, 4))


def test_the_limit_is_s_of_that_answer_on_every_image():
    before = torch.randn(6, 12, generator=torch.Generator().manual_seed(1)).softmax(1)
    limits = (5 * WORDS[:3] @ WORDS.T).softmax(1)
    s, top = limit_steerability(limits, before)
    found = steerability(limits[:, None].expand(-1, 6, -1), before, WORDS)
    assert s.numpy() == pytest.approx(found.s)
    assert top.tolist() == found.top.tolist()


# -- the layer


def test_a_layer_by_hand():
    s = np.array([0.05, 0.2, 0.6, 0.7, 1.9, 0.1])
    ipr = np.array([0.9, 0.1, 0.2, 0.6, 0.3, 0.1])
    found = layer(s, ipr, np.array([9, 9, 4, 4, 5, 6]), np.array([0.5, 0.7]), n_all=6, concepts_of=(6, 7))
    assert found.count == 4  # .2 .6 .7 1.9; .1 is not above .1
    assert found.share == pytest.approx(4 / 6)
    assert (found.eq8_count, found.concepts, found.concepts_of) == (3, 2, {6: 2.0})
    assert (found.ipr_count, found.ipr_concepts) == (2, 2)  # of words 9 and 4
    assert found.mean_s.value == pytest.approx(0.6)
    assert found.share_sampling is None
    assert found.mean_s_sampling is None


def test_the_papers_sample_has_an_interval():
    # 1,322 of 12,000 of 49,152 (SPEC row 115): 11.0 %. Binomial sd .00286, times sqrt(37152 / 49151) = .00249.
    low, high = share_interval(1322, 12000, 49152)
    assert (low, high) == (pytest.approx(0.1102 - 0.0049, abs=1e-4), pytest.approx(0.1102 + 0.0049, abs=1e-4))
    assert share_interval(1322, 12000, 12000) is None
    # Without the correction: Wilson's for 8 of 10, 49.0 % to 94.3 %.
    assert share_interval(8, 10, 10**9) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_a_sample_covers_its_population():
    rng = np.random.default_rng(0)
    population = rng.random(400) < 0.2
    hits = 0
    for _ in range(400):
        low, high = share_interval(int(rng.choice(population, 200, replace=False).sum()), 200, 400)
        hits += low <= population.mean() <= high
    assert 0.92 <= hits / 400 <= 0.98


def test_rarefaction_by_hand_and_by_drawing():
    # Of coordinates with words a, a, b and one without, two are drawn: 6 pairs; aa 1, ab 2, ab 2, a- 1, a- 1, b- 1.
    assert expected_distinct(np.array([0, 0, 1]), 4, 2) == pytest.approx(8 / 6)
    assert expected_distinct(np.array([0, 0, 1]), 4, 4) == 2
    assert expected_distinct(np.array([], dtype=int), 4, 3) == 0
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 30, 60)
    everyone = np.concatenate([labels, np.full(40, -1)])
    drawn = [len(set(rng.choice(everyone, 25, replace=False)) - {-1}) for _ in range(3000)]
    assert expected_distinct(labels, 100, 25) == pytest.approx(np.mean(drawn), abs=0.15)


def test_what_cannot_be_is_told():
    with pytest.raises(ValueError, match="between 1 and all 3"):
        layer(np.ones(4), np.ones(4), np.zeros(4, dtype=int), np.ones(2), n_all=3)
    with pytest.raises(ValueError, match=r"gamma is a threshold on s.*got 3"):
        layer(np.ones(2), np.ones(2), np.zeros(2, dtype=int), np.ones(2), n_all=3, gamma=3)
