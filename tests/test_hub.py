"""Publishing and fetching coders: what travels, what the card says, what a wrong address or a broken folder gets."""

import inspect
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors

from vitrail.cli import main
from vitrail.coders import load_coder, make_coder, save_coder
from vitrail.files import tensors_digest
from vitrail.hub import HubAddress, model_card, parse, pull, push, without_local_paths

FILES = {"coder.json", "weights.safetensors", "README.md"}


@pytest.fixture
def coder(tmp_path):
    """A saved coder that remembers where on this machine it was made."""
    made = make_coder("topk", d_in=5, d_sae=12, k=3, normalization="none")
    about = {
        "point": "blocks.1.hook_resid_post",
        "tokens": "spatial",
        "backbone": "toy/shapes",
        "backbone_digest": "0123456789abcdef",
        "store": "/home/somebody/run/store",
        "images": "folder:/home/somebody/pictures?split=train",
    }
    save_coder(tmp_path / "run/coders/topk", made, about)
    return tmp_path / "run/coders/topk"


def x_of(coder_folder):
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    return load_coder(coder_folder)(x)


def row(folder, **more):
    digest = tensors_digest(load_coder(folder).state_dict())
    ev = {"value": 0.91, "low": 0.9, "high": 0.92, "n": 30, "definition": "pooled"}
    return {"name": "topk", "control_of": None, "coder_digest": digest, "measured": {"ev": ev, "ce": None}, **more}


# -- a folder


def test_a_coder_goes_to_a_folder_and_comes_back_the_same(coder, tmp_path):
    address = push(coder, f"file:{tmp_path}/shared")
    assert address == f"file:{tmp_path}/shared"
    folder = pull(address)
    assert {path.name for path in folder.iterdir()} == FILES
    torch.testing.assert_close(x_of(folder), x_of(coder), rtol=0, atol=0)
    assert push(coder, address) == address  # again: the same coder


def test_names_of_this_machine_do_not_travel(coder, tmp_path):
    push(coder, f"file:{tmp_path}/shared")
    for name in ("coder.json", "README.md"):
        text = (tmp_path / "shared" / name).read_text()
        assert "somebody" not in text
    metadata = json.loads((tmp_path / "shared/coder.json").read_text())["metadata"]
    assert metadata["store"] == "store"
    assert metadata["images"] == "folder:pictures?split=train"
    assert metadata["backbone"] == "toy/shapes"


@pytest.mark.parametrize(
    ("local", "told"),
    [
        ("/a/b/c", "c"),
        ("~/pictures/train", "train"),
        ("tar:/x/y-{000..127}.tar", "tar:y-{000..127}.tar"),
        ("open_clip/ViT-B-32@openai", "open_clip/ViT-B-32@openai"),
        ("world:shapes?n=48&split=test", "world:shapes?n=48&split=test"),
        ("https://host/a/b", "https://host/a/b"),
        ("blocks.1.hook_resid_post", "blocks.1.hook_resid_post"),
        ("hf//home/me/model", "hf/model"),
        ("C:\\data\\pictures", "pictures"),
    ],
)
def test_only_absolute_paths_are_cut(local, told):
    assert without_local_paths({"a": [local]}) == {"a": [told]}


def test_another_coder_is_not_overwritten(coder, tmp_path):
    push(coder, f"file:{tmp_path}/shared")
    other = make_coder("topk", d_in=5, d_sae=12, k=3, normalization="none", seed=1)
    save_coder(tmp_path / "other", other)
    with pytest.raises(ValueError, match="already holds another coder"):
        push(tmp_path / "other", f"file:{tmp_path}/shared")


# -- the card


