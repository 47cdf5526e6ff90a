"""Instructions that are more than an expression: moves, memory, warps, and how blocks end."""

from __future__ import annotations

from bigkernel.testing.ptx import conversions  # noqa: F401 - adds its rules
from bigkernel.testing.ptx.alu import RULES, comparison, modifiers, unknown
from bigkernel.testing.ptx.memory import SHARED_BASE
from bigkernel.testing.ptx.syntax import Addr, Imm, Instruction, Operand, Reg, Sym, Vec
from bigkernel.testing.ptx.types import BITS, DTYPES, PACKED, size_of
from bigkernel.testing.ptx.writer import Scope, Writer

_CACHE_HINTS = {
    *("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "weak", "volatile", "relaxed", "acquire"),
    *("release", "acq_rel", "cta", "gpu", "sys", "cluster", "unified", "mmio", "noftz"),
    *("L1:evict_normal", "L1:evict_unchanged", "L1:evict_first", "L1:evict_last"),
    *("L1:no_allocate", "L2:cache_hint", "L2:64B", "L2:128B", "L2:256B", "L2:evict_last"),
    *("L2:evict_first", "L2:evict_normal"),
}
_SPACES = {"global", "shared", "shared:cta", "local", "param", "param:entry", "param:func", "const"}
_NOTHING = {"membar", "fence", "prefetch", "prefetchu", "nanosleep", "griddepcontrol", "discard"}
_NOTHING |= {"applypriority", "pmevent", "setmaxnreg"}


class BlockWriter(Writer):
    """Writes one basic block, instruction by instruction."""

    def __init__(self, scope: Scope, number: int) -> None:
        super().__init__(scope, number)
        block = self.flat.blocks[number]
        for k in block.body:
            self.instruction(k, self.flat.instructions[k])
        if block.end is not None:
            self.tail = self.ending(self.flat.instructions[block.end])

    def instruction(self, k: int, i: Instruction) -> None:
        """Append the lines of one instruction."""
        guard = self.read(i.guard, "pred") if i.guard else None
        special = getattr(self, f"op_{i.op}", None)
        if "cc" in i.mods or i.op in ("addc", "subc", "madc"):
            special = self.with_carry
        if special is not None:
            special(k, i, guard)
        elif i.op in RULES:
            try:
                rule = RULES[i.op](i)
            except (KeyError, ValueError, IndexError):
                raise unknown(i) from None
            sources = [
                self.read(operand, type_)
                for operand, type_ in zip(i.operands[1:], rule.sources, strict=True)
            ]
            if not any(self.is_register(o) for o in i.operands[1:]):
                sources[0] = self.let(f"fill(L, {sources[0]})")
            self.write(i.operands[0], rule.template.format(*sources), rule.result, guard)
        elif i.op not in _NOTHING:
            raise unknown(i)

    def with_carry(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Extended-Precision Integer Arithmetic": add.cc, addc, sub.cc, madc ..."""
        modifiers(i, "cc", "lo", "hi")
        unsigned = f"u{8 * size_of(i.type)}"
        carry = self.read(Reg("%cc"), "pred") if i.op.endswith("c") else "np.False_"
        if i.op.startswith("mad"):
            a, b = (self.array(o, i.type) for o in i.operands[1:3])
            product = f"mul_hi({a}, {b})" if "hi" in i.mods else f"{a} * {b}"
            a = self.let(f"({product}).view(np.{DTYPES[unsigned].name})")
        else:
            a = self.array(i.operands[1], unsigned)
        call = "sub_borrow" if i.op.startswith("sub") else "add_carry"
        out = self.let(f"{call}({a}, {self.read(i.operands[-1], unsigned)}, {carry})")
        self.write(i.operands[0], f"{out}[0]", unsigned, guard)
        if "cc" in i.mods:
            self.write(Reg("%cc"), f"{out}[1]", "pred", guard)

    def op_mov(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Data Movement: mov", packing and unpacking included."""
        target, source = i.operands
        t = i.type
        if isinstance(source, Vec):
            part = 8 * size_of(t) // len(source.items)
            parts = [self.read(item, f"b{part}") for item in source.items]
            self.write(target, f"pack(L, np.{BITS[size_of(t)].name}, {', '.join(parts)})", t, guard)
        elif isinstance(target, Vec):
            part = 8 * size_of(t) // len(target.items)
            whole = self.read(source, f"b{8 * size_of(t)}")
            name = self.let(f"unpack({whole}, np.{BITS[part // 8].name})")
            for j, item in enumerate(target.items):
                self.write(item, f"{name}[{j}]", f"b{part}", guard)
        elif guard is None and self.is_register(source) and self.is_register(target):
            self.write(target, self.read(source, t), t, None)
        else:
            value = self.read(source, t)
            self.write(target, f"fill(L, {value})" if isinstance(source, Imm) else value, t, guard)

    def op_cvta(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Data Movement: cvta": only shared addresses differ from generic ones."""
        offset = SHARED_BASE if {"shared", "shared:cta"} & {*i.mods} else 0
        sign = "-" if "to" in i.mods else "+"
        value = self.read(i.operands[1], i.type)
        narrow = f"np.{DTYPES[i.type].name}({offset})"
        self.write(i.operands[0], f"{value} {sign} {narrow}" if offset else value, i.type, guard)

    def op_isspacep(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Data Movement: isspacep"."""
        address = self.read(i.operands[1], "u64")
        self.write(i.operands[0], f"M.is_space({address}, {i.mods[-1]!r})", "pred", guard)

    def op_setp(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Comparison and Selection: setp", with its two destinations."""
        combine = next((m for m in i.mods[1:-1] if m in ("and", "or", "xor")), None)
        modifiers(i, i.mods[0], "ftz", *([combine] if combine else []))
        a, b = (self.read(o, i.type) for o in i.operands[1:3])
        if isinstance(i.operands[1], Imm):
            a = self.let(f"fill(L, {a})")
        truth = self.let(comparison(i, i.mods[0], i.type).format(a, b))
        targets = i.operands[0].items if isinstance(i.operands[0], Vec) else (i.operands[0],)
        if i.type in PACKED:
            values = [f"{truth}[{j}::2]" for j in range(len(targets))]
        else:
            values = [truth, f"~{truth}"][: len(targets)]
        if combine:
            other = self.read(i.operands[3], "pred")
            sign = {"and": "&", "or": "|", "xor": "^"}[combine]
            values = [f"({v}) {sign} {other}" for v in values]
        for target, value in zip(targets, values, strict=True):
            self.write(target, value, "pred", guard)

    def address(self, i: Instruction, operand: Operand, space: str) -> list[str]:
        """Base and offset of an address operand."""
        if not isinstance(operand, Addr):
            raise unknown(i, "address expected")
        base = operand.base
        if isinstance(base, Imm):
            return [str(base.value), str(operand.offset)]
        if not self.is_register(base):
            return [self.symbol(base), str(operand.offset)]
        wide = self.want(base.name).itemsize
        return [self.read(base, f"s{8 * wide}" if space != "shared" else f"u{8 * wide}"),
                str(operand.offset)]  # fmt: skip

    def memory_operation(self, i: Instruction, *allowed: str) -> tuple[str, int]:
        """The state space and the vector length; other modifiers must be known."""
        rest = set(i.mods[:-1]) - _CACHE_HINTS - _SPACES - {"v2", "v4", "v8"} - {*allowed}
        if rest or i.type not in DTYPES or i.type == "pred":
            raise unknown(i, f"modifier .{min(rest)}" if rest else "type")
        space = next((m.split(":")[0] for m in i.mods if m in _SPACES), "generic")
        return space, next((int(m[1]) for m in i.mods if m in ("v2", "v4", "v8")), 1)

    def op_ld(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Data Movement: ld"."""
        space, count = self.memory_operation(i)
        where = self.address(i, i.operands[1], space)
        size = size_of(i.type)
        items = i.operands[0].items if isinstance(i.operands[0], Vec) else (i.operands[0],)
        unsigned = f"b{8 * size}" if i.type[0] != "s" else i.type
        call = [str(k), repr(space), *where, str(size), str(count)]
        if unsigned[0] == "s" and size < 8:
            call.append("True")
        if any(isinstance(item, Sym) and item.name == "_" for item in items):
            spare = [f"%_{j}" for j in range(count)]
            self.flat.registers |= dict.fromkeys(spare, f"b{max(16, 8 * size)}")
            items = tuple(Reg(spare[j]) if isinstance(o, Sym) and o.name == "_" else o
                          for j, o in enumerate(items))  # fmt: skip
        self.effect(i, guard, "M.load", call, [(item, unsigned) for item in items])

    op_ldu = op_ld

    def op_st(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Data Movement: st"."""
        space, _ = self.memory_operation(i)
        where = self.address(i, i.operands[0], space)
        source = i.operands[1]
        items = source.items if isinstance(source, Vec) else (source,)
        values = [self.read(item, f"b{8 * size_of(i.type)}") for item in items]
        size = str(size_of(i.type))
        self.effect(i, guard, "M.store", [str(k), repr(space), *where, size, *values], [])

    def op_atom(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Parallel Synchronization: atom" and "red"."""
        operations = ("add", "min", "max", "and", "or", "xor", "inc", "dec", "exch", "cas")
        space, _ = self.memory_operation(i, *operations)
        operation = next(m for m in i.mods if m in operations)
        result, rest = (None, i.operands) if i.op == "red" else (i.operands[0], i.operands[1:])
        base, offset = self.address(i, rest[0], space)
        size = size_of(i.type)
        count = len(rest[1].items) if isinstance(rest[1], Vec) else 1
        for j in range(count):
            operands = [o.items[j] if isinstance(o, Vec) else o for o in rest[1:]]
            operands = operands[: 2 if operation == "cas" else 1]
            values = [self.read(o, f"b{8 * size}") for o in operands]
            head = [str(k), repr(space), base, str(int(offset) + j * size)]
            wanted = result.items[j] if isinstance(result, Vec) else result
            keep = wanted is not None and not (isinstance(wanted, Sym) and wanted.name == "_")
            call = [*head, repr(operation), repr(i.type), str(keep), *values]
            results = [(wanted, f"b{8 * size}")] if wanted is not None and keep else []
            self.effect(i, guard, "atomics.update", call, results)

    op_red = op_atom

    def op_cp(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Data Movement: cp.async", commit_group, wait_group, wait_all."""
        if i.mods[:2] == ("async", "commit_group"):
            self.effect(i, guard, "M.shared.commit", [], [])
        elif i.mods[:2] in (("async", "wait_group"), ("async", "wait_all")):
            left = i.operands[0] if i.operands else Imm(-1)
            assert isinstance(left, Imm)
            self.effect(i, guard, "M.shared.wait", [str(left.value)], [])
        elif i.mods[:2] in (("async", "ca"), ("async", "cg")):
            if set(i.mods[2:]) - _SPACES - _CACHE_HINTS:
                raise unknown(i)
            to = self.address(i, i.operands[0], "shared")
            of = self.address(i, i.operands[1], "global")
            size = i.operands[2]
            assert isinstance(size, Imm)
            hinted = "L2:cache_hint" in i.mods
            extra = [o for o in i.operands[3:] if not hinted or o is not i.operands[-1]]
            source = [self.read(extra[0], "u32")] if extra else []
            self.effect(i, guard, "M.copy", [str(k), *to, *of, str(size.value), *source], [])
        else:
            raise unknown(i)

    def op_createpolicy(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "createpolicy": caches do not matter here."""
        self.write(i.operands[0], "fill(L, np.uint64(0))", "b64", guard)

    def op_shfl(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Data Movement: shfl.sync"."""
        if i.mods[0] != "sync":
            raise unknown(i)
        first = i.operands[0]
        targets = first.items if isinstance(first, Vec) else (first,)
        value = self.array(i.operands[1], "b32")
        rest = [self.read(o, "u32") for o in i.operands[2:5]]
        results = list(zip(targets, ("b32", "pred"), strict=False))
        if isinstance(targets[0], Sym) and targets[0].name == "_":
            raise unknown(i)
        self.effect(i, guard, "warp.shfl", [str(k), repr(i.mods[1]), value, *rest], results)

    def op_vote(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Parallel Synchronization: vote.sync"."""
        if i.mods[0] != "sync":
            raise unknown(i)
        predicate = self.array(i.operands[1], "pred")
        mask = self.read(i.operands[2], "u32")
        call = [str(k), repr(i.mods[1]), predicate, mask]
        self.effect(i, guard, "warp.vote", call, [(i.operands[0], i.type)])

    def op_match(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Parallel Synchronization: match.sync"."""
        first = i.operands[0]
        targets = first.items if isinstance(first, Vec) else (first,)
        value = self.array(i.operands[1], i.type)
        call = [str(k), repr(i.mods[0]), value, self.read(i.operands[2], "u32")]
        results = list(zip(targets, ("b32", "pred"), strict=False))
        self.effect(i, guard, "warp.match", call, results)

    def op_redux(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Parallel Synchronization: redux.sync" on integers."""
        if i.type not in ("u32", "s32", "b32") or len(i.mods) != 3:
            raise unknown(i)
        value = self.array(i.operands[1], i.type)
        call = [str(k), repr(i.mods[1]), value, self.read(i.operands[2], "u32")]
        self.effect(i, guard, "warp.redux", call, [(i.operands[0], i.type)])

    def op_activemask(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Parallel Synchronization: activemask"."""
        self.effect(i, guard, "warp.active", [], [(i.operands[0], "b32")])

    def op_elect(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Parallel Synchronization: elect.sync": the lowest lane here."""
        items = i.operands[0].items if isinstance(i.operands[0], Vec) else ()
        self.effect(i, guard, "warp.elect", [], list(zip(items, ("b32", "pred"), strict=True)))

    def op_bar(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "bar.warp.sync"; the block's barriers end a basic block."""
        self.effect(i, guard, "warp.barrier", [str(k), self.read(i.operands[0], "u32")], [])

    def op_ldmatrix(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Warp-Level Matrix Instructions: ldmatrix"."""
        count = _matrices(i)
        where = self.address(i, i.operands[1], "shared")
        call = [str(k), *where, str(count), str("trans" in i.mods)]
        items = i.operands[0].items if isinstance(i.operands[0], Vec) else (i.operands[0],)
        self.effect(i, guard, "warp.ldmatrix", call, [(item, "b32") for item in items])

    def op_stmatrix(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Warp-Level Matrix Instructions: stmatrix"."""
        _matrices(i)
        where = self.address(i, i.operands[0], "shared")
        source = i.operands[1]
        items = source.items if isinstance(source, Vec) else (source,)
        values = [self.array(item, "b32") for item in items]
        call = [str(k), *where, str("trans" in i.mods), *values]
        self.effect(i, guard, "warp.stmatrix", call, [])

    def op_mma(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Warp-Level Matrix Instructions: mma"."""
        if i.mods[:2] != ("sync", "aligned") or i.mods[3:5] != ("row", "col") or guard:
            raise unknown(i)
        shape, (d_type, kind, b_type, c_type) = i.mods[2], i.mods[5:]
        known = {("m16n8k16", "f16"), ("m16n8k16", "bf16"), ("m16n8k8", "f16")}
        known |= {("m16n8k8", "bf16"), ("m16n8k8", "tf32"), ("m16n8k4", "tf32")}
        if (shape, kind) not in known or b_type != kind or d_type != c_type:
            raise unknown(i)
        d, a, b, c = (o.items if isinstance(o, Vec) else (o,) for o in i.operands)
        half = d_type == "f16"
        fragments = []
        for side, items in (("a", a), ("b", b)):
            words = [self.array(item, "b32") for item in items]
            key = (side, kind, *words)
            if key not in self.fragments:
                made = f"warp.fragment_{side}({kind!r}, {', '.join(words)})"
                self.fragments[key] = self.let(made)
            fragments.append(self.fragments[key])
        old = [self.array(item, "b32" if half else "f32") for item in c]
        call = f"warp.mma(M, L, {k}, {', '.join(fragments)}, ({', '.join(old)},), {half})"
        out = self.let(call)
        for j, item in enumerate(d):
            self.write(item, f"{out}[{j}]", "b32" if half else "f32", None)

    def ending(self, i: Instruction) -> str:
        """What the scheduler needs from the block's last instruction: (guard, operands)."""
        guard = self.array(i.guard, "pred") if i.guard else "None"
        operands: list[str] = []
        if i.op in ("bar", "barrier"):
            reduces = "red" in i.mods
            for j, operand in enumerate(i.operands):
                if reduces and j == 0:
                    continue
                last = reduces and j == len(i.operands) - 1
                operands.append(self.array(operand, "pred" if last else "u32"))
        elif i.op == "brx":
            operands.append(self.array(i.operands[0], "u32"))
        return f"({guard}, ({', '.join(operands)}{',' if operands else ''}))"


def _matrices(i: Instruction) -> int:
    count = {"x1": 1, "x2": 2, "x4": 4}.get(i.mods[3] if len(i.mods) > 3 else "", 0)
    known = {"sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared:cta", "b16"}
    if not count or set(i.mods) - known:
        raise unknown(i)
    return count
