"""The pages: made from the sources where they say so, links that lead somewhere, commands that print what is shown."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from terminal import environment
from test_structure import ORDER

import cuqwen
from tools import make_docs

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "kernels" / "LOG.md"]


@pytest.mark.parametrize("page", ["docs/interface.md", "docs/models.md"])
def test_made_pages_are_in_step(page):
    made = make_docs.pages(ROOT)[page]
    assert made == (ROOT / page).read_text(encoding="utf-8"), "python -m tools.make_docs makes it again"


def test_a_changed_docstring_is_noticed(tmp_path):
    for folder in ("cuqwen", "kernels", "docs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("demo", "*.svg", "__pycache__"))
    before = make_docs.pages(tmp_path)
    for name, old, new in (
        ("cuqwen/ops.py", "returns [..., C] float32", "returns [..., C] float8"),
        ("cuqwen/api.py", "at least one token", "no token"),
        ("kernels/embed.cu", "an id outside", "an id inside"),
    ):
        path = tmp_path / name
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")
        after = make_docs.pages(tmp_path)
        shown = name != "cuqwen/api.py"  # that one is a message, not a docstring
        assert (after != before) == shown
        before = after


def test_stubs_have_signature_docstring_and_public_methods_only():
    source = (
        '@frozen\nclass A:\n    """Says."""\n\n    x: int  # why\n    y: int = 0\n\n    def _hidden(self) -> None:\n        """No."""\n\n'
        '    @property\n    def z(\n        self,\n    ) -> int:\n        """Yes."""\n        return 1\n\n    def w(self) -> int:\n        return 2\n'
    )
    wanted = (
        '@frozen\nclass A:\n    """Says."""\n\n    x: int  # why\n    y: int = 0\n\n'
        '    @property\n    def z(\n        self,\n    ) -> int:\n        """Yes."""\n\n    def w(self) -> int:'
    )
    assert make_docs.stub(source, "A") == wanted


def test_every_kernel_and_operation_is_there():
    page = (ROOT / "docs" / "interface.md").read_text(encoding="utf-8")
    for path in (ROOT / "kernels").glob("*.cu"):
        assert f"### [{path.name}]" in page
    for name in make_docs.operations(ROOT):
        assert f"#### `{name}`" in page


def test_the_map_has_every_module_in_order():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\[.*?) \|", page, re.M)
    assert [name for row in rows for name in re.findall(r"\[(\w+)\]", row)] == list(ORDER)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://")):
            path, _, anchor = target.partition("#")
            found = (page.parent / path).resolve() if path else page
            assert found.exists() and ROOT in (found, *found.parents), f"{page.name}: {target}"
            assert not anchor or anchor in _anchors(found), f"{page.name}: {target}"


def _anchors(page):
    titles = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


# --- the README's commands ----------------------------------------------------------------------------------------------

README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCES = "".join(re.findall(r"^```sh\n(.*?)^```", README, re.S | re.M))
SHOWN = re.findall(r"^\$ (.*)\n((?:(?!\$ |```).*\n)*)", README, re.M)


def run(command, cwd):
    """A line for the shell as the README has it, with this Python's cuqwen: (stdout, stderr)."""
    shell = f'cuqwen() {{ "{sys.executable}" -m cuqwen "$@"; }}; {command}'
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, env=environment(), cwd=cwd, timeout=60)
    return done.stdout, done.stderr


SCRIPTS = re.findall(r"^```python\n(.*?)^```", README, re.S | re.M)


def test_the_script_on_models(tmp_path, monkeypatch, capsys):
    """As it stands, with a small checkpoint that has a chat template in the other one's place."""
    folder = shutil.copytree(ROOT / "cuqwen" / "demo", tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}", encoding="utf-8")
    load, (script, _) = cuqwen.load, SCRIPTS
    models = {"Qwen/Qwen3-0.6B": folder, "demo": "demo"}
    monkeypatch.setattr(cuqwen, "load", lambda name, device="cpu", **more: load(models[name], device=device, **more))
    names = {}
    exec(script, names)
    assert len(capsys.readouterr().out.splitlines()) >= 2
    assert names["logits"].shape[1] == 4096 and names["exact"].logits([1]).dtype == "float64"


@pytest.mark.gpu
def test_the_script_on_operations():
    names = {}
    exec(SCRIPTS[1], names)
    np.testing.assert_allclose(names["y"].get(), cuqwen.rmsnorm(names["x"].get(), np.ones(1024, "float32")), rtol=1e-5)


def test_commands_are_found():
    assert len(SHOWN) >= 3


@pytest.mark.parametrize(("command", "output"), SHOWN, ids=lambda text: text[:30])
def test_commands_print_what_is_shown(command, output, tmp_path):
    stdout, stderr = run(command, tmp_path)
    timings = re.compile(r'(_seconds|_per_second)": [\d.]+')
    assert timings.sub(r'\1": 0', stdout + stderr) == timings.sub(r'\1": 0', output)


def test_the_first_command_prints_what_is_shown(tmp_path):
    command, output = re.search(r"```sh\n.*\.venv/bin/(cuqwen .*)\n```\n\n```\n(.*?)```", README, re.S).groups()
    text, statistics = output.splitlines()
    stdout, stderr = run(command, tmp_path)
    assert stdout == text + "\n"

    def words(line):
        return re.findall(r"[^\d\s.,]+", line)

    assert words(stderr) == words(statistics)


def test_commands_are_the_ones_that_exist():
    from cuqwen.cli import COMMANDS

    assert re.findall(r"^\| `cuqwen (\w+)[^|]*` \|", README, re.M) == list(COMMANDS)


@pytest.mark.parametrize("line", re.findall(r"^(?:\$ )?[^`\n]*\b(cuqwen [a-z]+ (?!--help tells).*)", FENCES, re.M))
def test_every_command_is_one(line):
    from cuqwen import cli

    arguments = shlex.split(line.split(" 2>&1")[0], comments=True)[1:]
    try:
        options = cli._parser(arguments).parse_args(arguments)
    except SystemExit:
        pytest.fail(f"README.md: {line}: wrong usage")
    assert callable(options.run)
