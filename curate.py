"""Read code snippets, and keep a largest set of them in which no two are alike.

    python curate.py IN --out OUT.jsonl --threshold 0.5 [--report out.png]

The paper's curation joins snippets that differ and takes a maximum clique. That graph is dense,
but its complement, which joins snippets that are alike, is sparse, and a maximum clique of the one
is a maximum independent set of the other, which falls apart into connected components:

    similar pairs -> components -> reductions -> of each rest, a maximum clique of its complement

Departures: the paper's function is unreleased; its files are named after chunks of 400 snippets, so
that copies in two chunks survive. Here the whole corpus is solved, exactly unless a component
outgrows its budget: then the best found is kept, and the gap to the optimum is bounded and told.

Alike means |A & B| / |A | B| >= threshold over the multisets of token trigrams; comments, blanks
and line breaks don't count. On 1,000 pairs of library functions it ranked pairs as difflib's
character ratio does with Spearman's 0.94 (lines 0.88, tokens 0.93; bigrams 0.94, with seven times
the candidates to check); 0.5 here lies near 0.8 there. Not covered: renaming every identifier.
"""
import argparse
import csv
import json
import math
import os
import re
import sys
import time
import tokenize
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Snippet:
    """One program and what to run it on."""
    code: str                                           # newlines are "\n", no byte order mark
    inputs: list[dict] = field(default_factory=list)    # cases; empty: run the program as it is
    source: str = ""                                    # its family: data source, or file name


def load_snippets(path, *, min_lines=0, min_chars=0, max_bytes=1_000_000, dropped=None):
    """Read the official .csv, a .py file, a folder of them, or else JSONL -> list[Snippet].

    By itself it keeps every readable row; `min_lines` counts lines that aren't blank. Files of a
    folder that are binary, undecodable or larger than `max_bytes` are skipped, and so are CSV rows
    in another language; `dropped`, a Counter, is told how many and why. A missing path or a
    malformed row is a ValueError of one line.
    """
    path, dropped = Path(path), Counter() if dropped is None else dropped
    if path.is_dir():
        rows = _read_folder(path, max_bytes, dropped)
    elif not path.is_file():
        raise ValueError(f"{path}: no such file or folder of snippets")
    elif path.suffix == ".py":
        rows = [(path, _read_python(path, max_bytes), [], path.name)]
    else:
        rows = _read_csv(path, dropped) if path.suffix == ".csv" else _read_jsonl(path)
    snippets = []
    for where, code, inputs, source in rows:
        if not isinstance(code, str) or not isinstance(source, str):
            raise ValueError(f"{where}: code and source must be there as strings")
        _check_cases(inputs, where)
        # Python's own tokenizer reads \r\n and \r as \n, inside string literals too.
        code = code.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
        if sum(bool(line.strip()) for line in code.split("\n")) < min_lines:
            dropped[f"fewer than {min_lines} lines"] += 1
        elif len(code.strip()) < min_chars:
            dropped[f"fewer than {min_chars} characters"] += 1
        else:
            snippets.append(Snippet(code, inputs, source))
    return snippets


def _read_folder(path, max_bytes, dropped):
    for file in sorted(path.rglob("*.py")):
        try:
            yield file, _read_python(file, max_bytes), [], file.relative_to(path).as_posix()
        except ValueError as error:
            dropped[str(error).removeprefix(f"{file}: ")] += 1


def _read_python(path, max_bytes):
    try:
        if path.stat().st_size > max_bytes:
            raise ValueError(f"{path}: larger than {max_bytes} bytes")
        if b"\0" in path.read_bytes():
            raise ValueError(f"{path}: binary file")
        with tokenize.open(path) as file:       # heeds a byte order mark and "# coding:"
            return file.read()
    except (UnicodeError, SyntaxError, LookupError):
        raise ValueError(f"{path}: not in the encoding that it declares") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None


