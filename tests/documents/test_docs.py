"""What README and docs say works: code runs, options, links and error messages exist, and the site builds."""

from __future__ import annotations

import argparse
import ast
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from transformers import HfArgumentParser, Trainer

from docs_names import Names
from docs_pages import DOCS, ROOT, Block, blocks, loaded, name_of, pages
from lorapro_hf import LoRAProAdamW, LoRAProTrainingArguments
from lorapro_hf.cli import build_parser
from lorapro_hf.optim.lora_pro import unwrap_optimizer
from lorapro_hf.recipes.parser import RecipeParser, read_recipe

# What a page's reader is told to have, or has from another library; each block gets it afresh.
ASSUMED = {
    "README.md": "Trainer SFTTrainer torch base_model data args peft_config A B grad_A grad_B scaling",
    "docs/index.md": "base_model data",
    "docs/choosing.md": "model data",
    "docs/training.md": "torch model data args loader",
    "docs/trl.md": "model dataset tokenizer peft_config",
    "docs/speed.md": "model",
    "docs/diagnostics.md": "Trainer model data args",
    "docs/migrating.md": "torch model data args",
    "docs/methods.md": "base_model batches model data args",
}
KNOWS_FACTORIES = int(transformers.__version__.split(".")[0]) >= 5


def as_it_reads(block: Block) -> str:
    """Python as it is; a diff as it reads after the change, at the same lines."""
    if block.kind == "python":
        return block.code
    return "".join("\n" if line.startswith("-") else f"{line[1:]}\n" for line in block.code.splitlines())


WITH_CODE = [page for page in pages() if blocks(page, "python", "diff")]


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Names:
    return Names(tmp_path_factory.mktemp("names"))


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_code_runs(page: Path, names: Names, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    # TRL asks for bf16 unless told otherwise, and transformers for a GPU that has it
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    assumed = set(ASSUMED.get(name_of(page), "").split())
    namespace: dict[str, Any] = {"__name__": "__main__"}
    defined: set[str] = set()
    for block in blocks(page, "python", "diff"):
        source = "\n" * (block.line - 1) + as_it_reads(block)
        tree = ast.parse(source, name_of(page))
        if block.not_run is not None or ("OptimizerFactory" in block.code and not KNOWS_FACTORIES):
            continue
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        namespace |= {name: names.make(name, block.code) for name in (used & assumed) - defined}
        exec(compile(tree, name_of(page), "exec", dont_inherit=True), namespace)
        stored = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        check_what_came_out(block, {name: namespace[name] for name in stored if name in namespace})
        defined |= stored


def check_what_came_out(block: Block, made: dict[str, Any]) -> None:
    """A trainer or optimizer that a block makes trains with LoRA-Pro, unless the callback or the block's own does."""
    trainer = made.get("trainer")
    if isinstance(trainer, Trainer):
        trainer.args.max_steps = 1
        trainer.train()
        ends_with_the_callback = "LoRAProCallback()" in block.code
        assert isinstance(unwrap_optimizer(trainer.optimizer), LoRAProAdamW) != ends_with_the_callback
    if "optimizer" in made and "project_pair_gradients_" not in block.code:
        assert isinstance(unwrap_optimizer(made["optimizer"]), LoRAProAdamW)


def test_there_is_code():
    assert len(blocks(ROOT / "README.md", "diff")) == 2
    assert {ROOT / page for page in ASSUMED} <= set(WITH_CODE)


def commands(page: Path) -> list[list[str]]:
    """The command lines of a page's shell blocks, continuation lines joined, comments and pipes cut off."""
    found = []
    for block in blocks(page, "bash"):
        for line in block.code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words = words[1:]
            found += [words] if words else []
    return found


@pytest.mark.parametrize("page", [page for page in pages() if blocks(page, "bash")], ids=name_of)
def test_commands_exist(page: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(RecipeParser, "parse", _stop)
    for words in commands(page):
        if words[0] == "lorapro" and len(words) > 1 and not words[1].startswith("-"):
            check_lorapro(words[1:])
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), words
        if "train.py" in words:  # the reader's own script
            check_options(words[words.index("train.py") + 1 :], HfArgumentParser(LoRAProTrainingArguments))  # type: ignore[arg-type]
        for position, word in enumerate(words):
            if re.match(r"(scripts|configs|docs|benchmarks)/", word):
                assert (ROOT / word).exists(), f"{word} in {words}"
            if re.match(r"scripts/run_\w+\.py", word):
                check_options(words[position + 1 :], parser_of(ROOT / word))


class _Parser(Exception):
    """The parser of a script that would have read its arguments now."""


def _stop(parser: RecipeParser, argv: list[str] | None = None) -> None:
    raise _Parser(parser)


def parser_of(script: Path) -> Any:
    with pytest.raises(_Parser) as reached:
        loaded(script).main([])
    return reached.value.args[0]


def check_lorapro(words: list[str]) -> None:
    (commands,) = (action for action in build_parser()._actions if action.dest == "command")
    assert commands.choices is not None and words[0] in commands.choices, words
    parser = commands.choices[words[0]]  # type: ignore[call-overload]
    own = words[1:]
    while (below := next((a for a in parser._actions if isinstance(a, argparse._SubParsersAction)), None)) is not None:
        assert own and own[0] in below.choices, words  # commands of a command: `evaluate gsm8k`
        parser, own = below.choices[own[0]], own[1:]
    if words[0] == "train":  # what follows the recipe is for its script
        cut = next((i for i, word in enumerate(words) if word.endswith((".yaml", ".py"))), len(words))
        own = words[1:cut]
        if cut < len(words):
            check_options(words[cut + 1 :], parser_of(script_of(words[cut])))
    check_options(own, parser)


def script_of(name: str) -> Path:
    """The script of a recipe, or the one named."""
    if name.endswith(".py"):
        return ROOT / "scripts" / Path(name).name
    recipe = ROOT / "configs" / name.removeprefix("configs/")
    return ROOT / "scripts" / read_recipe(recipe)["script"]


def check_options(words: list[str], parser: Any) -> None:
    options = [word.split("=")[0] for word in words if word.startswith("--")]
    unknown = [option for option in options if option not in parser._option_string_actions]
    assert not unknown, f"{unknown} in {words}"


_LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_links_lead_somewhere(page: Path):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in _LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link} on {name_of(page)}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{link} on {name_of(page)}"


