"""The options of a run: penalty warm-up, floors, early stop, averages, precision, accumulation; each by a number worked
by hand or something independent, and all of them resumable to the bit."""

import pytest
import torch
from training_examples import BATCH, D_IN, D_SAE, Killed, coder, config, rows, source, weights

from vitrail.coders import Codes, coder_metadata, load_coder
from vitrail.coders.base import Step
from vitrail.training import TensorSource, TrainConfig, read_log, train
from vitrail.training.averaging import Average
from vitrail.training.early_stop import reason_to_stop
from vitrail.training.objective import backward, phase_in
from vitrail.training.record import density
from vitrail.training.revive import REVIVERS
from vitrail.training.schedule import learning_rate, penalty_factor

RECIPES = {
    "penalty warm-up": ("relu", {"penalty_warmup_steps": 13, "min_lr_share": 0.1}),
    "ghost": ("topk", {"revive": "ghost"}),
    "resample": ("topk", {"revive": "resample", "resample_every": 4, "seed": 5}),
    "average": ("batch_topk", {"average_decay": 0.9}),
    "accumulate": ("relu", {"accumulate": 3}),
    "bfloat16": ("topk", {"compute_dtype": "bfloat16"}),
    "stop": ("topk", {"stop_when_l0_below": 4.0, "stop_from_share": 0.6}),
    "everything": (
        "relu",
        {
            "penalty_warmup_steps": 13,
            "revive": "resample",
            "resample_every": 4,
            "average_decay": 0.8,
            "accumulate": 2,
            "schedule": "linear",
        },
    ),
}


