"""The loop: what it learns, logs, saves and refuses."""

import math

import pytest
import torch
from training_examples import BATCH, CONFIG, D_IN, N_STEPS, coder, config, rows, source

from vitrail.coders import CODERS, coder_metadata, load_coder, save_coder
from vitrail.files import read_json
from vitrail.statistics import ActivationStats
from vitrail.training import Source, TensorSource, TrainConfig, read_log, train
from vitrail.training.checkpoint import read_checkpoint
from vitrail.training.schedule import SCHEDULES, learning_rate


@pytest.mark.parametrize("name", sorted(CODERS))
def test_training_lowers_the_error_and_leaves_a_coder_that_can_be_used(name, tmp_path):
    result = train(coder(name), source(), tmp_path, config=config(n_rows=6400))
    log = read_log(tmp_path / "log.jsonl")
    # Archetypal directions start as the data's own, and the encoder fitted to them.
    assert log[-1]["fvu"] < (0.95 if name.startswith("archetypal") else 0.7) * log[0]["fvu"]
    assert not result.coder.training
    x = rows()
    reloaded = load_coder(tmp_path)
    assert torch.equal(reloaded.encode(x[:, : reloaded.d_in]), result.coder.encode(x[:, : reloaded.d_in]))
    constrained = result.coder.W_dec.detach().clone()
    result.coder.constrain_weights()
    torch.testing.assert_close(result.coder.W_dec.detach(), constrained)