def anchors(page: Path) -> set[str]:
    from markdown.extensions.toc import slugify

    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = {slugify(title.replace("`", ""), "-") for title in re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)}
    return titles | set(re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE))


def test_navigation_has_every_page():
    listed = re.findall(r"[\w/]+\.md", str(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    assert len(set(listed)) == len(listed)
    assert {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")} <= set(listed)


def test_listing_names_every_folder_and_existing_files():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    inside, outside = text[text.index("## Where things are") : text.index("## Extensions")].split("Outside the")
    for part, root in ((inside, ROOT / "src" / "lorapro_hf"), (outside, ROOT)):
        for name, contents in re.findall(r"^\| `(\w+)/` \| (.*) \|$", part, re.MULTILINE):
            named = re.findall(r"`([a-z_/]+(?:\.[a-z.]+[0-9a-z])?)`", contents)
            missing = [each for each in named if not _exists(root / name, each)]
            assert not missing, f"{missing} in {name}/"
    listed = set(re.findall(r"^\| `(\w+)/` ", inside, re.MULTILINE))
    assert listed == {path.parent.name for path in (ROOT / "src" / "lorapro_hf").glob("*/__init__.py")}


def _exists(folder: Path, name: str) -> bool:
    return any(path.exists() for path in (folder / name, folder / f"{name}.py", ROOT / name, ROOT / "src" / name))


class _Fetched(HTMLParser):
    """Collects what a browser fetches for a page without being asked."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "audio", "video", "embed"):
            self.addresses += [given[name] or "" for name in ("src", "srcset") if name in given]
        if tag == "link" and given.get("rel") != "canonical":
            self.addresses.append(given.get("href") or "")


@pytest.mark.slow
def test_site_builds_and_fetches_nothing_from_elsewhere(tmp_path: Path):
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    built = sorted(site.rglob("*.html"))
    assert len(built) > 20 and (site / "api" / "optimizer.html") in built
    assert "project_lora_gradients" in (site / "api" / "functions.html").read_text(encoding="utf-8")
    for page in built:
        parser = _Fetched()
        parser.feed(page.read_text(encoding="utf-8"))
        assert parser.addresses
        assert [address for address in parser.addresses if re.match(r"([a-z]+:)?//", address)] == [], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(\s*[\"']?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet
