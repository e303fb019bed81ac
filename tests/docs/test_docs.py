"""The commands that README and docs show exist, with the options they show."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from helpers.commands import merge_here, run
from helpers.models import merge_config
from helpers.pages import anchors, links, shell_lines
from helpers.paths import QUICKSTART, ROOT
from rpam_mergekit.cli.main import main
from rpam_mergekit.formats import calibration, coefficients, samples
from rpam_mergekit.formats.operating_point import PatternRouting, Routing
from rpam_mergekit.formats.solved_layers import OUTSIDE, LayerSolution, SolvedLayers
from rpam_mergekit.grading.answers import Gold
from rpam_mergekit.outputs import record

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [QUICKSTART / "README.md", ROOT / "examples" / "smollm2" / "README.md"]


def commands() -> list[tuple[str, str]]:
    return [
        (page.name, line)
        for page in PAGES
        for line in shell_lines(page)
        if line.startswith("mergekit-rpam ")
    ]


def test_the_pages_show_commands():
    shown = {line.split()[1] for _, line in commands()}
    assert {"sample", "label"} <= shown


@pytest.mark.parametrize(("page", "line"), commands())
def test_a_command_that_a_page_shows_parses(page, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "rpam").mkdir(parents=True)
    for file in ("rpam.yml", "out/rpam/coefficients.safetensors"):
        (tmp_path / file).touch()
    name, *arguments = shlex.split(line, comments=True)[1:]
    # The group makes local files of the Hub's, which would be looked for there.
    arguments = [re.sub(r"^hf://.*/", "", argument) for argument in arguments]
    command = main.get_command(None, name)
    assert command is not None, f"{page}: {name}"
    command.make_context(name, arguments)


def test_the_presets_that_the_docs_list_are_those_there_are():
    from rpam_mergekit.questions.benchmarks import PRESETS

    page = (ROOT / "docs" / "calibration.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `([a-z0-9-]+)` \| (\S+/\S+)", page, re.MULTILINE))
    assert listed == {name: preset.path for name, preset in PRESETS.items()}


def test_the_architecture_page_names_what_there_is():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    package = ROOT / "rpam_mergekit"
    named = set(re.findall(r"`((?:\w+/)?\w+\.py)`", page))
    assert len(named) > 20
    found = {path.name for path in package.rglob("*.py")}
    for name in named:
        assert (package / name).exists() if "/" in name else name in found, name
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    listed = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    assert listed == folders


def test_the_architecture_page_names_functions_of_these_files():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = page.partition("\n## Where is ...\n")[2].partition("\n## ")[0]
    named = re.findall(r"`(\w+/\w+\.py)` \((`[^)]+)\)", section)
    assert len(named) >= 4
    for file, functions in named:
        source = (ROOT / "rpam_mergekit" / file).read_text(encoding="utf-8")
        for function in re.findall(r"`(\w+)`", functions):
            assert f"def {function}(" in source, f"{file}: {function}"


FORMATS = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
# Objects whose keys are no fields: settings, names, what the data has.
DATA_KEYS = {"settings", "fixed", "queries", "scores", "extra_body", "source"}
DATA_KEYS |= {"configs", "weights", "base_files"}


def named_in(section: str) -> set[str]:
    """Return what a section of the page on formats has in code type."""
    text = FORMATS.partition(f"\n## The {section}\n")[2].partition("\n## ")[0]
    return set(re.findall(r"`([^`\n]+)`", text))


def rows_of(section: str) -> set[str]:
    """Return the keys that head the rows of a section's tables."""
    text = FORMATS.partition(f"\n## The {section}\n")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def keys_of(content) -> set[str]:
    """Return the keys of JSON, and of all that is in it but for `DATA_KEYS`."""
    if isinstance(content, list):
        return set().union(*map(keys_of, content))
    if not isinstance(content, dict):
        return set()
    inner = [keys_of(v) for k, v in content.items() if k not in DATA_KEYS]
    return set(content).union(*inner)


def names(kind) -> set[str]:
    return {field.name for field in fields(kind)}


@pytest.fixture(scope="module")
def merged(pair, tmp_path_factory):
    parameters = {"granularity": "layer", "epochs": 1}
    out = tmp_path_factory.mktemp("formats") / "out"
    return merge_here(merge_config(pair, parameters=parameters), out)


def test_the_formats_page_names_the_fields_of_the_calibration_file():
    known = {*calibration.CalibrationQuery.model_fields}
    assert rows_of("calibration file") == known
    assert known | {"source"} | {*calibration.Message.model_fields} <= named_in(
        "calibration file"
    )


