"""How much there is to read: python -m benchmarks.size prints one line of JSON.

Files, lines and bytes are those of the root's modules; options are counted command by command.
"""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import typer

from etrm_arc import cli, config

ROOT = Path(__file__).parent.parent


def fields_of(struct: type[msgspec.Struct]) -> int:
    """Leaves of a config, of the tables within it too."""
    types = [field.type for field in msgspec.structs.fields(struct)]
    tables = [t for t in types if isinstance(t, type) and issubclass(t, msgspec.Struct)]
    return len(types) - len(tables) + sum(map(fields_of, tables))


def lines(paths: list[Path]) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def measured() -> dict[str, int | str]:
    modules = sorted(ROOT.glob("*.py"))
    docs = [*ROOT.glob("docs/*.md"), *ROOT.glob("checkpoints/*.md")]
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    options = [p for c in commands.values() for p in c.params if p.param_type_name == "option"]
    longest = max(modules, key=lambda path: lines([path]))
    return {
        "files": len([path for path in modules if path.name != "__init__.py"]),
        "lines": lines(modules),
        "bytes": sum(path.stat().st_size for path in modules),
        "longest": f"{longest.name}, {lines([longest])} lines",
        "fields": fields_of(config.Config),
        "commands": len(commands),
        "options": len(options),
        "words of docs": sum(len(path.read_text(encoding="utf-8").split()) for path in docs),
        "lines of README": lines([ROOT / "README.md"]),
        "lines of extras": lines(sorted(ROOT.glob("extras/*.py"))),
        "lines of tests": lines(sorted(ROOT.glob("tests/*.py"))),
        "lines of benchmarks": lines(sorted(ROOT.glob("benchmarks/*.py"))),
    }


def main() -> None:
    print(json.dumps(measured()))


if __name__ == "__main__":
    main()
