"""YAML and command-line overrides become one validated `Settings`. `DictConfig` never leaves this
file."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from populace.configs.checks import problems
from populace.configs.schema import Settings
from populace.storage.errors import InvalidInput


class ConfigError(InvalidInput):
    """A setting that does not exist or has an impossible value."""


def load_settings(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Settings:
    """Read `path` (YAML) and apply `overrides` (`section.key=value`); unknown keys and bad values
    raise `ConfigError` with the key, its value and what would be right."""
    schema = OmegaConf.structured(Settings)
    OmegaConf.set_readonly(schema, False)
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"override {override!r} has no '='; write section.key=value")
    try:
        merged = OmegaConf.merge(schema, *_layers(path), OmegaConf.from_dotlist(list(overrides)))
        settings = OmegaConf.to_object(merged)
    except yaml.YAMLError as error:
        raise ConfigError(f"override among {list(overrides)} is not valid YAML: {error}") from None
    except ConfigKeyError as error:
        raise ConfigError(_unknown_key(str(error.full_key))) from None
    except OmegaConfBaseException as error:
        reason = str(error.msg or error).splitlines()[0]
        raise ConfigError(f"setting {error.full_key or '?'}: {reason}") from None
    assert isinstance(settings, Settings)
    if found := problems(settings):
        raise ConfigError("; ".join(found))
    return settings


def settings_as_dict(settings: Settings) -> dict[str, Any]:
    """Plain nested dictionaries, for manifests and reports."""
    return asdict(settings)


def _layers(path: str | Path | None) -> list[Any]:
    """What the file says, if there is one."""
    if path is None:
        return []
    try:
        content = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(
            f"no configuration file at {str(path)!r} ({error.strerror}); give the path of a YAML "
            "file"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(content or {}, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}; write settings as key: value")
    return [OmegaConf.create(content or {})]


def _unknown_key(key: str) -> str:
    close = difflib.get_close_matches(key, _known_keys(asdict(Settings())), n=1)
    hint = (
        f"did you mean {close[0]}?"
        if close
        else "see docs/reference/configuration.md for all settings"
    )
    return f"unknown setting {key!r}; {hint}"


def _known_keys(node: dict[str, Any], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, value in node.items():
        keys.append(prefix + name)
        if isinstance(value, dict):
            keys += _known_keys(value, f"{prefix}{name}.")
    return keys
