"""Settings: a YAML file and `key.sub=value` overrides, checked.

The keyword-only arguments of a class or function are its YAML keys, their defaults are the only
defaults, and their annotations are the types. They are read from the files (engine/signatures.py):
neither torch nor torchvision is imported here.

A file is whole by itself, or it says `base: other.yaml` (a file beside it, and one level deep) and
holds the difference.
"""

import argparse
import contextlib
import copy
import difflib
import importlib
import inspect
import json
import math
import os
import re
import typing

import yaml

from . import console, orphans, signals, signatures

# Each section, and whose keyword-only arguments its keys are ("module:name"). {key} is filled in
# from the section itself.
SECTIONS = {
    "data": ["data.datasets:load", "data.loader:Loader"],
    "model": ["models.resnet:Encoder", "models.{host}:{host}"],
    "loss": ["losses.{name}:{name}"],
    "optim": ["engine.schedule:Schedule", "engine.schedule:sgd"],
    "knn": [
        "evaluation.features:KNN",
        "evaluation.features:labelled_parts",
        "evaluation.unlabelled:Unlabelled",
    ],
    "log": ["training.run:Run"],
    "linear": ["train_linear:Probe"],
    "finetune": ["train_finetune:Finetune"],
    "detect": ["train_detect:Detect"],
}
# These are left out unless the file has them, or a script asks for them.
OPTIONAL = ("finetune", "detect")
# The key of a section that chooses a file, and thereby the other keys; and where the files are.
CHOICE = {"model": "host", "loss": "name"}
PACKAGE = {"model": "models", "loss": "losses"}
# Parts of hosts and methods, whose classes have the names of their files, too.
PARTS = ("resnet", "together")
# `figure` says which of our figures is reported, e.g. "linear top-1": see report.py.
# `scale`, set by reproduce.py, says that a run is a small version of the row: see engine/scale.py.
PAPER = ("table", "row", "column", "figure", "reported", "source", "scale")
TOP = ("name", "seed", "weights", "paper", *SECTIONS)


# ------------------------------------------------------------------------------- the command line


def command_line(description):
    """The arguments that every script shares, as an argparse.ArgumentParser."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cfg", required=True, metavar="FILE", help="a file in yaml/")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.sub=value",
        help="settings that replace the file's, e.g. optim.epochs=10",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved settings and exit"
    )
    parser.add_argument(
        "--device",
        metavar="NAME",
        help="cpu, cuda, cuda:1, mps, xpu ...; "
        "left out: the accelerator that there is, else the CPU",
    )
    # key=value may stand before and after the options.
    parser.parse_args = parser.parse_intermixed_args
    return parser


def answer_early(parser, also=()):
    """Prepare this process and look at its command line, before torch is imported.

    Importing torch takes seconds. --help, --print-config and a refusal of the settings, which the
    first process of each machine says, end the program here. The arguments are those of
    `read_command_line`.
    """
    console.accept_any_character()
    console.show_warnings_plainly()
    signals.listen()
    orphans.end_with_launcher()
    try:
        read_command_line(parser, also)
    except SystemExit as refusal:
        # Processes know nothing of one another yet. A file may be missing on one machine alone.
        is_first = os.environ.get("LOCAL_RANK", "0") == "0"
        raise SystemExit(refusal.code if is_first or not refusal.code else 1) from None


def read_command_line(parser, also=()):
    """The arguments of the command line and the settings; --print-config ends the program here.

    Args:
        parser: what `command_line` returns, with a script's own arguments.
        also: see `load`.
    """
    args = parser.parse_args()
    overrides = list(args.overrides)
    # train_pretrain.py's --weights; the other scripts' is no setting.
    if getattr(args, "begin_from", None) is not None:
        overrides.append(f"weights={json.dumps(args.begin_from)}")
    settings = load(args.cfg, overrides, also)
    if args.print_config:
        print(to_yaml(settings), end="")
        raise SystemExit
    return args, settings


# ---------------------------------------------------------------------------- the settings, whole


def load(path, overrides=(), also=()):
    """Resolve the settings of a file and of overrides, defaults filled in.

    Args:
        path: of a YAML file.
        overrides: strings `key.sub=value`.
        also: sections of OPTIONAL that are filled in though the file has none.

    Returns:
        {section: {key: value}}, and `name`, `seed` and, where they are given, `weights`, the file
        that the run begins from, and `paper`.

    Raises:
        SystemExit: one sentence that names what is wrong.
    """
    settings = load_with_base(path)
    # What chooses other keys comes first: it would take those given before it along.
    for words in sorted(overrides, key=is_no_choice):
        override(settings, words)
    refuse_unknown_keys(settings, TOP, f"{path}:")
    resolved = {
        "name": coerce(settings.get("name", default_name(path)), str, f"{path}: name"),
        "seed": coerce(settings.get("seed", 0), int, f"{path}: seed"),
    }
    check_name(resolved["name"], path)
    if resolved["seed"] < 0:
        raise SystemExit(f"{path}: seed is {resolved['seed']}; it must be at least 0")
    if settings.get("weights") is not None:
        resolved["weights"] = coerce(settings["weights"], str, f"{path}: weights")
        check_weights(resolved["weights"], path)
    if "paper" in settings:
        refuse_unknown_keys(
            require_mapping(settings["paper"], f"{path}: paper"), PAPER, f"{path}: paper."
        )
        resolved["paper"] = {
            key: coerce(value, str | int | float | None, f"{path}: paper.{key}")
            for key, value in settings["paper"].items()
        }
    for section in SECTIONS:
        if section in OPTIONAL and section not in settings and section not in also:
            continue
        given = settings.get(section, {})
        where = f"{path}: {section}"
        if section == "loss" and isinstance(given, list):  # several methods at once
            if not given:
                raise SystemExit(f"{where} is an empty list; give one method or several")
            resolved[section] = [
                resolve(section, method, f"{where}[{i}]") for i, method in enumerate(given)
            ]
        else:
            resolved[section] = resolve(section, given, where)
    return resolved


def is_no_choice(words):
    """Does an override `key=value` leave the host and the methods as they are?"""
    return words.partition("=")[0] not in ("loss", "model.host", "loss.name")


def check_name(name, path):
    """Refuse a name that is no folder's."""
    is_one_folder = name not in ("", ".", "..") and not set("/\\") & set(name)
    if not is_one_folder or len(name.encode()) > 200:
        raise SystemExit(
            f"{path}: name {shorten(name)} must name one folder in runs/, in at most 200 bytes"
        )


def check_weights(weights, path):
    """Refuse a word that is no file's."""
    if weights in ("", "none"):
        raise SystemExit(
            f"{path}: weights is {weights!r}; it names the file that a run begins from, and a run "
            "without it begins at random: leave it out"
        )


def default_name(path):
    """yaml/ifnd/imagenet_moco.yaml -> ifnd_imagenet_moco; of any other file its own name."""
    parts = os.path.splitext(path)[0].split(os.sep)
    if "yaml" not in parts[:-1]:
        return parts[-1]
    after_yaml = len(parts) - parts[::-1].index("yaml")
    return "_".join(parts[after_yaml:])


def resolve(section, given, where):
    """Check one section and fill its defaults in.

    Args:
        section: its name.
        given: {key: value}, as the file and the command line have it.
        where: file and section, for sentences.
    """
    require_mapping(given, where)
    parameters = {}
    for home in SECTIONS[section]:
        if "{" in home:
            key = CHOICE[section]
            choices = modules(PACKAGE[section])
            if key not in given:
                raise SystemExit(f"{where}.{key} is missing; there are {', '.join(choices)}")
            if given[key] not in choices:
                raise SystemExit(
                    f"{where}.{key} is {shorten(given[key])}{did_you_mean(given[key], choices)}; "
                    f"there are {', '.join(choices)}"
                )
            parameters[key] = inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, annotation=str)
            home = home.replace("{" + key + "}", given[key])
        parameters.update(keys_at(home))
    refuse_unknown_keys(given, parameters, where + ".")
    resolved = {}
    for key, parameter in parameters.items():
        if key in given:
            resolved[key] = coerce(given[key], parameter.annotation, f"{where}.{key}")
        elif parameter.default is inspect.Parameter.empty:
            raise SystemExit(
                f"{where}.{key} is missing; add it to the file, or {section}.{key}=... "
                "to the command line"
            )
        else:
            # Settings have a list of their own.
            resolved[key] = copy.copy(parameter.default)
    return resolved


