"""The generated pages of the documentation site: configuration reference, tutorials (from the notebooks), changelog.

Every build of the site generates them from the yaml files in ``conf``, the constructors that these name, and their
docstrings. `site_hooks` passes them to mkdocs, which this module does not need.

Example:
    python scripts/site_pages.py        # prints the pages
"""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf
from strategy_tables import detail_page, strategies

from lightning_gradnorm.experiments.cli.config import left_out, with_schema

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"

Constructor = Callable[..., Any]

_SCHEMAS: dict[str, Constructor] = {f"/schema/{name}": one for name, one in with_schema().items()}

_ABOUT = {
    "balancing": "The balancing strategy. [Strategies](../strategies.md) compares them and has their formulas.",
    "callbacks": "Other callbacks: checkpoints, Ctrl-C, learning rate, the dashboard, pictures.",
    "data": "The training data. [Data](../data.md) describes the files and the batches.",
    "data/equation": "The differential equation of `data=pde`, and the number of points of each task.",
    "experiment": "A complete setting: data, network, training length, learning rates.",
    "hydra": "Where to write runs, and how to name the runs of a sweep. `--hydra-help` shows Hydra's own options.",
    "logger": "Loggers for curves and images.",
    "model": "Encoder, tasks and optimizer. The default has the same name as `data`.",
    "model/optimizer": "The optimizer of `model=pde`.",
    "paths": "The folders.",
    "search": "Hyperparameter search with Optuna, see [Command line](../command_line.md#search).",
    "trainer": "Devices and training length: the options of Lightning's `Trainer`.",
}
"""Description of each group. Groups without one only show their files' comments."""


# ---- constructors ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameter:
    """One parameter of a constructor, as a row of a table."""

    name: str
    kind: str
    default: str
    meaning: str


def parameters_of(constructor: Constructor) -> list[Parameter]:
    """Return the constructor's parameters for the command line, from its signature and docstring.

    Example:
        >>> from lightning_gradnorm import GradNorm
        >>> alpha = next(one for one in parameters_of(GradNorm) if one.name == "alpha")
        >>> alpha.kind, alpha.default
        ('float', '1.5')
        >>> alpha.meaning.startswith("the asymmetry")
        True
    """
    not_options = left_out(constructor)
    told = described(constructor)
    rows = []
    for parameter in inspect.signature(constructor).parameters.values():
        if parameter.name in not_options or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        required = parameter.default is parameter.empty
        default = "" if required else _shown(parameter.default)
        rows.append(
            Parameter(parameter.name, _kind(parameter.annotation), default, told.get(parameter.name, "").strip())
        )
    return rows


def described(constructor: Constructor) -> dict[str, str]:
    """Return parameter → its description in the docstrings of a constructor, its ``__init__`` and its bases."""
    found: dict[str, str] = {}
    places = [constructor]
    if inspect.isclass(constructor):
        places = [place for base in constructor.__mro__ for place in (base, base.__dict__.get("__init__"))]
    for place in filter(None, places):
        text = inspect.cleandoc(getattr(place, "__doc__", None) or "")
        for name, meaning in {**_google(text), **_sphinx(text)}.items():
            found.setdefault(name, meaning)
    return found


def _google(text: str) -> dict[str, str]:
    """Read ``Args:`` and its indented block."""
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)*)", text, flags=re.MULTILINE)
    if section is None:
        return {}
    lines = inspect.cleandoc("\n" + section[1]).splitlines()
    found: dict[str, str] = {}
    name = None
    for line in lines:
        if entry := re.match(r"\*{0,2}(\w+)(?: *\([^)]*\))?: *(.*)", line):
            name, found[entry[1]] = entry[1], entry[2]
        elif name is not None:
            found[name] += "\n" + line.strip()
    return {name: _plain(meaning) for name, meaning in found.items()}


def _sphinx(text: str) -> dict[str, str]:
    """Read ``:param name:`` and its continuation lines."""
    found = re.findall(r"^:param (\w+): *(.*(?:\n[ \t]+.*)*)", text, flags=re.MULTILINE)
    return {name: _plain(meaning) for name, meaning in found}


