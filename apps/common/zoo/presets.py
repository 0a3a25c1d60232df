"""Small configurations of the nets that packages have: whatever makes a net small, by its own options."""

from __future__ import annotations

from typing import Any

TIMM: dict[str, tuple[int, dict[str, Any]]] = {
    "beit_base_patch16_224": (32, {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}),
    "cait_xxs24_224": (32, {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}),
    "coat_tiny": (64, {"img_size": 64, "embed_dims": (32, 32, 32, 32), "serial_depths": (1, 1, 1, 1)}),
    "coat_lite_tiny": (64, {"img_size": 64, "embed_dims": (32, 32, 64, 64), "serial_depths": (1, 1, 1, 1)}),
    "coatnet_nano_rw_224": (64, {"img_size": 64, "embed_dim": (32, 32, 64, 64), "depths": (1, 1, 1, 1)}),
    "convit_tiny": (32, {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4}),
    "convnext_atto": (64, {"depths": (1, 1, 2, 1), "dims": (24, 32, 48, 64), "drop_path_rate": 0.1}),
    "convnextv2_atto": (64, {"depths": (1, 1, 2, 1), "dims": (24, 32, 48, 64), "drop_path_rate": 0.1}),
    "crossvit_tiny_240": (240, {"embed_dim": (32, 64), "num_heads": (2, 2), "depth": ((1, 2, 0), (1, 2, 0))}),
    "davit_tiny": (64, {"embed_dims": (32, 32, 64, 64), "num_heads": (2, 2, 4, 4)}),
    "deit_tiny_distilled_patch16_224": (32, {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2}),
    "deit3_small_patch16_224": (32, {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}),
    "densenet121": (64, {"growth_rate": 8, "block_config": (2, 2, 2, 2)}),
    "dla34": (64, {"channels": (8, 8, 16, 32, 32, 64)}),
    "edgenext_xx_small": (64, {"drop_path_rate": 0.1}),
    "efficientformer_l1": (224, {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 1, 2)}),
    "efficientnet_b0": (64, {"drop_rate": 0.2, "drop_path_rate": 0.2}),
    "efficientvit_b0": (64, {}),
    "eva02_tiny_patch14_224": (28, {"img_size": 28, "patch_size": 7, "embed_dim": 48, "depth": 2, "num_heads": 3}),
    "fasternet_t0": (64, {}),
    "flexivit_small": (48, {"img_size": 48, "embed_dim": 48, "depth": 2, "num_heads": 3}),
    "ghostnet_050": (64, {}),
    "hiera_tiny_224": (64, {"img_size": 64, "embed_dim": 32, "stages": (1, 1, 1, 1), "num_heads": 1}),
    "lcnet_050": (64, {}),
    "levit_128s": (64, {"img_size": 64, "embed_dim": (32, 48, 64), "key_dim": 16, "depth": (1, 1, 1)}),
    "mambaout_femto": (64, {"depths": (1, 1, 1, 1), "dims": (24, 32, 48, 64)}),
    "maxvit_rmlp_pico_rw_256": (64, {"img_size": 64, "embed_dim": (32, 32, 64, 64), "depths": (1, 1, 1, 1)}),
    "mnasnet_small": (64, {}),
    "mobilenetv2_050": (64, {"drop_rate": 0.2, "drop_path_rate": 0.1}),
    "mobilenetv3_small_050": (64, {"drop_rate": 0.2}),
    "mobilenetv4_conv_small_035": (64, {}),
    "mobilevit_xxs": (64, {}),
    "mobilevitv2_050": (64, {}),
    "nf_resnet26": (64, {"width_factor": 0.25}),
    "pit_ti_224": (64, {"img_size": 64, "base_dims": (16, 16, 16), "depth": (1, 1, 1)}),
    "regnety_002": (64, {}),
    "repghostnet_050": (64, {}),
    "repvgg_a0": (64, {"width_factor": 0.25}),
    "repvit_m0_9": (64, {"embed_dim": (24, 32, 48, 64), "depth": (1, 1, 2, 1)}),
    "res2net50_26w_4s": (64, {"channels": (16, 32, 32, 64), "layers": (1, 1, 1, 1)}),
    "resnest14d": (64, {"channels": (16, 32, 32, 64)}),
    "resnet18": (64, {"channels": (16, 32, 64, 64)}),
    "resnet50": (64, {"channels": (16, 32, 32, 64), "layers": (1, 1, 1, 1), "drop_path_rate": 0.1}),
    "resnet26d": (64, {"channels": (16, 32, 32, 64)}),
    "samvit_base_patch16_224": (64, {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3}),
    "sequencer2d_s": (32, {"img_size": 32, "embed_dims": (32, 32, 32, 32), "layers": (1, 1, 1, 1)}),
    "seresnet18": (64, {"channels": (16, 32, 64, 64)}),
    "skresnet18": (64, {"channels": (16, 32, 64, 64)}),
    "starnet_s1": (64, {"base_dim": 16, "depths": (1, 1, 1, 1)}),
    "swiftformer_xs": (64, {"embed_dims": (24, 32, 48, 64), "layers": (1, 1, 1, 1)}),
    "swin_tiny_patch4_window7_224": (
        64,
        {"img_size": 64, "embed_dim": 24, "depths": (1, 2, 1), "num_heads": (2, 2, 4), "window_size": 4},
    ),
    "swinv2_tiny_window8_256": (
        64,
        {"img_size": 64, "embed_dim": 24, "depths": (1, 2, 1), "num_heads": (2, 2, 4), "window_size": 4},
    ),
    "swinv2_cr_tiny_224": (
        64,
        {"img_size": 64, "embed_dim": 24, "depths": (1, 2, 1), "num_heads": (2, 2, 4), "window_size": 4},
    ),
    "tiny_vit_5m_224": (64, {"embed_dims": (24, 32, 48, 64), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 4)}),
    "tinynet_e": (64, {}),
    "tnt_s_legacy_patch16_224": (32, {"img_size": 32, "embed_dim": 48, "inner_dim": 12, "depth": 2}),
    "twins_svt_small": (64, {"img_size": 64, "embed_dims": (32, 32, 64, 64), "depths": (1, 1, 2, 1)}),
    "twins_pcpvt_small": (64, {"img_size": 64, "embed_dims": (32, 32, 60, 64), "depths": (1, 1, 1, 1)}),
    "visformer_tiny": (64, {"img_size": 64, "embed_dim": 48, "depth": (1, 1, 1)}),
    "vit_tiny_patch16_224": (32, {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "drop_path_rate": 0.1}),
    "vit_relpos_small_patch16_224": (
        32,
        {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3},
    ),
    "vovnet39a": (64, {"stem_chs": (16, 16, 16), "stage_conv_chs": (16,) * 4, "stage_out_chs": (32, 32, 64, 64)}),
    "xcit_nano_12_p16_224": (32, {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 4}),
}
"""Pixels of the input's sides, and options, by name."""

