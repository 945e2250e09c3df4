"""Where people read what we say: a terminal, to which foreign text must not give orders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from unidpo.errors import printable


class Terminal(Console):
    """A console that shows control characters instead of sending them.

    File names, keys and texts of a data set may hold escape sequences that recolour, erase or retitle a terminal. Here
    they are printed one by one as `unidpo.errors.printable` writes them, whoever printed them; rich's own colours and
    movements do not come as text. What the output's encoding lacks is written as an escape, too.
    """

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control or segment.text == "\n":
                yield segment
            else:
                yield segment._replace(text=self._shown(segment.text))

    def _shown(self, text: str) -> str:
        if text.isascii() and text.isprintable():
            return text
        lines = (printable(line, most=len(line)) for line in text.split("\n"))
        return "\n".join(lines).encode(self.encoding, "backslashreplace").decode(self.encoding)


def print_to_copy(console: Console, lines: Mapping[str, str]) -> None:
    """Print commands or paths, each on one line whatever the width, with what it is for."""
    width = max(map(len, lines))
    for copied, purpose in lines.items():
        text = Text.assemble("  ", (f"{copied:{width}}", "cyan"), "  ", (purpose, "dim"))
        console.print(text, soft_wrap=True)
