"""augment.py: what changes, what never does, and how often.

    python -m pytest tests/test_augment.py
"""
import ast
import io
import math
import os
import random
import subprocess
import sys
import sysconfig
import tokenize
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from augment import (CLASSES, CODE_CLASSES, augment_arguments, augment_code, augment_stdin)

OPERATOR_CLASSES = CODE_CLASSES[:-1]  # all but digits
FAMILY = {
    "binary": ({*"+ - * / // % **".split()}, {*"& | ^ << >>".split()}),
    "augassign": ({*"+= -= *= /= //= %= **=".split()}, {*"&= |= ^= <<= >>=".split()}),
    "boolean": ({"and", "or"},),
    "comparison": ({*"< <= > >= == !=".split()},),
}


def certain(code, name, seed=0):
    """`code` with class `name` alone, at probability 1."""
    return augment_code(code, random.Random(seed), classes=[name], probability=1)


def outcomes(code, name, seeds=200):
    return {certain(code, name, seed) for seed in range(seeds)}


def tokens(code):
    """The texts of all tokens, comments included, layout left out."""
    code = code.replace("\r\n", "\n").replace("\r", "\n")
    layout = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    return [token.string for token in tokenize.generate_tokens(io.StringIO(code).readline)
            if token.type not in layout]


def difference(before, after):
    """(what went, what came) between the longest common start and the longest common end."""
    shortest = min(len(before), len(after))
    head = next((i for i in range(shortest) if before[i] != after[i]), shortest)
    tail = next((i for i in range(shortest - head) if before[-1 - i] != after[-1 - i]),
                shortest - head)
    return before[head:len(before) - tail], after[head:len(after) - tail]


def assert_one_operator_changed(before, after, name):
    if before == after:
        return
    compile_quietly(after)
    if name == "negate_if":
        return assert_one_if_negated(before, after)
    went, came = difference(tokens(before), tokens(after))
    pair = "".join(went), "".join(came)
    if name == "unary":
        legal = pair in {("-", "+"), ("+", "-"), ("~", "-"), ("not", "")}
    else:
        legal = pair in {("", "not"), ("not", "")} and name == "comparison" or any(
            {*pair} <= family and pair[0] != pair[1] for family in FAMILY[name])
    assert legal, f"{name} turned {went} into {came}: one operator, into one of its family"
    went, came = difference(before, after)
    assert len(went) <= 8 and len(came) <= 8, f"{went!r} -> {came!r}: other bytes changed too"


def assert_one_if_negated(before, after):
    tests = [[node.test for node in ast.walk(ast.parse(code))
              if isinstance(node, ast.If)] for code in (before, after)]
    changed = [(old, new) for old, new in zip(*tests, strict=True)
               if ast.dump(old) != ast.dump(new)]
    assert len(changed) == 1, f"{len(changed)} conditions changed, one should"
    (old, new), = changed
    assert isinstance(new, ast.UnaryOp) and isinstance(new.op, ast.Not)
    assert ast.dump(new.operand) == ast.dump(old), "`not` must apply to the whole condition"
    added = tokens(after)
    for token in tokens(before):
        added.remove(token)
    assert sorted(added) == ["(", ")", "not"], f"tokens added: {added}"


def compile_quietly(code):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return compile(code, "main.py", "exec", dont_inherit=True)


# ---- each class, by example