TORCHVISION: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "ConvNeXt": ((3, 64, 64), {"stochastic_depth_prob": 0.1}),
    "MaxVit": (
        (3, 64, 64),
        {
            "input_size": (64, 64), "stem_channels": 16, "partition_size": 4, "block_channels": [16, 32],
            "block_layers": [1, 1], "head_dim": 8, "stochastic_depth_prob": 0.1,
        },
    ),
    "SwinTransformer": (
        (3, 64, 64),
        {
            "patch_size": [4, 4], "embed_dim": 24, "depths": [1, 2], "num_heads": [2, 4], "window_size": [4, 4],
            "stochastic_depth_prob": 0.1,
        },
    ),
    "VisionTransformer": (
        (3, 32, 32),
        {
            "image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 3, "hidden_dim": 48, "mlp_dim": 96,
            "dropout": 0.1,
        },
    ),
    "DenseNet": ((3, 64, 64), {"growth_rate": 8, "block_config": (2, 2, 2, 2), "num_init_features": 16}),
    "mnasnet0_5": ((3, 64, 64), {}),
    "mobilenet_v2": ((3, 64, 64), {"width_mult": 0.35}),
    "mobilenet_v3_small": ((3, 64, 64), {}),
    "shufflenet_v2_x0_5": ((3, 64, 64), {}),
    "squeezenet1_1": ((3, 64, 64), {}),
}  # fmt: skip
"""Shape of an example, and options, by name; a class is made with small blocks."""


