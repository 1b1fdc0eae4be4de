"""Attention types that are defined outside model.py: `register` makes one known, --plugin=FILE runs a file that does.

    from model import Attention, register

    class MyAttention(Attention):
        slots = 64  # its settings are class attributes
        ...

    register("mine", MyAttention)

A checkpoint stores the path of its plugin and never runs it: only --plugin and config files do.
"""

import inspect
import os
import shlex
import sys
import types

import torch.nn as nn

import config
from config import ConfigError

imported = set()  # real paths of the files that ran
registered = set()  # names of types that are not model.py's own


def register(name, cls, replace=False):
    """Make `cls` the attention type `name`. ConfigError where it cannot be one, or where the name is taken;
    replace=True takes the name of another type from outside model.py, as an edited cell of a notebook must."""
    from model import ATTENTION, Attention  # which imports this module

    where = f"register({name!r}, ...)"
    if not isinstance(name, str) or not name.isidentifier() or name == "all":
        raise ConfigError(f"{where}: a name is letters, digits and _, and not `all`")
    if not isinstance(cls, type) or not issubclass(cls, Attention):
        raise ConfigError(f"{where}: {cls!r} is not a class that extends Attention (from model import Attention)")
    methods = [m for m in ("forward", "init_state", "step", "flops") if getattr(cls, m) is getattr(Attention, m)]
    if cls.__init__ is nn.Module.__init__:
        methods.insert(0, "__init__")
    if methods:
        raise ConfigError(f"{where}: {cls.__name__} lacks {', '.join(methods)}; Attention in model.py states each")
    try:
        inspect.signature(cls).bind("config")
    except TypeError as error:
        raise ConfigError(f"{where}: {cls.__name__} must be made by __init__(self, config): {error}") from None
    taken = ATTENTION.get(name)
    if taken is not None and not (replace and name in registered):
        hint = ", or register with replace=True" if name in registered else ""
        raise ConfigError(f"{where}: the name is taken by {taken.__name__}: write another{hint}")
    ATTENTION[name] = cls
    registered.add(name)


def split(text):
    """The files that `plugin` names."""
    return [path.strip() for path in text.split(",") if path.strip()]


def import_plugins(text):
    """Run each file that `plugin` names, once in a process. Each must register an attention type."""
    from model import ATTENTION

    for path in split(text):
        if os.path.realpath(path) in imported:
            continue
        if not path.endswith(".py"):
            raise ConfigError(f"plugin {path}: not a Python file; write --plugin=my_attention.py")
        module = types.ModuleType("plugin_" + os.path.basename(path).removesuffix(".py"))
        module.__file__ = path
        sys.modules[module.__name__] = module  # where dataclasses and pickles look for the names of a class
        before = dict(ATTENTION)
        try:
            config.run_file(path, vars(module), "a plugin defines attention types and registers them")
        except ConfigError as error:
            raise ConfigError(f"plugin {error}") from None
        if before == ATTENTION:
            raise ConfigError(f'plugin {path} registers nothing: end it with register("NAME", CLASS), from model')
        imported.add(os.path.realpath(path))


def unknown_type(name, plugin, known):
    """What is wrong with an attention type that nobody registered; `plugin` is what its config names."""
    waiting = [path for path in split(plugin) if os.path.realpath(path) not in imported]
    if waiting:
        path = shlex.quote(plugin)
        return f"attention_type: no type {name!r} yet: add --plugin={path}, the file that registers it (or import it)"
    return f"attention_type: no type {name!r}; write one of {', '.join(known)}, or add the --plugin=FILE of your own"
