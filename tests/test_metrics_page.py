"""docs/metrics.md says what the metrics' docstrings say, and tells of every metric that a pass can feed."""

import importlib.util
from pathlib import Path

from vitrail.metrics import MEASURES
from vitrail.metrics.groups import KINDS

ROOT = Path(__file__).parents[1]


def metrics_page():
    spec = importlib.util.spec_from_file_location("metrics_page", ROOT / "scripts" / "metrics_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_docstrings_say():
    assert (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8") == metrics_page().page(), (
        "run python scripts/metrics_page.py"
    )


def test_every_metric_has_an_entry():
    told = {name for names in metrics_page().FILES.values() for name in names}
    for kind in KINDS.values():
        module = kind.make.__module__.rpartition(".")[2]
        assert module in told or kind.make.__name__ == "_progressive"


def test_a_measure_says_what_it_is():
    for name, measure in MEASURES.items():
        assert measure.title, name
        assert measure.better in ("higher", "lower", ""), name
        assert measure.meaning, name
