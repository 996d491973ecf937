"""Every backbone of KerasHub, as small as it can be built, with a head that trains it on one label and data for it.

    model = keras_hub_zoo.model("Llama")
    model.compile("sgd", "sparse_categorical_crossentropy")
    model.fit(*keras_hub_zoo.data(model, rows=18), batch_size=7, shuffle=False)

The names are those of `keras_hub.models` without "Backbone"; where two are one class (ESM2 and ESM, Qwen2 and Qwen,
SmolLM and SmolLM3) there is one of them, and Gemma3 and Gemma4 are there without images too. No layer drops anything.
"""

import keras
import numpy as np
from keras import layers, ops
from keras_hub import layers as parts
from keras_hub import models
from keras_hub.src.models.blip2.blip2_custom_opt import BLIP2CustomOPT
from keras_hub.src.models.blip2.blip2_qformer import BLIP2QFormer
from keras_hub.src.models.gemma3n.gemma3n_audio_encoder import Gemma3nAudioEncoder
from keras_hub.src.models.mobilenetv5.mobilenetv5_builder import convert_arch_def_to_stackwise
from keras_hub.src.models.vae.vae_backbone import VAEBackbone

WORDS, TOKENS, CLASSES, IMAGE = 50, 8, 5, (32, 32, 3)
LENGTHS = {"RWKV7": 16}  # tokens, where they cannot be 8

SIZE = dict(num_layers=2, hidden_dim=16, intermediate_dim=32)
ENCODER = dict(SIZE, num_heads=4)
HEADS = dict(ENCODER, vocabulary_size=WORDS)
BERT = dict(HEADS, dropout=0.0, max_sequence_length=TOKENS)
GROUPS = dict(SIZE, vocabulary_size=WORDS, num_query_heads=4, num_key_value_heads=2)
GEMMA = dict(GROUPS, head_dim=4)
TIED = dict(GROUPS, tie_word_embeddings=True)
EXPERTS = dict(num_experts=4, top_k=2)
QWEN_EXPERTS = dict(TIED, **EXPERTS, moe_intermediate_dim=16, norm_top_k_prob=True)
LINEAR = dict(
    vocabulary_size=WORDS, num_layers=2, hidden_dim=16, num_query_heads=4, num_key_value_heads=2, head_dim=8,
    layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2, linear_num_value_heads=4,
    linear_key_head_dim=4, linear_value_head_dim=4, tie_word_embeddings=True,
)  # fmt: skip
HALF = dict(
    SIZE, num_attention_heads=4, num_key_value_heads=2, head_dim=4, layer_types=["sliding_attention", "full_attention"]
)
T5GEMMA = dict(
    {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in HALF.items()}, vocabulary_size=WORDS,
    sliding_window=4, cross_attention_hidden_size=16, attn_logit_softcapping=50.0,
)  # fmt: skip

DECODERS = dict(
    Bloom=HEADS, GPT2=BERT, OPT=BERT, Gemma=GEMMA, Llama=TIED, Llama3=TIED, Phi3=GROUPS, Qwen=GROUPS, Qwen3=GEMMA,
    Falcon=dict(SIZE, vocabulary_size=WORDS, num_attention_heads=4), GPTNeoX=dict(BERT, rotary_percentage=0.5),
    Gemma3Text=dict(GEMMA, image_size=None), Gemma4Text=dict(GEMMA, image_size=None),
    GptOss=dict(GROUPS, **EXPERTS, sliding_window=4),
    Mixtral=dict(GROUPS, **EXPERTS, sliding_window=4), Mistral=dict(GROUPS, sliding_window=4),
    Qwen3Moe=dict(QWEN_EXPERTS, head_dim=4, mlp_only_layers=[]),
    Qwen3_5=dict(LINEAR, intermediate_dim=32), QwenMoe=dict(QWEN_EXPERTS, shared_expert_intermediate_dim=32),
    Qwen3_5Moe=dict(LINEAR, **EXPERTS, moe_intermediate_dim=16, shared_expert_intermediate_size=16),
    RWKV7=dict(
        vocabulary_size=WORDS, hidden_size=16, head_size=4, num_layers=2, intermediate_dim=32, gate_lora=8, mv_lora=8,
        aaa_lora=8, decay_lora=8,
    ),
    SmolLM3=dict(
        SIZE, vocabulary_size=WORDS, num_attention_heads=4, num_key_value_heads=2, attention_bias=False,
        attention_dropout=0.0, mlp_bias=False, rope_layer_enabled_list=[True, False], layer_types=["attention"] * 2,
        layer_norm_epsilon=1e-5, max_position_embeddings=32, rope_theta=10000.0, partial_rotary_factor=1.0,
    ),
)  # fmt: skip
ENCODERS = dict(
    Bert=BERT, DebertaV3=BERT, DistilBert=BERT, ESM=BERT, Roberta=BERT, XLMRoberta=BERT, XLNet=HEADS,
    Albert=dict(BERT, embedding_dim=16), RoformerV2=dict(HEADS, head_size=4, dropout=0.0),
    Electra=dict(ENCODER, vocab_size=WORDS, embedding_dim=8, dropout=0.0, max_sequence_length=TOKENS),
    FNet=dict(SIZE, vocabulary_size=WORDS, dropout=0.0, max_sequence_length=TOKENS),
)  # fmt: skip
ENCODER_DECODERS = dict(
    Bart=BERT, T5=dict(HEADS, dropout=0.0), T5Gemma=T5GEMMA, T5Gemma2=T5GEMMA,
    EdRec=dict(vocab_size=WORDS, num_layers_enc=2, num_layers_dec=2, hidden_dim=16, num_heads=4, intermediate_dim=32),
)  # fmt: skip

