"""Costs read off canned HLO text: loops with their trips, products as convolutions, and what collectives send."""

import pytest

from sparsecbm_jax.planning import compiled_cost

# A layer loop of 3 trips (one known to the compiler, one only from its condition), each with a gather of 4 devices'
# shards, a product fused with what follows, and a reduce-scatter as TPUs fuse one.
LOOP = """HloModule jit_step, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused_product (p0: bf16[8,16], p1: bf16[16,32]) -> bf16[8,32] {
  %p0 = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[16,32]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %product = bf16[8,32]{1,0} convolution(%p0, %p1), dim_labels=bf_io->bf
  ROOT %gone = bf16[8,32]{1,0} negate(%product)
}

%scattered (p: f32[16,32]) -> f32[4,32] {
  %p = f32[16,32]{1,0} parameter(0)
  %all = f32[16,32]{1,0} all-reduce(%p), channel_id=2, replica_groups=[2,4]<=[8], to_apply=%add
  %where = s32[] constant(0)
  ROOT %own = f32[4,32]{1,0} dynamic-slice(%all, %where, %where), dynamic_slice_sizes={4,32}
}

%body (carry: (s32[], f32[4,32], /*index=2*/bf16[4,32])) -> (s32[], f32[4,32], /*index=2*/bf16[4,32]) {
  %carry = (s32[], f32[4,32]{1,0}, /*index=2*/bf16[4,32]{1,0}) parameter(0)
  %shard = bf16[4,32]{1,0} get-tuple-element(%carry), index=2
  %gathered = bf16[16,32]{1,0} all-gather(%shard), channel_id=1, replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}
  %h = bf16[8,16]{1,0} constant({...})
  %y = bf16[8,32]{1,0} fusion(%h, %gathered), kind=kOutput, calls=%fused_product
  %grad = f32[16,32]{1,0} convert(%gathered)
  %own = f32[4,32]{1,0} fusion(%grad), kind=kCustom, calls=%scattered
  %i = s32[] get-tuple-element(%carry), index=0
  ROOT %next = (s32[], f32[4,32]{1,0}, /*index=2*/bf16[4,32]{1,0}) tuple(%i, %own, %shard)
}

%condition (carry: (s32[], f32[4,32], bf16[4,32])) -> pred[] {
  %carry = (s32[], f32[4,32]{1,0}, bf16[4,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %trips = s32[] constant(3)
  ROOT %more = pred[] compare(%i, %trips), direction=LT
}

ENTRY %main (start: (s32[], f32[4,32], bf16[4,32])) -> f32[4,32] {
  %start = (s32[], f32[4,32]{1,0}, bf16[4,32]{1,0}) parameter(0)
  %loop = (s32[], f32[4,32]{1,0}, bf16[4,32]{1,0}) while(%start), condition=%condition, body=%body, KNOWN
  ROOT %out = f32[4,32]{1,0} get-tuple-element(%loop), index=1
}
"""
TRIPS = 3


@pytest.mark.parametrize(
    "known", ['backend_config={"known_trip_count":{"n":"3"},"x":[]}', 'metadata={op_name="(scan"}']
)
def test_a_loop_counts_as_often_as_it_runs(known: str) -> None:
    cost = compiled_cost.cost(LOOP.replace("KNOWN", known))
    assert cost.flops == TRIPS * 2 * 8 * 16 * 32
    # A gather brings the three other shards; a reduce-scatter sends three quarters of what is summed.
    assert dict(cost.wire_bytes) == {
        "all-gather": TRIPS * 3 * 4 * 32 * 2,
        "reduce-scatter": TRIPS * 16 * 32 * 4 * 3 / 4,
    }
    assert dict(cost.num_collectives) == {"all-gather": TRIPS, "reduce-scatter": TRIPS}
    assert dict(cost.gathers) == {16 * 32 * 2: TRIPS}
    assert cost.unknown_loops == 0


def test_a_loop_that_data_decide_is_told() -> None:
    text = LOOP.replace("KNOWN", "").replace("%trips = s32[] constant(3)", "%trips = s32[] add(%i, %i)")
    cost = compiled_cost.cost(text)
    assert (cost.unknown_loops, cost.flops) == (1, 2 * 8 * 16 * 32)


def entry(*lines: str, more: str = "") -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return f"HloModule m, num_partitions=8\n\n{more}\nENTRY %main (x: f32[64]) -> f32[64] {{\n{body}\n}}\n"


X = "%x = f32[64]{0} parameter(0)"


