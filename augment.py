"""Heterogeneous augmentation (CodeBoost, arXiv 2508.05242): small changes to programs and inputs.

Every snippet is varied, so that an answer has to be worked out and can't be remembered:

    binary      a + b          ->  a - b            digits     n = 1_024       ->  n = 1_824
    boolean     a and b        ->  a or b           stdin      "3 apples"      ->  "3 aqples"
    unary       -a, not a      ->  +a, a            arguments  [1, ["ab", 2]]  ->  [-1, ["ab", 2]]
    augassign   a += 1         ->  a -= 1
    comparison  a < b, a in b  ->  a >= b, a not in b
    negate_if   if a or b:     ->  if not (a or b):

In an operator class every node has its turn with probability 0.1 until the first hit; one operator
of a chain is replaced. Digits, characters of stdin and leaves of the arguments are hit one by one
with probability 0.1, and what is redrawn always differs.

All are pure functions of (text, rng). Positions come from `ast` and count UTF-8 bytes, as this file
does throughout; between two operands stand only blanks, brackets, comments and the operator, so no
other byte changes. Code is compiled to see that it is legal and never run: what Python refuses,
before or after, comes back as it was.

Departures from the official code (where, by a bug, no operator ever changes): conditions are
bracketed before they are negated, chains keep their tail, digits stay at any depth of a subscript,
a literal stays one of its kind. Left alone: tests of `__name__`, `@`, annotations, `case` patterns,
f-strings (positions inside are wrong before Python 3.12), exponents (1e9 loops for minutes).
"""
import ast
import math
import random
import re
import string
import warnings
from collections.abc import Mapping

CODE_CLASSES = ("binary", "boolean", "unary", "augassign", "comparison", "negate_if", "digits")
CLASSES = CODE_CLASSES + ("stdin", "arguments")

