"""Forwards of layers with some of their expressions run as one op.

Five things stand in the middle of a layer's forward, where no module can be replaced::

    h = residual + h; y = self.norm(h)      add_norm          a residual and the norm after it
    self.act(gate) * up                     gated             a gated linear unit
    h = self.fc(h); h = self.act(h)         biased            a product's bias and an activation
    apply_rotary_pos_emb(q, k, cos, sin)    rotary            queries and keys rotated
    q = self.q(x); k = self.k(x)            project           linear layers of one input

The forward is read, these expressions are replaced in its syntax tree, and the rest is compiled as
it stands. Each of the functions that stand in their places checks what it is given, and does what
stood there where the op does not serve.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from bigkernel.integrations import activations, linears, native, norms, projections, rotary
from bigkernel.integrations.report import Change
from bigkernel.integrations.source import (
    UnknownSource,
    at_place,
    compile_again,
    names_in,
    own_attribute,
    read,
)
from bigkernel.integrations.subclass import (
    give_subclass,
    original_class,
    why_no_subclass,
)

_ADD_NORM, _NORMED, _GLU = "_bigkernel_add_norm", "_bigkernel_normed", "_bigkernel_glu"
_BIAS_ACT, _GLU_OF_LINEARS = "_bigkernel_bias_act", "_bigkernel_glu_of_linears"
_PROJECT, _PROJECTED = "_bigkernel_project", "_bigkernel_projected"


def apply(model: nn.Module, names: frozenset[str]) -> Change:
    """Rewrite the forwards of layers of ``model`` in which there is something to run as an op."""
    change = Change()
    for module in model.modules():
        if not _may_be_a_layer(module):
            continue
        found = _Found(module, names)
        if found.reason is not None:
            for op in found.wanted:
                change.leave(module, op, found.reason)
            continue
        lines = list(found.lines())
        kept = [(op, note) for op, note in lines if _why_not(op, module) is None]
        for op, _ in set(lines) - set(kept):
            change.leave(module, op, str(_why_not(op, module)))
        if not kept:
            continue
        change.undo += give_subclass(module, subclass, *found.arguments({op for op, _ in kept}))
        for op, note in kept:
            change.replace(module, op, note)
    return change


# What is no op of ours runs torch's, on every device.
_OPS = {"residual": "layer_norm", "glu": "glu", "bias_act": "bias_act", "rope": "rope"}


def _why_not(op: str, module: nn.Module) -> str | None:
    return native.why_not(_OPS[op], module) if op in _OPS else None


def _may_be_a_layer(module: nn.Module) -> bool:
    return next(module.children(), None) is not None and not isinstance(
        module, (nn.ModuleList, nn.ModuleDict, nn.Sequential, PreTrainedModel)
    )


class _Found:
    """What can be replaced in the forward of one module.

    Attributes:
        added: names of its norms, each called on a sum just made.
        gate: (name of its activation, the activation), of a product with it.
        biased: the same of one called on what a linear layer gives.
        rotates: whether it calls a function whose rotation is known.
        joined: names of linear layers that it calls on one input, each such group.
        wanted, reason: what could not be replaced, and why.
    """

    def __init__(self, module: nn.Module, names: frozenset[str]) -> None:
        self.module = module
        self.added: tuple[str, ...] = ()
        self.gate: tuple[str, str] | None = None
        self.biased: tuple[str, str] | None = None
        self.linears = [name for name, m in module.named_children() if linears.is_linear(m)]
        self.joins = tuple(n for n, m in module.named_children() if projections.may_join(m))
        self.joined: list[tuple[str, ...]] = []
        self.rotates = False
        self.wanted: list[str] = []
        self.reason: str | None = None
        children = dict(module.named_children())
        prepared = [name for name, child in children.items() if norms.can_add(child)]
        acts = {name: activations.name_of(child) for name, child in children.items()}
        acts = {name: act for name, act in acts.items() if act is not None}
        cls = original_class(module)
        code_names = names_in(cls)
        if "residual" in names and prepared:
            self.wanted.append("residual")
        if "glu" in names and acts:
            self.wanted.append("glu")
        if "bias_act" in names and self.linears and activations.SERVED.intersection(acts.values()):
            self.wanted.append("bias_act")
        if "rope" in names and any("rotary_pos_emb" in name for name in code_names):
            self.wanted.append("rope")
        if projections.OP not in names:
            self.joins = ()
        if not self.wanted and len(self.joins) < 2:
            return
        try:
            definition, function = read(cls.forward)
        except UnknownSource as error:
            self.reason = str(error)
            return
        self.reason = why_no_subclass(module)
        if self.reason is not None:
            return
        if "residual" in self.wanted:
            self.added = tuple(_Rewrite(prepared, None).run(definition).added)
        if "glu" in self.wanted:
            for name, act in acts.items():
                if _Rewrite([], name).run(definition).gated:
                    self.gate = name, act  # type: ignore[assignment]
        if "bias_act" in self.wanted and self.gate is None:
            for name, act in acts.items():
                rewrite = _Rewrite([], name, self.linears)
                if act in activations.SERVED and rewrite.run(definition).biased:
                    self.biased = name, act
        if "rope" in self.wanted:
            rotation = function.__globals__.get(rotary.FUNCTION)
            if rotary.FUNCTION in code_names and rotation is not None:
                self.rotates = rotary.form_of(rotation) is not None
            if not self.rotates:
                self.wanted, self.reason = ["rope"], "its rotation is none that is known"
        self.joined = (
            _Rewrite([], self.gate and self.gate[0], (), self.joins).run(definition).joined
        )

    def lines(self) -> Iterable[tuple[str, str]]:
        for name in self.added:
            yield "residual", f"and {name}"
        if self.gate is not None:
            yield "glu", self.gate[1]
        if self.biased is not None:
            yield "bias_act", self.biased[1]
        if self.rotates:
            yield "rope", ""
        for group in self.joined:
            yield projections.OP, f"{', '.join(group[:-1])} and {group[-1]}"

    def arguments(self, ops: set[str]) -> tuple[Any, ...]:
        def known(found: tuple[str, str] | None) -> tuple[str, Any, str] | None:
            return found and (found[0], original_class(getattr(self.module, found[0])), found[1])

        return (
            self.added if "residual" in ops else (),
            known(self.gate) if "glu" in ops else None,
            known(self.biased) if "bias_act" in ops else None,
            tuple(self.linears),
            self.rotates and "rope" in ops,
            self.joins if projections.OP in ops else (),
        )


def subclass(
    base: type[nn.Module],
    added: tuple[str, ...],
    gate: tuple[str, Any, str] | None,
    biased: tuple[str, Any, str] | None,
    linears: tuple[str, ...],
    rotates: bool,
    joins: tuple[str, ...],
) -> dict[str, Any]:
    """What a subclass has whose forward is compiled again with the ops that are named."""
    definition, function = read(base.forward)
    names: dict[str, Any] = {}
    if added:
        names[_ADD_NORM] = norms.add_norm
    if gate is not None:
        names[_GLU] = activations.gated(gate[1], gate[2])
        names[_GLU_OF_LINEARS] = activations.gated_linears(gate[1], gate[2])
    if biased is not None:
        names[_BIAS_ACT] = activations.biased(biased[1], biased[2])
    if rotates:
        names[rotary.FUNCTION] = rotary.in_place_of(function.__globals__[rotary.FUNCTION])
    if joins:
        names[_PROJECT] = projections.project
    act = gate or biased
    rewrite = _Rewrite(added, act and act[0], linears if biased else (), joins)
    rewritten = rewrite.run(definition).definition
    return {"forward": compile_again(rewritten, function, names)}


class _Rewrite(ast.NodeTransformer):
    """A definition with sums that go into norms, and products with an activation, as calls.

    linears: the activation is looked for on what these layers give, and not in products.
    joins: linear layers that are put together where they are called on one input.

    Attributes:
        added: the norms that were found, in their order.
        gated: how many products.
        biased: how many activations of what a linear layer gives.
        joined: the groups of linear layers.
    """

    def __init__(
        self,
        norms: Iterable[str],
        act: str | None,
        linears: Iterable[str] = (),
        joins: Iterable[str] = (),
    ) -> None:
        self.norms, self.act, self.linears = frozenset(norms), act, frozenset(linears)
        self.joins = frozenset(joins)
        self.added: list[str] = []
        self.joined: list[tuple[str, ...]] = []
        self.gated = self.biased = 0
        self.definition: ast.FunctionDef

    def run(self, definition: ast.FunctionDef) -> _Rewrite:
        self.definition = copy.deepcopy(definition)
        self._loads = _loads(self.definition)
        self._statements(self.definition)
        self.visit(self.definition)
        if self.joins:
            self._joins(self.definition)
        return self

    # Statements: h = a + b, perhaps r = h, and one that contains self.norm(h).

    def _statements(self, parent: ast.AST) -> None:
        for field in ("body", "orelse", "finalbody"):
            body = getattr(parent, field, None)
            if isinstance(body, list):
                for at, statement in enumerate(body):
                    self._sum_before_norm(body, at)
                    self._product_of_names(body, at)
                    self._linear_by_name(body, at)
                    self._statements(statement)

    def _sum_before_norm(self, body: list[ast.stmt], at: int) -> None:
        first = body[at]
        if not (
            isinstance(first, ast.Assign)
            and len(first.targets) == 1
            and isinstance(target := first.targets[0], ast.Name)
            and isinstance(first.value, ast.BinOp)
            and isinstance(first.value.op, ast.Add)
        ):
            return
        after = at + 1
        while after < len(body) and _is_copy_of(body[after], target.id):
            after += 1
        if after == len(body) or not isinstance(body[after], (ast.Assign, ast.Return)):
            return
        user = body[after]
        if any(
            isinstance(n, (ast.IfExp, ast.BoolOp, ast.Lambda, ast.comprehension, ast.NamedExpr))
            for n in ast.walk(user)
        ):
            return  # perhaps it is not called, or on something else
        for node in ast.walk(user):
            norm = self._norm_called_on(node, ast.Name)
            if norm is None or node.args[0].id != target.id:  # type: ignore[attr-defined]
                continue
            self.added.append(norm)
            total, normed = target.id, f"{_NORMED}_{len(self.added)}"
            text = f"{total}, {normed} = {_ADD_NORM}(self.{norm}, 0, 0)"
            body[at] = at_place(ast.parse(text).body[0], first)
            body[at].value.args[1:] = [first.value.left, first.value.right]  # type: ignore[attr-defined]
            body[after] = _Put(node, ast.Name(normed, ast.Load())).visit(user)
            return

    def _norm_called_on(self, node: ast.AST, kind: type[ast.expr]) -> str | None:
        """The norm of a call ``self.norm(x)`` with an x of this kind, or None."""
        if (
            isinstance(node, ast.Call)
            and len(node.args) == 1
            and not node.keywords
            and isinstance(node.args[0], kind)
        ):
            name = own_attribute(node.func)
            return name if name in self.norms else None
        return None

    def _product_of_names(self, body: list[ast.stmt], at: int) -> None:
        """``a = self.act(x); b = ..; y = a * b``, as T5 writes it, with the activation moved."""
        if self.act is None or at + 2 >= len(body):
            return
        first, second, third = body[at : at + 3]
        if (
            isinstance(first, ast.Assign)
            and isinstance(first.targets[0], ast.Name)
            and self._is_activation(first.value)
            and isinstance(second, ast.Assign)
            and isinstance(second.targets[0], ast.Name)
            and second.targets[0].id != first.targets[0].id
            and isinstance(third, ast.Assign)
            and isinstance(third.value, ast.BinOp)
            and isinstance(third.value.op, ast.Mult)
            and isinstance(third.value.left, ast.Name)
            and third.value.left.id == first.targets[0].id
            and self._loads[first.targets[0].id] == 1
        ):
            called = first.value
            third.value.left = ast.Call(called.func, [third.value.left], [])  # type: ignore[attr-defined]
            first.value = called.args[0]  # type: ignore[attr-defined]

    def _linear_by_name(self, body: list[ast.stmt], at: int) -> None:
        """``h = self.fc(x); h = self.act(h)``, or ``return self.act(h)``, as one statement."""
        if at + 1 >= len(body):
            return
        first, second = body[at : at + 2]
        if (
            isinstance(first, ast.Assign)
            and len(first.targets) == 1
            and isinstance(target := first.targets[0], ast.Name)
            and self._is_linear(first.value)
            and isinstance(second, (ast.Assign, ast.Return))
            and second.value is not None
            and self._is_activation(second.value)
            and isinstance(given := second.value.args[0], ast.Name)  # type: ignore[attr-defined]
            and given.id == target.id
            and (
                isinstance(second, ast.Return)  # after which nobody asks for h
                or (len(second.targets) == 1 and ast.unparse(second.targets[0]) == target.id)
            )
        ):
            second.value.args[0] = first.value  # type: ignore[attr-defined]
            body[at] = ast.copy_location(ast.Pass(), first)

    def _joins(self, parent: ast.AST) -> None:
        """``q = f(self.q(x)); k = g(self.k(x))`` with both products before the first of the two."""
        for field in ("body", "orelse", "finalbody"):
            body = getattr(parent, field, None)
            if not isinstance(body, list):
                continue
            at = 0
            while at < len(body):
                self._joins(body[at])
                at += self._join_from(body, at)

    def _join_from(self, body: list[ast.stmt], at: int) -> int:
        """How many statements stand in the place of the one at ``at`` or belong to its group."""
        calls = _certain_calls(body[at], self.joins)
        if not calls:
            return 1
        given = calls[0].args[0].id  # type: ignore[attr-defined]
        found, end = [], at
        for statement in body[at:]:
            found += [
                call
                for call in _certain_calls(statement, self.joins)
                if call.args[0].id == given  # type: ignore[attr-defined]
            ]
            end += 1
            if not _keeps(statement, given):
                break
        layers = [str(_own_call(call)) for call in found]
        if len(layers) < 2 or len(set(layers)) < len(layers):
            return 1
        self.joined.append(tuple(layers))
        first = body[at]
        names = [f"{_PROJECTED}_{len(self.joined)}_{layer}" for layer in layers]
        owners = ", ".join(f"self.{layer}" for layer in layers)
        for i in range(at, end):
            for call, name in zip(found, names, strict=True):
                body[i] = _Put(call, ast.Name(name, ast.Load())).visit(body[i])
        text = f"{', '.join(names)} = {_PROJECT}({given}, {owners})"
        body.insert(at, at_place(ast.parse(text).body[0], first))
        return end - at + 1

    def _is_activation(self, node: ast.AST) -> bool:
        return self.act is not None and _own_call(node) == self.act

    def _is_linear(self, node: ast.AST) -> bool:
        return _own_call(node) in self.linears

    # Expressions

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        """Replaces ``self.act(gate) * up``."""
        self.generic_visit(node)
        if self.linears or not (isinstance(node.op, ast.Mult) and self._is_activation(node.left)):
            return node
        self.gated += 1
        act: Any = node.left
        gate, up = act.args[0], node.right
        if self._are_joined(gate, up):
            self.joined.append((str(_own_call(gate)), str(_own_call(up))))
            arguments = [act.func, gate.func, up.func, gate.args[0]]  # type: ignore[attr-defined]
            call = ast.Call(ast.Name(_GLU_OF_LINEARS, ast.Load()), arguments, [])
        else:
            call = ast.Call(ast.Name(_GLU, ast.Load()), [act.func, gate, up], [])
        return ast.copy_location(call, node)

    def _are_joined(self, *calls: Any) -> bool:
        """Whether these call linear layers that may be put together on one input."""
        names = {_own_call(call) for call in calls}
        return (
            names <= self.joins
            and len(names) == len(calls)
            and all(isinstance(call.args[0], ast.Name) for call in calls)
            and len({call.args[0].id for call in calls}) == 1
        )

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Replaces ``self.norm(a + b)`` and ``self.act(self.fc(x))``."""
        self.generic_visit(node)
        if self._is_activation(node) and self._is_linear(node.args[0]):
            self.biased += 1
            linear: Any = node.args[0]
            arguments = [node.func, linear.func, linear.args[0]]
            return ast.copy_location(ast.Call(ast.Name(_BIAS_ACT, ast.Load()), arguments, []), node)
        norm = self._norm_called_on(node, ast.BinOp)
        if norm is None or not isinstance(node.args[0].op, ast.Add):  # type: ignore[attr-defined]
            return node
        self.added.append(norm)
        total: Any = node.args[0]
        call = ast.Call(ast.Name(_ADD_NORM, ast.Load()), [node.func, total.left, total.right], [])
        return ast.copy_location(ast.Subscript(call, ast.Constant(1), ast.Load()), node)


