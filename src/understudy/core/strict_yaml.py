"""YAML files that people write: a key stands once, and what cannot be read is said in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from understudy.core.errors import UserError


class StrictLoader(yaml.SafeLoader):
    """YAML in which a key stands once: of two equal ones, one would be ignored."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' stands twice", key.start_mark)
            seen.append(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, label: str | None = None) -> Any:
    """What a YAML file holds. `label` is what to call it where it cannot be read, e.g. `--config run.yaml`."""
    label = label or str(path)
    try:
        with path.open(encoding="utf-8") as text:
            return yaml.load(text, StrictLoader)
    except OSError as error:
        raise UserError(f"cannot read {label}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{label} is not a text file in UTF-8") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise UserError(f"{path} is not valid YAML: line {line}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
