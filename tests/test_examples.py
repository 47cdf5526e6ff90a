"""Each example runs, small, does what it is an example of, and is short."""

import re
import runpy
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch

from bigkernel.backend import FallbackWarning
from bigkernel.testing import assert_as_accurate

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs an example in ``tmp_path`` as `python examples/NAME ...` does; returns its output."""

    def run_it(name: str, *arguments: object) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        with warnings.catch_warnings():
            warnings.simplefilter("error", FallbackWarning)
            runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        return capsys.readouterr().out

    return run_it


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_short_and_has_a_test(path):
    text = path.read_text()
    assert len(text.splitlines()) < 80
    assert f'run("{path.name}"' in Path(__file__).read_text()
    assert f"python examples/{path.name}" in text.split('"""')[1]
    assert "bigkernel._" not in text  # public names only


def test_examples_are_listed_in_the_documentation():
    listed = (ROOT / "docs" / "examples.md").read_text()
    assert [path.name for path in EXAMPLES if f"../examples/{path.name}" not in listed] == []


def test_finetuning_lowers_the_perplexity(run, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    from bigkernel.data import build_tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    build_tokenizer("bytes").save_pretrained(tmp_path / "model")
    text = "\n".join(f"line {i} of a text about nothing much" for i in range(400))
    (tmp_path / "text.txt").write_text(text)
    arguments = ["--model", "model", "--data", "text.txt", "--out", "run", "--max-length", 64]
    arguments += ["--batch-size", 4, "--max-steps", 20, "--lr", 1e-2]
    said = run("finetune_text.py", *arguments)
    before, after = map(
        float, re.search(r"perplexity ([\d.]+) before, ([\d.]+) after", said).groups()
    )
    assert after < before / 4
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_vit_learns_a_folder_of_images(run, tmp_path):
    from PIL import Image

    for label, colour in (("dark", 40), ("light", 200)):
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(20):
            image = Image.new("RGB", (24 + i % 3, 20), (colour + i, colour, colour - i))
            image.save(tmp_path / "data" / label / f"{i}.png")
    small = ["--size", 16, "--patch", 8, "--width", 64, "--layers", 1, "--batch-size", 8]
    said = run("vit_image_folder.py", "--data", "data", *small, "--epochs", 3)
    assert float(re.search(r"accuracy ([\d.]+)% of 8 held back", said).group(1)) > 95
    assert (tmp_path / "runs" / "vit" / "model.safetensors").is_file()


def test_timm_style_loop_learns_digits(run):
    said = run("timm_style_loop.py", "--epochs", 4, "--width", 32)
    assert float(re.search(r"accuracy ([\d.]+)%", said).group(1)) > 70


def test_plain_loop_learns_letters(run):
    small = ["--steps", 40, "--batch-size", 4, "--length", 64, "--width", 64, "--layers", 1]
    losses = [float(x) for x in re.findall(r"([\d.]+) nats", run("plain_loop.py", *small))]
    assert losses[0] > 5
    assert losses[-1] < 4


@pytest.mark.slow
def test_workers_of_ray_train_one_model(run):
    pytest.importorskip("ray")
    from transformers import AutoModelForCausalLM

    from bigkernel.data import build_tokenizer

    assert run("ray_train.py", "--workers", 2).endswith("the model is in runs/ray\n")
    model = AutoModelForCausalLM.from_pretrained("runs/ray")
    ids = build_tokenizer("bytes")("the cat sat on the mat. ", return_tensors="pt")["input_ids"]
    assert model(input_ids=ids, labels=ids).loss.item() < 4  # 5.5 before


def test_own_transform_is_keyed_by_image(run):
    said = run("own_transform.py", "--images", 8, "--size", 16)
    assert said == "(8, 3, 16, 16); the same in a batch of half the size: True\n"


def test_own_transform_blurs_as_torchvision_does():
    v2 = pytest.importorskip("torchvision.transforms.v2")
    own = runpy.run_path(str(ROOT / "examples" / "own_transform.py"))["GaussianBlur"]
    blur, theirs = own(3, (1.3, 1.3)), v2.GaussianBlur(7, 1.3)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 12, 15), dtype=torch.uint8, generator=generator)
    for given in (images, images.short()):
        assert torch.equal(blur(given), theirs(images.double()).round().to(given.dtype))
    floats = images / 255
    assert_as_accurate(blur(floats), theirs(floats.double()), theirs(floats))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the path")
def test_own_kernel_is_right_and_its_race_is_found(run):
    said = run("own_kernel.py", "--rows", 3, "--columns", 200)
    assert float(re.search(r"largest error (\S+);", said).group(1)) < 1e-6
    assert "without the barrier: kernel softmax" in said
