"""Dead latents: counted in rows, and brought back."""

import pytest
import torch
from training_examples import BATCH, D_IN, D_SAE, coder, config, rows, source

from vitrail.coders import CODERS, Codes
from vitrail.training import REVIVERS, TensorSource, read_log, train
from vitrail.training.draws import generator
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
    term = REVIVERS["auxk"].term(made, step, dead)
    made.zero_grad()
    term.backward()
    found = {key: parameter.grad.clone() for key, parameter in made.named_parameters() if parameter.grad is not None}

    # Witness: dense, over all latents, with the living masked out.
    made.zero_grad()
    y = step.target.detach()
    # Of the latents that fire, not of a larger level.
    y_hat = (step.codes.to_dense() @ made.W_dec + made.output_bias()).detach()
    pre = (step.y - made.b_dec.detach()) @ made.W_enc + made.b_enc
    alone = pre.masked_fill(~dead, -torch.inf)
    kept = alone >= alone.sort(1, descending=True).values[:, made.d_in // 2 - 1 : made.d_in // 2]
    z = torch.where(kept, pre, 0).relu()
    share = (y - y.mean(0)).square().sum() / (y - y_hat).square().sum()
    expected = AUX_WEIGHT * share * ((y - y_hat) - z @ made.W_dec).square().sum(1).mean()
    expected.backward()
    torch.testing.assert_close(term, expected)
    assert {"b_enc", "W_dec"} <= set(found)
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, getattr(made, key).grad)
    if "W_enc" in dict(made.named_parameters()):  # else tied to the decoder
        assert found["W_enc"][:, dead].abs().sum() > 0
        assert found["W_enc"][:, ~dead].abs().sum() == 0
    assert found["W_dec"][dead].abs().sum() > 0
    assert found["W_dec"][~dead].abs().sum() == 0
    assert "b_dec" not in found


def test_with_nobody_dead_or_everybody_dead_it_is_finite():
    made, x = fitted(), rows(40)
    step = made.loss(x)
    assert REVIVERS["auxk"].term(made, step, torch.zeros(D_SAE, dtype=torch.bool)) == 0
    with torch.no_grad():
        made.b_enc.fill_(-1e6)
    step = made.loss(x)
    term = REVIVERS["auxk"].term(made, step, torch.ones(D_SAE, dtype=torch.bool))
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
    term = REVIVERS["auxk"].term(made, step, dead)
    variance = (step.target - step.target.mean(0)).square().sum(1).mean()
    torch.testing.assert_close(term, AUX_WEIGHT * variance)


def test_one_dead_latent_is_enough():
    made = fitted()
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[7] = True
    assert REVIVERS["auxk"].term(made, made.loss(rows(40)), dead) > 0


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


@pytest.mark.parametrize("name", ["relu", "topk", "matryoshka", "topk_transcoder"])
def test_ghost_gradients_equal_dense_autograd_in_encoder_and_decoder(name):
    made, x = fitted(name).double(), rows(40).double()
    dead = torch.arange(D_SAE) % 3 == 0
    step = made.loss(x)
    made.zero_grad()
    term = REVIVERS["ghost"].term(made, step, dead)
    term.backward()
    found = {key: parameter.grad.clone() for key, parameter in made.named_parameters() if parameter.grad is not None}

    # Witness: Anthropic's five steps over all latents, row by row, the living masked out after the exponential.
    made.zero_grad()
    e = (step.target - step.codes.to_dense() @ made.W_dec - made.output_bias()).detach()
    z = torch.exp((step.y - made.b_dec.detach()) @ made.W_enc + made.b_enc) * dead
    outputs = []
    for row, residual in zip(z @ made.W_dec, e, strict=True):
        factor = float((residual.norm() / 2 / row.norm()).detach())
        outputs.append(row * factor)
        assert (row * factor).norm().item() == pytest.approx(residual.norm().item() / 2)
    ghost_loss = (e - torch.stack(outputs)).square().sum(1).mean()
    expected = ghost_loss * float((e.square().sum(1).mean() / ghost_loss).detach())
    expected.backward()
    torch.testing.assert_close(term, expected)
    torch.testing.assert_close(term, e.square().sum(1).mean())  # as large as the reconstruction error
    for key in ("W_enc", "b_enc", "W_dec"):
        torch.testing.assert_close(found[key], getattr(made, key).grad)
    assert found["W_enc"][:, dead].abs().sum() > 0
    assert found["W_dec"][dead].abs().sum() > 0
    assert found["W_enc"][:, ~dead].abs().sum() == 0
    assert "b_dec" not in found


