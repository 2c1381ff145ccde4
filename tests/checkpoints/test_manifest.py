"""The manifest of a checkpoint tells each file that is not the one that was saved."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from lorapro_hf.checkpoints import manifest
from lorapro_hf.checkpoints.manifest import MANIFEST, clear, find_change, read_manifest, write_manifest

FILES = {
    "trainer_state.json": b'{"global_step": 6}',
    "optimizer.pt": bytes(range(256)) * 8,
    "adapter_model.safetensors": bytes(1000),
    "other/adapter_model.safetensors": b"other",
    "pytorch_model_fsdp_0/.metadata": b"pickled",
    "pytorch_model_fsdp_0/__1_0.distcp": b"rows",
    "latest": b"global_step6",
    "global_step6/mp_rank_00_model_states.pt": b"states",
    "rng_state_1.pth": b"numbers",
    "model-00001-of-00002.safetensors": b"a shard",
    "model.safetensors.index.json": b"{}",
}
EDITABLE = {
    "README.md": b"card",
    "adapter_config.json": b"{}",
    "tokenizer/vocab.txt": b"words",
    "tokenizer.model": b"words",
    "training_args.bin": b"arguments",
    "zero_to_fp32.py": b"program",
    ".nfs0001": b"passing",
    "global_step6/.nfs0002": b"passing",
    "optimizer.pt.tmp": b"passing",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with a manifest."""
    for name, content in {**FILES, **EDITABLE}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    write_manifest(tmp_path, global_step=6, processes=2, engine="FSDP2")
    return tmp_path


def change_in(folder: Path, **settings: Any) -> str | None:
    found = read_manifest(folder)
    assert found is not None
    return find_change(folder, found, **settings)


def test_it_lists_what_a_training_goes_on_from(folder: Path) -> None:
    found = read_manifest(folder)
    assert found is not None
    assert (found.global_step, found.processes, found.engine) == (6, 2, "FSDP2")
    assert {name: saved.size for name, saved in found.files.items()} == {n: len(c) for n, c in FILES.items()}
    assert change_in(folder) is None
    assert not list(folder.glob("*.part"))


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found_in_each_file(folder: Path, name: str) -> None:
    content = bytearray(FILES[name])
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    assert f"{name} is of another save or damaged (its checksum differs" in str(change_in(folder))
    assert change_in(folder, checksums=False) is None


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_lost_or_cut_off_is_found(folder: Path, name: str) -> None:
    (folder / name).write_bytes(FILES[name][:-1])
    assert f"{name} is of another save or damaged" in str(change_in(folder, checksums=False))
    (folder / name).unlink()
    assert change_in(folder) == f"{name} is missing"


@pytest.mark.parametrize("name", EDITABLE)
def test_files_that_people_edit_or_add_are_no_change(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"edited")
    (folder / "note.bin").write_bytes(b"added")
    assert change_in(folder) is None
    (folder / name).unlink()
    assert change_in(folder) is None


@pytest.mark.parametrize(
    "name", ["scheduler.pt", "rng_state.pth", "optimizer_0/.metadata", "mine/adapter_model.bin", "pytorch_model.bin"]
)
def test_a_file_that_the_save_did_not_write_is_of_another_one(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"added")
    assert change_in(folder) == f"{name} is of another save (it is not listed in {MANIFEST})"


def test_random_states_of_other_nodes_may_be_added(folder: Path) -> None:
    (folder / "rng_state_8.pth").write_bytes(b"added")
    assert change_in(folder) is None


def test_pieces_of_a_large_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "_PIECE", 512)
    monkeypatch.setattr(manifest, "_READ", 128)
    file = folder / "optimizer.pt"
    file.write_bytes(FILES["optimizer.pt"] + b"end")
    write_manifest(folder, global_step=6, processes=1)
    found = read_manifest(folder)
    assert found is not None and len(found.files["optimizer.pt"].crc32) == 5
    for place in (0, 511, 512, 2050):
        content = bytearray(FILES["optimizer.pt"] + b"end")
        content[place] ^= 128
        file.write_bytes(content)
        assert "optimizer.pt is of another save" in str(change_in(folder))


def test_a_file_is_read_once_while_it_stays_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> int:
        pytest.fail("read again")

    monkeypatch.setattr(manifest, "_crc32", never)
    assert change_in(folder) is None


def test_a_folder_without_one(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "it is cut off, or was never JSON"),
        ("[]", "it does not list files as LoRA-Pro does"),
        ("[" * 100_000, "it is cut off, or was never JSON"),
        ("{}", "it does not list files as LoRA-Pro does"),
        ('{"format": 2, "lorapro_hf": "7.0"}', "it was written by lorapro_hf 7.0, later than"),
        ({"files": 3}, "it does not list files"),
        ({"files": {"optimizer.pt": {"size": 3}}}, "it does not list files"),
        ({"files": {"../optimizer.pt": {"size": 3, "crc32": [1]}}}, "which is not in the checkpoint"),
        ({"files": {"/etc/passwd": {"size": 3, "crc32": [1]}}}, "which is not in the checkpoint"),
        ({"files": {"x" * 10_000: {}}}, "it does not list files"),
        ({"global_step": float("inf")}, "it does not list files"),
    ],
)
def test_a_damaged_one_is_refused_in_a_short_message(folder: Path, content: Any, said: str) -> None:
    if isinstance(content, dict):
        content = json.dumps({**json.loads((folder / MANIFEST).read_text()), **content})
    (folder / MANIFEST).write_text(content)
    with pytest.raises(ValueError, match=said) as caught:
        read_manifest(folder)
    assert len(str(caught.value)) < 200


def test_one_of_any_size_is_not_read(folder: Path) -> None:
    os.truncate(folder / MANIFEST, 2**33)
    with pytest.raises(ValueError, match="more than 64 MB"):
        read_manifest(folder)


def test_no_link_is_followed_when_it_is_written(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    mine = tmp_path_factory.mktemp("elsewhere") / "mine"
    mine.write_text("mine")
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).symlink_to(mine)
    write_manifest(folder, global_step=6, processes=1)
    assert mine.read_text() == "mine" and not (folder / MANIFEST).is_symlink()


def test_clearing_leaves_no_state_and_what_is_not_the_trainers(folder: Path) -> None:
    for name in ("optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_11.pth"):
        (folder / name).write_bytes(b"old")
    (folder / "optimizer_0").symlink_to(shutil.copytree(folder / "other", folder / "mine"))
    clear(folder)
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    of_state = ("trainer_state.json", "optimizer", "rng_state", "pytorch_model_fsdp", "latest", "global_step", "zero_")
    stay = {name for name in (*FILES, *EDITABLE) if not name.startswith(of_state)}
    assert left == {*stay, "optimizer.pt.tmp", "mine/adapter_model.safetensors"}