def test_the_card_says_where_it_belongs_how_it_measured_and_how_to_open_it(coder):
    control = {"name": "random", "coder_digest": "another", "measured": {"ev": {"value": 0.1}}}
    (coder.parent.parent / "eval.jsonl").write_text(f"{json.dumps(row(coder))}\n{json.dumps(control)}\n")
    push(coder, f"file:{coder.parent}/shared", license="apache-2.0")
    card = (coder.parent / "shared/README.md").read_text()
    front = card.split("---\n")[1].splitlines()
    assert "library_name: vitrail" in front
    assert 'license: "apache-2.0"' in front
    for said in ("blocks.1.hook_resid_post", "spatial", "toy/shapes", "0123456789ab", "from vitrail.hub import pull"):
        assert said in card
    assert "| ev | 0.91 | 0.9 to 0.92 | pooled | 30 |" in card
    assert "0.1 |" not in card  # a control's row is not the coder's
    weights = json.loads((coder / "coder.json").read_text())["weights_sha256"]
    assert weights in card


def test_a_card_of_ones_own_is_kept(coder, tmp_path):
    (coder / "README.md").write_text("mine")
    push(coder, f"file:{tmp_path}/shared")
    assert (tmp_path / "shared/README.md").read_text() == "mine"


def test_a_table_of_other_weights_is_refused(coder, tmp_path):
    (tmp_path / "eval.jsonl").write_text(json.dumps({"name": "topk", "coder_digest": "x", "measured": {}}) + "\n")
    with pytest.raises(ValueError, match="measured on other weights"):
        push(coder, f"file:{tmp_path}/shared", table=tmp_path / "eval.jsonl")
    with pytest.raises(FileNotFoundError, match="no table"):
        push(coder, f"file:{tmp_path}/shared", table=tmp_path / "none.jsonl")
    (tmp_path / "eval.jsonl").write_text("{")
    with pytest.raises(ValueError, match="not a table"):
        push(coder, f"file:{tmp_path}/shared", table=tmp_path / "eval.jsonl")


def test_the_card_names_a_converted_coders_origin_and_its_notes(coder):
    description = json.loads((coder / "coder.json").read_text())
    description["metadata"]["origin"] = {"peer": "saev", "notes": ["reads centred rows"]}
    (coder / "coder.json").write_text(json.dumps(description))
    card = model_card(coder, "hub:owner/name")
    assert "| converted from | saev |" in card
    assert "Note: reads centred rows." in card
    assert 'pull("hub:owner/name")' in card


# -- addresses


def test_addresses():
    assert parse("hub:me/clip-l9") == HubAddress("me/clip-l9")
    assert parse("hub:me/clip@v1.0/layers/9") == HubAddress("me/clip", "v1.0", "layers/9")
    assert parse("hub:me/clip/topk_k64") == HubAddress("me/clip", None, "topk_k64")
    assert parse("file:a/b") == Path("a/b")
    for text in ("hub:me/clip", "hub:me/clip@v1.0/layers/9", "hub:me/clip/topk_k64"):
        assert str(parse(text)) == text


@pytest.mark.parametrize(
    "address", ["me/clip", "hub:clip", "hub:", "file:", "https://x.y/z", "hub:me/clip/../other", ""]
)
def test_anything_else_is_no_address(address):
    with pytest.raises(ValueError, match="no address of a coder"):
        parse(address)


# -- folders that are not whole coders


def test_a_folder_without_a_coder(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="there is no coder here"):
        push(tmp_path / "empty", f"file:{tmp_path}/out")
    with pytest.raises(FileNotFoundError, match=r"no coder\.json"):
        pull(f"file:{tmp_path}/empty")


