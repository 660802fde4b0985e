"""The house as DESIGN draws it: which room may import which, what the public names are, what importing them costs."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from string import Formatter
from typing import NamedTuple

import fp8ckpt
import fp8ckpt.errors
from fp8ckpt.errors.base import Says

ROOT = Path(fp8ckpt.__file__).parent
MODULES = sorted(path.relative_to(ROOT).with_suffix("").as_posix() for path in ROOT.rglob("*.py"))
JOBS = ("convert", "inspect", "merge", "plan", "report", "sample", "verify")

_BELOW_CHECKPOINT = {
    "engine", "encodings", "families", "output", "tensors", "stores", "numerics", "ranks", "workers", "system",
    "collector", "targets", "walk",
}  # fmt: skip

# A room, and the rooms below it that it may import. `errors` may be imported by all but itself and numerics.
ARROWS = {
    "__init__": {*JOBS, "checkpoint", "encodings", "output", "tensors", "version"},
    "__main__": {"cli"},
    "cli": {*JOBS, "encodings", "output", "targets", "version"},
    **{job: {"serving", "checkpoint", "figures", *_BELOW_CHECKPOINT} for job in JOBS},
    "convert": {"report", "serving", *_BELOW_CHECKPOINT},  # it draws the page of a report
    "figures": {"report", "tensors", "numerics"},  # of the report it knows the types alone
    "hosts": {"models", "checkpoint", *_BELOW_CHECKPOINT},
    "models": {"checkpoint", *_BELOW_CHECKPOINT},
    "checkpoint": _BELOW_CHECKPOINT,
    "serving": {"families", "tensors", "stores", "numerics", "output"},
    "encodings": {"engine", "families", "output", "tensors", "stores", "numerics", "ranks", "targets"},
    "engine": {"output", "tensors", "stores", "numerics", "workers", "ranks"},
    "walk": {"engine", "tensors", "workers"},
    "output": {"tensors", "stores", "numerics", "system", "version", "workers"},
    "families": {"tensors", "collector"},
    "tensors": {"stores", "numerics", "collector"},
    "stores": {"numerics", "system", "workers"},
    "ranks": {"system"},
    "system": set(),
    "workers": set(),
    "numerics": {"collector"},
    "collector": set(),
    "errors": set(),
    "version": set(),
    "targets": set(),
}
WITHOUT_ERRORS = {"errors", "version", "targets", "numerics", "__main__"}

PUBLIC = [
    "Assembly", "Checkpoint", "Checkpointer", "ConvertResult", "FP8StorageReader", "FP8StorageWriter", "Forecast",
    "Fp8CheckpointError", "Fp8Result", "Inspection", "MergeResult", "Piece", "PlainResult", "Plan", "QuantizedTensor",
    "Report", "SafetensorsStorageWriter", "StateDictAdapter", "TensorSpan", "VerifyResult", "__version__", "convert",
    "inspect", "load_model", "load_pretrained", "merge", "open_checkpoint", "plan", "plan_convert", "plan_merge",
    "plan_sample", "report", "sample", "save_model", "verify",
]  # fmt: skip


class Import(NamedTuple):
    """One imported module; ``typing_only`` where it stands below ``if TYPE_CHECKING``."""

    name: str
    typing_only: bool


def _imports(node: ast.AST, typing_only: bool = False) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, typing_only) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            yield Import(child.module or "", typing_only)
            yield from (Import(f"{child.module}.{alias.name}", typing_only) for alias in child.names)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for inner in child.body:
                yield from _imports(ast.Module([inner], []), True)
            for inner in child.orelse:
                yield from _imports(ast.Module([inner], []), typing_only)
        else:
            yield from _imports(child, typing_only)


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse((ROOT / f"{module}.py").read_text())


@cache
def imports_of(module: str) -> set[Import]:
    """Everything that a module imports, at its top, inside functions and for type checkers."""
    return set(_imports(tree_of(module)))


def room_of(module: str) -> str:
    """``tensors/header`` and ``fp8ckpt.tensors.header`` are of the room ``tensors``."""
    return module.removeprefix("fp8ckpt.").replace("/", ".").split(".")[0]


def test_the_import_reader_sees_every_kind_of_import() -> None:
    """The parser below the tests of this file finds imports wherever they stand."""
    source = """
import a.b
from c import d
if TYPE_CHECKING:
    from e import f
