import pytest
import torch
from seen_examples import coder_of, seen_codes, setting_of, values

from vitrail.coders import coder_metadata
from vitrail.metrics.dead import Dead, dead_at_end_of_training
from vitrail.training import TensorSource, TrainConfig, train


def test_by_hand_with_the_rows_looked_at():
    # 3 latents, 4 rows: one fires always, one once, one never.
    z = torch.tensor([[1.0, 2, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0]])
    metric = Dead(setting_of(coder_of(3)))
    for part in z.split(2):
        metric.update(seen_codes(part))
    measured = metric.compute()
    assert values(measured) == {"dead_eval": 1, "dead_eval_1e-7": 1, "dead_eval_msae": 1}
    assert {each.n for each in measured.values()} == {4}


def test_rare_is_not_never_once_there_are_rows_enough():
    metric = Dead(setting_of(coder_of(3)), rows="train")
    metric.update(seen_codes(torch.tensor([[1.0, 2, 0]])))
    metric._rows = 10**6  # as if a million rows had been shown: 10^-6 lies below 10^-5.5, not below 10^-7
    assert values(metric.compute()) == {"dead_train_rows": 1, "dead_train_rows_1e-7": 1, "dead_train_rows_msae": 3}


def test_end_of_training_is_read_from_the_metadata_the_trainer_writes(tmp_path):
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    coder = coder_of(40, 6, k=1)
    with torch.no_grad():
        coder.b_enc[3:] = -100.0  # 37 latents can never be among the largest and positive
    result = train(
        coder,
        TensorSource(x, batch_size=16),
        tmp_path / "run",
        config=TrainConfig(epochs=2, dead_window_rows=64, revive="none", lr=1e-6),
    )
    measured = dead_at_end_of_training(coder_metadata(tmp_path / "run"))
    assert measured is not None
    assert measured.value == result.last["dead"] >= 37
    assert (measured.n, measured.definition) == (64, "trainer-window")


def test_without_training_or_with_too_little_of_it_there_is_no_number():
    assert dead_at_end_of_training({}) is None
    last, request = {"dead": 0}, {"config": {"dead_window_rows": 100}}
    assert dead_at_end_of_training({"training": {"rows": 99, "last": last, "request": request}}) is None
    assert dead_at_end_of_training({"training": {"rows": 100, "last": last, "request": request}}).value == 0


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match="'eval' or 'train', got 'test'"):
        Dead(setting_of(coder_of(3)), rows="test")
    with pytest.raises(ValueError, match="no images were measured"):
        Dead(setting_of(coder_of(3))).compute()