@pytest.mark.parametrize(
    ("line", "kind", "sent"),
    [
        ("ROOT %y = f32[64]{0} all-reduce(%x), replica_groups={}, to_apply=%add", "all-reduce", 2 * 256 * 7 / 8),
        (
            "ROOT %y = f32[512]{0} all-gather(%x), replica_groups=[1,8]<=[2,4]T(1,0), dimensions={0}",
            "all-gather",
            7 * 256,
        ),
        ("ROOT %y = f32[16]{0} reduce-scatter(%x), replica_groups=[2,4]<=[8], to_apply=%add", "reduce-scatter", 192),
        ("ROOT %y = f32[64]{0} all-reduce(%x), replica_groups=mesh['a'=4,'b'=2] {'a'}, to_apply=%f", "all-reduce", 384),
        ("ROOT %y = f32[64]{0} all-to-all(%x), replica_groups={{0,1},{2,3},{4,5},{6,7}}", "all-to-all", 128),
        ("ROOT %y = f32[64]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}", "collective-permute", 256),
        ("%y = (f32[64]{0}, f32[128]{0}) all-gather-start(%x), replica_groups=[4,2]<=[8]", "all-gather", 256),
    ],
)
def test_what_a_collective_sends(line: str, kind: str, sent: float) -> None:
    assert dict(compiled_cost.cost(entry(X, line)).wire_bytes) == {kind: sent}


def test_what_goes_on_beside_fusions_is_sent_once() -> None:
    gather = 'all-gather(%x), channel_id=7, replica_groups=[1,8]<=[8], frontend_attributes={chain_id="0"}'
    begun = '(f32[64], f32[512]) custom-call(%g), custom_call_target="AsyncCollectiveStart"'
    parts = {"start": begun, "beside": "f32[512] add(%g, %g)", "done": "f32[512] copy(%g)"}
    more = "\n".join(
        f"%{name} (x: f32[64]) -> f32[512] {{\n  {X}\n  %g = f32[512]{{0}} {gather}\n  ROOT %r = {root}\n}}"
        for name, root in parts.items()
    )
    fused = [f"%{name}.1 = f32[512]{{0}} fusion(%x), kind=kCustom, calls=%{name}" for name in parts]
    another = f"%o = f32[512]{{0}} {gather}".replace("channel_id=7", "channel_id=8")
    cost = compiled_cost.cost(entry(X, *fused, another, more=more))
    assert (cost.num_collectives["all-gather"], cost.wire_bytes["all-gather"]) == (2, 2 * 7 * 256)
    # Without the start there is nothing that says which of them it is.
    cost = compiled_cost.cost(entry(X, *fused[1:], more=more.replace("AsyncCollectiveStart", "other")))
    assert cost.num_collectives["all-gather"] == 2


def test_a_group_of_one_sends_nothing() -> None:
    assert not compiled_cost.cost(entry(X, "ROOT %y = f32[64]{0} all-reduce(%x), replica_groups=[8,1]<=[8]")).wire_bytes


def test_the_dearest_branch_counts() -> None:
    branch = "%{0} (x: f32[64]) -> f32[64] {{\n  %x = f32[64]{{0}} parameter(0)\n  ROOT %y = f32[64]{{0}} {1}\n}}\n"
    more = branch.format("cheap", "copy(%x)") + branch.format("dear", "all-reduce(%x), replica_groups={}")
    line = "ROOT %z = f32[64]{0} conditional(%p, %x, %x), branch_computations={%cheap, %dear}"
    assert compiled_cost.cost(entry(X, "%p = s32[] constant(1)", line, more=more)).num_collectives["all-reduce"] == 1


@pytest.mark.parametrize(
    ("left", "right", "out", "window", "labels", "products"),
    [
        # Plain: 8 x 16 times 16 x 32.
        ("8,16", "16,32", "8,32", "", "bf_io->bf", 8 * 16 * 32),
        # Six products of 8 x 16 and 16 x 32, the batch as a window in which each output meets one element.
        (
            "6,8,16",
            "6,16,32",
            "6,8,32",
            "window={size=6 stride=5 pad=0_0 lhs_dilate=6}",
            "0bf_0io->0bf",
            6 * 8 * 16 * 32,
        ),
        # Correlation over 10 places with 3 taps, padded: the first and last output miss one.
        ("1,10,1", "3,1,1", "1,10,1", "window={size=3 pad=1_1}", "b0f_0io->b0f", 28),
    ],
    ids=["product", "batched product", "padded"],
)
def test_convolutions_count_what_they_multiply(
    left: str, right: str, out: str, window: str, labels: str, products: int
) -> None:
    line = f"ROOT %y = f32[{out}] convolution(%a, %b), {window}, dim_labels={labels}"
    text = entry(f"%a = f32[{left}] parameter(0)", f"%b = f32[{right}] parameter(1)", line)
    assert compiled_cost.cost(text).flops == 2 * products


def test_memory_counts_slices_not_what_they_are_cut_from() -> None:
    lines = (
        "%all = f32[100,64]{1,0} parameter(0)",
        "%i = s32[] constant(0)",
        "%one = f32[1,64]{1,0} dynamic-slice(%all, %i, %i), dynamic_slice_sizes={1,64}",
        "ROOT %new = f32[100,64]{1,0} dynamic-update-slice(%all, %one, %i, %i)",
    )
    assert compiled_cost.cost(entry(*lines)).memory_bytes == pytest.approx(4 * 64 * 4, rel=0.1)


def test_text_without_an_entry_is_refused() -> None:
    with pytest.raises(ValueError, match="no ENTRY computation"):
        compiled_cost.cost("HloModule m\n")
