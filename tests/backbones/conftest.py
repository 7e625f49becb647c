import pytest
from small_backbones import CASES, Case, build_case


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return build_case(request.param)


@pytest.fixture(params=["toy", "timm-vit", "open_clip", "hf-clip"])
def one_of_each(request: pytest.FixtureRequest) -> Case:
    """For what does not depend on the adapter but is worth seeing in each library."""
    return build_case(request.param)
