"""Quantization: how weights and inputs of fewer than 32 bits are made. Torch-free."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

Bits = Literal[2, 3, 4, 5, 6, 8, 16, 32]
ScaleMethod = Literal["minmax", "percentile", "mse"]
Rounding = Literal["nearest", "gptq", "adaptive"]
ActivationBits = Literal[8, 16, 32]
BlockSize = Literal[16, 32, 64, 128, 256]
Half = Literal["float16", "bfloat16"]
Activations = Literal["static", "dynamic", "fp8"]
Equalize = Literal["none", "cross_layer", "smooth", "both"]
BITS: tuple[Bits, ...] = get_args(Bits)
SCALE_METHODS: tuple[ScaleMethod, ...] = get_args(ScaleMethod)
ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)
ACTIVATION_BITS: tuple[ActivationBits, ...] = get_args(ActivationBits)
BLOCK_SIZES: tuple[BlockSize, ...] = get_args(BlockSize)
HALVES: tuple[Half, ...] = get_args(Half)
ACTIVATIONS: tuple[Activations, ...] = get_args(Activations)
EQUALIZATIONS: tuple[Equalize, ...] = get_args(Equalize)
# Up to these the weights of a layer are integers on a grid; above they are floating-point numbers.
INTEGER_BITS = 8


def computed_in(bits: int) -> int:
    """Return the bit-width of the arithmetic of a layer whose inputs may be integers: 8, or 32 for float."""
    return 8 if bits <= INTEGER_BITS else 32


class Quantization(BaseModel):
    """How the weights of groups with 2 to 8 bits are put on their grids, after all training or in its course.

    Every output channel has a symmetric grid of its own, ``-(2^(b-1) - 1) ... 2^(b-1) - 1`` times a scale. Weights of
    16 bits are stored as such and computed with in float.

    Attributes:
        scale: Where the grid ends. ``minmax``: at the largest magnitude; ``percentile``: at a quantile of magnitudes,
            beyond which weights are clipped; ``mse``: where the squared error of the weights is least.
        percentile: The quantile, in percent.
        rounding: Which of its two neighbours on the grid each weight becomes. ``nearest``; ``gptq``: weights one after
            another, each error made good by the weights to come [Frantar2023]_; ``adaptive``: all together, so that
            the layer's outputs change least [Nagel2020]_.
        bias_correction: Whether what quantization adds to the mean of every output is taken off its bias [Nagel2019]_.
        aware: Share of the fine-tuning steps, the last ones, that are taken with rounded weights and inputs and learned
            scales [Esser2020]_; 0: the network is quantized after training, 1: quantized, then fine-tuned. Under a
            schedule, of the steps after the last cut; nothing in the order ``tune-prune-quantize``.
        aware_bits: Largest bit-width that calls for it: a network all of whose integers have more is trained in float.
        block_size: Features of an output channel, one after another, that share a scale; None: all of them do. For
            layers whose inputs are not of 8 bits: int8 kernels take one scale for each channel. Layers whose features
            are no multiple of it, grouped and transposed ones keep one scale for each channel.
        half: What weights of 16 bits are stored as.
        activations: Whether the range of 8 bit inputs is taken from calibration (``static``) or, in linear layers, from
            the inputs of each inference (``dynamic``); or linear layers with weights of 8 bits run in fp8 (e4m3), both
            of them floating-point numbers of 8 bits, each row over its own range (``fp8``; GPUs alone).
        equalize: Rescaling of channels between layers before grids are made, which leaves the network's outputs as they
            are. ``cross_layer``: what makes a channel and what reads it get equal ranges [Nagel2019]_; ``smooth``:
            large inputs behind a LayerNorm are moved into the weights that read them [Xiao2023]_; ``both``: first the
            one, then the other.
        smooth_alpha: Share of the range of inputs that ``smooth`` moves into the weights.

    References:
        [Esser2020] Learned Step Size Quantization, ICLR 2020.
        [Nagel2019] Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV 2019.
        [Nagel2020] Up or Down? Adaptive Rounding for Post-Training Quantization, ICML 2020.
        [Frantar2023] GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, ICLR 2023.
        [Xiao2023] SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models, ICML 2023.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    scale: ScaleMethod = "minmax"
    percentile: Annotated[float, Field(gt=50.0, le=100.0)] = 99.9
    rounding: Rounding = "nearest"
    bias_correction: bool = False
    aware: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    aware_bits: Annotated[int, Field(ge=2, le=INTEGER_BITS)] = INTEGER_BITS
    block_size: BlockSize | None = None
    half: Half = "float16"
    activations: Activations = "static"
    equalize: Equalize = "none"
    smooth_alpha: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5

    @property
    def usual_integers(self) -> bool:
        """Whether int8 weights are what runtimes make by themselves: nearest integers of channels' whole ranges."""
        return (
            self.scale == "minmax" and self.rounding == "nearest" and not (self.bias_correction or self.aware)
        )

    def content(self) -> dict[str, Any]:
        """Return the settings as plain data; those that came later only where they are not as by default."""
        fresh = Quantization()
        later = {name for name in _LATER if getattr(self, name) == getattr(fresh, name)}
        return self.model_dump(mode="json", exclude=later)

    def of_weights(self, *, integers: bool, halves: bool) -> Quantization:
        """Return the settings without those that nothing depends on.

        Args:
            integers: Whether there are weights of 2 to 8 bits.
            halves: Whether there are weights of 16 bits.
        """
        silent = set() if integers else set(Quantization.model_fields) - {"half"}
        silent |= set() if self.aware else {"aware_bits"}
        silent |= {"percentile"} if self.scale != "percentile" else set()
        silent |= {"smooth_alpha"} if self.equalize not in SMOOTHING else set()
        silent |= set() if halves else {"half"}
        kept = {name: getattr(self, name) for name in Quantization.model_fields if name not in silent}
        return Quantization.model_validate(kept)


# Forms of equalisation that use `smooth_alpha`.
SMOOTHING: tuple[Equalize, ...] = ("smooth", "both")
# Settings that came after the first studies were recorded, which compare recipes by their text.
_LATER = ("aware_bits", "block_size", "half", "activations", "equalize", "smooth_alpha")
