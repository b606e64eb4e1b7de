"""Row filters: their meaning on columns, the traps that are refused, and hostile texts."""

from __future__ import annotations

import pickle
import threading
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trajstore.errors import NotFoundError, SchemaError
from trajstore.format.expression import Expression

COLUMNS: dict[str, np.ndarray[Any, Any]] = {
    "success": np.array([True, False, True, False, True]),
    "done": np.array([True, True, False, False, True]),
    "length": np.array([10, 50, 51, 200, 0], np.int16),
    "seed": np.array([1, 2, 3, 2**53 + 1, -(2**63)], np.int64),
    "tiny": np.array([100, -128, 127, 0, 5], np.int8),
    "hash": np.array([0, 1, 2, 2**63, 2**64 - 1], np.uint64),
    "return": np.array([0.1, 0.5, np.nan, np.inf, -1.0], np.float32),
    "half": np.array([0.1, 0.5, np.nan, np.inf, -1.0], np.float16),
    "reward-mean": np.array([0.1, 0.5, -0.5, 0.0, 2.0]),
    "obs.max": np.array([1, 2, 3, 4, 5], np.uint8),
    "task": np.array(["pick", "place", "pick", "naïve ☃", ""]),
    "label": np.array(["pick", None, "place", None, ""], object),
    "nan": np.array([1, 2, 3, 4, 5]),
}