else:
    import g
def h():
    try:
        import i
    except ImportError:
        from j.k import l
class M:
    if typing.TYPE_CHECKING:
        import n
"""
    found = set(_imports(ast.parse(source)))
    assert {name for name, typing_only in found if not typing_only} == {"a.b", "c", "c.d", "g", "i", "j.k", "j.k.l"}
    assert {name for name, typing_only in found if typing_only} == {"e", "e.f", "n"}


def test_every_module_is_of_a_known_room() -> None:
    """A new room is drawn in the design, and here, before it is built; and nothing is called utils."""
    assert {room_of(module) for module in MODULES} <= set(ARROWS)
    assert not [module for module in MODULES if "util" in module or "helper" in module]


def test_arrows_point_down() -> None:
    """A module imports its own room and those below, for type checkers too, and never the package itself."""
    wrong = []
    for module in MODULES:
        room = room_of(module)
        allowed = ARROWS[room] | ({room} if (ROOT / room).is_dir() else set())
        allowed |= set() if room in WITHOUT_ERRORS else {"errors"}
        ours = {name for name, _ in imports_of(module) if name.split(".")[0] == "fp8ckpt"}
        wrong += [(module, name) for name in ours if name == "fp8ckpt" or room_of(name) not in allowed]
    assert wrong == []


def importers_of(package: str, typing_too: bool) -> set[str]:
    found = set()
    for module in MODULES:
        for name, typing_only in imports_of(module):
            if (name == package or name.startswith(package + ".")) and (typing_too or not typing_only):
                found.add(module)
    return found


def test_only_checkpoint_and_ranks_import_torch_distributed() -> None:
    """At run time; a signature elsewhere may name its types for a type checker."""
    assert {room_of(module) for module in importers_of("torch.distributed", typing_too=False)} == {
        "checkpoint",
        "ranks",
    }


def test_only_figures_imports_the_plotting_library() -> None:
    """It comes with an extra: nothing else may need it."""
    assert importers_of("matplotlib", typing_too=True) == {"figures"}


def test_only_the_decorator_of_kernels_imports_numba() -> None:
    """Nothing else does, not even for a type checker."""
    assert importers_of("numba", typing_too=True) == {"numerics/compiled", "numerics/tiles"}


def test_numerics_knows_no_torch() -> None:
    """The numbers are numpy's."""
    assert not [module for module in importers_of("torch", typing_too=True) if room_of(module) == "numerics"]


def test_nobody_asks_which_tensor_it_has() -> None:
    """A tensor gives its own values and says what is to be known of it; only its own room looks at its class."""
    asked = [
        (module, ast.unparse(node))
        for module in MODULES
        if room_of(module) != "tensors"
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("isinstance", "type")
        and any(name in ast.unparse(node) for name in ("QuantizedTensor", "TensorSpan", "ScaledTensor", "JoinedTensor"))
    ]
    assert asked == []


def test_each_client_is_imported_where_its_store_is() -> None:
    """The local cache of the Hub by what resolves a path; safetensors nowhere."""
    assert importers_of("huggingface_hub", typing_too=False) == {"tensors/checkpoint", "stores/hub"}
    assert importers_of("urllib3", typing_too=True) == {"stores/http"}
    assert importers_of("boto3", typing_too=True) | importers_of("botocore", typing_too=True) == {"stores/s3"}
    assert importers_of("fsspec", typing_too=True) == {"stores/other"}
    assert not importers_of("safetensors", typing_too=True)


def test_the_public_names() -> None:
    """``__all__`` is this list, sorted as it is written."""
    assert list(fp8ckpt.__all__) == PUBLIC


def test_whatever_takes_a_checkpoint_takes_each_kind() -> None:
    """A path, hub id, URL, store or open checkpoint; the base is ``like``, and threads are ``workers``."""
    given, seen = {"a", "b", "base", "like", "path", "source"}, 0
    for name in PUBLIC:
        entry = getattr(fp8ckpt, name)
        if (isinstance(entry, type) and "Storage" not in name) or not callable(entry):
            continue
        parameters = inspect.signature(entry).parameters
        written = {"path"} if name == "save_model" or name.endswith("Writer") else set()
        for parameter in given.intersection(parameters) - written:
            assert "CheckpointLike" in str(parameters[parameter].annotation), (name, parameter)
            seen += 1
        assert "like" in parameters or "base" not in parameters or "merge" in name, name
        assert "workers" in parameters or "threads" not in parameters, name
    assert seen > 15


