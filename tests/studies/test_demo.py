"""The quality bar, on the demo itself: what `make demo` prints must be worth printing."""

import pytest

from vitrail.studies.demo import demo


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return demo(tmp_path_factory.mktemp("demo"), n_workers=1)


def value(row, measure):
    return row["measured"][measure]["value"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["topk", "batch_topk", "matryoshka"])
def test_coders_explain_nine_tenths_with_hardly_a_dead_latent_and_beat_every_control(rows, name):
    coder = next(row for row in rows if row["name"] == name)
    assert value(coder, "explained_variance") >= 0.9
    assert value(coder, "alive") > 0.95
    assert value(coder, "l0_tokens") == pytest.approx(16, rel=0.05)
    beside = [row for row in rows if row["control_of"] == name]
    assert len(beside) == 5
    for control in beside:
        for measure in ("explained_variance", "cosine", "recon_cosine", "ce_recovered"):
            assert value(coder, measure) > value(control, measure), f"{control['name']} has the better {measure}"


@pytest.mark.slow
def test_the_clean_model_is_as_good_as_its_papers_say(rows):
    assert value(rows[0], "accuracy") > 0.94
