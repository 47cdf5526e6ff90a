"""The options of every command. What they do is in the modules that the commands import."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

import bigkernel
from bigkernel.cli.errors import guarded, one_process
from bigkernel.escape import printable
from bigkernel.recipes import presets, settings
from bigkernel.recipes.errors import Failure, UsageError

# Plain messages and Python's own traceback if BIGKERNEL_TRACEBACK=1 asks for one.
_PLAIN = {"rich_markup_mode": None, "pretty_exceptions_enable": False, "no_args_is_help": True}
app = typer.Typer(
    help="Train, sample and measure Transformers on bigkernel's fused ops.",
    add_completion=False,
    **_PLAIN,  # type: ignore[arg-type]
)
train_app = typer.Typer(help="Train a model and leave it in a run folder.", **_PLAIN)  # type: ignore[arg-type]
app.add_typer(train_app, name="train")


def _version(asked: bool) -> None:
    if asked:
        print(f"bigkernel {bigkernel.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", is_eager=True, callback=_version
        ),
    ] = False,
) -> None:
    pass


def _text(help: str) -> Any:
    return typer.Option(help=help, show_default=False)


# What holds where neither the recipe nor a setting has a value of its own.
_OTHERWISE = {
    "train text": {
        "data": "the topics of Python's own help",
        "vocab_size": "4096 for bpe, 8192 for wordpiece",
        "prompt": "'The '",
    },
    "train images": {
        "data": "scikit-learn's digits",
        "image_size": "the model's, else that of small square images, else 32",
    },
}
_OTHERWISE_BOTH = {
    "out": "a free one under runs/",
    "threads": "what torch takes",
    "save_steps": "a quarter of the run, 500 at most",
}
_EPILOG = (
    "Defaults are those of the preset demo; another --preset, --init-from or a --config file "
    "brings its own."
)


class _TrainCommand(TyperCommand):
    """A command whose help shows what a setting is when it is not given."""

    def get_help(self, ctx: Any) -> str:
        """As typer's, with defaults: they come from the recipes, so none is a parameter's own."""
        command = f"train {self.name}"
        kind = settings.COMMANDS[command]
        table = presets.TEXT_RECIPES if command == "train text" else presets.IMAGE_RECIPES
        values: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(kind)}
        values = {**values, **table["demo"]}
        for parameter in self.params:
            name = str(parameter.name)
            value = values.get(name)
            if value is None:
                value = {**_OTHERWISE_BOTH, **_OTHERWISE[command]}.get(name)
            if value is not None and not str(getattr(parameter, "help", "")).endswith("]"):
                parameter.help = f"{parameter.help}  [default: {value}]"  # type: ignore[attr-defined]
        return super().get_help(ctx)


Data = Annotated[str | None, _text("Text: a file, a folder, .jsonl. Images: a folder of classes.")]
ModelOption = Annotated[str | None, _text("A model preset, or a config file (JSON or YAML).")]
InitFrom = Annotated[str | None, _text("A trained model to start from: a folder or a hub name.")]
Out = Annotated[str | None, _text("The run folder.")]
Preset = Annotated[str | None, _text("A recipe: demo, small, ... (see presets.py).")]
Config = Annotated[str | None, _text("A YAML file of settings, such as a run's config.yaml.")]
Epochs = Annotated[float | None, _text("Passes over the training part.")]
MaxSteps = Annotated[int | None, _text("Optimiser steps; with --epochs too, this one counts.")]
Optim = Annotated[str | None, _text("adamw, adam, sgd or muon.")]
Lr = Annotated[float | None, _text("Highest learning rate.")]
BatchSize = Annotated[int | None, _text("Sequences or images in a batch of all processes.")]
Seed = Annotated[int | None, _text("Seed of weights, order, dropout and augmentation.")]
Device = Annotated[str | None, _text("auto, cpu, cuda or cuda:N.")]
Parallel = Annotated[str | None, _text("ddp or fsdp2, where torchrun starts several processes.")]
Dtype = Annotated[str | None, _text("auto, float32, bfloat16 or float16.")]
Threads = Annotated[int | None, _text("CPU threads.")]
SaveSteps = Annotated[int | None, _text("A checkpoint every so many steps.")]
Resume = Annotated[str | None, _text("auto, or a run or checkpoint folder to continue.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the run that --out holds.")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run Python code that a model or tokenizer folder brings."
    ),
]
Run = Annotated[Path, typer.Argument(help="A run folder.", show_default=False)]


@train_app.command("text", cls=_TrainCommand, epilog=_EPILOG)
@guarded
def train_text(
    data: Data = None,
    sample: Annotated[
        str | None, _text("A text that ships with the package instead of --data: zh.")
    ] = None,
    tokenizer: Annotated[
        str | None, _text("bytes, bpe, wordpiece, or a folder or hub name for AutoTokenizer.")
    ] = None,
    vocab_size: Annotated[int | None, _text("Most tokens that bpe or wordpiece may make.")] = None,
    model: ModelOption = None,
    init_from: InitFrom = None,
    max_length: Annotated[int | None, _text("Tokens in a sequence.")] = None,
    prompt: Annotated[str | None, _text("What the sample at the end begins with.")] = None,
    preset: Preset = None,
    config: Config = None,
    epochs: Epochs = None,
    max_steps: MaxSteps = None,
    optim: Optim = None,
    lr: Lr = None,
    batch_size: BatchSize = None,
    seed: Seed = None,
    device: Device = None,
    parallel: Parallel = None,
    dtype: Dtype = None,
    threads: Threads = None,
    save_steps: SaveSteps = None,
    out: Out = None,
    resume: Resume = None,
    force: Force = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Train a language model: a LLaMA-style decoder over bytes unless told otherwise."""
    options = dict(locals())
    _train("train text", options)