def test_each_public_name_resolves() -> None:
    """Each is a class or a function with a docstring, also for ``from fp8ckpt import name``."""
    for name in set(PUBLIC) - {"__version__"}:
        value = getattr(fp8ckpt, name)
        assert callable(value), name
        assert value.__doc__, name
        assert getattr(__import__("fp8ckpt", fromlist=[name]), name) is value
        assert value.__module__.startswith("fp8ckpt."), name


class OwnError(fp8ckpt.Fp8CheckpointError):
    """As a user may derive one."""


def test_errors_go_from_process_to_process() -> None:
    """Each is named by where users import it, ours and a user's own, so that ranks can tell each other of it."""
    kinds = [kind for kind in vars(fp8ckpt.errors).values() if isinstance(kind, type)]
    assert len(kinds) > 25
    for kind in (*kinds, OwnError):
        error = pickle.loads(pickle.dumps(kind("found", tensor="t", file="f", remedy="mend it")))
        assert (type(error), error.message) == (kind, kind("found", tensor="t", file="f", remedy="mend it").message)
    assert {kind.__module__ for kind in kinds if kind is not fp8ckpt.Fp8CheckpointError} == {"fp8ckpt.errors"}
    assert OwnError.__module__ == __name__


def test_sentences_are_given_their_facts() -> None:
    """Each is said somewhere, and where it is raised at once with the facts that it has places for, and no others."""
    says = {
        f"{kind.__name__}.{name}": {fact for _, fact, _, _ in Formatter().parse("".join(one.texts)) if fact}
        for kind in vars(fp8ckpt.errors).values()
        for name, one in (inspect.getmembers_static(kind) if isinstance(kind, type) else ())
        if isinstance(one, Says)
    }
    nodes = [node for module in MODULES for node in ast.walk(tree_of(module))]
    said = {node: ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute) and node.attr[:2] == "of"}
    own = {f"{kind}.{name}" for kind, its in vars(fp8ckpt.errors).items() for name in getattr(its, "__dict__", {})}
    assert says.keys() & own <= {*said.values()}
    for call in (node for node in nodes if isinstance(node, ast.Call) and said.get(node.func) in says):
        facts = {fact.split(".")[0] for fact in says[said[call.func]]}
        assert {word.arg for word in call.keywords} | {"tensor", "file"} == facts | {"tensor", "file"}, said[call.func]


def test_functions_are_not_hidden_by_their_modules() -> None:
    """``fp8ckpt.convert`` is the function, though ``fp8ckpt/convert.py`` is imported too."""
    for name in JOBS:
        module = importlib.import_module(f"fp8ckpt.{name}")
        assert getattr(fp8ckpt, name) is getattr(module, name)
        assert callable(getattr(fp8ckpt, name))


