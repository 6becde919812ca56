"""What the fuzzer's programs are made of: for each kind of op, how a line with it is drawn."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import strategies as st

from .programs import FLOATS, NAMES, Maker, fits, floating

KEEPING = ["{a}.abs()", "-{a}", "{a}.relu()", "{a}.clone()", "{a}.clamp(-1, 0.5)", "{a}.contiguous()"]
ROUNDING = [
    "{a}.tanh()", "{a}.sigmoid()", "F.silu({a})", "F.gelu({a})", "F.gelu({a}, approximate='tanh')", "{a}.pow(2)",
    "torch.rsqrt({a} * {a} + 1)", "torch.exp(-{a}.abs())", "{a} * 0.5 + 1", "1 / (1 + {a}.abs())",
    "torch.log1p({a}.abs())", "{a} - 0.25", "{a} / 3", "F.leaky_relu({a})", "2 - {a}", "F.softplus({a})",
]  # fmt: skip
# On a number that was rounded, one ulp could flip them.
DECIDING = ["{a}.floor()", "{a}.round()", "{a}.trunc()", "{a}.sign()", "{a}.isnan()", "{a}.signbit()"]
INTEGRAL = [
    "-{a}", "{a} * 3 - 1", "{a} // 2", "{a} % 3", "{a}.abs()", "{a}.clamp(-3, 4)", "{a} & 5", "~{a}", "{a} ^ 2",
    "{a}.clone()", "{a}.bool()", "{a}.sign()", "({a} + 0) ** 2", "({a} + 0) << 1", "({a} + 0) >> 1",
    "2 ** ({a} + 0).abs()",
]  # fmt: skip


def unary(m: Maker) -> None:
    a = m.pick()
    if floating(m.values[a]):
        template = m.one([*KEEPING, *ROUNDING, *(DECIDING if a in m.exact else [])])
        m.add(template.format(a=a), a in m.exact and template not in ROUNDING)
    else:
        m.add(m.one(INTEGRAL).format(a=a), True)


def binary(m: Maker) -> None:
    a = m.pick()
    b = m.pick(fits(m.values[a]))
    alike = m.values[a].dtype == m.values[b].dtype and a in m.exact and b in m.exact
    if alike and m.draw(st.booleans()):
        m.add(m.one(["{a} > {b}", "{a} == {b}", "{a} <= {b}", "{a}.ne({b})"]).format(a=a, b=b), True)
        return
    template = m.one(["{a} + {b}", "{a} - {b}", "{a} * {b}", "torch.maximum({a}, {b})", "torch.minimum({b}, {a})",
                      "{a} & {b}", "{a} | {b}", "torch.add({a}, {b}, alpha=2)", "{a} / (1.5 + {b}.abs())"])  # fmt: skip
    if "/" in template and not (floating(m.values[a]) and floating(m.values[b])):
        return
    m.add(template.format(a=a, b=b), alike and "mum" in template)


def where(m: Maker) -> None:
    c = m.pick(lambda t: t.dtype == torch.bool)
    if c is not None:
        a = m.pick(fits(m.values[c]))
        b = m.pick(fits(m.values[a]))
        alike = m.values[a].dtype == m.values[b].dtype and a in m.exact and b in m.exact
        m.add(m.one([f"torch.where({c}, {a}, {b})", f"{a}.masked_fill({c}, 1)"]), alike)


def cast(m: Maker) -> None:
    a = m.pick()
    # A copy even in the exact run, where all floats have one dtype.
    targets = [f"{a}.to({NAMES[d]}, copy=True)" for d in FLOATS if d != m.values[a].dtype]
    m.add(m.one([*targets, *([f"{a}.to(torch.int64)"] if a in m.exact else [])]), False)


def view(m: Maker) -> None:
    a = m.pick(lambda t: t.dim() > 0)
    if a is None:
        return
    t, d, e = m.values[a], m.dim(a), m.dim(a)
    start = m.draw(st.integers(0, t.shape[d]))
    stop = m.draw(st.integers(start, t.shape[d]))
    order = m.draw(st.permutations(range(t.dim())))
    cut = "slice(None), " * d
    options = [
        f"{a}.transpose({d}, {e})", f"{a}.permute({tuple(order)})", f"{a}[{cut}{start}:{stop}]",
        f"{a}[{cut}::{m.draw(st.integers(2, 3))}]", f"{a}.unsqueeze({d})", f"{a}.squeeze()", f"{a}[..., None]",
        f"{a}.flatten()", f"{a}.reshape({_refactored(m, t)})", f"{a}.view({_refactored(m, t)})",
        f"{a}.split([{start}, {t.shape[d] - start}], {d})[{m.draw(st.integers(0, 1))}]",
        f"{a}.chunk(2, {d})[0]", f"{a}[{cut}-1]", f"{a}.unsqueeze({d}).expand({_expanded(t, d)})",
        f"{a}.unbind({d})[0]", f"{a}.narrow({d}, {start}, {stop - start})",
    ]  # fmt: skip
    m.add(m.one([o.replace("slice(None)", ":") for o in options]), a in m.exact)


def _refactored(m: Maker, t: torch.Tensor) -> tuple[int, ...]:
    """Another shape of as many elements."""
    n = t.numel()
    first = m.draw(st.sampled_from([k for k in range(1, 18) if n % k == 0]))
    return (first, n // first)


def _expanded(t: torch.Tensor, d: int) -> tuple[int, ...]:
    return (*t.shape[:d], 3, *t.shape[d:])


def move(m: Maker) -> None:
    """Ops that move elements into memory of their own."""
    a = m.pick(lambda t: t.dim() > 0)
    if a is None:
        return
    t, d = m.values[a], m.dim(a)
    same_but = (*t.shape[:d], -1, *t.shape[d + 1 :])
    b = m.pick(lambda o: o.dim() == t.dim() and (*o.shape[:d], -1, *o.shape[d + 1 :]) == same_but)
    c = m.pick(lambda o: o.shape == t.shape)
    alike = {a, b, c} <= m.exact and len({m.values[n].dtype for n in (a, b, c)}) == 1
    m.add(m.one([f"torch.cat([{a}, {b}], {d})", f"torch.stack([{a}, {c}], {d})", f"torch.cat([{c}, {b}, {a}], {d})",
                 f"F.pad({a}, (1, 2))", f"{a}.flip({d})", f"{a}.roll(1, {d})", f"{a}.tril()",
                 f"{a}.repeat_interleave(2, {d})"]), alike)  # fmt: skip


def gather(m: Maker) -> None:
    a, i = m.pick(lambda t: t.dim() > 0), m.pick(lambda t: t.dtype == torch.int64)
    if a is None or i is None:
        return
    t, d, rank = m.values[a], m.dim(a), m.values[i].dim()
    # Of an index that is not contiguous, torch's own fake tensors predict other strides than eager on a CPU makes.
    i = i if m.values[i].is_contiguous() else f"{i}.contiguous()"
    index = f"{i} % {t.shape[d]}"
    options = [f"{a}.index_select({d}, ({index}).flatten())", f"torch.gather({a}, {d}, {index})"]
    options += [f"F.embedding({i} % {t.shape[0]}, {a})"]
    if rank:
        # With a single number from memory eager returns a view at an offset that depends on data.
        options.append(f"{a}[{i} % {t.shape[0]}]")
    m.add(m.one(options), a in m.exact)


def reduce(m: Maker) -> None:
    a = m.pick()
    t = m.values[a]
    dims = tuple(sorted(m.draw(st.sets(st.integers(0, t.dim() - 1), min_size=1)))) if t.dim() else ()
    keep = m.draw(st.booleans())
    last = list(t.shape[-1:])
    several, single = f"{dims}, keepdim={keep}", f"{dims[0] if dims else 0}"
    options = [f"{a}.amax({several})", f"{a}.amin({several})"]
    if floating(t):
        # Of equal numbers the variance is 0 in eager and a rounding error squared in ours: no error relative to itself.
        sums = [f"{a}.sum({several})", f"{a}.mean({several})", f"F.softmax({a}, {single})", f"{a}.mean()",
                f"F.log_softmax({a}, {single})", f"1 + {a}.var({several}, correction=0)", f"{a}.logsumexp({dims})",
                f"F.layer_norm({a}, {last})", f"F.rms_norm({a}, {last}, eps=1e-5)"]  # fmt: skip
        options += sums
    else:
        options += [f"{a}.sum({several})", f"{a}.any({single})", f"{a}.all({single})", f"{a}.sum()"]
    if a in m.exact:
        options += [f"{a}.argmax({single})", f"{a}.argmin({single}, keepdim={keep})", f"{a}.max({single})[1]"]
    chosen = m.one(options)
    m.add(chosen, a in m.exact and "ama" in chosen or "amin" in chosen and a in m.exact)


def matmul(m: Maker) -> None:
    a = m.pick(lambda t: floating(t) and t.dim() in (2, 3))
    if a is None:
        return
    t = m.values[a]
    b = m.pick(lambda o: o.dtype == t.dtype and o.dim() == 2 and t.shape[-1] in o.shape)
    bias = m.pick(lambda o: o.dtype == t.dtype and o.dim() == 1)
    options = [f"{a} @ {a}.transpose(-1, -2)"]
    if b is not None:
        options += [f"{a} @ {b}", f"{a} @ {b}.t()", f"F.linear({a}, {b})", f"torch.matmul({a}, {b}.contiguous())"]
        options += [f"F.linear({a}, {b}, {bias})", f"torch.addmm({bias}, {a}, {b})"] if bias else []
    m.add(m.one(options), False)


def in_place(m: Maker) -> None:
    a = m.pick()
    t = m.values[a]
    b = m.pick(lambda o: fits(t)(o) and o.dim() <= t.dim())
    c = m.pick(lambda o: o.dtype == torch.bool and fits(t)(o))
    if b is not None and m.draw(st.booleans()):
        method = m.one(["add_", "sub_", "mul_", "copy_"])
        kept = method == "copy_" and b in m.exact and m.values[b].dtype == t.dtype
        if method == "copy_" and not floating(t) and floating(m.values[b]) and b not in m.exact:
            return
        m.write(a, f"{method}({b})", b, kept)
    elif c is not None and m.draw(st.booleans()):
        m.write(a, f"masked_fill_({c}, 1)", c, True)
    else:
        m.write(a, m.one(["zero_()", "fill_(1)", "relu_()", "neg_()", "clamp_(-1, 1)"]), None, a in m.exact)


def scan(m: Maker) -> None:
    a = m.pick(lambda t: t.dim() > 0)
    if a is not None:
        d = m.dim(a)
        m.add(m.one([f"{a}.cumsum({d})", f"{a}.cumsum({d}).flip({d})", f"{a}.clamp(-1, 1).cumprod({d})"]), False)


def scatter(m: Maker) -> None:
    """Writes at places from memory; which of two values that one place gets is last is eager's own affair."""
    a = m.pick(lambda t: t.dim() > 0 and 0 not in t.shape)
    i = m.pick(lambda t: t.dtype == torch.int64 and t.dim() > 0)
    if a is None or i is None:
        return
    t, d = m.values[a], m.dim(a)
    b = m.pick(lambda o: o.dtype == t.dtype)
    index = f"({i}.contiguous() % {t.shape[d]})"
    options = [f"{a}.scatter({d}, {index}, 1)", f"{a}.index_fill({d}, {index}.flatten(), 2)",
               f"torch.ops.aten.index_put({a}, [{'None, ' * d}{index}], {a}.flatten()[:1])"]  # fmt: skip
    sums = [f"{a}.scatter_add({d}, {index}, {b})", f"{a}.scatter_reduce({d}, {index}, {b}, 'mean')",
            f"{a}.index_add({d}, {index}.flatten(), {b})"]  # fmt: skip
    whole = [f"{a}.scatter_reduce({d}, {index}, {b}, 'amax')", f"{a}.scatter_reduce({d}, {index}, {b}, 'amin')"]
    chosen = m.one([*options, *sums, *whole])
    m.add(chosen, chosen not in sums and a in m.exact and (chosen in options or b in m.exact))


