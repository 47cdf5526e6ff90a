"""FSDP2 (torch's ``fully_shard``) under transformers' Trainer, on CPUs as on GPUs.

accelerate shards a model where it finds GPUs. On CPUs it takes a request for FSDP and wraps the
model in DistributedDataParallel all the same, without a word; there it is told that it is to shard
(`shard_on_cpu`), and then does what it does on GPUs: `fully_shard` for each layer and for the rest.

Checkpoints hold the whole weights, as ``save_pretrained`` writes them, and beside them the
optimizer's state in pieces, one file a rank, by ``torch.distributed.checkpoint`` in the format of
safetensors. Any number of ranks reads them, each its own part; nothing is unpickled. DTensors are
the only thing that a sharded model is known by: what is said here of parameters holds for those
of DistributedDataParallel and of one process too.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn

from bigkernel.checkpoint import CheckpointError

# In a checkpoint: the pieces of the optimizer's state, and its groups.
PIECES, GROUPS = "optimizer", "optimizer_groups.pt"
_FLAG = "ACCELERATE_USE_FSDP"  # set by `accelerate launch`, and by every Accelerator that shards


class ShardingError(ValueError):
    """FSDP was asked for where it would not be what is asked; the message says what to change."""


# Whether, and how


def is_cut(p: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which this rank holds a part."""
    if not torch.distributed.is_available():  # torch for some machines has none
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(p, DTensor)


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` has cut the model's parameters."""
    return any(is_cut(p) for p in model.parameters())


def put_back(model: nn.Module) -> None:
    """Give up the whole parameters that a forward without a backward leaves: pieces are kept."""
    if torch.distributed.is_available():
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def version_of(args: Any) -> int | None:
    """Which FSDP the arguments or the launcher ask for: 1, 2 or None."""
    if args.fsdp:
        return int((args.fsdp_config or {}).get("version", 2))
    if os.environ.get(_FLAG, "false").lower() == "true":
        return int(os.environ.get("FSDP_VERSION", "1"))
    return None


def shard_on_cpu(trainer: Any, asked: int | None) -> None:
    """Have accelerate shard the Trainer's model on CPUs too, if that was asked for.

    Args:
        trainer: has its accelerator already.
        asked: as `version_of` said before that was made.
    """
    args, state = trainer.args, trainer.accelerator.state
    if state.device.type != "cpu":
        return
    if asked is None:
        if state.distributed_type == DistributedType.FSDP:
            # The states of all accelerators of a process are one, and another Trainer has set it.
            _share(DistributedType.MULTI_CPU)
            trainer.is_fsdp_enabled = False
        return
    plugin = FullyShardedDataParallelPlugin(**(args.fsdp_plugin_args or {}))
    if state.mixed_precision == "bf16" and plugin.mixed_precision_policy is None:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        # Sums over ranks, and the loss, stay float32.
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32
        )
    plugin.set_state_dict_type("FULL_STATE_DICT")
    _share(DistributedType.FSDP, plugin)
    trainer.is_fsdp_enabled = True
    if args.fsdp:  # the next Trainer of the process has arguments of its own
        os.environ.pop(_FLAG, None)


def _share(kind: DistributedType, plugin: Any = None) -> None:
    """What all accelerators and their states say of how processes work together."""
    AcceleratorState._shared_state["distributed_type"] = kind
    PartialState._shared_state["distributed_type"] = kind
    if plugin is not None:
        AcceleratorState._shared_state["fsdp_plugin"] = plugin
    else:
        AcceleratorState._shared_state.pop("fsdp_plugin", None)


def check_request(args: Any, asked: int | None) -> None:
    """Before there is an accelerator, which would fail or do something else.

    Args:
        args: of the Trainer.
        asked: as `version_of` says.

    Raises:
        ShardingError: on CPUs it would not be what was asked.
    """
    if asked is None or args.device.type != "cpu":
        return
    config = args.fsdp_config or {}
    meshes = [f"{name}={size}" for name, size in _sizes(args) if size not in ("", "1")]
    refused = {
        "version 1 of FSDP": (
            asked == 1,
            "on CPUs that would end as DistributedDataParallel; use fsdp_config={'version': 2}",
        ),
        "cpu_offload": (
            config.get("cpu_offload") or os.environ.get("FSDP_OFFLOAD_PARAMS") == "true",
            "on CPUs there is nowhere to offload to; leave it out",
        ),
        "state_dict_type='SHARDED_STATE_DICT'": (
            "SHARDED" in str(config.get("state_dict_type", "")),
            "weights are saved whole and the optimizer in pieces anyway; leave it out",
        ),
        f"a mesh of its own ({', '.join(meshes)}; HSDP is such a one)": (
            meshes,
            "weights are cut over all processes; leave parallelism_config out",
        ),
        "a CPU beside a GPU": (
            torch.accelerator.is_available(),
            "fully_shard would take the GPU; hide it (CUDA_VISIBLE_DEVICES=) or train on it",
        ),
    }
    for what, (is_so, why) in refused.items():
        if is_so:
            raise ShardingError(f"FSDP with {what} is not supported on CPUs: {why}.")


def _sizes(args: Any) -> Iterator[tuple[str, str]]:
    """Over what else than data in pieces the arguments or the launcher spread the model."""
    config = getattr(args, "parallelism_config", None)
    by_launcher = os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true"
    for name in ("dp_replicate_size", "tp_size", "cp_size", "sp_size"):
        if config is not None:
            yield name, str(getattr(config, name, 1))
        elif by_launcher:
            yield name, os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}", "1")


def check_model(model: nn.Module, args: Any) -> None:
    """What cannot be trained right in pieces.

    Raises:
        ShardingError: the first such thing, before anything is trained.
    """
    if type(model).__module__.startswith("peft."):
        raise ShardingError(
            f"FSDP2 with a {type(model).__name__} of PEFT is not supported: its checkpoints would "
            "hold other weights than adapters. Train it with DDP (leave out fsdp)."
        )
    if getattr(args, "predict_with_generate", False):
        raise ShardingError(
            "predict_with_generate=True is not supported with FSDP2: ranks whose texts end early "
            "would leave the others waiting for their pieces. Generate from the saved model."
        )
    for name, module in model.named_modules():
        if getattr(module, "track_running_stats", False):
            raise ShardingError(
                f"FSDP2 with running statistics ({name}, a {type(module).__name__}) is not "
                "supported: each rank would have its own. Train with DDP (leave out fsdp)."
            )


def choose_units(model: Any, plugin: FullyShardedDataParallelPlugin) -> None:
    """Say which modules are gathered as one: the layers that the model names, as accelerate would.

    It cuts the embeddings of inputs and outputs by themselves, and fails where one of the modules
    that the model names holds them (as ViT's does), or is not in this model.
    """
    if plugin.transformer_cls_names_to_wrap is not None:
        return
    ends = [
        getattr(model, ask)()
        for ask in ("get_input_embeddings", "get_output_embeddings")
        if hasattr(model, ask)
    ]
    around = {
        type(module).__name__
        for module in model.modules()
        if any(inner is end for end in ends for inner in module.modules() if inner is not module)
    }
    there = {type(module).__name__ for module in model.modules()} - around
    named = getattr(model, "_no_split_modules", None) or ()
    plugin.transformer_cls_names_to_wrap = sorted(there.intersection(named))


def share_start(model: nn.Module, device: torch.device) -> None:
    """Give every rank the first one's parameters and buffers, as DistributedDataParallel does.

    Each rank is to keep a piece of one model, and may have drawn its weights with a seed of its
    own.
    """
    with torch.no_grad():
        for t in (*model.parameters(), *model.buffers()):
            if t.device.type != "meta" and not is_cut(t):
                first = t.detach().to(device, copy=True).contiguous()
                torch.distributed.broadcast(first, src=0)
                t.copy_(first)


def check_state(accelerator: Any) -> None:
    """ShardingError if accelerate has been told by another Trainer not to shard."""
    if accelerator.distributed_type != DistributedType.FSDP:
        raise ShardingError(
            "FSDP2 was asked for, and another Trainer of this process has made accelerate work "
            "without: make its TrainingArguments when this one has trained."
        )


def check_sharded(model: nn.Module) -> None:
    """ShardingError unless every trained parameter is cut, whoever was to do it."""
    whole = [n for n, p in model.named_parameters() if p.requires_grad and not is_cut(p)]
    if whole:
        raise ShardingError(
            f"FSDP2 was asked for, and {len(whole)} parameters, such as {whole[0]}, are whole on "
            "every rank, as in DDP. Leave out fsdp to train so."
        )


# What ranks know of each other


def restarts_meet_the_dead() -> str | None:
    """What to change where a restart by torchrun may fail at once, for a user to read; or None.

    Processes find each other by addresses in a store. The one that torchrun lends them outlives a
    restart and has no name for it in its keys: who comes first reads where others were before.
    With the switch named here the first process makes a store for each start.
    """
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if restarts == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return (
        f"torchrun was told --max-restarts {restarts} and keeps the addresses of processes that "
        "died, at which those of a restart may look for each other and fail (connection refused). "
        "Start it with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 and --standalone, or, on several "
        "machines, --rdzv-backend c10d."
    )


def first_not_finite(parameters: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first parameter that is not finite, the same on all ranks; or None."""
    named = list(parameters)
    mine = len(named)
    for number, (_, p) in enumerate(named):
        local: Any = p.detach()
        local = local.to_local() if is_cut(p) else local
        if not bool(local.isfinite().all()):
            mine = number
            break
    first = torch.tensor([mine], dtype=torch.int64, device="cpu")
    cut = next((p for _, p in named if is_cut(p)), None)
    if cut is not None:
        first = first.to(cut.device)
        torch.distributed.all_reduce(first, torch.distributed.ReduceOp.MIN)
    return named[int(first)][0] if int(first) < len(named) else None


# Checkpoints


def save_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Write this rank's part of the optimizer's state; all ranks do so together."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    names = _names(model)
    tensors: dict[str, Any] = {}
    others: dict[str, dict[str, Any]] = {}
    for p, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{names[id(p)]}.{key}"] = value
            else:
                others.setdefault(names[id(p)], {})[key] = value
    groups = [
        {**group, "params": [names[id(p)] for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    if torch.distributed.get_rank() == 0:
        torch.save({"groups": groups, "state": others}, folder / GROUPS)
        (folder / PIECES).mkdir()
    torch.distributed.barrier()
    writer = HuggingFaceStorageWriter(str(folder / PIECES), save_distributed=True)
    save(tensors, storage_writer=writer)


def has_pieces(folder: Path) -> bool:
    """Whether the optimizer's state in a checkpoint is as `save_optimizer` writes it."""
    return (folder / PIECES).is_dir()


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Read the optimizer's state from a checkpoint of any number of ranks, each rank its part.

    Args:
        model: sharded or whole.
        optimizer: of its parameters, in the groups that it was saved with.
        folder: the checkpoint, with the state in pieces or, of one process or DDP, in one file.

    Raises:
        CheckpointError: the state is of other parameters.
    """
    if not has_pieces(folder):
        whole = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        optimizer.load_state_dict(_cut_as_parameters(optimizer, whole))
        return
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    saved = torch.load(folder / GROUPS, map_location="cpu", weights_only=True)
    parameters = {_plain(name): p.detach() for name, p in model.named_parameters()}
    numbers = {name: n for n, name in enumerate(x for g in saved["groups"] for x in g["params"])}
    strange = sorted(numbers.keys() - parameters.keys())
    if strange:
        raise CheckpointError(
            f"the optimizer of {folder} is one of other parameters: the model has no {strange[0]}."
        )
    reader = HuggingFaceStorageReader(str(folder / PIECES))
    state: dict[int, dict[str, Any]] = {
        numbers[name]: dict(values) for name, values in saved["state"].items()
    }
    wanted: dict[str, Tensor] = {}
    found: dict[str, Any] = dict(reader.read_metadata().state_dict_metadata)
    for full, there in found.items():
        name, _, key = full.rpartition(".")
        p, kind = parameters[name], {"dtype": there.properties.dtype}
        if there.size == p.shape:
            wanted[full] = torch.zeros_like(p, **kind)
        else:
            wanted[full] = torch.zeros(there.size, **kind, device=p.device)
        state.setdefault(numbers[name], {})[key] = wanted[full]
    with warnings.catch_warnings():
        # That one process reads alone.
        warnings.filterwarnings("ignore", message=r"torch\.distributed is disabled")
        load(wanted, storage_reader=reader, no_dist=not torch.distributed.is_initialized())
    groups = [
        {**group, "params": [numbers[name] for name in group["params"]]}
        for group in saved["groups"]
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _cut_as_parameters(
    optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]
) -> dict[str, Any]:
    """A state dict of whole tensors with each cut as its parameter is."""
    ours = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
    state = dict(state_dict["state"])
    for number, p in zip(numbers, ours, strict=False):  # load_state_dict says what does not fit
        if is_cut(p) and number in state:
            state[number] = {
                key: _cut_like(p, value)
                if isinstance(value, Tensor) and value.shape == p.shape
                else value
                for key, value in state[number].items()
            }
    return {**state_dict, "state": state}


def load_weights(model: nn.Module, folder: Path) -> Any:
    """Read the weights in ``folder`` into a sharded model, each rank its part.

    Returns:
        what `load_state_dict` would: the names that are missing, and those that were not expected.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(folder))
    there: dict[str, Any] = dict(reader.read_metadata().state_dict_metadata)
    own = {_plain(name): value for name, value in model.state_dict().items()}
    wanted = {name: value for name, value in own.items() if name in there}
    for name, value in wanted.items():
        if there[name].size != value.shape:
            raise CheckpointError(
                f"{name} in {folder} is of shape {tuple(there[name].size)}, and the model's is of "
                f"{tuple(value.shape)}."
            )
    load(wanted, storage_reader=reader)
    missing = sorted(own.keys() - there.keys())
    unexpected = sorted(there.keys() - own.keys())
    return nn.modules.module._IncompatibleKeys(missing, unexpected)


def copy_whole(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy whole tensors, the same on each rank, into a sharded model's parameters and buffers."""
    with torch.no_grad():
        for name, own in model.state_dict().items():
            value = state[_plain(name)]
            own.copy_(_cut_like(own, value) if is_cut(own) else value)


def _cut_like(p: Any, value: Tensor) -> Tensor:
    """This rank's part of a whole tensor that every rank has."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(p.device), p.device_mesh, p.placements, src_data_rank=None)


def _names(model: nn.Module) -> dict[int, str]:
    return {id(p): _plain(name) for name, p in model.named_parameters()}


def _plain(name: str) -> str:
    """The name of a parameter without what wrappers put into it."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def whole_model(model: Any) -> Any:
    """A model of transformers put together from its pieces: on the first rank, None on the others.

    Called on all ranks. It is of the class that the model had before anything was put into it.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if torch.distributed.get_rank() != 0:
        return None
    sharded = type(model).__mro__[2]  # of which `fully_shard` has made a subclass, as `patch` has
    base: Any = getattr(sharded, "_bigkernel_base", sharded)
    whole = base(copy.deepcopy(model.config))
    whole.load_state_dict(state)
    if model.can_generate():
        whole.generation_config = model.generation_config
    return whole.to(device=model.device, dtype=model.dtype)
