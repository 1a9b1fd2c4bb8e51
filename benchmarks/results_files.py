"""Where result files lie: benchmarks/results/NAME/CASE.json for a bare NAME, else the path."""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def directory(name: str) -> Path:
    """The directory that a name stands for: one of benchmarks/results/, or the path itself."""
    bare = "/" not in name and name not in (".", "..")
    return RESULTS / name if bare else Path(name)


def write(result: dict, name: str) -> Path:
    """Writes a result: to the file NAME if that ends in .json, else to NAME/CASE.json."""
    path = Path(name) if name.endswith(".json") else directory(name) / f"{result['case']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def read(name: str) -> dict[str, dict]:
    """The results by case of a file, or of all files of a directory."""
    single = name.endswith(".json")
    paths = [Path(name)] if single else sorted(directory(name).glob("*.json"))
    found = [json.loads(path.read_text()) for path in paths]
    return {result["case"]: result for result in found}