RESNET = dict(
    input_conv_filters=[64], input_conv_kernel_sizes=[7], stackwise_num_filters=[64, 16, 16, 16],
    stackwise_num_blocks=[1] * 4, stackwise_num_strides=[1, 2, 2, 2], block_type="basic_block",
)  # fmt: skip
THREE_STAGES = {key: value[:3] for key, value in RESNET.items() if key.startswith("stackwise")}
MIT = dict(
    layerwise_depths=[1, 1], num_layers=2, hidden_dims=[8, 16], layerwise_num_heads=[1, 2], layerwise_strides=[4, 2],
    layerwise_sr_ratios=[4, 2], layerwise_patch_sizes=[7, 3], max_drop_path_rate=0.0, image_shape=IMAGE,
)  # fmt: skip
HGNET = dict(
    depths=[1, 1], embedding_size=8, hidden_sizes=[16, 32], stem_channels=[3, 8, 8], hidden_act="relu",
    stackwise_stage_filters=[[8, 8, 16, 1, 1, 3], [16, 8, 32, 1, 1, 3]], use_learnable_affine_block=True,
    apply_downsample=[False, True], use_lightweight_conv_block=[False, True], out_features=["stage1", "stage2"],
    image_shape=IMAGE,
)  # fmt: skip
VITDET = dict(
    hidden_size=16, num_layers=2, intermediate_dim=32, num_heads=4, patch_size=4, window_size=4,
    global_attention_layer_indices=[1], num_output_channels=8, image_shape=IMAGE,
)  # fmt: skip
VIT = dict(num_layers=2, num_heads=4, hidden_dim=16, image_shape=IMAGE)
DINO = dict(VIT, patch_size=8, intermediate_dim=32, use_mask_token=False)
MOBILE5 = convert_arch_def_to_stackwise([["er_r1_k3_s2_e2_c8"], ["uir_r1_k5_s2_e2_c16", "mqa_r1_k3_h2_s1_d8_c16"]])
MOBILE5.update(stem_size=8, num_features=16, use_msfa=False)

