"""bigkernel.recipes from Python: train, generate, evaluate, open again; what it says and leaves."""

import os
import random
from pathlib import Path

import pytest
import torch
import transformers

from bigkernel import recipes
from bigkernel.recipes import errors, presets

TEXT = "the quick brown fox jumps over the lazy dog. " * 60
SMALL = {
    "model": {**presets.TEXT_MODELS["llama-1m"], "hidden_size": 32, "num_hidden_layers": 1,
              "intermediate_size": 32},
    "max_length": 32,
    "batch_size": 2,
    "max_steps": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "fox.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def run(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> recipes.TextRun:
    """A run over a path, given as one."""
    out = tmp_path_factory.mktemp("runs") / "fox"
    return recipes.train_text(data=texts, out=out, quiet=True, **SMALL)


def test_a_text_run_is_returned_with_its_model_and_figures(run):
    assert isinstance(run.model, transformers.LlamaForCausalLM)
    assert not run.model.training
    assert run.figures.keys() >= {"loss", "perplexity", "bits_per_byte"}
    assert run.settings.max_steps == 3
    assert run.recorded["documents"] == 1
    assert (run.folder / "model.safetensors").is_file()


def test_a_run_is_opened_again_and_measures_and_writes_the_same(run):
    again = recipes.load(run.folder, device="cpu")
    assert isinstance(again, recipes.TextRun)
    assert again.figures is None
    assert again.evaluate() == run.figures
    assert (run.folder / "evaluation.json").is_file()
    state = torch.get_rng_state(), random.getstate()
    said = again.generate("the", max_new_tokens=5, seed=3)
    assert said.startswith("the")
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert run.generate("the", max_new_tokens=5, seed=3) == said
    assert len(run.evaluate(run.settings.data)) == len(run.figures)


def test_transformers_is_as_talkative_afterwards_as_before(run):
    logging = transformers.logging
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:
        logging.set_verbosity_info()
        recipes.load(run.folder, device="cpu")
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled() == before[1]
    finally:
        logging.set_verbosity(before[0])


def test_quiet_is_quiet_and_otherwise_lines_tell(texts, tmp_path, capfd):
    recipes.train_text(data=texts, out=tmp_path / "a", quiet=True, **SMALL)
    assert capfd.readouterr().out == ""
    recipes.train_text(data=texts, out=tmp_path / "b", **SMALL)
    said = capfd.readouterr().out
    assert "reading " in said
    assert "step 3/3" in said
    assert "model, metrics, pictures and card are in" in said


def test_a_run_goes_on_and_is_not_overwritten(run, texts):
    with pytest.raises(
        recipes.UsageError, match=r"Use force=True .*, resume='auto' to continue it"
    ):
        recipes.train_text(data=texts, out=run.folder, quiet=True, **SMALL)
    more = recipes.train_text(out=run.folder, resume="auto", max_steps=4, quiet=True)
    assert more.settings.max_steps == 4
    assert more.settings.data == str(texts.resolve())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lr": -1.0}, r"^lr must be above 0, got -1\.0\.$"),
        ({"lr": "fast"}, r"^lr must be float, got 'fast'\.$"),
        (
            {"max_lenght": 8},
            r"^there is an unknown setting 'max_lenght'\. Did you mean 'max_length'",
        ),
        ({"model": "llama-9t"}, r"^model='llama-9t': neither a preset nor a config file"),
        ({"resume": "auto"}, r"^resume='auto' needs to know which run: add out='RUN'\.$"),
        ({"device": "tpu"}, r"^device must be auto, cpu, cuda or cuda:N, got 'tpu'\.$"),
        ({"force": True, "resume": "auto"}, r"^force=True replaces a run and resume continues it"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_settings_are_named_as_arguments(settings, said, texts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(recipes.UsageError, match=said):
        recipes.train_text(data=texts, quiet=True, **settings)
    assert not os.listdir(tmp_path)


def test_the_command_line_names_them_as_options():
    assert errors.option("max_length") == "max_length"
    assert errors.option("resume", "auto") == "resume='auto'"
    with errors.speaking_of_options(), errors.quietly():
        assert errors.option("max_length") == "--max-length"
        assert errors.option("resume", "auto") == "--resume auto"
        assert errors.option("force", True) == "--force"
    assert errors.option("max_length") == "max_length"


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": 1e-9}, {"top_p": 0.0}, {"top_k": -1}, {"seed": -1}, {"max_new_tokens": 0}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_bad_sampling_is_refused(run, wrong):
    (name,) = wrong
    with pytest.raises(recipes.UsageError, match=f"^{name} must be "):
        run.generate("the", **wrong)


def test_an_image_run_is_returned_opened_and_classifies(tmp_path):
    out = tmp_path / "digits"
    run = recipes.train_images(out=out, max_steps=2, quiet=True)
    again = recipes.load(out, device="cpu")
    assert isinstance(again, recipes.ImageRun)
    assert again.evaluate() == run.figures
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    shares = again.classify(images)
    assert shares.shape == (3, 10)
    torch.testing.assert_close(shares.sum(1), torch.ones(3))
    pixels = (images.float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        expected = run.model(pixel_values=pixels).logits.softmax(-1)
    torch.testing.assert_close(shares, expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(recipes.UsageError, match="is not a run folder"):
        recipes.load(tmp_path / "none")
