"""Words as directions."""

import numpy as np
import pytest
import torch

from vitrail.backbones.text import class_embeddings
from vitrail.concepts.vocabulary import BUILT_IN, class_vocabulary, embed, read_words, stored_vocabulary

AXES = {"north": (0.0, 1.0), "east": (1.0, 0.0), "south": (0.0, -1.0)}


class Compass:
    """A tower that knows three words, and counts how often it was asked."""

    logit_scale = 10.0

    def __init__(self, turn=0.0):
        self.asked, self.turn = 0, turn

    def encode(self, texts):
        self.asked += len(texts)
        rows = []
        for text in texts:
            word = text.split()[-1].strip(".")
            if word not in AXES:
                raise ValueError(f"no direction {word!r}")
            angle = torch.tensor(self.turn + (0.5 if text.startswith("far") else 0.0))
            x, y = AXES[word]
            rows.append(torch.stack([x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()]))
        return torch.stack(rows)


def test_rows_are_means_over_templates_of_unit_length():
    # Turned by 0 and by 0.5: the mean direction is turned by 0.25.
    found = embed(Compass(), ["north", "east"], ["{}", "far {}"])
    expected = torch.tensor([[-np.sin(0.25), np.cos(0.25)], [np.cos(0.25), np.sin(0.25)]], dtype=torch.float32)
    torch.testing.assert_close(found.embeddings, expected)
    witness = class_embeddings(Compass(), ["north", "east"], ["{}", "far {}"])
    torch.testing.assert_close(found.embeddings, witness)
    # Less their mean, two words are each other's opposite.
    torch.testing.assert_close(found.centred[0], -found.centred[1])


def test_words_are_embedded_once_for_each_tower(tmp_path):
    tower = Compass()
    first = embed(tower, list(AXES), ["{}"], cache=tmp_path, identity="a")
    asked = tower.asked
    again = embed(tower, list(AXES), ["{}"], cache=tmp_path, identity="a")
    assert tower.asked == asked
    assert again.digest == first.digest
    torch.testing.assert_close(again.embeddings, first.embeddings, rtol=0, atol=0)
    # Without an identity, towers are told apart by what they say.
    one, other = (embed(Compass(turn), list(AXES), ["{}"], cache=tmp_path) for turn in (0.0, 0.1))
    assert one.digest != other.digest
    assert not torch.allclose(one.embeddings, other.embeddings)


def test_unknown_words_are_an_error_or_left_out_with_a_warning(tmp_path):
    words = ["north", "up", "east"]
    with pytest.raises(ValueError, match="no direction 'up'"):
        embed(Compass(), words, ["{}"])
    for _ in range(2):  # from the tower, then from the cache
        with pytest.warns(UserWarning, match="does not read 1 of 3 words.*up"):
            assert embed(Compass(), words, ["{}"], cache=tmp_path, skip_unknown=True).words == ("north", "east")
    with pytest.raises(ValueError, match="reads 1 of 2"):
        embed(Compass(), ["north", "up"], ["{}"], skip_unknown=True)


def test_lists_are_read_from_package_and_files(tmp_path):
    for name in BUILT_IN:
        words = read_words(name)
        assert len(words) > 40
        assert len(set(words)) == len(words)
    path = tmp_path / "mine.txt"
    path.write_text("# mine\nzebra\n\n horse \nzebra\n", encoding="utf-8")
    assert read_words(path) == ("zebra", "horse")
    with pytest.raises(FileNotFoundError, match="everyday"):
        read_words("nothing-here")


def test_shared_lists_have_the_sizes_that_were_published(shared_data):
    assert len(read_words(shared_data / "vocabulary/laion_unigrams.txt")) == 37_445  # SPEC row 96
    assert len(read_words(shared_data / "vocabulary/clip_dissect_20k.txt")) > 19_900


def test_classes_stand_for_words_where_there_is_no_tower():
    embeddings = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, -1.0], [-1.0, 0.0]])
    found = class_vocabulary(embeddings, np.array([0, 0, 2, -1]), ("a", "b", "c"))
    assert found.words == ("a", "c")  # b has no pictures
    # The mean of (1, 0) and (0.6, 0.8) is (0.8, 0.4), of length sqrt(0.8).
    torch.testing.assert_close(found.embeddings[0], torch.tensor([0.8, 0.4]) / 0.8**0.5)


def test_embeddings_made_elsewhere_are_made_unit_rows(tmp_path):
    found = stored_vocabulary(("a", "b"), np.array([[3.0, 4.0], [0.0, 2.0]]), source="elsewhere")
    np.save(tmp_path / "rows.npy", np.array([[3.0, 4.0], [0.0, 2.0]]))
    with pytest.warns(UserWarning, match="lengths 2 to 5, not 1"):
        assert stored_vocabulary(("a", "b"), tmp_path / "rows.npy", source="elsewhere").digest == found.digest
    torch.testing.assert_close(found.embeddings, torch.tensor([[0.6, 0.8], [0.0, 1.0]]))
    again = stored_vocabulary(("a", "b"), np.array([[0.6, 0.8], [0.0, 1.0]], dtype=np.float16), source="half precision")
    torch.testing.assert_close(again.embeddings, found.embeddings, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("words", "rows", "message"),
    [
        (("a", "b", "c"), np.eye(2), "has 2 rows, and there are 3 words"),
        (("a", "b"), np.eye(5)[:, :2], "has 5 rows, and there are 2 words.*They lie in columns"),
        (("a", "a"), np.eye(2), "each once; got 2, 1 different"),
        (("a", "b"), np.array([[1.0, 0.0], [np.nan, 1.0]]), "the row of 'b' in elsewhere has NaN"),
        (("a", "b"), np.array([[0.0, 0.0], [0.0, 1.0]]), "the row of 'a' in elsewhere is all zeros"),
        (("a", "b"), np.eye(2), "has 2 columns, the model's image embedding 3"),
    ],
)
def test_bad_embeddings_made_elsewhere(words, rows, message):
    d_embed = 3 if "columns, the model" in message else None
    with pytest.raises(ValueError, match=message):
        stored_vocabulary(words, rows, source="elsewhere", d_embed=d_embed)


def test_files_of_embeddings(tmp_path):
    np.save(tmp_path / "rows.npy", np.eye(2, dtype=np.float16))
    assert stored_vocabulary(("a", "b"), tmp_path / "rows.npy", source="x").words == ("a", "b")
    with pytest.raises(FileNotFoundError, match=r"none\.npy is missing"):
        stored_vocabulary(("a", "b"), tmp_path / "none.npy", source="x")
    (tmp_path / "text.npy").write_text("no array")
    with pytest.raises(ValueError, match=r"text\.npy is no \.npy file"):
        stored_vocabulary(("a", "b"), tmp_path / "text.npy", source="x")
    np.save(tmp_path / "flat.npy", np.eye(2)[0])
    with pytest.raises(ValueError, match=r"must be \(n_words, d_embed\).*\(2,\)"):
        stored_vocabulary(("a", "b"), tmp_path / "flat.npy", source="x")
    np.save(tmp_path / "words.npy", np.array([["a", "b"]]))
    with pytest.raises(ValueError, match="no .npy file of numbers"):
        stored_vocabulary(("a", "b"), tmp_path / "words.npy", source="x")


def test_words_in_json(tmp_path):
    path = tmp_path / "words.json"
    path.write_text('["zebra", " hot dog ", "zebra"]')
    assert read_words(path) == ("zebra", "hot dog")
    for text, message in (
        ('{"zebra": 1}', "must be a list of words"),
        ("[1, 2]", "a list of words"),
        ("[", "not JSON"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_words(path)