def test_one_step_by_hand(tmp_path):
    """Witness: Adam written out. At its first step the update is lr * g / (|g| + eps), here with eps large."""
    given = coder("relu", normalization="none")
    start = {key: value.detach().clone() for key, value in given.named_parameters()}
    x = rows(8)
    step = given.loss(x)
    step.loss.backward()
    gradients = {key: value.grad.clone() for key, value in given.named_parameters()}
    gradients["W_dec"] -= (gradients["W_dec"] * start["W_dec"]).sum(1, keepdim=True) * start["W_dec"]
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
    plan = config(n_rows=8, eps=0.1, lr=0.01, warmup_steps=2, grad_clip=0.5, revive="none")
    result = train(given, TensorSource(x, batch_size=8), tmp_path, config=plan)
    for key in ("W_enc", "b_enc", "b_dec", "W_dec"):
        g = gradients[key] * 0.5 / (norm + 1e-6)
        moved = start[key] - 0.01 / 2 * g / (g.abs() + 0.1)
        if key == "W_dec":
            moved = moved / moved.norm(dim=1, keepdim=True)
        torch.testing.assert_close(getattr(result.coder, key).detach(), moved, rtol=1e-4, atol=1e-6)
    assert result.last["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert result.last["lr"] == 0.005


def test_the_log_says_what_happened(tmp_path):
    result = train(coder(), source(), tmp_path, config=CONFIG)
    log = read_log(tmp_path / "log.jsonl")
    assert [line["step"] for line in log] == [1, 3, 6, 9, 12, 15, 18, 21, 24, 25]
    assert set(log[0]) == {"step", "rows", "loss", "terms", "l0", "fvu", "dead", "lr", "grad_norm"} | {
        "dead_share",
        "revived",
        "density",
    }
    assert log[-1]["rows"] == N_STEPS * BATCH - 5 == result.rows
    for line in log:
        assert line["loss"] == pytest.approx(sum(line["terms"].values()))
        assert line["l0"] <= 3
    assert log[0]["lr"] == pytest.approx(CONFIG.lr / CONFIG.warmup_steps)


def test_the_saved_coder_carries_its_history(tmp_path):
    train(coder("batch_topk"), source(), tmp_path, config=CONFIG, metadata={"point": "blocks.0.hook_resid_post"})
    metadata = coder_metadata(tmp_path)
    assert metadata["point"] == "blocks.0.hook_resid_post"
    assert metadata["training"]["request"]["config"]["lr"] == CONFIG.lr
    assert metadata["training"]["request"]["source"]["identity"] == source().identity
    assert metadata["training"]["rows"] == N_STEPS * BATCH - 5
    assert metadata["calibration"]["estimator"] == "quantile_where_mean_l0_is_k"
    assert metadata["calibration"]["rows"] == "training"


def test_the_threshold_is_estimated_on_held_out_rows_if_they_are_given(tmp_path):
    held_out = rows(500) + 0.3
    result = train(coder("batch_topk"), source(), tmp_path, config=CONFIG, held_out=[held_out[:200], held_out[200:]])
    assert result.coder.calibration["rows"] == "held_out"
    assert result.coder.calibration["n_rows"] == 500
    assert result.coder.encode_sparse(held_out).l0().float().mean().item() == pytest.approx(3, rel=0.005)


def test_calibration_takes_as_many_rows_as_asked_across_an_epochs_end(tmp_path):
    result = train(coder("batch_topk"), source(), tmp_path, config=config(n_rows=290, calibration_rows=200))
    assert result.coder.calibration["n_rows"] >= 200
    whole = train(coder("batch_topk"), source(), tmp_path / "b", config=config(n_rows=290, calibration_rows=10**6))
    assert 300 <= whole.coder.calibration["n_rows"] < 300 + BATCH  # the source has no more


def test_the_normalisation_is_fitted_from_the_sources_statistics_unless_it_already_was(tmp_path):
    result = train(coder(), source(), tmp_path / "a", config=config(n_rows=40))
    torch.testing.assert_close(result.coder.normalize.mean, source().stats.mean.float())
    fitted = coder()
    fitted.fit(ActivationStats.of(rows() + 1), rows() + 1)
    kept = train(fitted, source(), tmp_path / "b", config=config(n_rows=40))
    torch.testing.assert_close(kept.coder.normalize.mean, source().stats.mean.float() + 1)


@pytest.mark.parametrize("name", sorted(CODERS))
def test_activations_that_are_not_finite_stop_the_run_and_name_the_step(name, tmp_path):
    class Broken(TensorSource):
        def __iter__(self):
            for x in super().__iter__():
                yield x * math.nan if self._epoch == 0 and self._next_row == 9 * BATCH else x

    def run(**changes):
        given = coder(name)
        given.fit(source().stats, rows())
        broken = Broken(rows(), batch_size=BATCH, seed=2)
        return train(given, broken, tmp_path, config=config(**changes))

    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 9, after 256 rows"):
        run()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-000000005"]
    tensors = torch.cat([value.flatten().float() for value in _checkpoint(tmp_path).values()])
    assert tensors.isfinite().all()
    with pytest.raises(FloatingPointError, match="step 9"):
        run()


def _checkpoint(out):
    return {key: value for key, value in read_checkpoint(out)[1].items() if key != "rng"}


def test_progress_counts_rows_and_begins_where_it_was(tmp_path):
    seen = []

    class Watched:
        def task(self, title, total, unit, done=0):
            seen.append((title, total, unit, done))
            return self

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def advance(self, n, note=""):
            seen.append((n, note))

    train(coder(), source(), tmp_path, config=config(n_rows=70), progress=Watched())
    assert seen[0] == ("training topk", 70, "rows", 0)
    assert [advance[0] for advance in seen[1:]] == [32, 32, 6]
    assert "l0" in seen[-1][1]
    assert "dead" in seen[-1][1]


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_schedules_start_at_one_and_never_rise(schedule):
    factors = [SCHEDULES[schedule](share) for share in torch.linspace(0, 1, 50).tolist()]
    assert factors[0] == 1
    assert factors == sorted(factors, reverse=True)
    assert (factors[-1] < 1e-6) == (schedule != "constant")


def test_schedules_by_hand():
    # Half way, cosine is at a half; linear is at 1 until .8, and at .9 at a half. Step 50 of 200 is a quarter, but with
    # .08 of a short run behind it, warming up for a tenth of the run has come to .8.
    assert SCHEDULES["cosine"](0.5) == pytest.approx(0.5)
    assert SCHEDULES["linear"](0.8) == pytest.approx(1)
    assert SCHEDULES["linear"](0.9) == pytest.approx(0.5)
    assert learning_rate(0.1, "constant", share=0.01, step=50, warmup_steps=200) == pytest.approx(0.025)
    assert learning_rate(0.1, "constant", share=0.08, step=50, warmup_steps=200) == pytest.approx(0.08)
    assert learning_rate(0.1, "constant", share=0.1, step=1, warmup_steps=0) == pytest.approx(0.1)


def test_rows_in_memory_are_a_source_that_goes_on_from_any_position():
    made = TensorSource(rows(10), batch_size=4, seed=1)
    assert isinstance(made, Source)
    batches, states = [], []
    for _ in range(2):
        for x in made:
            batches.append(x)
            states.append(made.state_dict())
    assert [len(x) for x in batches] == [4, 4, 2, 4, 4, 2]
    for epoch in (batches[:3], batches[3:]):
        assert torch.equal(torch.cat(epoch).sort(0).values, rows(10).sort(0).values)
    assert not torch.equal(torch.cat(batches[:3]), torch.cat(batches[3:]))
    for i, state in enumerate(states[:-1]):
        again = TensorSource(rows(10), batch_size=4, seed=1)
        again.load_state_dict(state)
        assert torch.equal(next(iter(again)), batches[i + 1])


def test_the_identity_of_rows_tells_rows_order_and_batches_apart():
    x = rows(10)
    identities = {
        TensorSource(x, batch_size=4).identity,
        TensorSource(x, batch_size=5).identity,
        TensorSource(x, batch_size=4, seed=1).identity,
        TensorSource(x + 1, batch_size=4).identity,
    }
    assert len(identities) == 4
    assert TensorSource(x, batch_size=4).identity == TensorSource(x.clone(), batch_size=4).identity


def test_epochs_are_counted_in_the_sources_rows(tmp_path):
    result = train(coder(), source(), tmp_path, config=config(n_rows=None, epochs=1.5))
    assert result.rows == 450
    assert (
        read_json(tmp_path / "coder.json", "coder")["metadata"]["training"]["request"]["source"]["rows_in_all"] == 450
    )
    assert TrainConfig(n_rows=7, epochs=3).total_rows(None) == 7
    with pytest.raises(ValueError, match="Set n_rows"):
        TrainConfig().total_rows(None)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"schedule": "step"}, "schedule must be one of constant, linear, cosine, got 'step'"),
        ({"revive": "pray"}, "revive must be one of none, auxk, ghost, resample, got 'pray'"),
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"n_rows": 0}, "n_rows must be positive"),
        ({"warmup_steps": -1}, "must not be negative"),
    ],
)
def test_impossible_settings_are_named(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        TrainConfig(**changes)


def test_what_does_not_fit_is_named(tmp_path):
    with pytest.raises(ValueError, match=rf"rows have d_in={D_IN}, the coder takes d_in=5"):
        train(coder(d_in=5), source(), tmp_path)
    with pytest.raises(ValueError, match="at least one row"):
        TensorSource(torch.zeros(0, 3), batch_size=2)

    class Silent(TensorSource):
        def __iter__(self):
            yield from ()

    with pytest.raises(ValueError, match="gave no rows"):
        train(coder(normalization="none"), Silent(rows(), batch_size=4), tmp_path / "a", config=config())


def test_a_folder_with_a_coder_from_elsewhere_is_left_alone(tmp_path):
    save_coder(tmp_path, coder(normalization="none"))
    with pytest.raises(ValueError, match="was not trained here"):
        train(coder(), source(), tmp_path, config=config())