@pytest.mark.parametrize("name, before, after", [
    ("binary", "a + b", {"a - b", "a * b", "a / b", "a // b", "a % b"}),
    ("binary", "a ** b", {"a + b", "a - b", "a * b", "a / b", "a // b", "a % b"}),
    ("binary", "a<<b", {"a&b", "a|b", "a^b", "a>>b"}),
    ("binary", "a @ b", {"a @ b"}),
    ("binary", "'%d%%' % a", {"'%d%%' % a"}),  # with text any other operator is a TypeError
    ("binary", "a + 'b'", {"a + 'b'"}),
    ("binary", "f'{a}' + b", {"f'{a}' + b"}),
    ("binary", "a * b + 'c'", {f"a {operator} b + 'c'" for operator in "+ - / // %".split()}),
    ("binary", "'a' * b", {f"'a' {operator} b" for operator in "+ - / // %".split()}),
    ("boolean", "a and b", {"a or b"}),
    ("boolean", "a or b or c", {"a and b or c", "a or b and c"}),
    ("boolean", "0and 1", {"0and 1"}),  # 0or 1 would start an octal number: the original stays
    ("unary", "-a", {"+a"}),
    ("unary", "+a", {"-a"}),
    ("unary", "~a", {"-a"}),
    ("unary", "not a", {"a"}),
    ("unary", "x = [not(a), b]", {"x = [(a), b]"}),
    ("unary", "if a and not b == c: pass", {"if a and b == c: pass"}),
    ("augassign", "a += 1", {"a -= 1", "a *= 1", "a /= 1", "a //= 1", "a %= 1"}),
    ("augassign", "a[i]|=1", {"a[i]&=1", "a[i]^=1", "a[i]>>=1"}),
    ("comparison", "a < b", {"a <= b", "a > b", "a >= b", "a == b", "a != b"}),
    ("comparison", "a in b", {"a not in b"}),
    ("comparison", "a not in b", {"a in b"}),
    ("comparison", "a is b", {"a is not b"}),
    ("comparison", "a is not b", {"a is b"}),
    ("negate_if", "if a: pass", {"if not (a): pass"}),
    ("negate_if", "if not a or b: pass", {"if not (not a or b): pass"}),
    ("negate_if", "if[1]: pass", {"if not ([1]): pass"}),
    ("negate_if", "if (a): pass", {"if (not (a)): pass"}),
    ("negate_if", "if x := a: pass", {"if not (x := a): pass"}),
    ("digits", "7", {*"12345689"}),
    ("digits", "0", {*"123456789"}),
    ("digits", "0b1", {"0b0"}),
    ("digits", "a[2*i+1:9]", {"a[2*i+1:9]"}),
    ("digits", "00", {"00"}),
])
def test_every_class_makes_exactly_its_variants(name, before, after):
    assert outcomes(before, name) == after


@pytest.mark.parametrize("name", CODE_CLASSES)
def test_every_class_is_reached_at_the_default_probability(name):
    code = "def f(a, b):\n    a += 1\n    if a < b and -a:\n        return a * 2\n" * 3
    changed = sum(augment_code(code, random.Random(seed), classes=[name]) != code
                  for seed in range(100))
    assert changed >= 10, f"100 seeds changed {changed} programs with {name}"


def test_a_chain_keeps_its_tail():
    for new in outcomes("x < y < z", "comparison"):
        first, second = new.split()[1], new.split()[3]
        assert new.split()[::2] == ["x", "y", "z"]
        assert (first == "<") != (second == "<"), f"{new!r}: exactly one of the two must change"


@pytest.mark.parametrize("name", CODE_CLASSES)
@pytest.mark.parametrize("code", [
    'if __name__ == "__main__":\n    main()\n',
    "if '__main__' == __name__:\n    main()\n",
    "if not __name__ != '__main__':\n    main()\n",
    "if (__name__ == '__main__'):\n    main()\n",
])
def test_the_main_test_is_spared(name, code):
    assert certain(code, name) == code


@pytest.mark.parametrize("name", CODE_CLASSES)
@pytest.mark.parametrize("code", [
    "print(f'{a + 1 < 2 and not b:{3}} {-4!r}' f\"{5}\")\n",
    "def f(a: int | None, *b: x[1] & 2) -> 3 + 4: pass\n",
    "match a:\n    case -1 | 2+3j: pass\n",
    "# a + b < 1 and not c\n'''if a: b += 1'''\n",
])
def test_fstrings_annotations_patterns_comments_and_strings_stay(name, code):
    assert certain(code, name) == code


