"""Writes docs/_generated/*.md: the tables that the code and the record know better than a page."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import _record
import torch
import typer

from bigkernel import _library, backend, environment, ops, optim
from bigkernel.cli.app import app
from bigkernel.presets import AUGMENTATIONS, IMAGE_MODELS, IMAGE_RECIPES, TEXT_MODELS, TEXT_RECIPES

ROOT = HERE.parent
GENERATED = HERE / "_generated"
DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.uint8,
)


class Support(NamedTuple):
    """What runs where for one op."""

    op: str
    kernels: dict[str, bool]  # "cpu", "cuda": whether there is one
    dtypes: dict[str, str]  # dtype -> "native", "PyTorch" or "refused"
    limits: list[str]  # sentences


def _attention(dtype: torch.dtype, width: int = 64) -> None:
    x = torch.zeros(1, 1, 2, width).to(dtype)
    ops.attention(x, x, x)


def _adam(dtype: torch.dtype) -> None:
    parameter = torch.zeros(2).to(dtype).requires_grad_()
    parameter.grad = torch.zeros_like(parameter)
    optim.AdamW([parameter]).step()


def _augment(dtype: torch.dtype) -> None:
    geometry = torch.zeros(1, 16, dtype=torch.float64)
    images = torch.zeros(1, 3, 4, 4).to(dtype)
    ops.augment(images, geometry, torch.zeros(1, 0, 2), size=(2, 2), fill=torch.zeros(1, 3))


PROBES: dict[str, Callable[..., None]] = {
    "adam": _adam,
    "attention": _attention,
    "augment": _augment,
}


def _outcome(call: Callable[[], None]) -> tuple[str, str]:
    """("native" | "PyTorch" | "refused", why): a call's own reason, whatever was built here."""
    reasons: list[str | None] = []

    def decide(op: str, device: str, reason: str | None = None) -> tuple[str, None]:
        reasons.append(reason)
        return "torch", None

    with mock.patch.object(backend, "decide", decide):
        try:
            call()
        except (TypeError, ValueError, RuntimeError) as error:
            return "refused", str(error)
    why = [reason for reason in reasons if reason is not None]
    return ("PyTorch", why[0]) if why else ("native", "")


def support() -> list[Support]:
    """The support matrix: the one place that knows where its facts are to be found."""
    found = []
    for op in sorted({name.split("_")[0] for name in _library.registered}):
        sources = "".join(path.read_text() for path in (ROOT / "csrc" / op).glob("*.cpp"))
        kernels = {
            device: f"(bigkernel, {device.upper()}, m)" in sources for device in ("cpu", "cuda")
        }
        probe = PROBES[op]
        dtypes, limits = {}, []
        for dtype in DTYPES:
            dtypes[str(dtype).removeprefix("torch.")], why = _outcome(lambda d=dtype: probe(d))
            if why and dtypes[str(dtype).removeprefix("torch.")] == "PyTorch":
                limits.append(why)
        if op == "attention":
            limits.append(_outcome(lambda: _attention(torch.float32, 320))[1])
        found.append(Support(op, kernels, dtypes, list(dict.fromkeys(limits))))
    return found


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in cells]) + "\n"


def support_page() -> str:
    matrix = support()
    names = [row.op for row in matrix]
    dtypes = table(
        ["dtype", *names],
        [[f"`{dtype}`", *(row.dtypes[dtype] for row in matrix)] for dtype in matrix[0].dtypes],
    )
    yes = {True: "yes", False: "no"}
    kernels = table(
        ["kernels", *names],
        [
            [shown, *(yes[row.kernels[device]] for row in matrix)]
            for device, shown in (("cpu", "CPU"), ("cuda", "CUDA"))
        ]
        + [["PyTorch", *("yes" for _ in matrix)]],
    )
    limits = "\n".join(f"- {row.op}: {limit}." for row in matrix for limit in row.limits)
    return f"{dtypes}\n{kernels}\nReasons that a call itself gives for going to PyTorch:\n\n{limits}\n"


