"""A summary as lines of text."""

from __future__ import annotations

from typing import Any


def show(document: dict[str, Any], indent: str = "") -> str:
    """Nested figures, one line each."""
    lines = []
    for name, value in document.items():
        label = name.replace("_", " ")
        if isinstance(value, dict):
            if value and not any(isinstance(item, dict) for item in value.values()):
                inner = "  ".join(f"{key} {_text(item)}" for key, item in value.items())
                lines.append(f"{indent}{label:<32} {inner}")
            elif value:
                lines.append(f"{indent}{label}:")
                lines.append(show(value, indent + "  "))
        else:
            lines.append(f"{indent}{label:<32} {_text(value)}")
    return "\n".join(lines)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
