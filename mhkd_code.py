"""The hash of the code that computes a run: changed code makes another run of the same settings.

mhkd.py imports this file for training, through mhkd_record.py.
"""

from __future__ import annotations

import ast
import contextlib
import dis
import functools
import hashlib
import inspect
import json
import symtable
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mhkd
from mhkd import Data, Distiller, epoch_batches, find_methods
from mhkd_runs import sha256_of

if TYPE_CHECKING:
    from mhkd_config import Config


def code_hashes(config: Config) -> dict[str, str]:
    """Hashes of the code that computes a training step, and of initial weights in files.

    They cover what turns an image into a gradient: the networks, heads, losses, the selected
    methods, augmentation. Comments, messages, records and the report are not covered, nor is the
    code of libraries, whose versions are recorded (docs/choices.md).
    """
    methods = find_methods(config.method).values()
    roots = [*methods, Distiller, Data, epoch_batches]
    for module in {m.__module__ for m in methods if not is_ours(m.__module__)}:
        file = getattr(sys.modules.get(module), "__file__", None) or ""
        if file.endswith(".py") and "site-packages" not in file:  # what a user's method imports
            roots += mhkd.sibling("mhkd_custom").source_files(f"{file}:")[1:]
    return {"method_code_sha256": code_sha256(roots), **network_hashes(config)}


def network_hashes(config: Config) -> dict[str, str]:
    """Hashes of the code of both networks and of initial weights in files."""
    found = {}
    for role in ("student", "teacher"):
        name, init = getattr(config, role), getattr(config, f"{role}_init")
        if name in mhkd.MODELS:
            kind, settings = mhkd.MODELS[name]
            settings = settings, mhkd.UNITS.get(kind)
            found[f"{role}_code_sha256"] = code_sha256([kind], repr(settings))
        elif name and ".py:" in name:
            files = mhkd.sibling("mhkd_custom").source_files(name)
            found[f"{role}_code_sha256"] = code_sha256(files)
        if name and init.startswith("file:") and Path(init[5:]).is_file():
            found[f"{role}_init_sha256"] = sha256_of(init[5:])
    return found


IMAGES = "sibling('mhkd_images')"  # the only module whose functions mhkd.py calls in a step