@pytest.mark.parametrize("name, before, after", [
    ("boolean", "s = 'é' and\t'ü'  # é and ü\n", "s = 'é' or\t'ü'  # é and ü\n"),
    ("boolean", "(a # a and b (\r\n  and\r\n  b)\r\n", "(a # a and b (\r\n  or\r\n  b)\r\n"),
    ("boolean", "x = ((a))\\\n  and\\\n ((b))\n", "x = ((a))\\\n  or\\\n ((b))\n"),
    ("boolean", "\x0c\nif 1:\n\tx = a\x0c and b\n", "\x0c\nif 1:\n\tx = a\x0c or b\n"),
    ("boolean", "x = '''\n日本\n''' and b\n", "x = '''\n日本\n''' or b\n"),
    ("boolean", "x = 1\ry = a and b\r", "x = 1\ry = a or b\r"),
    ("boolean", "'\u2028'; a and b", "'\u2028'; a or b"),
    ("boolean", "(f'{é}'\n f'ü' and b)", "(f'{é}'\n f'ü' or b)"),
    ("boolean", "# coding: latin-1\n'é'; a and b", "# coding: latin-1\n'é'; a or b"),
    ("comparison", "(a not # not in\n in b)", "(a # not in\n in b)"),
    ("comparison", "(a is # is not\n not b)", "(a is # is not\n b)"),
    ("unary", "(not # not\n a)", "(# not\n a)"),
    ("negate_if", "if (a # :\n    or b): pass", "if (not (a # :\n    or b)): pass"),
    ("negate_if", "if x:\n  pass\nelif\\\n y: pass", "if not (x):\n  pass\nelif\\\n y: pass"),
])
def test_layout_and_comments_survive_byte_for_byte(name, before, after):
    assert certain(before, name) == after


# ---- digits

@given(st.one_of(
    st.from_regex(r"0|[1-9](_?[0-9]){0,8}", fullmatch=True),
    st.from_regex(r"0[xX](_?[0-9a-fA-F]){1,8}", fullmatch=True),
    st.from_regex(r"0[oO](_?[0-7]){1,8}|0[bB](_?[01]){1,8}", fullmatch=True),
    st.from_regex(r"([0-9](_?[0-9])*)?\.[0-9](_?[0-9])*([eE][-+]?[0-9]{1,3})?[jJ]?",
                  fullmatch=True),
    st.from_regex(r"[0-9](_?[0-9])*(\.?[eE][-+]?[0-9]{1,3}[jJ]?|\.|[jJ])", fullmatch=True),
), st.integers(0, 9), st.sampled_from([0.1, 0.5, 1]))
@settings(max_examples=600, deadline=None)
def test_a_literal_stays_a_literal_of_its_kind(literal, seed, probability):
    new = augment_code(literal, random.Random(seed), classes=["digits"], probability=probability)
    old_value, new_value = ast.literal_eval(literal), ast.literal_eval(new)
    assert type(new_value) is type(old_value) and len(new) == len(literal)
    assert new[:2].lower() == literal[:2].lower() or literal[:2].lower() not in ("0x", "0o", "0b")
    if literal[:2].lower() != "0x":
        assert all(a == b for a, b in zip(literal, new) if a in "_.eEjJ+-")
    if not isinstance(new_value, int) and abs(old_value) < math.inf:
        assert abs(new_value) < math.inf, f"{literal} -> {new} is infinite"


def test_hexadecimal_stays_hexadecimal_and_keeps_its_case():
    for new in outcomes("0x1F", "digits"):
        assert new[2] in "23456789" and new[3] in "ABCDE", new


def test_exponents_stay():
    assert {new[1:] for new in outcomes("1e9", "digits")} == {"e9"}


def test_no_digit_inside_a_subscript_changes_at_any_depth():
    before = "x = 1; a[2*i + f(3, [4, lambda: 5]):6, 7][8] = b(11)[12] + {13: c[d[14] + 15]}[16]"
    for new in outcomes(before, "digits", 20):
        went = [token for token in tokens(before) if token.isdigit()]
        came = [token for token in tokens(new) if token.isdigit()]
        changed = {a for a, b in zip(went, came, strict=True) if a != b}
        assert changed == {"1", "11", "13"}, f"changed {changed}: these three lie outside brackets"


