"""`vitrail train --mix`: further stores in each batch."""

import json

import pytest
import torch

from vitrail.cli import main
from vitrail.cli.train import mixed_in
from vitrail.store import Store

POINT = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    out = tmp_path_factory.mktemp("stores")
    common = ["--workers", "0", "--device", "cpu", "--backbone", "toy/shapes", "--points", POINT]
    main(["extract", "world:shapes?n=24", f"{out}/a", *common])
    main(["extract", "world:shapes?n=16&split=test", f"{out}/b", *common])
    return out


def train(stores, out, *more):
    options = ["--d-sae", "64", "--k", "4", "--batch-size", "256", "--device", "cpu", "--n-rows", "2000", *more]
    main(["train", "batch_topk", f"{stores}/a", str(out), *map(str, options)])
    return json.loads((out / "coder.json").read_text())["metadata"]


def test_a_coder_of_two_stores_says_what_it_was_made_of(stores, tmp_path, capsys):
    told = train(stores, tmp_path / "mixed", "--mix", f"{stores}/b=0.5", "--held-out", "0.25")
    assert told["store"] == str(stores / "a")
    assert told["train_images"] == [0, 18]
    (other,) = told["mixed_with"]
    assert (other["weight"], other["store"], other["train_images"]) == (0.5, str(stores / "b"), [0, 12])
    assert told["calibration"]["rows"] == "held_out"
    # Witness: two thirds of the one store's mean and a third of the other's, which is what the coder subtracts.
    from vitrail.coders import load_coder

    means = [Store.open(stores / name).stats(POINT, "all").mean for name in "ab"]
    expected = (2 / 3 * means[0] + 1 / 3 * means[1]).float()
    torch.testing.assert_close(load_coder(tmp_path / "mixed").normalize.mean, expected)
    alone = train(stores, tmp_path / "alone")
    assert "mixed_with" not in alone
    capsys.readouterr()
    train(stores, tmp_path / "mixed", "--mix", f"{stores}/b=0.5", "--held-out", "0.25")
    assert "steps, 2,000 rows" in capsys.readouterr().out  # finished: the same request again


def test_a_run_that_stopped_says_so_on_the_terminal(stores, tmp_path, capsys):
    train(stores, tmp_path, "--stop-when-l0-below", "5", "--stop-from-share", "0", "--log-every", "2")
    assert "stopped early: L0 4 is below 5 at step 1" in capsys.readouterr().out


@pytest.mark.parametrize("word", ["runs/b", "runs/b=much", "=1"])
def test_what_is_no_store_and_weight_is_named(word):
    with pytest.raises(ValueError, match="--mix takes STORE=WEIGHT"):
        mixed_in([word])


def test_weights_are_read_from_the_last_equals_sign():
    assert {str(path): weight for path, weight in mixed_in(["a=b/c=0.25", "d=2"]).items()} == {"a=b/c": 0.25, "d": 2.0}


def test_a_store_given_twice_is_refused(stores, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train(stores, tmp_path, "--mix", f"{stores}/a=2")
    assert "each store may be given once" in capsys.readouterr().err
