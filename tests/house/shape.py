"""The shape of the package in numbers: files, imports, levels, circles.

    python -m tests.house.shape [DIRECTORY]      # DIRECTORY: another checkout, to compare with

An import counts wherever it stands in a file, inside functions too; only those under TYPE_CHECKING
do not. A room is a folder of the package, or a file at its root.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PRIVATE = re.compile(r"\bray(\.\w+)*\.(_private|_internal|core\.generated)\b")


class Package:
    """The modules of a checkout, and who imports whom."""

    def __init__(self, repository: Path = REPOSITORY) -> None:
        self.root = repository / "yuzogpt"
        self.trees = {
            self.name_of(path): ast.parse(path.read_text()) for path in self.root.rglob("*.py")
        }
        self.texts = {self.name_of(path): path.read_text() for path in self.root.rglob("*.py")}
        self.imports = {name: set(self.imported_by(name)) for name in self.trees}

    def name_of(self, path: Path) -> str:
        """Return a module's name, from the package's root on: `data.blocks`."""
        return ".".join(path.relative_to(self.root).with_suffix("").parts)

    def imported_by(self, name: str) -> Iterator[str]:
        """Yield the modules of the package that a module imports."""
        for node in nodes_at_run_time(self.trees[name]):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for module in modules:
                package, _, inside = module.partition(".")
                if package == "yuzogpt" and (found := self.module_of(inside)) not in (None, name):
                    yield str(found)

    def module_of(self, dotted: str) -> str | None:
        """Return the module that a dotted name is, or is in; None for the package itself."""
        for known in (dotted, f"{dotted}.__init__"):
            if known in self.trees:
                return known
        head = dotted.rpartition(".")[0]
        return self.module_of(head) if head else None

    def circles(self) -> list[set[str]]:
        """Return the sets of modules that import each other, directly or in a round."""
        reach = {name: self.reached(name) for name in self.trees}
        rounds = {
            frozenset(other for other in reach[name] if name in reach[other])
            for name in self.trees
            if name in reach[name]
        }
        return [set(one) for one in rounds]

    def reached(self, name: str) -> set[str]:
        """Return all modules that importing one may bring along."""
        found: set[str] = set()
        waiting = list(self.imports[name])
        while waiting:
            module = waiting.pop()
            if module not in found:
                found.add(module)
                waiting += self.imports[module]
        return found

    def levels(self) -> int:
        """Return how many rooms the longest chain of imports goes through, circles left out."""
        above = self.arrows_between_rooms()
        depths: dict[str, int] = {}

        def depth(room: str, seen: tuple[str, ...] = ()) -> int:
            if room in seen:
                return 0
            if room not in depths:
                below = [depth(b, (*seen, room)) for a, b in above if a == room]
                depths[room] = 1 + max(below, default=0)
            return depths[room]

        return max(depth(room_of(name)) for name in self.trees)

    def arrows_between_rooms(self) -> set[tuple[str, str]]:
        """Return which room imports which."""
        return {
            (room_of(name), room_of(other))
            for name, others in self.imports.items()
            for other in others
            if room_of(name) != room_of(other)
        }

    def long_functions(self, lines: int) -> list[str]:
        """Return the functions with more lines."""
        return [
            f"{name}.{node.name} {node.end_lineno - node.lineno + 1}"
            for name, tree in self.trees.items()
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and node.end_lineno is not None
            and node.end_lineno - node.lineno >= lines
        ]

    def long_files(self, lines: int) -> list[str]:
        """Return the modules with more lines."""
        counts = {name: text.count("\n") for name, text in self.texts.items()}
        return [f"{name} {count}" for name, count in counts.items() if count > lines]

    def private_names_of_ray(self) -> list[str]:
        """Return where private modules of Ray's are named, but for the file that holds them."""
        return [
            f"{name}: {found[0]}"
            for name, text in self.texts.items()
            if name != "orchestration.ray_internals"
            for found in PRIVATE.finditer(text)
        ]


def nodes_at_run_time(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes of a module, without what only type checkers read."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from nodes_at_run_time(node)


def room_of(name: str) -> str:
    """Return the room of a module."""
    return name.split(".")[0]


def main() -> None:
    """Print the numbers."""
    package = Package(Path(sys.argv[1]) if len(sys.argv) > 1 else REPOSITORY)
    loose = [name for name in package.trees if "." not in name]
    print(f"files at the root: {len(loose)} ({', '.join(sorted(loose))})")
    print(f"rooms: {len({room_of(name) for name in package.trees})}")
    print(f"levels of rooms: {package.levels()}")
    print(f"arrows between rooms: {len(package.arrows_between_rooms())}")
    print(f"arrows between files: {sum(map(len, package.imports.values()))}")
    print(f"circles: {len(package.circles())} {package.circles() or ''}")
    print(f"files over 400 lines: {package.long_files(400)}")
    print(f"functions over 60 lines: {package.long_functions(60)}")
    print(f"Ray's private modules elsewhere: {package.private_names_of_ray()}")
    print(f"lines: {sum(text.count(chr(10)) for text in package.texts.values())}")


if __name__ == "__main__":
    main()
