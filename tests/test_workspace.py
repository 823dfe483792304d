"""WORKSPACE.md and README.md say what is there."""

import re
import subprocess
from pathlib import Path


def tracked(repository: Path, *patterns: str) -> list[str]:
    run = subprocess.run(
        ["git", "ls-files", *patterns], cwd=repository, capture_output=True, text=True, check=True
    )
    return run.stdout.split()


def test_the_tree_in_workspace_names_every_source_file(repository):
    text = (repository / "WORKSPACE.md").read_text()
    tree = text[text.index("```") : text.index("## The data flow")]
    files = [
        name
        for name in tracked(repository, "*.py", "*.sh")
        if not name.startswith("tests/") and not name.endswith("__init__.py")
    ]
    assert files
    missing = [name for name in files if name.partition("/")[2] not in tree]
    assert not missing, f"add a line for each to WORKSPACE.md: {missing}"


def test_every_file_that_workspace_and_readme_name_exists(repository):
    for document in ("README.md", "WORKSPACE.md"):
        text = (repository / document).read_text()
        for name in re.findall(
            r"(?:configs|launch|tests|data_pipelines|eval|serving|llmzoo_jax)/[\w/]+\.(?:py|sh|md)",
            text,
        ):
            assert (repository / name).is_file(), f"{document} names {name}"
        for module in re.findall(r"python -m ([a-z_]+(?:\.[a-z_]+)+)", text):
            path = repository / Path(*module.split("."))
            assert path.with_suffix(".py").is_file(), f"{document} names {module}"


def test_no_source_file_is_longer_than_400_lines(repository):
    for name in tracked(repository, "*.py"):
        if not name.startswith("tests/"):
            lines = len((repository / name).read_text().splitlines())
            assert lines <= 400, f"{name} has {lines} lines: two ideas in one?"