@train_app.command("images", cls=_TrainCommand, epilog=_EPILOG)
@guarded
def train_images(
    data: Data = None,
    model: ModelOption = None,
    init_from: InitFrom = None,
    augment: Annotated[str | None, _text("A recipe's name, or a YAML file with one.")] = None,
    image_size: Annotated[int | None, _text("Pixels a side into the model.")] = None,
    max_pixels: Annotated[
        int | None, _text("Images of more pixels are left out, undecoded.")
    ] = None,
    preset: Preset = None,
    config: Config = None,
    epochs: Epochs = None,
    max_steps: MaxSteps = None,
    optim: Optim = None,
    lr: Lr = None,
    batch_size: BatchSize = None,
    seed: Seed = None,
    device: Device = None,
    parallel: Parallel = None,
    dtype: Dtype = None,
    threads: Threads = None,
    save_steps: SaveSteps = None,
    out: Out = None,
    resume: Resume = None,
    force: Force = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Train an image classifier: a ViT on scikit-learn's digits unless told otherwise."""
    options = dict(locals())
    _train("train images", options)


def _train(command: str, options: dict[str, Any]) -> None:
    from bigkernel import recipes
    from bigkernel.cli.progress import TerminalProgress

    one_process(command, but_torchrun=True)
    # Of this command line alone, `trust_remote_code` too: a file must not be able to allow it.
    train = recipes.train_text if command == "train text" else recipes.train_images
    train(progress=TerminalProgress, **options)


@app.command()
@guarded
def generate(
    run: Run,
    prompt: Annotated[str, typer.Option(help="What to continue.")] = "",
    max_new_tokens: Annotated[
        int | None, _text("Tokens to add (default: 200, or what the context has room for).")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest each time.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest; 0 from all.")] = 50,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest of this mass.")] = 0.95,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    device: Device = None,
    threads: Threads = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Continue a prompt with the model of a text run."""
    from bigkernel import recipes
    from bigkernel.recipes import text

    one_process("generate")
    sampling: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
    }
    text.check_sampling(**sampling)  # before the model is loaded
    run = settings.user_path(run)
    if settings.command_of(run) != text.COMMAND:
        raise UsageError(f"{run} holds an image classifier; `generate` needs a text run.")
    opened = recipes.load(
        run, device=device or "auto", threads=threads, trust_remote_code=trust_remote_code
    )
    assert isinstance(opened, recipes.TextRun)
    print(opened.generate(prompt, **sampling))


@app.command()
@guarded
def evaluate(
    run: Run,
    data: Annotated[
        str | None, _text("Other data to measure on, all of it.  [default: the part held back]")
    ] = None,
    device: Device = None,
    threads: Threads = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure the model of a run on data that it was not trained on."""
    from bigkernel import recipes
    from bigkernel.recipes import images, run_folder, training

    one_process("evaluate")
    run = settings.user_path(run)
    opened = recipes.load(
        run, device=device or "auto", threads=threads, trust_remote_code=trust_remote_code
    )
    figures = opened.evaluate(data)
    training.show(figures, f"{run} on {data or 'the part of its data held back from training'}")
    files = [run_folder.EVALUATION]
    files += [images.CONFUSION, images.ROC] if isinstance(opened, recipes.ImageRun) else []
    print("written: " + ", ".join(printable(run / name) for name in files))


@app.command()
@guarded
def bench(
    ops: Annotated[
        list[str], typer.Argument(help="attention, adam, augment, train: one or several.")
    ],
    json: Annotated[Path | None, _text("Write all figures to this file.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few rounds: a minute an op.")] = False,
    threads: Threads = None,
    plot: Annotated[Path | None, _text("Write a bar chart to this PNG file.")] = None,
    only: Annotated[str | None, _text("The cases whose names contain this, and no others.")] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Of train: where the time of a step goes, op by op.")
    ] = False,
) -> None:
    """Time the ops beside their peers and beside what the machine can give."""
    from bigkernel.cli.bench import bench as run

    one_process("bench")
    run(ops, json, quick, threads, plot, only, profile)


@app.command("tune-kernels")
@guarded
def tune_kernels(
    ops: Annotated[
        list[str] | None, typer.Argument(help="Ops such as attention or norm; all if left out.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few rounds: a minute or two.")] = False,
    clear: Annotated[
        bool, typer.Option("--clear", help="Forget what was measured, and measure nothing.")
    ] = False,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Time our kernels beside torch's own code here; calls then take the faster one."""
    from bigkernel.cli.tune import tune

    one_process("tune-kernels")
    tune(ops or [], quick, clear, device or "auto", threads)


@app.command()
@guarded
def doctor() -> None:
    """Check this installation: the library, every op's numbers, the speed; half a minute."""
    from bigkernel.bench import doctor

    one_process("doctor")
    wrong = doctor.examine()
    if wrong is not None:
        raise Failure(wrong)


@app.command()
@guarded
def env() -> None:
    """Print versions, build, devices and the backend of each op: what a bug report pastes."""
    from bigkernel.cli.env import facts

    lines = facts()
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")
