"""Counts are exact: every figure is a published one or SPEC's, to the unit where the source gives units."""

from dataclasses import replace

import pytest

from quadriga.errors import ConfigError
from quadriga.model import cost
from quadriga.model.config import RopeSpec
from quadriga.model.families import PRESETS, preset

TOTAL = {
    "dbrx-132b": 131_596_523_520,
    "dbrx-73b": 73_508_131_840,
    "dbrx-35b": 35_653_357_568,
    "dbrx-18b": 18_611_346_432,
    "dbrx-9b": 9_169_635_328,
    "mixtral-8x7b": 46_702_792_704,
    "grok-1": 315_684_820_992,
    "llama2-70b": 68_976_648_192,
    "llama2-13b": 13_015_864_320,
    "llama2-7b": 6_738_415_616,
    "mpt-7b": 6_649_286_656,
}


@pytest.mark.parametrize("name", TOTAL)
def test_total_parameters(name):
    assert cost.n_params(preset(name)).total == TOTAL[name]


def test_active_parameters():
    assert cost.n_params(preset("dbrx-132b")).active == 36_469_708_800
    assert cost.n_params(preset("grok-1")).active == 83_756_587_008
    assert cost.n_params(preset("mixtral-8x7b")).active == 12_879_925_248
    assert cost.n_params(preset("llama2-70b")).active == TOTAL["llama2-70b"]


def test_active_parameters_without_the_input_table():
    without = {name: cost.n_params(config).active_without_input for name, config in PRESETS.items()}
    assert without["dbrx-132b"] == 35_853_146_112
    assert without["dbrx-73b"] == 20_146_099_200
    assert without["dbrx-35b"] == 9_875_165_184
    assert without["dbrx-18b"] == 5_223_128_064
    assert without["dbrx-9b"] == 2_622_326_784
    assert without["mpt-7b"] == TOTAL["mpt-7b"], "a tied table multiplies as the head"


def test_the_two_research_models_meet_their_published_sizes():
    a, b = cost.n_params(preset("moe-a")), cost.n_params(preset("moe-b"))
    assert (round(a.total / 1e9, 1), round(a.active_without_input / 1e9, 1)) == (7.7, 2.2)
    assert (round(b.total / 1e9, 1), round(b.active_without_input / 1e9, 1)) == (23.5, 6.6)


def test_cache_bytes():
    assert cost.kv_bytes_per_token(preset("dbrx-132b")) == 163_840
    assert cost.kv_bytes_per_token(preset("dbrx-132b"), "float32") == 327_680
    assert cost.kv_bytes_per_token(preset("dbrx-132b")) * 32_768 == 5 * 2**30
    with pytest.raises(ConfigError, match="dtype must be one of"):
        cost.kv_bytes_per_token(preset("dbrx-132b"), "int3")


def test_latents_are_the_whole_cache():
    """DeepSeek-V3: 61 layers keep 512 + 64 numbers a token; 128 heads of 576 meet a key, of 512 its value."""
    config = preset("deepseek-v3")
    assert cost.kv_bytes_per_token(config) == 61 * 576 * 2
    assert cost.kv_bytes_read(config, 1000) == 1000 * 61 * 576 * 2
    assert cost.attention_flops(config, 1000) == 2 * 61 * 128 * (576 + 512) * 1000


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kv_rank": 48}, "kv_rank must be a multiple of 32, got 48"),
        ({"v_dim": 8}, "v_dim must be a multiple of 16, got 8"),
        ({"rope_dim": 63}, "rope_dim must be even, got 63"),
        ({"head_dim": 128}, "head_dim must be kv_rank . rope_dim = 576, got 128"),
        ({"n_kv_heads": 128}, "one key a token, got n_kv_heads=128"),
        ({"sinks": True}, "latent attention has no sinks"),
        ({"window": 128}, "latent attention has no window"),
        ({"position": None}, "latent attention needs rotary positions"),
        ({"position": RopeSpec(theta=1e4, dim=32)}, "rope.dim must be left out"),
        ({"position": RopeSpec(theta=1e4)}, "yarn_mscale needs a rotation that is scaled by YaRN"),
    ],
)
def test_what_latent_attention_cannot_have(change, says):
    with pytest.raises(ConfigError, match=says):
        replace(preset("deepseek-v3").layers[0].mixer, **change)


