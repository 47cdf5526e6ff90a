"""The base of every transform: what a subclass says, and how a call runs it."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from bigkernel._eager import eager
from bigkernel.expect import Expect
from bigkernel.transforms.engine.draws import Draws, Key
from bigkernel.transforms.engine.images import Images, gather
from bigkernel.transforms.engine.passes import Part
from bigkernel.transforms.engine.samples import Bools, Floats, Ints, some
from bigkernel.transforms.engine.stages import Given, call_keyed, draws_since
from bigkernel.transforms.engine.step import Step
from bigkernel.transforms.engine.walk import Run, Walk
from bigkernel.transforms.one import One, is_usual

_EXPECT = Expect("transforms")


@dataclass
class Params:
    """The parameters of one transform for a batch; every field has one entry a sample.

    ``active`` [N]: whether the transform does anything to the sample.
    """

    active: Bools


class ImageInfo:
    """The N images that a transform has come to, as far as ``draw`` may know them.

    Attributes:
        active: [N] booleans: those that the transform is for; a RandomApply leaves others out.
        pil: whether they are PIL images, and not tensors.
    """

    # Copies, so that one that computes in place changes nothing for those after it in the chain.
    def __init__(self, active: Bools, walk: Walk) -> None:
        self.active = active.copy()
        self.pil = walk.pil
        self._walk = walk

    def __len__(self) -> int:
        return len(self.active)

    @property
    def height(self) -> Ints:
        """[N] in pixels."""
        return self._walk.sizes[0].copy()

    @property
    def width(self) -> Ints:
        """[N] in pixels."""
        return self._walk.sizes[1].copy()


Drawn = tuple[Params, Sequence[Step]]


class Transform(nn.Module):
    """A transform of image batches with random parameters of their own for every image.

    Call it as ``t(images, generator=None, ids=None, layout=None)``.

    images:
        a batch [N, C, H, W] or [N, H, W, C] or one image [C, H, W] or [H, W, C], floats (0..1) or
        whole numbers (0 to the dtype's largest, 255 for uint8; bool 0..1); a PIL image; an array
        [H, W, C] or [H, W], or of a batch; or a list of images, which may differ in size. Of a
        tensor with more dimensions, [N, T, C, H, W] say, the first counts samples: the images of a
        sample share its parameters, as frames of a clip have to.
        PIL images of modes P and 1 are sampled by "nearest", as Pillow does.
    layout:
        "channels_first", "channels_last", or "auto": the channels are in the last dimension if
        only that one of the three counts 1, 3 or 4, and in the first otherwise, as for torchvision
        (in an array of one picture, in the last). None takes the attribute ``layout`` of the
        transform, which is "auto" until it is set.
    generator:
        where random numbers come from, torch's default generator (``torch.manual_seed``) if None.
    ids:
        without them, each call draws its numbers from the generator, which advances, as those of
        torch and torchvision do: objects and calls are independent of each other, and the same
        seed again repeats what followed it. In a chain the outermost transform draws for all. A
        transform without random parameters leaves the generator alone.
        With them, one whole number an image, the generator only gives the seed it was made with
        and is not advanced. The parameters of an image are a function of (seed, id, place of the
        transform in the chain), whatever the object, the call, the batch, its order or the device:
        the same id gets the same parameters until the seed changes.

    Returns what it was given: a batch for a batch, in the same layout, an image for an image, a
    PIL image for a PIL image, a list of them for a list of them. A list of tensors comes back as
    one batch if all results have one size, else as a list. ``ToImage`` in the chain makes it
    tensors with the channels first. The dtype stays, unless ``ToDtype`` or ``Normalize`` (whole
    numbers to float32) change it. Floats keep their gradient, which PyTorch computes, as it does
    all of such a call (see ``bigkernel.explain``).

    torch.fx.symbolic_trace keeps a transform as one call. TorchScript, tracing and export do not
    know them: they refuse with a sentence.

    ``t.sample(sizes, generator, ids)`` returns the parameters alone, and ``t.explain()`` the stages
    of a call.

    A chain does not call the transforms in it, so their hooks do not fire there.

    A subclass defines one of two methods: ``draw(u, images)``, which returns steps that a chain
    folds, or ``transform(images, u)``, which is given tensors and returns tensors. Its attribute
    ``blocks`` says how many times four random numbers it takes for each image.
    """

    blocks: int = 0  # of four random numbers, for each image

    # Said by ToImage: from here on, images are tensors and not PIL images.
    _makes_tensor: ClassVar[bool] = False
    _is_chain: ClassVar[bool] = False
    _is_stage: ClassVar[bool] = False
    # Writes what is done to one image into a `One`, in the place of `draw` and its steps, and
    # returns whether it could; None where no class has said how.
    _one: ClassVar[Callable[[Any, One], bool] | None] = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "_one" not in vars(cls):
            cls._one = None  # of a class that may do something else
        # A chain asks its transforms what to do, and calls none of them.
        for method, own in (("forward", Transform.forward), ("__call__", nn.Module.__call__)):
            if getattr(cls, method) is not own:
                raise Expect("transforms.Transform").error(
                    f"a subclass ({cls.__name__})",
                    "one that says what it does in draw or transform, which a chain asks for",
                    f"one with a {method} of its own, which a chain would not call",
                    "Define transform(self, images, u), or put a function beside it into the chain",
                    TypeError,
                )
        drawn = cls.draw is not Transform.draw
        cls._is_stage = (cls.transform, cls._call) != (Transform.transform, Transform._call)
        if drawn and cls._is_stage:
            wanted = (
                "one that defines draw(u, images), which gives steps, or transform(images, u), "
                "which gives tensors"
            )
            which, got = f"a subclass ({cls.__name__})", "one that has both"
            raise Expect("transforms.Transform").error(which, wanted, got, cls=TypeError)
        if hasattr(cls, "make_params"):
            raise Expect("transforms.Transform").error(
                f"a subclass ({cls.__name__})",
                "one that draws its numbers from u, which draw and transform are given",
                "one with torchvision's make_params",
                "A subclass of torchvision's Transform can stand in a chain as it is",
                TypeError,
            )

    def __init__(self) -> None:
        super().__init__()
        self.layout = "auto"

    @property
    def _expect(self) -> Expect:
        return Expect(type(self).__name__)

    def draw(self, u: Floats, images: ImageInfo) -> Drawn:
        """What is to be done to the images, as steps that the chain folds.

        Args:
            u: float64 [blocks, N, 4], numbers in [0, 1), keyed by (seed, id, place in the chain).
                There are no others: one that draws from a global generator is refused.
            images: the N images: which of them it is for, and their sizes.

        Returns:
            (parameters, steps): a :class:`Params`, or a dataclass derived from it with more fields
            [N], which ``sample`` shows; and a list of steps of ``bigkernel.transforms.steps``, each
            for ``images.active`` or fewer.
        """
        raise NotImplementedError(
            f"bigkernel.transforms: {type(self).__name__} must say what it does. Define "
            "draw(self, u, images), which returns parameters and steps, or "
            "transform(self, images, u), which returns tensors."
        )

    def transform(self, images: Tensor, u: Tensor) -> Tensor:
        """The images after a tensor stage: any function of pixels.

        Args:
            images: [M, C, H, W], those images of one size that it is for, in the dtype that they
                have at this point of the chain. They may be changed in place.
            u: float32 [blocks, M, 4] on the same device, numbers in [0, 1) keyed by (seed, id,
                place in the chain); the frames of a clip share them.

        Returns:
            [M, C', H', W'], each image a function of its own alone, as which others are in the
            batch is chance; another size must be that of :meth:`sizes`.

        One that draws from a global generator of torch, NumPy or Python besides, such as by
        ``torch.randn_like``, is called for one sample after another, with those generators seeded
        by (seed, id, place in the chain).
        """
        raise NotImplementedError  # _is_stage is not set

    def sizes(self, height: Ints, width: Ints) -> tuple[Ints, Ints] | None:
        """Heights and widths [N] after ``transform``: the same, unless a subclass says others.

        None says that only the results will show them; then ``sample`` cannot go beyond it.
        """
        return height, width

    # Drawing reads a generator and computes in NumPy: a compiled caller calls it as it is.
    @eager
    def forward(
        self,
        images: Any,
        generator: torch.Generator | None = None,
        ids: Any = None,
        layout: str | None = None,
    ) -> Any:
        """See the class."""
        if isinstance(images, torch.fx.Proxy):
            return self._symbolic(images, generator=generator, ids=ids, layout=layout)
        layout = self.layout if layout is None else layout
        key = None
        if self._one is not None and is_usual(images, layout):
            key = Key(generator, ids, 1)
            one = One(images, key)
            done = one.run() if one.write(self) else None
            if done is not None:
                return done
        batch = gather(images, layout)
        if batch.count == 0:
            return self._empty(batch)
        key = key or Key(generator, ids, batch.count // batch.frames)
        return self._run(batch, self._draws(key))[0]

    def _run(self, batch: Images, draws: Draws) -> tuple[Any, Run]:
        """What a call returns, and how it came about."""
        as_tensor = any(t._makes_tensor for t in self._chain())
        run = Run(draws, batch, batch.channels_last and not as_tensor)
        self._walk(run)
        return batch.give_back(*run.finish(), as_tensor), run

    def sample(
        self,
        sizes: Sequence[tuple[int, int]] | Tensor,
        generator: torch.Generator | None = None,
        ids: Any = None,
    ) -> Any:
        """The parameters that a call with images of these sizes would draw.

        sizes: (height, width) of each image; generator and ids as in a call: without ids, the
        generator advances, and the next call draws others. Returns the transform's parameters, a
        dataclass of NumPy arrays with one entry an image; a chain returns a list with one entry a
        transform, depth first (a RandomApply before those inside it). Of a tensor stage they say
        for which images it is.
        """
        table = np.asarray(sizes)
        whole = np.issubdtype(table.dtype, np.integer) or table.size == 0
        fits = whole and (table.size == 0 or (table.shape[1:] == (2,) and table.min() > 0))
        _EXPECT(fits, "sizes", "positive pairs (height, width)", repr(sizes))
        table = table.astype(np.int64).reshape(-1, 2)
        key = Key(generator, ids, len(table))
        walk = Walk(self._draws(key), table[:, 0], table[:, 1])
        params = self._walk(walk).params
        return params if self._is_chain else params[0]

    def explain(self, images: Any = None) -> str:
        """The stages of a call, a line each: folded passes, and tensor stages between them.

        With ``images``, as a call takes them, also how many of them took how many native calls in
        each pass; they are drawn for with seed 0 and ids 0, 1 ...
        """
        passes: list[list[str]] = [[]]  # those with even numbers, tensor stages the others
        for name, transform in self._leaves():
            if transform._is_stage:
                passes += [[name], []]
            else:
                passes[-1].append(name)
        said = [""] * len(passes)
        if images is not None:
            batch = gather(images, self.layout)
            count = batch.count // batch.frames if batch.count else 0
            self._expect(count > 0, "images", "at least one image", "none")
            key = Key(torch.Generator().manual_seed(0), range(count), count)
            said = [f" ({done})" for done in self._run(batch, self._draws(key))[1].done]
        lines = [
            f"{'tensor stage' if i % 2 else 'folded'}: {', '.join(names)}{what}"
            for i, (names, what) in enumerate(zip(passes, said, strict=True))
            if names
        ]
        return "\n".join(f"{i}. {line}" for i, line in enumerate(lines, 1))

    def _leaves(self) -> Iterator[tuple[str, Transform]]:
        """The transforms that do something, with what they are called in ``explain``."""
        yield self._label(), self

    def _label(self) -> str:
        return type(self).__name__

    def _chain(self) -> Iterator[Transform]:
        """The transforms by their numbers: depth first, without Compose, which draws nothing."""
        yield self

    def _draws(self, key: Key) -> Draws:
        return Draws(key, [t._block_count() for t in self._chain()])

    def _block_count(self) -> int:
        count = self.blocks
        if type(count) is not int or count < 0:
            what = "how many blocks of four random numbers it takes an image, a whole number"
            raise self._expect.error("blocks", what, repr(count))
        return count

    def _walk(self, walk: Walk) -> Walk:
        """``walk``, when it has been through the whole chain."""
        self._visit(walk, np.ones(len(walk.draws.key.ids), dtype=bool))
        return walk

    def _visit(self, walk: Walk, active: Bools) -> None:
        """Draws parameters for the ``active`` images and adds what is to be done to them."""
        u = walk.numbers()  # counted here, and nowhere else
        walk.pil = walk.pil and not self._makes_tensor
        name = type(self).__name__
        if self._is_stage:
            walk.params.append(Params(active))
            walk.stage(self._name(), self.sizes, self._call, active)
            return
        try:
            drawn = self._drawn(u, active, walk)
        except IndexError as error:
            error.add_note(_about_blocks(name, len(u)))
            raise
        if not (
            isinstance(drawn, tuple)
            and len(drawn) == 2
            and isinstance(drawn[0], Params)
            and isinstance(drawn[1], (list, tuple))
        ):
            wanted = "a pair (parameters, list of steps)"
            fix = "Such as Params(images.active), [steps.Flip(images.active, True)]"
            got = f"{drawn!r:.80}"
            raise self._expect.error("what its draw returns", wanted, got, fix, TypeError)
        params, todo = drawn
        for step in todo:
            if not isinstance(step, Step):
                wanted, got = "a step of bigkernel.transforms.steps", f"{step!r:.80}"
                raise self._expect.error("what its draw lists", wanted, got, cls=TypeError)
            if len(step.active) != len(active) or some(step.active & ~active):
                which = f"active of its {type(step).__name__}"
                wanted = f"[{len(active)}] booleans, true for images of images.active alone"
                fix = "Start from images.active, and narrow it with &"
                raise self._expect.error(which, wanted, f"{step.active!r:.80}", fix)
        walk.add(name, params, todo)

    def _drawn(self, u: Floats, active: Bools, walk: Walk) -> Any:
        """What ``draw`` returns, which nothing but ``u`` has decided."""
        images = ImageInfo(active, walk)
        if type(self).draw.__module__.startswith(__package__):
            return self.draw(u, images)
        has_drawn = draws_since(torch.device("cpu"))
        drawn = self.draw(u.copy(), images)
        # Another thread may have drawn meanwhile, so ask again before saying that draw has.
        if has_drawn() and not _alike(drawn, self.draw(u.copy(), ImageInfo(active, walk))):
            raise self._expect.error(
                "what its draw returns",
                "a function of u, so that an image gets the same in every batch and order",
                "one that drew from a global generator of torch, NumPy or Python",
                "Take the numbers from u; the attribute blocks says how many there are",
            )
        return drawn

    def _name(self) -> str:
        """What errors of a tensor stage call it."""
        return type(self).__name__

    def _call(self, given: Given) -> list[Part]:
        """A tensor stage, for images of one size."""
        u = given.numbers()

        def function(images: Tensor, places: Ints) -> Tensor:
            # A copy: it may change them in place, and have to be called again.
            numbers = u[:, places.tolist()]
            try:
                return self.transform(images, numbers)
            except IndexError as error:
                error.add_note(_about_blocks(self._name(), len(u)))
                raise

        return call_keyed(self._name(), function, given)

    def _empty(self, batch: Images) -> Any:
        """The result for no images: what one more image would have had, without it."""
        if not isinstance(batch.tensors, Tensor):
            return []
        shape = batch.tensors.shape[1:]
        extra = replace(
            batch,
            tensors=batch.tensors.new_zeros(1, *shape),
            height=np.asarray([shape[0 if batch.channels_last else 1]]),
            width=np.asarray([shape[1 if batch.channels_last else 2]]),
            lead=(1,),
            wrapper=None,
        )
        result, _ = self._run(extra, self._draws(Key(None, [0], 1)))
        return batch.give_back(result[:0], False, False)

    def _symbolic(self, images: torch.fx.Proxy, **arguments: Any) -> torch.fx.Proxy:
        """This call in the graph of torch.fx.symbolic_trace, as that of a layer of torch's."""
        tracer = images.tracer
        root: Any = tracer.root  # type: ignore[attr-defined]
        if root is self or all(module is not self for module in root.modules()):
            which, got = "the module that torch.fx traces", "the transform itself"
            fix = "It is one call: there is nothing to trace in it"
            wanted = "a module that holds the transform"
            raise _EXPECT.error(which, wanted, got, fix, NotImplementedError)
        target = tracer.path_of_module(self)  # type: ignore[attr-defined]
        given = {name: value for name, value in arguments.items() if value is not None}
        return tracer.create_proxy("call_module", target, (images,), given)

    def __prepare_scriptable__(self) -> Any:
        raise NotImplementedError(
            f"bigkernel.{type(self).__name__}: TorchScript cannot compile transforms, which draw "
            "and fold in NumPy. Script the model without them, or use torch.compile."
        )

    def extra_repr(self) -> str:
        """The arguments, as torchvision prints them."""
        shown = (bool, int, float, str, tuple, list, enum.Enum)
        own = ((k, v) for k, v in self.__dict__.items() if k not in ("training", "layout"))
        return ", ".join(
            f"{name}={value.value if isinstance(value, enum.Enum) else value}"
            for name, value in own
            if not name.startswith("_") and isinstance(value, shown)
        )


def _alike(one: Any, other: Any) -> bool:
    """Whether two results of ``draw`` say the same."""
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray):
        return one.tobytes() == other.tobytes()
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, (Step, Params)):
        return _alike([*vars(one).values()], [*vars(other).values()])
    return bool(one == other)


def _about_blocks(name: str, blocks: int) -> str:
    return (
        f"bigkernel: {name} was given u [{blocks}, N, 4]. The attribute blocks of its class says "
        "how many times four random numbers it takes for each image."
    )
