import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
ORDER = ["flags", "tasks", "loss", "stats", "checkpoint", "track", "plot", "decode", "policy", "update", "memory",
         "rules", "reward", "screen", "sample", "pretrain", "eval", "train_reward", "train", "compare", "bench"]


def test_imports_point_down():
    """Each script imports only scripts that stand before it in reading order."""
    scripts = {path.stem for path in ROOT.glob("*.py")}
    assert scripts == set(ORDER)
    for name in ORDER:
        imported = set()
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module)
        assert imported & scripts <= set(ORDER[: ORDER.index(name)]), name


def test_the_files_stay_short():
    """Size is a feature: see 'Files' in the README."""
    lines = {name: len((ROOT / f"{name}.py").read_text().splitlines()) for name in ORDER}
    assert max(lines.values()) <= 280, lines
    assert sum(lines[name] for name in ("train", "sample", "decode", "reward", "loss", "update")) <= 1450, lines
    assert sum(lines.values()) <= 4250, lines