def test_with_a_window_less_is_read_and_kept():
    windowed = preset("mistral-7b-v0.1")
    whole = windowed.with_mixer(window=None)
    per_token = 2 * 8 * 128 * 32 * 2
    assert cost.kv_bytes_per_token(windowed) == per_token
    kept = (4096 + 16) * per_token  # a window may begin at a block's last position
    assert cost.memory_needed(windowed, "q4", 32_768) == cost.weight_bytes(windowed, "q4") + kept
    assert cost.kv_bytes(windowed, 100) == cost.kv_bytes(whole, 100) == 100 * per_token
    assert cost.kv_bytes(whole, 32_768, "float32") == 32_768 * 2 * per_token
    gpt_oss = preset("gpt-oss-20b")
    assert cost.kv_bytes(gpt_oss, 131_072) == (131_072 + 144) * 12 * 2 * 8 * 64 * 2
    assert [cost.kv_bytes_read(windowed, n) for n in (100, 4096, 32_768)] == [
        100 * per_token, 4096 * per_token, 4096 * per_token,
    ]  # fmt: skip
    assert cost.kv_bytes_read(whole, 32_768) == 32_768 * per_token
    assert cost.attention_flops(windowed, 32_768) == cost.attention_flops(whole, 4096)


def test_operations_per_token():
    dbrx = preset("dbrx-132b")
    assert cost.flops_per_token(dbrx, 0) == 2 * 35_853_146_112
    assert cost.flops_per_token(dbrx, 32_768) - cost.flops_per_token(dbrx, 0) == 40 * 4 * 6144 * 32_768
    # 12T tokens of training, three passes each without attention: SPEC's 2.58e24.
    assert 3 * cost.flops_per_token(dbrx, 0) * 12e12 == pytest.approx(2.58e24, rel=2e-3)


def test_weight_bytes_of_dbrx():
    dbrx, gib = preset("dbrx-132b"), 2**30
    assert cost.weight_bytes(dbrx, "bf16") == 263_193_047_040
    assert round(cost.weight_bytes(dbrx, "bf16") / gib, 1) == 245.1
    assert cost.weight_bytes(dbrx, "f32") == 2 * cost.weight_bytes(dbrx, "bf16")
    # 4.5 bits everywhere would be 68.9 GiB; norms and router in float32 add 40 layers of 16 x 6144 and a few rows.
    router_and_norms = 40 * (16 + 2) * 6144 + 6144
    everywhere = (131_596_523_520 - router_and_norms) * 4.5 / 8 + router_and_norms * 4
    assert cost.weight_bytes(dbrx, "gguf-q4_0") == everywhere
    # Tables of the kernels' blocks have 8.5 bits, and what one token reads of a table is a row.
    tables = 2 * 616_562_688
    matrices = 131_596_523_520 - router_and_norms - tables
    of_32 = {"q5m": 6, "q5": 5.5, "q4m": 5, "iq4nl": 4.5}
    of_256 = {"q6k": 6.625, "q5k": 5.625, "q4k": 4.625, "iq4xs": 4.375, "q3k": 3.625, "q2k": 2.625}
    for form, bits in (of_32 | of_256).items():
        assert cost.weight_bytes(dbrx, form) == matrices * bits / 8 + tables * 8.5 / 8 + router_and_norms * 4
    assert cost.table_bytes(dbrx, "q4k") == tables // 2 * 8.5 / 8
    # Ours leaves both token tables in bfloat16 too.
    wide = router_and_norms + 2 * 616_562_688
    assert cost.weight_bytes(dbrx, "q8") == (131_596_523_520 - wide) * 8.5 / 8 + wide * 2


def test_rows_that_are_no_whole_blocks_are_not_packed():
    llama = replace(preset("llama2-7b").with_n_layers(1), d_model=33, vocab_size=7)
    one_row = cost.weight_bytes(replace(llama, vocab_size=8), "gguf-q8_0") - cost.weight_bytes(llama, "gguf-q8_0")
    assert one_row == 2 * 33 * 2  # two tables, 33 elements of 16 bits


