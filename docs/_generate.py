"""Writes docs/_generated/*.md: the tables that the code and the record know better than a page."""

import importlib
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import _record
import typer

import bigkernel.ops
from benchmarks import ledger, scaling
from bigkernel import environment, registry
from bigkernel.cli.app import app
from bigkernel.recipes.presets import (
    AUGMENTATIONS,
    IMAGE_MODELS,
    IMAGE_RECIPES,
    TEXT_MODELS,
    TEXT_RECIPES,
)

GENERATED = HERE / "_generated"


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in cells]) + "\n"


def support_page() -> str:
    """From the registry, which also decides where calls go."""
    shown: dict[registry.Level, str] = {"cpu": "CPU", "cuda": "CUDA"}
    rows = []
    for op in registry.every():
        kernels = "<br>".join(
            f"{name}: {f'no, {op.absent[level]}' if level in op.absent else 'yes'}"
            for level, name in shown.items()
        )
        takes = ", ".join(f"`{str(dtype).removeprefix('torch.')}`" for dtype in op.dtypes)
        rows.append([op.noun, kernels, f"{takes}{'<br>' if op.limits else ''}{op.limits}"])
    titles = "".join(f"- **{op.noun}**: {op.title}\n" for op in registry.every())
    return f"{table(['op', 'kernels', 'they take'], rows)}\n{titles}"


def ops_page() -> str:
    """The public names of each op, as its folder has them."""
    lines = []
    for folder in pkgutil.iter_modules(bigkernel.ops.__path__):
        names = importlib.import_module(f"bigkernel.ops.{folder.name}").__all__
        title = registry.find(folder.name).title
        lines += [f"## {title[0].upper()}{title[1:]}\n", "```{eval-rst}"]
        for name in names:
            kind = "autoclass" if isinstance(getattr(bigkernel.ops, name), type) else "autofunction"
            lines.append(f".. {kind}:: bigkernel.ops.{name}\n")
        lines.append("```\n")
    return "\n".join(lines)


def environment_page() -> str:
    titles = {"run": "While it runs", "build": "While it is built", "test": "In tests"}
    parts = []
    for when, title in titles.items():
        rows = [v for v in environment.VARIABLES if v.when == when]
        parts.append(f"## {title}\n")
        cells = [
            [f"`{v.name}`", f"{v.effect}<br>Values: {v.values}.<br>Default: {v.default}."]
            for v in rows
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
        unit = "epoch" if "epochs" in values else "step"
        model = f"`{values['model']}`" if "model" in values else "yours"
        return [
            f"`{name}`",
            model,
            f"{length:g} {unit}{'' if length == 1 else 's'}, batches of {values['batch_size']}",
        ]

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
    "ops": ops_page,
    "environment": environment_page,
    "commands": commands_page,
    "presets": presets_page,
    "machine": lambda: _record.machine() + "\n",
    "scaling-bytes": scaling.bytes_table,
    "scaling-steps": scaling.steps_table,
    "records": lambda: ledger.table(ledger.entries()),
    "tuning": ledger.tuning_table,
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