def rows(text: str) -> list[int]:
    mask = Expression(text).evaluate(COLUMNS)
    assert mask.dtype == np.bool_
    assert mask.shape == (5,)
    return np.flatnonzero(mask).tolist()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("success", [0, 2, 4]),
        ("success & (length > 50)", [2]),
        ("success and length > 50", [2]),
        ("not success or `reward-mean` >= 0.5", [1, 3, 4]),
        ("~success | (length == 0)", [1, 3, 4]),
        ("success & done & (length > 5) & (seed == 1)", [0]),
        ("(success & done) == (length < 20)", [0, 1, 2, 3, 4]),
        ("(success | done) == True", [0, 1, 2, 4]),
        ("seed in (1, 2, 3)", [0, 1, 2]),
        ("seed not in [1, 2, 3]", [3, 4]),
        ("seed in {-9223372036854775808}", [4]),
        ("seed in ()", []),
        ("seed in (1.0, 2.5, 1e300, -inf, 18446744073709551615)", [0]),
        ("`return` in (0.1, 1e300, inf)", [0, 3]),
        ("success in (True,)", [0, 2, 4]),
        ("10 < length <= 200", [1, 2, 3]),
        ("0 <= length < 60 != 3", [0, 1, 2, 4]),
        ("length > 10 > 3", [1, 2, 3]),
        ("task == 'pick'", [0, 2]),
        ('task != "pick"', [1, 3, 4]),
        ("task == 'naïve ☃'", [3]),
        ("task == 'naïve ☃' or `reward-mean` == 2", [3, 4]),
        ("task in ('pick', 'place', 'x')", [0, 1, 2]),
        ("task < 'pj'", [0, 2, 3, 4]),
        ("label == 'pick'", [0]),
        ("label in ('pick', 'place')", [0, 2]),
        ("label == task", [0, 4]),
        ("label == None", [1, 3]),
        ("None != label", [0, 2, 4]),
        ("task == None", []),
        ("seed != None", [0, 1, 2, 3, 4]),
        ("`return` == None", [2]),
        ("return > 0.2", [1, 3]),
        ("isnan(return)", [2]),
        ("not isnan(`return`)", [0, 1, 3, 4]),
        ("isfinite(return)", [0, 1, 4]),
        ("return == inf", [3]),
        ("return > -inf", [0, 1, 3, 4]),
        ("abs(`reward-mean`) == 0.5", [1, 2]),
        ("abs(tiny) > 120", [1, 2]),
        ("-length < -50", [2, 3]),
        ("+length == 50", [1]),
        ("--length == 50", [1]),
        ("length == max(length)", [3]),
        ("return == min(return)", [4]),
        ("min(length, seed) == 1", [0]),
        ("max(length, 20, tiny) == 20", [4]),
        ("`obs.max` == 3", [2]),
        ("length // 50 == 1", [1, 2]),
        ("length % 2 == 1", [2]),
        ("length / 4 == 2.5", [0]),
        ("length ** 2 == 2500", [1]),
        ("length + tiny == 110", [0]),
        ("length - 1.5 == 48.5", [1]),
        ("success + done == 2", [0, 4]),
        ("success == 1", [0, 2, 4]),
        ("length > 50 or success and done", [0, 2, 3, 4]),
        ("length == 2 * 3 + 4", [0]),
        ("length\n> 50\r\n", [2, 3]),
        ("  length > 50\t", [2, 3]),
        ("success | True", [0, 1, 2, 3, 4]),
        ("success & (1 < 2)", [0, 2, 4]),
        ("not True or success", [0, 2, 4]),
        ("max(length) > 5", [0, 1, 2, 3, 4]),
        ("`nan` == 3", [2]),
        ("length>=50and success", [2]),
        (r"task != '\d'", [0, 1, 2, 3, 4]),
        ("task != '`x` # not a comment'", [0, 1, 2, 3, 4]),
    ],
)
def test_meaning(text: str, expected: list[int]) -> None:
    assert rows(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tiny * 2 > 150", [0, 2]),  # int8 would wrap
        ("tiny < 1000", [0, 1, 2, 3, 4]),
        ("seed == 9007199254740993", [3]),  # float64 would find 2**53 as well
        ("seed in (9007199254740992, 1.5)", []),
        ("hash == 18446744073709551615", [4]),
        ("hash >= 9223372036854775808", [3, 4]),
        ("hash in (1, 18446744073709551615, -1)", [1, 4]),
        ("return == 0.1", [0]),  # float32 0.1 as float64 is 0.10000000149
        ("half == 0.1", [0]),
        ("half > 70000", [3]),  # 70000 is infinite as float16
        ("half != 70000", [0, 1, 2, 3, 4]),
        ("half in (0.1, 70000)", [0]),
        ("half * 1000000 > 100000", [1, 3]),
        ("length % length == 0", [0, 1, 2, 3]),  # NumPy's 0 % 0 is 0
        ("length // 0 == 0", []),
        ("2 ** 0.5 < return", [3]),
        ("10 ** 9 ** 9 == return", [3]),
    ],
)
def test_numbers_are_exact_where_numpy_wraps(text: str, expected: list[int]) -> None:
    assert rows(text) == expected


def test_warnings_of_numpy_and_python_stay_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rows("length / 0 > 1e300") == [0, 1, 2, 3]
        assert rows("length>=50and length<1000") == [1, 2, 3]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a & (b > c.d)".replace("c.d", "`c.d`"), {"a", "b", "c.d"}),
        ("class == 1 or return > 2 or `3d` > `é`".replace("`é`", "e"), {"class", "return", "3d", "e"}),
        ("max(x, x) > nan - inf + 1", {"x"}),
        ("`a` > a", {"a"}),
        ("max > min(max)", {"max"}),
    ],
)
def test_names_are_the_columns_used(text: str, names: set[str]) -> None:
    assert Expression(text).names == names


def test_only_the_columns_named_are_looked_up_and_once() -> None:
    asked: list[str] = []

    class Lazy(dict[str, Any]):
        def __getitem__(self, name: str) -> Any:
            asked.append(name)
            return COLUMNS[name]

    Expression("length > 3 and length < 60 and success").evaluate(Lazy.fromkeys(COLUMNS))
    assert sorted(asked) == ["length", "success"]


