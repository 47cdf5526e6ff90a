"""New models from presets and config files, and trained models to start from."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from bigkernel.checkpoint import notify
from bigkernel.data.tokenizer import check_folder, code_not_run, hub_is_reachable, means_a_folder
from bigkernel.integrations import patch
from bigkernel.recipes import presets
from bigkernel.recipes.errors import Failure, UsageError, option
from bigkernel.recipes.settings import Model, read_document, user_path


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Inside, only errors, and no bars for files that are read in a moment."""
    logging = transformers.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def inline(kind: str, model: Model) -> Model:
    """A preset's name as it is; a config file, or a folder with one, as its content."""
    if isinstance(model, dict):
        if "model_type" not in model:
            raise UsageError("the model in the config file needs a model_type, such as llama.")
        return model
    table = presets.TEXT_MODELS if kind == presets.TEXT else presets.IMAGE_MODELS
    if model in table:
        return model
    path = user_path(model)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise UsageError(
            f"{option('model', model)}: neither a preset nor a config file. "
            f"Presets: {', '.join(table)}."
        )
    content = read_document(file)
    if not isinstance(content, dict) or "model_type" not in content:
        raise UsageError(f"{file} must be a model's config with a model_type, such as llama.")
    return content


def _config(kind: str, model: Model, **from_data: Any) -> Any:
    table = presets.TEXT_MODELS if kind == presets.TEXT else presets.IMAGE_MODELS
    content = dict(model) if isinstance(model, dict) else dict(table[model])
    # What belongs to a saved file and not to the shape of the model.
    for name in ("architectures", "transformers_version", "dtype", "torch_dtype"):
        content.pop(name, None)
    if content.pop("auto_map", None) is not None:
        raise UsageError(
            "the model's config names code of its own (auto_map), and a new model is built from "
            "transformers' own classes. Take auto_map out, or start from the model's weights with "
            f"{option('init_from')} and {option('trust_remote_code', True)}."
        )
    kernels = _hub_kernels(content)
    if kernels is not None:
        raise UsageError(
            f"the model's config asks for kernels of a hub ({kernels}), which is code; take the "
            "line out."
        )
    content.update(from_data)
    model_type = content.pop("model_type")
    try:
        return AutoConfig.for_model(model_type, **content)
    except (ValueError, TypeError, ArithmeticError, StrictDataclassError) as error:
        raise UsageError(f"the model's config is not a valid {model_type}: {_one(error)}") from None