def build(target, section, file, **given):
    """Call a class or function with the settings that it names.

    Args:
        target: the class or function.
        section: the settings of its section.
        file: where the settings come from, for sentences.
        given: what the script supplies; what the target does not name is left out.
    """
    names = inspect.signature(target).parameters
    keys = yaml_keys(target)
    try:
        return target(
            **{name: value for name, value in given.items() if name in names},
            **{key: section[key] for key in keys},
        )
    except ValueError as error:
        raise SystemExit(f"{file}: {error}") from None
    except RuntimeError as error:
        # Of any other error we want to see where it was raised.
        if "memory" not in str(error) and "overflow" not in str(error):
            raise
        sizes = [key for key in keys if type(section[key]) is int]
        reason = " ".join(str(error).split())[:200]
        raise SystemExit(
            f"{file}: this takes more memory than there is ({reason}); "
            f"lower {' or '.join(sizes) or 'the number of images'}"
        ) from None


def method_class(settings, section):
    """The class that a section's settings choose: the host of `model`, the method of `loss`."""
    name = settings[CHOICE[section]]
    return import_object(f"{PACKAGE[section]}.{name}:{name}")


def loss_settings(loss):
    """The settings of `loss`, one method or a list of them, as a list."""
    return loss if isinstance(loss, list) else [loss]


def import_object(home):
    """Import "module:name".

    A method's class has its file's name, in any capitals: losses/ring.py has Ring.
    """
    path, name = home.split(":")
    module = importlib.import_module(path)
    if hasattr(module, name):
        return getattr(module, name)
    classes = (value for value in vars(module).values() if inspect.isclass(value))
    return next(value for value in classes if value.__name__.lower() == name)


def modules(package):
    """The methods of losses/, or the hosts of models/. There is no registry.

    They are the files with a class that has the file's name, in any capitals.
    """
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    names = []
    for file in sorted(os.listdir(os.path.join(root, package))):
        name, ending = os.path.splitext(file)
        if ending == ".py" and name not in PARTS:
            with open(os.path.join(root, package, file), encoding="utf-8") as module:
                if re.search(rf"^class {name}\b", module.read(), re.IGNORECASE | re.MULTILINE):
                    names.append(name)
    return names


def keys_at(home):
    """As `keys_of_choice`, of "module:name", which is imported only where there is no other way."""
    try:
        return signatures.keyword_only(home)
    except signatures.UnreadableError:
        return keys_of_choice(import_object(home))


def keys_of_choice(target):
    """The keys that a host or a method brings.

    They are its own, and those that the Encoder of a host which has one (CMC) adds to the common
    Encoder's.
    """
    keys = yaml_keys(target)
    if hasattr(target, "Encoder"):
        common = yaml_keys(target.Encoder.__base__)
        added = yaml_keys(target.Encoder)
        keys |= {key: parameter for key, parameter in added.items() if key not in common}
    return keys


def yaml_keys(target):
    """The keyword-only arguments of a class or function, as a dict of inspect.Parameter.

    A class that hands **settings on has its parent's as well.
    """
    parameters = inspect.signature(target).parameters.values()
    hands_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    keys = yaml_keys(target.__base__) if inspect.isclass(target) and hands_on else {}
    hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            kind = hints.get(parameter.name, typing.Any)
            keys[parameter.name] = parameter.replace(annotation=kind)
    return keys


# ---------------------------------------------------------------------------------------- reading


