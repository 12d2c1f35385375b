"""The built-in passes as data, so that listing them imports none of them.

Written by tools/pass_table.py; a test compares it with the classes.
"""

# ruff: noqa: E501

from __future__ import annotations

from lwc.pipeline.registry import OptionInfo, PassInfo

__all__ = ["BUILTIN"]

BUILTIN: tuple[PassInfo, ...] = (
    PassInfo(
        name="add-kv-cache",
        target="lwc.passes.attention.add_kv_cache:AddKvCache",
        summary="Let a causal model read the keys and values of earlier tokens, and give those of all.",
        contract="exact",
        options=(
            OptionInfo(
                name="mask",
                type="str",
                default="attention_mask",
                help="The input that masks padding; made where there is none of that name.",
            ),
        ),
    ),
    PassInfo(
        name="add-lora",
        target="lwc.passes.training.add_lora:AddLora",
        summary="Add x·A·B to linear layers, with A random and B zero, so that there is something to train.",
        contract="exact",
        options=(
            OptionInfo(name="rank", type="int", default="8", help="Columns of A and rows of B."),
            OptionInfo(
                name="alpha",
                type="float",
                default="16.0",
                help="What is added is multiplied by alpha / rank.",
            ),
            OptionInfo(
                name="layers",
                type="list of str",
                default="",
                help="Patterns (`*`, `?`, `[...]`) of names of nodes or weights; by default all but those that give one number for each token of the vocabulary.",
            ),
        ),
    ),
    PassInfo(
        name="bind-dims",
        target="lwc.passes.cleanup.bind_dims:BindDims",
        summary="Set named dimensions of the inputs to numbers, as in bind-dims{batch=1 sequence=128}.",
        contract="exact",
        options=(
            OptionInfo(
                name="*", type="int", default="", help="Pairs of a dimension's name and its extent."
            ),
        ),
    ),
    PassInfo(
        name="canonicalize",
        target="lwc.passes.cleanup.canonicalize:Canonicalize",
        summary="Fold constants, merge duplicates, drop what does nothing, simplify shape computations.",
        contract="exact",
        options=(
            OptionInfo(
                name="decompress",
                type="bool",
                default="false",
                help="Also fold constants into weights larger than those they are made of.",
            ),
            OptionInfo(
                name="fold-memory",
                type="int",
                default="1024",
                help="Bound in MiB on the memory one constant folding may take.",
            ),
        ),
    ),
    PassInfo(
        name="convert-dtype",
        target="lwc.passes.quantization.convert_dtype:ConvertDtype",
        summary="Compute in half precision where operators admit it and the numbers allow it.",
        contract="approximate",
        options=(
            OptionInfo(
                name="dtype",
                type="float16|bfloat16",
                default="float16",
                help="The half type.",
                positional=True,
            ),
            OptionInfo(
                name="keep-io",
                type="bool",
                default="true",
                help="Whether graph inputs and outputs stay float32, behind a Cast.",
            ),
            OptionInfo(
                name="exclude",
                type="list of str",
                default="",
                help="Patterns (`*`, `?`, `[...]`) of names or operators of nodes that stay float32.",
            ),
        ),
    ),
    PassInfo(
        name="fold-linear",
        target="lwc.passes.cleanup.fold_linear:FoldLinear",
        summary="Fold batch norm, padding, bias and scale into Conv, ConvTranspose, Gemm and MatMul.",
        contract="exact",
        options=(),
    ),
    PassInfo(
        name="fuse-activation",
        target="lwc.passes.fusion.fuse_activation:FuseActivation",
        summary="Compute GELU and SiLU as one operator, with the bias before it.",
        contract="exact",
        options=(
            OptionInfo(
                name="form",
                type="auto|standard|contrib",
                default="auto",
                help="`standard` is Gelu (opset 20) and Swish (opset 24), `contrib` ONNX Runtime's Gelu, FastGelu, BiasGelu and QuickGelu; `auto` takes the standard's Gelu where the opset has it and nothing is added before, and always QuickGelu, because ONNX Runtime takes Swish apart again.",
            ),
        ),
    ),
    PassInfo(
        name="fuse-attention",
        target="lwc.passes.attention.fuse_attention:FuseAttention",
        summary="Compute attention as one operator: MultiHeadAttention, GroupQueryAttention or Attention.",
        contract="exact",
        options=(
            OptionInfo(
                name="form",
                type="auto|standard|mha|gqa",
                default="auto",
                help="`gqa` and `mha` are ONNX Runtime's GroupQueryAttention and MultiHeadAttention, `standard` is the Attention of opset 23; `auto` takes the first that can express it.",
            ),
        ),
    ),
    PassInfo(
        name="fuse-epilogue",
        target="lwc.passes.fusion.fuse_epilogue:FuseEpilogue",
        summary="Compute what follows a `lwc::DynamicQuantMatMul` in that operator.",
        contract="exact",
        options=(),
    ),
    PassInfo(
        name="fuse-norm",
        target="lwc.passes.fusion.fuse_norm:FuseNorm",
        summary="Compute LayerNorm and RMSNorm as one operator, with the residual sum before it.",
        contract="exact",
        options=(
            OptionInfo(
                name="form",
                type="auto|standard|contrib",
                default="auto",
                help="`standard` is LayerNormalization (opset 17) and RMSNormalization (opset 23), `contrib` ONNX Runtime's SimplifiedLayerNormalization for RMSNorm; `auto` takes the standard's where the opset has it, else ONNX Runtime's of the same domain, which other tools do not know.",
            ),
            OptionInfo(
                name="skip",
                type="auto|all|none",
                default="auto",
                help="Which norms take the sum before them along, into ONNX Runtime's SkipLayerNormalization and SkipSimplifiedLayerNormalization: `all`, `none`, or with `auto` those where that is no slower on the CPU, which is RMSNorm. None where `form` is `standard`.",
            ),
        ),
    ),
    PassInfo(
        name="fuse-rotary",
        target="lwc.passes.attention.fuse_rotary:FuseRotary",
        summary="Compute rotary position embedding as one operator that looks cosines and sines up.",
        contract="exact",
        options=(
            OptionInfo(
                name="max-positions",
                type="int",
                default="0",
                help="Positions in tables where the graph does not bound them; 0 for what `config.json` says, up to 131072, or 4096.",
                positional=True,
            ),
            OptionInfo(
                name="form",
                type="auto|standard|contrib",
                default="auto",
                help="`contrib` is ONNX Runtime's RotaryEmbedding, `standard` that of opset 23; `auto` takes the standard one where the model has that opset.",
            ),
        ),
    ),
    PassInfo(
        name="infer-shapes",
        target="lwc.passes.cleanup.infer_shapes:InferShapes",
        summary="Write the inferred type and shape on every value.",
        contract="exact",
        options=(),
    ),
    PassInfo(
        name="last-logits",
        target="lwc.passes.attention.last_logits:LastLogits",
        summary="Compute the logits of the last positions alone.",
        contract="exact",
        options=(
            OptionInfo(
                name="count",
                type="int",
                default="1",
                help="How many positions are kept; 0 lets an input `num_logits_to_keep` say it at run time, for which 0 means all.",
            ),
            OptionInfo(
                name="output",
                type="str",
                default='""',
                help="The output that has the logits; the first one by default.",
            ),
            OptionInfo(
                name="mask",
                type="str",
                default="attention_mask",
                help="The input that masks padding, of past tokens too.",
            ),
        ),
    ),
    PassInfo(
        name="llm-int8",
        target="lwc.passes.quantization.llm_int8:LlmInt8",
        summary="Compute linear layers in int8, but for the channels of large activations.",
        contract="lossy",
        options=(
            OptionInfo(
                name="threshold",
                type="float",
                default="6.0",
                help="Magnitude from which on a channel stays in floating point; at 0 all do, and layers stay as they are.",
                positional=True,
            ),
            OptionInfo(
                name="embeddings",
                type="4|8 or none",
                default="none",
                help="Bits of tables read by Gather, and of what is tied to them, as in `quantize-weights`.",
            ),
            OptionInfo(
                name="ops",
                type="list of str",
                default="MatMul,Gemm",
                help="Operators whose weights are quantized.",
            ),
            OptionInfo(
                name="exclude",
                type="list of str",
                default="",
                help="Patterns (`*`, `?`, `[...]`) of names of nodes or weights to leave alone.",
            ),
        ),
    ),
    PassInfo(
        name="merge-lora",
        target="lwc.passes.training.merge_lora:MergeLora",
        summary="Fold adapters x·A·B, added to a linear layer x·W, into its weight.",
        contract="exact",
        options=(),
    ),
    PassInfo(
        name="mixed-precision",
        target="lwc.passes.quantization.mixed_precision:MixedPrecision",
        summary="Round each linear layer to bits of its own, so that a budget buys the most quality.",
        contract="lossy",
        options=(
            OptionInfo(
                name="budget",
                type="float or str",
                default=None,
                help="Bits per weight of the layers that are rounded, scales and zero points included (`5.5`; in blocks of 32 these take 1.125 of them in MatMulNBits, 0.75 in `lwc`); or bytes of all weights of the model, embeddings included (`80MB`).",
                positional=True,
            ),
            OptionInfo(
                name="bits", type="list of 2|3|4|8", default="4,8", help="What a layer may have."
            ),
            OptionInfo(
                name="method",
                type="rtn|gptq|awq",
                default="rtn",
                help="See `quantize-weights`; costs of `awq` are measured with its clipping alone.",
            ),
            OptionInfo(
                name="embeddings",
                type="4|8 or none",
                default="8",
                help="Bits of tables read by Gather, and of what is tied to them.",
            ),
            OptionInfo(
                name="block-size",
                type="int or none",
                default="none",
                help="See `quantize-weights`.",
            ),
            OptionInfo(
                name="symmetric", type="bool", default="false", help="See `quantize-weights`."
            ),
            OptionInfo(
                name="search", type="none|mse", default="mse", help="See `quantize-weights`."
            ),
            OptionInfo(
                name="exclude",
                type="list of str",
                default="",
                help="Patterns of names of nodes or weights to leave alone.",
            ),
            OptionInfo(
                name="format",
                type="matmulnbits|qdq|lwc",
                default="matmulnbits",
                help="See `quantize-weights`; 3 bits need `lwc`.",
            ),
            OptionInfo(
                name="accuracy-level", type="0|1|2|3|4", default="4", help="See `quantize-weights`."
            ),
            OptionInfo(
                name="samples",
                type="int",
                default="2",
                help="Feeds of the calibration data to measure on.",
            ),
            OptionInfo(
                name="window",
                type="int",
                default="128",
                help="Tokens of each, where feeds are plain token ids.",
            ),
        ),
    ),
    PassInfo(
        name="pack-projections",
        target="lwc.passes.attention.pack_projections:PackProjections",
        summary="Compute linear operators that read one activation as one, with joined weights.",
        contract="exact",
        options=(
            OptionInfo(
                name="when",
                type="auto|decode|prefill|always",
                default="auto",
                help="When to pack: `auto` where it pays for one token and for a prompt of 512, `decode` where it pays for one token, `prefill` for a prompt, `always` in any case. The cost model decides: by predicted time on the measured target of a run, and without one by the bytes that are moved.",
            ),
        ),
    ),
    PassInfo(
        name="quantize-kv-cache",
        target="lwc.passes.quantization.quantize_kv_cache:QuantizeKvCache",
        summary="Store the cache of fused attention as integers of 8 or 4 bits.",
        contract="lossy",
        options=(
            OptionInfo(
                name="bits",
                type="4|8",
                default="8",
                help="Bits of a number in the cache.",
                positional=True,
            ),
            OptionInfo(
                name="scales",
                type="channel|tensor",
                default="channel",
                help="`channel` gives each channel of each head a scale of its own, `tensor` one to all keys of a layer and one to its values.",
            ),
        ),
    ),
    PassInfo(
        name="quantize-weights",
        target="lwc.passes.quantization.quantize_weights:QuantizeWeights",
        summary="Round the weights of linear layers and embeddings to a few bits, in blocks.",
        contract="lossy",
        options=(
            OptionInfo(
                name="bits",
                type="2|3|4|8",
                default="4",
                help="Bits of the weights of MatMul and Gemm.",
            ),
            OptionInfo(
                name="codebook",
                type="uniform|nf4",
                default="uniform",
                help="`uniform` has evenly spaced levels; `nf4` the 16 of NormalFloat, quantiles of the normal distribution, times the largest magnitude of a block (Dettmers et al. 2023, QLoRA). It needs 4 bits and whole blocks; tables read by Gather stay uniform.",
            ),
            OptionInfo(
                name="method",
                type="rtn|gptq|awq",
                default="rtn",
                help="`rtn` rounds to nearest; `gptq` lets the weights that are not rounded yet make up for each error (Frantar et al. 2023); `awq` scales up inputs that see large activations, where what makes the activation can take the factor, and clips blocks (Lin et al. 2024).",
            ),
            OptionInfo(
                name="embeddings",
                type="4|8 or none",
                default="8",
                help="Bits of tables read by Gather; none leaves them, and what is tied to them.",
            ),
            OptionInfo(
                name="block-size",
                type="int or none",
                default="none",
                help="Weights that share a scale; a power of two from 16 (32 in `lwc` and `auto`) to 32768. With `format=qdq` or `lwc`, 0 gives each output channel one scale. By default 32, with `codebook=nf4` 64, but 16 for 8-bit weights of MatMulNBits whose layer reads a product of activations, as after a gate: its spread within a block decides the error at accuracy level 4.",
            ),
            OptionInfo(
                name="symmetric",
                type="bool",
                default="false",
                help="Whether the zero point is fixed in the middle. That saves a byte or half a byte per block.",
            ),
            OptionInfo(
                name="search",
                type="none|mse",
                default="mse",
                help="How scales are chosen: `mse` tries a few grids per block (of nf4, the levels and their mirror image) and keeps the one of least squared error, `none` takes the block's range.",
            ),
            OptionInfo(
                name="damping",
                type="float",
                default="0.01",
                help="Of GPTQ: added to the diagonal of X·Xᵀ, as a share of its mean, up to 1.",
            ),
            OptionInfo(
                name="act-order",
                type="bool",
                default="true",
                help="Of GPTQ: round the inputs of the largest activations first.",
            ),
            OptionInfo(
                name="ops",
                type="list of str",
                default="MatMul,Gemm",
                help="Operators whose weights are quantized.",
            ),
            OptionInfo(
                name="exclude",
                type="list of str",
                default="",
                help="Patterns (`*`, `?`, `[...]`) of names of nodes or weights to leave alone.",
            ),
            OptionInfo(
                name="format",
                type="matmulnbits|qdq|lwc|auto",
                default="matmulnbits",
                help="`matmulnbits` lowers to ONNX Runtime's MatMulNBits (of nf4, MatMulBnb4) and GatherBlockQuantized, `qdq` to the standard DequantizeLinear (of nf4, Gather and Mul, which ONNX Runtime computes when it loads the model: the file is small, the memory not), `lwc` to lwc::DynamicQuantMatMul, the only one with 3 bits; an embedding alone stays GatherBlockQuantized. `auto` takes for each weight the faster of `matmulnbits` and `lwc` on the measured target, for one token and a prompt of 512 together, and leaves a weight alone that neither makes as fast as float32 in both.",
            ),
            OptionInfo(
                name="accuracy-level",
                type="0|1|2|3|4",
                default="4",
                help="How products are computed: 4 rounds activations to int8 per block, which is fast and adds about 0.5 % relative error to a layer's output; 1 is float32, which `lwc` does not have.",
            ),
        ),
    ),
    PassInfo(
        name="recover",
        target="lwc.passes.training.recover:Recover",
        summary="Train the model on the calibration data, so that it regains what other passes lost.",
        contract="lossy",
        options=(
            OptionInfo(
                name="method",
                type="lora|full",
                default="lora",
                help="`lora` trains low-rank adapters, those that are there or else new ones as of `add-lora`; `full` the weights of MatMul, Gemm and Conv, with embeddings that are tied to one of them.",
            ),
            OptionInfo(name="rank", type="int", default="8", help="Of new adapters."),
            OptionInfo(
                name="alpha",
                type="float",
                default="16.0",
                help="Of new adapters: they are multiplied by alpha / rank.",
            ),
            OptionInfo(
                name="layers",
                type="list of str",
                default="",
                help="Of new adapters: see `add-lora`.",
            ),
            OptionInfo(name="steps", type="int", default="100", help="Updates."),
            OptionInfo(
                name="learning-rate",
                type="float or none",
                default="none",
                help="The highest one, after a warm-up; by default 1e-3 for adapters and 1e-5 for weights.",
            ),
            OptionInfo(
                name="batch",
                type="int",
                default="1",
                help="Feeds whose gradients are averaged for an update.",
            ),
            OptionInfo(
                name="teacher",
                type="str or none",
                default="auto",
                help="A model, by its file or folder; `auto` is the module as it was before the first pass of the pipeline, where that gives something else; `none` is none.",
            ),
            OptionInfo(
                name="loss",
                type="auto|cross-entropy|kl|reverse-kl|mse",
                default="auto",
                help="`kl` is the divergence of the teacher's logits from the model's, `reverse-kl` that of the model's from the teacher's, `mse` the relative squared error of all outputs, `cross-entropy` that of next tokens. `auto` is `kl` with a teacher of a model with logits for tokens, `mse` with another, `cross-entropy` without.",
            ),
            OptionInfo(
                name="kd-weight",
                type="float",
                default="0.5",
                help="Share of the teacher in the loss, where next tokens can be predicted too.",
            ),
            OptionInfo(
                name="temperature",
                type="float",
                default="1.0",
                help="What logits are divided by in divergences.",
            ),
            OptionInfo(
                name="held-out",
                type="float",
                default="0.1",
                help="Share of the feeds, the last ones, that are not trained on.",
            ),
            OptionInfo(
                name="merge",
                type="bool",
                default="true",
                help="Whether adapters become part of the weights afterwards, as of `merge-lora`.",
            ),
            OptionInfo(
                name="keep-zeros",
                type="bool",
                default="true",
                help="Whether weights that are 0 stay 0. Adapters, also those that are there, leave rows and columns that are 0 altogether; where more than a quarter of the other weights of a layer are, its adapter is not trained. Fewer count as chance, and change with an adapter, as all of a quantized weight does.",
            ),
        ),
    ),
    PassInfo(
        name="rotate",
        target="lwc.passes.quantization.rotate:Rotate",
        summary="Turn the residual stream by an orthogonal matrix, which spreads outliers over all channels.",
        contract="exact",
        options=(
            OptionInfo(
                name="kind",
                type="hadamard|orthogonal",
                default="hadamard",
                help="Which matrix: `hadamard` has entries of one magnitude and random signs, `orthogonal` is drawn from all orthogonal ones alike, for widths that have no known Hadamard matrix.",
                positional=True,
            ),
            OptionInfo(name="seed", type="int", default="0", help="Of the random numbers."),
        ),
    ),
    PassInfo(
        name="smooth",
        target="lwc.passes.quantization.smooth:Smooth",
        summary="Move the spread of activations' channels into the weights behind them.",
        contract="exact",
        options=(
            OptionInfo(
                name="alpha",
                type="float or auto",
                default="0.5",
                help="0 evens out the weights, 1 the activations. `auto` takes for each activation the one of 0, 0.05, ... 1 with which the outputs of the layers behind it change least, in the sum of squares, when activations are rounded to int8 per token and weights per output; it looks at 512 rows of the calibration data. Where none gains, the activation stays.",
                positional=True,
            ),
            OptionInfo(
                name="products",
                type="bool",
                default="false",
                help="Where no constant before an activation can take the division, or something else reads it too, as in post-norm models, let a product with constants divide it before the layers. That is an operator more when the model runs.",
            ),
        ),
    ),
    PassInfo(
        name="smooth-quantize",
        target="lwc.passes.quantization.smooth_quantize:SmoothQuantize",
        summary="Compute linear layers in int8: smooth activations, then round them and the weights.",
        contract="lossy",
        options=(
            OptionInfo(
                name="alpha",
                type="float or auto or none",
                default="auto",
                help="See `smooth`; `none` leaves activations as they are.",
                positional=True,
            ),
            OptionInfo(name="products", type="bool", default="false", help="See `smooth`."),
            OptionInfo(
                name="activations",
                type="per-token|per-tensor|static",
                default="per-token",
                help="`per-token` gives each token a scale when the model runs, by lwc::DynamicQuantMatMul; `per-tensor` each tensor, by ONNX Runtime's DynamicQuantizeMatMul; `static` takes scales from calibration data and writes standard QuantizeLinear and DequantizeLinear, which any runtime loads.",
            ),
            OptionInfo(
                name="clip",
                type="mse|entropy|percentile|max",
                default="mse",
                help="Of `static`: where activations are cut off; `mse` at the least squared error, `entropy` where their distribution diverges least (Migacz 2017), `percentile` so that 99.99 % of them lie within, `max` nowhere.",
            ),
            OptionInfo(
                name="weight-bits",
                type="7|8 or none",
                default="none",
                help="By default 8 per token, and 7 otherwise: without VNNI, ONNX Runtime adds products of uint8 and int8 in pairs in 16 bits, which overflow where weights exceed ±64.",
            ),
            OptionInfo(
                name="method",
                type="rtn|gptq",
                default="rtn",
                help="How weights are rounded, as in `quantize-weights`.",
            ),
            OptionInfo(
                name="embeddings",
                type="4|8 or none",
                default="8",
                help="Bits of tables read by Gather, and of what is tied to them, as in `quantize-weights`; `static` leaves them.",
            ),
            OptionInfo(
                name="ops",
                type="list of str",
                default="MatMul,Gemm",
                help="Operators whose weights are quantized.",
            ),
            OptionInfo(
                name="exclude",
                type="list of str",
                default="",
                help="Patterns (`*`, `?`, `[...]`) of names of nodes or weights to leave alone.",
            ),
        ),
    ),
    PassInfo(
        name="sparse-attention",
        target="lwc.passes.attention.sparse_attention:SparseAttention",
        summary="Let attention see a window, strides or summaries, and global tokens, instead of all keys.",
        contract="lossy",
        options=(
            OptionInfo(
                name="pattern", type="window|strided|fixed", default="window", help="See above."
            ),
            OptionInfo(
                name="window",
                type="int",
                default="512",
                help="With `window`: keys seen on each side, the query's own among them.",
            ),
            OptionInfo(
                name="stride",
                type="int",
                default="128",
                help="With `strided` and `fixed`: the stride, or the extent of a block.",
            ),
            OptionInfo(
                name="summary",
                type="int",
                default="8",
                help="With `fixed`: how many keys at the end of each block all later queries see.",
            ),
            OptionInfo(
                name="global-tokens",
                type="int",
                default="0",
                help="How many tokens at the beginning see all and are seen by all.",
            ),
            OptionInfo(
                name="layers",
                type="list of int",
                default="",
                help="Attention operators to change, by their order in the graph from 0; all by default.",
            ),
        ),
    ),
)
