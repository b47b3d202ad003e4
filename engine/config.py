"""Settings: a YAML file, `key.sub=value` overrides, checked against the signatures of the code that will receive them.

The keyword-only arguments of a class or function are its YAML keys, their defaults the only defaults, their annotations the types.
They are read from the files (engine/signatures.py): neither torch nor torchvision is imported here.
A file is whole by itself, or says `base: other.yaml` (one level deep, beside it) and holds the difference.
"""

import argparse
import copy
import difflib
import importlib
import inspect
import math
import os
import re
import typing

import yaml

from . import signatures

# section -> whose keyword-only arguments its keys are: "module:name"; {key} is filled in from the section itself
SECTIONS = {
    "data": ["data.datasets:load", "data.loader:Loader"],
    "model": ["models.resnet:Encoder", "models.{host}:{host}"],
    "loss": ["losses.{name}:{name}"],
    "optim": ["engine.schedule:Schedule", "engine.schedule:sgd"],
    "knn": ["evaluation.features:KNN"],
    "log": ["training.run:Run"],
    "linear": ["train_linear:Probe"],
    "finetune": ["train_finetune:Finetune"],
    "detect": ["train_detect:Detect"],
}
OPTIONAL = ("finetune", "detect")  # left out unless the file has them, or a script asks
CHOICE = {
    "model": "host",
    "loss": "name",
}  # the key that chooses the file, and thereby the other keys
PACKAGE = {"model": "models", "loss": "losses"}
PAPER = (
    "table",
    "row",
    "column",
    "figure",
    "reported",
    "source",
)  # figure: which of ours it is, e.g. "linear top-1"; see report.py
TOP = ("name", "seed", "paper", *SECTIONS)


def command_line(description):
    """The arguments that every script shares."""
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
        help="cpu, cuda, cuda:1, mps, xpu ...; left out: the accelerator that there is, else the CPU",
    )
    parser.parse_args = (
        parser.parse_intermixed_args
    )  # key=value may stand before and after the options
    return parser


def answer_early(parser, also=()):
    """What a command line can be told before torch is imported, which takes seconds: --help,
    --print-config and a refusal of the settings end the program here. Else nothing happens.

    also: as load's.
    """
    args = parser.parse_args()
    settings = load(args.cfg, args.overrides, also)
    if args.print_config:
        print(text(settings), end="")
        raise SystemExit


def load(path, overrides=(), also=()):
    """A file and overrides -> the resolved settings, defaults filled in. Anything wrong ends the program with one sentence.

    also: sections of OPTIONAL that are filled in though the file has none.
    """
    settings = merge_base(path)
    for text in sorted(
        overrides,
        key=lambda text: text.partition("=")[0] not in ("loss", "model.host", "loss.name"),
    ):
        override(
            settings, text
        )  # what chooses other keys first: it would take those given before it along
    unknown(settings, TOP, f"{path}:")
    resolved = {"name": settings.get("name", default_name(path)), "seed": settings.get("seed", 0)}
    for key, kind in (("name", str), ("seed", int)):
        resolved[key] = fit(resolved[key], kind, f"{path}: {key}")
    if resolved["seed"] < 0:
        raise SystemExit(f"{path}: seed is {resolved['seed']}; it must be at least 0")
    if (
        resolved["name"] in ("", ".", "..")
        or set("/\\") & set(resolved["name"])
        or len(resolved["name"].encode()) > 200
    ):
        raise SystemExit(
            f"{path}: name is {brief(resolved['name'])}; it must name one folder in runs/, in at most 200 bytes"
        )
    if "paper" in settings:
        unknown(mapping(settings["paper"], f"{path}: paper"), PAPER, f"{path}: paper.")
        resolved["paper"] = {
            key: fit(value, str | int | float | None, f"{path}: paper.{key}")
            for key, value in settings["paper"].items()
        }
    for section in SECTIONS:
        if section in OPTIONAL and section not in settings and section not in also:
            continue
        given = settings.get(section, {})
        if section == "loss" and isinstance(given, list):  # several methods at once
            if not given:
                raise SystemExit(f"{path}: loss is an empty list; give one method or several")
            resolved[section] = [
                resolve(section, one, f"{path}: loss[{i}]") for i, one in enumerate(given)
            ]
        else:
            resolved[section] = resolve(section, given, f"{path}: {section}")
    return resolved


def default_name(path):
    """yaml/ifnd/imagenet_moco.yaml -> ifnd_imagenet_moco; any other file's own name."""
    parts = os.path.splitext(path)[0].split(os.sep)
    return (
        "_".join(parts[len(parts) - parts[::-1].index("yaml") :])
        if "yaml" in parts[:-1]
        else parts[-1]
    )