def code_sha256(roots: Iterable[Any], more: str = "") -> str:
    """The hash of what classes and functions compute, or of Python files. See parts_of_code()."""
    found = {"": more, **parts_of_code(roots)}
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def parts_of_code(roots: Iterable[Any]) -> dict[str, str]:
    """The hash of each part of the code by its name: of `roots` and of what they use.

    It follows functions, classes and constants of their own modules and of this project.
    Comments, docstrings, annotations and errors do not count, nor in this project's code strings
    with spaces and f-strings, which are messages. In a user's code they may be patterns or names;
    there more counts: numbers and strings in closures, in attributes of classes and of a module's
    objects; the statements that assign other objects; bytecode and the names that it loads, if
    there is no source. What the code itself assigns, such as counters, does not count.
    """
    todo, found = list(roots), {}
    visited: dict[int, Any] = {}
    settings: dict[tuple[str, str], str] = {}  # in a user's code, by place and name
    assigned_names: set[str] = set()
    # A user's program may be __main__, too.
    main = "mhkd" if sys.modules["mhkd"] is sys.modules["__main__"] else "__main__"
    modules = {thing.__module__ for thing in todo if not isinstance(thing, Path)}
    modules |= {mhkd.__name__, "mhkd_images"}  # __main__ in `python mhkd.py`

    def followed(module: str) -> bool:
        return module in modules or is_ours(module)

    while todo:
        thing = todo.pop()
        is_file = isinstance(thing, Path)
        # `python mhkd.py` has the classes of mhkd in __main__.
        module = "" if is_file else thing.__module__.replace("__main__", main)
        name = thing.name if is_file else f"{module}.{thing.__qualname__}"
        while is_file and name in found:  # the same name in another folder, which may be moved
            name += "'"
        # Other functions of a user's module may have the same name: lambdas, those of a factory.
        while not is_file and name in found and not is_ours(module) and id(thing) not in visited:
            name += "'"
        if name in found:
            continue
        visited[id(thing)] = thing
        if is_file:
            trees = [ast.parse(thing.read_text())]
        else:
            source = source_of(thing)
            trees = definitions_in(source).get(thing.__qualname__, [])
        known = {} if is_file else vars(sys.modules[thing.__module__])
        used = set() if is_file else {*globals_in(source).get(thing.__name__, ())}
        for part in around(trees) if known else ():
            used |= {node.id for node in ast.walk(part) if isinstance(node, ast.Name)}
        digest = hashlib.sha256()
        if not is_file and not is_ours(thing.__module__):
            others = [*getattr(thing, "__bases__", ())]
            values = {name: vars(thing) if isinstance(thing, type) else {}}
            for function in functions_of(thing):
                place = f"{name}.{function.__name__}"
                cells = zip(function.__code__.co_freevars, function.__closure__ or ())
                values[place] = {}
                with contextlib.suppress(ValueError):  # an empty cell
                    values[place] = {n: cell.cell_contents for n, cell in cells}
                if not trees:
                    digest.update(repr(bytecode_of(function.__code__)).encode())
                    loaded, stored = names_in(function.__code__)
                    assigned_names |= stored if function.__name__ != "__init__" else set()
                    of_module = {n: function.__globals__.get(n) for n in sorted(loaded)}
                    others += of_module.values()
                    defaults = enumerate(function.__defaults__ or ())
                    values[place] |= of_module | {f"default {i}": v for i, v in defaults}
                    values[place] |= function.__kwdefaults__ or {}
            assigned_names |= assigned_in(trees)
            for place, of_place in values.items():
                settings |= {(place, n): repr(v) for n, v in constants(of_place).items()}
            todo += [o for o in others if is_code(o) and followed(o.__module__)]
        for place, node in computation_of(trees, is_file or not is_ours(thing.__module__)):
            part = type(node).__name__ if isinstance(node, ast.AST) else repr(node)
            digest.update(f"{place} {part}\n".encode())
            value = None
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                value = known.get(node.id) if node.id in used else None  # a local name is none
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == IMAGES:
                value = getattr(mhkd.sibling("mhkd_images", optional=True), node.attr, None)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                owner = known.get(node.value.id)
                if isinstance(owner, types.ModuleType):
                    value = getattr(owner, node.attr, None) if followed(owner.__name__) else None
                elif node.value.id in used and not is_code(owner) and not is_ours(module):
                    with contextlib.suppress(Exception):  # an attribute of any object
                        if is_plain(of_object := getattr(owner, node.attr)):
                            settings[f"{module}.{node.value.id}", node.attr] = repr(of_object)
            value = None if isinstance(value, types.ModuleType) else unwrapped(value)
            if is_code(value) and followed(value.__module__):
                todo.append(value)
            elif isinstance(node, ast.Name) and value is not None and is_plain(value):
                settings[module, node.id] = repr(value)
            elif isinstance(node, ast.Name) and value is not None and not is_ours(module):
                assigned = definitions_in(source).get(f"{node.id} =", [])
                found |= {f"{module}.{node.id}": str([ast.dump(part) for part in assigned])}
                for part in (part for tree in assigned for part in ast.walk(tree)):
                    used_there = known.get(part.id) if isinstance(part, ast.Name) else None
                    if is_code(used_there):
                        todo += [used_there] * followed(used_there.__module__)
        found[name] = digest.hexdigest()
    counted = {k: v for k, v in settings.items() if is_ours(k[0]) or k[1] not in assigned_names}
    return found | {f"{place}.{name}": value for (place, name), value in counted.items()}


def is_ours(module: str) -> bool:
    """Whether a module is a part of this project."""
    file = Path(getattr(sys.modules.get(module), "__file__", None) or "")
    return file.parent == Path(mhkd.__file__).parent and file.name.startswith("mhkd")


def is_plain(value: Any) -> bool:
    """Whether a constant consists of numbers and strings only."""
    if isinstance(value, (tuple, list, dict)):
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        return all(map(is_plain, parts))
    return value is None or isinstance(value, (int, float, str))


def source_of(thing: Any) -> str:
    """The source of the module of a class or function, "" if it is not that of its code."""
    functions = [] if is_ours(thing.__module__) else functions_of(thing)
    return source_with(thing.__module__, tuple(function.__code__ for function in functions))


@functools.cache
def source_with(module: str, codes: tuple[types.CodeType, ...]) -> str:
    """The source of a module if it contains what has been compiled, else "".

    A file may be edited after it was imported. Without a source the bytecode is hashed.
    """
    with contextlib.suppress(OSError, TypeError, SyntaxError):  # typed into an interpreter
        source, file = inspect.getsource(sys.modules[module]), sys.modules[module].__file__
        compiled = [compile(source, file, "exec", dont_inherit=True)] if codes else []
        for code in compiled:  # which grows
            compiled += [part for part in code.co_consts if isinstance(part, types.CodeType)]
        of_file = {code for code in codes if Path(code.co_filename).name == Path(file).name}
        typed = codes and not any(Path(code.co_filename).is_file() for code in codes)
        if of_file <= {*compiled} and (of_file or not typed):
            return source
    return ""


@functools.cache
def globals_in(source: str) -> dict[str, set[str]]:
    """For each class and function of a module the names that it takes from the module."""
    found: dict[str, set[str]] = {}

    def names_of(table: symtable.SymbolTable) -> set[str]:
        names = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
        return names.union(*map(names_of, table.get_children()))

    def visit(table: symtable.SymbolTable) -> None:
        for part in table.get_children():
            found.setdefault(part.get_name(), set()).update(names_of(part))
            visit(part)

    visit(symtable.symtable(source, "module", "exec"))
    return found