def load_with_base(path):
    """The settings of a file, put over those of its base, if it has one."""
    settings = read_yaml(path)
    if "base" not in settings:
        return settings
    base = settings.pop("base")
    if not isinstance(base, str) or os.path.isabs(base) or not base.endswith(".yaml"):
        raise SystemExit(
            f"{path}: base is {shorten(base)}; it must name a .yaml file, from this one's folder"
        )
    base_path = os.path.join(os.path.dirname(path), base)
    base = read_yaml(base_path)
    if "base" in base:
        raise SystemExit(
            f"{base_path}: is itself built on a base ({base['base']}); base goes one level deep, "
            f"so name that file in {path}"
        )
    # The name and the paper's row are each file's own.
    base.pop("paper", None)
    base.pop("name", None)
    for section, value in settings.items():
        if isinstance(value, dict) and isinstance(base.get(section), dict):
            # The choice of host or method comes first.
            for key in sorted(value, key=lambda key: key != CHOICE.get(section)):
                set_option(base[section], section, key, value[key])
        else:
            base[section] = value
    return base


class PlainLoader(yaml.SafeLoader):
    """YAML without what is easily misread, and without what settings do not need.

    A key that stands twice, 010 (which is 8) and 1:30 (which is 90) would be taken otherwise than
    they are meant, without a word. Tags are not needed, nor are aliases, whose nests grow without
    bound.
    """

    def compose_node(self, parent, index):
        """Refuse aliases and tags."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(
                f"*{event.anchor} stands for what is written elsewhere; "
                f"write it out{in_line(event)}, or build on another file with base"
            )
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            raise ValueError(
                f"{tag}{in_line(event)} is a tag, and settings have none; leave it out"
            )
        return super().compose_node(parent, index)

    def compose_scalar_node(self, anchor):
        """Refuse numbers to the base of 8 or 60."""
        node = super().compose_scalar_node(anchor)
        is_number = node.tag.endswith((":int", ":float"))
        is_octal = re.fullmatch("[-+]?0[0-7_]+", node.value)
        if is_number and (":" in node.value or is_octal):
            raise ValueError(
                f"{shorten(node.value)}{in_line(node)} would be read to the base of "
                f"{60 if ':' in node.value else 8}; write the number that is meant, "
                "and a word in quotes"
            )
        return node

    def compose_mapping_node(self, anchor):
        """Refuse a key that stands twice."""
        node = super().compose_mapping_node(anchor)
        first = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and first.setdefault(key.value, key) is not key:
                lines = sorted({first[key.value].start_mark.line + 1, key.start_mark.line + 1})
                raise ValueError(
                    f"{quote(key.value)} stands twice, in line "
                    f"{' and '.join(map(str, lines))}; keep one"
                )
        return node


def in_line(node):
    """Where in a file a YAML node or event stands; a value on the command line has one line."""
    mark = node.start_mark
    return "" if mark.name.startswith("<") else f" in line {mark.line + 1}"


def parse_yaml(stream, where):
    """Read YAML from a string or an open file. where: what it is, for sentences."""
    try:
        return yaml.load(stream, PlainLoader)
    except yaml.YAMLError as error:
        raise SystemExit(f"{where} is not YAML: {' '.join(str(error).split())[:300]}") from None
    except RecursionError:
        raise SystemExit(f"{where} cannot be read: it is nested too deep") from None
    except ValueError as error:
        # Plain's, and what PyYAML leaves to Python: month 13, bytes that are not UTF-8, a number
        # of a million digits.
        raise SystemExit(f"{where} cannot be read: {error}") from None


def read_yaml(path):
    """The settings in a YAML file, as they stand there."""
    try:
        with open(path, encoding="utf-8") as file:
            settings = parse_yaml(file, path)
    except FileNotFoundError:
        folder = os.path.dirname(path) or "."
        files = os.listdir(folder) if os.path.isdir(folder) else []
        yaml_files = sorted(file for file in files if file.endswith(".yaml"))
        guess = did_you_mean(os.path.basename(path), yaml_files)
        raise SystemExit(f"{path} does not exist{guess}") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise SystemExit(f"{quote(path)} cannot be read: {error}") from None
    return require_mapping(settings if settings is not None else {}, path)


def override(settings, words):
    """Put an override of the command line, `key.sub=value`, into the settings."""
    key, equals, value = words.partition("=")
    where = f"{shorten(words)} on the command line"
    if not equals or not key:
        raise SystemExit(f"{where} is not key=value, e.g. optim.epochs=10")
    value = parse_yaml(value, f"{where}: the value")
    *path, last = key.split(".")
    if key == "loss" and isinstance(value, list):  # loss=[{name: ifnd}, {name: ring}]
        settings[key] = value
        return
    if path[:1] == ["loss"] and isinstance(settings.get("loss"), list):
        override_in_list(settings["loss"], path[1:], last, value, where)
        return
    if len(path) > 1 or (not path and last in (*SECTIONS, "base")):
        raise SystemExit(
            f"{where}: a key is section.key, e.g. optim.epochs, or one of name, seed and weights"
        )
    if not path:
        settings[last] = value
        return
    if path[0] not in (*SECTIONS, "paper"):
        raise SystemExit(
            f"command line: {quote(path[0])} is not a section{did_you_mean(path[0], SECTIONS)}; "
            f"there are {', '.join(SECTIONS)}"
        )
    set_option(require_mapping(settings.setdefault(path[0], {}), path[0]), path[0], last, value)


def override_in_list(methods, path, key, value, where):
    """Set a key of one method of several: loss.ring.inner=0.05. path: ["ring"]."""
    by_name = {
        str(method["name"]): method
        for method in methods
        if isinstance(method, dict) and "name" in method
    }
    if len(path) != 1 or path[0] not in by_name or key == "name":
        raise SystemExit(
            f"{where}: loss is a list, so a key of it is loss.<name>.key, "
            f"with one of {', '.join(map(quote, by_name))}"
        )
    set_option(by_name[path[0]], "loss", key, value)


def set_option(section, name, key, value):
    """Set a key of a section.

    Another host takes none of the old host's keys along (MoCo's `momentum` is not IR's); another
    method takes those that it shares.

    Args:
        section: its settings, which are changed.
        name: the section's name.
        key: a key of it.
        value: what it becomes.
    """
    old = section.get(key)
    is_choice = key == CHOICE.get(name) and old != value
    # What is wrong (a list, say) is refused later.
    if is_choice and all(choice in modules(PACKAGE[name]) for choice in (old, value)):
        home = SECTIONS[name][-1]
        before = set(keys_at(home.replace("{" + key + "}", old)))
        after = set(keys_at(home.replace("{" + key + "}", value)))
        for stale in before if name == "model" else before - after:
            section.pop(stale, None)
    section[key] = value


def require_mapping(value, where):
    """The value, if it holds keys and values; where: what it is, for the sentence."""
    if not isinstance(value, dict):
        raise SystemExit(f"{where} is {shorten(value)}; it must hold keys and values")
    return value


def refuse_unknown_keys(given, known, where):
    """Refuse keys in `given` that are not in `known`."""
    for key in given:
        if key not in known:
            space = "" if where.endswith(".") else " "
            raise SystemExit(
                f"{where}{space}{quote(key)} is not a setting{did_you_mean(key, known)}; "
                f"there are {', '.join(known)}"
            )


# ----------------------------------------------------------------------------- words of sentences


def did_you_mean(name, names):
    """`; did you mean ...?` if one of the names is similar, else nothing."""
    if not isinstance(name, str):
        return ""
    similar = difflib.get_close_matches(name, list(names), n=1, cutoff=0.4)
    return f"; did you mean {similar[0]}?" if similar else ""


def shorten(value):
    """A value in a sentence: its repr, cut where it is long."""
    try:
        words = repr(value)
    except (ValueError, RecursionError):  # 0xfff..., of more digits than Python writes
        return "a value too large to be written"
    return words if len(words) <= 200 else f"{words[:120]} ... {words[-40:]}"


def quote(key):
    """A key in a sentence: as it is, if it is a word."""
    is_word = isinstance(key, str) and key and key.isprintable() and len(key) <= 200
    return key if is_word else shorten(key)


# ------------------------------------------------------------------------------------------ types


def coerce(value, kind, where):
    """A value as the type that its key has.

    Args:
        value: as YAML reads it.
        kind: int, float, bool, str, list[...], Literal[...], or a union with None.
        where: file and key, for the sentence.

    Raises:
        SystemExit: one sentence that says what the value must be.
    """
    if kind is typing.Any:
        return value
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return coerce_literal(value, inner, where)
    if origin is list:
        if not isinstance(value, list):
            raise SystemExit(f"{where} is {shorten(value)}; it must be {type_name(kind)}")
        return [coerce(item, inner[0], f"{where}[{i}]") for i, item in enumerate(value)]
    if inner:  # a union: the first that fits
        for member in inner:
            try:
                return coerce(value, member, where)
            except SystemExit:
                pass
        raise SystemExit(
            f"{where} is {shorten(value)}; it must be {' or '.join(map(type_name, inner))}"
        )
    return coerce_plain(value, kind, where)


def coerce_literal(value, choices, where):
    """As `coerce`, of one of several values."""
    # 1 == True, but a number is no yes or no.
    is_choice = any(value == c and isinstance(value, bool) == isinstance(c, bool) for c in choices)
    if not is_choice:
        names = [str(choice) for choice in choices]
        raise SystemExit(
            f"{where} is {shorten(value)}{did_you_mean(value, names)}; "
            f"it must be one of {', '.join(names)}"
        )
    return value


def coerce_plain(value, kind, where):
    """As `coerce`, of int, float, bool, str or None."""
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-4, without a point, as a word
        with contextlib.suppress(ValueError):
            value = float(value)
    # Beyond 2 ** 53 a float is not exact, and no count or seed needs it.
    if kind in (int, float) and type(value) is int and abs(value) > 2**53:
        raise SystemExit(
            f"{where} is {shorten(value)}; it must be {type_name(kind)}, of 2 ** 53 at most"
        )
    if kind is float and type(value) is int:
        value = float(value)
    # NaN and infinity are no numbers here.
    if type(value) is not kind or kind is float and not math.isfinite(value):
        raise SystemExit(f"{where} is {shorten(value)}; it must be {type_name(kind)}")
    if kind is str and not (value.isprintable() and len(value) <= 1000):
        raise SystemExit(
            f"{where} is {shorten(value)}; it must be printable, and 1000 characters at most"
        )
    return value


def type_name(kind):
    """A type in a sentence."""
    if typing.get_origin(kind) is list:
        item = type_name(typing.get_args(kind)[0]).split(" ", 1)[1]
        return f"a list of {item}s"
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(map(str, typing.get_args(kind)))
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a word",
        type(None): "null",
    }
    return words.get(kind, str(kind))


# ---------------------------------------------------------------------------------------- writing


def to_yaml(settings):
    """Resolved settings as YAML, a line a section."""
    return "".join(f"{section}: {in_one_line(value)}\n" for section, value in settings.items())


def in_one_line(value):
    """A value as YAML, as it stands in a file and on the command line."""
    dumped = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6)
    # PyYAML ends a document that is one value with "...".
    return dumped.strip().removesuffix("...").strip()


def save_if_missing(settings, folder):
    """Write config.yaml, where training has not written one.

    A file that evaluates another run's weights is a row of its own.
    """
    path = os.path.join(folder, "config.yaml")
    if not os.path.exists(path):
        with open(path, "w") as file:
            file.write(to_yaml(settings))


def difference(old, new, ignore=()):
    """The first setting that differs, as words, or None. ignore: sections, and section.key."""
    for section in [*old, *(section for section in new if section not in old)]:
        a, b = old.get(section), new.get(section)
        if section in ignore or a == b:
            continue
        if not isinstance(a, dict) or not isinstance(b, dict):
            return f"{section} was {a!r} and is now {b!r}"
        for key in [*a, *(key for key in b if key not in a)]:
            if f"{section}.{key}" not in ignore and a.get(key) != b.get(key):
                return f"{section}.{key} was {a.get(key)!r} and is now {b.get(key)!r}"
    return None
