"""The pre-pass on tiny pairs: it lowers the gap, and what it solved is what is used."""

from __future__ import annotations

import pytest
import torch

from helpers.models import qwen2_config, save_pair, write_calibration
from helpers.prepass import GRANULARITIES, build
from rpam_mergekit.errors import RpamError
from rpam_mergekit.formats.coefficients import CoefficientsFile, write_coefficients
from rpam_mergekit.replay import recording
from rpam_mergekit.replay.activations import TensorStore


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_granularity_lowers_the_gap_of_every_layer(pair, granularity):
    solution = build(pair, granularity=granularity, epochs=20).run()
    assert [report.layer for report in solution.layers] == [0, 1, 2]
    for report in solution.layers:
        assert report.gap_after < report.gap_before


@pytest.mark.parametrize("granularity", ["tensor", "module", "layer"])
def test_lbfgs_is_no_worse_than_adam(pair, granularity):
    # The first layer's problem is the same for both; later ones start elsewhere.
    adam = build(pair, granularity=granularity, epochs=60, learning_rate=0.05).run()
    lbfgs = build(pair, granularity=granularity, epochs=60, solver="lbfgs").run()
    assert lbfgs.layers[0].gap_after <= adam.layers[0].gap_after * 1.001


def test_the_same_inputs_give_the_same_coefficients_bit_for_bit(pair):
    first, second = (build(pair).run().entries for _ in range(2))
    for name, parts in first.items():
        for part, value in parts.items():
            assert torch.equal(value, second[name][part])


def test_the_global_generator_is_left_alone(pair):
    prepass = build(pair)
    before = torch.get_rng_state()
    prepass.run()
    assert torch.equal(before, torch.get_rng_state())


def test_the_seed_matters(pair):
    first, second = (build(pair, seed=seed).run().entries for seed in (0, 1))
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(first[name]["left"], second[name]["left"])


def test_every_tensor_of_the_layout_gets_coefficients(pair):
    prepass = build(pair)
    entries = prepass.run().entries
    infos = [
        *prepass.experts.layout.outside,
        *(w for layer in prepass.experts.layout.layers for w in layer),
    ]
    assert entries.keys() == {info.name for info in infos}
    assert entries["lm_head.weight"]["scalar"] == 0.0


def test_a_fixed_weight_stays_and_the_rest_is_optimised_around_it(pair):
    name = "model.layers.1.self_attn.q_proj.weight"
    fixed = build(pair, fixed={name: 0.875, "lm_head.weight": 0.25}).run().entries
    free = build(pair).run().entries
    assert fixed[name] == {"scalar": torch.tensor(0.875)}
    assert fixed["lm_head.weight"] == {"scalar": torch.tensor(0.25)}
    # Layer 0 comes before it and is solved as without; later ones see its effect.
    for layer, same in ((0, True), (1, False), (2, False)):
        other = f"model.layers.{layer}.mlp.up_proj.weight"
        assert torch.equal(fixed[other]["row"], free[other]["row"]) is same


def test_everything_fixed_leaves_nothing_to_solve(pair):
    prepass = build(pair)
    names = [w.name for layer in prepass.experts.layout.layers for w in layer]
    solution = build(pair, fixed=dict.fromkeys(names, 0.0)).run()
    assert all(report.mean_coefficient == 0 for report in solution.layers)


def test_a_fixed_share_of_1_of_every_weight_is_the_other_model(pair):
    prepass = build(pair)
    layers = [w.name for layer in prepass.experts.layout.layers for w in layer]
    prepass = build(pair, fixed=dict.fromkeys(layers, 1.0), outside_weight=1.0)
    prepass.run()
    for stream in prepass.streams:
        torch.testing.assert_close(
            stream.merged, stream.experts[1], rtol=1e-4, atol=1e-4
        )


def test_patterns_may_be_the_other_way_round(pair):
    """With the base standing for `short`, the targets swap."""
    plain, swapped = build(pair), build(pair, patterns=("short", "long"))
    plain.run()
    swapped.run()
    for one, two in zip(plain.streams, swapped.streams, strict=True):
        assert torch.equal(one.patterns, 1 - two.patterns)
        assert torch.equal(one.positive, *two.negatives)


@pytest.mark.parametrize(
    "parameters", [{"preset": "paper"}, {"contrastive_weight": 1.0}]
)
def test_the_contrastive_term_changes_the_solution(pair, parameters):
    name = "model.layers.0.mlp.up_proj.weight"
    with_it = build(pair, granularity="row", **parameters).run().entries[name]
    without = {**parameters, "contrastive_weight": 0.0}
    assert not torch.equal(
        with_it["row"],
        build(pair, granularity="row", **without).run().entries[name]["row"],
    )


def test_regularization_keeps_coefficients_near_the_initial_weight(pair):
    free = build(pair, granularity="tensor", epochs=20).run()
    held = build(pair, granularity="tensor", epochs=20, regularization=100.0).run()

    def departure(solution) -> float:
        return sum(abs(r.mean_coefficient - 0.5) for r in solution.layers)

    assert departure(held) < departure(free) / 2


def test_batches_and_their_padding_change_the_merged_stream_little(pair):
    """With nothing to solve, hidden states are those of queries run one by one."""
    prepass = build(pair)
    layers = dict.fromkeys(
        (w.name for la in prepass.experts.layout.layers for w in la), 0.5
    )
    single = build(pair, fixed=layers, batch_size=1)
    batched = build(pair, fixed=layers, batch_size=8)
    single.run()
    batched.run()
    rows = [
        hidden[row][mask[row]]
        for stream in batched.streams
        for hidden, mask in [(stream.merged, stream.is_token)]
        for row in range(len(hidden))
    ]
    for exclusive, row in zip(single.streams, rows, strict=True):
        torch.testing.assert_close(exclusive.merged[0], row, rtol=1e-4, atol=1e-5)