def fresh(*codes: str, first: str = "pass") -> list[str]:
    """What each prints in a process that has imported nothing of ours: of one interpreter, which forks for each."""
    fork = f"""
{first}
import json, os, sys, traceback
for code in json.loads(sys.argv[1]):
    if os.fork() == 0:
        try:
            exec(code, dict(__name__="__main__"))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        sys.stdout.flush()
        os._exit(0)
    assert os.wait()[1] == 0, code
    print("\\0", end="", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", fork, json.dumps(codes)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\0")[:-1]


def test_the_order_of_imports_does_not_matter() -> None:
    """In a fresh process, a submodule imported first leaves the public function where it is."""
    fresh(
        *(
            f"{first.format(name)}; import fp8ckpt; assert callable(fp8ckpt.{name}); "
            f"assert fp8ckpt.{name}.__name__ == '{name}'"
            for first in ("import fp8ckpt.{0}", "from fp8ckpt.{0} import {0}", "import fp8ckpt.cli, fp8ckpt.{0}")
            for name in JOBS
        ),
        first="import numpy, typer",
    )


def heavy_modules(*codes: str) -> list[set[str]]:
    """Which of the heavy packages are loaded once each of ``codes`` has run."""
    report = "import json, sys; print('\\n' + json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    loaded = [set(json.loads(text.splitlines()[-1])) for text in fresh(*(f"{code}\n{report}" for code in codes))]
    assert all("fp8ckpt" in names for names in loaded)
    heavy = {
        "torch",
        "numba",
        "llvmlite",
        "transformers",
        "huggingface_hub",
        "safetensors",
        "ml_dtypes",
        "numpy",
        "rich",
    }
    return [names & heavy for names in loaded]


def test_importing_the_package_is_cheap() -> None:
    """The package, help texts and usage errors import no torch, numba, numpy or hub client."""
    code = "import sys\nfrom fp8ckpt.cli import main\nsys.argv = {!r}\ntry:\n    main()\nexcept SystemExit:\n    pass"
    helps = [code.format(["fp8ckpt", *words]) for words in ([], ["--help"], *([job, "--help"] for job in JOBS))]
    assert heavy_modules("import fp8ckpt", *helps) == [set()] * (1 + len(helps))


def test_help_imports_the_command_line_alone() -> None:
    """Beyond what the command line's library imports: our own commands, and nothing that they run."""
    code = """
import sys, typer
before = set(sys.modules)
from fp8ckpt.cli import main
sys.argv = ["fp8ckpt", "--help"]
try:
    main()
except SystemExit:
    print(*sorted(set(sys.modules) - before))
"""
    loaded = set(fresh(code)[0].splitlines()[-1].split())
    others = {name for name in loaded if not name.startswith(("fp8ckpt", "typer.", "click."))}
    assert others <= {"__future__", "dataclasses", "gc", "string", "_string"}
    ours = {f"fp8ckpt.cli.{path.stem}" for path in (ROOT / "cli").glob("[!_]*.py")}
    ours |= {f"fp8ckpt.errors.{path.stem}" for path in (ROOT / "errors").glob("[!_]*.py")}
    ours |= {"fp8ckpt", "fp8ckpt.cli", "fp8ckpt.errors", "fp8ckpt.targets", "fp8ckpt.version"}
    assert {name for name in loaded if name.startswith("fp8ckpt")} == ours


def test_inspecting_and_opening_are_cheap(sample_fp8: Path) -> None:
    """Headers need no torch and no numba."""
    [loaded] = heavy_modules(f"import fp8ckpt; assert fp8ckpt.open_checkpoint({str(sample_fp8)!r}).tensors")
    assert loaded <= {"numpy"}


def test_the_heavy_check_can_fail() -> None:
    """A process that does import numba is seen to."""
    assert "numba" in heavy_modules("import fp8ckpt.numerics.kernels")[0]


READERS = {
    "open", "fdopen", "walk", "scandir", "listdir", "pread", "preadv", "read_text", "read_bytes", "glob", "rglob",
}  # fmt: skip
READERS |= {"iterdir", "cmp", "memmap", "fromfile"}


def readers_in(tree: ast.Module) -> set[str]:
    """Calls that open, read or list a file, whatever they are called on; `os.devnull` is no file."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    named = {ast.unparse(call): getattr(call.func, "attr", getattr(call.func, "id", "")) for call in calls}
    return {text for text, name in named.items() if name in READERS and "os.devnull" not in text}


def test_the_reader_of_calls_sees_every_kind() -> None:
    """The parser below finds them as functions and as methods."""
    found = ["os.preadv(1, [], 0)", "open(x)", "file.open('rb')", "a.b.read_text()"]
    assert readers_in(ast.parse("\n".join([*found, "self.opened(1)", "open(os.devnull)"]))) == set(found)


def test_only_stores_and_output_open_files() -> None:
    """What is read is read through a store; what is written, through the room of outputs."""
    others = [module for module in MODULES if room_of(module) not in ("stores", "output", "system")]
    assert {module: found for module in others if (found := readers_in(tree_of(module)))} == {}


OF_ONE_SYSTEM = {"preadv", "pwritev", "fdatasync", "sched_getaffinity", "posix_fallocate", "posix_fadvise", "fcntl"}


def test_only_system_knows_what_one_system_has() -> None:
    """What Linux has and macOS lacks, or does otherwise, is called in one place, with a fallback."""
    for module in set(MODULES) - {"system"}:
        nodes = list(ast.walk(tree_of(module)))
        named = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        named |= {name for name, _ in imports_of(module)}
        texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        assert named & OF_ONE_SYSTEM == set(), module
        assert not [text for text in texts if text.startswith(("/proc", "/sys"))], module
