"""What `import vitrail` offers is decided, cheap, and true."""

import subprocess
import sys
from pathlib import Path

import vitrail


def test_every_promised_name_is_there_and_sorted() -> None:
    names = [name for name in vitrail.__all__ if name != "__version__"]
    assert set(names) == set(vitrail._WHERE)
    assert list(vitrail._WHERE) == sorted(vitrail._WHERE)
    for name in vitrail.__all__:
        assert getattr(vitrail, name) is not None
    assert set(vitrail.__all__) <= set(dir(vitrail))


def test_no_name_is_also_a_module() -> None:
    """An imported module becomes an attribute of its package: `from vitrail import train` would depend on the day."""
    here = Path(vitrail.__file__).parent
    modules = {path.stem for path in here.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert not modules & set(vitrail._WHERE)


def test_import_brings_neither_torch_nor_an_optional_package() -> None:
    code = (
        "import sys, vitrail, vitrail.cli; vitrail.cli.main(['--help']);"
        "heavy = {'torch', 'numpy', 'timm', 'open_clip', 'transformers', 'torchvision', 'sklearn', 'starlette'};"
        "found = heavy & set(sys.modules); assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_using_the_library_brings_no_optional_package() -> None:
    code = (
        "import sys, vitrail; [getattr(vitrail, name) for name in vitrail.__all__];"
        "found = {'timm', 'open_clip', 'transformers', 'torchvision', 'sklearn', 'scipy'} & set(sys.modules);"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