def test_an_objective_that_explodes_names_layer_and_knob(pair):
    with pytest.raises(RpamError, match=r"layer 0: .*Lower parameters\.learning_rate"):
        build(pair, learning_rate=1e30, granularity="element").run()


def test_a_tied_head_is_left_to_the_embedding(tmp_path, tokenizer):
    config = qwen2_config(tokenizer, tie_word_embeddings=True)
    save_pair(tmp_path, config, tokenizer)
    write_calibration(tmp_path / "calibration.jsonl")
    assert "lm_head.weight" not in build(tmp_path).run().entries


def coefficients_of(solution, index):
    return [
        value
        for name, parts in solution.entries.items()
        if f".layers.{index}." in name
        for value in parts.values()
    ]


def test_only_the_most_divergent_layers_are_optimised(pair):
    whole = build(pair, granularity="element").run()
    part = build(pair, granularity="element", layers=0.34).run()
    divergences = [report.divergence for report in whole.layers]
    assert all(divergence > 0 for divergence in divergences)
    # Both experts run on their own streams: what is optimised does not change them.
    assert [report.divergence for report in part.layers] == divergences
    chosen = divergences.index(max(divergences))
    for report in part.layers:
        assert report.optimised == (report.layer == chosen)
        kept = all((v == 0.5).all() for v in coefficients_of(part, report.layer))
        assert kept != report.optimised
    assert all(report.optimised for report in whole.layers)
    assert not any((v == 0.5).all() for v in coefficients_of(whole, chosen))


def test_the_first_optimised_layer_is_solved_as_ever(pair):
    """The pass that measures divergence leaves the streams as they were."""
    whole = build(pair, granularity="layer", solver="lbfgs").run()
    part = build(pair, granularity="layer", solver="lbfgs", layers=0.99).run()
    assert [r.optimised for r in part.layers] == [True, True, True]
    assert part.layers == whole.layers
    two = build(pair, granularity="layer", solver="lbfgs", layers=0.67).run()
    assert sum(report.optimised for report in two.layers) == 2
    assert two.layers[0].gap_before == whole.layers[0].gap_before


def test_bfloat16_products_solve_much_the_same(pair):
    plain = build(pair, epochs=20)
    exact = plain.run()
    prepass = build(pair, epochs=20, compute_dtype="bfloat16")
    rough = prepass.run()
    assert prepass.streams[0].merged.dtype == torch.float32
    assert not torch.equal(prepass.streams[0].merged, plain.streams[0].merged)
    for one, two in zip(exact.layers, rough.layers, strict=True):
        assert abs(one.gap_after - two.gap_after) < 0.02
        assert two.gap_after < two.gap_before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_a_gpu_solves_what_the_cpu_does(pair, tmp_path, place):
    on_cpu = build(pair).run()
    prepass = build(pair, device="cuda")
    prepass.store = TensorStore(place, "cuda", tmp_path)
    on_gpu = prepass.run()
    for one, two in zip(on_cpu.layers, on_gpu.layers, strict=True):
        assert abs(one.gap_after - two.gap_after) < 1e-3
    for name, parts in on_cpu.entries.items():
        for part, value in parts.items():
            difference = (value - on_gpu.entries[name][part].cpu()).abs().max()
            assert difference < 0.02, name


@pytest.mark.parametrize("quiet", [False, True])
def test_what_is_solved_already_is_not_solved_again(pair, quiet):
    prepass = build(pair)
    whole = prepass.run()
    kept = {index: s for index, s in whole.solved.items() if index != 2}
    again = build(pair)
    again.quiet = quiet
    solution = again.run(dict(kept))
    for index in (0, 1):
        assert solution.solved[index] is kept[index]
    assert solution.layers == whole.layers
    for one, two in zip(again.streams, prepass.streams, strict=True):
        assert torch.equal(one.merged, two.merged)


def test_coefficients_in_half_precision_are_what_the_streams_ran_with(pair, tmp_path):
    """Half the file, and the file's numbers are those of the merged streams."""
    prepass = build(pair, coefficient_dtype="float16")
    solution = prepass.run()
    whole = build(pair).run()
    files = {}
    for name, entries, dtype in (
        ("half", solution.entries, torch.float16),
        ("whole", whole.entries, torch.float32),
    ):
        path = tmp_path / f"{name}.safetensors"
        write_coefficients(path, entries, {}, dtype)
        files[name] = CoefficientsFile(path)
        for tensor, parts in entries.items():
            found = files[name].parts(tensor)
            assert found.keys() == parts.keys()
            for part, value in parts.items():
                assert found[part].dtype == torch.float32
                assert torch.equal(found[part], value)
    sizes = [(tmp_path / f"{n}.safetensors").stat().st_size for n in files]
    assert sizes[0] < 0.65 * sizes[1]
    for half, full in zip(solution.layers, whole.layers, strict=True):
        assert half.gap_after == pytest.approx(full.gap_after, rel=0.02)
        assert half.gap_after != full.gap_after


def test_embeddings_are_merged_by_rows_with_the_same_bytes(pair, monkeypatch):
    prepass = build(pair, outside_weight=0.3)
    entries = prepass.outside()
    whole = recording.merged_outside(prepass.experts, entries, embeddings=False)
    monkeypatch.setattr(recording, "BLOCK", 100)
    by_rows = recording.merged_outside(prepass.experts, entries, embeddings=False)
    assert whole.keys() == by_rows.keys()
    assert any(value.dim() == 2 and value.numel() > 200 for value in whole.values())
    for name, value in whole.items():
        assert torch.equal(value, by_rows[name]), name
