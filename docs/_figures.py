"""Draws docs/images/*.svg: `python docs/_figures.py`. A test sees that they are current."""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import _record
from _record import Row
from _svg import WIDTH, Pen, flow

IMAGES = Path(__file__).parent / "images"
LEFT, RIGHT = 12, WIDTH - 12


def bars(title: str, below: str, rows: list[Row]) -> str:
    """Our speed over the best peer's: the median as a bar, lowest and highest run as a line."""
    pen = Pen(f"{title}: " + "; ".join(f"{r.case} {r.best.middle:.2f} times" for r in rows))
    pen.text(LEFT, 24, title, 17, bold=True)
    pen.text(LEFT, 44, below, 13.5, "dim")
    top, pitch = 62, 50
    widest = max(row.best.high for row in rows)
    scale = (RIGHT - LEFT - 62) / widest
    bottom = top + pitch * len(rows)
    weak = {_record.weakest(op) for op in {row.op for row in rows}}
    for i, row in enumerate(rows):
        y, best = top + pitch * i, row.best
        colour = "weak" if row in weak or best.low < 1 else "ours"
        pen.text(LEFT, y + 14, _record.SHORT.get(row.case, row.case), 15)
        pen.text(RIGHT, y + 14, best.peer.replace(", one document at a time", " one by one"), 13,
                 "dim", anchor="end")  # fmt: skip
        pen.rect(LEFT, y + 21, max(best.middle * scale, 1), 16, colour, radius=2)
        middle = y + 29
        pen.line(LEFT + scale, y + 18, LEFT + scale, y + 40, "ink", 1.5)
        pen.line(LEFT + best.low * scale, middle, LEFT + best.high * scale, middle, "ink", 2)
        pen.text(LEFT + max(best.high, best.middle) * scale + 7, y + 34, f"{best.middle:.2f}×", 15,
                 colour, bold=True)  # fmt: skip
    for k, words in enumerate([
        "Vertical line: 1×, as fast as the peer named.",
        "Horizontal line: lowest to highest run.",
        "Orange: weakest case of its op, or a run that lost.",
    ]):  # fmt: skip
        pen.text(LEFT, bottom + 14 + 19 * k, words, 13, "dim")
    return pen.svg()


def speed() -> str:
    return bars(
        "Times as fast",
        "against the fastest peer, two CPU cores",
        _record.headlines(),
    )


def op_chart(op: str) -> Callable[[], str]:
    return lambda: bars(
        f"{_record.OPS[op]}: times as fast",
        "against the fastest peer of each case",
        _record.charted(op),
    )


def cells(pen: Pen, x: float, y: float, rows: list[str], size: float) -> None:
    """A grid of keys (across) and queries (down): # seen, + seen with a bias, . not seen."""
    for i, line in enumerate(rows):
        for j, mark in enumerate(line):
            fill = {"#": "ours", "+": "soft", ".": "box", "o": "weak"}[mark]
            pen.rect(x + j * size, y + i * size, size - 2, size - 2, fill, radius=2)