# An operator becomes another of its family, in assignments (a += 1) too.
FAMILIES = (
    {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%",
     ast.Pow: "**"},
    {ast.BitAnd: "&", ast.BitOr: "|", ast.BitXor: "^", ast.LShift: "<<", ast.RShift: ">>"},
    {ast.And: "and", ast.Or: "or"},
    {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!="},
)
# Replaced but never put in: either can turn small numbers into ones that fill the memory.
EXPLOSIVE = {"**", "<<"}
# All that can stand between two operands beside the operator: blanks, brackets, comments.
GAP = r"(?:[ \t\f\r\n\\()]|#[^\r\n]*[\r\n])*"
NOT = r"(not[ \t\f]*)"  # dropped with the blanks behind it; its operand never needs a bracket
# These have one alternative each: what the group of the pattern matches is replaced by the text.
OPPOSITES = {
    ast.In: ("(in)", "not in"), ast.NotIn: (NOT, ""),
    ast.Is: ("(is)", "is not"), ast.IsNot: ("is" + GAP + NOT, ""),
    ast.USub: ("(-)", "+"), ast.UAdd: (r"(\+)", "-"), ast.Invert: ("(~)", "-"), ast.Not: (NOT, ""),
}

# Digits drawn for a literal with this prefix. Zero is never drawn, except in binary: a leading
# zero would be illegal, and a zero mostly makes loops empty and divisions fail.
DIGITS = {"0x": "123456789", "0o": "1234567", "0b": "01", "": "123456789"}
UNEDITED_FIELDS = {"annotation", "returns", "type_params", "pattern"}


# ---- programs

def augment_code(code: str, rng: random.Random, *, classes=None, probability=0.1) -> str:
    """A variant of the program `code`; `code` itself where nothing is hit or the result is illegal.

    classes: names from CLASSES (those of inputs do nothing here), {name: probability}, or all.
    Each class draws from a stream of its own, so leaving one out doesn't change what the others do.
    An unknown class or a probability outside [0, 1] is a ValueError.
    """
    rates = _rates(classes, probability)
    streams = {name: random.Random(rng.getrandbits(64)) for name in CODE_CLASSES}
    text = code.removeprefix("\ufeff")  # `compile` takes a byte-order mark in a file only
    tree = _compile(text, ast.PyCF_ONLY_AST)
    if tree is None:
        return code
    source = text.encode()
    nodes = _positioned_nodes(tree, source)
    edits = []  # (start, end, replacement), byte offsets into source
    for name, (node_type, edit) in OPERATOR_EDITS.items():
        stream, rate = streams[name], rates.get(name, 0.0)
        for node in nodes:
            if isinstance(node, node_type) and stream.random() < rate:
                hit = edit(node, source, stream)
                if hit:
                    edits += hit
                    break
    for node in nodes:
        if isinstance(node, ast.Constant) and not node.in_subscript:
            edits += _digits(node, source, streams["digits"], rates.get("digits", 0.0))
    if not edits:
        return code
    result = _apply(edits, source)
    return code[:len(code) - len(text)] + result if _compile(result) is not None else code


def _binary(node, source, rng):
    return _swap(node.op, node.left.end, node.right.start, source, rng)


def _boolean(node, source, rng):
    i = rng.randrange(len(node.values) - 1)
    return _swap(node.op, node.values[i].end, node.values[i + 1].start, source, rng)


def _unary(node, source, rng):
    if isinstance(node.op, ast.Not) and _tests_name(node):
        return []
    return _swap(node.op, node.start, node.operand.start, source, rng)


def _augassign(node, source, rng):
    return _swap(node.op, node.target.end, node.value.start, source, rng, suffix="=")


def _comparison(node, source, rng):
    if _tests_name(node):
        return []
    operands = [node.left, *node.comparators]
    i = rng.randrange(len(node.ops))
    return _swap(node.ops[i], operands[i].end, operands[i + 1].start, source, rng)


def _negate_if(node, source, rng):
    if _tests_name(node.test):
        return []
    start, end = node.test.start, node.test.end
    space = b" " if source[start - 1:start].isalpha() else b""  # `if[1]:`
    return [(start, start, space + b"not ("), (end, end, b")")]


OPERATOR_EDITS = {
    "binary": (ast.BinOp, _binary),
    "boolean": (ast.BoolOp, _boolean),
    "unary": (ast.UnaryOp, _unary),
    "augassign": (ast.AugAssign, _augassign),
    "comparison": (ast.Compare, _comparison),
    "negate_if": (ast.If, _negate_if),
}


def _digits(node, source, rng, rate):
    """Edits that redraw the digits of a number literal, each with probability `rate`."""
    if type(node.value) not in (int, float, complex):
        return []
    text = source[node.start:node.end].decode()
    prefix = text[:2] if text[:2].lower() in DIGITS else ""
    if not prefix and isinstance(node.value, int) and text[0] == "0" and len(text) > 1:
        return []  # 00 is legal, 01 isn't
    body = text[2:] if prefix else re.match(r"[0-9._]*", text)[0]
    tail = text[len(prefix) + len(body):]  # exponent, j

    def redraw(match):
        digit = match[0]
        if rng.random() >= rate:
            return digit
        letters = "abcdef" if digit.islower() else "ABCDEF"
        drawn = letters if digit.isalpha() else DIGITS[prefix.lower()]
        return rng.choice(drawn.replace(digit, ""))

    new = prefix + re.sub(r"[0-9a-fA-F]", redraw, body) + tail
    if new == text or not (isinstance(node.value, int) or abs(complex(new)) < math.inf):
        return []  # 9e308 is infinite
    return [(node.start, node.end, new.encode())]


# ---- positions and edits

def _positioned_nodes(tree, source):
    """The nodes open to edits, in a fixed order, each with .start and .end, byte offsets into
    `source`, and .in_subscript. No recursion: a sum of a thousand terms is as many levels deep."""
    line_starts = [0] + [newline.end() for newline in re.finditer(rb"\r\n|\r|\n", source)]
    nodes, stack = [], [(tree, False)]
    while stack:
        node, in_subscript = stack.pop()
        if hasattr(node, "end_col_offset"):
            node.start = line_starts[node.lineno - 1] + node.col_offset
            node.end = line_starts[node.end_lineno - 1] + node.end_col_offset
            node.in_subscript = in_subscript
            nodes.append(node)
        if isinstance(node, ast.JoinedStr):
            continue
        children = []
        for field, value in ast.iter_fields(node):
            inside = in_subscript or (isinstance(node, ast.Subscript) and field == "slice")
            if field not in UNEDITED_FIELDS:
                values = value if isinstance(value, list) else [value]
                children += [(child, inside) for child in values if isinstance(child, ast.AST)]
        stack += reversed(children)
    return nodes


def _swap(op, start, end, source, rng, suffix=""):
    """The edit that replaces the operator `op`, which stands first in the gap source[start:end]."""
    if type(op) in OPPOSITES:
        pattern, new = OPPOSITES[type(op)]
    else:
        family = next((family for family in FAMILIES if type(op) in family), None)
        if family is None:
            return []  # @
        symbol = family[type(op)]
        new = rng.choice([other for other in family.values() if other not in EXPLOSIVE | {symbol}])
        pattern, new = f"({re.escape(symbol + suffix)})", new + suffix
    match = re.compile((GAP + pattern).encode()).match(source, start, end)
    return [(*match.span(1), new.encode())] if match else []


def _apply(edits, source):
    for start, end, new in sorted(edits, reverse=True):  # from the back, so that offsets stay true
        source = source[:start] + new + source[end:]
    return source.decode()


def _compile(text, flags=0):
    """compile(text), None where Python refuses. Runs nothing and shows no warning."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return compile(text, "main.py", "exec", flags, dont_inherit=True)
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
        return None


def _tests_name(node):
    """Whether `node` compares `__name__`: changing that would mostly switch a program off."""
    return any(isinstance(operand, ast.Name) and operand.id == "__name__"
               for compare in ast.walk(node) if isinstance(compare, ast.Compare)
               for operand in (compare.left, *compare.comparators))


def _rates(classes, probability):
    if not isinstance(classes, Mapping):
        classes = dict.fromkeys(CLASSES if classes is None else classes, probability)
    for name, rate in classes.items():
        if name not in CLASSES:
            raise ValueError(f"no augmentation class {name!r}: choose from {', '.join(CLASSES)}")
        if not 0 <= rate <= 1:
            raise ValueError(f"augmentation class {name!r}: probability {rate} is not in [0, 1]")
    return classes


# ---- inputs

ALPHABETS = (string.digits, string.ascii_lowercase, string.ascii_uppercase)
SHIFTS = tuple(shift for shift in range(-10, 11) if shift)


def augment_stdin(text: str, rng: random.Random, *, probability=0.1) -> str:
    """`text` with each ASCII letter and digit redrawn with that probability; digits stay digits,
    letters keep their case, all else is kept, so the length and the lines are the same."""
    return re.sub("[0-9a-zA-Z]",
                  lambda m: _other_char(m[0], rng) if rng.random() < probability else m[0], text)


def augment_arguments(value, rng: random.Random, *, probability=0.1):
    """A new value like `value`, each number and string in it changed with that probability.

    value: nested lists, tuples, sets, frozensets and dicts (keys stay) of numbers and strings.
    A hit int or finite float is shifted, scaled or negated and stays of its type and finite; of a
    hit string one character is redrawn and every other with that probability. Bools, None, empty
    strings and values of other types are handed on as they are. `value` itself isn't changed.
    """
    def changed(item):
        return augment_arguments(item, rng, probability=probability)

    if type(value) in (set, frozenset):  # sorted: a set of strings has another order each run
        return type(value)(changed(item) for item in sorted(value, key=repr))
    if type(value) in (list, tuple):
        return type(value)(changed(item) for item in value)
    if type(value) is dict:
        return {key: changed(item) for key, item in value.items()}
    if type(value) not in (int, float, str) or rng.random() >= probability:
        return value
    if type(value) is str:
        return _perturbed_string(value, rng, probability)
    return _perturbed_number(value, rng)


def _perturbed_number(value, rng):
    if value != value or abs(value) == math.inf:
        return value
    drawn = [value + rng.choice(SHIFTS), value * rng.choice((2, 3)), -value]
    return rng.choice([new for new in drawn if new != value and abs(new) != math.inf])


def _perturbed_string(text, rng, probability):
    spots = [i for i, char in enumerate(text) if char.isascii() and char.isalnum()]
    if not spots:
        return text
    sure = rng.choice(spots)
    drawn = {i for i in spots if i == sure or rng.random() < probability}
    return "".join(_other_char(char, rng) if i in drawn else char for i, char in enumerate(text))


def _other_char(char, rng):
    """Another digit for a digit, another letter of the same case for a letter."""
    alphabet = next(alphabet for alphabet in ALPHABETS if char in alphabet)
    return rng.choice(alphabet.replace(char, ""))