def _plain(meaning: str) -> str:
    """Return the first paragraph as one line of Markdown, for a table cell."""
    text = " ".join(meaning.strip().split("\n\n")[0].split())
    text = re.sub(r"\.\. \w+::.*", "", text)  # a cell cannot show a directive
    text = re.sub(r":math:`((?:[^`])*)`", lambda found: f"`{_unicode(found[1])}`", text)
    text = re.sub(r":\w+:`~?([^`<]*?)(?: *<[^`]*>)?`", lambda found: f"`{found[1].rsplit('.', 1)[-1]}`", text)
    text = re.sub(r"`([^`<]+?) *<(https?://[^>]*)>`_+", r"[\1](\2)", text)
    return text.replace("``", "`").replace("|", "\\|")


def as_markdown(docstring: str) -> str:
    r"""Return a docstring in mkdocstrings' style: doctests under ``Examples:``, formulas as plain text.

    Example:
        >>> as_markdown(r"Regression onto :math:`\sigma_i x`.")
        'Regression onto `σ_i x`.'
    """
    text = re.sub(r"^Example:$", "Examples:", docstring, flags=re.MULTILINE)
    text = re.sub(r":math:`([^`]*)`", lambda found: f"`{_unicode(found[1])}`", text)
    return re.sub(r"^\.\. math:: *(.*)$", lambda found: f"    {_unicode(found[1])}", text, flags=re.MULTILINE)


_LETTERS = {
    r"\sqrt{1-p^2}": "√(1−p²)",
    r"\sum_{i=1}^{m}": "Σ_i",
    r"\hat{\gamma}": "γ",
    r"\hat{\phi}": "φ",
    r"\hat{\lambda}": "λ̂",
    r"\hat w": "ŵ",
    r"\varepsilon": "ε",
    r"\epsilon": "ε",
    r"\ell": "ℓ",
    r"\lambda": "λ",
    r"\theta": "θ",
    r"\mu": "μ",
    r"\tau": "τ",
    r"\beta": "β",
    r"\alpha": "α",
    r"\gamma": "γ",
    r"\sigma": "σ",
    r"\eta": "η",
    r"\cdot": "·",
    r"\sim": "~",
    r"\quad": "  ",
    r"\,": " ",
    r"\ ": " ",
    r"\ldots": "…",
    r"\in": "∈",
    r"\geq": "≥",
    "^T": "ᵀ",
}
"""LaTeX → plain text, longer commands before shorter ones that they contain. Covers only what the docstrings use."""


def _unicode(formula: str) -> str:
    if "begin{bmatrix}" in formula:  # TorchJD's notation for equal preferences
        return "[1/m, …, 1/m]"
    for latex, plain in _LETTERS.items():
        formula = formula.replace(latex, plain)
    return formula.replace("\\", "")


def _kind(annotation: Any) -> str:
    if annotation is inspect.Parameter.empty:
        return ""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    if optional := re.fullmatch(r"(?:typing\.)?Optional\[(.*)\]", text):
        text = f"{optional[1]} | None"
    if union := re.fullmatch(r"(?:typing\.)?Union\[(.*)\]", text):
        text = union[1].replace(", ", " | ")
    text = re.sub(r"(?:\b[a-z_]\w*\.)+(?=[A-Z])", "", text)
    return text.replace("NoneType", "None").replace(" | ", " or ").replace("|", "\\|")


def _shown(value: Any) -> str:
    """Return a default as you would write it."""
    if isinstance(value, functools.partial):
        given = [*map(repr, value.args), *(f"{key}={item!r}" for key, item in value.keywords.items())]
        return f"{value.func.__name__}({', '.join(given)})" if hasattr(value.func, "__name__") else "…"
    if callable(value):
        return str(getattr(value, "__name__", "…"))
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(list(value) if isinstance(value, tuple) else value)


# ---- the yaml files --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """One yaml file of a group."""

    group: str
    name: str
    told: str
    """Its comment."""
    yaml: str
    """Its settings, without the lines that select schemas."""
    made_by: dict[str, Constructor]
    """Key → the constructor used there."""


def groups() -> dict[str, list[Option]]:
    """Return every group in ``conf`` with its options."""
    found: dict[str, list[Option]] = {}
    for file in sorted(CONF.rglob("*.yaml")):
        group = file.parent.relative_to(CONF).as_posix()
        if group != ".":
            found.setdefault(group, []).append(_option(group, file))
    return found


def _option(group: str, file: Path) -> Option:
    text = file.read_text(encoding="utf-8")
    told, yaml = _comment_and_rest(text)
    place = "" if text.startswith("# @package _global_") else group
    made_by = {f"{place}.{key}".strip("."): one for key, one in _makers(file)}
    return Option(group, file.stem, told, _without_schemas(yaml), made_by)


