"""What bigkernel relies on in transformers beside its documented interface, all of it.

Private methods that our Trainer overrides or calls, attributes that it reads, mask functions that
are told apart by the variables they close over. Another version of transformers may change any
of them, and a result could then be silently wrong: so each is compared with what is expected here
before it is first used. `make test-transformers` runs the tests at both ends of the
versions that are known to work.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version as version_of
from typing import Any

OLDEST, NEWEST = "5.23.0", "5.24.0"


class TransformersChangedError(RuntimeError):
    """Something in the installed transformers is not as bigkernel relies on it being."""


def _plain(function: Any) -> str:
    """A signature without annotations: ``(self, model, grad_norm=None)``."""
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    shown = str(signature.replace(parameters=parameters, return_annotation=signature.empty))
    return re.sub(r"<function ([\w.]+) at 0x[0-9a-f]+>", r"\1", shown)


def codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """``code`` and all that is nested in it: functions inside functions, from outside in."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes(constant)


def _names_in(cls: type) -> set[str]:
    """Every name that the functions of a class use for an attribute."""
    members = [getattr(member, "fget", member) for member in vars(cls).values()]
    functions = [inspect.unwrap(f) for f in members if inspect.isfunction(f)]
    return {name for f in functions for code in codes(f.__code__) for name in code.co_names}


@dataclass(frozen=True)
class Need:
    """Something of transformers, and how it is expected to be.

    Attributes:
        owner: the module or class that has it.
        name: its name there.
        expected: the signature of a function, with the variables that what it returns closes over
            (`` -> closure of a, b``); "an attribute" of a class or module; "an instance attribute"
            that the methods of a class use.
    """

    owner: str
    name: str
    expected: str

    def find(self) -> Any:
        """What is there; AttributeError or ImportError where nothing is."""
        owner: Any
        try:
            owner = importlib.import_module(self.owner)
        except ModuleNotFoundError:
            module, _, cls = self.owner.rpartition(".")
            owner = getattr(importlib.import_module(module), cls)
        return owner if self.expected == "an instance attribute" else getattr(owner, self.name)

    def found(self) -> str:
        """How it is in the installed transformers, in the words of ``expected``."""
        try:
            there = self.find()
        except (AttributeError, ImportError):
            return "nothing"
        if self.expected == "an instance attribute":
            return self.expected if self.name in _names_in(there) else "nothing"
        if self.expected == "an attribute":
            return self.expected
        if not callable(there):
            return f"a value of type {type(there).__name__}"
        shown = _plain(there)
        if " -> closure of " in self.expected:
            inner = list(codes(inspect.unwrap(there).__code__))[1:]
            shown += f" -> closure of {', '.join(inner[-1].co_freevars) if inner else 'nothing'}"
        return shown

    def check(self) -> None:
        """TransformersChangedError, one sentence, unless what is found is what is expected."""
        found = self.found()
        if found != self.expected:
            import transformers

            raise TransformersChangedError(
                f"bigkernel relies on {self.owner}.{self.name} being {self.expected}, and "
                f"transformers {transformers.__version__} has {found} there; versions known to "
                f"work: {OLDEST} to {NEWEST}."
            )


def _needs(owner: str, **expected: str) -> tuple[Need, ...]:
    return tuple(Need(owner, name, how) for name, how in expected.items())


_ATTRIBUTE, _INSTANCE = "an attribute", "an instance attribute"

# What T5 calls the cache, of which no packed call knows.
_CACHE = "past_key_values" if version_of("transformers").startswith("5.23.") else "cache"
_T5_FORWARD = (
    "(self, hidden_states, mask=None, key_value_states=None, position_bias=None, "
    f"{_CACHE}=None, **kwargs)"
)
_T5_ATTENTION = (
    *("q", "k", "v", "o", "n_heads", "key_value_proj_dim", "scaling", "dropout"),
    *("is_decoder", "is_causal", "has_relative_attention_bias"),
)