# A configuration with models or layers in it is a function: they are made anew each time.
VISION = dict(
    DINOV3=DINO, HGNetV2=HGNET, MiT=MIT, ViTDet=VITDET,
    BASNet=lambda: dict(image_encoder=models.ResNetBackbone(**RESNET), num_classes=1, image_shape=IMAGE),
    CSPNet=dict(
        stem_filters=8, stem_kernel_size=3, stem_strides=1, stackwise_strides=2, stackwise_depth=[1, 2],
        stackwise_num_filters=[8, 16], block_type="dark_block", stage_type="csp", stem_padding="same",
        down_growth=True, bottle_ratio=(0.5, 1.0), block_ratio=(1.0, 0.5), expand_ratio=(2.0, 1.0), image_shape=IMAGE,
    ),
    DFine=lambda: dict(
        backbone=models.HGNetV2Backbone(**HGNET), decoder_in_channels=[16, 16], encoder_hidden_dim=16, num_labels=4,
        num_denoising=0, hidden_dim=16, learn_initial_query=False, num_queries=6, anchor_image_size=IMAGE[:2],
        feat_strides=[4, 8], num_lqe_layers=2, num_feature_levels=2, encoder_in_channels=[16, 32],
        encode_proj_layers=[1], num_attention_heads=2, seed=0, encoder_ffn_dim=32, num_encoder_layers=1,
        hidden_expansion=0.5, depth_multiplier=0.5, eval_idx=-1, num_decoder_layers=2, decoder_attention_heads=2,
        decoder_ffn_dim=32, decoder_n_points=[2, 2], lqe_hidden_dim=16, out_features=["stage1", "stage2"],
        image_shape=IMAGE,
    ),
    DINOV2=dict(DINO, position_embedding_shape=IMAGE), DeiT=dict(VIT, patch_size=8, intermediate_dim=32),
    DeepLabV3=lambda: dict(
        image_encoder=models.ResNetBackbone(**{**RESNET, **THREE_STAGES}), spatial_pyramid_pooling_key="P4",
        low_level_feature_key="P2", upsampling_size=4, dilation_rates=[1, 2], projection_filters=8, image_shape=IMAGE,
    ),
    DenseNet=dict(stackwise_num_repeats=[1, 2], growth_rate=4, image_shape=IMAGE),
    DepthAnything=lambda: dict(
        image_encoder=models.DINOV2Backbone(**DINO, position_embedding_shape=IMAGE, apply_layernorm=True),
        reassemble_factors=[2, 1], neck_hidden_dims=[8, 16], fusion_hidden_dim=16, head_hidden_dim=8, head_in_index=-1,
        feature_keys=["stage1", "stage2"],
    ),
    EfficientNet=dict(
        stackwise_kernel_sizes=[3, 3], stackwise_num_repeats=[1, 2], stackwise_input_filters=[8, 8],
        stackwise_output_filters=[8, 16], stackwise_expansion_ratios=[1, 4], stackwise_strides=[1, 2],
        stackwise_squeeze_and_excite_ratios=[0.0, 0.25], stackwise_block_types=["fused", "unfused"],
        width_coefficient=1.0, depth_coefficient=1.0, num_features=32, dropout=0.0, input_shape=IMAGE,
    ),
    MobileNet=dict(
        stackwise_expansion=[[16], [24, 24]], stackwise_num_blocks=[1, 2], stackwise_num_filters=[[8], [16, 16]],
        stackwise_kernel_size=[[3], [5, 5]], stackwise_padding=[[1], [2, 2]], stackwise_num_strides=[[2], [2, 1]],
        stackwise_se_ratio=[[None], [0.25, 0.25]], stackwise_activation=[["relu"], ["hard_swish"] * 2, ["hard_swish"]],
        input_num_filters=8, output_num_filters=32, depthwise_filters=8, depthwise_stride=2, depthwise_residual=False,
        squeeze_and_excite=0.5, last_layer_filter=32, image_shape=IMAGE,
    ),
    ResNet={**RESNET, **THREE_STAGES, "block_type": "bottleneck_block", "image_shape": IMAGE},
    RetinaNet=lambda: dict(
        image_encoder=models.ResNetBackbone(**RESNET, image_shape=IMAGE), min_level=3, max_level=5, use_p5=False,
        image_shape=IMAGE,
    ),
    SegFormer=lambda: dict(image_encoder=models.MiTBackbone(**MIT), projection_filters=16),
    SwinTransformer=dict(image_shape=IMAGE, embed_dim=8, depths=(2, 2), num_heads=(2, 4), window_size=4, drop_path=0.0),
    VGG=dict(stackwise_num_repeats=[1, 2], stackwise_num_filters=[8, 16], image_shape=IMAGE),
    ViT=dict(VIT, patch_size=(8, 8), mlp_dim=32), MobileNetV5=dict(MOBILE5, image_shape=IMAGE),
    VideoPrism=dict(
        num_frames=3, patch_size=8, hidden_dim=16, intermediate_dim=32, num_heads=4, num_spatial_layers=1,
        num_temporal_layers=1, num_auxiliary_layers=1, image_shape=(16, 16, 3),
    ),
    Xception=dict(
        stackwise_conv_filters=[[8, 16], [24, 24], [32, 32]], stackwise_pooling=[False, True, False], image_shape=IMAGE
    ),
)  # fmt: skip

