"""The documentation is true: code runs, commands exist, figures and links are current."""

import re
import shutil
from pathlib import Path

import _check
import _figures
import _generate
import _record
import _svg
import pytest
import torch

import bigkernel
from bigkernel.optim import AdamW

ROOT = Path(__file__).resolve().parent.parent

DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_generated" not in path.parts)
# Also those whose links and commands are not read by Sphinx.
TEXTS = [
    *PAGES,
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "tests/README.md")),
]
FENCE = re.compile(r"^(`{3,})(\w+)\n(.*?)^\1$", re.M | re.S)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, language: str) -> list[str]:
    return [code for _, lang, code in FENCE.findall(path.read_text()) if lang == language]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem
)
def test_every_block_of_a_page_runs(page, tmp_path, monkeypatch):
    """Each on its own, in a folder that holds the page's CUDA files."""
    code = blocks(page, "python")
    if any("ptx.compile" in block for block in code) and shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on the path")
    for source in blocks(page, "cuda"):
        name = re.match(r"// (\w+\.cu):", source)
        assert name, "a CUDA block begins with // NAME.cu:"
        (tmp_path / name[1]).write_text(source)
    monkeypatch.chdir(tmp_path)
    for i, block in enumerate(code):
        exec(compile(block, f"{name_of(page)}, block {i}", "exec"), {"__name__": "__main__"})


def test_every_python_block_is_one_that_runs():
    """A block in another spelling would not be seen by the test above."""
    for path in TEXTS:
        for _, language, code in FENCE.findall(path.read_text()):
            assert language in ("python", "console", "cuda", "text", "mermaid"), (path, language)
            if language in ("console", "text"):
                assert not re.search(r"^(import|from) \w+", code, re.M), path


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_commands_and_their_options_exist(path):
    commands = dict(_generate.commands())
    for line in re.findall(r"^(?:\$ )?(bigkernel .+)$", path.read_text(), re.M):
        words = line.split("#")[0].split()
        name = " ".join(words[:3] if words[1] == "train" else words[:2])
        assert name in commands, line
        known = {option for p in commands[name].params for option in p.opts}
        assert {word for word in words if word.startswith("--")} <= known, line


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_make_targets_exist(path):
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^(?:\$ )?|`)make ([a-z][a-z0-9-]+)", path.read_text(), re.M):
        assert f"\n{target}:" in makefile, target


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_files_that_are_linked_to_exist(path):
    text = re.sub(r"^(`{3,}).*?^\1$", "", path.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not re.match(r"\w+:", target):
            found = path.parent / target
            assert found.exists(), f"{name_of(path)}: {target}"
            if path in PAGES and found.suffix == ".md":  # the site has no other pages
                assert DOCS in found.resolve().parents, f"{name_of(path)}: {target}"


@pytest.mark.parametrize("name", _figures.FIGURES)
def test_figure_is_what_its_script_draws(name):
    """`python docs/_figures.py` draws them anew, from the results of record where they show any."""
    drawn = (DOCS / "images" / f"{name}.svg").read_text(encoding="utf-8")
    assert drawn == _figures.FIGURES[name]()
    sizes = [float(size) for size in re.findall(r'font-size="([\d.]+)"', drawn)]
    assert min(sizes) >= 13, "smaller letters cannot be read on a phone"
    assert "http" not in drawn.replace("http://www.w3.org/2000/svg", "")


def test_readmes_chart_hides_no_loss():
    shown = _record.headlines()
    assert len(shown) == 8
    for op in _record.OPS:
        rows = [row for row in _record.rows() if row.op == op]
        lowest = min(ratio.middle for row in rows for ratio in row.ratios)
        assert min(row.best.middle for row in shown if row.op == op) == lowest
        assert _record.weakest(op) in _record.charted(op)
    for row in shown:
        assert row.case in _record.SHORT
        assert row.best.low <= row.best.middle <= row.best.high


def test_peers_of_the_record_are_other_peoples_code():
    peers = {ratio.peer for row in _record.rows() for ratio in row.ratios}
    known = ("torch", "albumentations", "Kornia")
    assert peers
    assert all(peer.startswith(known) for peer in peers), peers


def test_figures_have_the_colours_of_the_style_sheet():
    css = (DOCS / "_static" / "figures.css").read_text()
    for theme, colours in (("light", _svg.LIGHT), ("dark", _svg.DARK)):
        block = re.search(rf'\[data-theme="{theme}"\] svg\.bk {{(.*?)}}', css, re.S)
        assert dict(re.findall(r"--(\w+): (#\w+);", block[1])) == colours


@pytest.mark.parametrize(
    ("name", "dtype", "options"),
    [
        ("fp32", torch.float32, {}),
        ("bf16, fp32 masters", torch.bfloat16, {"master_weights": True}),
        ("bf16, stochastic rounding", torch.bfloat16, {}),
        ("bf16, bf16 moments", torch.bfloat16, {"state_dtype": torch.bfloat16}),
    ],
)
def test_bytes_for_each_parameter(name, dtype, options):
    parameter = torch.zeros(1000, dtype=dtype, requires_grad=True)
    parameter.grad = torch.ones_like(parameter)
    optimizer = AdamW([parameter], **options)
    optimizer.step()
    held = {k: v.nbytes // 1000 for k, v in optimizer.state[parameter].items() if v.numel() > 1}
    master = held.pop("master_param", 0)
    assert _figures.ADAM_MEMORY[name] == (dtype.itemsize, master, sum(held.values()))


def test_generated_tables_hold_every_op_option_and_variable():
    pages = {name: make() for name, make in _generate.PAGES.items()}
    for op in _generate.registry.every():
        assert f"| {op.noun} |" in pages["support"]
    for name in bigkernel.ops.__all__:
        assert f":: bigkernel.ops.{name}\n" in pages["ops"]
    for variable in _generate.environment.VARIABLES:
        assert f"`{variable.name}`" in pages["environment"]
    for name, command in _generate.commands():
        assert f"## `{name}`" in pages["commands"]
        assert all(f"`{p.opts[0]}`" in pages["commands"] for p in _generate.options_of(command))
    cases = sum(pages[f"results-{op}"].count("\n") - 2 for op in _record.OPS)
    assert cases == len(_record.rows())


def test_a_site_that_needs_the_network_is_found(tmp_path):
    (tmp_path / "there.png").touch()
    page = '<img src="there.png"><a href="https://x.example/">x</a><img src="data:,">'
    (tmp_path / "index.html").write_text(page)
    assert _check.faults(tmp_path) == []
    page += '<script src="https://x.example/x.js"></script><img src="gone.png">'
    (tmp_path / "index.html").write_text(page)
    (tmp_path / "x.css").write_text("@import url(https://x.example/font.css)")
    assert len(_check.faults(tmp_path)) == 3