def resolve(section, given, where):
    """One section as given -> whole, checked."""
    mapping(given, where)
    parameters = {}
    for home in SECTIONS[section]:
        if "{" in home:
            key = home[home.index("{") + 1 : home.index("}")]
            there = modules(PACKAGE[section])
            if key not in given:
                raise SystemExit(f"{where}.{key} is missing; there are {', '.join(there)}")
            if given[key] not in there:
                raise SystemExit(
                    f"{where}.{key} is {brief(given[key])}{nearest(given[key], there)}; there are {', '.join(there)}"
                )
            parameters[key] = inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, annotation=str)
            home = home.replace("{" + key + "}", given[key])
        parameters.update(keys_at(home))
    unknown(given, parameters, where + ".")
    whole = {}
    for key, parameter in parameters.items():
        if key in given:
            whole[key] = fit(given[key], parameter.annotation, f"{where}.{key}")
        elif parameter.default is inspect.Parameter.empty:
            raise SystemExit(
                f"{where}.{key} is missing; add it to the file, or {section}.{key}=... to the command line"
            )
        else:
            whole[key] = copy.copy(parameter.default)  # a list of its own
    return whole


def build(target, section, file, **given):
    """Call `target` with the settings of its section that it names, and those of `given` that it names."""
    names = inspect.signature(target).parameters
    try:
        return target(
            **{k: v for k, v in given.items() if k in names},
            **{k: section[k] for k in yaml_keys(target)},
        )
    except ValueError as error:
        raise SystemExit(f"{file}: {error}")
    except RuntimeError as error:  # torch's; of anything else we want to see where
        if "memory" not in str(error) and "overflow" not in str(error):
            raise
        raise SystemExit(
            f"{file}: this takes more memory than there is ({' '.join(str(error).split())[:200]}); lower its sizes"
        )


def chosen(settings, section):
    """The class that a section's settings choose: the host of `model`, the method of `loss`."""
    name = settings[CHOICE[section]]
    return find(f"{PACKAGE[section]}.{name}:{name}")


def several(loss):
    """The settings of `loss`, one method or a list of them -> the list."""
    return loss if isinstance(loss, list) else [loss]


def find(home):
    """ "module:name" -> the class or function. A method's class has its file's name, in any capitals: losses/ring.py, Ring."""
    module, name = home.split(":")
    module = importlib.import_module(module)
    return getattr(module, name, None) or next(
        v for k, v in vars(module).items() if k.lower() == name and inspect.isclass(v)
    )


def modules(package):
    """The methods, or the hosts: the files in losses/, or those in models/ that are not parts of hosts. There is no registry."""
    folder = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), package)
    return sorted(
        {f[:-3] for f in os.listdir(folder) if f.endswith(".py")}
        - {"__init__", "base", "checks", "diagnostics", "partition", "together"}
        - {"resnet", "memory", "momentum", "rcnn", "views"}
    )


def keys_at(home):
    """keys_of_choice of "module:name"; its module is imported only where that cannot be avoided."""
    try:
        return signatures.keyword_only(home)
    except signatures.Unreadable:
        return keys_of_choice(find(home))


def keys_of_choice(target):
    """The keys that a host or a loss brings: its own, and those that the Encoder of a host which
    has one of its own (CMC) adds to the common one's.
    """
    keys = yaml_keys(target)
    if hasattr(target, "Encoder"):
        common = yaml_keys(target.Encoder.__base__)
        keys |= {k: p for k, p in yaml_keys(target.Encoder).items() if k not in common}
    return keys


def yaml_keys(target):
    """Its keyword-only arguments. A class that hands **settings on has its parent's as well."""
    inherited = {}
    if inspect.isclass(target) and any(
        p.kind is inspect.Parameter.VAR_KEYWORD
        for p in inspect.signature(target).parameters.values()
    ):
        inherited = yaml_keys(target.__base__)
    hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    own = {
        k: p.replace(annotation=hints.get(k, typing.Any))
        for k, p in inspect.signature(target).parameters.items()
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    }
    return inherited | own


# ---------------------------------------------------------------------------------------------------- reading


