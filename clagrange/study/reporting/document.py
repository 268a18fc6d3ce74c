"""A report as a list of blocks, and its forms: one self-contained HTML page, Markdown, LaTeX tables."""

import base64
import html
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PICTURE_DOTS_PER_INCH = 150
"""Of the pictures, from which the page takes the size at which their letters are readable."""
_CSS_PIXELS_PER_INCH = 72

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 72rem; margin: 2rem auto;
  padding: 0 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.8rem; line-height: 1.2; margin-bottom: 0.2rem; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; } h3 { margin-bottom: 0.4rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.6rem; text-align: right; border-bottom: 1px solid #e6e6e6; white-space: nowrap; }
th { border-bottom: 2px solid #999; vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
tr.best td { background: #eef5ff; font-weight: bold; }
figure { margin: 1.5rem 0; } img { width: 100%; height: auto; display: block; }
figcaption, .note { color: #555; font-size: 0.95rem; }
.bad { color: #a11; font-weight: bold; }
dt { font-weight: bold; } dd { margin: 0 0 0.4rem 1rem; }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: 0.85rem; }
@media (max-width: 40rem) { body { margin: 1rem auto; } th:first-child, td:first-child { max-width: 9rem;
  white-space: normal; } }
"""


@dataclass(frozen=True)
class Heading:
    """A heading of level 1, 2 or 3."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph; ``kind`` is "plain", "note" (less important) or "bad" (a warning)."""

    text: str
    kind: str = "plain"


@dataclass(frozen=True)
class Points:
    """A list of sentences."""

    items: Sequence[str]


@dataclass(frozen=True)
class Grid:
    """A table: texts below a header; the row that begins with ``best`` stands out.

    ``caption`` and ``label`` are those of the LaTeX form; a table without a label is left out there.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: str | None = None
    caption: str = ""
    label: str = ""


@dataclass(frozen=True)
class Picture:
    """A PNG file beside the report."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Code:
    """Text to be shown as it is."""

    text: str
    language: str = ""


@dataclass(frozen=True)
class Terms:
    """Names and what they mean."""

    meanings: Mapping[str, str]


Block = Heading | Text | Points | Grid | Picture | Code | Terms


def as_html(title: str, blocks: Sequence[Block]) -> str:
    """One page that needs no other file: pictures are embedded, and there is no script and no link.

    Tables and pictures that are wider than the screen scroll by themselves, with readable letters.

    Example:
        >>> "<p>a &lt; b</p>" in as_html("report", [Text("a < b")])
        True
    """
    parts = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
        *map(_html_of, blocks),
        "</body>\n</html>\n",
    )
    return "\n".join(parts)


def _html_of(block: Block) -> str:
    say = html.escape
    match block:
        case Heading(text, level):
            return f"<h{level}>{say(text)}</h{level}>"
        case Text(text, kind):
            chosen = "" if kind == "plain" else f' class="{say(kind)}"'
            return f"<p{chosen}>{say(text)}</p>"
        case Points(items):
            return "<ul>\n" + "\n".join(f"<li>{say(item)}</li>" for item in items) + "\n</ul>"
        case Grid(header, rows, best):
            head = "".join(f"<th>{_breakable(name)}</th>" for name in header)
            lines = [
                ('<tr class="best">' if best is not None and cells[0] == best else "<tr>")
                + "".join(f"<td>{_breakable(cell)}</td>" for cell in cells)
                + "</tr>"
                for cells in rows
            ]
            return f'<div class="scroll"><table>\n<tr>{head}</tr>\n' + "\n".join(lines) + "\n</table></div>"
        case Picture(path, caption):
            content = path.read_bytes()
            (pixels,) = struct.unpack(">I", content[16:20])  # a PNG's width
            width = round(pixels / PICTURE_DOTS_PER_INCH * _CSS_PIXELS_PER_INCH)
            data = base64.b64encode(content).decode("ascii")
            return (
                f'<figure><div class="scroll"><img alt="{say(caption)}" style="min-width: {width}px" '
                f'src="data:image/png;base64,{data}"></div><figcaption>{say(caption)}</figcaption></figure>'
            )
        case Code(text):
            return f"<pre>{say(text)}</pre>"
        case Terms(meanings):
            listed = "\n".join(f"<dt>{say(name)}</dt><dd>{say(text)}</dd>" for name, text in meanings.items())
            return f"<dl>\n{listed}\n</dl>"


def _breakable(text: str) -> str:
    """Text whose long names may be broken after an underscore where there is no room."""
    return html.escape(text).replace("_", "_<wbr>")


def as_markdown(blocks: Sequence[Block], folder: Path) -> str:
    """GitHub's Markdown; pictures are named relative to ``folder``, where the text is to lie.

    Example:
        >>> print(as_markdown([Heading("Scores"), Grid(["method", "%"], [["a|b", "1"]], best="a|b")], Path()))
        ## Scores
        <BLANKLINE>
        | method | % |
        | --- | --: |
        | **a\\|b** | **1** |
        <BLANKLINE>
    """
    return "\n\n".join(_markdown_of(block, folder) for block in blocks) + "\n"


def _markdown_of(block: Block, folder: Path) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_plain(text)}"
        case Text(text, kind):
            return f"**{_plain(text)}**" if kind == "bad" else _plain(text)
        case Points(items):
            return "\n".join(f"- {_plain(item)}" for item in items)
        case Grid(header, rows, best):
            lines = [[_plain(cell).replace("|", "\\|") for cell in cells] for cells in (header, *rows)]
            for cells, line in zip(rows, lines[1:], strict=True):
                if best is not None and cells[0] == best:
                    line[:] = [f"**{cell}**" for cell in line]
            lines.insert(1, ["---", *["--:"] * (len(header) - 1)])
            return "\n".join("| " + " | ".join(line) + " |" for line in lines)
        case Picture(path, caption):
            return f"![{_plain(caption)}]({path.relative_to(folder).as_posix()})"
        case Code(text, language):
            fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
            return f"{fence}{language}\n{text.rstrip()}\n{fence}"
        case Terms(meanings):
            return "\n".join(f"- **{_plain(name)}**: {_plain(text)}" for name, text in meanings.items())


def _plain(text: str) -> str:
    """One line, in which Markdown sees no tags; names keep their underscores, which do not begin words."""
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").split())


_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "[": "{[}",  # which would be an option after a line break
    "]": "{]}",
    "\n": " ",
    "·": r"$\cdot$",
    "×": r"$\times$",
    "−": "$-$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "⌈": r"$\lceil$",
    "⌉": r"$\rceil$",
    "½": r"$\frac{1}{2}$",
    "τ": r"$\tau$",
}


def escape_latex(text: str) -> str:
    r"""Text such that LaTeX sets it as it is; the sign of a number becomes a minus.

    Example:
        >>> print(escape_latex("adam_l2: 5 % & -0.3"))
        adam\_l2: 5 \% \& $-$0.3
    """
    escaped = "".join(_LATEX.get(character, character) for character in text)
    return re.sub(r"(?<![\w-])-(?=[\d.])", "$-$", escaped)


def as_latex(blocks: Sequence[Block]) -> str:
    """The tables that have a label, in the form of the booktabs package, each no wider than a line."""
    parts = [r"% Needs \usepackage{booktabs,graphicx}."]
    for block in blocks:
        if not isinstance(block, Grid) or not block.label:
            continue
        lines = [" & ".join(escape_latex(name) for name in block.header) + r" \\", r"\midrule"]
        for cells in block.rows:
            escaped = [escape_latex(cell) for cell in cells]
            if block.best is not None and cells[0] == block.best:
                escaped = [rf"\textbf{{{cell}}}" for cell in escaped]
            lines.append(" & ".join(escaped) + r" \\")
        parts.append(
            "\n".join(
                [
                    r"\begin{table}",
                    r"\centering",
                    rf"\caption{{{escape_latex(block.caption)}}}",
                    rf"\label{{tab:{re.sub(r'[^A-Za-z0-9:-]', '-', block.label)}}}",
                    r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
                    rf"\begin{{tabular}}{{l{'r' * (len(block.header) - 1)}}}",
                    r"\toprule",
                    *lines,
                    r"\bottomrule",
                    r"\end{tabular}}",
                    r"\end{table}",
                ]
            )
        )
    return "\n\n".join(parts) + "\n"
