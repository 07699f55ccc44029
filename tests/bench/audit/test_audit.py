"""The compile audit: what counts as worse, and that what ships compiles without spills to 16-byte accesses."""

from dataclasses import replace
from fnmatch import fnmatchcase

import pytest
import torch
from transformers import BertConfig, BertModel

from bench.audit import run as audit
from bench.audit import sass
from bench.core import floors
from bench.core.floors import floor_microseconds, stated_bytes
from fastbert.kernels.core.configs import ARCHITECTURES
from fastbert.testing.specs import SPECS

pytestmark = pytest.mark.no_launch

GOOD = {
    "key": "sm_90 forward x",
    "op": "x",
    "architecture": "sm_90",
    "spills": 0,
    "local_bytes": 0,
    "shared_bytes": 1000,
    "shared_limit": 232448,
    "access_bytes": {"x": 16, "y": 16},
    "wide_share": 1.0,
    "matrix": {"wgmma": 4},
    "hot_instructions": 100,
}


def test_the_same_is_not_worse():
    assert audit.compare([GOOD], [GOOD]) == []
    assert audit.compare([GOOD], [GOOD | {"hot_instructions": 110, "matrix": {"wgmma": 8}}]) == []


@pytest.mark.parametrize(
    "change",
    [
        {"spills": 1},
        {"local_bytes": 8},
        {"shared_bytes": 232449},
        {"access_bytes": {"x": 8, "y": 16}},
        {"wide_share": 0.9},
        {"matrix": {}},
        {"matrix": {"wgmma": 4, "tf32": 1}},
        {"hot_instructions": 111},
        {"unwritten": ["UIADD3 UR46, UP0, UR46, 0x40, URZ at 0x12a0 reads UR46"]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_regression_is_found(change):
    (problem,) = audit.compare([GOOD], [GOOD | change])
    assert problem.startswith(GOOD["key"])


def test_a_case_that_appears_or_goes_is_found():
    assert "not in the baseline" in audit.compare([], [GOOD])[0]
    assert "no longer compiled" in audit.compare([GOOD], [])[0]


def test_ptx_from_a_checkout_that_is_gone_is_read():
    """Triton's cache may hold such; what its own library loads has no name there."""
    ptx = '.file 1 "/gone/triton/language/standard.py"\n.loc 1 3 0\nld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1];'
    assert sass.access_widths(ptx) == {("ld", "?"): [16]}


# An access under each triton: up to 3.7 and in 3.9 inline assembly has no places of its own.
PTX = """
	.loc	1 2 9                           // x.py:2:9
	mov.b32 	%r5, 0;
	.loc	1 3 17                          // x.py:3:17
	// begin inline asm
{places}	mov.u32 %r1, %r5;
	@%p1 ld.global.v4.b32 {{ %r1, %r2, %r3, %r4 }}, [ %rd1 + 0 ];
	// end inline asm
	// begin inline asm
{places}	mov.u32 %r1, %r5;
	@%p1 ld.global.v2.b32 {{ %r1, %r2 }}, [ %rd1 + 0 ];
	// end inline asm
	.loc	1 4 9                           // x.py:4:9
	// begin inline asm
	@%p1 st.global.v4.b32 [ %rd6 + 0 ], {{ %r22, %r23, %r24, %r25 }};
	// end inline asm
	.loc	1 6 9                           // x.py:6:9
	ld.global.b16 	%rs1, [%rd2];
	.file	1 "{file}"
"""
SOURCE = """def kernel(x_ptr, bias_ptr, y_ptr, z_ptr):
    offsets = 0
    x = tl.load(x_ptr + offsets, mask)
    tl.store(y_ptr + offsets, x)

    z = tl.load(bias_ptr)
"""


@pytest.mark.parametrize("places", ["", "\t.loc\t1 3 17\n", "\t.loc\t1 3 17\n\tmov.u32 %r9, 0;\n\t.loc\t1 6 17\n"])
def test_accesses_in_the_ptx_of_each_triton(tmp_path, places):
    """triton 3.8 writes a place a line of the assembly, counted on from the access's."""
    file = tmp_path / "not_one_of_ours.py"
    file.write_text(SOURCE)
    found = sass.access_widths(PTX.format(places=places, file=file))
    assert found == {("ld", "x"): [16, 8], ("st", "y"): [16], ("ld", "bias"): [2]}


def test_floor_is_stated_bytes_over_the_copy_bandwidth():
    assert stated_bytes("dropout_add_layernorm", "forward", 4096, 768, 2) == 4 * 4096 * 768 * 2
    assert stated_bytes("bias_gelu", "backward", 4096, 768, 2) == 3 * 4096 * 3072 * 2
    assert floor_microseconds(4.3e12) == pytest.approx(1e6)


def test_parameters_are_those_of_the_models():
    for hidden, layers in floors.LAYERS.items():
        config = BertConfig(
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            intermediate_size=4 * hidden,
        )
        with torch.device("meta"):
            model = BertModel(config)
        assert floors.parameters(hidden) == sum(p.numel() for p in model.parameters())


def test_adamw_moves_16_bytes_at_a_time_and_nothing_twice():
    records = [r for r in audit.read() if r["op"] == "adamw"]
    assert {r["wide_share"] for r in records} == {1.0} and not any(r["spills"] or r["local_bytes"] for r in records)
    (plain,) = {r["bytes_per_element"] for r in records if "adamw fp32 1 plain" in r["key"]}
    assert plain == floors.adamw_bytes()


def test_the_baseline_covers_every_op_and_architecture():
    records = audit.read()
    assert {(r["op"], r["architecture"]) for r in records} == {(op, arch) for op in SPECS for arch in ARCHITECTURES}
    assert all(record["shared_bytes"] <= record["shared_limit"] for record in records)


def test_nothing_spills_but_what_is_named():
    """At no width, on no architecture; and a name that no longer spills is taken off the list."""
    spilling = [r["key"] for r in audit.read() if r["spills"] or r["local_bytes"]]
    assert not [key for key in spilling if not audit.may_spill(key)]
    assert all(any(fnmatchcase(key, pattern) for key in spilling) for pattern in audit.ACCEPTED_SPILLS)


def test_a_spill_is_a_problem_even_where_the_baseline_has_it():
    spilling = GOOD | {"spills": 2}
    (problem,) = audit.compare([spilling], [spilling])
    assert "spill" in problem
    named = spilling | {"key": "sm_100 backward gelu_layernorm mixed 8192 gelu"}
    assert audit.compare([named], [named]) == []
    assert audit.compare([named], [named | {"spills": 3}])


MATRIX = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05"}


def test_attention_as_it_ships():
    """At BERT's head sizes, on every architecture: its own matrix instructions, no spills, 16-byte tiles, and in the
    forward two programs a multiprocessor."""
    records = [r for r in audit.read() if r["op"] == "attention"]
    assert not [r["key"] for r in records if r["spills"] or r["local_bytes"]]
    records = [r for r in records if r["key"].split()[4] in ("64", "128")]
    assert len({r["key"] for r in records}) == len(records) > 150
    for record in records:
        key, half = record["key"], record["key"].split()[3] in ("bf16", "fp16")
        assert record["wide_share"] == 1.0, key
        assert record["programs_per_multiprocessor"] >= 2 or " forward " not in key, key
        if half and "backward-short" not in key:  # of which a tile of 32 queries is less than a warp group takes
            assert set(record["matrix"]) == {MATRIX[record["architecture"]]}, key


def test_linear_cross_entropy_as_it_ships():
    """No spills and 16 bytes at a time at 30522 and 28996 columns, which no vector divides."""
    records = [r for r in audit.read() if r["op"] == "linear_cross_entropy"]
    assert not [r["key"] for r in records if r["spills"] or r["local_bytes"]]
    rows = [r for r in records if r["kernel"] == "linear_cross_entropy_fwd_kernel"]
    assert len(rows) > 20 and all(r["wide_share"] == 1.0 for r in rows)
    # Fewer instructions than an H200 can issue while it copies: a read and a write an element.
    assert all(r["issue_tb_per_second"] > 4.3 for r in rows)


def test_short_is_a_part_of_the_whole():
    records = audit.selected(audit.read(), list(SPECS), list(ARCHITECTURES), only_short=True)
    assert {(r["op"], r["architecture"]) for r in records} == {(op, arch) for op in SPECS for arch in ARCHITECTURES}
    assert len(records) == 3 * (6 * 1 + 4 * 2 + 2 * 3 + 7 + 9)  # ops of one record, of two, of three; embeddings, attention


def test_releases_of_triton_compile_alike():
    """What BERT-base runs in bf16: no spills, and no hot loop that is long under one release only."""
    assert audit.differences({triton: audit.read(triton) for triton in audit.RELEASES}) == []


SHORT = GOOD | {"key": "sm_90 forward bias_gelu bf16 3072 gelu", "op": "bias_gelu"}


@pytest.mark.parametrize(
    "other, word",
    [
        ([SHORT | {"hot_instructions": 116}], "116 under 3.8"),
        ([SHORT | {"spills": 2}], "spills under triton 3.8"),
        ([], "100 under 3.6"),
    ],
    ids=["longer", "spills", "left out"],
)
def test_what_differs_between_releases_is_found(other, word):
    assert audit.differences({"3.6": [SHORT], "3.8": [SHORT | {"hot_instructions": 114}]}) == []
    (problem,) = audit.differences({"3.6": [SHORT], "3.8": other})
    assert problem.startswith(SHORT["key"]) and word in problem


def test_what_ships_compiles_to_the_baseline(monkeypatch):
    """One op's 16-bit kernels at BERT-base's width on Hopper, compiled here and now."""
    spec = SPECS["bias_gelu"]
    monkeypatch.setitem(SPECS, "bias_gelu", replace(spec, variants=lambda: iter([spec.variant("bf16", 3072)])))
    with audit.compiling_environment():
        records = audit.run(["bias_gelu"], ["sm_90"], workers=1)
    assert {r["kernel"] for r in records} == {"bias_gelu_fwd_kernel", "bias_gelu_bwd_kernel"}
    for record in records:
        assert not record["spills"] and record["wide_share"] == 1.0 and record["registers"] <= 128, record