class _Put(ast.NodeTransformer):
    """One node of a tree in another's place."""

    def __init__(self, old: ast.AST, new: ast.expr) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> Any:
        if node is self.old:
            return ast.copy_location(self.new, node)
        return super().visit(node)


def _own_call(node: ast.AST) -> str | None:
    """``name`` of ``self.name(x)``."""
    if isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords:
        return own_attribute(node.func)
    return None


def _is_copy_of(statement: ast.stmt, name: str) -> bool:
    return (
        isinstance(statement, ast.Assign)
        and len(statement.targets) == 1
        and isinstance(statement.targets[0], ast.Name)
        and isinstance(statement.value, ast.Name)
        and statement.value.id == name
        and statement.targets[0].id != name
    )


# Parts of an expression that are perhaps not evaluated, or more than once.
_UNCERTAIN = (
    *(ast.IfExp, ast.BoolOp, ast.Compare, ast.Lambda),
    *(ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp),
)


def _certain_calls(statement: ast.stmt, layers: frozenset[str]) -> list[ast.Call]:
    """The calls ``self.layer(name)`` that a simple statement makes whatever happens."""
    if not isinstance(statement, (ast.Assign, ast.Expr, ast.Return)) or any(
        isinstance(node, ast.NamedExpr) or _is_in_place(node)
        for node in ast.walk(statement)  # perhaps one call is given what another one was not
    ):
        return []
    found: list[ast.Call] = []
    open_nodes: list[ast.AST] = [statement]
    while open_nodes:
        node = open_nodes.pop()
        if isinstance(node, _UNCERTAIN):
            continue
        if _own_call(node) in layers and isinstance(node.args[0], ast.Name):  # type: ignore[attr-defined]
            found.append(node)  # type: ignore[arg-type]
        open_nodes += reversed(list(ast.iter_child_nodes(node)))
    return found


def _is_in_place(node: ast.AST) -> bool:
    """Whether the name is one of torch's methods that change a tensor."""
    return isinstance(node, ast.Attribute) and node.attr.endswith("_")


def _keeps(statement: ast.stmt, name: str) -> bool:
    """Whether the variable is the same after a simple statement, as far as can be read."""
    if not isinstance(statement, (ast.Assign, ast.Expr)):
        return False
    for node in ast.walk(statement):
        if isinstance(node, ast.Name) and node.id == name and not isinstance(node.ctx, ast.Load):
            return False
        if _is_in_place(node):
            return False
        if isinstance(node, (ast.Subscript, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            return False  # perhaps of it, or another layer
    return True


def _loads(tree: ast.AST) -> dict[str, int]:
    found: dict[str, int] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            found[node.id] = found.get(node.id, 0) + 1
    return found
