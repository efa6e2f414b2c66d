"""Read code snippets, and keep a largest set of them in which no two are alike.

    python curate.py IN --out OUT.jsonl --threshold 0.5
"""
import codecs
import csv
import json
import tokenize
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path


# ---- Reading snippets ---------------------------------------------------------------------------

@dataclass(frozen=True)
class Snippet:
    """One program and what to run it on."""
    code: str                                           # newlines are "\n", no byte order mark
    inputs: list[dict] = field(default_factory=list)    # cases; empty: run the program as it is
    source: str = ""                                    # its family: data source, or file name


def load_snippets(path, *, min_lines=0, min_chars=0, max_bytes=1_000_000, dropped=None):
    """Read a .jsonl file, the official .csv, a .py file or a folder of them -> list[Snippet].

    Order is the file's, or the sorted relative paths' of a folder. By itself it keeps every
    readable row; `min_lines` counts lines that aren't blank, `min_chars` characters without outer
    blanks. Files of a folder that are binary, undecodable or larger than `max_bytes` are skipped,
    and so are rows of the CSV in another language; `dropped`, a Counter, is told how many and why.
    A missing path or a malformed row is a ValueError of one line that names the file and line.
    """
    path = Path(path)
    dropped = Counter() if dropped is None else dropped
    if path.is_dir():
        rows = _read_folder(path, max_bytes, dropped)
    elif not path.is_file():
        raise ValueError(f"{path}: no such file or folder of snippets")
    elif path.suffix == ".py":
        rows = [(_read_python(path, max_bytes), [], path.name)]
    else:
        rows = _read_csv(path, dropped) if path.suffix.lower() == ".csv" else _read_jsonl(path)
    snippets = []
    for code, inputs, source in rows:
        # Python's own tokenizer reads \r\n and \r as \n, inside string literals too.
        code = code.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
        if sum(not line.isspace() for line in code.split("\n") if line) < min_lines:
            dropped[f"fewer than {min_lines} lines"] += 1
        elif len(code.strip()) < min_chars:
            dropped[f"fewer than {min_chars} characters"] += 1
        else:
            snippets.append(Snippet(code, inputs, source))
    return snippets


def _read_folder(path, max_bytes, dropped):
    """Yield (code, [], relative path) of each usable .py file below `path`."""
    for file in sorted(path.rglob("*.py")):
        if file.is_file():
            try:
                yield _read_python(file, max_bytes), [], file.relative_to(path).as_posix()
            except ValueError as error:
                dropped[str(error).removeprefix(f"{file}: ")] += 1


def _read_python(path, max_bytes):
    """The text of a .py file, or a ValueError that says why it can't be had."""
    try:
        if path.stat().st_size > max_bytes:
            raise ValueError(f"{path}: larger than {max_bytes} bytes")
        if b"\0" in path.read_bytes():
            raise ValueError(f"{path}: binary file")
        with tokenize.open(path) as file:       # honours a BOM and "# coding:" as Python does
            return file.read()
    except (UnicodeError, SyntaxError, LookupError):
        raise ValueError(f"{path}: not in the encoding that it declares") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None


def _read_jsonl(path):
    """Yield (code, inputs, source) of each row that isn't blank."""
    with open(path, "rb") as file:      # bytes, so that a line that doesn't decode has its number
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: not JSON: {getattr(error, 'msg', error)}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{where}: a row is a JSON object, not {type(row).__name__}")
            if not isinstance(row.get("code"), str):
                raise ValueError(f'{where}: "code" is missing or not a string')
            source = row.get("source", path.name)
            if not isinstance(source, str):
                raise ValueError(f'{where}: "source" is not a string')
            yield row["code"], _check_cases(row.get("inputs", []), f'{where}: "inputs"'), source


def _read_csv(path, dropped):
    """Yield (code, inputs, source) of each Python row of a CSV with the official columns.

    `use_stdin` and `is_executable` aren't needed: a case's own type says how it is run, and
    running it says whether it can be.
    """
    csv.field_size_limit(2**31 - 1)     # the default refuses a field above 128 KiB
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for name in ("data_source", "language", "code_str", "test_cases_str"):
                if name not in (reader.fieldnames or ()):
                    raise ValueError(f"{path}:1: the header has no column {name!r}")
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    raise ValueError(f"{where}: a row needs {len(reader.fieldnames)} fields, "
                                     "as the header has")
                if not row["language"].lower().startswith("python"):
                    dropped[f"language {row['language']!r}"] += 1
                    continue
                try:
                    cases = json.loads(row["test_cases_str"].strip() or "[]")
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{where}: test_cases_str is not JSON: {getattr(error, 'msg', error)}") from None
                yield row["code_str"], _check_cases(cases, f"{where}: test_cases_str"), \
                    row["data_source"]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 after line {reader.line_num}: {error}") from None
        except csv.Error as error:
            raise ValueError(f"{path}:{reader.line_num}: not CSV: {error}") from None


def _check_cases(cases, where):
    """Return `cases`, a list of {"input": str} or {"input": list or dict, "func_name": str}."""
    if not isinstance(cases, list):
        raise ValueError(f"{where} is not a list of cases")
    for number, case in enumerate(cases):
        if not isinstance(case, dict) or not isinstance(case.get("input"), (str, list, dict)):
            raise ValueError(f'{where}[{number}] is not an object whose "input" is a string, '
                             "a list or an object")
        if not isinstance(case["input"], str) and not isinstance(case.get("func_name"), str):
            raise ValueError(f'{where}[{number}] calls a function and needs "func_name"')
    return cases
