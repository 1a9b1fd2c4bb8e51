"""Bytes and FLOPs read out of the text of a program compiled for a GPU, counted by hand."""

import pytest

from benchmarks.kernels import Module, parse_instruction, size

PROGRAM = """HloModule jit_step, is_scheduled=true

FileNames
1 "/home/someone/m2mkd_jax/models/nac/attention.py"
2 "/usr/lib/python3/site-packages/flax/nnx/nn/linear.py"

FunctionNames
1 "attend"

FileLocations
1 {file_name_id=1 function_name_id=1 line=52 end_line=52 column=4 end_column=9}
2 {file_name_id=2 function_name_id=1 line=10 end_line=10 column=4 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=1}

%fused_take (p.0: f32[8,64], p.1: s32[]) -> bf16[64] {
  %p.0 = f32[8,64]{1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,64]{1,0} dynamic-slice(%p.0, %p.1, %zero), dynamic_slice_sizes={1,64}
  %flat = f32[64]{0} bitcast(%row)
  ROOT %half = bf16[64]{0} convert(%flat), metadata={op_name="convert" stack_frame_id=2}
}

%fused_put (p.2: bf16[8,64], p.3: bf16[64], p.4: s32[]) -> bf16[8,64] {
  %p.2 = bf16[8,64]{1,0} parameter(0)
  %p.3 = bf16[64]{0} parameter(1)
  %p.4 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  %as_row = bf16[1,64]{1,0} bitcast(%p.3)
  ROOT %put = bf16[8,64]{1,0} dynamic-update-slice(%p.2, %as_row, %p.4, %zero.1)
}

%fused_two (p.5: f32[100]) -> (f32[100], f32[]) {
  %p.5 = f32[100]{0} parameter(0)
  %double = f32[100]{0} add(%p.5, %p.5)
  %none = f32[] constant(0)
  %sum = f32[] reduce(%p.5, %none), dimensions={0}, to_apply=%add
  ROOT %both = (f32[100]{0}, f32[]) tuple(%double, %sum)
}

%body (state: (s32[], bf16[8,64], f32[8,64])) -> (s32[], bf16[8,64], f32[8,64]) {
  %state = (s32[], bf16[8,64]{1,0}, /*index=2*/f32[8,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %stack = bf16[8,64]{1,0} get-tuple-element(%state), index=1
  %rows = f32[8,64]{1,0} get-tuple-element(%state), index=2
  %taken = bf16[64]{0} fusion(%rows, %i), kind=kLoop, calls=%fused_take, metadata={op_name="take"}
  %filled = bf16[8,64]{1,0} fusion(%stack, %taken, %i), kind=kLoop, calls=%fused_put
  ROOT %next = (s32[], bf16[8,64]{1,0}, f32[8,64]{1,0}) tuple(%i, %filled, %rows)
}

%less (state.1: (s32[], bf16[8,64], f32[8,64])) -> pred[] {
  %state.1 = (s32[], bf16[8,64]{1,0}, f32[8,64]{1,0}) parameter(0)
  ROOT %go = pred[] constant(true)
}

ENTRY %main (a: bf16[32,16], b: bf16[16,24], c: f32[100], l: (s32[], bf16[8,64], f32[8,64])) -> f32[] {
  %a = bf16[32,16]{1,0} parameter(0)
  %b = bf16[16,24]{1,0} parameter(1)
  %c = f32[100]{0} parameter(2)
  %l = (s32[], bf16[8,64]{1,0}, f32[8,64]{1,0}) parameter(3)
  %product = (bf16[32,24]{1,0}, s8[4096]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %result = bf16[32,24]{1,0} get-tuple-element(%product), index=0
  %view = bf16[768]{0} bitcast(%result)
  %pair = (f32[100]{0}, f32[]) fusion(%c), kind=kInput, calls=%fused_two
  %loop = (s32[], bf16[8,64]{1,0}, f32[8,64]{1,0}) while(%l), condition=%less, body=%body, backend_config={"known_trip_count":{"n":"8"}}
  %q = bf16[2,10,3,16]{3,2,1,0} bitcast(%a)
  %k = bf16[2,14,3,16]{3,2,1,0} bitcast(%a)
  %attention = (bf16[2,3,10,16]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmax"
  %x = bf16[4,8,8,6]{3,2,1,0} bitcast(%a)
  %w = bf16[6,3,3,1]{3,2,1,0} bitcast(%b)
  %depthwise = (bf16[4,8,8,6]{3,2,1,0}, u8[0]{0}) custom-call(%x, %w), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, feature_group_count=6, custom_call_target="__cudnn$convForward"
  ROOT %out = f32[] get-tuple-element(%pair), index=1
}
"""  # noqa: E501 (lines as XLA writes them)

