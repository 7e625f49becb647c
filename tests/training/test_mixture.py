"""Rows of several sources in fixed shares."""

from fractions import Fraction

import pytest
import torch
from training_examples import Killed, coder, config, rows, weights

from vitrail.statistics import ActivationStats
from vitrail.training import MixedSource, Source, TensorSource, train
from vitrail.training.source import apportioned


def numbered(n, first, *, batch_size, seed=0, d_in=3):
    """Rows that say who they are: the first column counts from `first`."""
    x = torch.randn(n, d_in, generator=torch.Generator().manual_seed(first))
    x[:, 0] = torch.arange(first, first + n)
    return TensorSource(x, batch_size=batch_size, seed=seed)


def mixture(**changes):
    parts = {
        "images": (numbered(50, 0, batch_size=7), 0.7),
        "texts": (numbered(30, 1000, batch_size=11), 0.2),
        "sounds": (numbered(9, 2000, batch_size=4), 0.1),
    }
    return MixedSource(parts, **{"batch_size": 16, "seed": 3, **changes})


def counts(x):
    return [int(((x[:, 0] >= first) & (x[:, 0] < first + 1000)).sum()) for first in (0, 1000, 2000)]


def test_apportionment_by_hand():
    # Shares 7/10 and 3/10 in batches of 5: owed 3.5 and 1.5. Equal fractions, so the first is rounded up: 4 and 1. Then
    # owed 7 - 4 = 3 and 3 - 1 = 2.
    shares = {"a": Fraction(7, 10), "b": Fraction(3, 10)}
    assert apportioned(shares, {"a": 0, "b": 0}, 5) == {"a": 4, "b": 1}
    assert apportioned(shares, {"a": 4, "b": 1}, 5) == {"a": 3, "b": 2}