def _comment_and_rest(text: str) -> tuple[str, str]:
    lines = text.splitlines()
    at = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    told = [line.lstrip("# ").strip() for line in lines[:at] if not line.startswith("# @package")]
    return " ".join(told).partition("Formula:")[0].strip(), "\n".join(lines[at:]).strip()


def _without_schemas(yaml: str) -> str:
    """Remove lines of the defaults list that readers do not need: schemas, and the file itself."""
    yaml = re.sub(r"^ +- (?:/schema/\S+|_self_)\n?", "", yaml + "\n", flags=re.MULTILINE)
    yaml = re.sub(r"^defaults:\n(?! )", "", yaml, flags=re.MULTILINE)
    return "" if yaml.strip() == "{}" else yaml.strip()


def _makers(file: Path) -> Iterator[tuple[str, Constructor]]:
    """Yield each key of a yaml file that builds an object, and its constructor."""
    content = OmegaConf.load(file)
    assert isinstance(content, DictConfig)
    for entry in content.get("defaults", []):
        name, _, package = str(entry).partition("@")
        if name in _SCHEMAS:
            yield package.removeprefix("_here_"), _SCHEMAS[name]
        elif isinstance(entry, str) and name != "_self_" and (file.parent / f"{name}.yaml").is_file():
            yield from _makers(file.parent / f"{name}.yaml")
    yield from _targets(content, "")


def _targets(node: Any, path: str) -> Iterator[tuple[str, Constructor]]:
    if isinstance(node, DictConfig):
        raw: dict[Any, Any] = OmegaConf.to_container(node, resolve=False)  # type: ignore[assignment]
        target = raw.get("_target_")
        if isinstance(target, str):
            yield path, get_object(target)
        for key, value in raw.items():
            if isinstance(value, dict) and key != "defaults":
                yield from _targets(node._get_node(key), f"{path}.{key}".lstrip("."))
    elif isinstance(node, ListConfig):
        return


# ---- pages -----------------------------------------------------------------------------------------------------------


def pages() -> dict[str, str]:
    """Return path in the site → Markdown."""
    made = {"configuration/index.md": _overview()}
    for group, options in groups().items():
        made[f"configuration/{page_of(group)}"] = _group_page(group, options)
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        made[f"tutorials/{notebook.stem}.md"] = _tutorial(notebook)
    made |= {f"strategies/{one.name}.md": detail_page(one) for one in strategies()}
    made["changelog.md"] = _changelog()
    return made


def _tutorial(notebook: Path) -> str:
    """Return a notebook as a page, with its saved outputs."""
    parts = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            prose = re.sub(r"\]\((\w+)\.ipynb\)", r"](\1.md)", source)
            parts.append(prose.replace("](../scripts/", "](../../scripts/").replace("](../docs/", "](../"))
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {"text/plain": output.get("text", [])})
            if "image/png" in data:
                picture = "".join(data["image/png"]).replace("\n", "")
                parts.append(f'<img alt="What the code above draws" src="data:image/png;base64,{picture}">')
            else:
                parts.append(f"``` {{ .text .output }}\n{''.join(data['text/plain']).rstrip()}\n```")
    parts.append(f"*This page is the notebook `notebooks/{notebook.name}`. Run and change it yourself.*")
    return "\n\n".join(parts) + "\n"


def page_of(group: str) -> str:
    """Return the file name of a group's page."""
    return f"{group.replace('/', '_')}.md"


def _overview() -> str:
    rows = []
    for group, options in groups().items():
        links = [f"[`{one.name}`]({page_of(group)}#{one.name})" for one in options]
        rows.append(f"| [`{group}`]({page_of(group)}) | {', '.join(links)} |")
    return "\n".join(
        [
            "# Configuration",
            "",
            "`gradnorm-train` composes one configuration from groups and single values. Choose a group's option with",
            "`group=option`, set a value with `group.key=value`. A typo raises an error that lists the valid keys. These",
            "pages are generated from the configuration files and the constructors' docstrings.",
            "",
            "    gradnorm-train experiment=toy_ten balancing=cagrad balancing.aggregator.c=0.3 trainer.max_epochs=5",
            "    gradnorm-train --cfg job             # only shows the configuration",
            "    gradnorm-train --cfg job --resolve   # also replaces every reference with its value",
            "",
            "## Groups",
            "",
            "| group | options |",
            "|---|---|",
            *rows,
            "",
            "## Single values of `gradnorm-train`",
            "",
            *_values(CONF / "config.yaml"),
            "",
            "## Single values of `gradnorm-eval`",
            "",
            "Everything in the run's own `config.yaml`, and:",
            "",
            *_values(CONF / "eval.yaml"),
            "",
            "## Your own files",
            "",
            "`gradnorm-train --config-dir my_conf data=mine model=mine` finds `my_conf/data/mine.yaml` and",
            "`my_conf/model/mine.yaml`. With entries such as `/schema/GradNorm@_here_` in their `defaults`, the options are",
            "checked. The names are those of the constructors on the groups' pages.",
            "",
        ]
    )


