"""Reading snippets, the exact maximum clique, curation: python -m pytest tests/test_curate.py"""
import itertools
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import networkx
import numpy as np
import pytest
from hypothesis import given, settings, strategies

import curate as room
from curate import Snippet, curate, load_snippets, maximum_clique, similar_pairs, trigram_bags

ROOT = Path(__file__).parent.parent
HEADER = "data_source,language,code_str,len,test_cases_str,starter_code,is_executable,use_stdin\n"


# ---- reading ------------------------------------------------------------------------------------

def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_jsonl_with_every_kind_of_case(tmp_path):
    cases = [{"input": "3\n"}, {"input": [1, [2]], "func_name": "f"},
             {"input": {"a": None}, "func_name": "C().f"}]
    row = json.dumps({"code": "print(input())", "inputs": cases, "source": "s"})
    assert load_snippets(write(tmp_path / "a.jsonl", row)) == [Snippet("print(input())", cases, "s")]


def test_jsonl_defaults(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"code": "x"}\n\n')
    assert load_snippets(str(path)) == [Snippet("x", [], "a.jsonl")], "no inputs; the file's name"


def test_newlines_and_byte_order_marks_are_gone(tmp_path):
    text = '\ufeff{"code": "\\ufeffa\\r\\nb\\rc\\n"}\r\n{"code": "d"}\r\n'
    codes = [snippet.code for snippet in load_snippets(write(tmp_path / "a.jsonl", text))]
    assert codes == ["a\nb\nc\n", "d"], "as Python's own tokenizer reads them"


@pytest.mark.parametrize("line", [
    b"{", b"[]", b"3", b'"code"', b'{"code": 3}', b'{"inputs": []}', b'{"code": null}', b"\xff\xfe{",
    b'{"code": "x", "source": 3}', b'{"code": "x", "inputs": {}}', b'{"code": "x", "inputs": null}',
    b'{"code": "x", "inputs": [3]}', b'{"code": "x", "inputs": [{"input": 3}]}',
    b'{"code": "x", "inputs": [{}]}', b'{"code": "x", "inputs": [{"input": [1]}]}',
    b'{"code": "x", "inputs": [{"input": {}, "func_name": 3}]}', b"[" * 100_000])
def test_a_bad_row_is_named_in_one_line(tmp_path, line):
    path = write(tmp_path / "a.jsonl", b'{"code": "x"}\n' + line + b"\n")
    with pytest.raises(ValueError) as error:
        load_snippets(path)
    assert str(error.value).startswith(f"{path}:2: ") and "\n" not in str(error.value)


