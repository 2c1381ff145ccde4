"""Small files that others may have touched: bounded in size and in messages, and never written through a link."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from lorapro_hf import LoRAProConfig, load_lora_pro_config
from lorapro_hf.config import check_choice
from lorapro_hf.deepspeed.checkpoint import moments_files
from lorapro_hf.hub.settings import SETTINGS_FILE, Settings
from lorapro_hf.options import UsageError
from lorapro_hf.recipes.parser import RecipeParser
from lorapro_hf.recipes.yaml_files import parse_yaml, read_yaml
from lorapro_hf.utils.text_files import MAX_BYTES, parse_json, replace_file, shown

LONG = "x" * 10**6
DEEP = "[" * 10**5


def settings_in(folder: Path, **changed: object) -> None:
    """A file of settings with others beside or in the place of its own."""
    Settings(LoRAProConfig()).save(folder)
    file = folder / SETTINGS_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))


def test_large_settings_are_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / SETTINGS_FILE).open("wb") as file:
        file.truncate(100 * MAX_BYTES)
    with pytest.raises(ValueError, match=r"lorapro_config.json is damaged.*larger than 1 MiB"):
        load_lora_pro_config(tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({LONG[:9000]: 1}, "are no LoRA-Pro settings"),
        ({f"no_{number}": 1 for number in range(10**4)}, r"\['no_0', .*\.\.\.\] are no LoRA-Pro settings"),
        ({"mode": LONG[:9000]}, "mode='xxx"),
        ({"rtol": list(range(9000))}, r"rtol=\[0, 1"),
        ({"trust_region": {"a": LONG[:9000]}}, "trust_region={'a': 'xxx"),
        ({"lorapro_hf_version": LONG[:9000], "mode": "no"}, "written by lorapro_hf xxx"),
    ],
)
def test_messages_about_settings_are_short(changed: dict[str, object], message: str, tmp_path: Path) -> None:
    settings_in(tmp_path, **changed)
    with pytest.raises(ValueError, match=message) as caught:
        load_lora_pro_config(tmp_path)
    assert len(str(caught.value)) < 1500


def test_settings_nested_too_deeply(tmp_path: Path) -> None:
    (tmp_path / SETTINGS_FILE).write_text(DEEP)
    with pytest.raises(ValueError, match=r"is damaged.*nested too deeply"):
        load_lora_pro_config(tmp_path)
    with pytest.raises(json.JSONDecodeError, match="nested too deeply"):
        parse_json(DEEP)


def test_settings_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / SETTINGS_FILE).write_bytes(b"\xff" * 9000)
    with pytest.raises(ValueError, match="is damaged") as caught:
        load_lora_pro_config(tmp_path)
    assert len(str(caught.value)) < 1000


def test_values_are_shortened() -> None:
    assert shown("full") == "'full'" and shown(0.5) == "0.5" and shown(["a", "b"]) == "['a', 'b']"
    with pytest.raises(ValueError, match=r"mode='xxx.*valid values are 'full'") as caught:
        check_choice("mode", LONG, ("full",))
    assert len(str(caught.value)) < 300
    with pytest.raises(ValueError, match="are no LoRA-Pro settings"):
        LoRAProConfig.from_dict({1: 2, "no": 3})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{LONG[:900]}: 1\n{LONG[:900]}: 2\n", "is there twice"),
        (f"a: *{LONG[:9000]}\n", "undefined alias"),
        pytest.param(DEEP, "nested too deeply", marks=pytest.mark.slow),
    ],
)
def test_messages_about_yaml_are_short(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"it.*{message}") as caught:
        parse_yaml(text, "it")
    assert len(str(caught.value)) < 500


def test_recipes_are_bounded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{LONG[:900]}: 1\n")
    with pytest.raises(SystemExit):
        RecipeParser((), description="", prog="it").parse([str(recipe)])
    assert "is no option of it" in (said := capsys.readouterr().err) and len(said) < 1000
    recipe.write_text(f"a: {LONG}{LONG}\n")
    with pytest.raises(UsageError, match=r"cannot read the recipe .*larger than 1 MiB"):
        read_yaml(recipe, "the recipe")


def test_files_of_other_names_beside_the_moments(tmp_path: Path) -> None:
    for name in ("0", "1", "12", "X", "", "1.old", "-1", "\u0661"):
        (tmp_path / f"lora_pro_rank{name}.safetensors").touch()
    assert sorted(moments_files(tmp_path).values()) == [0, 1, 12]


# ---- writing ----


@pytest.fixture
def guessed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    """The names of drafts are known beforehand."""
    monkeypatch.setattr("secrets.token_hex", lambda _: "0")
    return lambda file: file.with_name(f"_{file.name}.0.part")


def test_no_link_is_followed(guessed: Callable[[Path], Path], tmp_path: Path) -> None:
    file, victim = tmp_path / "README.md", tmp_path / "victim"
    victim.write_text("safe")
    guessed(file).symlink_to(victim)
    with pytest.raises(FileExistsError):
        replace_file(file, b"new")
    assert victim.read_text() == "safe" and not file.exists()
    guessed(file).unlink(missing_ok=True)
    file.symlink_to(victim)
    replace_file(file, b"new")  # in the place of the link
    assert victim.read_text() == "safe" and file.read_bytes() == b"new" and not file.is_symlink()


def test_drafts_of_killed_runs_are_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / "_README.md.part").symlink_to(tmp_path / "victim")
    replace_file(tmp_path / "README.md", b"new")
    assert not (tmp_path / "victim").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "_README.md.part"]


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
def test_files_have_the_usual_mode(tmp_path: Path) -> None:
    (tmp_path / "usual").write_text("")
    replace_file(tmp_path / "ours", b"")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("usual", "ours")]
    assert modes[0] == modes[1]
