"""What a run is told: the order of precedence, config files, and augmentation recipes."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bigkernel.recipes import augmentation, models, presets
from bigkernel.recipes.errors import UsageError
from bigkernel.recipes.settings import ImageSettings, TextSettings, dump, gather, read_config


def test_each_later_layer_wins() -> None:
    recipe = presets.TEXT_RECIPES["demo"]
    assert gather("train text", {}).lr == recipe["lr"]
    assert gather("train text", {}, {"lr": 0.5}).lr == 0.5
    assert gather("train text", {"lr": 0.25}, {"lr": 0.5}).lr == 0.25
    assert gather("train text", {"preset": "small"}, {"lr": 0.5}).lr == 1e-3
    zh = gather("train text", {"preset": "demo"}, sample="zh")
    assert zh.data == "sample:zh"
    assert zh.lr == recipe["lr"]


def test_one_of_two_alternatives_takes_the_other_back() -> None:
    settings = gather("train text", {"epochs": 2.0})
    assert (settings.epochs, settings.max_steps) == (2.0, None)
    settings = gather("train text", {"init_from": "somewhere"})
    assert (settings.preset, settings.model) == ("finetune", None)
    settings = gather("train images", {"max_steps": 5})
    assert (settings.epochs, settings.max_steps) == (None, 5)


BELOW_1 = 1 - 2**-53
LIMITS = {  # setting: (values that are just good, values that are just not)
    "epochs": ((1e-9, None), (0.0, math.inf)),
    "max_steps": ((1, 2**31 - 1, None), (0, 2**31)),
    "lr": ((1e-300,), (0.0, math.inf, math.nan)),
    "warmup": ((0.0, BELOW_1), (-1e-9, 1.0, math.nan)),
    "min_lr": ((0.0, 1.0), (-1e-9, 1 + 1e-9, math.nan)),
    "weight_decay": ((0.0,), (-1e-9, math.nan)),
    "beta2": ((0.0, BELOW_1), (-1e-9, 1.0, math.nan)),
    "max_grad_norm": ((0.0,), (-1e-9, math.nan)),
    "batch_size": ((1, 2**31 - 1), (0, 2**31)),
    "accumulate": ((1,), (0, 2**31)),
    "validation": ((1e-9, BELOW_1), (0.0, 1.0, math.nan)),
    "seed": ((0, 2**32 - 1), (-1, 2**32)),
    "threads": ((1, None), (0, 2**31)),
    "save_steps": ((1, None), (0, 2**31)),
    "log_steps": ((1, None), (0, 2**31)),
    "optim": (("adamw", "adam", "sgd", "muon"), ("", "AdamW")),
    "dtype": (("auto", "float32"), ("", "fp32")),
    "max_length": ((2,), (1, 2**31)),
    "vocab_size": ((1, None), (0, 2**31)),
    "max_pixels": ((1,), (0, 2**31)),
    "image_size": ((1, None), (0, 2**31)),
}


@pytest.mark.parametrize("name", LIMITS)
def test_values_at_the_ends_of_their_ranges(name: str) -> None:
    kind = TextSettings if hasattr(TextSettings, name) else ImageSettings
    fine, wrong = LIMITS[name]
    for value in fine:
        kind(**{name: value}).check()
    for value in wrong:
        with pytest.raises(UsageError, match=f"^{name} must be .*, got "):
            kind(**{name: value}).check()


@pytest.mark.parametrize("command", ["train text", "train images"])
def test_config_file_round_trip(command: str, tmp_path: Path) -> None:
    settings = gather(command, {"seed": 7, "lr": 0.125})
    path = tmp_path / "config.yaml"
    path.write_text(dump(settings, command, {"sha256": "abc"}))
    values, record = read_config(path, command)
    assert type(settings)(**values) == settings
    assert record == {"sha256": "abc"}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("lr: [1, 2]", "lr must be float"),
        ("max_steps: ten", "max_steps must be int or nothing"),
        ("batch_size: true", "batch_size must be int"),
        ("learning_rat: 1", "unknown setting 'learning_rat'"),
        ("batchsize: 1", "Did you mean 'batch_size'"),
        ("- lr", "must hold settings"),
        ("lr: {", "line 1"),
        ("record: 5", "record must hold facts as `name: value`, got 5"),
        ("command: train images", "is for `bigkernel train images`"),
        (b"\xff\xfe", "UTF-8"),
    ],
)
def test_bad_config_files(content: str | bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=r"config\.yaml") as caught:
        read_config(path, "train text")
    assert expected in str(caught.value)


def test_numbers_as_yaml_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("lr: 3e-3\nepochs: 2\n")  # a string and an int, for YAML 1.1
    assert read_config(path, "train text")[0] == {"lr": 0.003, "epochs": 2.0}


@pytest.mark.parametrize("name", presets.TEXT_RECIPES)
def test_text_recipes_hold(name: str) -> None:
    settings = gather("train text", {"preset": name})
    assert isinstance(settings, TextSettings)
    assert settings.model is None or settings.model in presets.TEXT_MODELS


@pytest.mark.parametrize("name", presets.IMAGE_RECIPES)
def test_image_recipes_hold(name: str) -> None:
    settings = gather("train images", {"preset": name})
    assert isinstance(settings, ImageSettings)
    assert settings.model is None or settings.model in presets.IMAGE_MODELS
    assert settings.augment in presets.AUGMENTATIONS


@pytest.mark.parametrize("name", presets.AUGMENTATIONS)
def test_augmentation_recipes_run(name: str) -> None:
    recipe = augmentation.read_recipe(name)
    train, plain = augmentation.pipelines(recipe, 16, [0.5] * 3, [0.5] * 3)
    images = [torch.randint(0, 256, (3, 20 + i, 24), dtype=torch.uint8) for i in range(4)]
    for chain in (train, plain):
        out = chain(images, generator=torch.Generator().manual_seed(0), ids=torch.arange(4))
        assert out.shape == (4, 3, 16, 16)
        assert out.dtype == torch.float32
        assert out.abs().max() <= 1.0 + 1e-6


def test_evaluation_keeps_images_of_the_right_size() -> None:
    _, plain = augmentation.pipelines([], 8, [0.5], [0.5])
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(plain(images), (images / 255 - 0.5) / 0.5)


def test_augmentation_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "- RandomRotation: {degrees: 10, interpolation: bilinear}\n- RandomVerticalFlip\n"
    )
    recipe = augmentation.read_recipe(str(path))
    assert [next(iter(step)) for step in recipe] == ["RandomRotation", "RandomVerticalFlip"]
    augmentation.pipelines(recipe, 8, [0.5], [0.5])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("RandomRotation: {degrees: 1}", "must be a list"),
        ("- {RandomRotation: {degrees: 1}, Pad: {}}", "step 1 must be one transform"),
        ("- RandomRotation: 5", "arguments must be"),
        ("- RandomTeleport", "no such transform"),
        ("- RandomRotation: {degres: 5}", "no argument 'degres'. It takes: degrees"),
        ("- RandomHorizontalFlip: {p: 2}", "step 1 (RandomHorizontalFlip)"),
        ("- RandomRotation: {degrees: 5, interpolation: smooth}", "smooth"),
        ("- [", "not valid YAML"),
    ],
)
def test_bad_augmentation_files(content: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(UsageError) as caught:
        augmentation.build(augmentation.read_recipe(str(path)), 8)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"model_type": "llamma"}, "llamma"),
        ({"model_type": "llama", "hidden_size": "wide"}, "not a valid llama"),
        ({"model_type": "llama", "num_attention_heads": 0}, "a valid llama: integer division"),
        ({"model_type": "llama", "hidden_act": "nope"}, "cannot be built: KeyError: 'nope'"),
        ({"model_type": "vit"}, "not a causal language model"),
    ],
)
def test_bad_model_configs(content: dict[str, Any], expected: str) -> None:
    from bigkernel.data import build_tokenizer

    with pytest.raises(UsageError) as caught:
        models.new_text_model(content, build_tokenizer("bytes"), 16)
    assert expected in str(caught.value)


def test_model_in_a_config_file_needs_its_type() -> None:
    with pytest.raises(UsageError, match="model_type"):
        models.inline(presets.TEXT, {"hidden_size": 64})


def test_model_config_from_a_folder_or_file(tmp_path: Path) -> None:
    content = {"model_type": "llama", "hidden_size": 64}
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 64}')
    (tmp_path / "shape.yaml").write_text(yaml.safe_dump(content))
    assert models.inline(presets.TEXT, str(tmp_path)) == content
    assert models.inline(presets.TEXT, str(tmp_path / "shape.yaml")) == content
    assert models.inline(presets.TEXT, "llama-1m") == "llama-1m"


def test_presets_have_the_size_that_their_name_says() -> None:
    from bigkernel.data import build_tokenizer

    model = models.new_text_model("llama-1m", build_tokenizer("bytes"), 16)
    assert 0.7e6 < models.parameters(model) < 1.3e6