def test_missing_path(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such file"):
        load_snippets(tmp_path / "nowhere")


def test_official_csv(tmp_path):
    text = (HEADER + 'a,python,"print(""x"")\r\nprint(1)",2,[],,True,False\n'
            + 'b,Python3,"def f(x): pass",1,"[{""input"": [1], ""func_name"": ""f""}]",,True,False\n'
            + "c,cpp,int main(){},1,[],,True,False\n" + "d,python,input(),1,,,True,True\n")
    dropped = Counter()
    snippets = load_snippets(write(tmp_path / "a.csv", "\ufeff" + text), dropped=dropped)
    assert snippets == [Snippet('print("x")\nprint(1)', [], "a"), Snippet("input()", [], "d")][:1] + [
        Snippet("def f(x): pass", [{"input": [1], "func_name": "f"}], "b"), Snippet("input()", [], "d")]
    assert dropped == {"language cpp": 1}, "other languages are left out, and counted"


def test_csv_field_of_a_megabyte(tmp_path):
    code = "x = 1\n" * 200_000
    path = write(tmp_path / "a.csv", HEADER + f'a,python,"{code}",1,[],,True,False\n')
    assert load_snippets(path)[0].code == code, "csv refuses fields above 128 KiB by default"


@pytest.mark.parametrize("text, number", [
    ("data_source,code_str\na,b\n", 1), ("", 0), (HEADER + "a,python,x\n", 2),
    (HEADER + "a,python,x,1,[],,True,False,more\n", 2), (HEADER + "a,python,x,1,{,,True,False\n", 2),
    (HEADER + "a,python,x,1,3,,True,False\n", 2), (HEADER + 'a,python,"x', 1),
    (HEADER.encode() + b"a,python,\xff,1,[],,True,False\n", 0)])
def test_a_bad_csv_is_named_in_one_line(tmp_path, text, number):
    path = write(tmp_path / "a.csv", text)
    with pytest.raises(ValueError) as error:
        load_snippets(path)
    assert str(error.value).startswith(f"{path}:{number}: ") and "\n" not in str(error.value)


def test_a_folder_skips_and_counts_what_it_cannot_use(tmp_path):
    (tmp_path / "sub" / "folder.py").mkdir(parents=True)
    write(tmp_path / "sub" / "b.py", "\ufeffprint('é')\r\n")
    write(tmp_path / "a.py", b"# coding: latin-1\nprint('\xe9')\n")
    write(tmp_path / "broken.py", "def f(:\n")
    write(tmp_path / "other.txt", "no")
    write(tmp_path / "bad.py", b"\n\nprint('\xe9')\n")
    write(tmp_path / "strange.py", b"# coding: klingon\n")
    write(tmp_path / "binary.py", b"\0\1\2")
    write(tmp_path / "huge.py", "x" * 2000)
    (tmp_path / "dangling.py").symlink_to(tmp_path / "nowhere.py")
    dropped = Counter()
    snippets = load_snippets(tmp_path, max_bytes=1000, dropped=dropped)
    assert snippets == [Snippet("# coding: latin-1\nprint('é')\n", [], "a.py"),
                        Snippet("def f(:\n", [], "broken.py"),     # its SyntaxError is a task, too
                        Snippet("print('é')\n", [], "sub/b.py")]
    assert dropped == {"binary, or above 1000 bytes": 2, "UnicodeDecodeError": 1, "SyntaxError": 1}


def test_a_single_python_file(tmp_path):
    assert load_snippets(write(tmp_path / "a.py", "x\n")) == [Snippet("x\n", [], "a.py")]
    with pytest.raises(ValueError, match="a.py: binary"):
        load_snippets(write(tmp_path / "a.py", b"\0"))


def test_filters_are_off_by_default(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"code": ""}\n{"code": "a\\n\\n  \\nb"}\n{"code": "a\\nb\\nc"}\n')
    dropped = Counter()
    assert len(load_snippets(path)) == 3
    assert [s.code for s in load_snippets(path, min_lines=3, dropped=dropped)] == ["a\nb\nc"]
    assert sum(dropped.values()) == 2
    assert len(load_snippets(path, min_chars=6)) == 1


# ---- maximum clique -----------------------------------------------------------------------------

def bit_sets(n, edges):
    rows = [0] * n
    for a, b in edges:
        rows[a] |= 1 << b
        rows[b] |= 1 << a
    return rows


def random_graph(n, density, rng):
    return [edge for edge in itertools.combinations(range(n), 2) if rng.random() < density]


def test_equals_networkx_at_every_density():
    rng = random.Random(0)
    for trial in range(3000):
        n, density = rng.randrange(1, 24), trial % 21 / 20
        edges = random_graph(n, density, rng)
        graph = networkx.Graph(edges)
        graph.add_nodes_from(range(n))
        clique = maximum_clique(bit_sets(n, edges))
        largest = max(map(len, networkx.find_cliques(graph)))
        assert len(clique) == largest, f"n={n}, edges={edges}"
        assert clique == sorted(set(clique)) and graph.subgraph(clique).size() == largest * (largest - 1) // 2


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_equals_networkx_on_larger_graphs(density):
    rng = random.Random(1)
    for n in (60, 60, 60):
        edges = random_graph(n, density, rng)
        graph = networkx.Graph(edges)
        assert len(maximum_clique(bit_sets(n, edges))) == networkx.max_weight_clique(graph, None)[1]


def hamming(bits, distance):
    """DIMACS hamming<bits>-<distance>: words joined when they differ in at least so many bits."""
    return [sum(1 << w for w in range(1 << bits) if (v ^ w).bit_count() >= distance)
            for v in range(1 << bits)]


def johnson(n, weight, distance):
    words = [sum(1 << i for i in c) for c in itertools.combinations(range(n), weight)]
    return [sum(1 << j for j, b in enumerate(words) if (a ^ b).bit_count() >= distance) for a in words]


@pytest.mark.parametrize("graph, size", [
    (hamming(6, 2), 32), (hamming(6, 4), 4), (hamming(8, 2), 128), (hamming(8, 4), 16),
    (johnson(8, 2, 4), 4), (johnson(8, 4, 4), 14), (johnson(16, 2, 4), 8)])
def test_known_dimacs_instances(graph, size):
    assert len(maximum_clique(graph)) == size


def test_corner_cases():
    assert maximum_clique([]) == []
    assert maximum_clique([0]) == [0]
    assert len(maximum_clique([0, 0, 0])) == 1
    n = 3000                        # deeper than Python's recursion limit
    everyone = (1 << n) - 1
    assert maximum_clique([everyone ^ 1 << v for v in range(n)]) == list(range(n))


@pytest.mark.parametrize("neighbors", [[1], [2, 0], [4, 0], [-1], [0b10, 0b01, 0b01]])
def test_what_is_no_graph_is_refused(neighbors):
    with pytest.raises(ValueError, match=r"neighbors\[\d\]"):
        maximum_clique(neighbors)


def test_a_small_budget_still_bounds_the_optimum():
    rng = random.Random(2)
    for budget in (1, 10, 100, 1000, 10_000):
        for density in (0.3, 0.7, 0.95):
            neighbors = bit_sets(40, random_graph(40, density, rng))
            matrix = np.array([[row >> w & 1 for w in range(40)] for row in neighbors])
            clique, bound = room._search(matrix, budget)
            assert all(neighbors[a] >> b & 1 for a, b in itertools.combinations(clique, 2))
            assert len(clique) <= len(maximum_clique(neighbors)) <= bound


# ---- independent set ----------------------------------------------------------------------------

def test_independent_sets_are_largest():
    rng = random.Random(3)
    for trial in range(1000):
        n = rng.randrange(1, 20)
        edges = random_graph(n, trial % 11 / 15, rng)
        adjacent = {v: {w for e in edges if v in e for w in e if w != v} for v in range(n)}
        kept, bound = room.independent_set(adjacent, 10**9)
        differ = [((1 << n) - 1) ^ 1 << v ^ row for v, row in enumerate(bit_sets(n, edges))]
        assert not any(a in kept and b in kept for a, b in edges)
        assert len(kept) == bound == len(maximum_clique(differ)), f"n={n}, edges={edges}"


# ---- similarity ---------------------------------------------------------------------------------

WORDS = strategies.lists(strategies.sampled_from("abcd"), max_size=12).map(" ".join)


@settings(deadline=None, max_examples=200)
@given(strategies.lists(WORDS, max_size=10), strategies.sampled_from([0.1, 0.3, 0.5, 2 / 3, 0.9, 1]))
def test_no_similar_pair_is_missed(codes, threshold):
    bags = trigram_bags(codes)
    expected = set()
    for i, j in itertools.combinations(range(len(bags)), 2):
        shared = sum((Counter(bags[i]) & Counter(bags[j])).values())
        if shared and shared / (len(bags[i]) + len(bags[j]) - shared) >= threshold:
            expected.add((i, j))
    found = [tuple(sorted(pair[:2])) for pair in similar_pairs(bags, threshold)]
    assert sorted(found) == sorted(expected), "the filters must not lose a pair, nor repeat one"


def test_bags_are_multisets():
    one, two = trigram_bags(["a = a = a = a", "a = a"])
    assert len(one) == len(set(one)) == 7, "one element a token"
    assert len(set(one) & set(two)) == 3


@pytest.mark.parametrize("other", [
    "def f(x):\n    # why\n    return x + '#1'  # because\n", "def f(x):\n\n\n        return x + '#1'",
    "def f( x ) :\r\n\treturn x+'#1'"])
def test_comments_blanks_and_layout_do_not_count(other):
    code, same = trigram_bags(["def f(x):\n    return x + '#1'\n", other])
    assert code == same


def test_a_hash_in_a_string_is_no_comment():
    one, two = trigram_bags(["x = '# a'", "x = '# b'"])
    assert one != two


@pytest.mark.parametrize("code", ['"""' * 50_000, "'''\\" * 50_000, '"' * 100_000, "\\'" * 50_000])
def test_hostile_quotes_take_linear_time(code):
    assert len(trigram_bags([code])) == 1


# ---- curate -------------------------------------------------------------------------------------

def corpus(rng, size, lines=8):
    """Snippets drawn from few statements, so that many are alike."""
    pool = [f"value_{i} = step_{i % 7}({i})" for i in range(40)]
    return [Snippet("\n".join(rng.sample(pool, rng.randrange(2, lines))), [], str(i)) for i in range(size)]


def alike(snippets, threshold):
    return {frozenset(pair[:2]) for pair in
            similar_pairs(trigram_bags(s.code for s in snippets), threshold)}


@pytest.mark.parametrize("threshold", [0.15, 0.25, 0.4])
def test_kept_set_is_largest(threshold):
    rng = random.Random(4)
    for _ in range(40):
        snippets = corpus(rng, 14)
        conflicts = alike(snippets, threshold)
        kept = curate(snippets, threshold)
        assert not alike(kept, threshold), "no two that are kept may be alike"
        largest = max(len(subset) for mask in range(1 << 14)
                      if (subset := [i for i in range(14) if mask >> i & 1]) and len(subset) >= len(kept)
                      and not any(frozenset(p) in conflicts for p in itertools.combinations(subset, 2)))
        assert len(kept) == largest


def test_every_dropped_snippet_is_alike_to_a_kept_one():
    snippets = corpus(random.Random(5), 200)
    kept = curate(snippets, 0.3)
    for snippet in snippets:
        assert snippet in kept or alike(kept + [snippet], 0.3), "else it could have stayed"


def test_the_choice_does_not_depend_on_the_order():
    rng = random.Random(6)
    snippets = corpus(rng, 150)
    kept = curate(snippets, 0.3)
    assert [s for s in snippets if s in kept] == kept, "in input order"
    for _ in range(5):
        rng.shuffle(snippets)
        assert {s.source for s in curate(snippets, 0.3)} == {s.source for s in kept}


def test_copies_collapse_whatever_their_number():
    code = "def f(x):\n    y = x * 2\n    return y + 1\n"
    snippets = [Snippet(code + "# copy\n" * (i % 3), [], str(i)) for i in range(20_000)]
    summary = {}
    assert len(curate(snippets, summary=summary)) == 1
    assert summary["copies"] == 19_999 and not summary["similarities"], "no pair among copies is counted"


def test_of_two_alike_the_longer_stays_then_the_one_with_inputs():
    short = Snippet("a = 1\nb = 2\nc = 3\n", [], "short")
    long = Snippet("a = 1\nb = 2\nc = 3\nd = 4\n", [], "long")
    tried = Snippet(long.code, [{"input": ""}], "tried")
    assert curate([short, long]) == [long]
    assert curate([long, tried, short]) == [tried]


def test_none_one_and_empty_ones():
    assert curate([]) == []
    assert curate([Snippet("x")]) == [Snippet("x")]
    assert len(curate([Snippet(""), Snippet("# only a comment"), Snippet("x")])) == 2


@pytest.mark.parametrize("threshold", [0, -1, 1.1, float("nan")])
def test_threshold_outside_its_range(threshold):
    with pytest.raises(ValueError, match="threshold"):
        curate([], threshold)


def test_summary_bounds_the_optimum():
    snippets, summary = corpus(random.Random(7), 60), {}
    exact = curate(snippets, 0.15)
    cut = curate(snippets, 0.15, budget=1, summary=summary)
    assert len(cut) <= len(exact) <= summary["upper_bound"]
    assert sum(map(len, summary["components"])) == 60 - summary["copies"]


# ---- command line -------------------------------------------------------------------------------

def run(*arguments):
    return subprocess.run([sys.executable, str(ROOT / "curate.py"), *map(str, arguments)],
                          capture_output=True, text=True)


def test_output_reads_back_identically(tmp_path):
    rows = [{"code": "print('é\\ud800')", "inputs": [{"input": "\u2028\0"}], "source": ""},
            {"code": "f(1)\r\ng(2)", "inputs": [{"input": {"a": [1.5, None]}, "func_name": "f"}]}]
    path = write(tmp_path / "in.jsonl", "\n".join(map(json.dumps, rows)))
    done = run(path, "--out", tmp_path / "out.jsonl", "--threshold", "0.5")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert load_snippets(tmp_path / "out.jsonl") == load_snippets(path)
    assert "kept        2, exact" in done.stdout
    assert len(list(tmp_path.iterdir())) == 2, "no temporary file is left"


def test_report_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    path = write(tmp_path / "in.jsonl", '{"code": "a = 1"}\n{"code": "b = f(2)"}\n')
    for text in (path.read_text(), ""):
        write(path, text)
        done = run(path, "--out", tmp_path / "out.jsonl", "--report", tmp_path / "out.png")
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("arguments", [
    [], ["nowhere", "--out", "o"], ["{bad}", "--out", "o"], ["{good}"], ["{good}", "--out", "no/where"],
    ["{good}", "--out", "o", "--threshold", "2"], ["{good}", "--out", "o", "--threshold", "x"],
    ["{good}", "--out", "o", "--wrong"]])
def test_an_error_is_one_line_and_status_2(tmp_path, arguments):
    good = write(tmp_path / "good.jsonl", '{"code": "x"}\n')
    bad = write(tmp_path / "bad.jsonl", "{\n")
    done = run(*[a.format(good=good, bad=bad) if a[0] in "{-2xn" else tmp_path / a for a in arguments])
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("curate.py: ") and "Traceback" not in done.stderr
