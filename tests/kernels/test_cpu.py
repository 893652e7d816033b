"""The C kernels' compiler: what is said where there is none, and what is kept."""

import pytest

from recipelin_kernels import cpu, resolve_kernel


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As a process that has not compiled yet, with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cpu, "FLAGS", ("-O0", *cpu.FLAGS[1:]))  # a second instead of six
    for name in ("why_not", "library"):
        monkeypatch.setattr(cpu, name, getattr(cpu, name).__wrapped__)
    return tmp_path


def test_a_library_is_compiled_once(fresh, monkeypatch, capfd):
    folder, real, compiled = fresh / "cache" / "recipelin", cpu.subprocess.run, []

    def run(command, **options):
        compiled.extend(["-shared"] if "-shared" in command else [])
        return real(command, **options)

    monkeypatch.setattr(cpu.subprocess, "run", run)
    assert cpu.why_not() is None and cpu.library() is not None
    assert len(compiled) == len(list(folder.iterdir())) == 1
    (made,) = folder.iterdir()
    assert capfd.readouterr().err == f"compiling the C kernels into {made} (some seconds, once)\n"
    monkeypatch.setattr(cpu, "FLAGS", (*cpu.FLAGS, "-DOTHER"))
    assert cpu.library() is not None
    assert len(compiled) == len(list(folder.iterdir())) == 2, "other flags make another"


def test_no_compiler(fresh, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    assert cpu.why_not() == "no C compiler 'no-such-compiler' (CC)"
    monkeypatch.setenv("CC", 'gcc "')
    assert cpu.why_not() == "no C compiler 'gcc \"' (CC)"
    monkeypatch.setenv("CC", "")
    assert cpu.why_not() is None
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(fresh))
    assert cpu.why_not() == "no C compiler (cc, gcc, clang)"
    monkeypatch.setattr("recipelin_kernels.hybrid.why_no_c", cpu.why_not)
    assert resolve_kernel("auto", "cpu") == "chunked"
    with pytest.raises(RuntimeError, match=r"kernel='cpu': no C compiler \(cc, gcc, clang\); use 'chunked'"):
        resolve_kernel("cpu", "cpu")


WRONG = """#!/bin/sh
for word in "$@"; do case $word in --version|-dM) exit 0;; esac; done
echo "x.c:1: error: what is this" >&2
exit 1
"""


def test_a_compiler_that_fails(fresh, monkeypatch):
    cc = fresh / "cc"
    cc.write_text(WRONG)
    cc.chmod(0o700)
    monkeypatch.setenv("CC", str(cc))
    assert cpu.why_not() == f"{cc} does not compile the kernels: x.c:1: error: what is this"
    assert not list((fresh / "cache" / "recipelin").iterdir()), "nothing half made stays"
    cc.write_text("#!/bin/sh\nprintf 'error: no licence \\351' >&2\nexit 1\n")
    assert cpu.why_not() == f"{cc} does not compile the kernels: error: no licence \ufffd"


def test_a_compiler_with_words(fresh, monkeypatch):
    """`ccache gcc`, say."""
    before = fresh / "before"
    before.write_text('#!/bin/sh\nexec "$@"\n')
    before.chmod(0o700)
    monkeypatch.setenv("CC", f"'{before}' {' '.join(cpu.compiler())}")
    assert cpu.compiler()[0] == str(before) and cpu.why_not() is None


def test_a_cache_that_cannot_be_written(fresh):
    (fresh / "cache").write_text("a file in its place")
    assert "cannot be kept or loaded" in cpu.why_not()
