"""The bundled corpus keeps its rules: python -m pytest tests/test_data.py"""
import json
from collections import Counter
from pathlib import Path

import pytest

from curate import load_snippets
from sandbox import Job, Sandbox
from corpus import split_families
from tasks import render_call

PATH = Path(__file__).parent.parent / "data/snippets.jsonl"
SNIPPETS = load_snippets(PATH)


def kind(snippet):
    if not snippet.inputs:
        return "none"
    return "call" if "func_name" in snippet.inputs[0] else "stdin"


def test_at_least_300_programs_of_3_to_40_lines_in_order_of_topics():
    assert len(SNIPPETS) >= 300
    for snippet in SNIPPETS:
        count = len(snippet.code.rstrip("\n").split("\n"))
        assert 3 <= count <= 40, f"{count} lines: {snippet.code[:80]!r}"


def test_rows_have_the_documented_fields_alone():
    for row in map(json.loads, PATH.read_text().split("\n")[:-1]):
        assert set(row) == {"code", "inputs", "source"}
        assert row["source"].startswith("bundled/"), row["source"]
        for case in row["inputs"]:
            assert set(case) in ({"input"}, {"input", "func_name"})


def test_difficulty_is_spread_from_one_step_upwards():
    sizes = Counter("3-7" if n <= 7 else "8-15" if n <= 15 else "16-40"
                    for n in (s.code.count("\n") for s in SNIPPETS))
    assert all(sizes[size] >= len(SNIPPETS) * share
               for size, share in (("3-7", 0.3), ("8-15", 0.15), ("16-40", 0.15))), sizes


def test_all_three_kinds_of_input_with_two_or_more_each():
    kinds = Counter(map(kind, SNIPPETS))
    assert min(kinds[k] for k in ("none", "stdin", "call")) >= 25, kinds
    for snippet in SNIPPETS:
        assert not snippet.inputs or len(snippet.inputs) >= 2, snippet.code
    calls = [case for s in SNIPPETS for case in s.inputs if "func_name" in case]
    assert {type(case["input"]) for case in calls} == {list, dict}, "positional and keyword calls"


def test_many_families_a_tenth_held_out():
    train, held = split_families(SNIPPETS)
    families = len({s.source for s in SNIPPETS})
    assert families >= 100
    assert 0.04 <= len({s.source for s in held}) / families <= 0.2
    assert not {s.source for s in train} & {s.source for s in held}


def test_plain_text_no_duplicates():
    assert len({s.code for s in SNIPPETS}) == len(SNIPPETS)
    for snippet in SNIPPETS:
        assert snippet.code.isascii() and "\t" not in snippet.code and snippet.code.endswith("\n")
        assert not any(line.endswith(" ") for line in snippet.code.split("\n"))


@pytest.fixture(scope="module")
def runs():
    """(snippet, case, run under hash seed 0, run under hash seed 1) of every program and case."""
    cases = [(s, case) for s in SNIPPETS for case in s.inputs or [{"input": ""}]]
    programs = [(s.code + render_call(case), "") if "func_name" in case else (s.code, case["input"])
                for s, case in cases]
    with Sandbox() as sandbox:
        first, second = (sandbox.run_many([Job(code, stdin, hash_seed=seed) for code, stdin in programs])
                         for seed in (0, 1))
    return [(s, case, a, b) for (s, case), a, b in zip(cases, first, second)]


def test_every_program_ends_within_a_second_and_prints_the_same_twice(runs):
    for snippet, case, a, b in runs:
        where = f"{case} of {snippet.code[:200]!r}"
        assert a.status in ("ok", "error") and a.seconds < 1, (where, a)
        assert (a.stdout, a.stderr) == (b.stdout, b.stderr), where
        assert a.stdout or a.stderr, where
        assert len(a.stdout) <= 400, where


def test_some_runs_end_in_an_exception(runs):
    share = sum(run.exit_code != 0 for _, _, run, _ in runs) / len(runs)
    assert 0.03 <= share <= 0.3, f"{share:.2f} of the runs fail"
