"""`CONFIG`: which server, which key, and how patiently.

Each value is looked up when it is used: what code set, else the environment, else the file, else the default.

    CONFIG.HOST = "https://lab.example.org"      # or INTERPOSE_HOST, or `host = "..."` in the file
    CONFIG.API_KEY = "..."                       # or INTERPOSE_API_KEY, or `api_key = "..."`

The file is `config.toml` in the user's configuration folder; INTERPOSE_CONFIG names another.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar, overload
from urllib.parse import urlsplit

from .errors import ConfigError

T = TypeVar("T")


def _text(value: Any) -> str | None:
    if not isinstance(value, str):
        raise ValueError("a text is expected")
    return value.strip() or None


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not float(value) > 0:
        raise ValueError("a positive number of seconds is expected")
    return float(value)


def _switch(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    word = str(value).strip().lower()
    if word not in ("1", "true", "yes", "on", "0", "false", "no", "off"):
        raise ValueError("true or false is expected")
    return word in ("1", "true", "yes", "on")


def _backend(value: Any) -> str:
    if value not in ("auto", "torch", "numpy"):
        raise ValueError("'auto', 'torch' or 'numpy' is expected")
    return str(value)


class _Setting(Generic[T]):
    """One value of the configuration; the same object serves its upper-case and lower-case name."""

    def __init__(self, parse: Callable[[Any], T], default: T, *env: str) -> None:
        self.parse = parse
        self.default = default
        self.env = env
        self.name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name.lower()

    @overload
    def __get__(self, config: None, owner: type) -> _Setting[T]: ...
    @overload
    def __get__(self, config: Config, owner: type) -> T: ...
    def __get__(self, config: Config | None, owner: type) -> T | _Setting[T]:
        if config is None:
            return self
        if self.name in config._chosen:
            chosen: T = config._chosen[self.name]
            return chosen
        for name in self.env:
            if os.environ.get(name, "").strip():
                return self._parsed(os.environ[name], name)
        path, values = _file()
        return self._parsed(values[self.name], f"{self.name} in {path}") if self.name in values else self.default

    def __set__(self, config: Config, value: T | None) -> None:
        """None goes back to the environment and the file."""
        if value is None:
            config._chosen.pop(self.name, None)
        else:
            config._chosen[self.name] = self._parsed(value, f"CONFIG.{self.name.upper()}")

    def _parsed(self, value: Any, where: str) -> T:
        try:
            return self.parse(value)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{where}: {error}") from error


class _Section:
    """Settings under the names nnsight has for them: `CONFIG.API.APIKEY`, `CONFIG.APP.REMOTE_LOGGING`."""

    _names: Mapping[str, str]

    def __init__(self, config: Config, **names: str) -> None:
        self.__dict__.update(_config=config, _names=names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_config"], self._meant(name))

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_config"], self._meant(name), value)

    def _meant(self, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in self._names:
            known = ", ".join(f"{here} is CONFIG.{there}" for here, there in self._names.items())
            raise ConfigError(f"there is no {name} here; {known}; an address has its scheme: https://...")
        return self._names[name]


class Config:
    """The client's settings.

    Attributes:
        HOST: the server's address; without a scheme, http on this machine and https elsewhere.
        API_KEY: the key the lab handed out.
        TIMEOUT: seconds an accepted job's connection may stay lost before waiting for it fails.
        CONNECT_TIMEOUT: seconds for the first contact.
        LOAD_TIMEOUT: seconds to wait for a model that the server has to load first.
        PROGRESS: whether waiting shows a status line.
        BACKEND: "torch" or "numpy" results; "auto" is torch where it is installed.
    """

    __slots__ = ("_chosen",)
    _chosen: dict[str, Any]

    HOST = host = _Setting(_text, None, "INTERPOSE_HOST", "NDIF_HOST")
    API_KEY = api_key = _Setting(_text, None, "INTERPOSE_API_KEY", "NDIF_API_KEY")
    TIMEOUT = timeout = _Setting(_seconds, 120.0, "INTERPOSE_TIMEOUT")
    CONNECT_TIMEOUT = connect_timeout = _Setting(_seconds, 5.0, "INTERPOSE_CONNECT_TIMEOUT")
    LOAD_TIMEOUT = load_timeout = _Setting(_seconds, 900.0, "INTERPOSE_LOAD_TIMEOUT")
    PROGRESS = progress = _Setting(_switch, True, "INTERPOSE_PROGRESS")
    BACKEND = backend = _Setting(_backend, "auto", "INTERPOSE_BACKEND")

    def __init__(self) -> None:
        object.__setattr__(self, "_chosen", {})

    def __setattr__(self, name: str, value: Any) -> None:
        if not isinstance(type(self).__dict__.get(name), _Setting):
            names = [key for key, held in type(self).__dict__.items() if isinstance(held, _Setting)]
            close = difflib.get_close_matches(name, names, 1, 0.4)
            hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(sorted(names)[:6])}"
            raise ConfigError(f"CONFIG has no setting {name!r}{hint}")
        object.__setattr__(self, name, value)

    @property
    def API(self) -> _Section:
        """nnsight's spellings of the address and the key."""
        return _Section(self, HOST="HOST", APIKEY="API_KEY")

    @property
    def APP(self) -> _Section:
        """nnsight's spelling of the switch for the status line."""
        return _Section(self, REMOTE_LOGGING="PROGRESS")

    def set_default_api_key(self, key: str) -> None:
        """Set the key for this process; to keep it, write it into the configuration file."""
        self.API_KEY = key

    def __repr__(self) -> str:
        key = "set" if self.API_KEY else None
        return f"CONFIG(HOST={self.HOST!r}, API_KEY={key}, TIMEOUT={self.TIMEOUT}, PROGRESS={self.PROGRESS})"

    def reset(self) -> None:
        """Forget everything set in code."""
        self._chosen.clear()


