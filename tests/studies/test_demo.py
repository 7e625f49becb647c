"""The quality bar, on the demo itself: what `make demo` prints must be worth printing."""

import pytest

from vitrail.studies.demo import demo
from vitrail.studies.truth_recovery import best_of_variants, read_recovery


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def rows(out):
    return demo(out, n_workers=1)


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
    assert len(beside) == 6
    for control in beside:
        for measure in ("explained_variance", "cosine", "recon_cosine", "ce_recovered"):
            assert value(coder, measure) > value(control, measure), f"{control['name']} has the better {measure}"


@pytest.mark.slow
@pytest.mark.parametrize("measure", ["image_recovered_f1_0.9", "image_recovered_auc_0.9", "patch_f1"])
def test_coders_recover_clearly_more_concepts_than_any_control(rows, out, measure):
    found = {row["name"]: row for row in best_of_variants(read_recovery(out / "recovery" / "recovery.jsonl"))}
    best = max(value(row, measure) for row in found.values() if row["kind"] == "control")
    for name in ("topk", "batch_topk", "matryoshka"):
        assert value(found[name], measure) > best + 0.05, f"{measure} of {name}"
    assert "recovered: <strong>" in (out / "report.html").read_text()


@pytest.mark.slow
def test_the_clean_model_is_as_good_as_its_papers_say(rows):
    assert value(rows[0], "accuracy") > 0.94