@pytest.mark.parametrize(
    "text",
    [
        "success & length > 50",
        "length > 50 & success",
        "(length) > (seed) & (success)",
        "(success & length > 50)",
        "success == done & success",
        "success | done in (1, 2)",
        "not success & done",
        "~(success) & done | success == True",
        "success and done | success",
        "success or done & (length > 3)",
        "'☃' == task & (success)",
    ],
)
def test_the_precedence_of_and_and_or_signs_is_no_trap(text: str) -> None:
    with pytest.raises(SchemaError, match="binds tighter") as caught:
        Expression(text)
    assert "parentheses" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "problem", "caret"),
    [
        ("length >", "filter", None),
        ("length = 5", "write ==", 7),
        ("(length > 5", "filter", None),
        ("length > 5)", "filter", None),
        ("a b", "filter", None),
        ("a && b", "filter", None),
        ("task == 'pick", "does not end", 8),
        ('task == """a"""', "triple", 8),
        ("'''a''' == task", "triple", 0),
        ("a > 1 # comment", "comment", 6),
        ("a > `b", "backtick", 4),
        ("`__x` > 1", "backtick", 0),
        ("`a/b` > 1", "backtick", 0),
        ("`` > 1", "backtick", 0),
        ("a > \\ 1", "backslash", 4),
        ("a is b", "is", 5),
        ("x == nan", "isnan", 5),
        ("nan < x", "isnan", 0),
        ("x in (nan,)", "None and nan", 5),
        ("x in (1, None)", "None and nan", 5),
        ("x in (1, 'a')", "text and numbers", 5),
        ("x in 5", "list", 5),
        ("x in y", "list", 5),
        ("'pi' in task", "list", 8),
        ("x in (1, y)", "number or text", 9),
        ("x in (*y,)", "number or text", 6),
        ("x == 1j", "number or text", 5),
        ("x == b'a'", "number or text", 5),
        ("x == ...", "number or text", 5),
        ("x == 99999999999999999999", "64 bits", 5),
        ("x == -9223372036854775809", "64 bits", 5),
        ("x == 0x" + "f" * 5000, "64 bits", 5),
        ("x == " + "9" * 5000, "filter", None),
        ("1 < 2", "no column", 0),
        ("True", "no column", 0),
        ("", "empty", None),
        (" \n ", "empty", None),
        ("x\0", "filter", None),
        ("x == '\ud800'", "surrogate", 6),
        ("x.y > 1", "backticks", 0),
        ("min() > x", "given", 0),
        ("abs(x, y) > 1", "given", 0),
        ("abs(x=1) > y", "given", 0),
        ("max(*x) > 1", "Starred", 4),
        ("max(**x) > 1", "given", 0),
        ("'☃☃' == x.y", "backticks", 8),
    ],
)
def test_what_cannot_be_read_is_shown_with_its_place(text: str, problem: str, caret: int | None) -> None:
    with pytest.raises(SchemaError, match=problem) as caught:
        Expression(text)
    if text.strip():
        _, shown, pointer = caught.value.message.splitlines()
        assert pointer.strip() == "^"
        assert len(pointer) <= len(shown) + 1
        if caret is not None:
            assert pointer.index("^") - 2 == caret


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "__import__('os') == success",
        "().__class__.__bases__[0].__subclasses__() == success",
        "success.__class__",
        "success.all()",
        "(lambda: success)()",
        "lambda x: x",
        "[x for x in success]",
        "{x: 1 for x in success}",
        "all(x for x in success)",
        "(x := success)",
        "success if success else done",
        "success[0]",
        "success[::2]",
        "{'a': success}",
        "f'{success}'",
        "f'{`x`}'",
        "eval('success')",
        "`eval`('success')",
        "getattr(success, 'x')",
        "open('/etc/passwd') == success",
        "await success",
        "yield success",
        "success, done",
        "[success]",
        "success; done",
        "import os",
        "success @ done",
        "success << 5",
        "success ^ done",
        "abs.__globals__",
        "abs(abs)(success)",
        "min(success)(success)",
        "@success",
        "print(success)",
        "\x00\x01\x02",
        "success\u2028& done",
    ],
)
def test_code_is_refused_before_any_column_is_seen(text: str) -> None:
    with pytest.raises(SchemaError):
        Expression(text)


