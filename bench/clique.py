"""Exact maximum clique side by side: ours, networkx's two, igraph and networkit where installed.

    python -m bench.clique [--seconds 60] [--snippets FILE] [--sizes 400 2000]

Random graphs G(n, p), then code graphs: snippets (by default functions of the standard library)
joined where they are *not* alike, as the paper has it. `curate` is our way around the dense graph:
reductions and components of its complement. Each solver runs in a process of its own, and is
stopped after --seconds; times are of the solver alone, on a graph already in its own format.
"""
import argparse
import ast
import itertools
import multiprocessing
import random
import sysconfig
import time
from pathlib import Path

import networkx

import curate


def ours(n, edges):
    neighbors = [0] * n
    for a, b in edges:
        neighbors[a] |= 1 << b
        neighbors[b] |= 1 << a
    return lambda: len(curate.maximum_clique(neighbors))


def ours_by_components(n, edges):
    joined = set(edges)
    adjacent = {v: set() for v in range(n)}
    for a, b in itertools.combinations(range(n), 2):
        if (a, b) not in joined:
            adjacent[a].add(b)
            adjacent[b].add(a)
    return lambda: len(curate.independent_set(adjacent, float("inf"))[0])


def networkx_graph(n, edges):
    graph = networkx.Graph(edges)
    graph.add_nodes_from(range(n))
    return graph


def networkx_find(n, edges):
    graph = networkx_graph(n, edges)
    return lambda: max(map(len, networkx.find_cliques(graph)))


def networkx_weight(n, edges):
    graph = networkx_graph(n, edges)
    return lambda: networkx.max_weight_clique(graph, weight=None)[1]


def igraph_number(n, edges):
    import igraph
    graph = igraph.Graph(n, edges)
    return graph.clique_number


def networkit_maximum(n, edges):
    import networkit
    graph = networkit.Graph(n)
    for a, b in edges:
        graph.addEdge(a, b)

    def run():
        search = networkit.clique.MaximalCliques(graph, maximumOnly=True)
        search.run()
        return len(search.getCliques()[0])
    return run


SOLVERS = {"ours": ours, "ours, curate": ours_by_components, "networkx find": networkx_find,
           "networkx weight": networkx_weight, "igraph": igraph_number,
           "networkit": networkit_maximum}


def child(pipe, build, n, edges):
    try:
        solve = build(n, edges)
    except ImportError:
        pipe.send("not installed")
        return
    pipe.send("ready")
    start = time.perf_counter()
    try:
        size = solve()
    except RecursionError:              # networkx recurses once a vertex of the clique
        pipe.send("RecursionError")
    else:
        pipe.send(f"{time.perf_counter() - start:.3f} s ({size})")


def timed(build, n, edges, limit):
    """"SECONDS (SIZE)" of one solver in a process of its own, or why there is none."""
    here, there = multiprocessing.Pipe()
    context = multiprocessing.get_context("fork")
    process = context.Process(target=child, args=(there, build, n, edges))
    process.start()
    answer = here.recv()
    if answer == "ready":
        answer = here.recv() if here.poll(limit) else f"> {limit:.0f} s"
    process.kill()
    process.join()
    return answer


def row(name, n, edges, limit):
    cells = [timed(build, n, edges, limit) for build in SOLVERS.values()]
    print(f"{name:>18} " + " ".join(f"{cell:>17}" for cell in cells), flush=True)


def library_functions():
    """Functions of six lines and more from the standard library, in a fixed random order."""
    codes = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        codes += [code for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)
                  if (code := ast.get_source_segment(text, node)).count("\n") > 5]
    random.Random(0).shuffle(codes)
    return codes


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60, help="limit of a solver on a graph")
    parser.add_argument("--snippets", help="what the code graphs are of, else library functions")
    parser.add_argument("--sizes", type=int, nargs="*", default=[400, 2000], help="of code graphs")
    options = parser.parse_args()
    print(" " * 19 + " ".join(f"{name:>17}" for name in SOLVERS))
    rng = random.Random(0)
    for n, p in ((200, 0.1), (200, 0.5), (200, 0.7), (200, 0.8), (500, 0.1), (500, 0.5),
                 (1000, 0.01), (1000, 0.1), (1000, 0.3)):
        edges = [edge for edge in itertools.combinations(range(n), 2) if rng.random() < p]
        row(f"G({n}, {p})", n, edges, options.seconds)
    codes = library_functions()
    if options.snippets:
        codes = [snippet.code for snippet in curate.load_snippets(options.snippets)]
    for n in options.sizes:
        alike = curate.similar_pairs(curate.trigram_bags(codes[:n]), 0.5)
        alike = {(min(a, b), max(a, b)) for a, b, _ in alike}
        edges = [edge for edge in itertools.combinations(range(n), 2) if edge not in alike]
        row(f"code, {n}", n, edges, options.seconds)


if __name__ == "__main__":
    main()
