"""Config files that build on one another."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ml_collections import config_dict


def neighbour_config(file: str, name: str, arg: str) -> config_dict.ConfigDict:
    """`get_config(arg)` of the config file NAME.py beside `file`.

    A config file is loaded by its path and is part of no package, so it cannot import its neighbour.
    """
    place = importlib.util.spec_from_file_location(name, Path(file).with_name(f"{name}.py"))
    assert place is not None and place.loader is not None
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    return module.get_config(arg)
