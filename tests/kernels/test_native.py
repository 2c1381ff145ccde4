"""The C++ kernels are built once for each source, compiler and machine; without them one line says why."""

import shlex
import sys

import pytest

from lorapro_hf.kernels import native

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="kernels are built on Linux alone")

WRITES = 'while [ "$1" ]; do [ "$1" = -o ] && echo library > "$2"; shift; done'
FAILS = (
    '[ "$1" = --version ] || { echo "In file included from x" >&2; echo "x.hpp:1: error: no such thing" >&2; exit 1; }'
)


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Takes the commands of a script to run as the compiler, from a path with a space."""

    def use(commands):
        script = tmp_path / "my compiler"
        script.write_text(f"#!/bin/sh\n{commands}\n")
        script.chmod(0o755)
        monkeypatch.setenv("CXX", f"{shlex.quote(str(script))} -march=native")
        return f"{shlex.quote(str(script))} -march=native"

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LORAPRO_HF_NO_NATIVE", "0")
    return use


def test_a_changed_header_is_built_anew(compiler, tmp_path, monkeypatch):
    command = compiler(WRITES)
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    (tmp_path / "a.cpp").write_text('#include "b.hpp"')
    (tmp_path / "b.hpp").write_text("int one;")
    first = native._library(command)
    assert first.read_text() == "library\n"
    assert native._library(command) == first
    (tmp_path / "b.hpp").write_text("int two;")
    assert native._library(command) != first
    assert len(list(first.parent.iterdir())) == 2


def test_a_failure_is_told_with_its_error(compiler, caplog):
    compiler(FAILS)
    assert native.native_kernels.__wrapped__() is None
    assert "x.hpp:1: error: no such thing. Install g++ 9 or newer, or set CXX" in caplog.text


def test_a_command_with_an_open_quote_is_told(compiler, caplog, monkeypatch):
    monkeypatch.setenv("CXX", "'g++")
    assert native.native_kernels.__wrapped__() is None
    assert "No closing quotation" in caplog.text


@pytest.mark.parametrize("home", [None, "/proc/no-such-folder"])
def test_a_user_without_a_home_gets_a_folder_of_the_process(home, tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(native.tempfile, "tempdir", str(tmp_path))

    def no_home():
        if home is None:
            raise RuntimeError("Could not determine home directory.")
        return native.Path(home)

    monkeypatch.setattr(native.Path, "home", no_home)
    assert native._folder().parent == tmp_path
