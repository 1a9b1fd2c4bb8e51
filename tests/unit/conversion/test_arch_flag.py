"""What --arch may say, and what is asked for where it is silent."""

import json

import pytest
import yaml

from m2mkd_jax.conversion.arch_flag import read_arch
from m2mkd_jax.conversion.from_torch import convert_from_torch
from m2mkd_jax.errors import UserError
from tests.published_files import ARCH
from tests.support import FIXTURES, NAC_SPEC, STUDENT_SPEC

VIT = FIXTURES / "a_vit_large/finished_checkpoint.pth"
NAC = FIXTURES / "e_nac/checkpoint_best.pt"


def refusal(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_variants():
    large = read_arch("vit_large_patch16_224:6,6,6,6", "vit", 24)
    assert large == {
        "kind": "vit",
        "image_size": 224,
        "patch": 16,
        "width": 1024,
        "heads": 16,
        "qkv_bias": True,
        "eps": 1e-6,
        "depths": [6, 6, 6, 6],
    }
    huge = read_arch("vit_huge_patch14_392", "vit", 32)
    assert (huge["image_size"], huge["qkv_bias"], huge["eps"]) == (392, False, 1e-5)
    assert "depths" not in huge
    base = read_arch("vmoe_base:3,3,3,3", "vmoe", 12)
    sizes = {"kind": "vmoe", "width": 768, "heads": 12, "depths": [3, 3, 3, 3]}
    assert {name: base[name] for name in sizes} == sizes
    # Unlike the dense huge variant, the V-MoE one has biases.
    assert read_arch("vmoe_huge", "vmoe", 32)["qkv_bias"]
    misspelt = refusal(read_arch, "vit_larg_patch16_224", "vit", 1)
    assert 'did you mean "vit_large_patch16_224"' in misspelt
    assert "no list of depths" in refusal(read_arch, "vit_large_patch16_224:6;6", "vit", 24)
    assert "depths cannot be" in refusal(read_arch, "vit_large_patch16_224:6,-6", "vit", 24)


def test_the_originals_yaml_of_a_nac():
    fields = read_arch(ARCH["nac"], "nac", None)
    for name, value in NAC_SPEC.__dict__.items():
        if name in fields:
            found = tuple(fields[name]) if isinstance(value, tuple) else fields[name]
            assert found == value, name
    # Whatever acts on the numbers is said.
    assert NAC_SPEC.__dict__.keys() - fields.keys() == {"remat", "fused", "channels"}
    assert (fields["prior"], fields["prior_options"]) == ("barabasi-albert", {"m": 2})


def test_the_originals_yaml_of_students():
    fields = read_arch(ARCH["students"], "nac_student", None)
    shared = (
        "state_dim",
        "code_dim",
        "heads",
        "head_dim",
        "image_size",
        "classes",
        "gain",
        "ffn_capacity",
        "geglu",
        "layer_scale",
        "add_one",
        "position_dim",
    )
    for name in shared:
        assert fields[name] == getattr(STUDENT_SPEC, name), name


def test_options_of_the_yaml(tmp_path):
    """Those that differ from the published configs, and the original's defaults for those left
    out."""
    content = yaml.safe_load((FIXTURES / "e_nac/config.yml").read_text())
    graph = content["model"]["kwargs"]["latent_graph_kwargs"]
    graph |= {"enable_input_output_communication": False, "share_ffn_between_propagators": True}
    graph["mod_fc_kwargs"] = {"scale_normalization_type": "tanh"}
    del graph["propagator_kwargs"], graph["share_propagator_weights"]
    (tmp_path / "other.yml").write_text(yaml.safe_dump(content))
    fields = read_arch(str(tmp_path / "other.yml"), "nac", None)
    expected = {
        "input_output": False,
        "share_ffn": True,
        "share_propagators": True,
        "modulation": "tanh",
        "add_one": False,
        "gain": 1.0,
        "truncation": None,
        "stochastic_kernel": False,
    }
    assert {name: fields[name] for name in expected} == expected
    # The original's own defaults may be said, too.
    graph |= {"use_input_states_as_mediator_states": False, "latent_seeder_kwargs": {}}
    (tmp_path / "other.yml").write_text(yaml.safe_dump(content))
    assert read_arch(str(tmp_path / "other.yml"), "nac", None) == fields


@pytest.mark.parametrize(
    "section, option, value",
    [
        ("latent_graph_kwargs", "use_input_states_as_mediator_states", True),
        ("latent_graph_kwargs", "latent_seeder_kwargs", {"use_state_noise": False}),
        ("latent_graph_kwargs", "an_option_of_tomorrow", 1),
        ("latent_graph_kwargs", "read_out_kwargs", {"use_head": False}),  # has a residual then
        ("mod_fc_kwargs", "activation", "GELU"),
        ("mod_fc_kwargs", "scale_times_input_normalization_type", "l2"),
        ("read_in_kwargs", "num_heads", 1),
        ("read_in_kwargs", "ffn_kwargs", {"include_residual": False}),
        ("propagator_kwargs", "include_residual_in_latent_attention", False),
        ("latent_attention_kwargs", "normalize_kernel_along_keys", False),
        ("latent_attention_kwargs", "scale_attention_by_affinities_after_softmax", True),
        ("latent_attention_kwargs", "kernel_type", "FixedKernel"),
        ("kernel_kwargs", "stochastic_eval_behaviour", "threshold"),
        ("read_out_kwargs", "include_residual_in_latent_attention", True),
        ("read_out_kwargs", "latent_attention_kwargs", {"kernel_kwargs": {"truncation": 0.9}}),
        ("output_tokenizer_kwargs", "softmax_temperature", 0.5),
        ("input_tokenizer_kwargs", "convnext_kwargs", {"layer_scale_init_value": 0}),
    ],
)
def test_options_that_names_and_shapes_do_not_show(section, option, value, tmp_path):
    """Each gives other numbers from the same tensors, and is built here in one way only."""
    content = yaml.safe_load((FIXTURES / "e_nac/config.yml").read_text())
    find_section(content, section)[option] = value
    (tmp_path / "other.yml").write_text(yaml.safe_dump(content))
    text = refusal(read_arch, str(tmp_path / "other.yml"), "nac", None)
    assert option in text and "is not built here" in text


@pytest.mark.parametrize(
    "section, option, value",
    [
        ("mod_fc_kwargs", "activation", "GELU"),
        ("mediator", "num_heads", 1),
        ("latent_attention_kwargs", "include_residual", False),
        ("readout", "include_residual_in_latent_attention", True),
    ],
)
def test_options_of_students(section, option, value, tmp_path):
    content = yaml.safe_load((FIXTURES / "f_students/student_config.yml").read_text())
    find_section(content, section)[option] = value
    (tmp_path / "other.yml").write_text(yaml.safe_dump(content))
    text = refusal(read_arch, str(tmp_path / "other.yml"), "nac_student", None)
    assert f"{option} {value!r} is not built here" in text


def find_section(content: dict, name: str) -> dict:
    """The mapping of that name, wherever it is."""
    if name in content:
        return content[name]
    inside = (find_section(v, name) for v in content.values() if isinstance(v, dict))
    return next((found for found in inside if found), {})


@pytest.mark.parametrize(
    "config, kind, blocks, expected",
    [
        ("tiny.py", "vit", 4, {"kind": "vit", "width": 16, "heads": 2, "depths": [1, 2, 1]}),
        ("tiny.py", "vit", 3, {"depths": [1, 1, 1]}),
        ("tiny.py", "nac", None, {"kind": "nac", "state_dim": 16, "prior": "barabasi-albert"}),
        ("tiny.py", "nac_student", None, {"kind": "nac_student", "state_dim": 16}),
        (
            "tiny_vmoe.py",
            "vmoe",
            4,
            {
                "kind": "vmoe",
                "moe_pos": [0, 2, 3],
                "experts": 4,
                "depths": [1, 1, 2],
                "stitch_dim": 16,
            },
        ),
    ],
)
def test_our_configs(config, kind, blocks, expected):
    fields = read_arch(str(FIXTURES.parent / "e2e" / config), kind, blocks)
    found = {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
    assert {name: found[name] for name in expected} == expected


def test_a_config_with_an_argument():
    file = FIXTURES.parents[1] / "configs/nac_tinyimnet.py"
    fields = read_arch(f"{file}:ring", "nac", None)
    assert (fields["prior"], fields["classes"]) == ("ring-of-cliques", 200)


@pytest.mark.parametrize(
    "text, words",
    [
        ("raise SystemExit(0)", "SystemExit"),
        ("get_config = lambda: 3", "has no attribute"),
        ("x = (", "SyntaxError"),
        ("get_config = None", "not callable"),
        (
            "from m2mkd_jax.errors import UserError\n\n"
            "def get_config():\n    raise UserError('no')",
            "other.py: no",
        ),
    ],
)
def test_files_that_are_no_config(text, words, tmp_path):
    (tmp_path / "other.py").write_text(text)
    assert words in refusal(read_arch, str(tmp_path / "other.py"), "vit", None)


def test_fields_that_make_no_sense(tmp_path):
    file = tmp_path / "arch.json"
    cases = {
        'did you mean "heads"': {"kind": "vit", "head": 3},
        "heads cannot be 0": {"heads": 0},
        "heads cannot be '3'": {"heads": "3"},
        "heads cannot be True": {"heads": True},
        "depths cannot be 6": {"depths": 6},
        "kind cannot be 'resnet'": {"kind": "resnet"},
        "qkv_bias cannot be 1": {"qkv_bias": 1},
        "eps cannot be -1": {"eps": -1},
        "idx cannot be -2": {"idx": -2},
        "truncation cannot be": {"truncation": "0.9"},
        "holds no fields": [1],
    }
    for words, content in cases.items():
        file.write_text(json.dumps(content))
        assert words in refusal(read_arch, str(file), "vit", None), words
    file.write_text("{")
    assert "cannot be parsed" in refusal(read_arch, str(file), "vit", None)
    (tmp_path / "arch.yml").write_text("a: [")
    assert "cannot be parsed" in refusal(read_arch, str(tmp_path / "arch.yml"), "nac", None)
    (tmp_path / "arch.yml").write_text("!!python/object/apply:os.system ['true']")
    assert "cannot be parsed" in refusal(read_arch, str(tmp_path / "arch.yml"), "nac", None)
    (tmp_path / "arch.yml").write_text("a: 1")
    assert "describes no NAC" in refusal(read_arch, str(tmp_path / "arch.yml"), "nac", None)
    assert "cannot be read" in refusal(read_arch, str(tmp_path / "no.json"), "nac", None)
    assert "does not exist" in refusal(read_arch, str(tmp_path / "no.py"), "nac", None)
    (tmp_path / "bad.py").write_text("1 / 0")
    assert "ZeroDivisionError" in refusal(read_arch, str(tmp_path / "bad.py"), "nac", None)


def test_what_cannot_be_seen_is_asked_for(tmp_path):
    assert '{"heads": ...}' in refusal(convert_from_torch, VIT)
    assert '{"heads": ...}' in refusal(convert_from_torch, NAC)
    middle = FIXTURES / "a_vit_large/rig_vit_large_1.pth"
    assert '{"heads": ...}' in refusal(convert_from_torch, middle)
    assert '{"heads": ...}' in refusal(
        convert_from_torch, FIXTURES / "f_students/ReadInStudent.pth"
    )
    (tmp_path / "arch.json").write_text('{"heads": 3}')
    for file in (VIT, NAC, middle, FIXTURES / "f_students/ReadInStudent.pth"):
        spec = convert_from_torch(file, str(tmp_path / "arch.json")).description["spec"]
        assert spec["heads"] == 3
    # A NAC from students: its numbers of latents.
    (tmp_path / "nac.json").write_text('{"kind": "nac", "heads": 3, "classes": 10}')
    text = refusal(convert_from_torch, FIXTURES / "f_students", str(tmp_path / "nac.json"))
    for field in ("image_size", "input_latents", "mediator_latents", "output_latents"):
        assert f'"{field}": ...' in text


def test_what_contradicts_the_weights(tmp_path):
    def told(fields: dict, file=VIT, **more) -> str:
        (tmp_path / "arch.json").write_text(json.dumps(fields | more))
        return refusal(convert_from_torch, file, str(tmp_path / "arch.json"))

    assert "patch 8, the weights have 16" in told({"heads": 3, "patch": 8})
    assert "classes 11, the weights have 10" in told({"heads": 3, "classes": 11})
    assert "5 blocks; the weights have 6" in told({"heads": 3, "depths": [2, 3]})
    assert "moe_pos [0], the weights have none" in told({"heads": 3, "moe_pos": [0]})
    assert "not a multiple of the 5 heads" in told({"heads": 5})
    assert "not a multiple of the patch" in told({"heads": 3, "image_size": 65})
    assert "5 heads do not make up" in told({"heads": 5}, NAC)
    assert "iterations 4, the weights have 3" in told({"heads": 3, "iterations": 4}, NAC)
    moe = FIXTURES / "d_vmoe_student_1/finished_checkpoint.pth"
    assert "experts 4, the weights have 8" in told({"heads": 2, "experts": 4}, moe)
    assert "idx -1, but this is student 1" in told({"heads": 2, "idx": -1}, moe)
    assert "pre_stitch_pos [1], there are [0]" in told({"heads": 2, "pre_stitch_pos": [1]}, moe)
    student = FIXTURES / "f_students/MediatorStudent_1.pth"
    assert "idx 0, but this is a mediator" in told({"heads": 3, "idx": 0}, student)
    assert "stitch_dim 1280, the weights" in told({"heads": 3, "stitch_dim": 1280}, student)
    module = FIXTURES / "a_vit_large/rig_vit_large_1.pth"
    assert "cannot be cut" in told({"heads": 3, "depths": [3, 3]}, module)
