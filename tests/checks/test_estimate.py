"""What `check` says that a merge will take, against what it takes."""

from __future__ import annotations

import re
import time

import pytest
import torch
from click.testing import CliRunner

from helpers.commands import run, succeeded
from helpers.merged import COEFFICIENTS
from helpers.models import merge_config, qwen2_config, save_pair
from helpers.models import write_calibration as write_queries
from helpers.paths import ROOT
from rpam_mergekit.chat.prompts import EncodedQuery, make_batches
from rpam_mergekit.checks.estimate import (
    Rates,
    Work,
    count_work,
    layer_bytes,
    measure,
    merging_bytes,
)
from rpam_mergekit.cli.main import main
from rpam_mergekit.replay.decoder import Decoder
from rpam_mergekit.settings import RpamSettings

MIB = 2**20


def batches(count: int, length: int):
    queries = [EncodedQuery((1,) * length, length, "long")] * count
    return make_batches(queries, settings(batch_size=8))


@pytest.fixture(scope="module")
def decoder(tokenizer):
    config = qwen2_config(tokenizer, hidden_size=64, intermediate_size=128)
    return Decoder(config)


def settings(**changes) -> RpamSettings:
    return RpamSettings.model_validate({"calibration": "c", **changes})


def test_work_is_linear_in_queries_and_epochs(decoder):
    one = count_work(decoder, batches(8, 20), settings(epochs=1))
    more = count_work(decoder, batches(80, 20), settings(epochs=1))
    longer = count_work(decoder, batches(8, 20), settings(epochs=10))
    assert more.tokens == 10 * one.tokens
    assert more.operations == pytest.approx(10 * one.operations, rel=1e-6)
    assert 4 < longer.operations / one.operations < 10


def test_a_product_is_two_operations_for_each_weight_and_token(decoder):
    """Of two experts: both once, the merged model twice and three times an epoch."""
    work = count_work(decoder, batches(8, 2), settings(epochs=1, granularity="layer"))
    weights = sum(p.numel() for p in decoder.layers.parameters() if p.dim() > 1)
    assert work.operations == pytest.approx(2 * weights * 16 * 7, rel=0.02)


def test_a_third_model_costs_memory_and_work(decoder):
    queries = batches(8, 20)
    for count in (layer_bytes, lambda *args: count_work(*args).operations):
        assert count(decoder, queries, settings(), 3) > count(
            decoder, queries, settings(), 2
        )


def test_an_element_each_costs_more_memory_than_a_low_rank_field(decoder):
    queries = batches(8, 2)
    fine, coarse = (
        layer_bytes(decoder, queries, settings(granularity=granularity))
        for granularity in ("element", "tensor")
    )
    weights = sum(p.numel() for p in decoder.layers[0].parameters())
    assert fine - coarse == pytest.approx(5 * 4 * weights, rel=0.01)


def test_embeddings_may_be_the_peak():
    """Qwen2.5-1.5B's: 0.9 GB each, in float32."""
    peak = merging_bytes([(151936, 1536), (1536,)])
    assert peak == 4 * (3 * 151936 * 1536 + 1536 + 5 * 2**24)


def test_rates_are_measured_quickly():
    start = time.perf_counter()
    rates = measure("cpu", 4096, 4096, 4096, "float32")
    assert time.perf_counter() - start < 10  # one or two on a machine at rest
    assert rates.operations > 1e8
    assert rates.moved > 1e7
    assert Rates(100.0, 50.0).seconds(Work(75.0, 100.0, 1)) == pytest.approx(3.0)


def test_the_disk_that_is_said_is_the_disk_that_is_used(tmp_path, tokenizer):
    save_pair(tmp_path, qwen2_config(tokenizer), tokenizer, torch.bfloat16)
    write_queries(tmp_path / "calibration.jsonl")
    config = merge_config(tmp_path, out_dtype="bfloat16")
    path = tmp_path / "rpam.yml"
    path.write_text(str(config).replace("'", '"'))  # JSON is YAML
    result = CliRunner().invoke(main, ["check", str(path)])
    assert result.exit_code == 0, result.output
    said = {
        what: float(size) * {"KiB": 1024, "MiB": MIB}[unit]
        for what, size, unit in re.findall(
            r"  disk, (.+?)  +([\d.]+) (\wiB)", result.stdout
        )
    }
    succeeded(run(["mergekit-yaml", str(path), str(tmp_path / "out")]))
    out = tmp_path / "out"
    model = (out / "model.safetensors").stat().st_size
    coefficients = (out / COEFFICIENTS).stat().st_size
    assert said["merged model"] == pytest.approx(model, rel=0.1)
    assert said["coefficients"] == pytest.approx(coefficients, rel=0.3)


def test_the_estimate_of_the_quickstart_is_of_its_size():
    """In a minute or so on one core; a busy machine is slower."""
    process = run(["mergekit-rpam", "check", "examples/quickstart/rpam.yml"], cwd=ROOT)
    assert process.returncode == 0, process.stderr
    took = r"about (\d+) (seconds|minutes) at \d+ GFLOP/s in float32, measured here"
    ((number, unit),) = re.findall(took, process.stdout)
    assert 3 < int(number) * {"seconds": 1, "minutes": 60}[unit] < 1200
    (memory,) = re.findall(r"peak memory +about ([\d.]+) MiB", process.stdout)
    assert 20 < float(memory) < 200
