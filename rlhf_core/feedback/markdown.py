"""Markdown that a model or a person wrote, as HTML that can do nothing.

Tags are shown as the text they are, pictures are not loaded, and a link leads nowhere but to http, https and mail. The
content security policy of every page stands behind it.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markdown_it.utils import OptionsDict
from markupsafe import Markup

LONGEST = 50_000  # characters; what is longer is shown as it is, since no one reads it and drawing it takes seconds


def as_html(text: str, *, breaks: bool = True) -> Markup:
    """The text as HTML, safe to put into a page.

    Args:
        breaks: a line break stays one, as a chat shows it; or is a space, as in a file whose lines are kept short.
    """
    if len(text) > LONGEST:
        return Markup('<p class="plain">{}</p>').format(text)
    return _drawn(text, breaks)


@lru_cache(maxsize=1024)  # several people see an item, and one of them more than once; 50 MB at the very most
def _drawn(text: str, breaks: bool) -> Markup:
    return Markup(_MARKDOWN[breaks].render(text))


def _allowed(url: str) -> bool:
    return url.startswith(("https://", "http://", "mailto:", "#"))


def _open_link(
    renderer: RendererHTML, tokens: Sequence[Token], index: int, options: OptionsDict, environment: Any
) -> str:
    """A link that tells the other side nothing, and leaves the page with the judgement open."""
    tokens[index].attrSet("rel", "noopener noreferrer nofollow")
    tokens[index].attrSet("target", "_blank")
    return renderer.renderToken(tokens, index, options, environment)


def _markdown(breaks: bool) -> MarkdownIt:
    markdown = MarkdownIt("commonmark", {"html": False, "breaks": breaks}).enable("table").disable("image")
    markdown.validateLink = _allowed  # type: ignore[method-assign]
    markdown.add_render_rule("link_open", _open_link)
    return markdown


_MARKDOWN = {breaks: _markdown(breaks) for breaks in (False, True)}