def _values(file: Path) -> list[str]:
    """Return a table of a file's top-level keys, with their comments and defaults."""
    rows, comment, in_defaults = [], [], False
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            comment.append(line.lstrip("# "))
        elif found := re.match(r"(\w+): *([^#]*)", line):
            in_defaults = found[1] in ("defaults", "hydra")
            if not in_defaults:
                rows.append(f"| `{found[1]}` | `{found[2].strip()}` | {' '.join(comment)} |")
            comment = []
    return ["| key | default | |", "|---|---|---|", *rows]


def _group_page(group: str, options: list[Option]) -> str:
    constructors: dict[str, Constructor] = {}
    for option in options:
        for one in option.made_by.values():
            if _has_a_table(one):
                constructors.setdefault(one.__name__, one)
    lines = [f"# `{group}`", ""]
    if group in _ABOUT:
        lines += [_ABOUT[group], ""]
    if len(options) > 1:
        lines += [" · ".join(f"[`{one.name}`](#{one.name})" for one in options)]
    for option in options:
        lines += ["", f"## `{group}={option.name}` {{ #{option.name} }}", ""]
        lines += [_escaped(option.told), ""] if option.told else []
        places = [_place(key, one) for key, one in option.made_by.items()]
        lines += ["Options: " + "; ".join(places) + ".", ""] if places else []
        lines += ["```yaml", option.yaml, "```"] if option.yaml else []
    if constructors:
        lines += ["", "## Options", ""]
        lines += ["`null` is None. An empty default means that you or the option must set the value."]
    for name in sorted(constructors, key=str.lower):
        lines += ["", f"### `{name}` {{ #made-by-{name.lower()} }}", "", *_table(constructors[name])]
    return "\n".join(lines) + "\n"


def _place(where: str, constructor: Constructor) -> str:
    name = constructor.__name__
    what = f"[`{name}`](#made-by-{name.lower()})" if _has_a_table(constructor) else f"`{_dotted(constructor)}`"
    return f"`{where}.…` those of {what}"


def _has_a_table(constructor: Constructor) -> bool:
    """Return True if a constructor is ours or has a schema. Torch documents its own."""
    return constructor in _SCHEMAS.values() or constructor.__module__.startswith("lightning_gradnorm")


def _dotted(constructor: Constructor) -> str:
    package = constructor.__module__.split(".")[0]
    return f"{package}.….{constructor.__name__}" if "." in constructor.__module__ else constructor.__name__


def _table(constructor: Constructor) -> list[str]:
    first = _plain(inspect.cleandoc(constructor.__doc__ or ""))
    rows = []
    for one in parameters_of(constructor):
        kind, default = (f"`{text}`" if text else "" for text in (one.kind, one.default))
        rows.append(f"| `{one.name}` | {kind} | {default} | {one.meaning} |")
    told = [_escaped(first.replace("\\|", "|")), ""] if first else []
    if not rows:
        return [*told, "No options."]
    return [*told, "| option | type | default | |", "|---|---|---|---|", *rows]


def _escaped(text: str) -> str:
    """Escape Markdown characters outside of code and addresses."""
    parts = re.split(r"(`[^`]*`|\]\([^)]*\))", text)
    return "".join(part if part.startswith(("`", "](")) else re.sub(r"([*_<])", r"\\\1", part) for part in parts)


def _changelog() -> str:
    """Return the changelog, with its links adjusted from the root of the repository."""
    return (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").replace("](docs/", "](")


if __name__ == "__main__":
    for path, page in pages().items():
        print(f"<!-- {path} -->\n{page}")