def test_after_every_batch_each_source_has_given_its_share_to_within_a_row():
    made = mixture()
    given = torch.zeros(3)
    for _ in range(40):
        for x in made:
            assert len(x) == 16
            given += torch.tensor(counts(x))
            exact = given.sum() * torch.tensor([0.7, 0.2, 0.1])
            assert (given - exact).abs().max() < 1
    assert given.sum() == 40 * (89 // 16) * 16


@pytest.mark.parametrize("trial", range(20))
def test_nobody_is_ever_asked_for_fewer_than_no_rows(trial):
    generator = torch.Generator().manual_seed(trial)
    n = int(torch.randint(2, 6, (1,), generator=generator))
    weights = torch.randint(1, 9, (n,), generator=generator).tolist()
    shares = {str(i): Fraction(weight, sum(weights)) for i, weight in enumerate(weights)}
    n_rows = -(-sum(weights) // min(weights))  # as few as are allowed
    given = dict.fromkeys(shares, 0)
    for _ in range(200):
        taken = apportioned(shares, given, n_rows)
        given = {name: given[name] + taken[name] for name in given}
        assert sum(taken.values()) == n_rows
        assert min(taken.values()) >= 0
        assert all(abs(given[name] - shares[name] * sum(given.values())) < 1 for name in given)


def test_each_sources_rows_come_in_its_own_order_without_loss_or_repetition():
    """Witness: the source read alone. A batch is a set of its next rows, shuffled."""
    made, alone = mixture(), numbered(50, 0, batch_size=7)
    from_mixture = []
    for _ in range(3):
        for x in made:
            from_mixture.append(sorted(x[x[:, 0] < 1000, 0].tolist()))
    expected = torch.cat([x for _ in range(5) for x in alone])[:, 0].tolist()
    for batch in from_mixture:
        assert batch == sorted(expected[: len(batch)])
        expected = expected[len(batch) :]


def test_rows_are_shuffled_within_the_batch_by_the_seed():
    first, again, other = (next(iter(mixture(seed=seed))) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first.sort(0).values, other.sort(0).values)
    kinds = (first[:, 0] >= 1000).tolist()
    assert kinds != sorted(kinds)


def test_it_goes_on_from_any_position():
    made = mixture()
    assert isinstance(made, Source)
    batches, states = [], []
    for _ in range(4):
        for x in made:
            batches.append(x)
            states.append(made.state_dict())
    for i in range(len(batches) - 1):
        again = mixture()
        again.load_state_dict(states[i])
        assert torch.equal(next(iter(again)), batches[i + 1])
    with pytest.raises(ValueError, match="this mixes"):
        mixture().load_state_dict({"given": {"a": 1}, "places": {}})


def test_statistics_are_those_of_the_rows_drawn():
    x, y = rows(400), rows(300) * 2 - 1
    made = MixedSource(
        {"x": (TensorSource(x, batch_size=64), 3), "y": (TensorSource(y, batch_size=64), 1)}, batch_size=8
    )
    # Witness: a table with the rows in these proportions, 900 of x and 300 of y.
    table = ActivationStats.of(torch.cat([x[:300], x[:300], x[:300], y]))
    exact = MixedSource(
        {"x": (TensorSource(x[:300], batch_size=64), 3), "y": (TensorSource(y, batch_size=64), 1)}, batch_size=8
    ).stats
    torch.testing.assert_close(exact.mean, table.mean)
    torch.testing.assert_close(exact.variance, table.variance)
    assert exact.mean_norm == pytest.approx(table.mean_norm)
    assert exact.max_norm == pytest.approx(table.max_norm)
    assert exact.centred_norm == pytest.approx(table.centred_norm)
    assert (exact.n, exact.centred_norm_rows) == (600, 600)
    assert made.n_rows == 696  # 700 rows in whole batches


def test_a_run_on_a_mixture_is_resumable_to_the_bit(tmp_path):
    def source(survives=float("inf")):
        class Interrupted(MixedSource):
            def __iter__(self):
                nonlocal survives
                for x in super().__iter__():
                    if survives == 0:
                        raise Killed
                    survives -= 1
                    yield x

        parts = {"a": (TensorSource(rows(200), batch_size=50), 2.0), "b": (TensorSource(-rows(90), batch_size=7), 1.0)}
        return Interrupted(parts, batch_size=32)

    train(coder("batch_topk"), source(), tmp_path / "whole", config=config())
    with pytest.raises(Killed):
        train(coder("batch_topk"), source(9 + 13), tmp_path / "killed", config=config())  # 9 are read by fit
    assert train(coder("batch_topk"), source(), tmp_path / "killed", config=config()).resumed_at == 10
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    assert (tmp_path / "killed" / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()


def test_the_identity_tells_weights_sources_and_seeds_apart():
    a, b = numbered(20, 0, batch_size=4), numbered(20, 50, batch_size=4)

    def identity(parts, **changes):
        return MixedSource(parts, **{"batch_size": 8, **changes}).identity

    same = {"a": (a, 1.0), "b": (b, 1.0)}
    twin = numbered(20, 0, batch_size=4)
    others = [{"a": (a, 1.0), "b": (b, 2.0)}, {"a": (a, 1.0), "b": (twin, 1.0)}, {"a": (a, 1.0)}]
    found = {identity(same), identity(same, seed=1), identity(same, batch_size=9), *map(identity, others)}
    assert len(found) == 6
    assert identity(same) == identity({"a": (a, 5), "b": (b, 5)})  # the same shares


def test_what_cannot_be_mixed_is_named():
    a = numbered(20, 0, batch_size=4)
    with pytest.raises(ValueError, match=r"different widths cannot be mixed: d_in is \{'a': 3, 'b': 5\}"):
        MixedSource({"a": (a, 1), "b": (numbered(9, 0, batch_size=4, d_in=5), 1)}, batch_size=8)
    with pytest.raises(ValueError, match="weight of a must be positive, got 0"):
        MixedSource({"a": (a, 0)}, batch_size=8)
    with pytest.raises(ValueError, match=r"b has less than one row in a batch of 8: its share is 0\.1"):
        MixedSource({"a": (a, 9), "b": (numbered(20, 50, batch_size=4), 1)}, batch_size=8)
    with pytest.raises(ValueError, match="under two names"):
        MixedSource({"a": (a, 1), "b": (a, 1)}, batch_size=8)
    with pytest.raises(ValueError, match="needs sources"):
        MixedSource({}, batch_size=8)