EXPECTED = {
    # name: kind, runs, read, written, FLOPs in all runs
    "product": ("matrix product", 1, 2 * (32 * 16 + 16 * 24), 2 * 32 * 24, 2 * 32 * 24 * 16),
    "pair": ("fusion, reduction", 1, 400, 404, 0),
    "taken": ("fusion, elementwise", 8, 8 * (64 * 4 + 4), 8 * 64 * 2, 0),
    "filled": ("fusion, into a stack", 8, 8 * (64 * 2 + 4), 8 * 64 * 2, 0),
    "attention": (
        "attention",
        1,
        2 * 2 * 3 * 16 * (10 + 14 + 14),
        2 * 2 * 3 * 16 * 10,
        2 * (2 * 10 * 14 * 16 * 2 * 3),
    ),
    "depthwise": ("convolution", 1, 2 * (1536 + 54), 2 * 1536, 2 * 1536 * 9),
}


def test_every_kernel_is_counted_by_what_it_moves():
    found = {
        k.name: (k.kind, k.times, k.read, k.written, k.flops) for k in Module(PROGRAM).kernels()
    }
    assert found == EXPECTED


def test_kernels_of_our_own_count_their_products():
    text = (
        "ENTRY %main (q: bf16[2,64,96], k: bf16[2,128,96]) -> bf16[2,64,96] {\n"
        "  %q = bf16[2,64,96]{2,1,0} parameter(0)\n"
        "  %k = bf16[2,128,96]{2,1,0} parameter(1)\n"
        "  %own = (bf16[2,64,96]{2,1,0}, f32[2,3,64]{2,1,0}) custom-call(%q, %k, %k), "
        'custom_call_target="__gpu$xla.gpu.triton", '
        'backend_config={ir = "a(b", name = "attention_forward", num_warps = 4 : i32}\n'
        "  ROOT %out = bf16[2,64,96]{2,1,0} get-tuple-element(%own), index=0\n"
        "}\n"
    )
    (kernel,) = Module(text).kernels()
    assert kernel.kind == "kernel of models/nac/fused"
    assert kernel.read == 2 * 2 * 96 * (64 + 128 + 128)
    assert kernel.written == 2 * 2 * 64 * 96 + 4 * 2 * 3 * 64
    assert kernel.flops == 2 * (2 * 2 * 64 * 128 * 96)