CONFIG = Config()

_read: dict[Path, tuple[int, dict[str, Any]]] = {}


def _file() -> tuple[Path, dict[str, Any]]:
    """The file's path and values, parsed again only when it changes."""
    named = os.environ.get("INTERPOSE_CONFIG", "").strip()
    if named:
        path = Path(named).expanduser()
    else:
        path = _usual(*map(os.environ.get, ("XDG_CONFIG_HOME", "HOME", "APPDATA")))
    try:
        changed = path.stat().st_mtime_ns
        if path not in _read or _read[path][0] != changed:
            _read[path] = changed, tomllib.loads(path.read_text("utf-8"))
        return path, _read[path][1]
    except (FileNotFoundError, NotADirectoryError) as error:
        if named:
            raise ConfigError(f"INTERPOSE_CONFIG names {path}, which isn't there") from error
        return path, {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} can't be read: {error}") from error


@lru_cache(maxsize=8)
def _usual(*where: str | None) -> Path:
    """The file's path, unless the user names another. `where`: what it depends on."""
    import platformdirs

    return platformdirs.user_config_path("interpose") / "config.toml"


def cache_folder() -> Path:
    """Where manifests and tokenizers are kept; INTERPOSE_CACHE overrides. Not created here."""
    named = os.environ.get("INTERPOSE_CACHE", "").strip()
    if named:
        return Path(named).expanduser()
    import platformdirs

    return platformdirs.user_cache_path("interpose")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server and who asks it.

    Attributes:
        url: scheme and authority, perhaps a path; no slash at the end.
    """

    url: str
    key: str | None = field(default=None, repr=False)

    @property
    def local(self) -> bool:
        """Whether it is this machine."""
        return is_loopback(urlsplit(self.url).hostname or "")


def endpoint(host: str | None = None, api_key: str | None = None) -> Endpoint:
    """The server to use: the arguments where given, else `CONFIG`.

    Raises:
        ConfigError: no host is known, or host or key are malformed.
    """
    named = host or CONFIG.HOST
    if not named:
        raise ConfigError("no server is known: set INTERPOSE_HOST, or CONFIG.HOST = 'https://...', or pass host=")
    key = (api_key or CONFIG.API_KEY or "").strip()
    if not key.isascii() or any(not char.isprintable() or char == " " for char in key):
        raise ConfigError("the API key holds characters no key has; copy it again")
    return Endpoint(address(named), key or None)


def address(host: str) -> str:
    """The URL of a host as people write it. Raises ConfigError."""
    text = host.strip()
    try:
        parts = urlsplit(text if "://" in text else f"//{text}")
        name, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"{host!r} isn't a host: {error}") from error
    if not name or parts.scheme not in ("", "http", "https") or parts.query or parts.fragment or parts.username:
        raise ConfigError(f"{host!r} isn't a host; write it like lab.example.org or http://127.0.0.1:8000")
    if "v1" in parts.path.split("/"):
        raise ConfigError(f"{host!r} is an address within a server; give the server's own, without /v1")
    scheme = parts.scheme or ("http" if is_loopback(name) else "https")
    return f"{scheme}://{parts.netloc}{parts.path.rstrip('/')}"


def is_loopback(name: str) -> bool:
    """Whether a host's name or address is this machine's own."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")
