"""docs/supported-models.md says what the models of the tests show."""

import importlib.util
from pathlib import Path

HERE = Path(__file__).parent


def test_the_page_is_in_step(tiny):
    spec = importlib.util.spec_from_file_location("supported_models", HERE / "supported_models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = (HERE.parent / "docs" / "supported-models.md").read_text("utf-8")
    assert written == module.page(tiny), "run `make fix`"
