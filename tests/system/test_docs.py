"""The documentation against the code: what is generated, what is linked, every command that it
tells people to type.

Blocks of `sh` and `python` are run as they stand: one page is one bash session, in a copy of the
repository in which `smollm2-moe` is a tiny random base and the examples' waves are short. A block
that can't be run here has a mark above it that says what it needs. Two pages run at a time.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer.main
import yaml

from populace.configs.load import load_settings
from populace.population.cli.app import app
from populace.workers.base.registry import digest_folder
from tests.support import tiny

ROOT = Path(__file__).parents[2]
EVERY_PAGE = sorted(
    [
        ROOT / "README.md",
        ROOT / "infra/README.md",
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("examples/*/README.md"),
    ]
)
RUN = sorted(
    [
        ROOT / "README.md",
        ROOT / "infra/README.md",
        ROOT / "docs/operations.md",
        ROOT / "docs/quickstart.md",
        *ROOT.glob("docs/howto/*.md"),
    ]
)
FRESH = tuple(
    f"docs/howto/{name}.md"
    for name in ("own-base", "own-reward", "run-as-a-job", "s3-and-minio", "watch")
)
"""These begin in a fresh clone; the others where the quickstart, or `make demo`, has left off."""
MARKS = ("needs a GPU", "needs a cluster", "needs docker", "needs a network", "run by CI itself")
LANGUAGES = ("sh", "python", "yaml", "json", "text", "")
SHELL = re.compile(
    r"^\s*(\$ "
    r"|(\.venv/bin/)?(populace|python3?|pip|ray)\s|(export|make|docker|kubectl|curl|git|cd) )"
)
PAGE_S = 400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """What stands between two fences."""

    line: int
    language: str
    text: str
    mark: str | None

    @property
    def is_run(self) -> bool:
        return self.language in ("sh", "python") and self.mark is None


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks_of(page: Path) -> list[Block]:
    found: list[Block] = []
    mark: str | None = None
    language: str | None = None
    start, body = 0, list[str]()
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fence = re.match(r"^(\s*)```(.*)$", line)
        if language is not None and fence:
            found.append(
                Block(line=start, language=language, text="\n".join(body) + "\n", mark=mark)
            )
            language, mark = None, None
        elif language is not None:
            body.append(line)
        elif fence:
            assert not fence[1], (
                f"{name_of(page)}:{number}: an indented block is not checked; move it to the margin"
            )
            language, start, body = fence[2].strip(), number, []
        elif line.strip().startswith("<!-- check:"):
            assert mark is None, f"{name_of(page)}:{number}: the mark above has no block"
            mark = line.strip().removeprefix("<!-- check:").removesuffix("-->").strip()
        elif line.strip():
            assert mark is None, f"{name_of(page)}:{number}: the mark above has no block"
    assert language is None, f"{name_of(page)}:{start}: this block has no end"
    assert mark is None, f"{name_of(page)}: the last mark has no block"
    return found


# What is generated


def module_at(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.parent.name + "_build", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


BUILD = module_at(ROOT / "docs/build.py")


@pytest.mark.parametrize("name", sorted(BUILD.PAGES))
def test_a_reference_page_says_what_the_code_says(name: str) -> None:
    assert (ROOT / "docs/reference" / name).read_text() == BUILD.PAGES[name](), "run `make docs`"


def test_the_dashboard_is_what_its_generator_writes(tmp_path: Path) -> None:
    shutil.copy(ROOT / "infra/grafana/build.py", tmp_path)
    subprocess.run([sys.executable, tmp_path / "build.py"], check=True)
    assert (tmp_path / "populace.json").read_text() == (
        ROOT / "infra/grafana/populace.json"
    ).read_text()


def test_operations_says_what_to_do_about_every_alert() -> None:
    rules = yaml.safe_load((ROOT / "infra/prometheus/rules.yaml").read_text())
    alerts = {rule["alert"] for group in rules["groups"] for rule in group["rules"]}
    text = (ROOT / "docs/operations.md").read_text()
    assert {alert for alert in alerts if f"`{alert}`" not in text} == set()
    assert set(re.findall(r"`(Populace[A-Z]\w+)`", text)) == alerts


# Links


def slugs(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", prose_of(page), flags=re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        found.add(re.sub(r"[^\w\- ]", "", words).replace(" ", "-"))
    return found


def prose_of(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", EVERY_PAGE, ids=name_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose_of(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or (anchor and anchor not in slugs(there)):
            broken.append(target)
    assert broken == []


def test_the_index_leads_to_every_page() -> None:
    index = ROOT / "docs/README.md"
    linked = {
        (index.parent / target.partition("#")[0]).resolve()
        for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(index))
        if not re.match(r"[a-z]+:", target)
    }
    pages = [page for page in ROOT.glob("docs/**/*.md") if page != index]
    assert [
        name_of(page) for page in pages if page not in linked and page.parent not in linked
    ] == []


# Commands and settings

COMMAND: Any = typer.main.get_command(app)
SETTINGS = {row.path for _, _, rows in BUILD.sections() for row in rows}
SECTIONS = {path.partition(".")[0] for path in SETTINGS if "." in path}
OPEN = ("rewards.functions.", "scheduler.tenants.")
"""What is below these, users name."""


def words_of(text: str) -> Iterator[list[str]]:
    """The command lines in shell text, each as its words, without what only the shell reads."""
    for line in text.replace("\\\n", " ").splitlines():
        if "populace" not in line and "examples.streaming" not in line:
            continue
        line = re.sub(r"\d?>>? *(&\d|\S+)", "", line)  # where output goes
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in lexer:
            if set(word) <= set("|&;<>()"):
                yield words
                words = []
            else:
                words.append(word)
        yield words


def check_command(arguments: list[str]) -> None:
    """Raises when `populace` would not understand these."""
    command = COMMAND
    context = command.context_class(command, info_name="populace")
    while getattr(command, "commands", None):
        assert arguments, "no command"
        assert arguments[0] in command.commands, f"there is no command {arguments[0]!r}"
        command, arguments = command.commands[arguments[0]], arguments[1:]
        context = command.context_class(command, info_name="populace", parent=context)
    if "--help" not in arguments:
        command.parse_args(context, list(arguments))


def check_settings(words: list[str]) -> None:
    """Loads `section.key=value` words on top of the configuration before them."""
    overrides = [word for word in words if re.match(r"[a-z_]+(\.\w+)*=", word)]
    files = [ROOT / word for word in words if word.endswith(".yaml") and (ROOT / word).is_file()]
    load_settings(files[0] if files else None, overrides)


@pytest.mark.parametrize(
    "page", [page for page in EVERY_PAGE if page.parent.name != "reference"], ids=name_of
)
def test_every_command_line_is_one_that_populace_understands(page: Path) -> None:
    for block in blocks_of(page):
        if block.language == "python":
            continue
        for words in words_of(block.text):
            calls = [
                place for place, word in enumerate(words) if re.fullmatch(r"(.*/)?populace", word)
            ]
            try:
                for place in calls:
                    if words[place + 1 :]:
                        check_command(words[place + 1 :])
                        check_settings(words[place + 1 :])
                if "examples.streaming.users" in words:
                    check_settings(words)
            except Exception as error:
                raise AssertionError(
                    f"{name_of(page)}:{block.line}: {shlex.join(words)}: {error}"
                ) from error


@pytest.mark.parametrize("page", EVERY_PAGE, ids=name_of)
def test_commands_and_settings_that_are_named_in_passing_exist(page: Path) -> None:
    for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose_of(page)):
        if span.startswith("populace "):
            command, words = COMMAND, span.split()[1:]
            while words and words[0] in getattr(command, "commands", {}):
                command = command.commands[words.pop(0)]
            assert not getattr(command, "commands", {}) or words in ([], ["COMMAND", "--help"]), (
                f"no command `{span}`"
            )
            options = {name for option in command.params for name in option.opts} | {"--help"}
            assert {word for word in words if word.startswith("--")} <= options, (
                f"no such option in `{span}`"
            )
        path = re.match(r"([a-z]\w*)\.\w+(?:\.\w+)*(?=[=:]|$)", span)
        if path and path[1] in SECTIONS and not span.endswith((".py", ".yaml", ".json")):
            assert path[0] in SETTINGS or path[0].startswith(OPEN), (
                f"there is no setting {path[0]!r}"
            )


# Running it


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_every_block_is_run_or_says_what_it_would_need(page: Path) -> None:
    for block in blocks_of(page):
        where = f"{name_of(page)}:{block.line}"
        assert block.mark is None or block.mark in MARKS, f"{where}: {block.mark!r} is no reason"
        assert block.language in LANGUAGES, f"{where}: write sh instead of {block.language!r}"
        if block.language not in ("sh", "python"):
            assert block.mark is None, f"{where}: only sh and python need a mark"
            assert not any(SHELL.match(line) for line in block.text.splitlines()), (
                f"{where}: commands need ```sh"
            )


def script_of(page: Path, folder: Path) -> str:
    """All blocks of a page that can be run, as one bash script; python is read from files in
    `folder`."""
    parts = ["set -e", "set -o pipefail"]
    for block in blocks_of(page):
        if not block.is_run:
            continue
        parts.append(f"echo '--- {name_of(page)}:{block.line}'")
        if block.language == "sh":
            parts.append(f"set -x\n{block.text}\n{{ set +x; }} 2>/dev/null")
        else:
            path = folder / f"{block.line}.py"
            path.write_text(block.text)
            parts.append(f".venv/bin/python - < {path}")
    return "\n".join([*parts, "times"]) + "\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What running a page came to."""

    exit_code: int | None
    """None: it took too long."""
    output: str
    seconds: float