def test_the_formats_page_names_what_a_sample_file_has(pair, tmp_path):
    questions, out = tmp_path / "questions.jsonl", tmp_path / "out.samples.jsonl"
    questions.write_text('{"question": "7+5=", "answer": "2", "level": 1}\n')
    command = ["mergekit-rpam", "sample", str(pair / "long")]
    command += ["--dataset", str(questions), "--out", str(out), "-k", "1"]
    command += ["--max-tokens", "4", "--device", "cpu"]
    process = run(command)
    assert process.returncode == 0, process.stderr
    header, query, end = map(json.loads, out.read_text("utf-8").splitlines())
    fields_of = [samples.Response, samples.SampledQuery, Gold]
    known = {name for model in fields_of for name in model.model_fields}
    written = keys_of([header, query, end])
    assert {"rpam_samples", "digest", "opening", "finished"} <= written
    assert written | known <= named_in("sample file")
    assert rows_of("sample file") <= written | known


def test_the_formats_page_names_what_a_coefficients_file_has(merged):
    file = coefficients.CoefficientsFile(merged / "rpam" / "coefficients.safetensors")
    written = keys_of(file.metadata)
    assert {"fingerprint", "gap_after", "held_out", "unscaled"} <= written
    known = {coefficients.METADATA_KEY, *coefficients.PARTS}
    known |= names(Routing) | names(PatternRouting)
    assert written | known <= named_in("coefficients file")
    assert rows_of("coefficients file") <= written | known


def test_the_formats_page_names_what_a_solved_layer_has(tmp_path):
    layers = SolvedLayers(tmp_path)
    layers[OUTSIDE] = LayerSolution({}, None, b"\0")
    file = coefficients.CoefficientsFile(tmp_path / "outside.safetensors")
    assert {"report", "generator"} <= keys_of(file.metadata)
    assert keys_of(file.metadata) <= named_in("coefficients file")


def test_the_formats_page_names_what_a_record_has(merged):
    content = json.loads((merged / "rpam.json").read_text(encoding="utf-8"))
    assert rows_of("record") == set(content)
    inherited = named_in("coefficients file")  # layers, operating point
    layers, point = content.pop("layers"), content.pop("operating_point")
    assert keys_of([layers, point]) <= inherited
    written = keys_of(content) | {"layers", "operating_point"}
    assert {"opens_by_itself", "sha256", "layer_ranges"} <= written
    assert written | {"merged_from", "adapter"} <= named_in("record")


def test_the_formats_page_has_the_versions():
    table = dict(re.findall(r"^\| \[([^\]]+)\]\(#.*\| (\w+) \|$", FORMATS, re.M))
    assert table == {
        "calibration file": "none",
        "sample file": str(samples.FORMAT),
        "coefficients file": str(coefficients.FORMAT),
        "record, `rpam.json`": str(record.FORMAT),
    }


def linked_pages() -> list[Path]:
    """Return all pages of the repository; merges' cards are ignored by git."""
    folders = (".github", "benchmarks", "docs", "examples", "tests")
    pages = [page for folder in folders for page in (ROOT / folder).rglob("*.md")]
    made = {"base", "cache", "experts", "out", "practice"}
    pages = [page for page in pages if not made & {*page.relative_to(ROOT).parts}]
    return sorted([*ROOT.glob("*.md"), *pages])


@pytest.mark.parametrize(
    "page", linked_pages(), ids=lambda page: str(page.relative_to(ROOT))
)
def test_links_lead_to_a_file_and_to_a_heading_in_it(page):
    lost = []
    for path, anchor in links(page):
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(f"{path}#{anchor}" if anchor else path)
    assert not lost


def test_anchors_are_those_of_github(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A merge, in `seven` steps\n\n## [Where is](x.md) ...?\n\n```sh\n# no\n```\n"
        "## Notes\n\n## Notes\n\n[a](#notes) [b](y.md#z) [c](https://x.org/#q)\n"
    )
    expected = {"a-merge-in-seven-steps", "where-is-", "notes", "notes-1"}
    assert anchors(page) == expected
    assert links(page) == [("x.md", ""), ("", "notes"), ("y.md", "z")]


def test_no_module_of_the_package_is_too_long():
    """CONTRIBUTING says how long: a longer one holds two ideas."""
    lengths = {
        path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines())
        for path in (ROOT / "rpam_mergekit").rglob("*.py")
    }
    assert len(lengths) > 100
    assert {path: n for path, n in lengths.items() if n > 400} == {}
