"""In kernel tests a fallback to PyTorch is an error."""

import pytest


@pytest.fixture(autouse=True)
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIGKERNEL_STRICT", "1")
