"""Heterogeneous augmentation (CodeBoost, arXiv 2508.05242): small changes to programs and inputs, so that an
answer has to be worked out and can't be remembered:

    binary      a + b          ->  a - b            digits     n = 1_024       ->  n = 1_824
    boolean     a and b        ->  a or b           stdin      "3 apples"      ->  "3 aqples"
    unary       -a, not a      ->  +a, a            arguments  [1, ["ab", 2]]  ->  [-1, ["ab", 2]]
    augassign   a += 1         ->  a -= 1
    comparison  a < b, a in b  ->  a >= b, a not in b
    negate_if   if a or b:     ->  if not (a or b):

In an operator class every node has its turn with probability 0.1 until the first hit; one operator of a chain is
replaced. Digits, characters of stdin and leaves of the arguments are hit one by one with probability 0.1.
Positions come from `ast` and count UTF-8 bytes; between two operands stand only blanks, brackets, comments and the
operator, so no other byte changes. What Python refuses to compile, before or after, comes back as it was.

Departures from the official code (where, by a bug, no operator ever changes): conditions are bracketed before they are
negated, chains keep their tail, digits stay at any depth of a subscript, a literal stays one of its kind. Left alone:
tests of `__name__`, texts joined or formatted, `@`, annotations, `case` patterns, f-strings (positions inside are wrong
before Python 3.12), exponents (1e9 loops for minutes).
"""
import ast
import math
import random
import re
import string
import warnings
from itertools import pairwise

NODE_TYPES = {"binary": ast.BinOp, "boolean": ast.BoolOp, "unary": ast.UnaryOp, "augassign": ast.AugAssign,
              "comparison": ast.Compare, "negate_if": ast.If}
CODE_CLASSES = (*NODE_TYPES, "digits")
CLASSES = (*CODE_CLASSES, "stdin", "arguments")