SEEN = dict(ENCODER, patch_size=8, image_shape=IMAGE, name="vision")
READ = dict(HEADS, max_sequence_length=TOKENS, embedding_dim=16, name="text")
SAM3 = dict(image_shape=(28, 28, 3), patch_size=14)
OTHERS = dict(
    # sound
    Moonshine=dict(
        vocabulary_size=WORDS, filter_dim=16, encoder_num_layers=2, decoder_num_layers=2, hidden_dim=16,
        intermediate_dim=32, encoder_num_heads=2, decoder_num_heads=2,
    ),
    Whisper=dict(HEADS, num_mels=8, max_encoder_sequence_length=16, max_decoder_sequence_length=TOKENS),
    # several modalities
    BLIP2=lambda: dict(
        vision_encoder=models.BLIP2VisionEncoder(
            image_size=16, patch_size=8, **ENCODER, use_patch_bias=True, use_class_token=True, use_mha_bias=True,
            use_mlp_bias=True, dropout_rate=0.0, layer_norm_epsilon=1e-6, initializer_range=0.02,
        ),
        qformer=BLIP2QFormer(
            num_query_tokens=2, **ENCODER, vision_dim=16, cross_attention_frequency=1, dropout=0.0,
            layer_norm_epsilon=1e-6,
        ),
        language_model=BLIP2CustomOPT(
            **HEADS, num_query_tokens=2, qformer_hidden_dim=16, max_sequence_length=16, dropout=0.0
        ),
    ),
    CLIP=lambda: dict(
        vision_encoder=models.CLIPVisionEncoder(**SEEN), text_encoder=models.CLIPTextEncoder(**READ), projection_dim=16
    ),
    Gemma3=lambda: dict(
        GEMMA, image_size=16,
        vision_encoder=models.Gemma3VisionEncoder(**ENCODER, image_size=16, patch_size=4, pool_size=2, output_dim=16),
    ),
    # Tokens 40 to 43 stand for images and those from 44 on for sounds.
    Gemma3n=lambda: dict(
        text_vocab_size=WORDS, text_hidden_size=16, num_hidden_layers=2, pad_token_id=0, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, intermediate_size=[32, 32], hidden_activation="gelu_approximate",
        layer_types=["sliding_attention", "full_attention"], sliding_window=4, rope_theta=10000.0,
        max_position_embeddings=TOKENS, vocab_size_per_layer_input=WORDS, hidden_size_per_layer_input=4,
        altup_num_inputs=2, laurel_rank=2, vision_vocab_size=4, vision_vocab_offset=40, image_token_id=40,
        vision_hidden_size=16, vision_soft_tokens_per_image=4, audio_vocab_size=6, audio_vocab_offset=44,
        audio_token_id=44, audio_hidden_size=16, audio_soft_tokens_per_image=2,
        vision_encoder_config=models.MobileNetV5Backbone(**MOBILE5, image_shape=(16, 16, 3)).get_config(),
        audio_encoder_config=Gemma3nAudioEncoder(
            hidden_size=16, input_feat_size=8, sscp_conv_channel_size=[4, 8], sscp_conv_kernel_size=[(3, 3)] * 2,
            sscp_conv_stride_size=[(2, 2)] * 2, sscp_conv_group_norm_eps=1e-5, num_hidden_layers=1, rms_norm_eps=1e-6,
            gradient_clipping=1e9, residual_weight=0.5, num_attention_heads=2, attention_chunk_size=2,
            num_attention_context_right=1, num_attention_context_left=2, attention_logit_cap=50.0, conv_kernel_size=3,
            reduction_factor=1,
        ).get_config(),
    ),
    Gemma4=lambda: dict(
        GEMMA, image_size=16, num_audio_tokens_per_clip=2,
        vision_encoder=models.Gemma4VisionEncoder(
            **ENCODER, image_size=16, patch_size=4, pool_size=2, head_dim=4, output_dim=16, position_embedding_size=8
        ),
        audio_encoder=models.Gemma4AudioEncoder(
            input_feat_size=8, hidden_size=16, num_heads=2, num_layers=1, chunk_size=4, context_left=5,
            context_right=0, sscp_conv_channels=(4, 2), sscp_kernel_sizes=((3, 3), (3, 3)),
            sscp_stride_sizes=((2, 2), (2, 2)), output_proj_dims=None, output_dim=16,
        ),
    ),
    MetaCLIP2=lambda: dict(
        vision_encoder=models.MetaCLIP2VisionEncoder(**SEEN), text_encoder=models.MetaCLIP2TextEncoder(**READ),
        projection_dim=16,
    ),
    PARSeq=lambda: dict(
        image_encoder=models.ViTBackbone(**VIT, patch_size=(8, 8), mlp_dim=32, use_class_token=False),
        vocabulary_size=WORDS, max_label_length=TOKENS, decoder_hidden_dim=16, num_decoder_layers=1,
        num_decoder_heads=2, decoder_mlp_dim=32, dropout_rate=0.0, attention_dropout=0.0,
    ),
    PaliGemma=dict(
        GEMMA, image_size=16, vit_patch_size=8, vit_num_heads=4, vit_hidden_dim=16, vit_num_layers=2,
        vit_intermediate_dim=32,
    ),
    SAM=lambda: dict(
        image_encoder=models.ViTDetBackbone(**VITDET),
        prompt_encoder=parts.SAMPromptEncoder(
            hidden_size=8, image_embedding_size=(8, 8), input_image_size=IMAGE[:2], mask_in_channels=8
        ),
        mask_decoder=parts.SAMMaskDecoder(
            num_layers=2, hidden_size=8, intermediate_dim=16, num_heads=2, embedding_dim=8, num_multimask_outputs=3,
            iou_head_depth=2, iou_head_hidden_dim=8,
        ),
    ),
    SAM3PromptableConcept=lambda: dict(
        vision_encoder=parts.SAM3VisionEncoder(
            **SAM3, **ENCODER, fpn_hidden_dim=16, fpn_scale_factors=[4.0, 2.0, 1.0, 0.5], window_size=2,
            pretrain_image_shape=(42, 42, 3), global_attn_indexes=[1],
        ),
        text_encoder=parts.SAM3TextEncoder(**HEADS, embedding_dim=16, max_sequence_length=TOKENS),
        geometry_encoder=parts.SAM3GeometryEncoder(**ENCODER, roi_size=3),
        detr_encoder=parts.SAM3DetrEncoder(**ENCODER),
        detr_decoder=parts.SAM3DetrDecoder(**SAM3, **ENCODER, num_queries=6),
        mask_decoder=parts.SAM3MaskDecoder(num_upsampling_stages=3, hidden_dim=16, num_heads=4),
    ),
    SigLIP=lambda: dict(
        vision_encoder=models.SigLIPVisionEncoder(**SEEN), text_encoder=models.SigLIPTextEncoder(**READ)
    ),
    # diffusion
    Flux=dict(
        input_channels=8, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=2, depth_single_blocks=2, theta=10_000,
        axes_dim=[4, 6, 6], use_bias=True, guidance_embed=True, image_shape=(4, 8), text_shape=(TOKENS, 8),
        image_ids_shape=(4, 3), text_ids_shape=(TOKENS, 3), y_shape=(8,),
    ),
    StableDiffusion3=lambda: dict(
        mmdit_patch_size=2, mmdit_hidden_dim=32, mmdit_num_layers=2, mmdit_num_heads=2, mmdit_position_size=8,
        mmdit_qk_norm=None, mmdit_dual_attention_indices=None, image_shape=IMAGE,
        vae=VAEBackbone([32] * 4, [1] * 4, [32] * 4, [1] * 4, sampler_method="mode", name="vae"),
        clip_l=models.CLIPTextEncoder(**dict(READ, intermediate_output_index=-2, name="clip_l")),
        clip_g=models.CLIPTextEncoder(**dict(READ, intermediate_output_index=-2, name="clip_g")),
    ),
)  # fmt: skip

