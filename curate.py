"""Read code snippets, and keep a largest set of them in which no two are alike.

    python curate.py IN --out OUT.jsonl --threshold 0.5 [--report out.png]

The paper's curation joins snippets that differ and takes a maximum clique of each chunk of 400.
Here the whole corpus is solved: the complement of that graph, which joins snippets that are alike,
is sparse and falls apart into components. A maximum independent set of each, a maximum clique of
its complement, is exact unless it outgrows its budget; then the gap is bounded and told.

Alike means |A & B| / |A | B| >= threshold over multisets of token trigrams, without comments and
blanks: 1,000 pairs of library functions rank as by difflib's character ratio (Spearman 0.94, lines
0.88), and 0.5 here lies near 0.8 there. Code with all its identifiers renamed isn't recognised.
"""
import argparse
import csv
import json
import math
import os
import re
import time
import tokenize
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Snippet:
    """One program and what to run it on."""
    code: str                                           # newlines are "\n", no byte order mark
    inputs: list[dict] = field(default_factory=list)    # cases; empty: run the program as it is
    source: str = ""                                    # its family: data source, or file name


def load_snippets(path, *, min_lines=0, min_chars=0, max_bytes=1_000_000, dropped=None):
    """Read the official .csv, a .py file, a folder of them, or else JSONL -> list[Snippet].

    By itself it keeps every readable row; `min_lines` is of lines that aren't blank. Unusable files
    of a folder and CSV rows in another language are skipped, and counted by reason in `dropped`, a
    Counter. A missing path or a malformed row is a ValueError of one line.
    """
    path, dropped = Path(path), Counter() if dropped is None else dropped
    if not path.is_dir() and not path.is_file():
        raise ValueError(f"{path}: no such file or folder of snippets")
    if path.is_dir() or path.suffix == ".py":
        rows = _read_python(path, max_bytes, dropped)
    else:
        rows = _read_csv(path, dropped) if path.suffix.lower() == ".csv" else _read_jsonl(path)
    snippets = []
    for where, code, cases, source in rows:
        if not isinstance(code, str) or not isinstance(source, str):
            raise ValueError(f"{where}: code and source must be there as strings")
        for given in cases if isinstance(cases, list) else [None]:
            match given:
                case {"input": str()} | {"input": list() | dict(), "func_name": str()}:
                    continue
            raise ValueError(f'{where}: inputs must be a list of {{"input": string}} or '
                             '{"input": list or object, "func_name": string}')
        # Python's own tokenizer reads \r\n and \r as \n, inside string literals too.
        code = code.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
        lines = [line for line in code.split("\n") if line.strip()]
        if len(lines) >= min_lines and len(code.strip()) >= min_chars:
            snippets.append(Snippet(code, cases, source))
        else:
            dropped[f"under {min_lines} lines or {min_chars} characters"] += 1
    return snippets


def _read_python(path, max_bytes, dropped):
    for file in sorted(filter(Path.is_file, path.rglob("*.py"))) if path.is_dir() else [path]:
        try:
            if file.stat().st_size > max_bytes or b"\0" in file.read_bytes():
                raise ValueError(f"binary, or above {max_bytes} bytes")
            with tokenize.open(file) as text:           # heeds "# coding:" and a byte order mark
                code = text.read()
            yield file, code, [], file.relative_to(path).as_posix() if file != path else file.name
        except (OSError, SyntaxError, ValueError) as error:
            if file == path:
                raise ValueError(f"{path}: {error}") from None
            dropped[str(error) if type(error) is ValueError else type(error).__name__] += 1


def _read_jsonl(path):
    with open(path, "rb") as file:      # bytes, so that a line that doesn't decode has its number
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    get = json.loads(line).get
                except (AttributeError, ValueError, RecursionError) as error:
                    raise ValueError(f"{path}:{number}: not a JSON object: {error}") from None
                yield f"{path}:{number}", get("code"), get("inputs", []), get("source", path.name)


