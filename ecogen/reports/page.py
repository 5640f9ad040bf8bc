"""Self-contained HTML pages from the templates beside this file: no script, no network, light and dark."""

from __future__ import annotations

import base64
from typing import Any

import jinja2

from ecogen.reports.wording import format_count, format_epsilon, format_grams, format_range, format_share, plural
from ecogen.units import format_bytes, format_joules, format_seconds

_CONTROL_CHARACTERS = {code: None for code in range(32) if chr(code) not in "\t\n\r"}  # HTML allows no others


def render_page(template: str, **values: Any) -> str:
    """A template, filled in; whatever a value says is shown as text."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ecogen", "reports"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "base64": lambda content: base64.b64encode(content).decode(),
        "bytes": format_bytes,
        "count": format_count,
        "epsilon": format_epsilon,
        "grams": format_grams,
        "joules": format_joules,
        "plural": plural,
        "range": format_range,
        "seconds": format_seconds,
        "share": format_share,
    }
    return environment.get_template(template).render(**values).translate(_CONTROL_CHARACTERS)