def torchvision_net(models: Any, name: str, options: dict[str, Any]) -> Any:
    """Make a net of torchvision: by a function that makes one, or by its class with small blocks."""
    if name == "ConvNeXt":
        block = models.convnext.CNBlockConfig
        return models.ConvNeXt([block(16, 32, 1), block(32, 48, 1), block(48, None, 2)], **options)
    return getattr(models, name)(**options)


SMALL: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 64, "num_labels": 10, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "use_cache": False,
}  # fmt: skip
"""Options that most configurations of transformers know."""

PICTURE = {"image_size": 32, "patch_size": 8}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {**GROUPED, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SMALL_PAIR = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "decoder_start_token_id": 1,
}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
STAGES = {"num_hidden_layers": None, "num_attention_heads": None}
CONVOLUTIONS = {**STAGES, "hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1]}
WAVES = {
    "conv_dim": [16, 16, 16], "conv_stride": [5, 2, 2], "conv_kernel": [10, 3, 3], "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "classifier_proj_size": 16,
}  # fmt: skip

KINDS: dict[str, dict[str, Any]] = {
    "causal": {}, "masked": {}, "sentence": {}, "pair": {}, "image": PICTURE, "audio": {},
}  # fmt: skip

TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    # language models that predict the next token
    "GPT2LMHeadModel": ("causal", {}),
    "GPTNeoXForCausalLM": ("causal", {}),
    "GPTJForCausalLM": ("causal", {"rotary_dim": 4}),
    "GPTNeoForCausalLM": ("causal", {"attention_types": [[["global", "local"], 1]]}),
    "GPTBigCodeForCausalLM": ("causal", {}),
    "BloomForCausalLM": ("causal", {}),
    "CodeGenForCausalLM": ("causal", {"rotary_dim": 4}),
    "OPTForCausalLM": ("causal", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "MptForCausalLM": ("causal", {"d_model": 32, "n_heads": 4, "n_layers": 2}),
    "FalconForCausalLM": ("causal", {"num_kv_heads": 2}),
    "LlamaForCausalLM": ("causal", GROUPED),
    "MistralForCausalLM": ("causal", GROUPED),
    "MixtralForCausalLM": ("causal", EXPERTS),
    "Qwen2ForCausalLM": ("causal", GROUPED),
    "Qwen3ForCausalLM": ("causal", GROUPED),
    "Qwen2MoeForCausalLM": ("causal", {**EXPERTS, "shared_expert_intermediate_size": 32}),
    "OlmoeForCausalLM": ("causal", EXPERTS),
    "GemmaForCausalLM": ("causal", GROUPED),
    "Gemma2ForCausalLM": ("causal", GROUPED),
    "Gemma3ForCausalLM": ("causal", GROUPED),
    "PhiForCausalLM": ("causal", {}),
    "Phi3ForCausalLM": ("causal", GROUPED),
    "StableLmForCausalLM": ("causal", GROUPED),
    "OlmoForCausalLM": ("causal", GROUPED),
    "Olmo2ForCausalLM": ("causal", GROUPED),
    "CohereForCausalLM": ("causal", GROUPED),
    "GraniteForCausalLM": ("causal", GROUPED),
    "PersimmonForCausalLM": ("causal", {}),
    "Starcoder2ForCausalLM": ("causal", GROUPED),
    "SmolLM3ForCausalLM": ("causal", GROUPED),
    "BioGptForCausalLM": ("causal", {}),
    "XGLMForCausalLM": ("causal", {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64}),
    "MambaForCausalLM": ("causal", {"state_size": 4}),
    "Mamba2ForCausalLM": ("causal", {"state_size": 4, "head_dim": 8, "num_heads": 8, "n_groups": 2}),
    "ModernBertDecoderForCausalLM": ("causal", {}),
    # with masked tokens
    "BertForMaskedLM": ("masked", {}),
    "RobertaForMaskedLM": ("masked", {}),
    "DistilBertForMaskedLM": ("masked", {}),
    "ElectraForMaskedLM": ("masked", {"embedding_size": 32}),
    "AlbertForMaskedLM": ("masked", {"embedding_size": 16}),
    "MPNetForMaskedLM": ("masked", {}),
    "RoFormerForMaskedLM": ("masked", {"embedding_size": 32}),
    "EsmForMaskedLM": ("masked", {"position_embedding_type": "rotary"}),
    "ModernBertForMaskedLM": ("masked", {}),
    "CamembertForMaskedLM": ("masked", {}),
    "FNetForMaskedLM": ("masked", {}),
    "XLMRobertaForMaskedLM": ("masked", {}),
    "DebertaV2ForMaskedLM": (
        "masked", {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16},
    ),
    "SqueezeBertForMaskedLM": ("masked", {"embedding_size": 32}),
    # classifiers of sentences
    "BertForSequenceClassification": ("sentence", {}),
    "DebertaForSequenceClassification": ("sentence", {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "DistilBertForSequenceClassification": ("sentence", {}),
    "XLNetForSequenceClassification": (
        "sentence", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "max_position_embeddings": None},
    ),
    "FunnelForSequenceClassification": (
        "sentence", {"block_sizes": [1, 1], "num_hidden_layers": None, "d_model": 32, "n_head": 4, "d_head": 8},
    ),
    "ConvBertForSequenceClassification": ("sentence", {"embedding_size": 32}),
    "LlamaForSequenceClassification": ("sentence", GROUPED),
    "T5ForSequenceClassification": ("sentence", {**T5, "decoder_start_token_id": 1}),
    # pairs of sequences
    "T5ForConditionalGeneration": ("pair", T5),
    "MT5ForConditionalGeneration": ("pair", T5),
    "BartForConditionalGeneration": ("pair", SMALL_PAIR),
    "MBartForConditionalGeneration": ("pair", SMALL_PAIR),
    "MarianMTModel": ("pair", SMALL_PAIR),
    "PegasusForConditionalGeneration": ("pair", SMALL_PAIR),
    # pictures and sounds
    "ViTForImageClassification": ("image", {}),
    "DeiTForImageClassification": ("image", {}),
    "BeitForImageClassification": ("image", {}),
    "Dinov2ForImageClassification": ("image", {"drop_path_rate": 0.1}),
    "SiglipForImageClassification": (
        "image",
        {"vision_config": {**PICTURE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                           "intermediate_size": 64}},
    ),
    "CLIPForImageClassification": (
        "image",
        {"vision_config": {**PICTURE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                           "intermediate_size": 64}},
    ),
    "ConvNextForImageClassification": ("image", {**CONVOLUTIONS, "patch_size": 4, "drop_path_rate": 0.1}),
    "ConvNextV2ForImageClassification": ("image", {**CONVOLUTIONS, "patch_size": 4, "drop_path_rate": 0.1}),
    "PoolFormerForImageClassification": ("image", {**CONVOLUTIONS, "patch_size": 4, "num_encoder_blocks": 4}),
    "ResNetForImageClassification": ("image", {**CONVOLUTIONS, "embedding_size": 16, "layer_type": "basic"}),
    "SwinForImageClassification": (
        "image", {**STAGES, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "patch_size": 4},
    ),
    "Swinv2ForImageClassification": (
        "image", {**STAGES, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "patch_size": 4},
    ),
    "SegformerForImageClassification": (
        "image", {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 2]},
    ),
    "MobileViTForImageClassification": (
        "image",
        {"hidden_sizes": [32, 32, 32], "neck_hidden_sizes": [8, 8, 16, 16, 16, 16, 32], "patch_size": 2,
         "image_size": 64, "expand_ratio": 2.0},
    ),
    "PvtV2ForImageClassification": (
        "image",
        {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 2],
         "image_size": 64, "patch_sizes": [7, 3, 3, 3]},
    ),
    "Wav2Vec2ForSequenceClassification": ("audio", {**WAVES, "do_stable_layer_norm": False}),
    "HubertForSequenceClassification": ("audio", WAVES),
    "WavLMForSequenceClassification": ("audio", WAVES),
}  # fmt: skip
"""Kind of the inputs, and options in addition to `SMALL`, by class."""