def _read_jsonl(path):
    with open(path, "rb") as file:      # bytes, so that a line that doesn't decode has its number
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            try:
                row = json.loads(line) if line.strip() else {}
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: not JSON: {getattr(error, 'msg', error)}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{where}: a row must be a JSON object")
            if line.strip():
                yield where, row.get("code"), row.get("inputs", []), row.get("source", path.name)


def _read_csv(path, dropped):
    # Of the other columns, use_stdin is told by a case's type, is_executable by running it.
    csv.field_size_limit(2**31 - 1)     # the default refuses a field above 128 KiB
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for name in ("data_source", "language", "code_str", "test_cases_str"):
                if name not in (reader.fieldnames or ()):
                    raise ValueError(f"the header has no column {name}")
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError("a row must have as many fields as the header")
                if row["language"].lower().startswith("python"):
                    cases = json.loads(row["test_cases_str"].strip() or "[]")
                    where = f"{path}:{reader.line_num}"
                    yield where, row["code_str"], cases, row["data_source"]
                else:
                    dropped[f"language {row['language']!r}"] += 1
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{reader.line_num}: test_cases_str: {error.msg}") from None
        except (csv.Error, ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{reader.line_num}: {error}") from None


def _check_cases(cases, where):
    if not isinstance(cases, list):
        raise ValueError(f"{where}: the inputs must be a list of cases")
    for number, case in enumerate(cases):
        given = case.get("input") if isinstance(case, dict) else None
        if not isinstance(given, (str, list, dict)):
            raise ValueError(f'{where}: case {number} needs "input": a string, list or object')
        if not isinstance(given, str) and not isinstance(case.get("func_name"), str):
            raise ValueError(f'{where}: case {number} is a call and needs "func_name"')


TOKEN = re.compile(r"""\w+ | \#[^\n]*
  | \"\"\" (?: [^"\\] | \\. | "(?!"") )* (?: \"\"\" | \Z )      # an open string runs to the end,
  | \'\'\' (?: [^'\\] | \\. | '(?!'') )* (?: \'\'\' | \Z )      # so nothing is scanned twice
  | " (?: [^"\\\n] | \\. )* "? | ' (?: [^'\\\n] | \\. )* '? | \S""", re.VERBOSE | re.DOTALL)


def trigram_bags(codes):
    """Each code's multiset of token trigrams -> list of lists of ints, rarest of the corpus first.

    The n-th copy of a trigram in a code is an element of its own, which makes multisets sets.
    """
    numbers, bags = {}, []
    for code in codes:
        tokens = ["", ""] + [token for token in TOKEN.findall(code) if token[0] != "#"]
        copies = Counter()
        bags.append([])
        for gram in zip(tokens, tokens[1:], tokens[2:]):
            copies[gram] += 1
            element = gram if copies[gram] == 1 else (gram, copies[gram])
            bags[-1].append(numbers.setdefault(element, len(numbers)))
    frequency = [0] * len(numbers)
    for bag in bags:
        for element in bag:
            frequency[element] += 1
    rank = [0] * len(numbers)
    for place, element in enumerate(sorted(range(len(numbers)), key=frequency.__getitem__)):
        rank[element] = place
    return [sorted(rank[element] for element in bag) for bag in bags]


def similar_pairs(bags, threshold):
    """All pairs of `bags` with |A & B| / |A | B| >= threshold -> list of (i, j, similarity).

    Exact, by the two filters of set-similarity joins. Length: y, the smaller of two similar bags,
    has at least threshold * |x| elements. Prefix: they share at least o elements, so one of the
    |x| - o + 1 rarest of x is one of the |y| - o + 1 rarest of y; o >= threshold * |x|, and
    o >= 2 * threshold / (1 + threshold) * |y| as x is larger. These candidates are counted in full.
    """
    def rarest(bag, share):
        return bag[:len(bag) + 1 - math.ceil(share * len(bag) - 1e-9)]

    sets = [frozenset(bag) for bag in bags]
    index, pairs = defaultdict(list), []
    for x in sorted(range(len(bags)), key=lambda i: len(bags[i])):
        candidates = set()
        for element in rarest(bags[x], threshold):
            candidates.update(index[element])
        for y in candidates:
            if len(bags[y]) >= threshold * len(bags[x]) - 1e-9:
                shared = len(sets[x] & sets[y])
                similarity = shared / (len(bags[x]) + len(bags[y]) - shared)
                if similarity >= threshold:
                    pairs.append((y, x, similarity))
        for element in rarest(bags[x], 2 * threshold / (1 + threshold)):
            index[element].append(x)
    return pairs


def maximum_clique(neighbors):
    """A largest set of vertices that are all joined to each other -> sorted list of vertices.

    neighbors[v] is a Python int whose bit w says that v and w are joined. Exact. A bit past the
    last vertex, a vertex joined to itself or an edge in one direction only is a ValueError.
    """
    for v, row in enumerate(neighbors):
        if row < 0 or row >> len(neighbors):
            raise ValueError(f"neighbors[{v}] has a bit past the last vertex, {len(neighbors) - 1}")
        if row >> v & 1:
            raise ValueError(f"neighbors[{v}] joins vertex {v} to itself: clear its bit {v}")
        for w in _vertices(row):
            if not neighbors[w] >> v & 1:
                raise ValueError(f"neighbors[{v}] has vertex {w}, but neighbors[{w}] lacks {v}")
    return _search(neighbors, math.inf)[0]


def _search(neighbors, budget):
    """Maximum clique by Bron-Kerbosch with bounds -> (sorted clique, upper bound of the largest).

    Bron-Kerbosch grows a clique by candidates that are joined to all of it. By its pivot rule it
    branches only on a set of candidates of which every clique worth finding must have one. Here
    that is what a colouring leaves over: k classes of vertices not joined to each other hold at
    most k of any clique, so one larger than the best has a vertex outside the first
    k = |best| - |clique| classes. Vertices are renumbered in degeneracy order, and the sparsest
    are branched on first, which leaves few candidates; classes are filled from the dense core.
    `budget` counts coloured vertices, not seconds: the result is the same on every machine.
    """
    order = _degeneracy_order(neighbors)
    number = {v: i for i, v in enumerate(order)}
    everyone = (1 << len(order)) - 1
    joined = [sum(1 << number[w] for w in _vertices(neighbors[v])) for v in order]
    apart = [everyone ^ row ^ 1 << v for v, row in enumerate(joined)]
    best, rest = [], everyone
    while rest:                                             # a first clique, greedily
        best.append(rest.bit_length() - 1)
        rest &= joined[best[-1]]
    clique, candidates = [], [everyone]                     # stacks, so that nothing recurses
    branches = [_uncoloured(everyone, len(best), apart)]
    while budget > 0:
        first = branches[-1] & -branches[-1]                # its lowest bit
        if first:
            clique.append(first.bit_length() - 1)
            branches[-1] ^= first
            candidates[-1] ^= first
            candidates.append(candidates[-1] & joined[clique[-1]])
            if not candidates[-1] and len(clique) > len(best):
                best = clique.copy()
            branches.append(_uncoloured(candidates[-1], len(best) - len(clique), apart))
            budget -= candidates[-1].bit_count()
        elif clique:
            clique.pop(), candidates.pop(), branches.pop()
        else:
            return sorted(order[v] for v in best), len(best)
    left, classes = candidates[0] | sum(1 << v for v in clique[:1]), 0
    while left:
        left, classes = _uncoloured(left, 1, apart), classes + 1
    return sorted(order[v] for v in best), max(len(best), classes)


def _uncoloured(vertices, classes, apart):
    """What of `vertices` is left after greedily filling so many classes of vertices not joined."""
    for _ in range(classes):
        free = vertices
        while free:
            v = free.bit_length() - 1
            vertices ^= 1 << v
            free &= apart[v]
    return vertices


def _degeneracy_order(neighbors):
    """The vertices, each the one with the fewest neighbours among those that are left."""
    degree = [row.bit_count() for row in neighbors]
    buckets = [[] for _ in neighbors]
    for v, d in enumerate(degree):
        buckets[d].append(v)
    order, left, d = [], (1 << len(neighbors)) - 1, 0
    while left:
        while not buckets[d]:
            d += 1
        v = buckets[d].pop()
        if left >> v & 1 and degree[v] == d:                # else an entry of before
            order.append(v)
            left ^= 1 << v
            for w in _vertices(neighbors[v] & left):
                degree[w] -= 1
                buckets[degree[w]].append(w)
            d = max(d - 1, 0)
    return order


def _vertices(bits):
    while bits:
        lowest = bits & -bits
        yield lowest.bit_length() - 1
        bits ^= lowest


def _independent_set(adjacent, budget):
    """A largest set of vertices no two of which are adjacent -> (set, upper bound of the largest).

    adjacent: {vertex: set of vertices}, used up.
    """
    kept, folds, todo = set(), [], sorted(adjacent, reverse=True)

    def remove(v):
        for w in adjacent.pop(v):
            adjacent[w].discard(v)
            todo.append(w)

    while todo:
        u = todo.pop()
        if u not in adjacent:
            continue
        for v in sorted(adjacent[u], reverse=True):     # whoever keeps v can as well keep u instead
            if len(adjacent[u]) <= len(adjacent[v]) and adjacent[u] <= adjacent[v] | {v}:
                remove(v)
        if not adjacent[u]:
            kept.add(u)
            del adjacent[u]
        elif len(adjacent[u]) == 2:     # a, b, not adjacent: the best keeps both, or u and neither
            a, b = adjacent[u]
            folds.append((u, a, b))
            around = (adjacent[a] | adjacent[b]) - {u}
            remove(a), remove(b)
            for w in around:
                adjacent[w].add(u)
            adjacent[u] = around        # u now stands for a and b
            todo.append(u)
    bound = len(kept) + len(folds)
    for part in _components(adjacent):
        number = {v: i for i, v in enumerate(part)}
        everyone = (1 << len(part)) - 1
        differ = [everyone ^ 1 << i ^ sum(1 << number[w] for w in adjacent[v])
                  for i, v in enumerate(part)]
        clique, most = _search(differ, budget)
        kept.update(part[i] for i in clique)
        bound += most
    for u, a, b in reversed(folds):
        kept ^= {u, a, b} if u in kept else {u}
    return kept, bound


def _components(adjacent):
    """The connected components of {vertex: set of vertices} -> list of sorted lists."""
    components, seen = [], set()
    for start in sorted(adjacent):
        if start not in seen:
            seen.add(start)
            component = [start]
            for v in component:
                component += (new := adjacent[v] - seen)
                seen |= new
            components.append(sorted(component))
    return components


def curate(snippets, threshold=0.5, *, budget=20_000_000, summary=None):
    """A largest set of snippets no two of which are alike -> list[Snippet], in input order.

    Copies collapse first. Of equally large sets, one-for-one swaps prefer the snippet alike to the
    most others, for which it then stands, then the longer, then the one with more inputs, whatever
    the order of the input. `budget` bounds the search of one component, as in `_search`;
    `summary`, a dictionary, is told counts and an upper bound of what any method could keep.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}; it must be above 0 and at most 1")
    snippets = list(snippets)
    bags = trigram_bags(snippet.code for snippet in snippets)
    distinct = {}
    for i in sorted(range(len(snippets)), key=lambda i: (
            -len(bags[i]), -len(snippets[i].inputs), snippets[i].code, repr(snippets[i]))):
        distinct.setdefault(tuple(bags[i]), i)
    pairs = [(i, j, s) for i, j, s in similar_pairs(list(map(list, distinct)), threshold)]
    degree = Counter(v for pair in pairs for v in pair[:2])
    by_rank = sorted(range(len(distinct)), key=lambda v: -degree[v])
    rank = {v: r for r, v in enumerate(by_rank)}
    adjacent = {r: set() for r in range(len(distinct))}
    for a, b, _ in pairs:
        adjacent[rank[a]].add(rank[b])
        adjacent[rank[b]].add(rank[a])
    kept, components = set(), []
    for component in _components(adjacent):
        chosen, bound = _independent_set({v: adjacent[v].copy() for v in component}, budget)
        kept |= chosen
        components.append((len(component), len(chosen), bound))
    todo = sorted(adjacent, reverse=True)
    while todo:                                             # each swap lowers the sum of the ranks
        v = todo.pop()
        rivals = adjacent[v] & kept
        if v not in kept and len(rivals) == 1 and v < min(rivals):
            kept ^= rivals | {v}
            todo += adjacent[min(rivals)]
    if summary is not None:
        summary.update(copies=len(snippets) - len(distinct), components=components,
                       similarities=[s for _, _, s in pairs])
    chosen = list(distinct.values())
    return [snippets[i] for i in sorted(chosen[by_rank[r]] for r in kept)]


def _save(path, write):
    """Call write(temporary name), and make the file whole and durable before it gets its name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _draw(path, components, similarities):
    import matplotlib
    matplotlib.use("agg")
    from matplotlib import pyplot
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    left.hist(similarities, bins=50)
    left.set(xlabel="similarity", ylabel="similar pairs in the input")
    for label, column in ("before", 0), ("kept", 1):
        counts = Counter(row[column] for row in components)
        right.loglog(sorted(counts), [counts[size] for size in sorted(counts)], "o", label=label)
    right.set(xlabel="snippets in a component", ylabel="components")
    right.legend()
    _save(path, lambda name: figure.savefig(name, format="png"))


def main():
    parser = argparse.ArgumentParser(description="Keep a largest set of snippets, no two alike.")
    parser.add_argument("snippets", metavar="IN", type=Path, help=".jsonl, official .csv, or .py folder")
    parser.add_argument("--out", type=Path, required=True, help="JSONL of the snippets kept")
    parser.add_argument("--threshold", type=float, default=0.5, help="least similarity that is alike")
    parser.add_argument("--report", type=Path, help="PNG of similarities and component sizes")

    def fail(message):
        print(f"curate.py: {message}", file=sys.stderr)
        sys.exit(2)

    parser.error = fail
    options = parser.parse_args()
    began, dropped, summary = time.monotonic(), Counter(), {}
    try:
        snippets = load_snippets(options.snippets, dropped=dropped)
        print(f"in          {len(snippets)} snippets, dropped: {dict(dropped) or 'none'}", flush=True)
        kept = curate(snippets, options.threshold, summary=summary)
        rows = "".join(json.dumps(vars(snippet)) + "\n" for snippet in kept)
        _save(options.out, lambda name: name.write_text(rows, encoding="utf-8"))
        if options.report:
            _draw(options.report, summary["components"], summary["similarities"])
    except ImportError:
        fail("--report needs matplotlib: pip install matplotlib")
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}")
    except ValueError as error:
        fail(error)
    components = summary["components"]
    gap = sum(bound - size for _, size, bound in components)
    print(f"copies      {summary['copies']}")
    print(f"pairs       {len(summary['similarities'])} at or above {options.threshold}")
    print(f"components  {len(components)}, largest {max(components, default=[0])[0]}")
    print(f"kept        {len(kept)}, {f'at most {gap} below the maximum' if gap else 'exact'}")
    print(f"seconds     {time.monotonic() - began:.1f}")


if __name__ == "__main__":
    main()