@pytest.mark.parametrize("tuple_of_parts", [True, False])
def test_scratch_memory_of_a_library_inside_a_fusion_does_not_count(tuple_of_parts):
    call = "  %call = (bf16[32,24]{1,0}, s8[4096]{0}) custom-call(%x, %flat), "
    parts = (
        "  %y = bf16[32,24]{1,0} get-tuple-element(%call), index=0\n"
        "  %scratch = s8[4096]{0} get-tuple-element(%call), index=1\n"
        "  ROOT %both = (bf16[32,24]{1,0}, s8[4096]{0}) tuple(%y, %scratch)\n"
    )
    if not tuple_of_parts:
        call, parts = call.replace("  %call", "  ROOT %call"), ""
    text = (
        "%product_of_a_slice (w: bf16[8,16,24], x: bf16[32,16]) -> (bf16[32,24], s8[4096]) {\n"
        "  %w = bf16[8,16,24]{2,1,0} parameter(0)\n"
        "  %x = bf16[32,16]{1,0} parameter(1)\n"
        "  %one = bf16[1,16,24]{2,1,0} slice(%w), slice={[2:3], [0:16], [0:24]}\n"
        "  %flat = bf16[16,24]{1,0} bitcast(%one)\n"
        f'{call}custom_call_target="__cublas$lt$matmul"\n{parts}'
        "}\n\n"
        "ENTRY %main (w.1: bf16[8,16,24], x.1: bf16[32,16]) -> bf16[32,24] {\n"
        "  %w.1 = bf16[8,16,24]{2,1,0} parameter(0)\n"
        "  %x.1 = bf16[32,16]{1,0} parameter(1)\n"
        "  %fused = (bf16[32,24]{1,0}, s8[4096]{0}) fusion(%w.1, %x.1), kind=kCustom, "
        "calls=%product_of_a_slice\n"
        "  ROOT %out = bf16[32,24]{1,0} get-tuple-element(%fused), index=0\n"
        "}\n"
    )
    (kernel,) = Module(text).kernels()
    assert kernel.kind == "matrix product"
    assert (kernel.read, kernel.written) == (2 * (16 * 24 + 32 * 16), 2 * 32 * 24)


def test_a_kernel_knows_its_line_of_the_package():
    kernels = {kernel.name: kernel for kernel in Module(PROGRAM).kernels()}
    assert kernels["taken"].sources == ("models/nac/attention.py:52",)
    assert kernels["taken"].op_name == "take"
    assert kernels["pair"].sources == ()


@pytest.mark.parametrize(
    ("line", "read", "written"),
    [
        ("dynamic-slice(%big, %i), dynamic_slice_sizes={1,64}", 256 + 4, 256),
        ("slice(%big), slice={[0:1], [0:64]}", 256, 256),
        ("copy(%row)", 256, 256),
    ],
)
def test_unfused_instructions(line, read, written):
    text = (
        "ENTRY %main (big: f32[8,64], i: s32[], row: f32[1,64]) -> f32[1,64] {\n"
        "  %big = f32[8,64]{1,0} parameter(0)\n"
        "  %i = s32[] parameter(1)\n"
        "  %row = f32[1,64]{1,0} parameter(2)\n"
        f"  ROOT %out = f32[1,64]{{1,0}} {line}\n"
        "}\n"
    )
    (kernel,) = Module(text).kernels()
    assert (kernel.read, kernel.written) == (read, written)


@pytest.mark.parametrize("named", ["branch_computations={%whole, %half}", "other"])
def test_of_a_conditional_the_branch_counts_that_moves_least(named):
    if named == "other":
        named = "true_computation=%half, false_computation=%whole"
    text = (
        "%whole (p: f32[64]) -> f32[64] {\n"
        "  %p = f32[64]{0} parameter(0)\n"
        "  ROOT %all = f32[64]{0} copy(%p)\n"
        "}\n\n"
        "%half (q: f32[64]) -> f32[64] {\n"
        "  %q = f32[64]{0} parameter(0)\n"
        "  ROOT %few = f32[32]{0} slice(%q), slice={[0:32]}\n"
        "}\n\n"
        "ENTRY %main (i: s32[], x: f32[64]) -> f32[64] {\n"
        "  %i = s32[] parameter(0)\n"
        "  %x = f32[64]{0} parameter(1)\n"
        f"  ROOT %out = f32[64]{{0}} conditional(%i, %x, %x), {named}\n"
        "}\n"
    )
    (kernel,) = Module(text).kernels()
    assert (kernel.name, kernel.bytes) == ("few", 2 * 32 * 4)


def test_types_and_operands_with_types():
    assert size("(bf16[3,4]{1,0}, s8[5]{0}, pred[], token[])") == 24 + 5 + 1
    line = "  %y = f32[2]{0} add(f32[2]{0} %a.1, f32[2]{0} %b), metadata={}"
    assert parse_instruction(line).operands == ["a.1", "b"]