# By who relies on them.
NEEDS: dict[str, tuple[Need, ...]] = {
    "trainer": (
        *_needs(
            "transformers.trainer.Trainer",
            autocast_smart_context_manager="(self, cache_enabled=True)",
            call_model_init="(self, trial=None)",
            create_accelerator_and_postprocess="(self)",
            compute_loss="(self, model, inputs, return_outputs=False, num_items_in_batch=None)",
            create_optimizer="(self, model=None)",
            evaluation_loop=(
                "(self, dataloader, description, prediction_loss_only=None, "
                "ignore_keys=None, metric_key_prefix='eval')"
            ),
            floating_point_ops="(self, inputs)",
            get_decay_parameter_names="(self, model)",
            get_eval_dataloader="(self, eval_dataset=None)",
            get_optimizer_cls_and_kwargs="(args, model=None)",
            get_test_dataloader="(self, test_dataset)",
            get_train_dataloader="(self)",
            log="(self, logs, start_time=None)",
            prediction_step="(self, model, inputs, prediction_loss_only, ignore_keys=None)",
            train="(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None)",
            training_step="(self, model, inputs, num_items_in_batch=None)",
            save_model="(self, output_dir=None, _internal_call=False)",
            store_flos="(self)",
            _clip_grad_norm="(self, model)",
            _finalize_training="(self, trial, num_train_samples, start_time)",
            _get_grad_norm="(self, model, grad_norm=None)",
            _get_output_dir="(self, trial)",
            _init_training_state=(
                "(self, max_steps, num_update_steps_per_epoch, num_train_epochs, "
                "resume_from_checkpoint, trial)"
            ),
            _issue_warnings_after_load="(self, load_result)",
            _load_best_model="(self)",
            _load_from_checkpoint="(self, resume_from_checkpoint, model=None)",
            _load_optimizer_and_scheduler="(self, checkpoint)",
            _load_rng_state="(self, checkpoint)",
            _maybe_log_save_evaluate=(
                "(self, tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, "
                "start_time, learning_rate=None)"
            ),
            _prepare_inputs="(self, inputs)",
            _push_from_checkpoint="(self, checkpoint_folder)",
            _run_epoch=(
                "(self, model, epoch, train_dataloader, steps_in_epoch, "
                "num_update_steps_per_epoch, trial, ignore_keys_for_eval, start_time, "
                "resume_from_checkpoint, epochs_trained, steps_trained_in_current_epoch)"
            ),
            _save="(self, output_dir=None, state_dict=None)",
            _save_checkpoint="(self, model, trial)",
            _save_optimizer_and_scheduler="(self, output_dir)",
            _save_rng_state="(self, output_dir)",
            _save_scaler="(self, output_dir)",
            _set_signature_columns_if_needed="(self)",
        ),
        *_needs(
            "transformers.trainer.Trainer",
            compute_loss_func=_INSTANCE,
            label_smoother=_INSTANCE,
            optimizer_cls_and_kwargs=_INSTANCE,
            _loss_shifts_labels=_INSTANCE,
            _tr_loss=_INSTANCE,
            _total_loss_scalar=_INSTANCE,
            _globalstep_last_logged=_INSTANCE,
            _signature_columns=_INSTANCE,
        ),
        *_needs("transformers.training_args.TrainingArguments", default_optim=_ATTRIBUTE),
        *_needs(
            "transformers.modeling_utils",
            remove_tied_weights_from_state_dict="(state_dict, model)",
        ),
        *_needs(
            "transformers.modeling_utils.PreTrainedModel",
            _keys_to_ignore_on_save=_ATTRIBUTE,
            _no_split_modules=_ATTRIBUTE,
        ),
    ),
    **{
        cls: _needs(
            f"transformers.models.{room}.modeling_{room}.{cls}",
            forward=forward,
            compute_bias="(self, query_length, key_length, device=None, past_seen_tokens=0)",
            **dict.fromkeys(_T5_ATTENTION, _INSTANCE),
        )
        for room, cls, forward in (
            ("t5", "T5Attention", _T5_FORWARD),
            ("mt5", "MT5Attention", _T5_FORWARD),
            (
                "umt5",
                "UMT5Attention",
                f"(self, hidden_states, encoder_hidden_states=None, {_CACHE}=None, "
                "attention_mask=None, **kwargs)",
            ),
        )
    },
    "attention": (
        *_needs(
            "transformers.modeling_utils.PreTrainedModel",
            _can_set_attn_implementation="()",
            _supports_flash_attn=_ATTRIBUTE,
        ),
        *_needs(
            "transformers.configuration_utils.PreTrainedConfig",
            _attn_implementation=_ATTRIBUTE,
            _attn_implementation_internal=_INSTANCE,
        ),
        *_needs("transformers.modeling_utils.PreTrainedModel", _loss_function=_INSTANCE),
        *_needs("transformers.utils.output_capturing", _active_collector=_ATTRIBUTE),
        *_needs(
            "transformers.masking_utils",
            and_masks="(*mask_functions) -> closure of mask_functions",
            or_masks="(*mask_functions) -> closure of mask_functions",
            packed_sequence_mask_function=(
                "(packed_sequence_mask) -> closure of packed_sequence_mask"
            ),
            remap_positions_for_packed_sequence=(
                "(mask_function, position_ids) -> closure of mask_function, position_ids"
            ),
            sliding_window_overlay="(sliding_window) -> closure of sliding_window",
            sliding_window_bidirectional_overlay="(sliding_window) -> closure of sliding_window",
            causal_mask_function="(batch_idx, head_idx, q_idx, kv_idx)",
            bidirectional_mask_function="(batch_idx, head_idx, q_idx, kv_idx)",
            sdpa_mask=(
                "(batch_size, q_length, kv_length, q_offset=0, kv_offset=0, "
                "mask_function=causal_mask_function, "
                "attention_mask=None, local_size=None, allow_is_causal_skip=True, "
                "allow_is_bidirectional_skip=False, use_vmap=False, device='cpu', **kwargs)"
            ),
        ),
    ),
}


@functools.cache
def check(group: str) -> None:
    """Compare what ``group`` relies on with the installed transformers, once.

    Raises:
        TransformersChangedError: the first that is otherwise.
    """
    for need in NEEDS[group]:
        need.check()


def get(group: str, name: str) -> Any:
    """The function or object ``name`` that ``group`` relies on, checked."""
    (need,) = (need for need in NEEDS[group] if need.name == name)
    need.check()
    return need.find()