# ---- whole programs

GAPS = st.sampled_from([" ", "  ", "\t", "\n", " # é and -1 + (\n ", " \f", " \\\n"])
ATOMS = st.sampled_from(["a", "é", "1_0", "0x1F", "2.5", "2j", "'s+é'", "'''\nü\n'''", "b'-1'",
                         'f"{a+1:>{w-2}}é"', "'é' f'{-b}'", "a[1:2*i]", "None", "..."])
OPERATORS = st.sampled_from("+ - * / // % ** @ & | ^ << >> and or < <= > >= == != in is".split()
                            + [("not", "in"), ("is", "not")])


@st.composite
def compounds(draw, inner):
    def gap():
        return draw(GAPS)

    kind = draw(st.integers(0, 6))
    if kind <= 2:
        text = draw(inner)
        for _ in range(draw(st.integers(1, 3))):
            operator = draw(OPERATORS)
            operator = gap().join(operator) if isinstance(operator, tuple) else operator
            text += gap() + operator + gap() + draw(inner)
        return f"({text})"
    if kind == 3:
        return f"({draw(st.sampled_from(['-', '+', '~', 'not']))}{gap()}{draw(inner)})"
    if kind == 4:
        return f"f({gap()}{draw(inner)},{gap()}k={draw(inner)})"
    if kind == 5:
        return f"é[{draw(inner)}]"
    return f"({draw(inner)} if {draw(inner)} else {draw(inner)})"


EXPRESSIONS = st.recursive(ATOMS, compounds, max_leaves=8)


STATEMENTS = st.sampled_from([
    "x = {}", "x += {}  # x -= 1", "x[{}] >>= {}", "if {}:\n\tpass  # if\nelif {}: y",
    "if({}): pass", "while {}: break", "def f(a: 1 + 2 = {}): return {}"])


@st.composite
def programs(draw):
    statements = []
    for form in draw(st.lists(STATEMENTS, min_size=1, max_size=4)):
        first, *rest = form.split("{}")
        statements.append(first + "".join(draw(EXPRESSIONS) + text for text in rest))
    return "\n".join(statements).replace("\n", draw(st.sampled_from(["\n", "\r\n"])))


@given(programs(), st.sampled_from(OPERATOR_CLASSES), st.integers(0, 2))
@settings(max_examples=400, deadline=None)
def test_one_operator_changes_and_nothing_else(code, name, seed):
    assert_one_operator_changed(code, certain(code, name, seed), name)


@given(programs(), st.integers(0, 1000))
@settings(max_examples=200, deadline=None)
def test_a_variant_compiles_and_the_same_seed_gives_the_same(code, seed):
    new = augment_code(code, random.Random(seed), probability=0.5)
    assert new == augment_code(code, random.Random(seed), probability=0.5)
    try:
        compile_quietly(code)
    except SyntaxError:
        assert new == code, "a program that never compiled must come back as it was"
    else:
        compile_quietly(new)


@given(st.text(max_size=200), st.integers(0, 10))
@settings(max_examples=200, deadline=None)
def test_any_text_is_survived(text, seed):
    new = augment_code(text, random.Random(seed), probability=1)
    assert isinstance(new, str)
    if new != text:
        compile_quietly(new)