def run_page(page: Path, place: Path, number: int) -> Done:
    """In `place`: the copy of the repository, and beside it the home of who reads the page."""
    (place / "scripts").mkdir()
    (place / "script.sh").write_text(script_of(page, place / "scripts"))
    ray_folder = Path(f"/tmp/pd{os.getpid()}-{number}")  # Ray's socket paths must stay short
    ray_folder.mkdir()
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(
            ("POPULACE_", "AWS_", "RAY_", "PYTEST_", "PYTHON", "TRITON_", "COV_")
        )
    } | {
        "PATH": f"{place}/populace/.venv/bin:{os.environ['PATH']}",
        "HOME": str(place / "home"),
        "POPULACE_KEYS": str(place / "home/.config/populace/keys"),
        "POPULACE_CACHE": str(place / "home/.cache/populace"),
        "RAY_TMPDIR": str(ray_folder),
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "120",
    }
    started = time.monotonic()
    with open(place / "output", "w+b") as output:
        process = subprocess.Popen(
            ["bash", str(place / "script.sh")], env=environment, cwd=place / "populace",
            start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            exit_code: int | None = process.wait(PAGE_S)
        except subprocess.TimeoutExpired:
            exit_code = None
        for number in (signal.SIGTERM, signal.SIGKILL):  # whatever the page has left running
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                break
            time.sleep(1.0)
        process.wait()
        output.seek(0)
        text = output.read().decode(errors="replace")
    shutil.rmtree(ray_folder, ignore_errors=True)
    return Done(exit_code=exit_code, output=text, seconds=time.monotonic() - started)


class Reader:
    """Reads all chosen pages, two at a time, each in a place of its own."""

    def __init__(self, folder: Path, pages: list[Path]) -> None:
        self._folder, self._pool = folder, ThreadPoolExecutor(2)
        clone = folder / "clone"
        _clone(clone)
        first = self._submit(ROOT / "docs/quickstart.md", clone, 0)
        self._done = {ROOT / "docs/quickstart.md": first}
        later = [page for page in pages if page not in self._done]
        fresh = [page for page in later if name_of(page) in FRESH]
        for number, page in enumerate([*fresh, *(page for page in later if page not in fresh)], 1):
            place = clone if page in fresh else None
            self._done[page] = self._submit(page, place, number)

    def done(self, page: Path) -> Done:
        return self._done[page].result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _submit(self, page: Path, origin: Path | None, number: int) -> Future[Done]:
        def read() -> Done:
            place = self._folder / str(number)
            if origin is None:
                before = self._done[ROOT / "docs/quickstart.md"].result()
                assert before.exit_code == 0, (
                    "the quickstart failed, and this page goes on from there"
                )
            source = origin or self._folder / "0"
            for part in ("populace", "home"):
                shutil.copytree(source / part, place / part, symlinks=True)
            return run_page(page, place, number)

        return self._pool.submit(read)


def _clone(place: Path) -> None:
    """The repository as somebody has it who has just installed it, but with a base and waves that
    take no time."""
    repository = place / "populace"
    left_out = shutil.ignore_patterns(
        ".venv", "build", ".git", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis"
    )
    shutil.copytree(ROOT, repository, ignore=left_out)
    (repository / ".venv").symlink_to(Path(sys.executable).parents[1])
    base = tiny.build("mixtral", place / "home/.cache/tiny")
    registered = {"name": "smollm2-moe", "digest": digest_folder(base), "folder": str(base)}
    entry = place / "home/.cache/populace/bases/smollm2-moe.json"
    entry.parent.mkdir(parents=True)
    entry.write_text(json.dumps(registered))
    for name in ("preferences", "streaming"):
        path = repository / "examples" / name / "config.yaml"
        config = yaml.safe_load(path.read_text())
        config["base"]["dtype"] = "float32"
        config["rollout"] |= {"samples_per_task": 3, "max_new_tokens": 4}
        config["run"] |= {"threads": 1, "takeover_s": 2.5}
        path.write_text(yaml.safe_dump(config))
    # A random base says nothing that anybody likes: without spread in its rewards it would never
    # learn.
    rewards = repository / "examples/preferences/rewards.py"
    text = rewards.read_text().replace(
        "return plausible(reply) *", "return sum(map(ord, reply.text)) % 7 / 7 + 0 *"
    )
    assert text != rewards.read_text()
    rewards.write_text(text)


@pytest.fixture(scope="session")
def reader(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Reader]:
    chosen = [
        item.callspec.params["page"]
        for item in request.session.items
        if isinstance(item, pytest.Function)
        and item.originalname == "test_a_reader_can_do_what_a_page_says"
    ]
    reader = Reader(tmp_path_factory.mktemp("docs"), chosen)
    yield reader
    reader.close()


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_a_reader_can_do_what_a_page_says(page: Path, reader: Reader) -> None:
    done = reader.done(page)
    print(f"{name_of(page)}: {done.seconds:.0f} s\n{done.output}")
    assert done.exit_code is not None, f"{name_of(page)} takes longer than {PAGE_S:.0f} s"
    assert done.exit_code == 0, (
        f"{name_of(page)} stops where its output ends, with exit code {done.exit_code}"
    )
