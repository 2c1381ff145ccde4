"""How is a YAML file read, so that a key that is there twice does not pass?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lorapro_hf.options import UsageError
from lorapro_hf.utils.text_files import read_settings_text, shortened, shown

_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """Loader that refuses equal keys, of which PyYAML keeps the last; a merge (`<<`) may be overridden."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)  # type: ignore[no-untyped-call, unused-ignore]
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise UsageError(f"the key {shown(key.value)} is there twice, in lines {lines[key.value]} and {line}.")
            lines[key.value] = line
        return node


def parse_yaml(text: str, where: str) -> Any:
    """Return the value of a YAML text; `UsageError` if it is no YAML, or a mapping has a key twice."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = "" if mark is None else f" in line {mark.line + 1}, column {mark.column + 1}"
        problem = shortened(str(error.problem))
        raise UsageError(f"{where} is no YAML: {problem}{place}; look at the indentation and quotes.") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{where} is no YAML: {shortened(str(error))}") from error
    except RecursionError:
        raise UsageError(f"{where} is nested too deeply.") from None
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error


def read_yaml(path: Path, kind: str) -> Any:
    """Return the value of a YAML file; `UsageError` as in `parse_yaml`, or if the file cannot be read."""
    try:
        text = read_settings_text(path)
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no YAML: it is not UTF-8 ({error.reason}).") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {kind} {path}: {getattr(error, 'strerror', None) or error}.") from error
    return parse_yaml(text, str(path))