# An operator becomes another of its family, in assignments (a += 1) too.
FAMILIES = (
    {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%", ast.Pow: "**"},
    {ast.BitAnd: "&", ast.BitOr: "|", ast.BitXor: "^", ast.LShift: "<<", ast.RShift: ">>"},
    {ast.And: "and", ast.Or: "or"},
    {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!="},
)
EXPLOSIVE = {ast.Pow, ast.LShift}  # replaced but never put in: from small numbers they make ones that fill the memory
GAP = r"(?:[ \t\f\r\n\\()]|#[^\r\n]*[\r\n])*"  # all that can stand between two operands beside the operator
NOT = r"(not[ \t\f]*)"  # dropped with the blanks behind it; its operand never needs a bracket
# These have one alternative each: what the group of the pattern matches is replaced by the text.
OPPOSITES = {
    ast.In: ("(in)", "not in"), ast.NotIn: (NOT, ""), ast.Is: ("(is)", "is not"), ast.IsNot: ("is" + GAP + NOT, ""),
    ast.USub: ("(-)", "+"), ast.UAdd: (r"(\+)", "-"), ast.Invert: ("(~)", "-"), ast.Not: (NOT, ""),
}
# Digits drawn for a literal with this prefix. Zero is never drawn, except in binary: a leading zero would be illegal,
# and a zero mostly makes loops empty and divisions fail.
DIGITS = {"0x": "123456789", "0o": "1234567", "0b": "01", "": "123456789"}
UNEDITED_FIELDS = {"annotation", "returns", "type_params", "pattern"}


def augment_code(code: str, rng: random.Random, *, classes=CODE_CLASSES, probability=0.1) -> str:
    """A variant of the program `code`; `code` itself where nothing is hit or the result is illegal.

    classes: names from CLASSES (those of inputs do nothing here) or {name: probability}; a ValueError names an unknown
    one, or one whose probability is outside [0, 1]. Leaving a class out doesn't change what the others do.
    """
    rates = classes if isinstance(classes, dict) else dict.fromkeys(classes, probability)
    for name, rate in rates.items():
        if name not in CLASSES:
            raise ValueError(f"no augmentation class {name!r}: choose from {', '.join(CLASSES)}")
        if not 0 <= rate <= 1:
            raise ValueError(f"augmentation class {name!r}: probability {rate} is not in [0, 1]")
    streams = {name: random.Random(rng.getrandbits(64)) for name in CODE_CLASSES}
    tree = _compile(code, ast.PyCF_ONLY_AST)
    if tree is None:
        return code
    source = code.encode()
    nodes = _positioned_nodes(tree, source)
    edits = []  # (start, end, replacement), byte offsets into source
    for name, node_type in NODE_TYPES.items():
        for node in nodes:
            if isinstance(node, node_type) and streams[name].random() < rates.get(name, 0):
                hit = _operator_edits(node, source, streams[name])
                if hit:
                    edits += hit
                    break
    subscripted = {part for node in nodes if isinstance(node, ast.Subscript) for part in ast.walk(node.slice)}
    for node in nodes:
        if isinstance(node, ast.Constant) and type(node.value) in (int, float, complex) and node not in subscripted:
            edits += _digit_edits(node, source, streams["digits"], rates.get("digits", 0))
    for start, end, new in sorted(edits, reverse=True):  # from the back, so that offsets stay true
        source = source[:start] + new + source[end:]
    return source.decode() if _compile(source.decode()) is not None else code


def _compile(text, flags=0):
    """compile(text), None where Python refuses. Runs nothing and shows no warning."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return compile(text, "main.py", "exec", flags, dont_inherit=True)
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
        return None


def _positioned_nodes(tree, source):
    """The nodes open to edits, in source order, each with .start and .end, byte offsets into `source`."""
    line_starts = [0] + [newline.end() for newline in re.finditer(rb"\r\n|\r|\n", source)]
    for node in ast.walk(tree):
        for field in UNEDITED_FIELDS.intersection(node._fields):
            setattr(node, field, None)
        if isinstance(node, ast.JoinedStr):
            node.values = []
    nodes = [node for node in ast.walk(tree) if hasattr(node, "end_col_offset")]
    for node in nodes:
        node.start = line_starts[node.lineno - 1] + node.col_offset
        node.end = line_starts[node.end_lineno - 1] + node.end_col_offset
    return sorted(nodes, key=lambda node: (node.start, -node.end))


def _operator_edits(node, source, rng):
    """The edits that negate an `if` or replace one operator of `node`; none where it's left alone."""
    tested = node.test if isinstance(node, ast.If) else node
    if any(isinstance(part, ast.Name) and part.id == "__name__" for part in ast.walk(tested)):
        return []  # that would mostly switch a program off
    match node:
        case (ast.BinOp(ast.Constant(str()) | ast.JoinedStr(), ast.Add() | ast.Mod())
              | ast.BinOp(_, ast.Add() | ast.Mod(), ast.Constant(str()) | ast.JoinedStr())):
            return []  # with text any other operator is nearly always a TypeError
        case ast.If(test):
            space = b" " if source[test.start - 1:test.start].isalpha() else b""  # `if[1]:`
            return [(test.start, test.start, space + b"not ("), (test.end, test.end, b")")]
        case ast.UnaryOp(op, operand):
            gaps = [(op, node.start, operand.start)]
        case ast.BinOp(left, op, right) | ast.AugAssign(left, op, right):
            gaps = [(op, left.end, right.start)]
        case ast.BoolOp(op, values):
            gaps = [(op, left.end, right.start) for left, right in pairwise(values)]
        case ast.Compare(first, ops, others):
            gaps = [(op, left.end, right.start) for op, left, right in zip(ops, [first, *others], others)]
    op, start, end = rng.choice(gaps)  # the operator stands first in the gap source[start:end]
    pattern, new = OPPOSITES.get(type(op), (None, None))
    for family in FAMILIES:
        if type(op) in family:
            pattern = f"({re.escape(family[type(op)])})"
            new = rng.choice([text for kind, text in family.items() if kind not in EXPLOSIVE | {type(op)}])
    match = pattern and re.compile((GAP + pattern).encode()).match(source, start, end)
    return [(*match.span(1), new.encode())] if match else []


def _digit_edits(node, source, rng, rate):
    """The edit that redraws each digit of a number literal with probability `rate`."""
    text = source[node.start:node.end].decode()
    if re.fullmatch("0[0_]+", text):
        return []  # 00 is legal, 01 isn't
    prefix = text[:2] if text[:2].lower() in DIGITS else ""
    body, tail = (text[2:], "") if prefix else re.fullmatch("([0-9._]*)(.*)", text).groups()  # tail: exponent, j
    new = prefix + _redraw(body, rng, rate, DIGITS[prefix.lower()], "abcdef") + tail
    if not isinstance(node.value, int) and abs(complex(new)) == math.inf:
        return []  # 9e308 is infinite
    return [(node.start, node.end, new.encode())]


def augment_stdin(text: str, rng: random.Random, *, probability=0.1) -> str:
    """`text` with each ASCII letter and digit redrawn with that probability; digits stay digits, letters keep their
    case, all else is kept, so the length and the lines are the same."""
    return _redraw(text, rng, probability, string.digits, string.ascii_lowercase)


def augment_arguments(value, rng: random.Random, *, probability=0.1):
    """A new value like `value`, each number and string in it changed with that probability.

    value: nested lists, tuples, sets, frozensets and dicts (keys stay) of numbers and strings. A hit int or finite
    float is shifted, scaled or negated and stays of its type and finite; of a hit string one character is redrawn and
    every other with that probability. All else is handed on as it is. `value` itself isn't changed.
    """
    kind = type(value)
    if kind in (list, tuple, set, frozenset):
        items = value if kind in (list, tuple) else sorted(value, key=repr)  # strings have another order each run
        return kind(augment_arguments(item, rng, probability=probability) for item in items)
    if kind is dict:
        return {key: augment_arguments(item, rng, probability=probability) for key, item in value.items()}
    if kind not in (int, float, str) or rng.random() >= probability:
        return value
    if kind is str:
        spots = [i for i, char in enumerate(value) if char.isascii() and char.isalnum()]
        sure = rng.choice(spots or [None])
        return "".join(augment_stdin(char, rng, probability=1 if i == sure else probability)
                       for i, char in enumerate(value))
    drawn = [value + rng.choice((-1, 1)) * rng.randint(1, 10), value * rng.choice((2, 3)), -value]
    return rng.choice([new for new in drawn if new != value and abs(new) != math.inf] or [value])


def _redraw(text, rng, probability, digits, letters):
    """`text` with each letter and digit replaced with that probability by another of its kind and case."""
    def other(match):
        char = match[0]
        if rng.random() >= probability:
            return char
        alphabet = digits if char.isdigit() else letters if char.islower() else letters.upper()
        return rng.choice(alphabet.replace(char, ""))

    return re.sub("[0-9a-zA-Z]", other, text)
