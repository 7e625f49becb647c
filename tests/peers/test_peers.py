"""vitrail's coders against the peers' own code, and the peers' own checkpoints: the same numbers, the same gradients.

    pip install --no-deps -r peers.txt

Each peer has a process to itself, because much of what it imports is stood in for there (stand_ins.py). That process
runs `against_*.py` and reports what it compared, by the names of the coders that it really had; the tables below say
what that must be.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from vitrail.coders import CODERS

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

# By peer: the architectures of which codes, reconstruction, loss and gradients are compared.
COMPARED: dict[str, set[str]] = {
    "dictionary_learning": {
        *("relu", "topk", "batch_topk", "matryoshka_prefix", "jump_relu", "gated"),
        *("crosscoder", "topk_crosscoder", "batch_topk_crosscoder"),
    },
    "sae_lens": {
        *("relu", "topk", "batch_topk", "matryoshka_prefix", "jump_relu", "gated", "matching_pursuit", "crosscoder"),
        *("relu_transcoder", "topk_transcoder", "batch_topk_transcoder"),
    },
    "sparsify": {"topk", "topk_transcoder"},
    "overcomplete": {
        *("topk", "batch_topk", "jump_relu", "matching_pursuit", "archetypal_topk", "archetypal_batch_topk"),
    },
    "saev": {"relu"},
    "visaebench": set(),
}
NOT_COMPARED = {"matryoshka": "MSAE's code is in no registry"}
# The terms that bring dead latents back.
REVIVED = {"dictionary_learning": {"auxk", "ghost"}, "sae_lens": {"auxk"}, "sparsify": {"auxk"}}
# Checkpoints that the peer saved and vitrail opened: as which coders, and how many files.
OPENED: dict[str, tuple[set[str], int]] = {
    "dictionary_learning": ({"relu", "topk", "batch_topk", "matryoshka_prefix", "jump_relu", "gated"}, 14),
    "sae_lens": (
        {"relu", "topk", "jump_relu", "gated", "relu_transcoder", "batch_topk", "matryoshka_prefix"},
        19,
    ),
    "sparsify": ({"topk", "topk_transcoder"}, 3),
    "overcomplete": ({"topk", "batch_topk", "jump_relu"}, 5),
    "saev": ({"relu"}, 1),
    "visaebench": ({"topk", "batch_topk", "jump_relu"}, 16),
}


def test_every_architecture_is_compared_or_said_not_to_be():
    assert set().union(*COMPARED.values()) | set(NOT_COMPARED) == set(CODERS)
    assert not set().union(*COMPARED.values()) & set(NOT_COMPARED)
    assert set(COMPARED) == set(OPENED) == {path.stem.removeprefix("against_") for path in HERE.glob("against_*.py")}


@pytest.mark.parametrize("peer", COMPARED)
def test_the_same_numbers_as(peer, tmp_path):
    if importlib.util.find_spec(peer) is None:
        pytest.skip(f"{peer} is not installed: pip install --no-deps -r peers.txt")
    report = tmp_path / "report.xml"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-n0", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    command += ["-o", "junit_family=xunit1"]  # the later ones write no properties
    command += ["--junit-xml", str(report), "--basetemp", str(tmp_path / "inner"), str(HERE / f"against_{peer}.py")]
    ran = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-12000:] + ran.stderr[-2000:]
    cases = ElementTree.parse(report).getroot().iter("testcase")
    said = [pair for case in cases for pair in properties(case)]
    assert {value for name, value in said if name == "compared"} == COMPARED[peer]
    assert {value for name, value in said if name == "revived"} == REVIVED.get(peer, set())
    opened = [value for name, value in said if name == "opened"]
    assert ({value.rpartition(" as ")[2] for value in opened}, len(set(opened))) == OPENED[peer]


def properties(case: ElementTree.Element) -> Iterator[tuple[str, str]]:
    """Of a test that passed."""
    assert not any(case.iter("skipped")), f"{case.get('name')} was skipped"
    for each in case.iter("property"):
        yield each.get("name", ""), each.get("value", "")