@pytest.mark.parametrize(
    "text",
    [
        "(" * 5000 + "x" + ")" * 4999,
        "-" * 9000 + "x > 0",
        "not " * 2400 + "x",
        "~" * 9000 + "x",
        "abs(" * 1900 + "x" + ")" * 1900,
        "x" + " + 1" * 2400 + " > 0",
        "x ** " * 1900 + "x > 1",
        "(a & " * 1500 + "a" + ")" * 1500,
        "[" * 9000,
        "x in " + "(" * 4000 + ")" * 4000,
        "-x" + "-x" * 4000 + " > 0",
    ],
    ids=lambda text: text[:12],
)
def test_deep_nesting_is_refused(text: str) -> None:
    assert len(text) <= 10_000
    with pytest.raises(SchemaError):
        Expression(text)


def test_too_long_a_text_is_refused() -> None:
    with pytest.raises(SchemaError, match="10,000"):
        Expression("x > 1" + " " * 10_000)
    with pytest.raises(SchemaError, match="text, not int"):
        Expression(5)  # type: ignore[arg-type]


def test_long_chains_are_no_nesting() -> None:
    text = " | ".join(f"(seed == {n})" for n in range(600))
    assert rows(text) == [0, 1, 2]
    assert rows(" or ".join(f"seed == {n}" for n in range(600))) == [0, 1, 2]
    assert rows("seed in (" + ",".join(map(str, range(2000))) + ")") == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("length", "true or false"),
        ("length + 1", "true or false"),
        ("task", "true or false"),
        ("success & length", "compare it"),
        ("not length", "true or false"),
        ("~length", "int64"),
        ("length and success", "int64"),
        ("task == 5", "text compares with text"),
        ("length > 'a'", "text compares with text"),
        ("success == 'True'", "text compares with text"),
        ("task in (1, 2)", "text compares with text"),
        ("length in ('a', 'b')", "text compares with text"),
        ("task + 'a' == 'b'", "number"),
        ("'a' * 1000000000 == task", "number"),
        ("task * 5 == 'a'", "number"),
        ("-task == 1", "number"),
        ("abs(task) == 1", "number"),
        ("isnan(label)", "number"),
        ("max(task) == 1", "number"),
        ("isnan(None) or success", "None"),
        ("length > None", "order"),
        ("label < 'a'", "not supported"),
        ("hash + 1 > 0", "int64"),
        ("9223372036854775808 + length > 0", "int64"),
        ("seed * 10 > 0", "range of int64"),
        ("seed - 1 > 0", "range of int64"),
        ("-seed > 0", "range of int64"),
        ("abs(seed) > 0", "range of int64"),
        ("9223372036854775807 * 9223372036854775807 > length", "range of int64"),
    ],
)
def test_what_does_not_fit_the_columns_is_refused(text: str, problem: str) -> None:
    expression = Expression(text)
    with pytest.raises(SchemaError, match=problem) as caught:
        expression.evaluate(COLUMNS)
    assert "^" in caught.value.message


def test_unknown_columns_name_the_nearest() -> None:
    with pytest.raises(NotFoundError, match=r"'lenght'.*columns are: .*`obs\.max`") as caught:
        Expression("lenght > 5").evaluate(COLUMNS)
    assert caught.value.hint == "did you mean length?"
    with pytest.raises(NotFoundError) as caught:
        Expression("reward - mean > 5").evaluate(COLUMNS)
    assert "`reward-mean`" in caught.value.hint
    with pytest.raises(NotFoundError, match="'___'"):
        Expression("`length` > ___").evaluate(COLUMNS)
    with pytest.raises(NotFoundError, match="are: none"):
        Expression("x").check([])
    Expression("x").check(["x", "y"])


