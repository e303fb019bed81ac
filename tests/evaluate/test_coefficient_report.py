"""The report on a coefficients file: figures, text, picture, one HTML page."""

from __future__ import annotations

import os
import re
import sys
from html.parser import HTMLParser

import pytest
import torch

from helpers.commands import merge_here, run, succeeded
from helpers.models import merge_config
from rpam_mergekit.errors import RpamError
from rpam_mergekit.evaluate import coefficient_report
from rpam_mergekit.evaluate.coefficient_figures import _thinned, read_report
from rpam_mergekit.evaluate.plots import check_picture, new_figure, save
from rpam_mergekit.formats.coefficients import CoefficientsFile, coefficient


@pytest.fixture(scope="module", params=["low_rank", "element", "layer"])
def merged(request, pair, tmp_path_factory):
    config = merge_config(pair, parameters={"granularity": request.param})
    return merge_here(config, tmp_path_factory.mktemp(request.param) / "out")


def test_the_figures_are_those_of_the_file(merged):
    report = read_report(merged)
    file = CoefficientsFile(merged / "rpam" / "coefficients.safetensors")
    assert {t.name for t in report.tensors} == set(file.names)
    for tensor in report.tensors:
        values = coefficient(file.parts(tensor.name)).double()
        assert tensor.mean == pytest.approx(values.mean().item(), abs=1e-6)
        departure = (values - 0.5).abs().mean().item()
        assert tensor.departure == pytest.approx(departure, abs=1e-6)
        assert tensor.quantiles[2] == pytest.approx(
            values.flatten().quantile(0.5).item(), abs=1e-6
        )
    assert [layer["layer"] for layer in report.layers] == [0, 1, 2]
    assert {t.layer for t in report.tensors} == {0, 1, 2, None}
    outside = {t.name for t in report.tensors if t.layer is None}
    assert "model.norm.weight" in outside
    assert "self_attn.q_proj.weight" in report.modules


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href")]


def test_the_command_writes_text_picture_and_page(tmp_path, merged):
    out = tmp_path / "report"
    process = run(["mergekit-rpam", "report", str(merged), "--out", str(out)])
    succeeded(process)
    text = (out / "report.txt").read_text()
    assert process.stdout.startswith(text.rstrip())
    rows = [line.split() for line in text.splitlines()]
    gaps = [row for row in rows if row and row[0] in ("0", "1", "2")]
    assert len(gaps) == 3
    # One number a layer has next to nothing to gain, and Adam's steps are by batch.
    assert all(float(row[3]) <= float(row[2]) + 0.001 for row in gaps)
    assert sum(float(row[3]) for row in gaps) < sum(float(row[2]) for row in gaps)
    assert "-0 %" not in text
    assert all(float(row[1]) > 0 for row in gaps)
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    page = _Page()
    page.feed((out / "report.html").read_text())
    assert {"svg", "table", "h1"} <= set(page.tags)
    assert "script" not in page.tags
    assert all(link.startswith(("#", "data:image/png")) for link in page.links)
    assert page.tags.count("svg") == 1


def test_the_same_file_gives_the_same_page(merged):
    pages = [coefficient_report.page(read_report(merged)) for _ in range(2)]
    assert pages[0] == pages[1]


def test_large_fields_are_read_by_every_nth_row():
    generator = torch.Generator().manual_seed(0)
    parts = {
        "row": torch.rand(6000, generator=generator),
        "column": torch.rand(2000, generator=generator),
        "left": torch.randn(6000, 2, generator=generator),
        "right": torch.randn(2, 2000, generator=generator),
    }
    thin = _thinned(parts)
    assert thin["row"].shape == (2000,)
    assert thin["left"].shape == (2000, 2)
    assert torch.equal(coefficient(thin), coefficient(parts)[::3])
    small = {"element": torch.rand(10, 10)}
    assert _thinned(small) is small
    experts = {"element": torch.zeros(4, 2000, 1024)}
    assert _thinned(experts)["element"].shape == (4, 1000, 1024)


def test_what_is_no_coefficients_file_is_refused(tmp_path):
    out = str(tmp_path / "report")
    for path, expected in (
        (tmp_path, r"no coefficients file .*rpam/coefficients\.safetensors"),
        (tmp_path / "x.safetensors", r"no coefficients file .*x\.safetensors"),
    ):
        process = run(["mergekit-rpam", "report", str(path), "--out", out])
        assert process.returncode == 1
        assert re.search(expected, process.stderr)
        assert "Traceback" not in process.stderr
    assert not (tmp_path / "report").exists()


def test_a_picture_is_checked_before_anything_is_drawn(tmp_path):
    for name in ("p.png", "p.SVG", "p"):
        check_picture(tmp_path / name)
    with pytest.raises(RpamError, match=r"p\.doc: .* 'doc'.* \.pdf, .*\.png"):
        check_picture(tmp_path / "p.doc")


@pytest.mark.parametrize("form", ["png", "svg"])
def test_a_picture_is_saved_whole_and_again_the_same(tmp_path, form):
    before = dict(os.environ), {*sys.modules}
    for name in ("a", "b"):
        figure, (left, right) = new_figure((3, 2), columns=2)
        left.plot([1, 2])
        right.plot([2, 1])
        save(figure, tmp_path / f"{name}.{form}")
    files = sorted(tmp_path.iterdir())
    assert [path.name for path in files] == [f"a.{form}", f"b.{form}"]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert dict(os.environ) == before[0]
    assert "matplotlib.pyplot" not in {*sys.modules} - before[1]