TEXT = {**DECODERS, **ENCODERS, **ENCODER_DECODERS}
BACKBONES = {**TEXT, **VISION, **OTHERS}
PER_TOKEN = {*TEXT, "Moonshine", "Whisper", "BLIP2", "Gemma3", "Gemma3n", "Gemma4", "PARSeq", "PaliGemma"}
ONLY_FLOAT32 = {  # why they fail in float64
    **dict.fromkeys(("Mixtral", "Qwen3Moe", "QwenMoe"), "the mask in their load balancing loss is float32"),
    **dict.fromkeys(("Qwen3_5", "Qwen3_5Moe"), "their linear attention is float32, times what is floatx"),
    **dict.fromkeys(("T5", "Gemma3n"), "they add int32 to positions, int64 if floatx is float64"),
}
# What computes something in float32, whatever it is told.
FLOAT32_INSIDE = {
    "BASNet", "BLIP2", "Bloom", "DFine", "DebertaV3", "DeepLabV3", "DepthAnything", "FNet", "Falcon", "Flux", "GPTNeoX",
    "Gemma", "Gemma3", "Gemma3Text", "Gemma4", "Gemma4Text", "GptOss", "Llama", "Llama3", "Mistral", "MobileNetV5",
    "PaliGemma", "Phi3", "Qwen", "Qwen3", "RWKV7", "RoformerV2", "SegFormer", "SmolLM3", "StableDiffusion3", "T5Gemma",
    "T5Gemma2", "VideoPrism", "Whisper",
}  # fmt: skip
# Nor evaluated: 9 rows with 8 boxes each happen to fit.
NOT_TRAINED = {"SAM3PromptableConcept": "its geometry encoder gives attention a mask (rows, boxes + 1)"}
# Statistics over a batch, losses that layers add, and a mask that mixes samples are not those of micro-batches.
OF_WHOLE_BATCHES = {
    "BASNet", "CSPNet", "DFine", "DeepLabV3", "DenseNet", "EfficientNet", "HGNetV2", "Mixtral", "MobileNet",
    "Qwen3Moe", "Qwen3_5Moe", "QwenMoe", "ResNet", "RetinaNet", "SegFormer", "XLNet", "Xception",
}  # fmt: skip
# A part of the path of the weights that have no gradient.
UNUSED = dict(DepthAnything="stage_0/residual_layer1", SAM="no_mask_embed", XLNet="mask_emb")