def faint(name):
    """A third of its latents hardly fire, so that there is somebody to revive."""
    made = coder(name)
    made.fit(source().stats, rows())
    with torch.no_grad():
        made.b_enc[::3] = -1.5
        made.W_enc[:, ::3] *= 0.02
    return made


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_resumable_to_the_bit(recipe, tmp_path):
    name, changes = RECIPES[recipe]
    plan = config(**changes)
    whole = train(faint(name), source(), tmp_path / "whole", config=plan)
    for survives in (4, 7, 13):
        out = tmp_path / str(survives)
        with pytest.raises(Killed):
            train(faint(name), source(survives), out, config=plan)
        resumed = train(faint(name), source(), out, config=plan)
        assert resumed.resumed_at == survives // 5 * 5
        assert weights(out) == weights(tmp_path / "whole")
        assert (out / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()
        assert resumed.stopped == whole.stopped
    if "resample" in changes.values():
        assert sum(line["revived"] for line in read_log(tmp_path / "whole" / "log.jsonl")) > 5


# -- schedules


def test_a_floor_under_the_rate_by_hand():
    # Half way, cosine is at a half; with a floor of .2 it is .2 + .8 * .5 = .6. At the end it is the floor, of lr .1.
    assert learning_rate(0.1, "cosine", share=0.5, step=9, warmup_steps=0, min_lr_share=0.2) == pytest.approx(0.06)
    assert learning_rate(0.1, "cosine", share=1.0, step=9, warmup_steps=0, min_lr_share=0.2) == pytest.approx(0.02)
    assert learning_rate(0.1, "linear", share=0.5, step=9, warmup_steps=0, min_lr_share=0.2) == 0.1


def test_the_penalty_warms_up_by_hand(tmp_path):
    assert [penalty_factor(step, 4) for step in (1, 2, 4, 5)] == [0.25, 0.5, 1, 1]
    assert penalty_factor(1, 0) == 1
    # Error 3, penalty 2; at a quarter of it the loss is 3 + .5.
    x = torch.zeros(1, 2)
    terms = {"reconstruction": torch.tensor(3.0), "l1": torch.tensor(2.0)}
    step = Step(torch.tensor(5.0), terms, Codes.from_dense(torch.zeros(1, 3)), y=x, target=x, x_hat=x, penalty=("l1",))
    phase_in(step, 0.25)
    assert step.loss == 3.5
    assert step.terms == {"reconstruction": 3.0, "l1": 0.5}


def test_a_coder_at_half_its_penalty_is_one_with_half_the_coefficient(tmp_path):
    """Witness: the architecture's own coefficient."""
    grads = []
    for l1, factor in ((0.4, 0.5), (0.2, 1.0)):
        made = coder("relu", l1=l1)
        made.fit(source().stats, rows())
        dead = torch.zeros(D_SAE, dtype=torch.bool)
        step = backward(made, rows(40), dead=dead, reviver=REVIVERS["none"], revival="none", penalty_factor=factor)
        grads.append((step.loss, step.terms["l1"], made.W_enc.grad, made.b_enc.grad, made.W_dec.grad))
    torch.testing.assert_close(grads[0], grads[1])


def test_the_log_shows_the_penalty_as_trained(tmp_path):
    train(coder("relu"), source(), tmp_path / "a", config=config(penalty_warmup_steps=10, log_every=1))
    train(coder("relu"), source(), tmp_path / "b", config=config(log_every=1))
    warmed, plain = (read_log(tmp_path / name / "log.jsonl") for name in "ab")
    assert warmed[0]["terms"]["l1"] == pytest.approx(0.1 * plain[0]["terms"]["l1"])
    for line in warmed:
        assert line["loss"] == pytest.approx(sum(line["terms"].values()))


# -- early stop


@pytest.mark.parametrize(
    ("thresholds", "stops"),
    [
        ((None, None), False),
        ((4.0, None), True),  # L0 is 3
        ((3.0, None), False),  # not below
        ((None, 0.3), True),  # explained variance is 1 - .8 = .2
        ((None, 0.1), False),
        ((4.0, 0.3), True),
        ((4.0, 0.1), False),  # both must be below
        ((2.0, 0.3), False),
    ],
)
def test_when_a_run_is_given_up(thresholds, stops):
    plan = TrainConfig(stop_when_l0_below=thresholds[0], stop_when_explained_variance_below=thresholds[1])
    line = {"step": 7, "l0": 3.0, "fvu": 0.8}
    reason = reason_to_stop(plan, line, 0.5)
    assert (reason is not None) == stops
    assert reason_to_stop(plan, line, 0.09) is None  # too early to tell
    if thresholds == (4.0, 0.3):
        assert reason == "L0 3 is below 4 and explained variance 0.2 is below 0.3 at step 7"
    assert reason_to_stop(TrainConfig(stop_when_explained_variance_below=0.3), {**line, "fvu": None}, 0.5) is None


def test_a_run_that_stops_is_a_finished_coder_that_says_why(tmp_path):
    plan = config(stop_when_l0_below=3.5, stop_from_share=0.5)
    result = train(coder("batch_topk"), source(), tmp_path, config=plan)
    # An epoch is nine batches of 32 and one of 12, so 364 of 731 rows are behind it at step 12, less than half of them;
    # the next line is of step 15.
    assert result.steps == 15
    assert result.stopped == f"L0 3 is below 3.5 at step {result.steps}"
    assert coder_metadata(tmp_path)["training"]["stopped"] == result.stopped
    assert coder_metadata(tmp_path)["training"]["rows"] == result.rows < result.steps * BATCH
    assert load_coder(tmp_path).calibration["estimator"] == "quantile_where_mean_l0_is_k"
    assert not list(tmp_path.glob("checkpoint-*"))
    again = train(coder("batch_topk"), source(survives=0), tmp_path, config=plan)
    assert (again.stopped, again.steps) == (result.stopped, result.steps)
    assert read_log(tmp_path / "log.jsonl")[-1]["step"] == result.steps


def test_a_run_that_was_not_stopped_says_so(tmp_path):
    assert train(coder(), source(), tmp_path, config=config()).stopped is None
    assert coder_metadata(tmp_path)["training"]["stopped"] is None


# -- averages


def test_the_average_by_hand():
    # Decay 1/2, weights 1, then 4, then 2: after two steps (1/2 * 1 + 4) / (3/2) = 3, after three
    # (1/4 * 1 + 1/2 * 4 + 2) / (7/4) = 17/7. The starting weights have no part in it.
    made = coder("topk", normalization="none")
    average = Average(made, decay=0.5)
    for step, value in enumerate((1.0, 4.0, 2.0), 1):
        with torch.no_grad():
            made.b_enc.fill_(value)
        average.update(step)
        expected = {1: 1.0, 2: 3.0, 3: 17 / 7}[step]
        torch.testing.assert_close(average.values["b_enc"], torch.full((D_SAE,), expected))
    # Latent 4 is made anew: what it was has no part in it from here on; latent 5's average stays what it was.
    with torch.no_grad():
        for parameter in (made.W_enc, made.W_dec, made.b_enc):
            parameter.fill_(9.0)
    average.begin_anew(torch.tensor([4]))
    for values in (average.values["W_enc"].t(), average.values["W_dec"], average.values["b_enc"]):
        assert (values[4] == 9).all()
        assert (values[5] != 9).all()


def test_the_saved_coder_is_the_average_with_unit_decoders_and_its_own_threshold(tmp_path):
    """Witness: the weights after every step, kept by a source that looks, and summed up at the end."""
    made, seen = coder("batch_topk"), []

    class Looking(TensorSource):
        def __iter__(self):
            for x in super().__iter__():
                seen.append({name: value.detach().clone() for name, value in made.named_parameters()})
                yield x

    made.fit(source().stats, rows())
    fast = {
        "lr": 0.05,
        "schedule": "constant",
        "calibration_rows": 300,
    }  # so that averages of unit directions are clearly shorter than one
    plan = config(average_decay=0.9, **fast)
    held_out = rows(500)
    result = train(made, Looking(rows(), batch_size=BATCH), tmp_path, config=plan, held_out=[held_out])
    plain = coder("batch_topk")
    plain.fit(source().stats, rows())
    last = train(plain, TensorSource(rows(), batch_size=BATCH), tmp_path / "plain", config=config(**fast))
    states = [*seen[1:], {name: value.detach() for name, value in plain.named_parameters()}]
    assert len(states) == result.steps == last.steps
    powers = [0.9 ** (len(states) - step) for step in range(1, len(states) + 1)]
    for name, value in result.coder.named_parameters():
        average = sum(p * state[name] for p, state in zip(powers, states, strict=True)) / sum(powers)
        if name == "W_dec":
            assert average.norm(dim=1).min() < 0.99
            average = average / average.norm(dim=1, keepdim=True)
        torch.testing.assert_close(value.detach(), average, rtol=1e-4, atol=1e-6)
    assert not torch.equal(result.coder.W_enc, last.coder.W_enc)
    assert result.coder.encode_sparse(held_out).l0().float().mean().item() == pytest.approx(3, rel=0.01)
    assert torch.equal(load_coder(tmp_path).W_dec, result.coder.W_dec)


# -- precision


def test_the_dtype_of_the_selection_is_set_for_the_run_alone_and_is_part_of_the_request(tmp_path):
    seen = []

    class Looking(type(coder())):
        def loss(self, x):
            seen.append((self.selection_dtype, self.W_enc.dtype))
            return super().loss(x)

    for dtype in ("bfloat16", "float32"):
        made = Looking(d_in=D_IN, d_sae=D_SAE, k=3)
        train(made, source(), tmp_path / dtype, config=config(n_rows=64, compute_dtype=dtype))
        assert made.selection_dtype is None
        assert coder_metadata(tmp_path / dtype)["training"]["request"]["config"]["compute_dtype"] == dtype
    assert seen == [(torch.bfloat16, torch.float32)] * 2 + [(None, torch.float32)] * 2
    with pytest.raises(ValueError, match="compute_dtype was 'float32', now 'bfloat16'"):
        train(coder(), source(), tmp_path / "float32", config=config(n_rows=64, compute_dtype="bfloat16"))


# -- accumulation


def gradients(name, accumulate, n=41, revive="none"):
    made = coder(name).double()
    made.fit(source().stats, rows())
    dead = torch.arange(D_SAE) % 3 == 0
    step = backward(made, rows(n).double(), dead=dead, reviver=REVIVERS[revive], revival=revive, accumulate=accumulate)
    return step, {key: p.grad for key, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["relu", "topk", "matryoshka", "gated", "topk_transcoder", "crosscoder"])
@pytest.mark.parametrize("accumulate", [2, 4, 41, 100])
def test_micro_batches_give_the_whole_batchs_gradient(name, accumulate):
    """41 rows do not divide evenly, so the parts weigh differently."""
    whole, expected = gradients(name, 1)
    step, found = gradients(name, accumulate)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(step.loss, whole.loss)
    torch.testing.assert_close(step.terms, whole.terms)
    torch.testing.assert_close(step.x_hat, whole.x_hat)
    assert torch.equal(step.fired(), whole.fired())
    torch.testing.assert_close(step.codes.to_dense(), whole.codes.to_dense())


def test_batch_topk_picks_from_each_micro_batch():
    # One row is far larger than the rest and takes what the whole batch has to give; cut in two it can only take what
    # its half has.
    made = coder("batch_topk", normalization="none")
    x = torch.cat([rows(4) * 100, rows(4)])
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    given = {"dead": dead, "reviver": REVIVERS["none"], "revival": "none"}
    whole = backward(made, x, **given)
    halves = backward(made, x, accumulate=2, **given)
    assert whole.codes.nnz == halves.codes.nnz == 8 * 3
    assert whole.codes.l0()[:4].sum() > 4 * 3 == halves.codes.l0()[:4].sum()


def test_a_run_in_micro_batches_logs_and_learns_the_same(tmp_path):
    plan = {"revive": "none", "log_every": 1}
    train(coder("relu").double(), source(), tmp_path / "a", config=config(**plan))
    train(coder("relu").double(), source(), tmp_path / "b", config=config(accumulate=4, **plan))
    for one, other in zip(*(read_log(tmp_path / name / "log.jsonl") for name in "ab"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-9)
        assert one["fvu"] == pytest.approx(other["fvu"], rel=1e-9)
        assert one["dead"] == other["dead"]


# -- the line


def test_densities_by_hand():
    # Of 1000 rows: never; in 1 row, 10^-3; in 10, 10^-2; in 15, 10^-1.82; in all, 10^0. Bins are a quarter of a decade
    # from 10^-5: 10^-3 is the start of bin 8, 10^-2 of bin 12, 10^-1.82 still in it; 1 is in the last.
    told = density(torch.tensor([0, 1, 10, 15, 1000]), 1000)
    assert told["never"] == 1
    assert {i: n for i, n in enumerate(told["counts"]) if n} == {8: 1, 12: 2, 19: 1}
    assert density(torch.tensor([1]), 10**7)["counts"][0] == 1  # rarer than the lowest edge


def test_densities_are_counted_since_the_last_line(tmp_path):
    """Witness: numpy's histogram of counts made step by step."""
    import numpy as np

    fired = []

    class Looking(type(coder())):
        def loss(self, x):
            step = super().loss(x)
            fired.append((step.codes.fired(), len(x)))
            return step

    train(Looking(d_in=D_IN, d_sae=D_SAE, k=3), source(), tmp_path, config=config(log_every=4))
    log = read_log(tmp_path / "log.jsonl")
    assert [line["step"] for line in log][:3] == [1, 4, 8]
    counts = sum(count for count, _ in fired[4:8])
    share = counts[counts > 0].double().numpy() / sum(n for _, n in fired[4:8])
    expected, _ = np.histogram(np.log10(share), bins=20, range=(-5, 0))
    assert log[2]["density"] == {"never": int((counts == 0).sum()), "counts": expected.tolist()}
    for line in log:
        assert sum(line["density"]["counts"]) + line["density"]["never"] == D_SAE
        assert line["dead_share"] == pytest.approx(line["dead"] / D_SAE)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"accumulate": 0}, "accumulate must be positive"),
        ({"average_decay": 1.0}, "average_decay must be between 0 and 1"),
        ({"compute_dtype": "float16"}, "compute_dtype must be one of float32, bfloat16, got 'float16'"),
        ({"min_lr_share": 2.0}, r"min_lr_share must be in 0\.\.1"),
        ({"penalty_warmup_steps": -1}, "penalty_warmup_steps must not be negative"),
        ({"resample_every": 0}, "resample_every must be positive"),
        ({"seed": -1}, "seed must not be negative"),
        ({"watch": ("stars",)}, "watch knows tensorboard, wandb, trackio, got 'stars'"),
    ],
)
def test_impossible_options_are_named(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        TrainConfig(**changes)