def _one(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def new_text_model(
    model: Model, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> PreTrainedModel:
    """A decoder with random weights for this tokenizer and sequences of ``max_length``."""
    config = _config(
        presets.TEXT,
        model,
        vocab_size=len(tokenizer),
        max_position_embeddings=max_length,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return _build(AutoModelForCausalLM, config, "a causal language model")


def image_size(model: Model | None, wanted: int | None, images: Any) -> int:
    """Asked for, else the model's own, else the images' if small and square, else 32 pixels."""
    if wanted is not None:
        return wanted
    content = presets.IMAGE_MODELS.get(model, {}) if isinstance(model, str) else model or {}
    own = content.get("image_size")
    if own is not None:
        return int(own)
    shapes = {tuple(images[i].shape[-2:]) for i in range(min(len(images), 64))}
    height, width = next(iter(shapes))
    return int(height) if len(shapes) == 1 and height == width and height <= 64 else 32


def new_image_model(
    model: Model, label_names: list[str], channels: int, size: int
) -> PreTrainedModel:
    """A classifier with random weights for these classes and images [channels, size, size]."""
    config = _config(
        presets.IMAGES,
        model,
        image_size=size,
        num_channels=channels,
        id2label=dict(enumerate(label_names)),
        label2id={name: index for index, name in enumerate(label_names)},
    )
    patch = getattr(config, "patch_size", None)
    if isinstance(patch, int) and size % patch:
        raise UsageError(
            f"images of {size} pixels cannot be cut into patches of {patch}: "
            f"{option('image_size')} must be a multiple of {patch}."
        )
    return _build(AutoModelForImageClassification, config, "an image classifier")


def _build(auto: Any, config: Any, what: str) -> PreTrainedModel:
    try:
        return auto.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except MemoryError:
        raise
    except Exception as error:  # of many kinds, for a width of 0 or an activation without a name
        if "Unrecognized configuration class" in str(error):
            raise UsageError(f"model_type {config.model_type} is not {what}.") from None
        kind = "" if isinstance(error, (ValueError, RuntimeError)) else f"{type(error).__name__}: "
        raise UsageError(f"the model cannot be built: {kind}{_one(error)}") from None


def load(
    kind: str, name: str, *, trust_remote_code: bool = False, **arguments: Any
) -> PreTrainedModel:
    """A trained model from a folder or a hub, in float32; safetensors only, never a pickle."""
    auto = AutoModelForCausalLM if kind == presets.TEXT else AutoModelForImageClassification
    local = user_path(name)
    if local.is_dir():
        check_folder(local)
    elif local.exists():
        raise Failure(f"{local} is a file; give the folder of a run or of a downloaded model.")
    elif means_a_folder(name):
        raise Failure(f"there is no folder {local}; give the folder of a run or of a model.")
    where = str(local) if local.exists() else name
    if not local.exists() and not hub_is_reachable():
        arguments["local_files_only"] = True
    if not trust_remote_code:
        _without_code(where, arguments.get("local_files_only", False))
    try:
        return auto.from_pretrained(
            where,
            dtype=torch.float32,
            use_safetensors=True,
            # Not left to the default, which asks on stdout whether to run a model's own code.
            trust_remote_code=trust_remote_code,
            **arguments,
        )
    except Exception as error:  # the hub's client raises many kinds; all mean that it cannot be had
        refused = code_not_run(error, where)
        if refused is not None:
            raise Failure(refused) from error
        if local.exists():
            raise Failure(f"{local} holds no model that can be loaded: {_one(error)}") from error
        raise Failure(
            f"{name} is not a folder here, and no hub gave a model of that name "
            f"({_one(error)[:160]}). Give the path of a run or of a downloaded model."
        ) from error


def _without_code(where: str, offline: bool) -> None:
    """Refuse a model whose config asks for kernels from a hub, and say so of code left alone."""
    try:
        config, _ = PreTrainedConfig.get_config_dict(where, local_files_only=offline)
    except Exception:  # what is wrong with it is said where the model is loaded
        return
    kernels = _hub_kernels(config)
    if kernels is not None:
        raise Failure(
            f"{where} asks for attention kernels of a hub ({kernels}), which is code that is not "
            f"run unasked: allow it with {option('trust_remote_code', True)}, or take the line out "
            "of config.json."
        )
    known = config.get("model_type") in CONFIG_MAPPING
    if known and config.get("auto_map"):
        notify(
            f"{where} brings code of its own, which is not run "
            f"({option('trust_remote_code', True)} would): "
            f"transformers' own {config['model_type']} is used."
        )


def _hub_kernels(config: Any) -> str | None:
    """The hub's name in a setting such as attn_implementation, here or in a part of the model."""
    for name, value in config.items():
        if name.endswith("_implementation") and "/" in str(value):
            return str(value)
        found = _hub_kernels(value) if isinstance(value, dict) else None
        if found is not None:
            return found
    return None


def place(model: PreTrainedModel, device: torch.device) -> None:
    """Move a loaded model to ``device`` and put bigkernel's kernels into it."""
    module: torch.nn.Module = model
    module.to(device)
    patch(model, quiet=True)


def parameters(model: torch.nn.Module) -> int:
    """How many numbers the model learns, tied ones once."""
    return sum(p.numel() for p in model.parameters())
