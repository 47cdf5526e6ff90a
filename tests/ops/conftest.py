"""In kernel tests a fallback is an error; and which of them the emulator runs each time."""

import pytest


@pytest.fixture(autouse=True)
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIGKERNEL_STRICT", "1")


# Of these tests' parameters the emulator's quick run takes every n-th; the others are slow.
# fp16 differs from bf16 by one instruction; fp32 is four times as slow to emulate.
THINNED = {
    "test_attention_pairs": 3,
    "test_attention_masks": 2,
    "test_attention_varlen_equals_separate_calls": 3,
}
F16 = ("plain", "everything")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    seen: dict[str, int] = {}
    for item in items:
        if not isinstance(item, pytest.Function) or not hasattr(item, "callspec"):
            continue
        given, name = item.callspec.params, item.originalname
        if given.get("backend") != "ptx":
            continue
        seen[name] = seen.get(name, -1) + 1
        if (
            seen[name] % THINNED.get(name, 1)
            or (given.get("dtype") == "f16" and given.get("feature", "plain") not in F16)
            or (name == "test_attention_long" and given["dtype"] == "f32")
        ):
            item.add_marker(pytest.mark.slow)
