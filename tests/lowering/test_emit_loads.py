"""What an epilogue reads, in a function of its own: which reads move, and that the body finds them."""

from __future__ import annotations

import ast

from terrazzo.lowering.emit_loads import MOST, apart


def body(*lines: str) -> str:
    return "\n".join(["@triton.jit", "def f_body(acc, acc2, m, n, mask, t):", *(f"    {line}" for line in lines)])


def inside(function: str) -> list[str]:
    """The statements."""
    ast.parse(function)
    return [line.strip() for line in function.split("\n")[2:]]


def test_reads_move_as_narrow_as_they_lie_in_memory() -> None:
    reads, left = apart(
        body(
            "# node: add",
            "r_ptr = t[0]",
            "y_ptr = t[1]",
            "r = tl.load(r_ptr + m * 64 + n, mask=mask).to(tl.float32)",
            "tl.store(y_ptr + m * 64 + n, (acc + r).to(tl.bfloat16), mask=mask)",
        ),
        2,
        "f_loads",
    )
    assert reads.split("\n")[:2] == ["@triton.jit", "def f_loads(m, n, mask, t):"]
    assert inside(reads) == ["r_ptr = t[0]", "r = tl.load(r_ptr + m * 64 + n, mask=mask)", "return (r,)"]
    assert inside(left) == [
        "# node: add",
        "y_ptr = t[1]",
        "r = t[2].to(tl.float32)",
        "tl.store(y_ptr + m * 64 + n, (acc + r).to(tl.bfloat16), mask=mask)",
    ]


def test_a_read_that_only_gives_an_address_is_not_handed_on() -> None:
    reads, left = apart(
        body(
            "at_ptr = t[0]",
            "table_ptr = t[1]",
            "y_ptr = t[2]",
            "at = tl.load(at_ptr + m)",
            "row = tl.load(table_ptr + at.to(tl.int64) * 64 + n, mask=mask).to(tl.float32)",
            "tl.store(y_ptr + m * 64 + n, acc * row, mask=mask)",
        ),
        3,
        "f_loads",
    )
    assert inside(reads)[-1] == "return (row,)" and "at = tl.load(at_ptr + m)" in inside(reads)
    assert inside(left)[:2] == ["y_ptr = t[2]", "row = t[3].to(tl.float32)"]


def test_what_both_need_stands_in_both() -> None:
    reads, left = apart(
        body(
            "r_ptr = t[0]",
            "y_ptr = t[1]",
            "low = n < 32",
            "r = tl.load(r_ptr + n, mask=mask & low)",
            "tl.store(y_ptr + m * 64 + n, acc + r, mask=mask & low)",
        ),
        2,
        "f_loads",
    )
    assert "low = n < 32" in inside(reads) and "low = n < 32" in inside(left)


def test_a_read_that_another_needs_as_a_number_is_widened_first() -> None:
    reads, left = apart(
        body(
            "a_ptr = t[0]",
            "b_ptr = t[1]",
            "a = tl.load(a_ptr + m).to(tl.float32)",
            "b = tl.load(b_ptr + n, mask=mask & (a > 0.5)).to(tl.float32)",
            "tl.store(a_ptr + m * 64 + n, acc + a + b, mask=mask)",
        ),
        2,
        "f_loads",
    )
    assert "a = tl.load(a_ptr + m).to(tl.float32)" in inside(reads)
    assert "a = t[2]" in inside(left) and "b = t[3].to(tl.float32)" in inside(left)


def test_what_hangs_on_the_product_or_on_sums_of_rows_stays() -> None:
    for cause in ("acc > 0", "total > 0"):
        made = body(
            "r_ptr = t[0]",
            "total = t[1]",
            f"positive = {cause}",
            "r = tl.load(r_ptr + n, mask=mask & positive)",
            "tl.store(r_ptr + m * 64 + n, acc + r, mask=mask)",
        )
        assert apart(made, 2, "f_loads") == ("", made)


def test_a_read_that_nothing_needs_stays() -> None:
    made = body("y_ptr = t[0]", "dead = tl.load(y_ptr + n, mask=mask)", "tl.store(y_ptr + m * 64 + n, acc, mask=mask)")
    assert apart(made, 1, "f_loads") == ("", made)


def test_nothing_to_read_and_too_much_to_hold() -> None:
    made = body("y_ptr = t[0]", "tl.store(y_ptr + m * 64 + n, acc, mask=mask)")
    assert apart(made, 1, "f_loads") == ("", made)
    many = [f"r{i} = tl.load(y_ptr + n + {i}, mask=mask)" for i in range(MOST + 1)]
    made = body(
        "y_ptr = t[0]", *many, f"tl.store(y_ptr + m, {' + '.join(f'r{i}' for i in range(MOST + 1))}, mask=mask)"
    )
    assert apart(made, 1, "f_loads") == ("", made)
