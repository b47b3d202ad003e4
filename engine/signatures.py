"""The keyword-only arguments of classes and functions, read from their files and not imported.

Settings are checked against them (engine/config.py), and importing the modules that hold them
imports torch and torchvision: three seconds before a misspelt key is named. What is not written
plainly (a default that is computed, an unusual annotation) raises UnreadableError, and config.py
imports the module after all.
"""

import ast
import inspect
import os
import typing

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TYPES = {"int": int, "float": float, "bool": bool, "str": str, "list": list, "Any": typing.Any}

parsed_files = {}  # path -> (time of its last change, its ast.Module)


class UnreadableError(Exception):
    """This module cannot tell; importing can."""


def keyword_only(home):
    """The keyword-only arguments of "module:name", as a dict of inspect.Parameter by name.

    As engine.config.keys_of_choice: a class that hands **settings on has its parent's as well, and
    a host with an Encoder of its own has those that this adds to its parent's.
    """
    module, node = definition(*home.split(":"))
    keys = own_and_inherited(module, node)
    encoder = class_attribute(node, "Encoder")
    if encoder is not None:
        encoder_module, encoder_node = definition(module, encoder)
        common = own_and_inherited(*parent(encoder_module, encoder_node))
        added = own_and_inherited(encoder_module, encoder_node)
        keys |= {key: parameter for key, parameter in added.items() if key not in common}
    return keys


def own_and_inherited(module, node):
    """-> {key: inspect.Parameter} of a class or function, its parent's first."""
    function = node
    if isinstance(node, ast.ClassDef):
        if node.decorator_list:
            raise UnreadableError(f"{node.name} has a decorator")
        methods = {n.name: n for n in node.body if isinstance(n, ast.FunctionDef)}
        if "__init__" not in methods:
            raise UnreadableError(f"{node.name} has no __init__ of its own")
        function = methods["__init__"]
    if function.decorator_list:
        raise UnreadableError(f"{node.name} has a decorator")
    keys = {}
    if function.args.kwarg is not None and function is not node:
        keys |= own_and_inherited(*parent(module, node))
    for argument, default in zip(function.args.kwonlyargs, function.args.kw_defaults):
        keys[argument.arg] = inspect.Parameter(
            argument.arg,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=type_of(argument.annotation),
            default=inspect.Parameter.empty if default is None else value_of(default),
        )
    return keys


def definition(module, name):
    """-> (the module, the ast node) of a class or function, wherever the module has it from.

    name: in any capitals, where no other definition has it exactly: losses/ring.py, Ring.
    """
    body = parse(module).body
    kinds = ast.ClassDef, ast.FunctionDef
    nodes = [n for n in body if isinstance(n, kinds) and n.name == name]
    nodes += [n for n in body if isinstance(n, ast.ClassDef) and n.name.lower() == name]
    if nodes:
        return module, nodes[0]
    for statement in body:
        if isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                if (alias.asname or alias.name) == name:
                    return definition(source_of(statement, module), alias.name)
    raise UnreadableError(f"{module} does not define {name}")


def source_of(statement, module):
    """The module that `from ... import` in `module` names: losses.nce for .nce in losses.ring."""
    if statement.level == 0:
        return statement.module
    package = module.split(".")[: -statement.level]
    return ".".join([*package, *filter(None, [statement.module])])


def parent(module, node):
    """-> (module, ast node) of a class's first parent."""
    if not node.bases or not isinstance(node.bases[0], ast.Name):
        raise UnreadableError(f"{node.name} has no parent that is a plain name")
    return definition(module, node.bases[0].id)


def class_attribute(node, name):
    """The name that a class attribute is set to, or None where there is no such attribute."""
    for statement in node.body if isinstance(node, ast.ClassDef) else ():
        if isinstance(statement, ast.ClassDef) and statement.name == name:
            raise UnreadableError(f"{name} is defined within {node.name}")
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == name:
            if not isinstance(statement.value, ast.Name):
                raise UnreadableError(f"{name} of {node.name} is not a plain name")
            return statement.value.id
    return None


def parse(module):
    """The ast.Module of a module of this repository."""
    path = os.path.join(ROOT, *module.split(".")) + ".py"
    try:
        changed = os.stat(path).st_mtime_ns
        if parsed_files.get(path, (None, None))[0] != changed:
            with open(path, encoding="utf-8") as f:
                parsed_files[path] = changed, ast.parse(f.read())
    except (OSError, ValueError, SyntaxError) as error:
        raise UnreadableError(f"{path}: {error}") from None
    return parsed_files[path][1]


def value_of(node):
    """A default: a number, a word, None, or lists of these. A new object at each call."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise UnreadableError(f"{ast.unparse(node)} is computed") from None


def type_of(node):
    """An annotation: a type, list[...], Literal[...], a | b, or None."""
    if node is None:
        return typing.Any
    if isinstance(node, ast.Constant) and node.value is None:
        return type(None)
    if isinstance(node, ast.Name) and node.id in TYPES:
        return TYPES[node.id]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return type_of(node.left) | type_of(node.right)
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        if node.value.id == "list":
            return list[type_of(node.slice)]
        if node.value.id == "Literal":
            values = value_of(node.slice)
            return typing.Literal[values if isinstance(values, tuple) else (values,)]
    raise UnreadableError(f"{ast.unparse(node)} is no type that settings have")