def dtype(name):
    """The dtype in which a model is compared."""
    return "float32" if name in ONLY_FLOAT32 else "float64"


def backbone(name):
    """The backbone of this name."""
    config = BACKBONES[name]
    built = getattr(models, name.removesuffix("Text") + "Backbone")(**(config() if callable(config) else config))
    for layer in built._flatten_layers():
        if isinstance(layer, layers.Dropout):
            layer.rate = 0.0  # MiT's is always 0.1
    if name == "StableDiffusion3":
        built.scheduler.set_sigmas(2)  # as KerasHub does before it makes images: it cannot be done in a graph
    return built


FEATURES = {  # what the head looks at, where it is not the output
    # the way back from features to words, by weights that are not those of the way there
    **dict.fromkeys(("GptOss", "Mistral", "Mixtral", "Phi3"), lambda of: of.token_embedding(of.output, reverse=True)),
    **dict.fromkeys(("BLIP2", "PaliGemma"), lambda of: of.output[:, -TOKENS:]),  # the image comes first
    # the logits of these compare every row of a batch with every other
    "CLIP": lambda of: of.clip_head.input,
    "MetaCLIP2": lambda of: of.metaclip_2_head.input,
    "SigLIP": lambda of: of.siglip_head.input,
    "DFine": lambda of: [v for k, v in of.output.items() if k.startswith(("last", "intermediate", "enc_topk"))],
    "DepthAnything": lambda of: of.output[..., 0],
    "SAM": lambda of: of.mask_decoder(**of.output),
    "SAM3PromptableConcept": lambda of: of.output["pred_logits"],  # the shapes of others are not what they seem
}  # fmt: skip


def model(name):
    """The backbone of this name with a softmax: over words for each token, or over classes for each row."""
    of = backbone(name)
    x = of.input if len(of.inputs) == 1 else {x.name: x for x in of.inputs}
    h = FEATURES[name](of) if name in FEATURES else of.output
    h, classes = (_of_tokens(h), WORDS) if name in PER_TOKEN else (_of_row(h), CLASSES)
    return keras.Model(x, layers.Dense(classes, activation="softmax")(h), name=name)


def _of_tokens(h):
    """Features of tokens, (rows, tokens, width); what is pooled is added to each: it has a gradient then."""
    if not isinstance(h, dict):
        return h
    sequence, pooled = h.get("decoder_sequence_output", h.get("sequence_output")), h.get("pooled_output")
    return sequence if pooled is None else sequence + ops.expand_dims(pooled, 1)


