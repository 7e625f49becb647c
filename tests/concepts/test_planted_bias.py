"""The bar of docs/bias.md at one seed: what was planted is the first leaning and moves the answer, else it is not."""

import importlib.util
from pathlib import Path

import pytest

from vitrail.backbones import load

SCRIPT = Path(__file__).parents[2] / "scripts" / "planted_bias.py"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    pytest.importorskip("matplotlib")
    found = importlib.util.spec_from_file_location("planted_bias", SCRIPT)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    out = tmp_path_factory.mktemp("planted")
    coder = module.coder_of(5, out, n_train=2000, d_sae=384, epochs=40)  # a seed that the page's table does not use
    return module, coder, out


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ground", "colour"])
def test_a_planted_bias_is_ranked_first_and_moves_the_answer(study, kind):
    module, coder, out = study
    small = {"n_fitted": 1000, "n_asked": 480, "n_permutations": 300}
    with_it = module.cell(load(module.BACKBONE), coder, kind, 0.95, 5, out, **small)
    assert with_it["rank_concept"] == 1, with_it
    assert with_it["rank_leaning"] <= 3, "a concept is split over latents"
    assert with_it["p_family"] <= 0.01
    assert with_it["right_way"] == with_it["turned"] >= 1
    assert with_it["rank_of_dose"] == pytest.approx(1, abs=0.05)
    without = module.cell(load(module.BACKBONE), coder, kind, 0.0, 5, out, **small)
    assert without["rank_concept"] > 1, without
    assert without["r_given"] < with_it["r_given"] / 2