def test_altered_and_missing_weights(coder, tmp_path):
    content = bytearray((coder / "weights.safetensors").read_bytes())
    content[-1] ^= 1
    (coder / "weights.safetensors").write_bytes(content)
    for act in (lambda: push(coder, f"file:{tmp_path}/out"), lambda: pull(f"file:{coder}")):
        with pytest.raises(ValueError, match="is not the file that"):
            act()
    (coder / "weights.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="not whole"):
        push(coder, f"file:{tmp_path}/out")
    assert not (tmp_path / "out").exists()


# -- the hub, whose functions are replaced by ones that check how they are called


class Hub:
    """A hub in a folder: repository -> folder."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.calls = folder, []
        for name in ("create_repo", "upload_folder", "snapshot_download"):
            real = inspect.signature(getattr(huggingface_hub, name))
            monkeypatch.setattr(huggingface_hub, name, self.called(name, real))
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")

    def called(self, name, signature):
        def fake(*arguments, **options):
            bound = signature.bind(*arguments, **options).arguments  # TypeError if the real one would not take it
            self.calls.append((name, bound))
            return getattr(self, name)(bound)

        return fake

    def create_repo(self, said):
        (self.folder / said["repo_id"]).mkdir(parents=True, exist_ok=said["exist_ok"])

    def upload_folder(self, said):
        out = self.folder / said["repo_id"] / (said["path_in_repo"] or "")
        shutil.copytree(said["folder_path"], out, dirs_exist_ok=True)

    def snapshot_download(self, said):
        if not (self.folder / said["repo_id"]).is_dir():
            raise refusal(errors.RepositoryNotFoundError)
        if said.get("revision") == "gone":
            raise refusal(errors.RevisionNotFoundError)
        return str(self.folder / said["repo_id"])


def refusal(kind):
    """As the hub raises it, without its answer's many fields."""
    error = kind.__new__(kind)
    error.args = ("404 Client Error.\nmore",)
    return error


@pytest.fixture
def hub(tmp_path, monkeypatch):
    return Hub(tmp_path / "hub", monkeypatch)


def test_a_coder_goes_to_the_hub_and_comes_back_the_same(coder, hub, tmp_path):
    address = push(coder, "hub:me/clip@main/layers/9", private=True)
    assert address == "hub:me/clip@main/layers/9"
    assert {path.name for path in (hub.folder / "me/clip/layers/9").iterdir()} == FILES
    folder = pull(address, cache=tmp_path / "cache")
    torch.testing.assert_close(x_of(folder), x_of(coder), rtol=0, atol=0)
    said = dict(hub.calls)
    assert said["create_repo"]["private"]
    assert said["upload_folder"]["revision"] == said["snapshot_download"]["revision"] == "main"
    assert said["snapshot_download"]["cache_dir"] == tmp_path / "cache"
    assert said["snapshot_download"]["allow_patterns"] == [
        f"layers/9/{name}" for name in ("coder.json", "weights.safetensors", "README.md")
    ]  # nothing else of a stranger's repository is fetched


def test_no_token(coder, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match=r"no token to write to me/clip: run `hf auth login`"):
        push(coder, "hub:me/clip")
    assert not hub.calls


def test_what_the_hub_does_not_have(coder, hub):
    with pytest.raises(ValueError, match="there is no repository me/none on the hub"):
        pull("hub:me/none")
    push(coder, "hub:me/clip")
    with pytest.raises(ValueError, match="me/clip has no revision 'gone'"):
        pull("hub:me/clip@gone")
    with pytest.raises(FileNotFoundError, match="Is the subfolder right"):
        pull("hub:me/clip/layers/3")


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (errors.GatedRepoError, "is gated"),
        (errors.LocalEntryNotFoundError, "cannot be reached"),
        (errors.OfflineModeIsEnabled, "cannot be reached"),
        (errors.HfHubHTTPError, "the hub refused hub:me/clip: 404 Client Error"),
        (errors.HFValidationError, "not a name the hub allows"),
    ],
)
def test_what_the_hub_says_becomes_a_sentence(hub, monkeypatch, kind, sentence):
    def refuse(*arguments, **options):
        raise refusal(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ValueError, match=sentence):
        pull("hub:me/clip")


def test_offline_the_real_library_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="not in the cache, and the hub cannot be reached"):
        pull("hub:nobody-here/nothing-there", cache=tmp_path)


# -- the verb


def test_the_verb_pushes_and_pulls(coder, tmp_path, capsys):
    main(["hub", "push", str(coder), f"file:{tmp_path}/shared"])
    assert capsys.readouterr().out.strip() == f"file:{tmp_path}/shared"
    main(["hub", "pull", f"file:{tmp_path}/shared"])
    assert capsys.readouterr().out.strip() == f"{tmp_path}/shared"
    with pytest.raises(SystemExit):
        main(["hub", "pull", "somewhere"])
    assert "vitrail hub: 'somewhere' is no address" in capsys.readouterr().err