def standard_library(count):
    """Sources that nobody here wrote, of moderate size, spread over the alphabet."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in sorted(folder.glob("*.py")) if 3_000 < path.stat().st_size < 25_000]
    return [path.read_bytes().decode() for path in paths[::max(1, len(paths) // count)]][:count]


@pytest.mark.parametrize("name", OPERATOR_CLASSES)
def test_real_programs_change_in_one_operator(name):
    changed = 0
    for seed, code in enumerate(standard_library(16)):
        new = augment_code(code, random.Random(seed), classes={name: 0.3})
        assert_one_operator_changed(code, new, name)
        changed += new != code
    assert changed, f"{name} changed none of 16 modules of the standard library"


def test_digits_of_real_programs_change_outside_subscripts_alone():
    for code in standard_library(16):
        new = certain(code, "digits")
        assert len(new) == len(code)
        assert ast.dump(without_numbers(new)) == ast.dump(without_numbers(code)), (
            "something other than numbers outside subscripts changed")


def without_numbers(code):
    class Blank(ast.NodeTransformer):
        def visit_Subscript(self, node):  # left as it is but for what is subscripted
            node.value = self.visit(node.value)
            return node

        def visit_Constant(self, node):
            return ast.Name("number") if type(node.value) in (int, float, complex) else node
    return Blank().visit(ast.parse(code))


def test_all_classes_together_on_real_programs():
    for seed, code in enumerate(standard_library(40)):
        new = augment_code(code, random.Random(seed))
        compile_quietly(new)
        lines = code.splitlines(), new.splitlines()
        assert len(lines[0]) == len(lines[1]), "no class adds or takes lines"


# ---- refusals, probabilities, purity

@pytest.mark.parametrize("code", [
    "a +", "return a + b", "a\0+b", "'\ud800' + a", "", "\ufeff", "x = (", "1+" * 20_000 + "1",
    "(" * 300 + "a + b" + ")" * 300])
def test_what_python_refuses_comes_back_as_it_was(code):
    assert augment_code(code, random.Random(0), probability=1) == code


def test_nothing_is_executed_and_no_warning_shown(capfd):
    code = "print('run')\nx = '\\d' is 1 and 1(2)\nassert (a, 'b')\n"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert certain(code, "boolean") == code.replace("and", "or")
    assert capfd.readouterr() == ("", "")


def test_probability_zero_changes_nothing():
    code = "if a < b and -c:\n    d += 1 * 2\n"
    assert augment_code(code, random.Random(0), probability=0) == code
    assert augment_code(code, random.Random(0), classes=()) == code
    assert augment_stdin("abc 123", random.Random(0), probability=0) == "abc 123"
    assert augment_arguments([1, "a"], random.Random(0), probability=0) == [1, "a"]


def test_a_class_hits_once_and_each_node_has_its_turn():
    code = "\n".join("a + b" for _ in range(50))
    hits = [next((i for i, line in enumerate(new.splitlines()) if line != "a + b"), None)
            for seed in range(400)
            for new in [augment_code(code, random.Random(seed), classes=["binary"])]]
    share_first = sum(hit == 0 for hit in hits) / len(hits)
    assert 0.06 < share_first < 0.14, f"the first node is hit with {share_first}, not 0.1"
    assert sum(hit is None for hit in hits) <= 10, "0.9^50 is 0.5 %: some node is nearly always hit"
    assert max(hit for hit in hits if hit is not None) > 20, "later nodes have their turn as well"
    many = augment_code(code, random.Random(1), classes=["binary"], probability=1)
    assert sum(line != "a + b" for line in many.splitlines()) == 1, "one hit ends it"


def test_each_class_has_its_own_probability():
    code = "a + b < c"
    for seed in range(20):
        new = augment_code(code, random.Random(seed), classes={"binary": 0, "comparison": 1})
        assert new.startswith("a + b ") and new != code


def test_leaving_a_class_out_does_not_change_the_others():
    code = "if a < b and -c:\n    d += 1 * 2\n"
    for seed in range(50):
        alone = augment_code(code, random.Random(seed), classes=["augassign"], probability=0.5)
        both = augment_code(code, random.Random(seed), classes=["negate_if", "augassign"],
                            probability=0.5)
        assert alone.splitlines()[1] == both.splitlines()[1]


@pytest.mark.parametrize("options, complaint", [
    ({"classes": ["binry"]}, "binry"), ({"classes": {"binary": 2}}, "binary"),
    ({"classes": "binary"}, "choose from"), ({"probability": -1}, r"\[0, 1\]")])
def test_a_wrong_class_or_probability_is_named(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        augment_code("a", random.Random(0), **options)


def test_global_random_state_is_left_alone():
    random.seed(5)
    state = random.getstate()
    augment_code("a + b", random.Random(0), probability=1)
    augment_stdin("abc", random.Random(0))
    augment_arguments([1], random.Random(0))
    assert random.getstate() == state


def test_classes_name_programs_and_inputs():
    assert CLASSES == ("binary", "boolean", "unary", "augassign", "comparison", "negate_if",
                       "digits", "stdin", "arguments")


# ---- inputs

@given(st.text(max_size=100), st.integers(0, 100), st.sampled_from([0.1, 1]))
def test_stdin_keeps_length_and_kinds(text, seed, probability):
    new, again = (augment_stdin(text, random.Random(seed), probability=probability) for _ in "ab")
    assert len(new) == len(text) and new == again
    for old, drawn in zip(text, new):
        if not (old.isascii() and old.isalnum()):
            assert drawn == old, "only ASCII letters and digits are redrawn"
        else:
            assert (drawn.isdigit(), drawn.isupper()) == (old.isdigit(), old.isupper())
            assert probability < 1 or drawn != old


def test_stdin_characters_change_with_a_tenth():
    text = "aB3 " * 5_000
    new = augment_stdin(text, random.Random(0))
    share = sum(a != b for a, b in zip(text, new)) / 15_000
    assert 0.09 < share < 0.11, f"{share} of the characters changed"


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5),
              st.binary(max_size=3)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.tuples(inner, inner),
        st.sets(st.integers() | st.text(max_size=4)),
        st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)), max_leaves=12)


def assert_alike(old, new, all_hit):
    assert type(new) is type(old), f"{old!r} became {new!r}"
    if isinstance(old, (list, tuple)):
        assert len(old) == len(new)
        for pair in zip(old, new):
            assert_alike(*pair, all_hit)
    elif isinstance(old, dict):
        assert list(old) == list(new), "keys and their order stay"
        for key in old:
            assert_alike(old[key], new[key], all_hit)
    elif isinstance(old, set):
        assert len(new) <= len(old)
    elif isinstance(old, (bool, bytes)) or old is None:
        assert new == old
    elif isinstance(old, float) and not math.isfinite(old):
        assert repr(new) == repr(old)
    elif isinstance(old, str):
        assert len(new) == len(old)
        assert not all_hit or new != old or not any(c.isascii() and c.isalnum() for c in old)
    else:
        assert abs(new) < math.inf and (not all_hit or new != old)


@given(VALUES, st.integers(0, 100), st.sampled_from([0.1, 1]))
@settings(deadline=None)
def test_arguments_keep_their_shape_and_types(value, seed, probability):
    before = repr(value)
    new = augment_arguments(value, random.Random(seed), probability=probability)
    assert repr(value) == before, "the value handed in must not change"
    assert_alike(value, new, probability == 1)
    assert repr(new) == repr(augment_arguments(value, random.Random(seed), probability=probability))
    if isinstance(value, (list, dict, set)):
        assert new is not value


@pytest.mark.parametrize("leaf", [7, 0, -2.5, "a", "hello"])
def test_leaves_change_with_a_tenth_at_any_depth(leaf):
    value = [[[{"k": (leaf,)}]]] * 5_000
    new = augment_arguments(value, random.Random(0))
    share = sum(a != b for a, b in zip(value, new)) / 5_000
    assert 0.085 < share < 0.115, f"{share} of the leaves changed: depth must not matter"


def test_numbers_are_shifted_scaled_and_negated():
    seen = {augment_arguments(100, random.Random(seed), probability=1) for seed in range(500)}
    assert seen == {*range(90, 111)} - {100} | {200, 300, -100}


def test_sets_of_strings_do_not_depend_on_the_hash_seed():
    program = ("import random; from augment import augment_arguments as f; "
               "print(sorted(f(set('a1 b2 c3 d4'.split()), random.Random(3), probability=0.5)))")
    outputs = {subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                              check=True, cwd=Path(__file__).parent.parent,
                              env={**os.environ, "PYTHONHASHSEED": str(seed)}).stdout
               for seed in (1, 2, 3)}
    assert len(outputs) == 1, f"one seed gave {outputs}"