def environment_page() -> str:
    titles = {"run": "While it runs", "build": "While it is built", "test": "In tests"}
    parts = []
    for when, title in titles.items():
        rows = [v for v in environment.VARIABLES if v.when == when]
        parts.append(f"## {title}\n")
        cells = [
            [f"`{v.name}`", f"{v.effect}<br>Values: {v.values}.<br>Default: {v.default}."] for v in rows
        ]
        parts.append(table(["variable", "what it does"], cells))
    return "\n".join(parts)


def results_page(op: str) -> str:
    rows = []
    for row in _record.rows():
        if row.op == op:
            peers = "<br>".join(
                f"{r.peer}: **{r.middle:.2f}** ({r.low:.2f} to {r.high:.2f})" for r in row.ratios
            )
            limit = "" if row.share is None else f", {row.share:.0%} of the limit"
            rows.append([f"{row.case}<br>{row.seconds * 1e3:.3g} ms{limit}", peers])
    return table(["case", "times the speed of"], rows)


def _commands(command: Any, name: str) -> list[tuple[str, Any]]:
    if hasattr(command, "commands"):
        found = []
        # Groups first: what one does before the rest.
        for part, inner in sorted(
            command.commands.items(), key=lambda item: not hasattr(item[1], "commands")
        ):
            found += _commands(inner, f"{name} {part}")
        return found
    return [(name, command)]


def commands() -> list[tuple[str, Any]]:
    """(what is typed, the command) for every command."""
    return _commands(typer.main.get_command(app), "bigkernel")


def options_of(command: Any) -> list[Any]:
    """The options of a command, without --help."""
    return [p for p in command.params if p.param_type_name == "option" and p.name != "help"]


def commands_page() -> str:
    parts = []
    for name, command in commands():
        # The first line, as the command shows it.
        parts.append(f"## `{name}`\n\n{(command.help or '').strip()}\n")
        rows = []
        for p in command.params:
            if p.param_type_name == "argument":
                rows.append([f"`{p.name.upper()}`", p.help or ""])
        for p in options_of(command):
            default = p.default if isinstance(p.default, (int, float)) and p.show_default else None
            told = f" (default: {default})" if default is not None and not p.is_flag else ""
            rows.append([f"`{p.opts[0]}`", f"{p.help or ''}{told}"])
        parts.append(table(["option", "meaning"], rows) if rows else "")
    return "\n".join(parts)


def presets_page() -> str:
    def recipe(name: str, values: dict[str, Any]) -> list[str]:
        length = values.get("epochs", values.get("max_steps"))
        unit = "epochs" if "epochs" in values else "steps"
        model = f"`{values['model']}`" if "model" in values else "yours"
        return [f"`{name}`", model, f"{length:g} {unit}, batches of {values['batch_size']}"]

    heads = ["`--preset`", "model", "how long"]
    text = table(heads, [recipe(*item) for item in TEXT_RECIPES.items()])
    images = table(heads, [recipe(*item) for item in IMAGE_RECIPES.items()])
    models = ", ".join(f"`{name}`" for name in (*TEXT_MODELS, *IMAGE_MODELS))
    augmentations = ", ".join(f"`{name}`" for name in AUGMENTATIONS)
    return (
        f"For `train text`:\n\n{text}\nFor `train images`:\n\n{images}\n"
        f"Models for `--model`: {models}. Recipes for `--augment`: {augmentations}.\n"
    )


PAGES: dict[str, Callable[[], str]] = {
    "support": support_page,
    "environment": environment_page,
    "commands": commands_page,
    "presets": presets_page,
    "machine": lambda: _record.machine() + "\n",
    **{f"results-{op}": (lambda op=op: results_page(op)) for op in _record.OPS},  # type: ignore[misc]
}


def main() -> None:
    GENERATED.mkdir(exist_ok=True)
    for name, make in PAGES.items():
        path, text = GENERATED / f"{name}.md", make()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