def masks(m: Maker) -> None:
    c = m.pick(lambda t: t.dtype == torch.bool)
    a = m.pick(fits(m.values[c])) if c is not None else None
    if c is None or a is None:
        return
    b = m.pick(lambda o: o.dtype == m.values[a].dtype)
    exact = a in m.exact and b in m.exact
    m.add(m.one([f"{a}.masked_scatter({c}, {b})", f"torch.where({c}, {a}, {a}.flip(-1))"]), exact)


def pool(m: Maker) -> None:
    a = m.pick(lambda t: floating(t) and t.dim() in (3, 4))
    if a is None:
        return
    chosen = m.one([f"F.max_pool2d({a}, 2, 1, padding=1)", f"F.avg_pool2d({a}, (2, 1), ceil_mode=True)",
                    f"F.adaptive_avg_pool2d({a}, (2, 3))", f"F.avg_pool2d({a}, 3, 2, 1, count_include_pad=False)",
                    f"F.max_pool2d({a}, (1, 3), 2, 1, 1, True)"])  # fmt: skip
    m.add(chosen, a in m.exact and "max" in chosen)


def buckets(m: Maker) -> None:
    a, b = m.pick(exact=True), m.pick(lambda t: t.dim() == 1, exact=True)
    if a is not None and b is not None and m.values[a].dtype == m.values[b].dtype != torch.bool:
        m.add(f"torch.bucketize({a}, {b}.sort()[0], right={m.draw(st.booleans())})", True)


MOVES: list[Callable[[Maker], None]] = [
    *(unary, binary, view, move, reduce, matmul, in_place, gather, where, cast, view, binary, unary, reduce),
    *(scan, scatter, masks, pool, buckets),
]
