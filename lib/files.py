"""Files that are whole or not there at all, and JSON lines.

A file is written under a name with .part in it and renamed once it is on the disk, so a process may
be killed at any moment.
"""

import hashlib
import json
import math
import os
import sys
import urllib.request
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

from safetensors import SafetensorError

from lib.flags import UserError, did_you_mean, first_line, name_error


@contextmanager
def writing(path):
    """Turns an error of the disk (full, read-only, gone) into a UserError that names `path`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: torch.save
        raise UserError(
            f"{path}: cannot be written ({first_line(error)}): is the disk full or read-only, or "
            "was a file deleted? What is still there is whole"
        ) from error


def find_model(name) -> str:
    """A model's name as it is, except that models/add is found from any folder. UserError if it can
    only be the name of a folder, and there is no such folder."""
    path = Path(name)
    if path.exists() or not name.startswith((".", "/", "~", "runs/", "models/")):
        return name
    own = Path(__file__).parent.parent / name
    if name.startswith("models/") and own.exists():
        return str(own)
    raise UserError(f"model {name}: there is no such folder{near_folder(path)}")


def near_folder(path):
    """runs/ad -> ': did you mean runs/add?', or ''"""
    siblings = [str(sibling) for sibling in path.parent.glob("*")]
    near = did_you_mean(str(path), siblings)
    return near and f": {near}"


def sync(path):
    """Waits until the content of a file, or the names in a folder, are on the disk."""
    if os.name == "posix":  # Windows cannot open folders
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


@contextmanager
def whole(path):
    """A path beside `path` for a file or folder, which gets the name `path` at the end of the
    block: whoever looks there finds it whole, or not at all. Processes that write the same do not
    meet: each has a path of its own."""
    aside = path.with_name(f"{path.stem}.{os.getpid()}.part{path.suffix}")
    with writing(path):
        yield aside
        sync(aside)
        aside.replace(path)


def write_text(path, text):
    with whole(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path, content):
    write_text(path, json.dumps(content, indent=1) + "\n")


def json_lines(rows):
    """One line of JSON per row, numbers in full: equal runs give equal files."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_rows(path, rows):
    write_text(path, json_lines(rows))


def append_rows(path, rows):
    """Appends to a file that must be there: one deleted meanwhile would lack its first rows."""
    with writing(path), path.open("r+") as file:
        file.seek(0, os.SEEK_END)
        file.write(json_lines(rows))


def read_rows(path, wanted=lambda key: True) -> list[dict]:
    """The rows of a run's own .jsonl file, each with the keys for which wanted(key). No file has
    no rows. UserError names a line that is damaged, or has no "step".

    Only the last line can be cut short (by a kill), and it is left out. A long run reads its own
    metrics again and again. To save memory, lines are read one by one and rows share their keys.
    """
    rows = []
    if not path.exists():
        return rows
    with path.open(errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                break
            try:
                row = json.loads(line)
                range(row["step"])  # is it there, and an integer?
            except Exception as error:  # a damaged line may raise anything
                raise UserError(
                    f"{path}, line {number}: is damaged ({name_error(error)}): mend or delete it"
                ) from None
            rows.append({sys.intern(key): row[key] for key in row if wanted(key)})
    return rows


def read_jsonl(path, fields) -> list[dict]:
    """The rows of a user's file: one JSON object per line, empty lines are skipped.

    fields: {"prompt": is_prompt}; each must be in every row, and its value must pass the check
    UserError names the file and the line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # a byte-order mark is skipped
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}, save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # refuses half a surrogate pair
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{place}: not an object with {' and '.join(fields)}")
        for field, check in fields.items():
            if not check(row.get(field)):
                has = "" if field in row else f": the line has {', '.join(row) or 'nothing'}"
                raise UserError(f'{place}: "{field}" is missing, empty or of the wrong type{has}')
        if isinstance(row.get("answer"), float):
            row["answer"] = json.loads(line, parse_float=str)["answer"]  # 1e5 stays 1e5
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: no problems in it")
    return rows


def read_problems(path, fields=None) -> list[dict]:
    """The rows of a user's file of problems: "prompt" and "answer" (text or None), and `fields`.
    An answer that is a number or true becomes the text that stands in the file."""
    fields = {"prompt": is_prompt, "answer": is_answer, **(fields or {})}
    rows = read_jsonl(path, fields)
    for row in rows:
        answer = row.setdefault("answer", None)
        if isinstance(answer, bool):
            row["answer"] = json.dumps(answer)
        elif answer is not None:
            row["answer"] = str(answer)
    return rows


# Checks of the fields of a user's file


def is_string(value):
    return isinstance(value, str)


def is_text(value):
    return is_string(value) and value != ""


def is_answer(value):
    """Text, a number, true, or None for a problem without an answer."""
    if value is None:
        return True
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) or (is_text(value) and not value.isspace())


def is_prompt(value):
    """Text, or chat messages: [{"role": text, "content": text}, ...]"""
    if not isinstance(value, list):
        return is_text(value)
    return value != [] and all(map(is_message, value))


def is_message(value):
    if not isinstance(value, dict):
        return False
    return is_text(value.get("role")) and is_text(value.get("content"))


def download(url, path, sha256):
    """Fetches a file, unless it is there. It is checked, and written whole or not at all."""
    if path.exists():
        return
    print(f"fetching {url}", file=sys.stderr)
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            content = response.read()
    except (OSError, HTTPException) as error:
        raise UserError(
            f"{path} is not there and {url} cannot be fetched ({error}): get the file by other "
            "means, or name its folder with --data_dir"
        ) from None
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise UserError(f"{url} is not the file expected (SHA-256 {found}), nothing was written")
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as aside:
        aside.write_bytes(content)