def around(definitions: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """What the scope around definitions evaluates: decorators, bases, defaults of arguments."""
    for node in definitions:
        yield from getattr(node, "decorator_list", [])
        yield from getattr(node, "bases", [])
        if isinstance(node, ast.FunctionDef):
            yield from filter(None, [*node.args.defaults, *node.args.kw_defaults])


def is_code(value: Any) -> bool:
    """Whether it is a class or a function written in Python."""
    return isinstance(value, (type, types.FunctionType))


def unwrapped(value: Any) -> Any:
    """A function without decorators that refer to it."""
    with contextlib.suppress(ValueError):
        return inspect.unwrap(value) if "__wrapped__" in dir(value) else value
    return value


def constants(values: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers and strings. Not lists and dicts, which may collect results."""
    kinds = int, float, str, tuple
    plain = {n: v for n, v in values.items() if isinstance(v, kinds) and is_plain(v)}
    return {name: value for name, value in plain.items() if not name.startswith("__")}


def assigned_in(trees: Iterable[ast.AST]) -> set[str]:
    """Names and attributes that functions assign, except __init__."""
    names: set[str] = set()
    for tree in trees:
        if isinstance(tree, ast.FunctionDef) and tree.name == "__init__":
            continue
        if isinstance(tree, (ast.Global, ast.Nonlocal)):
            names |= {*tree.names}
        elif isinstance(tree, ast.Attribute) and isinstance(tree.ctx, ast.Store):
            names.add(tree.attr)
        elif isinstance(tree, ast.Subscript) and isinstance(tree.ctx, ast.Store):
            names.add(getattr(tree.value, "id", ""))  # a dict or list
        names |= assigned_in(ast.iter_child_nodes(tree))
    return names


def names_in(code: types.CodeType) -> tuple[set[str], set[str]]:
    """The names that bytecode loads from its module, and those that it assigns."""
    loaded, stored = set(), set()
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            loaded.add(instruction.argval)
        elif instruction.opname in ("STORE_ATTR", "STORE_GLOBAL", "STORE_DEREF"):
            stored.add(instruction.argval)
    for inner in (c for c in code.co_consts if isinstance(c, types.CodeType)):
        more = names_in(inner)
        loaded, stored = loaded | more[0], stored | more[1]
    return loaded, stored


def functions_of(thing: Any) -> list[types.FunctionType]:
    """A function, or the functions of a class."""
    parts = vars(thing).values() if isinstance(thing, type) else [thing]
    parts = [getattr(part, "__func__", None) or getattr(part, "fget", part) for part in parts]
    functions = [unwrapped(part) for part in parts]
    return [function for function in functions if isinstance(function, types.FunctionType)]


def bytecode_of(code: types.CodeType) -> list[Any]:
    constants: list[Any] = []
    for c in code.co_consts:  # sets have another order in each process
        c = sorted(map(repr, c)) if isinstance(c, frozenset) else c
        constants.append(bytecode_of(c) if isinstance(c, types.CodeType) else c)
    return [code.co_code.hex(), code.co_names, constants]


@functools.cache
def definitions_in(source: str) -> dict[str, list[ast.AST]]:
    """The syntax trees of a module's classes and functions by qualified name.

    The assignments to a name of the module have the key "name =".
    """
    found: dict[str, list[ast.AST]] = {}

    def visit(node: ast.AST, inside: str = "") -> None:
        for part in ast.iter_child_nodes(node):
            prefix = inside
            if isinstance(part, (ast.ClassDef, ast.FunctionDef)):
                found.setdefault(inside + part.name, []).append(part)
                local = ".<locals>." if isinstance(part, ast.FunctionDef) else "."
                prefix = inside + part.name + local
            elif isinstance(part, (ast.Assign, ast.AnnAssign, ast.AugAssign)) and not inside:
                targets = part.targets if isinstance(part, ast.Assign) else [part.target]
                for n in (n for target in targets for n in ast.walk(target)):
                    if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store):
                        found.setdefault(f"{n.id} =", []).append(part)
            visit(part, prefix)

    visit(ast.parse(source))
    return found


def computation_of(node: Any, strings: bool, place: str = "") -> Iterator[tuple[str, Any]]:
    """Place and value of everything in a syntax tree that changes what the code computes.

    strings: whether all strings but docstrings count.
    """
    docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    message = isinstance(node, str) and " " in node or isinstance(node, ast.JoinedStr)
    if isinstance(node, ast.Raise) or (docstring if strings else message):
        return
    if isinstance(node, list):
        for i, part in enumerate(node):
            yield from computation_of(part, strings, f"{place}.{i}")
        return
    yield place, node
    if isinstance(node, ast.AST):
        for name, part in ast.iter_fields(node):
            # Versions of Python differ in empty fields.
            if name not in ("annotation", "returns") and part is not None:
                yield from computation_of(part, strings, f"{place}.{name}")