@pytest.mark.parametrize(
    "column",
    [
        np.zeros((5, 2)),
        np.zeros(5, complex),
        np.zeros(5, "S3"),
        np.zeros(5, "M8[s]"),
        np.zeros(5, "V4"),
        np.float64(1.0),
    ],
    ids=lambda column: f"{column.dtype}{column.shape}",
)
def test_columns_that_no_filter_can_use(column: Any) -> None:
    with pytest.raises(SchemaError, match="column 'x'"):
        Expression("x == 1").evaluate({"x": column})


def test_columns_of_different_lengths_are_refused() -> None:
    with pytest.raises(SchemaError, match="one length"):
        Expression("x > y").evaluate({"x": np.zeros(2), "y": np.zeros(3)})


def test_no_rows_give_no_rows() -> None:
    empty = {name: column[:0] for name, column in COLUMNS.items()}
    for text in ("success", "length == max(length)", "seed in (1, 2)", "max(length) > 5", "hash == 1", "label == None"):
        assert Expression(text).evaluate(empty).tolist() == []


def test_the_mask_is_the_callers_own() -> None:
    mask = Expression("success").evaluate(COLUMNS)
    mask[:] = False
    assert COLUMNS["success"].tolist() == [True, False, True, False, True]


def test_pickled_and_shared_between_threads() -> None:
    expression = pickle.loads(pickle.dumps(Expression(" success & (length > 50)")))
    assert repr(expression) == "Expression('success & (length > 50)')"
    found: list[list[bool]] = []
    threads = [threading.Thread(target=lambda: found.append(expression.evaluate(COLUMNS).tolist())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[False, False, True, False, False]] * 4


numbers = st.one_of(st.integers(-30, 30).map(str), st.sampled_from(["0.5", "2.0", "a", "b", "c"]))
values = st.recursive(
    numbers,
    lambda inner: st.one_of(
        st.builds("({} {} {})".format, inner, st.sampled_from(["+", "-", "*", "//", "%", "/"]), inner),
        st.builds("(-{})".format, inner),
        st.builds("abs({})".format, inner),
    ),
    max_leaves=5,
)
comparisons = st.builds("({} {} {})".format, values, st.sampled_from(["<", "<=", "==", "!=", ">", ">="]), values)
filters = st.recursive(
    comparisons,
    lambda inner: st.one_of(
        st.builds("({} {} {})".format, inner, st.sampled_from(["and", "or", "&", "|"]), inner),
        st.builds("(not {})".format, inner),
    ),
    max_leaves=4,
)


@given(filters, st.lists(st.tuples(*[st.integers(-9, 9)] * 3), min_size=1, max_size=5))
def test_random_filters_mean_what_python_means(text: str, table: list[tuple[int, int, int]]) -> None:
    """Row by row, Python itself is the reference; its ZeroDivisionError is our NaN, left out here."""
    text = f"{text} and a == a"
    expected = []
    for row in table:
        try:
            expected.append(bool(eval(text, {"abs": abs}, dict(zip("abc", row)))))
        except ZeroDivisionError:
            expected.append(None)
    columns = {name: np.array(column) for name, column in zip("abc", zip(*table))}
    found = Expression(text).evaluate(columns).tolist()
    assert [f for f, e in zip(found, expected) if e is not None] == [e for e in expected if e is not None]


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        mask = Expression(text).evaluate(COLUMNS)
    except (SchemaError, NotFoundError):
        return
    assert mask.shape == (5,)


tokens = st.sampled_from(
    "success length seed task return ( ) ( ) [ ] , & | ~ and or not in < == > != + - * / // % ** 1 2.5 'pick' nan inf "
    "None True abs min isnan ` ' # lambda : . = @ \\ is if else `length` ☃ \n".split(" ")
)


@given(st.lists(tokens, max_size=25).map(" ".join))
def test_any_tokens_are_read_or_refused(text: str) -> None:
    try:
        mask = Expression(text).evaluate(COLUMNS)
    except (SchemaError, NotFoundError):
        return
    assert mask.shape == (5,)