def merge_base(path):
    settings = read(path)
    if "base" not in settings:
        return settings
    base = settings.pop("base")
    if not isinstance(base, str) or os.path.isabs(base) or not base.endswith(".yaml"):
        raise SystemExit(
            f"{path}: base is {brief(base)}; it must name a .yaml file, from this one's folder"
        )
    base_path = os.path.join(os.path.dirname(path), base)
    base = read(base_path)
    if "base" in base:
        raise SystemExit(
            f"{base_path}: is itself built on a base ({base['base']}); base goes one level deep, so name that file in {path}"
        )
    base.pop("paper", None)  # a row's header is its own
    base.pop("name", None)
    for section, value in settings.items():
        if isinstance(value, dict) and isinstance(base.get(section), dict):
            for key in sorted(
                value, key=lambda k: k != CHOICE.get(section)
            ):  # the choice of host or method first
                put(base[section], section, key, value[key])
        else:
            base[section] = value
    return base


class Plain(yaml.SafeLoader):
    """YAML less what would be taken otherwise than it is meant, in silence (a key twice, 010 for 8, 1:30 for 90), and less what no setting needs: tags, and
    aliases, whose nests grow without bound.
    """

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(
                f"*{event.anchor} stands for what is written elsewhere; write it out, or build on another file with base"
            )
        if event.tag is not None:
            raise ValueError(
                f"{event.tag.replace('tag:yaml.org,2002:', '!!')} is a tag, and settings have none; leave it out"
            )
        return super().compose_node(parent, index)

    def compose_scalar_node(self, anchor):
        node = super().compose_scalar_node(anchor)
        if node.tag.endswith((":int", ":float")) and (
            ":" in node.value or re.fullmatch("[-+]?0[0-7_]+", node.value)
        ):
            raise ValueError(
                f"{brief(node.value)} would be read to the base of {60 if ':' in node.value else 8}; write the number that is meant, and a word in quotes"
            )
        return node

    def compose_mapping_node(self, anchor):
        node, first = super().compose_mapping_node(anchor), {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and first.setdefault(key.value, key) is not key:
                lines = sorted({first[key.value].start_mark.line + 1, key.start_mark.line + 1})
                raise ValueError(
                    f"{shown(key.value)} stands twice, in line {' and '.join(map(str, lines))}; keep one"
                )
        return node


def parse(text, where):
    """YAML, of a string or an open file."""
    try:
        return yaml.load(text, Plain)
    except yaml.YAMLError as error:
        raise SystemExit(f"{where} is not YAML: {' '.join(str(error).split())[:300]}")
    except RecursionError:
        raise SystemExit(f"{where} cannot be read: it is nested too deep")
    except ValueError as error:  # Plain's, and what PyYAML leaves to Python: month 13, bytes that are not UTF-8, a million digits
        raise SystemExit(f"{where} cannot be read: {error}")


def read(path):
    try:
        with open(path, encoding="utf-8") as f:
            settings = parse(f, path)
    except FileNotFoundError:
        folder = os.path.dirname(path) or "."
        there = (
            sorted(f for f in os.listdir(folder) if f.endswith(".yaml"))
            if os.path.isdir(folder)
            else []
        )
        raise SystemExit(f"{path} does not exist{nearest(os.path.basename(path), there)}")
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise SystemExit(f"{shown(path)} cannot be read: {error}")
    return mapping(settings if settings is not None else {}, path)


def override(settings, text):
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise SystemExit(
            f"{brief(text)} on the command line is not key=value, e.g. optim.epochs=10"
        )
    value = parse(value, f"{brief(text)} on the command line: the value")
    *path, last = key.split(".")
    if key == "loss" and isinstance(value, list):  # loss=[{name: ifnd}, {name: ring}]
        settings[key] = value
        return
    if path[:1] == ["loss"] and isinstance(
        settings.get("loss"), list
    ):  # loss.ring.inner=0.05, of a list
        named = {
            str(one["name"]): one
            for one in settings["loss"]
            if isinstance(one, dict) and "name" in one
        }
        if len(path) != 2 or path[1] not in named or last == "name":
            raise SystemExit(
                f"{brief(text)} on the command line: loss is a list, so a key of it is loss.<name>.key, with one of {', '.join(map(shown, named))}"
            )
        put(named[path[1]], "loss", last, value)
        return
    if len(path) > 1 or (not path and last in (*SECTIONS, "base")):
        raise SystemExit(
            f"{brief(text)} on the command line: a key is section.key, e.g. optim.epochs, or one of name and seed"
        )
    if not path:
        settings[last] = value
        return
    if path[0] not in (*SECTIONS, "paper"):
        raise SystemExit(
            f"command line: {shown(path[0])} is not a section{nearest(path[0], SECTIONS)}; there are {', '.join(SECTIONS)}"
        )
    put(mapping(settings.setdefault(path[0], {}), path[0]), path[0], last, value)


def put(section, name, key, value):
    """Set a key. Another host takes none of the old host's keys along (MoCo's `momentum` is not IR's); another method, those that it shares."""
    old = section.get(key)
    if (
        key == CHOICE.get(name)
        and old != value
        and old in modules(PACKAGE[name])
        and value in modules(PACKAGE[name])
    ):
        before, after = (
            set(keys_at(SECTIONS[name][-1].replace("{" + key + "}", v))) for v in (old, value)
        )
        for stale in before if name == "model" else before - after:
            section.pop(stale, None)
    section[key] = value


def mapping(value, where):
    if not isinstance(value, dict):
        raise SystemExit(f"{where} is {brief(value)}; it must hold keys and values")
    return value


def unknown(given, known, where):
    for key in given:
        if key not in known:
            raise SystemExit(
                f"{where}{'' if where.endswith('.') else ' '}{shown(key)} is not a setting{nearest(key, known)}; there are {', '.join(known)}"
            )


def nearest(word, words):
    close = (
        difflib.get_close_matches(word, list(words), n=1, cutoff=0.4)
        if isinstance(word, str)
        else []
    )
    return f"; did you mean {close[0]}?" if close else ""


def brief(value):
    """A value in a sentence: repr, cut where it is long."""
    try:
        words = repr(value)
    except (ValueError, RecursionError):  # 0xfff..., of more digits than Python writes
        return "a value too large to be written"
    return words if len(words) <= 200 else f"{words[:120]} ... {words[-40:]}"


def shown(key):
    """A key in a sentence: as it is, if it is a word."""
    return (
        key
        if isinstance(key, str) and key and key.isprintable() and len(key) <= 200
        else brief(key)
    )


# ---------------------------------------------------------------------------------------------------- types


def fit(value, kind, where):
    """Value as `kind` (int, float, bool, str, list[...], Literal[...], a union with None), or one sentence."""
    if kind is typing.Any:
        return value
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        if value not in inner or isinstance(value, bool) != any(
            v is value for v in inner if isinstance(v, bool)
        ):
            raise SystemExit(
                f"{where} is {brief(value)}{nearest(value, map(str, inner))}; it must be one of {', '.join(map(str, inner))}"
            )
        return value
    if inner and origin is not list:  # a union: the first that fits
        for one in inner:
            try:
                return fit(value, one, where)
            except SystemExit:
                pass
        raise SystemExit(f"{where} is {brief(value)}; it must be {' or '.join(map(word, inner))}")
    if origin is list:
        if not isinstance(value, list):
            raise SystemExit(f"{where} is {brief(value)}; it must be {word(kind)}")
        return [fit(v, inner[0], f"{where}[{i}]") for i, v in enumerate(value)]
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-4, without a point, as a word
        try:
            value = float(value)
        except ValueError:
            pass
    if (
        kind in (int, float) and type(value) is int and abs(value) > 2**53
    ):  # beyond, a float is not exact, and no count or seed needs it
        raise SystemExit(f"{where} is {brief(value)}; it must be {word(kind)}, of 2 ** 53 at most")
    if kind is float and type(value) is int:
        value = float(value)
    if (
        type(value) is not kind or kind is float and not math.isfinite(value)
    ):  # NaN and infinity are no numbers here
        raise SystemExit(f"{where} is {brief(value)}; it must be {word(kind)}")
    if kind is str and not (value.isprintable() and len(value) <= 1000):
        raise SystemExit(
            f"{where} is {brief(value)}; it must be printable, and 1000 characters at most"
        )
    return value


def word(kind):
    if typing.get_origin(kind) is list:
        return f"a list of {word(typing.get_args(kind)[0]).split(' ', 1)[1]}s"
    return {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a word",
        type(None): "null",
    }.get(kind, str(kind))


# ---------------------------------------------------------------------------------------------------- writing


def text(settings):
    """Resolved settings as YAML, a line a section."""
    return "".join(
        f"{key}: {yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6).strip().removesuffix('...').strip()}\n"
        for key, value in settings.items()
    )


def keep(settings, folder):
    """config.yaml for a row of its own, which evaluates another run's weights; one that training wrote stays."""
    path = os.path.join(folder, "config.yaml")
    if not os.path.exists(path):
        with open(path, "w") as f:
            f.write(text(settings))


def difference(old, new, ignore=()):
    """The first setting that differs, as words, or None."""
    for section in [*old, *(k for k in new if k not in old)]:
        a, b = old.get(section), new.get(section)
        if section in ignore or a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            for key in [*a, *(k for k in b if k not in a)]:
                if f"{section}.{key}" not in ignore and a.get(key) != b.get(key):
                    return f"{section}.{key} was {a.get(key)!r} and is now {b.get(key)!r}"
        else:
            return f"{section} was {a!r} and is now {b!r}"
    return None
