"""One way to say what is wrong with an argument."""


class BadArgument(ValueError):
    """An argument of a public function has the wrong shape, range or combination."""


def check(
    condition: bool,
    op: str,
    argument: str,
    expected: str,
    got: object,
    mend: str = "",
    cls: type[Exception] = BadArgument,
) -> None:
    """Raise ``cls`` unless ``condition``: which op, which argument, expected, got, how to mend."""
    if not condition:
        hint = f" {mend.rstrip('.')}." if mend else ""
        raise cls(f"bigkernel.{op}: {argument} must be {expected}, got {got}.{hint}")