def test_a_ghost_by_hand():
    # One row y = (3, 4), nobody fires, so e = y with ||e|| = 5. One dead latent with decoder (1, 0): whatever its
    # exponential is, its output is scaled to (2.5, 0). Error .5^2 + 4^2 = 16.25, brought to ||e||^2 = 25. By the
    # decoder's first entry: d/dw of (2.5 w - 3)^2 is 2 * 2.5 * (2.5 - 3) = -2.5, times 25 / 16.25; by its second
    # 2 * 2.5 * (0 - 4) = -20, times the same.
    made = coder("topk", d_in=2, d_sae=2, k=1, normalization="none").double()
    with torch.no_grad():
        made.W_enc.zero_()
        made.b_enc.copy_(torch.tensor([-700.0, -1.0]))  # exp(-700) alone would be lost in fp32, and 1e-6 in the norm
        made.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    step = made.loss(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    term = REVIVERS["ghost"].term(made, step, torch.tensor([True, False]))
    term.backward()
    assert term.item() == pytest.approx(25)
    assert made.W_dec.grad[0].tolist() == pytest.approx([-2.5 * 25 / 16.25, -20 * 25 / 16.25])


@pytest.mark.parametrize("revive", sorted(REVIVERS))
def test_with_nobody_dead_every_term_is_nothing_and_with_everybody_dead_it_is_finite(revive):
    made = fitted()
    step = made.loss(rows(40) * 100)
    assert REVIVERS[revive].term(made, step, torch.zeros(D_SAE, dtype=torch.bool)) == 0
    (step.loss + REVIVERS[revive].term(made, step, torch.ones(D_SAE, dtype=torch.bool))).backward()
    assert all(parameter.grad.isfinite().all() for parameter in made.parameters())


def resampled(made, x, dead, seed=0):
    optimizer = torch.optim.Adam(made.parameters())
    step = made.loss(x)
    step.loss.backward()
    optimizer.step()
    for state in optimizer.state.values():
        state["exp_avg"].fill_(1)
        state["exp_avg_sq"].fill_(1)
    numbers = REVIVERS["resample"].after_step(made, step, dead, optimizer, generator(seed, 1))
    return step, optimizer, numbers


def test_a_resampled_latent_reads_and_writes_a_row_and_adam_forgets_it():
    made, x = fitted().double(), rows(40).double()
    dead = torch.arange(D_SAE) % 3 == 0
    with torch.no_grad():
        made.W_enc *= torch.linspace(1, 3, D_SAE).double()
        made.b_enc += 0.1
    step, optimizer, numbers = resampled(made, x, dead)
    assert numbers.tolist() == dead.nonzero().squeeze(1).tolist()
    norms = made.W_enc.detach().norm(dim=0)
    torch.testing.assert_close(norms[dead], (0.2 * norms[~dead].mean()).expand(len(numbers)))
    torch.testing.assert_close(made.W_dec[dead].norm(dim=1), torch.ones(len(numbers)).double())
    unit_rows = step.y - made.b_dec
    unit_rows = unit_rows / unit_rows.norm(dim=1, keepdim=True)
    for i in numbers:
        cosines = unit_rows @ made.W_dec[i]
        assert cosines.max().item() == pytest.approx(1)
        torch.testing.assert_close(made.W_enc[:, i] / norms[i], made.W_dec[i])
        assert made.b_enc[i] == 0
    for parameter, by_latent in ((made.W_enc, lambda m: m.t()), (made.W_dec, lambda m: m), (made.b_enc, lambda m: m)):
        for moment in ("exp_avg", "exp_avg_sq"):
            held = by_latent(optimizer.state[parameter][moment])
            assert held[dead].abs().sum() == 0
            assert (held[~dead] == 1).all()


def test_rows_are_drawn_by_the_square_of_their_squared_error():
    # Nothing fires, so a row's error is its length. Lengths 1 and 2: squared 1 and 4, and the square of that 1 and 16,
    # so the longer row is drawn 16 times in 17.
    made = coder("topk", d_in=2, d_sae=4000, k=1, normalization="none").double()
    with torch.no_grad():
        made.b_enc.fill_(-100)
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    step = made.loss(x)
    optimizer = torch.optim.Adam(made.parameters())
    step.loss.backward()
    optimizer.step()
    with torch.no_grad():
        made.b_dec.zero_()
    dead = torch.ones(4000, dtype=torch.bool)
    REVIVERS["resample"].after_step(made, step, dead, optimizer, generator(0, 1))
    share = (made.W_dec[:, 1] > 0.5).double().mean().item()
    assert share == pytest.approx(16 / 17, abs=3 * (16 / 17 / 17 / 4000) ** 0.5)


def test_the_seed_draws_the_rows_and_with_nobody_dead_nothing_changes():
    dead = torch.arange(D_SAE) % 3 == 0

    def directions(seed):
        made = fitted()
        resampled(made, rows(40), dead, seed)
        return made.W_dec.detach()[dead]

    assert torch.equal(directions(0), directions(0))
    assert not torch.equal(directions(0), directions(1))
    made = fitted()
    assert len(resampled(made, rows(40), ~dead & dead)[2]) == 0


@pytest.mark.parametrize("name", sorted(CODERS))
def test_every_architecture_can_be_resampled_and_averaged_at_once(name, tmp_path):
    made = coder(name)
    made.fit(source().stats, rows())
    with torch.no_grad():
        made.b_enc[::3] = -100
    plan = config(n_rows=9 * BATCH, revive="resample", resample_every=6, average_decay=0.9, log_every=1)
    result = train(made, source(), tmp_path, config=plan)
    assert sum(line["revived"] for line in read_log(tmp_path / "log.jsonl")) >= D_SAE // 3
    assert (made.b_enc[::3] > -1).all()
    assert all(parameter.isfinite().all() for parameter in result.coder.parameters())


def test_resampling_comes_every_so_many_steps_and_gives_a_whole_window(tmp_path):
    def faint():
        made = fitted()
        with torch.no_grad():
            made.W_enc[:, ::2] *= 1e-3
        return made

    plan = config(n_rows=24 * BATCH, revive="resample", resample_every=7, log_every=1, dead_window_rows=5 * BATCH)
    train(faint(), source(), tmp_path / "a", config=plan)
    log = read_log(tmp_path / "a" / "log.jsonl")
    assert {line["step"] for line in log if line["revived"]} <= {7, 14, 21}
    assert log[6]["revived"] == log[5]["dead"] > 5  # those dead before step 7
    assert [log[i]["dead"] for i in range(6, 11)] == [0] * 5  # the window is 5 batches
    assert log[0]["terms"]["resample"] == 0
    train(faint(), source(), tmp_path / "b", config=config(**{**vars(plan), "seed": 1}))
    assert read_log(tmp_path / "b" / "log.jsonl")[6:] != log[6:]  # what a training seed is for
    assert read_log(tmp_path / "b" / "log.jsonl")[:6] == log[:6]


@pytest.mark.parametrize("revive", ["ghost", "resample"])
def test_latents_killed_on_purpose_come_back(revive, tmp_path):
    def run(revive):
        made = fitted("topk")
        with torch.no_grad():
            made.W_enc[:, : D_SAE // 2] *= 0.02
        plan = config(n_rows=200 * BATCH, lr=5e-3, revive=revive, dead_window_rows=10 * BATCH, resample_every=20)
        train(made, TensorSource(rows(1000), batch_size=BATCH), tmp_path / revive, config=plan)
        return read_log(tmp_path / revive / "log.jsonl")[-1]["dead"]

    assert run(revive) < 0.7 * run("none")
