"""EvalPlus's check of an MBPP+ answer. evaluate.py's program executes this text after the candidate's.

It runs in the sandbox, so the standard library must do. As in
EvalPlus: outputs are compared with the canonical solution's on every input, some as sets or by being None, floats
within a tolerance, and a call may take four times the canonical solution's time, at least a second.
Departures: types that JSON lost come back from the row's assertions (EvalPlus: a list of task numbers); tasks 558
and 581 take one reading of their text alone; arrays of numpy aren't known.
"""
import ast
import json
import re
import signal
import time

AS_SETS = {"similar_elements", "find_char_long", "common_in_nested_lists", "extract_singly", "larg_nnum",
           "intersection_array", "find_dissimilar", "Diff"}
BY_NONE = {"check_str", "text_match_three", "text_starta_endb"}


def restore_types(value, examples):
    """A JSON value with the Python types that the example values have at the same place."""
    kinds = {type(example) for example in examples}
    if isinstance(value, str) and kinds and kinds <= {int, float, complex}:
        if re.fullmatch(r"[-+.()ej\d]*\d[j)]*", value):
            return complex(value) if "j" in value else float(value)
    if not isinstance(value, (list, dict)):
        return value
    inner = [item for example in examples if isinstance(example, (list, tuple, set, dict))
             for item in (example.values() if isinstance(example, dict) else example)]
    if isinstance(value, dict):
        return {key: restore_types(item, inner) for key, item in value.items()}
    # lists deeper than any example have the type of the level above
    nested = any(isinstance(item, (list, tuple, set, dict)) for item in inner)
    items = [restore_types(item, examples if isinstance(item, list) and not nested else inner) for item in value]
    kinds &= {list, tuple, set}
    return set(items) if kinds == {set} else tuple(items) if kinds == {tuple} else items


def example_calls(assertion, name):
    """The argument lists of the calls of `name`; calls with expressions such as 14 * 14 are left out."""
    calls = [node for node in ast.walk(ast.parse(assertion))
             if isinstance(node, ast.Call) and getattr(node.func, "id", None) == name]
    return [[ast.literal_eval(argument) for argument in call.args] for call in calls
            if not any(isinstance(argument, ast.BinOp) for argument in call.args)]


def agree(name, out, expected, atol):
    """Whether EvalPlus takes `out` for `expected`."""
    if name in AS_SETS:
        return set(out) == set(expected)
    if name in BY_NONE:
        return (out if isinstance(out, bool) else out is not None) == (expected is not None)
    if out == expected or name == "are_equivalent" or name == "sum_div" and out == 0:
        return True
    outs, truths = (out, expected) if isinstance(expected, (list, tuple)) else ([out], [expected])
    limit = atol or 1e-6 * all(isinstance(truth, float) for truth in truths)
    return bool(limit) and type(out) is type(expected) and len(outs) == len(truths) and all(
        a == b or abs(a - b) <= limit + 1e-7 * abs(b) or (a != a and b != b) for a, b in zip(outs, truths))


def check(candidate, name, canonical, assertion, inputs, atol):
    """AssertionError unless candidate agrees with the canonical source on every argument list of inputs (JSON)."""
    exec(canonical, reference := {})
    calls = example_calls(assertion, name)
    typed = lambda arguments: [restore_types(value, [call[i] for call in calls if i < len(call)])
                               for i, value in enumerate(arguments)]
    for ours, theirs in zip(json.loads(inputs), json.loads(inputs)):         # either may change its arguments
        start = time.perf_counter()
        expected = reference[name](*typed(ours))
        signal.setitimer(signal.ITIMER_REAL, max(1, 4 * (time.perf_counter() - start)))      # the alarm kills
        out = candidate(*typed(theirs))
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert agree(name, out, expected, atol)
