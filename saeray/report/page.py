"""One HTML file of a template, with its styles, scripts and data inside: it asks no network.

Templates escape every value (Jinja's autoescape). Data travel as JSON in which `<` is written as an
escape, so no text can end the element that it stands in; scripts put texts on the page as texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from saeray.files import strict_json
from saeray.version import __version__

HERE = Path(__file__).parent


@cache
def environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals.update(version=__version__)
    return made


def render(
    template: str,
    data: Any,
    styles: Sequence[str] = (),
    scripts: Sequence[str] = (),
    **values: Any,
) -> bytes:
    """A page, UTF-8.

    Args:
        template: of `templates/`; extends base.html.
        data: what scripts get from `saeray.data`; numbers that are not finite are null there.
        styles, scripts: of `assets/`, after style.css and base.js, which every page has.
        values: for the template; escaped there.
    """
    page = (
        environment()
        .get_template(template)
        .render(
            data=as_script(data),
            styles=[asset(name, "style") for name in ("style.css", *styles)],
            scripts=[asset(name, "script") for name in ("base.js", *scripts)],
            **values,
        )
    )
    return page.encode()


def as_script(data: Any) -> Markup:
    """JSON that may stand in a script element, whatever texts are in it."""
    text = strict_json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    # In JSON these stand in strings only, where an escape means the same character.
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


@cache
def asset(name: str, element: str) -> Markup:
    """A file of ours, as it stands, for inside a <style> or <script>."""
    text = (HERE / "assets" / name).read_text(encoding="utf-8")
    if f"</{element}" in text.lower() or "<!--" in text:
        raise ValueError(f"{name}: can't stand in a {element} element")
    return Markup(text)