def masks() -> str:
    """Which keys a query sees."""
    pen = Pen("Which keys a query sees under each kind of mask")
    pen.text(LEFT, 24, "Which keys a query sees", 17, bold=True)
    pen.text(LEFT, 44, "queries downwards, keys to the right", 13.5, "dim")
    n = range(8)
    panels = [
        ("causal=True", ["".join("#" if j <= i else "." for j in n) for i in n]),
        ("window=(2, 0)", ["".join("#" if i - 2 <= j <= i else "." for j in n) for i in n]),
        (
            "4 queries, top left",
            ["".join("#" if j <= i else "." for j in n) for i in range(4)],
        ),
        (
            "4 queries, bottom right",
            ["".join("#" if j <= i + 4 else "." for j in n) for i in range(4)],
        ),
        (
            "packed: 3 documents",
            ["".join("#" if j <= i and "00011112"[i] == "00011112"[j] else "." for j in n)
             for i in n],
        ),
        ("mask=: any, or a bias", ["".join("#+."[(3 * i + 5 * j + i * j) % 3] for j in n)
                                      for i in n]),
    ]  # fmt: skip
    tops = [62, 246, 360]
    for k, (name, rows) in enumerate(panels):
        x, y = LEFT + (k % 2) * 184, tops[k // 2]
        pen.text(x, y + 14, name, 14)
        cells(pen, x, y + 24, rows, 19)
    y = pen.height + 10
    for x, fill, words in [
        (0, "ours", "seen"),
        (74, "soft", "seen, with a bias"),
        (222, "box", "not seen"),
    ]:
        pen.rect(LEFT + x, y, 14, 14, fill, "line", radius=2)
        pen.text(LEFT + x + 20, y + 12, words, 13.5)
    return pen.svg()


def life_of_a_q() -> str:
    pen = Pen("The life of a q: from a call of attention to its result and its gradient")
    pen.text(LEFT, 24, "The life of a q", 17, bold=True)
    y = flow(pen, 40, [
        ("You call attention(q, k, v)", ["q is [batch, heads, tokens, width];",
                                         "its strides are read as they are."]),
        ("Python checks and chooses", ["Bad input ends here, in one sentence.",
                                       "Device, dtype and width choose a kernel."]),
        ("torch's dispatcher takes it to C++", ["Sizes are checked again, room is made for",
                                                "out and for one number a row: lse."]),
        ("Rows of q go to threads or blocks", ["Each takes a tile of rows through all of",
                                               "the tiles of keys that it can see:"]),
    ])  # fmt: skip
    size, x0, y0 = 26, 46, y + 34
    pen.text(x0, y + 22, "keys, here under a causal mask", 13.5, "dim")
    for i in range(6):
        for j in range(6):
            fill = "ours" if j < i else "soft" if j == i else "box"
            pen.rect(x0 + j * size, y0 + i * size, size - 2, size - 2, fill, radius=2)
            if j == i:
                a, b = x0 + j * size, y0 + i * size
                pen.polygon([(a, b), (a + size - 2, b + size - 2), (a, b + size - 2)], "ours")
    for k, (fill, words) in enumerate(
        [("ours", "computed"), ("soft", "half masked"), ("box", "never touched")]
    ):
        pen.rect(x0 + 176, y0 + 8 + 26 * k, 16, 16, fill, "line", radius=2)
        pen.text(x0 + 200, y0 + 21 + 26 * k, words, 13.5)
    pen.text(x0 + 176, y0 + 108, "one row of tiles =", 13.5, "dim")
    pen.text(x0 + 176, y0 + 126, "one thread's work", 13.5, "dim")
    y = y0 + 6 * size + 10
    y = flow(pen, y, [
        ("A tile of scores lives in registers", ["Its largest score m, the sum l of exp(s − m)",
                                                 "and the weighted values are carried along;",
                                                 "a new largest score rescales them."]),
        ("One division ends the row", ["out = values / l, and lse = m + log l.",
                                       "No score was ever written to memory."]),
        ("Backward runs the tiles again", ["exp(s − lse) gives back the same weights,",
                                           "from them come dq, dk, dv and dmask."]),
    ], number=5)  # fmt: skip
    return pen.svg()


def life_of_an_image() -> str:
    pen = Pen("The life of an image: from bytes through a chain of transforms to a batch")
    pen.text(LEFT, 24, "The life of an image", 17, bold=True)
    y = flow(pen, 40, [
        ("It arrives as bytes", ["uint8, any size, channels first or last;",
                                 "beside it a number of its own: its id."]),
        ("Numbers are drawn", ["A hash of seed, id and place in the chain;",
                               "not of batch, order, worker or device."]),
        ("The chain folds into one row", ["crop, flip, rotation: one map of six numbers;",
                                          "jitter: a list of codes and factors;",
                                          "normalisation: a mean and a divisor."]),
        ("One pass makes each output pixel", ["Back through the map to the source:"]),
    ])  # fmt: skip
    y0 = y + 16
    pen.rect(46, y0, 132, 104, "box", "line", radius=3)
    pen.polygon([(72, y0 + 30), (146, y0 + 12), (160, y0 + 72), (86, y0 + 90)], "soft", "ours")
    pen.rect(244, y0 + 10, 84, 84, "soft", "ours", radius=3)
    for k in range(1, 6):
        pen.line(244 + 14 * k, y0 + 10, 244 + 14 * k, y0 + 94, "line", 1)
        pen.line(244, y0 + 10 + 14 * k, 328, y0 + 10 + 14 * k, "line", 1)
    pen.rect(286, y0 + 38, 14, 14, "weak", radius=0)
    for dx in (0, 9):
        for dy in (0, 9):
            pen.rect(117 + dx, y0 + 42 + dy, 7, 7, "weak", radius=0)
    pen.line(284, y0 + 45, 138, y0 + 50, "weak", 1.5)
    pen.polygon([(144, y0 + 45), (145, y0 + 54), (137, y0 + 50)], "weak")
    pen.text(46, y0 + 124, "source, 4 taps", 13.5, "dim")
    pen.text(244, y0 + 124, "output", 13.5, "dim")
    y = flow(pen, y0 + 140, [
        ("Colour and scale on the way out", ["The taps' mean is coloured and normalised",
                                             "in registers, then stored, once."]),
        ("The batch goes to the model", ["[N, C, H, W] in float32, bf16 or fp16.",
                                         "A longer chain costs hardly more."]),
    ], number=5)  # fmt: skip
    return pen.svg()


def life_of_a_step() -> str:
    pen = Pen("The life of an optimiser step: from gradients to new parameters")
    pen.text(LEFT, 24, "The life of a step", 17, bold=True)
    y = flow(pen, 40, [
        ("backward() leaves gradients", ["One for each parameter, all dtypes mixed,",
                                         "on one device or on several."]),
        ("Their norm, if you clip", ["One read of every gradient. Infinite or NaN?",
                                     "The step is skipped, and does not count."]),
        ("One call for all parameters", ["Unscaling, clipping, both moments, decay and",
                                         "update happen while a value is in a register."]),
    ])  # fmt: skip
    y += 26
    pen.text(LEFT, y, "Passes over memory, clip and step in fp32", 14, bold=True)
    lanes = [
        ("torch: clip_grad_norm_, AdamW(fused=True)",
         ["rg", "rg", "wg", "rp", "rg", "rm", "rv", "wp", "wm", "wv"]),
        ("bigkernel: AdamW(max_grad_norm=1.0)",
         ["rg", "rp", "rg", "rm", "rv", "wp", "wm", "wv"]),
    ]  # fmt: skip
    for k, (name, passes) in enumerate(lanes):
        top = y + 14 + 66 * k
        pen.text(LEFT, top + 12, name, 13.5, "dim")
        for i, (way, what) in enumerate(passes):
            fill = "soft" if way == "r" else "ours"
            pen.rect(LEFT + 31 * i, top + 20, 28, 28, fill, radius=4)
            pen.text(LEFT + 31 * i + 14, top + 39, what, 15, "ink" if way == "r" else "paper",
                     bold=True, anchor="middle")  # fmt: skip
        pen.text(LEFT + 31 * len(passes) + 6, top + 40, f"{len(passes)}", 16, "ink", bold=True)
    y += 152
    pen.rect(LEFT, y, 14, 14, "soft", radius=2)
    pen.text(LEFT + 20, y + 12, "read", 13.5)
    pen.rect(LEFT + 70, y, 14, 14, "ours", radius=2)
    pen.text(LEFT + 90, y + 12, "write", 13.5)
    pen.text(LEFT + 144, y + 12, "g gradient, p parameter,", 13.5, "dim")
    pen.text(LEFT + 144, y + 30, "m and v moments", 13.5, "dim")
    flow(pen, y + 46, [
        ("bf16 rounds at random", ["Up or down, so that small updates count on",
                                   "average; or an fp32 master keeps them all."]),
        ("The norm waits for nobody", ["optimizer.grad_norm is a tensor on the device;",
                                       "the log reads it when it likes."]),
    ], number=4)  # fmt: skip
    return pen.svg()


def memory_of_adam() -> str:
    """Bytes a parameter; tests/test_docs.py counts them."""
    pen = Pen("Bytes that the optimiser holds for each parameter")
    pen.text(LEFT, 24, "Bytes for each parameter", 17, bold=True)
    pen.text(LEFT, 44, "parameter, fp32 master, two moments", 13.5, "dim")
    for i, (name, parts) in enumerate(ADAM_MEMORY.items()):
        y, x = 62 + 50 * i, float(LEFT)
        pen.text(LEFT, y + 14, name, 15)
        for size, fill in zip(parts, ("ours", "weak", "soft"), strict=True):
            if size:
                pen.rect(x, y + 21, size * 21 - 2, 18, fill, radius=2)
            x += size * 21
        pen.text(x + 6, y + 35, str(sum(parts)), 15, bold=True)
    y = 62 + 50 * len(ADAM_MEMORY) + 6
    for k, (fill, words) in enumerate(
        [("ours", "parameter"), ("weak", "fp32 master"), ("soft", "moments")]
    ):
        pen.rect(LEFT + 120 * k, y, 14, 14, fill, radius=2)
        pen.text(LEFT + 20 + 120 * k, y + 12, words, 13.5)
    return pen.svg()


# dtype and options -> bytes of (parameter, master, moments)
ADAM_MEMORY = {
    "fp32": (4, 0, 8),
    "bf16, fp32 masters": (2, 4, 8),
    "bf16, stochastic rounding": (2, 0, 8),
    "bf16, bf16 moments": (2, 0, 4),
}


def fold() -> str:
    """A chain one after the other, and folded."""
    pen = Pen("A chain of transforms, one after the other and folded")
    pen.text(LEFT, 24, "A chain, folded", 17, bold=True)
    names = ["RandomResizedCrop", "RandomHorizontalFlip", "ColorJitter", "Normalize"]
    pen.text(LEFT, 50, "one after the other", 14, "dim")
    pen.text(WIDTH - 150, 50, "with Compose", 14, "dim")
    for i, name in enumerate(names):
        y = 62 + 52 * i
        pen.rect(LEFT, y, 180, 34)
        pen.text(LEFT + 10, y + 22, name, 14)
        if i + 1 < len(names):
            pen.arrow(LEFT + 90, y + 35, LEFT + 90, y + 51, "weak", 2)
    bottom = 62 + 52 * 3 + 34
    pen.rect(WIDTH - 150, 62, 138, bottom - 62, "soft", "ours")
    for k, words in enumerate(
        ["one map", "one colour list", "one mean and std", "", "a single pass"]
    ):
        pen.text(WIDTH - 81, 112 + 24 * k, words, 14, bold=k == 4, anchor="middle")
    pen.text(LEFT, bottom + 26, "Orange arrows: the whole batch goes to memory", 13.5, "dim")
    pen.text(LEFT, bottom + 44, "and comes back.", 13.5, "dim")
    return pen.svg()


def parts() -> str:
    """What stands on what."""
    pen = Pen("The parts of bigkernel and what stands on what")
    pen.text(LEFT, 24, "Take one part or all of them", 17, bold=True)
    wide = RIGHT - LEFT
    layers = [
        ("Command line", "bigkernel train, generate, evaluate, bench", "box"),
        ("recipes", "from data to a trained model, in Python", "box"),
        ("Trainer", "transformers' own, with what is below inside", "box"),
    ]
    for i, (name, words, fill) in enumerate(layers):
        y = 42 + 62 * i
        pen.rect(LEFT, y, wide, 54, fill, "line")
        pen.text(LEFT + 12, y + 23, name, 15, bold=True)
        pen.text(LEFT + 12, y + 43, words, 13.5, "dim")
    third = (wide - 12) / 3
    for k, (name, words) in enumerate(
        [("attention", "torch's SDPA"), ("optim", "torch's AdamW"), ("transforms", "torchvision's")]
    ):
        x = LEFT + k * (third + 6)
        pen.rect(x, 228, third, 54, "soft", "ours")
        pen.text(x + 8, 251, name, 15, bold=True)
        pen.text(x + 8, 271, words, 13, "dim")
    pen.rect(LEFT, 290, wide, 54, "box", "line")
    pen.text(LEFT + 12, 313, "Kernels", 15, bold=True)
    pen.text(LEFT + 12, 333, "CPU, CUDA, and plain PyTorch for the rest", 13.5, "dim")
    return pen.svg()


FIGURES: dict[str, Callable[[], str]] = {
    "speed": speed,
    "speed-attention": op_chart("attention"),
    "speed-adam": op_chart("adam"),
    "speed-augment": op_chart("augment"),
    "masks": masks,
    "life-of-a-q": life_of_a_q,
    "life-of-an-image": life_of_an_image,
    "life-of-a-step": life_of_a_step,
    "memory-of-adam": memory_of_adam,
    "fold": fold,
    "parts": parts,
}


def main() -> None:
    for name, draw in FIGURES.items():
        (IMAGES / f"{name}.svg").write_text(draw(), encoding="utf-8")
        print(f"docs/images/{name}.svg")


if __name__ == "__main__":
    main()