def _of_row(h):
    """Features of a row, (rows, width): the means over all that is between, of one size."""
    means = [ops.mean(v, axis=range(1, len(v.shape) - 1)) if len(v.shape) > 2 else v for v in keras.tree.flatten(h)]
    return layers.LayerNormalization()(means[0] if len(means) == 1 else ops.concatenate(means, axis=-1))


def _floats(*shape):
    return lambda rng, rows: rng.uniform(size=(rows, *shape)).astype(keras.config.floatx())


def _same(*values):
    return lambda rng, rows: np.array([values] * rows)


def _lengths(size, *shape):
    """A mask: True, then False; at least half is True."""
    return lambda rng, rows: np.arange(size) < rng.integers(size // 2, size + 1, size=(rows, *shape, 1))


def _gemma3n_tokens(rng, rows):
    """An image of four tokens, a sound of two, and other tokens of any kind."""
    tokens = rng.integers(1, WORDS, size=(rows, TOKENS))
    tokens = np.where(np.isin(tokens, (40, 44)), tokens + 1, tokens)
    tokens[:, 1:5], tokens[:, 5:7] = 40, 44
    return tokens


PLACES = {"vision_indices": _same(1, 2, 3, 4), "vision_mask": _same(0, 1, 1, 1, 1, 0, 0, 0)}  # of the image
FED = {  # what cannot be told from the name and the shape of an input
    "Moonshine": {"encoder_input_values": _floats(2400, 1), "encoder_padding_mask": _lengths(2400)},
    "Whisper": {"encoder_features": _floats(16, 8)},
    "Gemma3": {"images": _floats(1, 16, 16, 3), **PLACES},
    "Gemma3n": {
        "token_ids": _gemma3n_tokens, "images": _floats(1, 16, 16, 3), "input_features": _floats(1, 8, 8),
        "input_features_mask": _same([False] * 8),  # True is padding
    },
    "Gemma4": {
        **PLACES, "pixel_values": _floats(1, 16, 48), "audio_indices": _same(5, 6), "audio_mel": _floats(1, 8, 8),
        "pixel_position_ids": _same([[i, j] for i in range(4) for j in range(4)]), "audio_mel_mask": _lengths(8, 1),
        "audio_mask": _same(0, 0, 0, 0, 0, 1, 1, 0), "position_ids": _same(*range(TOKENS)),
    },
    "Gemma4Text": {"position_ids": _same(*range(TOKENS))},
    "PaliGemma": {"response_mask": _same(0, 0, 0, 0, 1, 1, 1, 1)},
    "SAM": {"labels": _same(1.0, 0.0, -1.0, 1.0, 0.0, -1.0, 1.0, 0.0), "masks": _floats(1, 32, 32, 1)},
    "Flux": {"image_ids": _same(*[(0, i, j) for i in (0, 1) for j in (0, 1)]), "text_ids": _same(*[[0] * 3] * TOKENS)},
    "StableDiffusion3": {
        "num_steps": lambda rng, rows: np.full(rows, 2), "guidance_scale": lambda rng, rows: np.full(rows, 3.0),
    },
}  # fmt: skip


def _values(rng, name, shape):
    """What an input of this name is fed."""
    rows, *others = shape
    if name.endswith("padding_mask"):
        return _lengths(*others)(rng, rows)
    if name.endswith(("segment_ids", "token_ids")):
        return rng.integers(*((0, 2) if name.startswith("segment") else (1, WORDS)), size=shape)
    return _floats(*others)(rng, rows)


def data(model_or_name, rows):
    """Rows for this model: what it is fed, an array or a dict of arrays, and the right class for each softmax."""
    built = model(model_or_name) if isinstance(model_or_name, str) else model_or_name
    rng, tokens, fed, x = np.random.default_rng(0), LENGTHS.get(built.name, TOKENS), FED.get(built.name, {}), {}
    for tensor in built.inputs:
        shape = (rows, *(tokens if size is None else size for size in tensor.shape[1:]))
        x[tensor.name] = fed[tensor.name](rng, rows) if tensor.name in fed else _values(rng, tensor.name, shape)
    y = rng.integers(0, built.output.shape[-1], size=(rows, tokens) if built.name in PER_TOKEN else rows)
    return x if isinstance(built.input, dict) else x[built.input.name], y