def _read_csv(path, dropped):
    # Of the other columns, use_stdin is told by a case's type, is_executable by running it.
    csv.field_size_limit(2**31 - 1)     # the default refuses a field above 128 KiB
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            needed = {"data_source", "language", "code_str", "test_cases_str"}
            if not needed <= set(reader.fieldnames or ()):
                raise ValueError(f"the header must have the columns {', '.join(sorted(needed))}")
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError("a row must have as many fields as the header")
                if row["language"].lower().startswith("python"):
                    cases = json.loads(row["test_cases_str"].strip() or "[]")
                    yield f"{path}:{reader.line_num}", row["code_str"], cases, row["data_source"]
                else:
                    dropped[f"language {row['language']}"] += 1
        except (csv.Error, ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{reader.line_num}: {error}") from None


TOKEN = re.compile(r"""\w+ | \#[^\n]*
  | \"\"\" (?: [^"\\] | \\. | "(?!"") )* (?: \"\"\" | \Z )      # an open string runs to the end,
  | \'\'\' (?: [^'\\] | \\. | '(?!'') )* (?: \'\'\' | \Z )      # so nothing is scanned twice
  | " (?: [^"\\\n] | \\. )* "? | ' (?: [^'\\\n] | \\. )* '? | \S""", re.VERBOSE | re.DOTALL)


def trigram_bags(codes):
    """Each code's multiset of token trigrams -> list of lists of ints, the rarest in all first."""
    numbers, bags = {}, []
    for code in codes:
        tokens = ["", ""] + [token for token in TOKEN.findall(code) if token[0] != "#"]
        copies = Counter(zip(tokens, tokens[1:], tokens[2:]))
        bags.append([numbers.setdefault((gram, n), len(numbers))    # each copy is an element
                     for gram, count in copies.items() for n in range(count)])
    frequency = Counter(element for bag in bags for element in bag)
    rank = {element: i for i, element in enumerate(sorted(frequency, key=frequency.get))}
    return [sorted(rank[element] for element in bag) for bag in bags]


def similar_pairs(bags, threshold):
    """All pairs of `bags` with |A & B| / |A | B| >= threshold -> list of (i, j, similarity).

    Exact. x, the larger of two such bags, shares o >= threshold * |x| elements with y. So y has at
    least o, and one of the |x| - o + 1 rarest of x is among the |y| - o + 1 rarest of y: an index
    of the rarest elements gives the candidates, which are then counted in full.
    """
    sets = [frozenset(bag) for bag in bags]
    index, pairs = defaultdict(list), []                    # element -> smaller bags that have it
    for x in sorted(range(len(bags)), key=lambda i: len(bags[i])):
        least = math.ceil(threshold * len(bags[x]) - 1e-9)
        rarest = bags[x][:len(bags[x]) - least + 1]
        for y in {y for element in rarest for y in index[element] if len(bags[y]) >= least}:
            shared = len(sets[x] & sets[y])
            similarity = shared / (len(bags[x]) + len(bags[y]) - shared)
            if similarity >= threshold:
                pairs.append((y, x, similarity))
        for element in rarest:
            index[element].append(x)
    return pairs


def maximum_clique(neighbors):
    """A largest set of vertices that are all joined to each other -> sorted list of vertices.

    neighbors[v] is an int whose bit w says that v and w are joined. Exact. A bit past the last
    vertex, a vertex joined to itself or an edge in one direction only is a ValueError.
    """
    for v, row in enumerate(neighbors):
        if row < 0 or row >> len(neighbors) or row >> v & 1:
            raise ValueError(f"neighbors[{v}] has a bit that is not of another vertex")
    width = len(neighbors) // 8 + 1
    data = b"".join(row.to_bytes(width, "little") for row in neighbors)
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    joined = bits.reshape(len(neighbors), 8 * width)[:, :len(neighbors)]        # (V, V) of 0 and 1
    for v, w in np.argwhere(joined > joined.T)[:1]:
        raise ValueError(f"neighbors[{v}] has vertex {w}, but neighbors[{w}] lacks {v}")
    return _search(joined, math.inf)[0]


def _search(joined, budget):
    """Maximum clique by Bron-Kerbosch with bounds -> (sorted clique, upper bound of the largest).

    Bron-Kerbosch grows a clique by candidates joined to all of it. By its pivot rule it branches
    only on a set of candidates of which every clique worth finding has one. Here that is what a
    colouring leaves: k classes of vertices not joined to each other hold at most k of any clique,
    so one larger than the best has a vertex outside the first k = |best| - |clique| classes.
    In degeneracy order the sparsest vertices are branched on first, which leaves few candidates;
    classes are filled from the dense core. `joined` is a symmetric (V, V) matrix; `budget` counts
    coloured vertices, some millions a second: the result is the same on every machine.
    """
    order, degree = [], joined.sum(1, dtype=np.int64)
    for _ in joined:
        order.append(int(degree.argmin()))
        degree -= joined[order[-1]]
        degree[order[-1]] = 2 * len(joined)                 # past the degree of any that is left
    packed = np.packbits(joined[np.ix_(order, order)], axis=1, bitorder="little")
    joined = [int.from_bytes(row.tobytes(), "little") for row in packed]
    everyone = (1 << len(order)) - 1
    apart = [everyone ^ row ^ 1 << v for v, row in enumerate(joined)]
    best, rest = [], everyone
    while rest:                                             # a first clique, greedily
        best.append(rest.bit_length() - 1)
        rest &= joined[best[-1]]
    clique, candidates = [], [everyone]                     # stacks, so that nothing recurses
    branches = [_uncoloured(everyone, len(best), apart)]
    while (branches[-1] or clique) and budget > 0:
        first = branches[-1] & -branches[-1]                # its lowest bit
        if not first:
            clique.pop(), candidates.pop(), branches.pop()
            continue
        clique.append(first.bit_length() - 1)
        branches[-1] ^= first
        candidates[-1] ^= first
        candidates.append(candidates[-1] & joined[clique[-1]])
        if not candidates[-1] and len(clique) > len(best):
            best = clique.copy()
        branches.append(_uncoloured(candidates[-1], len(best) - len(clique), apart))
        budget -= candidates[-1].bit_count()
    left, bound = candidates[0] | sum(1 << v for v in clique[:1]), 0
    while left and budget <= 0:                             # cut short: colour what wasn't searched
        left, bound = _uncoloured(left, 1, apart), bound + 1
    return sorted(order[v] for v in best), max(len(best), bound)


def _uncoloured(vertices, classes, apart):
    """What of `vertices` is left after greedily filling so many classes of vertices not joined."""
    for _ in range(min(classes, vertices.bit_count())):
        free = vertices
        while free:
            v = free.bit_length() - 1
            vertices ^= 1 << v
            free &= apart[v]
    return vertices


def independent_set(adjacent, budget):
    """A largest set of vertices no two of which are adjacent -> (set, upper bound of the largest).

    adjacent: {vertex: set of vertices}. If u and its neighbours are all neighbours of v, whoever
    keeps v may keep u instead, so v goes: it solves 999 of 1,000 components of library functions.
    """
    adjacent = {v: row.copy() for v, row in adjacent.items()}
    todo = sorted(adjacent, reverse=True)
    while todo:
        u = todo.pop()
        for v in sorted(adjacent.get(u, ()), reverse=True):
            if len(adjacent[u]) <= len(adjacent[v]) and adjacent[u] <= adjacent[v] | {v}:
                for w in adjacent.pop(v):
                    adjacent[w].discard(v)
                    todo.append(w)
    kept, bound = set(), 0
    for part in components(adjacent):
        differ = np.array([[v != w and v not in adjacent[w] for w in part] for v in part])
        clique, most = _search(differ, budget)
        kept.update(part[i] for i in clique)
        bound += most
    return kept, bound


def components(adjacent):
    """The connected components of {vertex: set of vertices} -> list of sorted lists."""
    found, seen = [], set()
    for start in adjacent:
        if start not in seen:
            component = [start]
            seen.add(start)
            for v in component:
                component += adjacent[v] - seen
                seen |= adjacent[v]
            found.append(sorted(component))
    return found


def curate(snippets, threshold=0.5, *, budget=20_000_000, summary=None):
    """A largest set of snippets no two of which are alike -> list[Snippet], in input order.

    Of two that exclude each other the longer tends to stay, then the one with more inputs, whatever
    the order of the input. `budget` bounds the search of a component (`_search`); `summary`, a
    dictionary, is told counts, and the most that any method could keep.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}; it must be above 0 and at most 1")
    bags = trigram_bags(snippet.code for snippet in snippets)
    distinct = {}                                           # copies collapse
    for i in sorted(range(len(snippets)), key=lambda i: (
            -len(bags[i]), -len(snippets[i].inputs), snippets[i].code, repr(snippets[i]))):
        distinct.setdefault(tuple(bags[i]), i)
    pairs = sorted(similar_pairs(list(distinct), threshold))
    adjacent = {v: set() for v in range(len(distinct))}
    for a, b, _ in pairs:
        adjacent[a].add(b)
        adjacent[b].add(a)
    kept, bound = independent_set(adjacent, budget)
    if summary is not None:
        summary.update(copies=len(snippets) - len(distinct), upper_bound=bound, kept=kept,
                       components=components(adjacent), similarities=[s for _, _, s in pairs])
    return [snippets[i] for i in sorted(i for v, i in enumerate(distinct.values()) if v in kept)]


def _save(path, write):
    """Have `write` fill a file of another name, which becomes `path` once it is on the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _draw(path, components, kept, similarities):
    from matplotlib.figure import Figure
    left, right = Figure(figsize=(9, 3.5), layout="constrained").subplots(1, 2)
    left.hist(similarities, bins=50)
    left.set(xlabel="similarity", ylabel="similar pairs in the input")
    before = [len(part) for part in components]
    after = [len(kept.intersection(part)) for part in components]
    right.hist([before, after], bins=30, log=True, label=["before", "after"])
    right.set(xlabel="snippets in a component", ylabel="components")
    right.legend()
    _save(path, lambda name: left.figure.savefig(name, format="png"))


def main():
    parser = argparse.ArgumentParser(description="Keep a largest set of snippets, no two alike.")
    parser.add_argument("snippets", metavar="IN", help="JSONL, official CSV, .py or folder of .py")
    parser.add_argument("--out", type=Path, required=True, help="JSONL of the snippets kept")
    parser.add_argument("--threshold", type=float, default=0.5, help="from where two are alike")
    parser.add_argument("--report", type=Path, help="PNG of similarities and component sizes")
    fail = parser.error = lambda message: parser.exit(2, f"curate.py: {message}\n")
    options = parser.parse_args()
    if options.out.suffix in (".csv", ".py"):
        fail(f"--out {options.out}: it is JSONL, and this name would be read as something else")
    start, dropped, told = time.monotonic(), Counter(), {}
    try:
        snippets = load_snippets(options.snippets, dropped=dropped)
        print(f"in          {len(snippets)}, dropped {dict(dropped) or 'none'}", flush=True)
        kept = curate(snippets, options.threshold, summary=told)
        rows = "".join(json.dumps(vars(snippet)) + "\n" for snippet in kept)
        _save(options.out, lambda name: name.write_text(rows))      # ASCII, by json's escapes
        if options.report:
            _draw(options.report, told["components"], told["kept"], told["similarities"])
    except (OSError, ValueError, ImportError) as error:
        fail(error)
    gap, sizes = told["upper_bound"] - len(kept), [len(part) for part in told["components"]]
    print(f"alike       {told['copies']} copies, {len(told['similarities'])} pairs, in "
          f"{len(sizes)} components, the largest of {max(sizes, default=0)}")
    print(f"kept        {len(kept)}, {f'at most {gap} below the maximum' if gap else 'exact'}, "
          f"{time.monotonic() - start:.1f} seconds")


if __name__ == "__main__":
    main()