def test_bytes_read_per_token():
    dbrx = preset("dbrx-132b")
    experts = 40 * 4 * 198_180_864 * 2  # SPEC 1.5: 63.4 GB of experts in bfloat16
    rest = 40 * (88_080_384 + 98_304 + 2 * 6144) * 2 + 616_562_688 * 2 + 6144 * 2
    assert round(experts / 1e9, 1) == 63.4
    assert cost.bytes_read_per_token(dbrx, "bf16") == experts + rest + 6144 * 2  # and one row of the input table
    assert cost.bytes_read_per_token(preset("mpt-7b"), "bf16") == cost.weight_bytes(preset("mpt-7b"), "bf16")


def test_a_batch_soon_reaches_every_expert():
    ffn = preset("dbrx-132b").only_moe("this test")
    expected = [round(cost.expected_distinct_experts(ffn, n), 1) for n in (1, 2, 4, 8)]
    assert expected == [4.0, 7.0, 10.9, 14.4]


def test_fits():
    dbrx, context = preset("dbrx-132b"), 4096
    needed = 263_193_047_040 + 4096 * 163_840
    assert cost.memory_needed(dbrx, "bf16", context) == needed
    assert cost.fits(dbrx, "bf16", context, needed)
    assert not cost.fits(dbrx, "bf16", context, needed - 1)
    with pytest.raises(ConfigError, match="weight format must be one of f32, bf16"):
        cost.fits(dbrx, "fp3", context, needed)


def test_counting_a_deep_model_costs_nothing_extra():
    deep = preset("dbrx-9b").with_n_layers(10_000)
    per_layer = cost.n_params(deep.with_n_layers(2)).total - cost.n_params(deep.with_n_layers(1)).total
    tables = 2 * 100_352 * 2048 + 2048
    assert cost.n_params(deep).total == 10_000 * per_layer + tables


STATES = {
    # taps - 1 earlier inputs of what is convolved, and of every head a matrix: float32
    "granite-4.0-h-small": 36 * 4 * (3 * (128 * 64 + 2 * 128) + 128 * 64 * 128),
    "nemotron-nano-9b-v2": 27 * 4 * (3 * (128 * 80 + 2 * 8 * 128) + 128 * 80 * 128),
    "qwen3-next-80b-a3b": 36 * 4 * (3 * (2 * 16 * 128 + 32 * 128) + 32 * 128 * 128),
    "lfm2-350m": 10 * 4 * 2 * 1024,
}


@pytest.mark.parametrize("name", STATES)
def test_recurrent_layers_keep_and_read_their_state_whatever_the_length(name):
    config, own = preset(name), STATES[name]
    assert cost.state_bytes(config) == own
    attended = cost.kv_bytes_per_token(config)
    for length in (1, 5000):
        assert cost.kv_bytes_read(config, length) == length * attended + own
        kept = cost.kv_bytes(config, length)
        assert cost.memory_needed(config, "q4", length) == cost.weight_bytes(config, "q4") + kept + own


@pytest.mark.parametrize(
    ("name", "of_a_layer"),
    [
        ("granite-4.0-h-small", (1 + 2 + 2) * 128 * 64 * 128),  # decays, takes up B x, is read by C
        ("qwen3-next-80b-a3b", (1 + 2 + 2 + 2) * 32 * 128 * 128),  # decays, is read by k, changed, read by q
        ("lfm2-350m", 2 * 1024),  # b x, and c times the convolution
    ],
)
def test_a_step_of_a_recurrent_layer_by_its_formula(name, of_a_layer):
    mixers = [layer.mixer for layer in preset(name).layers if not hasattr(layer.mixer, "n_kv_heads")]
    assert {cost.step_flops(mixer) for mixer in mixers} == {of_a_layer}
    config = preset(name)
    attends = config.n_layers - len(mixers)
    more = cost.attention_flops(config, 1001) - cost.attention_flops(config, 1)
    assert cost.attention_flops(config, 1) == len(mixers) * of_a_layer + more // 1000
    assert more % (1000 * attends) == 0


def test_biases_of_experts_are_met_by_those_who_visit_them():
    config = preset("gpt-oss-20b")
    count, layer = cost.n_params(config), config.layers[0]
    of_an_expert = 3 * 2880 * 2880 + 2 * 2880 + 2880  # gate, up and down, with their biases
    assert count.total - count.active == 24 * (layer.moe.n_experts - layer.moe.top_k) * of_an_expert
