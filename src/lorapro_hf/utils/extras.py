"""Which command installs an extra of this package?"""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

_DISTRIBUTION = "lorapro_hf"
_CLONE = Path(__file__).resolve().parents[3]


class MissingExtraError(ImportError):
    """A package of an extra is not installed; the message has the command that installs it."""


def install_command(extra: str) -> str:
    """The command that adds an extra to this package, from the clone, file or address that it was installed from.

    The package is on no index, so its name alone would not be found.
    """
    if (_CLONE / "pyproject.toml").is_file():
        folder = "." if Path.cwd() == _CLONE else str(_CLONE)
        return f"pip install -e '{folder}[{extra}]'"
    return f"pip install '{_DISTRIBUTION}[{extra}]{_origin()}'"


def _origin() -> str:
    """` @ ADDRESS` if the installer noted one (PEP 610); nothing if the package came from an index."""
    try:
        noted = metadata.distribution(_DISTRIBUTION).read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        noted = None
    if not noted:
        return ""
    origin = json.loads(noted)
    repository = origin.get("vcs_info")
    if repository is None:
        return f" @ {origin['url']}"
    revision = repository.get("requested_revision")
    return f" @ {repository['vcs']}+{origin['url']}" + (f"@{revision}" if revision else "")
