"""Dead latents: counted in rows, and brought back."""

import pytest
import torch
from training_examples import BATCH, D_IN, D_SAE, coder, config, rows, source

from vitrail.coders import CODERS, Codes
from vitrail.training import REVIVERS, TensorSource, read_log, train
from vitrail.training.revive import AUX_WEIGHT, DeadCounter


def test_a_latent_is_dead_after_a_window_of_rows_without_firing():
    counter = DeadCounter(3, window=10, device=torch.device("cpu"))
    fires = torch.tensor([5, 0, 0])
    counter.update(fires, 6)
    assert counter.dead().tolist() == [False, False, False]
    counter.update(torch.tensor([1, 0, 1]), 6)  # 12 rows without latent 1
    assert counter.dead().tolist() == [False, True, False]
    counter.update(torch.tensor([0, 2, 0]), 4)
    assert counter.rows_since_fired.tolist() == [4, 0, 4]


def fitted(name="topk", **changes):
    made = coder(name, **changes)
    made.fit(source().stats, rows())
    return made


@pytest.mark.parametrize("name", sorted(CODERS))
def test_auxk_equals_the_papers_formula_and_reaches_encoder_and_decoder_of_the_dead(name):
    made, x = fitted(name).double(), rows(40).double()
    dead = torch.arange(D_SAE) % 3 == 0
    step = made.loss(x)
    term = REVIVERS["auxk"](made, step, dead)
    made.zero_grad()
    term.backward()
    found = {key: parameter.grad.clone() for key, parameter in made.named_parameters() if parameter.grad is not None}

    # Witness: dense, over all latents, with the living masked out.
    made.zero_grad()
    y = step.target
    y_hat = (
        step.codes.to_dense() @ made.W_dec + made.b_dec
    ).detach()  # of the latents that fire, not of a larger level
    pre = (y - made.b_dec.detach()) @ made.W_enc + made.b_enc
    alone = pre.masked_fill(~dead, -torch.inf)
    kept = alone >= alone.sort(1, descending=True).values[:, D_IN // 2 - 1 : D_IN // 2]
    z = torch.where(kept, pre, 0).relu()
    share = (y - y.mean(0)).square().sum() / (y - y_hat).square().sum()
    expected = AUX_WEIGHT * share * ((y - y_hat) - z @ made.W_dec).square().sum(1).mean()
    expected.backward()
    torch.testing.assert_close(term, expected)
    for key in ("W_enc", "b_enc", "W_dec"):
        torch.testing.assert_close(found[key], getattr(made, key).grad)
    assert found["W_enc"][:, dead].abs().sum() > 0
    assert found["W_dec"][dead].abs().sum() > 0
    assert found["W_enc"][:, ~dead].abs().sum() == 0
    assert found["W_dec"][~dead].abs().sum() == 0
    assert "b_dec" not in found


def test_with_nobody_dead_or_everybody_dead_it_is_finite():
    made, x = fitted(), rows(40)
    step = made.loss(x)
    assert REVIVERS["auxk"](made, step, torch.zeros(D_SAE, dtype=torch.bool)) == 0
    with torch.no_grad():
        made.b_enc.fill_(-1e6)
    step = made.loss(x)
    term = REVIVERS["auxk"](made, step, torch.ones(D_SAE, dtype=torch.bool))
    (step.loss + term).backward()
    assert term.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in made.parameters())


def test_auxk_is_a_share_of_what_is_left_over():
    """A dictionary that explains nothing of e costs 1/32 of the total variance, however small e is."""
    made, x = fitted().double(), rows(40).double()
    step = made.loss(x)
    dead = torch.arange(D_SAE) % 3 == 0
    with torch.no_grad():
        made.W_dec[dead] = 0
    term = REVIVERS["auxk"](made, step, dead)
    variance = (step.target - step.target.mean(0)).square().sum(1).mean()
    torch.testing.assert_close(term, AUX_WEIGHT * variance)


def test_one_dead_latent_is_enough():
    made = fitted()
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[7] = True
    assert REVIVERS["auxk"](made, made.loss(rows(40)), dead) > 0


@pytest.mark.parametrize("name", ["topk", "batch_topk"])
def test_latents_killed_on_purpose_come_back_with_auxk_and_not_without(name, tmp_path):
    def run(revive):
        made = fitted(name)
        with torch.no_grad():
            made.W_enc[:, : D_SAE // 2] *= 0.02  # too faint to be among the k largest
        plan = config(n_rows=200 * BATCH, lr=5e-3, revive=revive, dead_window_rows=10 * BATCH, log_every=50)
        train(made, TensorSource(rows(1000), batch_size=BATCH), tmp_path / revive, config=plan)
        return read_log(tmp_path / revive / "log.jsonl")

    without, with_auxk = run("none"), run("auxk")
    assert without[-1]["dead"] >= D_SAE // 3
    assert 3 * with_auxk[-1]["dead"] < without[-1]["dead"]
    assert set(without[-1]["terms"]) == {"reconstruction", "none"}


def test_the_log_counts_the_dead(tmp_path):
    class Mute(type(coder())):
        def training_codes(self, y):
            return Codes.from_dense(torch.zeros(len(y), self.d_sae))

    made = Mute(d_in=D_IN, d_sae=D_SAE, k=3, normalization="none")
    train(made, source(), tmp_path, config=config(n_rows=6 * BATCH, log_every=1, revive="none"))
    # The window is 4 batches: nobody is dead after 3, everybody after 4.
    assert [line["dead"] for line in read_log(tmp_path / "log.jsonl")] == [0, 0, 0, D_SAE, D_SAE, D_SAE]
